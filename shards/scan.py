"""Read a whole shard once: its checksum, its index, and the facts of each sample that the other commands compare.

Legend: a shard's *damage* is where its tar breaks off; a sample's *fault* is why it cannot be used ('' when it can)."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import Image

from cmgan_dist.data.index import Layout, ShardIndex
from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.sample import Sample, parse_sample
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.errors import BadInput, BadSample

IMAGE_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of a format -> member extension. An MPO is a JPEG with more pictures behind the first."""

SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def check_image(data: bytes) -> tuple[str, int, int]:
    """Return (member extension, width, height) of an encoded image. Raises BadSample unless it decodes to its end."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                kind, (width, height) = image.format or "unknown", image.size
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadSample(f"the image does not decode ({reason})") from None
    if kind not in IMAGE_FORMATS:
        raise BadSample(f"the image is {kind}: expected JPEG, PNG or WebP")
    return IMAGE_FORMATS[kind], width, height


@dataclass
class SampleFacts:
    """What is compared of one sample; the picture and the texts themselves are not kept."""

    key: str
    members: tuple[str, ...]
    """Extensions, in the tar's order."""
    labels: tuple[int, ...] = ()
    fault: str = ""
    image_digest: bytes = b""
    """sha256 of the encoded image or of the feature values."""
    image_dim: int | None = None
    """F_i of image features, None for an encoded image."""
    text_dim: int | None = None
    """F_t of text features, None for UTF-8 texts."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, when the image was decoded."""
    caption_lengths: list[tuple[int, int]] = field(default_factory=list)
    """(characters, words) of each text."""


@dataclass
class ShardScan:
    """What one walk through a tar found."""

    info: ShardInfo
    index: ShardIndex
    samples: list[SampleFacts]
    damage: str
    """Where the tar breaks off; '' for a whole tar."""


class _HashingReader:
    """A file that is read forward only, with the digest and the position of what was read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.position = 0
        self.last = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.last = len(data)
        self.position += self.last
        return data


def sample_facts(key: str, members: dict[str, bytes], *, decode: bool) -> SampleFacts:
    """Return the facts of a sample; with `decode`, its image is decoded. What cannot be used has a fault."""
    facts = SampleFacts(key, tuple(members))
    try:
        sample: Sample = parse_sample(key, members)
    except BadSample as fault:
        facts.fault = str(fault)
        return facts
    facts.labels = sample.labels
    if isinstance(sample.image, np.ndarray):
        facts.image_dim = len(sample.image)
        facts.image_digest = hashlib.sha256(sample.image.tobytes()).digest()
    else:
        facts.image_digest = hashlib.sha256(sample.image).digest()
        if decode:
            try:
                _, *size = check_image(sample.image)
                facts.size = (size[0], size[1])
            except BadSample as fault:
                facts.fault = str(fault)
    if isinstance(sample.texts, np.ndarray):
        facts.text_dim = sample.texts.shape[1]
    else:
        facts.caption_lengths = [(len(text), len(text.split())) for text in sample.texts]
    return facts


def scan_shard(path: Path, name: str, decode: bool = False) -> ShardScan:
    """Read the tar at `path` to its end; `name` is the shard's in the manifest. With `decode`, every image is decoded.

    A tar that breaks off is no error: the scan says where. Raises BadInput when the file cannot be read."""
    offsets: list[int] = []
    layouts: list[Layout] = []
    samples: list[SampleFacts] = []
    damage = ""
    try:
        with open(path, "rb") as file:
            reader = _HashingReader(file)
            try:
                for group in iter_groups(cast(BinaryIO, reader), name):
                    offsets.append(group[0].start)
                    layouts.append(Layout.of(group))
                    members = {member.extension: member.data for member in group}
                    samples.append(sample_facts(group[0].key, members, decode=decode))
                # The walk ends at a zero block, which belongs to no sample, or at the end of the file.
                end = reader.position - reader.last
            except BadSample as error:
                damage, end = str(error), reader.position
            while reader.read(1 << 20):
                pass
    except OSError as error:
        raise BadInput(f"cannot read shard {path}: {error.strerror}") from None
    index = ShardIndex.build(offsets, end, [facts.labels for facts in samples], layouts)
    info = ShardInfo(name, len(samples), os.path.getsize(path), reader.digest.hexdigest())
    return ShardScan(info, index, samples, damage)
