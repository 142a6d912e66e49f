"""Which pairs each shard will hold: decided before anything is read, and before the work is shared out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from cmgan_dist.data.manifest import natural_splits
from cmgan_dist.errors import BadInput, BadSample
from shards.pairs import RawPair
from shards.shard_file import try_sample


@dataclass(frozen=True)
class PlannedShard:
    """The pairs that one shard will hold, in their order."""

    name: str
    split: str
    pairs: list[RawPair]
    digest: str
    """SHA-256 of what is known of the pairs without reading files: keys, splits, labels, texts and sizes."""


def _size(pair: RawPair) -> int:
    """Return the bytes of a pair's image and texts. Raises BadSample when one is missing."""
    image = pair.image.nbytes if isinstance(pair.image, np.ndarray) else pair.image.size()
    if isinstance(pair.texts, tuple):
        if not any(text.strip() for text in pair.texts):
            raise BadSample("the text is empty")
        return image + sum(len(text) for text in pair.texts)
    return image + (pair.texts.nbytes if isinstance(pair.texts, np.ndarray) else pair.texts.size())


def plan_shards(
    pairs: Iterable[RawPair], shard_samples: int, shard_bytes: float, skip_bad: bool, left_out: list[str]
) -> list[PlannedShard]:
    """Return the shards of every split.

    A shard holds at most `shard_samples` pairs and closes before `shard_bytes` of images and texts; within a split
    the pairs come in the order of their keys' hashes, so a shard is a random sample of its split.
    Raises BadInput on two pairs with one key, on a split that cannot be part of a file name, and on a bad pair unless
    `skip_bad`, with which `left_out` gets a line for it."""
    sized: dict[str, tuple[RawPair, int]] = {}
    for pair in pairs:
        if pair.key in sized:
            first = sized[pair.key][0].where
            raise BadInput(f"{pair.where} has the same key '{pair.key}' as {first}: rename one of them")
        if not re.fullmatch(r"[\w-]+", pair.split):
            raise BadInput(f"{pair.where}: split '{pair.split}' may hold only letters, digits, '-' and '_'")
        size = try_sample(partial(_size, pair), pair.where, skip_bad, left_out)
        if size is not None:
            sized[pair.key] = pair, size
    order = sorted(sized.values(), key=lambda item: hashlib.sha256(item[0].key.encode()).digest())

    shards: list[PlannedShard] = []
    for split in natural_splits(pair.split for pair, _ in order):
        chosen = [item for item in order if item[0].split == split]
        parts = _cut(chosen, shard_samples, shard_bytes)
        shards += [_planned(f"{split}-{number:06d}.tar", split, part) for number, part in enumerate(parts)]
    return shards


def _cut(sized: list[tuple[RawPair, int]], most: int, most_bytes: float) -> Iterator[list[tuple[RawPair, int]]]:
    """Cut (pair, bytes) into equal shards of at most `most` pairs, and smaller ones where `most_bytes` asks for it."""
    count = -(-len(sized) // most)
    limit = -(-len(sized) // count)  # equal shards, not full ones and a small rest
    filled, size_sum = list[tuple[RawPair, int]](), 0
    for pair, size in sized:
        if filled and (len(filled) == limit or size_sum + size > most_bytes):
            yield filled
            filled, size_sum = [], 0
        filled.append((pair, size))
        size_sum += size
    yield filled


def _planned(name: str, split: str, sized: list[tuple[RawPair, int]]) -> PlannedShard:
    digest = hashlib.sha256()
    for pair, size in sized:
        texts = pair.texts if isinstance(pair.texts, tuple) else ()
        digest.update(json.dumps([pair.key, pair.split, pair.labels, texts, size]).encode())
        for array in (pair.image, pair.texts):
            if isinstance(array, np.ndarray):
                digest.update(array.tobytes())
    return PlannedShard(name, split, [pair for pair, _ in sized], digest.hexdigest())
