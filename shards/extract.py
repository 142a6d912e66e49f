"""Frozen backbones over the samples of a shard.

The way of a sample: members -> parse, decode (threads) -> batch -> backbones -> image.npy, text.npy and the labels.
What is not converted is copied as it is.

Shapes: n images and m texts of a batch, F_i and F_t the sizes of their features."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch

from cmgan_dist.config.fields import ImageBackboneConfig, Pool, TextBackboneConfig
from cmgan_dist.data.image import decode_image
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.sample import IMAGE_MEMBERS, TEXT_MEMBERS
from cmgan_dist.data.tar import Member, members_of
from cmgan_dist.errors import shown
from cmgan_dist.jobs.local import units_done
from cmgan_dist.jobs.memory import keep_freed_memory
from cmgan_dist.models.backbone import ImageBackbone, TextBackbone
from cmgan_dist.models.backbones import build_image_backbone, build_text_backbone, image_features, text_features
from shards.shard_file import distinct, npy, try_sample


@dataclass(frozen=True)
class Options:
    """What a process needs to know; hashable, so that it loads its backbones once."""

    image: tuple[str, str, int] | None
    """(backbone, weights, image size); None: images are copied."""
    text: tuple[str, str, int, tuple[Pool, ...]] | None
    """(backbone, weights, max tokens, pools); None: texts are copied."""
    batch_size: int
    dtype: Literal["float32", "float16"]
    device: str
    decode_threads: int
    skip_bad: bool


class Extractor:
    """The backbones of one process, None for a modality that is copied."""

    def __init__(self, options: Options) -> None:
        """Load the backbones. Raises BadInput when one cannot be made."""
        keep_freed_memory()
        self.options = options
        self.image: ImageBackbone | None = None
        self.text: TextBackbone | None = None
        if options.image is not None:
            name, weights, size = options.image
            self.image = build_image_backbone(ImageBackboneConfig(name, weights, image_size=size)).to(options.device)
        if options.text is not None:
            name, weights, tokens, pools = options.text
            chosen = TextBackboneConfig(name, weights, max_tokens=tokens, pools=pools)
            self.text = build_text_backbone(chosen).to(options.device)
        # One thread a process and no TF32: the same bytes for any number of cores, nearly the same on a GPU.
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False
        self.pool = ThreadPoolExecutor(options.decode_threads)

    def images(self, images: list[np.ndarray]) -> np.ndarray:
        """Return the features float32 [n, F_i] of n images, each uint8 [size, size, 4]."""
        assert self.image is not None
        batch = torch.from_numpy(np.stack(images)).to(self.options.device)
        made: np.ndarray = image_features(self.image, batch).cpu().numpy()
        return made

    def texts(self, texts: list[str]) -> np.ndarray:
        """Return the features float32 [m, F_t] of m texts."""
        assert self.text is not None
        features = text_features(self.text, texts, self.options.device, self.options.batch_size)
        made: np.ndarray = features.cpu().numpy()
        return made


extractor = lru_cache(maxsize=1)(Extractor)
"""``extractor(options)`` returns the process's Extractor, which is loaded once."""


@dataclass
class _Loaded:
    """A sample that is ready for the backbones."""

    key: str
    members: dict[str, bytes]
    image: np.ndarray | None
    """uint8 [size, size, 4] when the image is to be converted."""
    texts: list[str] | None
    """The texts when they are to be converted."""


def _load(options: Options, judge: Judge, group: list[Member]) -> _Loaded:
    """Parse a sample and decode what is to be converted. Raises BadSample."""
    key, members = group[0].key, members_of(group)
    sample = judge.read(key, members)
    loaded = _Loaded(key, members, None, None)
    if options.image is not None and isinstance(sample.image, bytes):
        loaded.image = decode_image(sample.image, options.image[2])
    if options.text is not None and isinstance(sample.texts, list):
        loaded.texts = sample.texts
    return loaded


def _feature_members(
    loaded: _Loaded, image: np.ndarray | None, text: np.ndarray | None, dtype: str
) -> list[tuple[str, bytes]]:
    """Return (extension, bytes) of a sample's members, features [F_i] and [captions, F_t] in the place of their source.

    Raises BadSample when a feature does not fit into `dtype`."""
    members = loaded.members
    made: list[tuple[str, bytes]] = []
    for extension, feature, sources in (("image.npy", image, IMAGE_MEMBERS), ("text.npy", text, TEXT_MEMBERS)):
        if feature is not None:
            made.append((extension, npy(feature, dtype)))
        else:
            made += [(source, members[source]) for source in sources if source in members]
    if "json" in members:
        fields = json.loads(members["json"])
        if text is not None:
            fields.pop("texts", None)
        if fields:
            made.append(("json", json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()))
    if "cls" in members:
        made.append(("cls", members["cls"]))
    return made


def feature_samples(
    made: Extractor, judge: Judge, groups: Iterable[list[Member]], shard: str, left_out: list[str]
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Give (key, members) with features for each good sample of a shard, of which `iter_groups` gives the members.

    A bad sample gives a line of `left_out`; where it stood between two of one key, the second gets another. Raises
    BadInput at the first one unless the options skip them."""
    options, groups, before = made.options, iter(groups), ""
    while batch := list(itertools.islice(groups, options.batch_size)):
        futures = [(shown(group[0].key), made.pool.submit(_load, options, judge, group)) for group in batch]
        tried = [try_sample(f.result, f"{shard} sample {key}", options.skip_bad, left_out) for key, f in futures]
        units_done(len(batch))
        rows = [row for row in tried if row is not None]
        if not rows:
            continue
        images: list[np.ndarray | None] = [None] * len(rows)
        if options.image is not None:
            images = list(made.images([row.image for row in rows if row.image is not None]))
        texts: list[np.ndarray | None] = [None] * len(rows)
        if options.text is not None:
            ends = np.cumsum([len(row.texts or ()) for row in rows])
            texts = list(np.split(made.texts([text for row in rows for text in row.texts or ()]), ends[:-1]))
        for row, image, text in zip(rows, images, texts, strict=True):
            write = partial(_feature_members, row, image, text, options.dtype)
            found = try_sample(write, f"{shard} sample {shown(row.key)}", options.skip_bad, left_out)
            if found is None:
                continue
            key = distinct(row.key, {before: 0})
            if key != row.key:
                said = f"is named {key}, as what stood between it and another of its key is left out"
                print(shown(f"{shard} sample {row.key} {said}"), flush=True)
            yield key, found
            before = key
