"""Splits that are drawn while a data set is planned: equal pictures and equal texts never lie on both sides.

Samples and what they hold are known by 64-bit hashes. Two unlike contents of one hash keep two samples on one side
for nothing, and no equal ones are missed. What is in memory is what is equal to something: some 100 bytes a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.groups import components
from shards.pairs import Draw, RawPair, Together
from shards.same_text import compared
from shards.shard_file import read_texts

LINKS_AT_ONCE = 4_000_000
"""Hashes that are compared at a time."""


def _hash(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "big")


def content_hashes(pair: RawPair, together: Together) -> list[int]:
    """Return hashes of a pair's picture and, where `together` says so, of each of its texts. Files are read.

    Raises BadSample when one cannot be read."""
    image = pair.image.tobytes() if isinstance(pair.image, np.ndarray) else pair.image.identity().encode()
    found = [_hash(b"image", image)]
    if together == "images":
        return found
    if isinstance(pair.texts, np.ndarray):
        return found + [_hash(b"text", row.tobytes()) for row in np.atleast_2d(pair.texts)]
    return found + [_hash(b"text", compared(text).encode()) for text in read_texts(pair.texts)]


@dataclass
class Drawn:
    """Which samples are drawn for which split."""

    draw: Draw
    linked: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Ids of the samples that are in a group with others, ascending."""
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    """32 bits that decide of each of them, equal within a group."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The number of samples in its group."""
    room: float = np.inf
    """The most samples of a group that leaves train."""

    def of(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return split -> which of the samples with these ids are drawn for it, if they may be."""
        numbers, large = (ids >> np.uint64(32)).astype(np.uint32), np.zeros(len(ids), bool)
        if len(self.linked):
            at = np.minimum(np.searchsorted(self.linked, ids), len(self.linked) - 1)
            inside = self.linked[at] == ids
            numbers[inside] = self.numbers[at[inside]]
            large[inside] = self.sizes[at[inside]] > self.room
        shares, test = numbers / 2**32, self.draw.test
        chosen = {"test": shares < test, "val": (shares >= test) & (shares < test + self.draw.val)}
        return {split: chosen[split] & ~large for split in self.draw.splits}


def draw_splits(folder: Path, partitions: int, draw: Draw, samples: int) -> Drawn:
    """Return what is drawn of `samples` samples by the links that their partitions have in `folder`.

    A group of samples joined by equal contents, directly or through others, goes to one split as a whole, by a hash of
    the smallest of their ids; one that is larger than the smallest drawn split is to be stays in train."""
    if not draw.splits:
        return Drawn(draw)
    ends = _equal_ends(folder, partitions)
    linked, positions = np.unique(ends, return_inverse=True)
    if not len(linked):
        return Drawn(draw)
    component = components(len(linked), positions.reshape(-1, 2))
    smallest = np.full(component.max() + 1, np.iinfo(np.uint64).max)
    np.minimum.at(smallest, component, linked)
    sizes = np.bincount(component)
    room = min(share for share in (draw.val, draw.test) if share) * samples
    return Drawn(draw, linked, _mixed(smallest)[component], sizes[component], max(room, 1))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return 32 bits of each 64-bit number, mixed as in SplitMix64 (Steele et al., OOPSLA 2014): the smallest of many
    hashes is no even draw any more."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)


def _equal_ends(folder: Path, partitions: int) -> np.ndarray:
    """Return the ids [n, 2] of samples with an equal content, each with the first one that has it.

    Each partition's links are sorted by content, so all are compared in ranges of it, a bounded number at a time."""
    links = [np.load(folder / f"links-{number:04d}.npy", mmap_mode="r") for number in range(partitions)]
    ranges = 1 + sum(map(len, links)) // LINKS_AT_ONCE
    bounds = [np.uint64(i * (2**64 // ranges)) for i in range(1, ranges)]
    cuts = [[0, *np.searchsorted(one[:, 0], bounds), len(one)] if bounds else [0, len(one)] for one in links]
    found = [
        _ends_in_range(one[cut[i] : cut[i + 1]] for one, cut in zip(links, cuts, strict=True)) for i in range(ranges)
    ]
    return np.concatenate(found)


def _ends_in_range(links: Iterable[np.ndarray]) -> np.ndarray:
    together = np.concatenate(list(links))
    together = together[np.lexsort((together[:, 1], together[:, 0]))]
    content, ids = together[:, 0], together[:, 1]
    begins = np.flatnonzero(np.r_[True, content[1:] != content[:-1]][: len(content)])
    first = np.repeat(ids[begins], np.diff(np.r_[begins, len(ids)]))
    return np.stack([first, ids], 1)[first != ids]
