"""Read a whole shard once: its checksum, its index, and the facts of each sample that the other commands compare.

Legend: a shard's *damage* is where its tar breaks off; a sample's *fault* is why it cannot be used ('' when it can)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from cmgan_dist.data.index import Layout, ShardIndex
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.sample import CLASSES, BadLabel, NumberOf, Sample, parse_sample, sources_of
from cmgan_dist.data.tar import NOT_REGULAR, Member, iter_groups, members_of
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import NotRegular, open_regular
from cmgan_dist.models.vocabulary import split_words
from shards.same_text import compared


@dataclass
class SampleFacts:
    """What is compared of one sample; the picture and the texts themselves are not kept."""

    key: str
    members: tuple[str, ...]
    """Extensions, in the tar's order."""
    labels: tuple[int, ...] = ()
    """Class indices as its JSON or ``.cls`` says, () where it has none or says what is none. Where no data set is
    known, names are `FIRST_NAMED` and further numbers (`ShardScan.names`)."""
    label_fault: str = ""
    """Why what these say is no label; a fault where the data set has labels."""
    sources: tuple[str, str, str] = ("", "", "")
    """What image, texts and labels are taken from, where it can be used and no data set is known."""
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
    """(characters, words) of each text; words as the model's vocabulary counts them."""
    text_digests: list[bytes] = field(default_factory=list)
    """Of each text as it is compared (`same_text.py`); of feature values where it has such."""


FIRST_NAMED = CLASSES.stop
"""Number of the first class that a shard's labels name, until all names of the data set are known."""


@dataclass
class ShardScan:
    """What one walk through a tar found."""

    info: ShardInfo
    index: ShardIndex
    samples: list[SampleFacts]
    damage: str
    """Where the tar breaks off, or goes on behind its end; '' for a whole tar."""
    foreign: int = 0
    """Files in the tar that belong to no sample."""
    first_foreign: str = ""
    """Name of the first of them, a link before others: it may have been meant to be of a sample."""
    ended: bool = True
    """Whether the end of a tar stands behind the last member; some writers leave it out, and a cut file lacks it."""
    names: list[str] = field(default_factory=list)
    """Of classes, where no data set is known and labels are names; the first is that of the label `FIRST_NAMED`."""

    def named(self, facts: SampleFacts) -> list[str]:
        """Return the names of a sample's classes; none where its labels are numbers."""
        return [self.names[label - FIRST_NAMED] for label in facts.labels if label >= FIRST_NAMED]

    def numbered(self, numbers: Mapping[str, int]) -> ShardScan:
        """Return a scan in which labels that are names have the numbers of their classes, or are none."""
        if not self.names:
            return self
        samples = []
        for facts in self.samples:
            names = self.named(facts)
            known = all(name in numbers for name in names)
            labels = facts.labels if not names else tuple(sorted(numbers[name] for name in names)) if known else ()
            samples.append(replace(facts, labels=labels))
        index = self.index.labelled([facts.labels for facts in samples])
        return replace(self, info=_with_sidecar(self.info, index), index=index, samples=samples, names=[])


def foreign_files(scan: ShardScan) -> list[str]:
    """Return a line that says how many files of a shard belong to no sample, none where all do, and one where the
    shard's end is missing."""
    lines = []
    if scan.foreign:
        lines.append(f"{scan.foreign} files in {scan.info.name} belong to no sample, the first is {scan.first_foreign}")
    if not scan.ended and not scan.damage:
        lines.append(f"{scan.info.name} ends without a tar's end: if it was cut, get it again")
    return lines


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


def _opened(path: Path) -> BinaryIO:
    """Open a shard. Raises BadInput where it is no regular file, and OSError."""
    try:
        return open_regular(path)
    except NotRegular:
        raise BadInput(f"shard {path} is no regular file: remove it, or put the shard itself there") from None


def sample_facts(group: list[Member], *, decode: bool, number_of: NumberOf, judge: Judge | None = None) -> SampleFacts:
    """Return the facts of a sample; with `decode`, its image is decoded. What cannot be used has a fault.

    `number_of`: for classes that it names. `judge`: of the data set, where that is known."""
    facts = SampleFacts(group[0].key, tuple(member.extension for member in group))
    try:
        sample = _parse(group, facts, number_of)
        _measure(sample, facts)
        if judge is not None:
            if judge.labelled and facts.label_fault:
                raise BadSample(facts.label_fault)
            judge.check(sample)
        else:
            facts.sources = sources_of(members_of(group))
        if decode and isinstance(sample.image, bytes):
            from cmgan_dist.data.image import check_image  # torch takes seconds to import, and --help waits

            _, *size = check_image(sample.image)
            facts.size = (size[0], size[1])
    except BadSample as fault:
        facts.fault = str(fault)
    return facts


def _parse(group: list[Member], facts: SampleFacts, number_of: NumberOf) -> Sample:
    """Return the sample of its members, without labels where what it says is none. Raises BadSample."""
    key, members = group[0].key, members_of(group)
    try:
        return parse_sample(key, members, number_of=number_of)
    except BadLabel as fault:
        facts.label_fault = str(fault)
        return parse_sample(key, members, labelled=False)


def _measure(sample: Sample, facts: SampleFacts) -> None:
    """Note what a sample holds."""
    facts.labels = sample.labels
    if isinstance(sample.image, np.ndarray):
        facts.image_dim = len(sample.image)
        facts.image_digest = hashlib.sha256(sample.image.tobytes()).digest()
    else:
        facts.image_digest = hashlib.sha256(sample.image).digest()
    if isinstance(sample.texts, np.ndarray):
        facts.text_dim = sample.texts.shape[1]
        facts.text_digests = [_digest(row.tobytes()) for row in sample.texts]
    else:
        facts.caption_lengths = [(len(text), len(split_words(text))) for text in sample.texts]
        facts.text_digests = [_digest(compared(text).encode()) for text in sample.texts]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _rest(reader: _HashingReader, name: str, end: int) -> str:
    """Read what follows a tar's end at byte `end`; returns why it should not be there, '' where it is all zero."""
    empty = True
    while data := reader.read(1 << 20):
        empty = empty and not data.strip(b"\0")
    if empty:
        return ""
    return f"{name} goes on behind its end at byte {end}, as tars do that were joined by cat ('tar -xif' unpacks them)"


def scan_shard(
    path: Path, name: str, decode: bool = False, judge: Judge | None = None, number_of: NumberOf | None = None
) -> ShardScan:
    """Read the tar at `path` to its end, as `scan_file` does. Raises BadInput when the file cannot be read."""
    try:
        with _opened(path) as file:
            return scan_file(file, name, decode, judge, number_of)
    except OSError as error:
        raise BadInput(f"cannot read shard {path}: {error.strerror}") from None


def scan_file(
    file: BinaryIO, name: str, decode: bool = False, judge: Judge | None = None, number_of: NumberOf | None = None
) -> ShardScan:
    """Read a tar to its end; `name` is the shard's in the manifest. With `decode`, every image is decoded.

    `judge`: of the data set, where that is known. `number_of`: for classes that samples name (None: the judge's;
    without one they are numbered as they come, and `ShardScan.names` has them).

    A tar that breaks off is no error: the scan says where. Raises OSError when the file cannot be read."""
    offsets: list[int] = []
    layouts: list[Layout] = []
    samples: list[SampleFacts] = []
    foreign: list[str] = []
    names: dict[str, int] = {}
    if number_of is None:
        number_of = judge.number_of if judge else lambda name: names.setdefault(name, FIRST_NAMED + len(names))
    damage, ended = "", True
    reader = _HashingReader(file)
    try:
        for group in iter_groups(cast(BinaryIO, reader), name, foreign):
            offsets.append(group[0].start)
            layouts.append(Layout.of(group))
            samples.append(sample_facts(group, decode=decode, number_of=number_of, judge=judge))
        # The walk ends at a zero block, which belongs to no sample, or at the end of the file.
        end, ended = reader.position - reader.last, reader.last > 0
        damage = _rest(reader, name, end)
    except BadSample as error:
        damage, end = str(error), reader.position
        _rest(reader, name, end)
    index = ShardIndex.build(offsets, end, [facts.labels for facts in samples], layouts)
    info = _with_sidecar(ShardInfo(name, len(samples), reader.position, reader.digest.hexdigest()), index)
    first = min(foreign, key=lambda name: not name.endswith(NOT_REGULAR), default="")
    return ShardScan(info, index, samples, damage, len(foreign), first, ended, list(names))


def _with_sidecar(info: ShardInfo, index: ShardIndex) -> ShardInfo:
    """Return the entry of a shard that has the sidecar `index`."""
    return replace(info, index_sha256=hashlib.sha256(index.to_bytes()).hexdigest())
