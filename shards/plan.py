"""Which pairs each shard will hold: decided before pictures are packed, and before the work is shared out.

The rows of a source lie on disk in partitions by hash (`partitions.py`). Each is merged alone, by any process: rows of
one picture become one sample, samples are sorted, and beside them go arrays of what the rest of the plan needs:

    pairs-PPPP.jsonl     the samples of partition P in their order
    starts-PPPP.npy      where each begins in that file, and where the last one ends
    files-PPPP.jsonl     the files that its rows name, as they were (`seen.py`)
    PPPP.npz             ids, sizes, digests, sums of the lines, and splits as the source says them

The partitions one after the other are the order of all samples. Cutting it into shards, and drawing splits
(`draw.py`), looks at these arrays alone. No byte depends on the number of partitions or of processes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cmgan_dist.data.manifest import natural_splits
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import check_regular, open_regular, read_bytes
from cmgan_dist.jobs.local import parallel_map
from shards.draw import Drawn, content_hashes, draw_splits
from shards.pairs import Draw, RawPair, RawPairs, brief
from shards.partitions import Partitions, decode, encode, place_of
from shards.seen import seen, seen_name
from shards.shard_file import try_sample

DRAWABLE = ("", "train")
"""Splits from which others are drawn."""


@dataclass(frozen=True)
class PlannedShard:
    """The pairs that one shard will hold, by where they lie."""

    name: str
    split: str
    samples: int
    digest: str
    """SHA-256 of what is known of the pairs without reading files: keys, splits, labels, texts and sizes."""
    pieces: list[tuple[int, int, int]]
    """(partition, first, end): of the samples from `first` to before `end`, those of this split."""
    sums: str
    """SHA-256 of the SHA-256s of their lines on disk."""

    def read(self, folder: Path) -> list[RawPair]:
        """Return the pairs, in their order. `folder`: of the plan. Raises BadInput when that is gone or damaged."""
        if not folder.exists():
            raise BadInput(f"{folder} was removed, as another process has finished the data set: start again")
        try:
            return self._read(folder)
        except BadInput:
            raise
        except OSError as error:
            raise BadInput(
                f"the plan in {folder} cannot be read ({error.strerror}): remove that folder and start again"
            ) from None
        except (ValueError, EOFError, IndexError, TypeError):
            raise _damaged(folder) from None

    def _read(self, folder: Path) -> list[RawPair]:
        """Do what `read` says. Raises OSError too."""
        found, sums = list[RawPair](), hashlib.sha256()
        for number, first, end in self.pieces:
            for name in ("starts", "splits"):
                check_regular(folder / f"{name}-{number:04d}.npy")
            starts = np.load(folder / f"starts-{number:04d}.npy", mmap_mode="r")
            splits = np.load(folder / f"splits-{number:04d}.npy", mmap_mode="r")[first:end]
            with open_regular(folder / f"pairs-{number:04d}.jsonl") as file:
                file.seek(starts[first])
                lines = file.read(int(starts[end] - starts[first])).splitlines()
            own = _split_names(folder).index(self.split)
            chosen = [line for line, code in zip(lines, splits, strict=False) if code == own]
            sums.update(b"".join(hashlib.sha256(line).digest() for line in chosen))
            found += self._decoded(chosen)
        if sums.hexdigest() != self.sums:
            raise _damaged(folder)
        return found

    def _decoded(self, lines: list[bytes]) -> Iterator[RawPair]:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # the sum of the lines tells
                yield replace(decode(line), split=self.split)


@dataclass
class Plan:
    """All shards of a data set."""

    folder: Path
    shards: list[PlannedShard]
    image_dim: int | None
    text_dim: int | None
    """F_i and F_t of features, None for encoded images and for texts."""
    left_out: list[str]
    """A line for each pair that is left out."""


@dataclass
class Merged:
    """What is known of a partition that was merged."""

    splits: dict[str, int] = field(default_factory=dict)
    """Split as the source says it -> number of samples."""
    image_dims: set[int | None] = field(default_factory=set)
    text_dims: set[int | None] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)


def _damaged(folder: Path) -> BadInput:
    return BadInput(f"the plan in {folder} was damaged: remove that folder and start again")


def _split_names(folder: Path) -> list[str]:
    names: list[str] = json.loads(read_bytes(folder / "splits.json"))
    return names


# ---------------------------------------------------------------------------------------------- one partition


def _size(pair: RawPair) -> int:
    """Return the bytes of a pair's image and texts. Raises BadSample when one is missing."""
    image = pair.image.nbytes if isinstance(pair.image, np.ndarray) else pair.image.size()
    if isinstance(pair.texts, tuple):
        if not any(text.strip() for text in pair.texts):
            raise BadSample("the text is empty")
        return image + sum(len(text) for text in pair.texts)
    return image + (pair.texts.nbytes if isinstance(pair.texts, np.ndarray) else pair.texts.size())


def _merge_rows(rows: list[RawPair], skip_bad: bool, left_out: list[str]) -> Iterator[RawPair]:
    """Yield samples in their order: rows of one identity are one. Of rows that contradict each other, and of two
    samples with one key, the later is left out where `skip_bad` is on, and `left_out` gets a line.

    Raises BadInput at such where it is off, and on a split that cannot be part of a file name."""
    placed = sorted(((place_of(row.key), row) for row in rows), key=lambda item: item[0])
    for _, equal in itertools.groupby(placed, key=lambda item: item[0]):
        samples: dict[str, list[RawPair]] = {}
        for number, (_, row) in enumerate(equal):
            samples.setdefault(row.identity or f"\0{number}", []).append(row)
        first_of: dict[str, RawPair] = {}
        for sample in (_merged(parts, skip_bad, left_out) for parts in samples.values()):
            if sample.split and not re.fullmatch(r"[\w-]+", sample.split):
                named = brief(sample.split)
                raise BadInput(f"{sample.where}: split '{named}' may hold only letters, digits, '-' and '_'")
            first = first_of.setdefault(sample.key, sample)
            try_sample(partial(_check_own_key, sample, first), sample.where, skip_bad, left_out)
        yield from (first_of[key] for key in sorted(first_of))


def _check_own_key(sample: RawPair, first: RawPair) -> None:
    """Raise BadSample where a sample is not the first one of its key."""
    if sample is not first:
        raise BadSample(f"has the same key '{brief(sample.key)}' as {first.where}: rename one of them")


def _merged(rows: list[RawPair], skip_bad: bool, left_out: list[str]) -> RawPair:
    """Return the sample of rows of one identity; what contradicts the first is as `_merge_rows` says."""
    first, *rest = rows
    same = [try_sample(partial(_agreeing, row, first), row.where, skip_bad, left_out) for row in rest]
    texts = [row.texts for row in (first, *same) if row is not None]
    if len(texts) == 1:
        return first
    return replace(first, texts=tuple(text for of_row in texts if isinstance(of_row, tuple) for text in of_row))


def _agreeing(row: RawPair, first: RawPair) -> RawPair:
    """Return a row of one picture with another. Raises BadSample where it has another label or split."""
    if (row.labels, row.split) != (first.labels, first.split):
        raise BadSample(f"has another label or split than {first.where} for image {brief(row.identity)}")
    return row


def _digest(pair: RawPair, size: int) -> bytes:
    """Return a hash of what is known of a pair without reading files."""
    texts = pair.texts if isinstance(pair.texts, tuple) else ()
    digest = hashlib.sha256(json.dumps([pair.key, pair.split, pair.labels, texts, size]).encode())
    for array in (pair.image, pair.texts):
        if isinstance(array, np.ndarray):
            digest.update(array.tobytes())
    return digest.digest()


def merge_partition(
    rows: Partitions, number: int, folder: Path, classes: list[str], draw: Draw, skip_bad: bool
) -> Merged:
    """Write the samples of a partition, and what the plan needs of them, into `folder`. Raises BadInput."""
    with _writing(folder):
        return _merge(rows, number, folder, classes, draw, skip_bad)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what is raised where a plan cannot be written into BadInput."""
    try:
        yield
    except OSError as error:  # numpy's own has no reason where the disk is full
        reason = error.strerror or "no space is left"
        raise BadInput(f"cannot write the plan into {folder}: {reason}: free space there, or mend its rights") from None


def _merge(rows: Partitions, number: int, folder: Path, classes: list[str], draw: Draw, skip_bad: bool) -> Merged:
    merged, index = Merged(), {name: i for i, name in enumerate(classes)}
    ids, sizes, digests, codes, starts = list[int](), list[int](), list[bytes](), list[int](), [0]
    links, lines = list[tuple[int, int]](), list[bytes]()
    names = merged.splits
    with open(folder / f"pairs-{number:04d}.jsonl", "wb") as file, open(folder / seen_name(number), "w") as files:
        for pair in _merge_rows(rows.read(number), skip_bad, merged.left_out):
            files.writelines(seen(pair))
            read = partial(_measured, pair, draw)
            found = try_sample(read, pair.where, skip_bad, merged.left_out)
            if found is None:
                continue
            size, contents = found
            line = encode(pair.numbered(index)).encode()
            lines.append(hashlib.sha256(line).digest())
            starts.append(starts[-1] + file.write(line + b"\n"))
            identifier = int.from_bytes(place_of(pair.key)[:8], "big")
            links += [(content, identifier) for content in contents]
            names[pair.split] = names.get(pair.split, 0) + 1
            ids.append(identifier)
            sizes.append(size)
            digests.append(_digest(pair, size))
            codes.append(list(names).index(pair.split))
            merged.image_dims.add(pair.image.shape[-1] if isinstance(pair.image, np.ndarray) else None)
            merged.text_dims.add(pair.texts.shape[-1] if isinstance(pair.texts, np.ndarray) else None)
    np.save(folder / f"starts-{number:04d}.npy", np.array(starts, np.int64))
    np.savez(
        folder / f"{number:04d}.npz",
        ids=np.array(ids, np.uint64),
        sizes=np.array(sizes, np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        lines=np.frombuffer(b"".join(lines), np.uint8).reshape(-1, 32),
        codes=np.array(codes, np.int16),
    )
    if draw.splits:
        pairs = np.array(links, np.uint64).reshape(-1, 2)
        np.save(folder / f"links-{number:04d}.npy", pairs[np.argsort(pairs[:, 0], kind="stable")])
    rows.remove(number)
    return merged


def _measured(pair: RawPair, draw: Draw) -> tuple[int, list[int]]:
    """Return a pair's size and, where splits are drawn, hashes of what may be equal in others. Raises BadSample."""
    contents = content_hashes(pair, draw.together) if draw.splits and pair.split in DRAWABLE else []
    return _size(pair), contents


# ---------------------------------------------------------------------------------------------- all partitions


def plan_shards(
    rows: Partitions, source: RawPairs, shard_samples: int, shard_bytes: float, skip_bad: bool, processes: int | None
) -> Plan:
    """Return the shards of every split; what the plan holds of the pairs goes into the folder of `rows`.

    A shard holds at most `shard_samples` pairs and closes before `shard_bytes` of images and texts; within a split
    the pairs come in the order of their keys' hashes, so a shard is a random sample of its split.
    Raises BadInput on a split that cannot be part of a file name and features of several sizes, and unless `skip_bad`
    on two pairs with one key, rows of one image that contradict each other, and a bad pair."""
    rows.flush()
    numbers = range(rows.partitions)
    tasks = [(rows, number, rows.folder, source.classes, source.draw, skip_bad) for number in numbers]
    merged = parallel_map(merge_partition, tasks, title="planning", processes=processes)
    with _writing(rows.folder):
        return _planned(rows, source, merged, shard_samples, shard_bytes)


def _planned(rows: Partitions, source: RawPairs, merged: list[Merged], shard_samples: int, shard_bytes: float) -> Plan:
    """Return the plan of partitions that were merged. Raises BadInput, and OSError."""
    folder, numbers = rows.folder, range(rows.partitions)
    named = dict.fromkeys(name or "train" for one in merged for name in one.splits)
    names = natural_splits([*named, *source.draw.splits])
    drawn = draw_splits(folder, rows.partitions, source.draw, _drawable(merged))
    (folder / "splits.json").write_text(json.dumps(names))
    counts = np.zeros(len(names), np.int64)
    for number in numbers:
        codes = _codes(folder, number, list(merged[number].splits), names, drawn)
        np.save(folder / f"splits-{number:04d}.npy", codes)
        counts += np.bincount(codes, minlength=len(names))
    image_dim, text_dim = _feature_dims(merged)
    shards = list(_cut(folder, numbers, names, counts, shard_samples, shard_bytes))
    left_out = [line for one in merged for line in one.left_out]
    return Plan(folder, shards, image_dim, text_dim, left_out)


def _drawable(merged: list[Merged]) -> int:
    return sum(count for one in merged for name, count in one.splits.items() if name in DRAWABLE)


def _feature_dims(merged: list[Merged]) -> tuple[int | None, int | None]:
    """Return (F_i, F_t) of the pairs, None for encoded images and for texts. Raises BadInput when they differ."""
    image_dims = set[int | None]().union(*(one.image_dims for one in merged))
    text_dims = set[int | None]().union(*(one.text_dims for one in merged))
    for what, dims in (("image", image_dims), ("text", text_dims)):
        if len(dims) > 1:
            raise BadInput(f"the {what} features have different sizes: {', '.join(sorted(map(str, dims)))}")
    return next(iter(image_dims), None), next(iter(text_dims), None)


def _codes(folder: Path, number: int, own: list[str], names: list[str], drawn: Drawn) -> np.ndarray:
    """Return the split of each sample of a partition, as a number of `names`. `own`: splits as the source says them."""
    with np.load(folder / f"{number:04d}.npz") as arrays:
        ids, codes = arrays["ids"], arrays["codes"]
    lookup = np.array([names.index(name or "train") for name in own], np.int16)
    found: np.ndarray = lookup[codes] if len(own) else codes
    free = np.isin(codes, [i for i, name in enumerate(own) if name in DRAWABLE])
    for split, chosen in drawn.of(ids).items():
        found[free & chosen] = names.index(split)
    return found


@dataclass
class _Open:
    """A shard that is being filled."""

    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    sums: hashlib._Hash = field(default_factory=hashlib.sha256)


def _cut(
    folder: Path, numbers: range, names: list[str], counts: np.ndarray, most: int, most_bytes: float
) -> Iterator[PlannedShard]:
    """Cut each split into equal shards of at most `most` samples, smaller ones where `most_bytes` asks for it."""
    for code, split in enumerate(names):
        if not counts[code]:
            continue
        count = -(-int(counts[code]) // most)
        limit = -(-int(counts[code]) // count)  # equal shards, not full ones and a small rest
        written, shard = 0, _Open()
        for number in numbers:
            positions = np.flatnonzero(np.load(folder / f"splits-{number:04d}.npy") == code)
            if not len(positions):
                continue
            with np.load(folder / f"{number:04d}.npz") as arrays:
                sums, digests = np.cumsum(arrays["sizes"][positions]), arrays["digests"][positions]
                lines = arrays["lines"][positions]
            at = 0
            while at < len(positions):
                before = int(sums[at - 1]) if at else 0
                fits = int(np.searchsorted(sums, before + most_bytes - shard.bytes, "right"))
                end = min(at + limit - shard.samples, max(fits, at + (not shard.samples)), len(positions))
                if end > at:
                    shard.pieces.append((number, int(positions[at]), int(positions[end - 1]) + 1))
                    shard.samples += end - at
                    shard.bytes += int(sums[end - 1]) - before
                    shard.digest.update(digests[at:end].tobytes())
                    shard.sums.update(lines[at:end].tobytes())
                    at = end
                if at < len(positions):
                    yield _closed(shard, split, written)
                    written, shard = written + 1, _Open()
        if shard.samples:
            yield _closed(shard, split, written)


def _closed(shard: _Open, split: str, number: int) -> PlannedShard:
    name, digests = f"{split}-{number:06d}.tar", (shard.digest.hexdigest(), shard.sums.hexdigest())
    return PlannedShard(name, split, shard.samples, digests[0], shard.pieces, digests[1])
