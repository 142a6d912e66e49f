"""The stream: manifest -> order -> windows -> decode -> Batch. The position is one integer, samples seen.

A sample's journey: `Plan` says by arithmetic which (shard, index) every row of global batch t is, whatever the number
of ranks and workers; `ShardReader` reads it by its offset; `Decoder` turns it into arrays; `Stream` joins rows to the
rank's Batch. A bad sample is replaced by the next good one of its window, counted and named in the log.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmgan_dist.config import StreamConfig, resolved_streams
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.imaging import decode_image
from cmgan_dist.schema import Manifest, Sample, ShardIndex, index_name, iter_samples, load_manifest, parse_sample

log = logging.getLogger(__name__)

_MASK = (1 << 64) - 1
MIN_READS_FOR_BAD_SHARE = 200
"""Samples read before the share of bad ones can stop a run."""


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64 steps): the random number that belongs to a position."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def generator_for(*values: int) -> np.random.Generator:
    """A numpy generator seeded from a position."""
    return np.random.Generator(np.random.PCG64(mix(*values)))


# ---------------------------------------------------------------------------------------------- order (no I/O)


@dataclass(frozen=True)
class Row:
    """One row of a global batch: where its sample lies and how to draw from it."""

    shard: int
    index: int
    draw: int
    """64-bit number of this position, for the caption and the augmentation."""
    spare: Callable[[int], tuple[int, int]]
    """spare(k): the k-th sample to take instead when this one is bad."""
    spares: int
    """How many there are."""


class Plan:
    """The order of all epochs as a pure function of (seed, epoch, counts); see architecture.md.

    The shards are permuted, laid end to end and rotated by a random offset; the first steps * G samples are cut into S
    equal contiguous logical streams; samples are shuffled inside windows of `window` consecutive shards of a stream.
    Global batch t holds the next G / S samples of every stream, stream by stream. The last N mod G samples of the
    rotated layout are left out of an epoch: another set each epoch."""

    def __init__(self, counts: np.ndarray, *, global_batch: int, streams: int, window: int, seed: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.global_batch, self.streams, self.window, self.seed = global_batch, streams, window, seed
        self.samples = int(self.counts.sum())
        self.chunk = global_batch // streams
        """Samples of one logical stream in a global batch."""
        self.steps = self.samples // global_batch
        """Global batches in an epoch."""
        self.epoch_samples = self.steps * global_batch
        self.rows = global_batch
        """Rows of a global batch that are read."""
        self._layout = lru_cache(maxsize=2)(self._compute_layout)
        self._windows = lru_cache(maxsize=4 * streams)(self._compute_windows)
        self._shuffled = lru_cache(maxsize=2 * streams)(self._compute_shuffled)

    def _compute_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(shard at each place, start of each place [shards + 1], rotation)."""
        rng = generator_for(self.seed, epoch, 1)
        order = rng.permutation(len(self.counts))
        starts = np.concatenate([[0], np.cumsum(self.counts[order])])
        return order, starts, int(rng.integers(max(self.samples, 1)))

    def _compute_windows(self, epoch: int, stream: int) -> tuple[list[list[tuple[int, int, int]]], np.ndarray]:
        """(windows of a stream, each a list of pieces (shard, first, stop); where each window starts [windows + 1])."""
        order, starts, rotation = self._layout(epoch)
        length = self.steps * self.chunk
        pieces: list[tuple[int, int, int]] = []
        at, left = (rotation + stream * length) % self.samples, length
        while left:
            place = int(np.searchsorted(starts, at, side="right")) - 1
            first = at - int(starts[place])
            take = min(left, int(starts[place + 1]) - at)
            pieces.append((int(order[place]), first, first + take))
            left -= take
            at = (at + take) % self.samples
        windows = [pieces[i : i + self.window] for i in range(0, len(pieces), self.window)]
        sizes = [sum(stop - first for _, first, stop in w) for w in windows]
        return windows, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _compute_shuffled(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """int64 [samples of the window, 2]: (shard, index) in shuffled order."""
        pieces = self._windows(epoch, stream)[0][window]
        rows = np.concatenate(
            [np.stack([np.full(b - a, s, np.int64), np.arange(a, b, dtype=np.int64)], 1) for s, a, b in pieces]
        )
        return rows[generator_for(self.seed, epoch, 2, stream, window).permutation(len(rows))]

    def row(self, epoch: int, stream: int, place: int) -> Row:
        """The sample at `place` of a logical stream in an epoch."""
        starts = self._windows(epoch, stream)[1]
        window = int(np.searchsorted(starts, place, side="right")) - 1
        order = self._shuffled(epoch, stream, window)
        at = place - int(starts[window])

        def spare(k: int) -> tuple[int, int]:
            shard, index = order[(at + 1 + k) % len(order)]
            return int(shard), int(index)

        shard, index = order[at]
        draw = mix(self.seed, epoch, 3, stream, place)
        return Row(int(shard), int(index), draw, spare, len(order) - 1)

    def chunk_rows(self, step: int, stream: int) -> list[Row]:
        """The G / S rows that logical stream `stream` gives to global batch `step` (counted from the run's start)."""
        epoch, within = divmod(step, self.steps)
        return [self.row(epoch, stream, within * self.chunk + j) for j in range(self.chunk)]


class BalancedPlan(Plan):
    """The reference recipe's draws: per slot two different classes, then one sample of each; order has no epochs.

    The chunk of a logical stream holds G / S right samples, then the G / S wrong samples of the same slots."""

    def __init__(self, plan: Plan, members: list[np.ndarray]) -> None:
        """`members`: per non-empty class int64 [n, 2], the (shard, index) of its samples."""
        super().__init__(
            plan.counts, global_batch=plan.global_batch, streams=plan.streams, window=plan.window, seed=plan.seed
        )
        self.members = members
        self.rows = 2 * self.global_batch

    def chunk_rows(self, step: int, stream: int) -> list[Row]:
        rng = generator_for(self.seed, 4, step, stream)
        n = len(self.members)
        right = rng.integers(n, size=self.chunk)
        wrong = (right + rng.integers(1, n, size=self.chunk)) % n
        rows = []
        for which, chosen in enumerate((right, wrong)):
            for j, members in enumerate(self.members[c] for c in chosen):
                at = int(rng.integers(len(members)))

                def spare(k: int, at: int = at, members: np.ndarray = members) -> tuple[int, int]:
                    shard, index = members[(at + 1 + k) % len(members)]
                    return int(shard), int(index)

                shard, index = members[at]
                draw = mix(self.seed, 5, step, stream, 2 * j + which)
                rows.append(Row(int(shard), int(index), draw, spare, len(members) - 1))
        return rows


def streams_of_rank(streams: int, rank: int, world: int) -> range:
    """Logical streams that a rank holds. Raises BadInput when the world size does not divide their number."""
    if streams % world:
        choices = [w for w in range(1, streams + 1) if streams % w == 0]
        raise BadInput(
            f"{streams} logical streams cannot be shared by {world} processes: use {', '.join(map(str, choices))} "
            "processes, or set stream.logical_streams to a multiple of the world size that divides stream.global_batch"
        )
    each = streams // world
    return range(rank * each, (rank + 1) * each)


# ---------------------------------------------------------------------------------------------- reading


class ShardReader:
    """Samples of one split by (shard, index), read by their offsets."""

    def __init__(self, data: str, split: str, *, open_files: int = 64, indexes: int = 1024) -> None:
        self.folder = Path(data)
        self.manifest: Manifest = load_manifest(data)
        self.split = split
        self.shards = self.manifest.shards(split)
        for shard in self.shards:
            if shard.samples == 0:
                raise BadInput(f"shard {self.folder / shard.name} is empty: remove it and run 'python -m shards index'")
            if not (self.folder / shard.name).is_file():
                raise BadInput(f"shard {self.folder / shard.name} is in the manifest but not in the folder: restore it")
        self._files: OrderedDict[int, int] = OrderedDict()
        self._open_files = open_files
        self._lock = threading.Lock()
        self.index = lru_cache(maxsize=indexes)(self._read_index)

    @property
    def counts(self) -> np.ndarray:
        return np.asarray([s.samples for s in self.shards], dtype=np.int64)

    def _read_index(self, shard: int) -> ShardIndex:
        path = self.folder / index_name(self.shards[shard].name)
        if not path.is_file():
            raise BadInput(f"shard index {path} does not exist: run 'python -m shards index {self.folder}'")
        index = ShardIndex.from_bytes(path.read_bytes(), str(path))
        if len(index) != self.shards[shard].samples:
            raise BadInput(
                f"{path} lists {len(index)} samples, the manifest {self.shards[shard].samples}: "
                f"run 'python -m shards index {self.folder}'"
            )
        return index

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= self._open_files:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.folder / self.shards[shard].name, os.O_RDONLY)
        return self._files[shard]

    def read(self, shard: int, index: int) -> Sample:
        """Raises BadSample, naming shard and reason, when the sample cannot be used."""
        offsets = self.index(shard).offsets
        start, length = int(offsets[index]), int(offsets[index + 1] - offsets[index])
        name = self.shards[shard].name
        with self._lock:  # another thread could close the descriptor before it is read
            data = os.pread(self._descriptor(shard), length, start)
        if len(data) < length:
            raise BadSample(f"{name} sample {index}: the shard is truncated at byte {start + len(data)}")
        try:
            key, _, members = next(iter_samples(BytesIO(data), name))
        except StopIteration:
            raise BadSample(f"{name} sample {index}: nothing at byte {start}") from None
        try:
            sample = parse_sample(key, members)
        except BadSample as error:
            raise BadSample(f"{name} sample {key}: {error}") from None
        classes = len(self.manifest.classes)
        if classes and any(not 0 <= label < classes for label in sample.labels):
            raise BadSample(f"{name} sample {key}: label {sample.labels} is out of range, there are {classes} classes")
        if self.manifest.label_kind != "none" and not sample.labels:
            raise BadSample(f"{name} sample {key}: has no label")
        return sample

    def __iter__(self) -> Iterator[Sample]:
        """Every usable sample in canonical order; bad ones are passed over: training and evaluation name them."""
        for shard, count in enumerate(self.counts):
            for index in range(int(count)):
                with contextlib.suppress(BadSample):
                    yield self.read(shard, index)

    def samples_by_class(self) -> list[np.ndarray]:
        """Per class int64 [n, 2]: (shard, index) of its samples, from the sidecars."""
        shard_of, index_of, label_of = [], [], []
        for shard in range(len(self.shards)):
            index = self.index(shard)
            per_sample = np.diff(index.label_starts)
            label_of.append(index.label_values)
            index_of.append(np.repeat(np.arange(len(index)), per_sample))
            shard_of.append(np.full(len(index.label_values), shard))
        rows = np.stack([np.concatenate(shard_of), np.concatenate(index_of)], 1).astype(np.int64)
        labels = np.concatenate(label_of)
        return [rows[labels == c] for c in range(len(self.manifest.classes))]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


# ---------------------------------------------------------------------------------------------- decoding


@dataclass
class Batch:
    """Rows of one rank, in the order of the global batch. B rows are trained on."""

    image: Tensor
    """uint8 [R, 3, H, W], or float32 [R, F_i] features. R = B, or 2B when sampling is balanced: wrong rows follow."""
    text: Tensor | list[str]
    """R texts, or float32 [R, F_t] features."""
    labels: Tensor | None
    """bool [R, C], or None without labels."""
    keys: list[str]
    size: int
    """B."""
    bad: list[str] = field(default_factory=list)
    """Why samples were replaced, one line each."""


@dataclass
class Decoder:
    """A stored Sample as arrays: decodes and augments the image, draws one text."""

    image_size: int
    image_dim: int | None
    """Expected F_i of image features; None for encoded images."""
    text_dim: int | None
    classes: int
    augment: bool

    def __call__(
        self, sample: Sample, shard: str, draw: int | None
    ) -> tuple[np.ndarray, list[str] | np.ndarray, np.ndarray]:
        """(image uint8 [3, H, W] or float32 [F_i]; texts or float32 [captions, F_t]; labels bool [C]).

        `draw` seeds the augmentation; None does none. Raises BadSample naming shard and key."""
        try:
            return self.image(sample, draw), self.texts(sample), self.labels(sample)
        except BadSample as error:
            raise BadSample(f"{shard} sample {sample.key}: {error}") from None

    def image(self, sample: Sample, draw: int | None) -> np.ndarray:
        if isinstance(sample.image, bytes):
            if self.image_dim is not None:
                raise BadSample("has an encoded image, expected image features")
            rng = generator_for(draw, 6) if self.augment and draw is not None else None
            return decode_image(sample.image, self.image_size, rng)
        if self.image_dim != len(sample.image):
            raise BadSample(f"has {len(sample.image)} image features, expected {self.image_dim or 'an encoded image'}")
        return sample.image

    def texts(self, sample: Sample) -> list[str] | np.ndarray:
        if isinstance(sample.texts, list):
            if self.text_dim is not None:
                raise BadSample("has a text, expected text features")
        elif self.text_dim != sample.texts.shape[1]:
            raise BadSample(f"has {sample.texts.shape[1]} text features, expected {self.text_dim or 'a text'}")
        return sample.texts

    def labels(self, sample: Sample) -> np.ndarray:
        hot = np.zeros(self.classes, dtype=bool)
        hot[list(sample.labels)] = True
        return hot


def _stack_texts(texts: list[str | np.ndarray]) -> Tensor | list[str]:
    if isinstance(texts[0], str):
        return cast(list[str], texts)
    return torch.from_numpy(np.stack(cast(list[np.ndarray], texts)))


class _Chunks(IterableDataset[Batch]):
    """What one worker yields: for every step the rows of its logical streams."""

    def __init__(self, stream: Stream, first_step: int) -> None:
        self.stream, self.first_step = stream, first_step

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.stream.held
        each = len(mine) // workers
        part = mine[worker * each : (worker + 1) * each]
        step = self.first_step
        while True:
            yield self.stream.read_step(step, part)
            step += 1


class Stream:
    """Training batches of one rank, from any position, without end."""

    def __init__(
        self, data: str, config: StreamConfig, *, seed: int, image_size: int = 224, rank: int = 0, world: int = 1
    ) -> None:
        """Raises BadInput when data and config do not fit together."""
        self.reader = ShardReader(data, config.train_split)
        self.config = config
        manifest = self.reader.manifest
        streams = resolved_streams(config)
        self.held = streams_of_rank(streams, rank, world)
        plan = Plan(
            self.reader.counts, global_batch=config.global_batch, streams=streams, window=config.window, seed=seed
        )
        if not plan.steps:
            raise BadInput(
                f"split '{config.train_split}' has {plan.samples} samples, fewer than one global batch: "
                f"set stream.global_batch to {plan.samples} or less"
            )
        if config.sampling == "balanced":
            members = [m for m in self.reader.samples_by_class() if len(m)]
            if len(members) < 2:
                raise BadInput("stream.sampling=balanced needs samples of two classes or more: use epoch")
            plan = BalancedPlan(plan, members)
        self.plan = plan
        self.decoder = Decoder(image_size, manifest.image_dim, manifest.text_dim, len(manifest.classes), config.augment)
        self.workers = max(w for w in range(config.workers + 1) if w == 0 or len(self.held) % w == 0)
        if self.workers != config.workers:
            log.info("%d workers: the %d logical streams of a rank are shared evenly", self.workers, len(self.held))
        self._reads = self._bad = 0

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: N less the remainder N mod G."""
        return self.plan.epoch_samples

    def read_row(self, row: Row, bad: list[str]) -> tuple[Sample, np.ndarray, str | np.ndarray, np.ndarray]:
        """The row's sample, or the next good one of its window. Raises BadInput when none is good."""
        shard, index = row.shard, row.index
        for k in range(row.spares + 1):
            self._reads += 1
            try:
                sample = self.reader.read(shard, index)
                image, texts, labels = self.decoder(sample, self.reader.shards[shard].name, row.draw)
                return sample, image, texts[row.draw % len(texts)], labels
            except BadSample as error:
                self._bad += 1
                bad.append(str(error))
                self._check_share(str(error))
            if k < row.spares:
                shard, index = row.spare(k)
        raise BadInput(
            f"no usable sample left in a window of {row.spares + 1} of split '{self.reader.split}' in "
            f"{self.reader.folder}; the last one: {bad[-1]}: run 'python -m shards verify {self.reader.folder}'"
        )

    def _check_share(self, last: str) -> None:
        if self._reads >= MIN_READS_FOR_BAD_SHARE and self._bad > self.config.max_bad_share * self._reads:
            raise BadInput(
                f"{self._bad} of {self._reads} samples read from {self.reader.folder} are unusable, more than "
                f"stream.max_bad_share {self.config.max_bad_share:g}; the last one: {last}: "
                f"run 'python -m shards verify {self.reader.folder}'"
            )

    def read_step(self, step: int, streams: range) -> Batch:
        """The rows that the given logical streams have in a global batch."""
        bad: list[str] = []
        parts = [[self.read_row(row, bad) for row in self.plan.chunk_rows(step, s)] for s in streams]
        half = self.plan.chunk
        rows = [r for part in parts for r in part[:half]] + [r for part in parts for r in part[half:]]
        return Batch(
            image=torch.from_numpy(np.stack([r[1] for r in rows])),
            text=_stack_texts([r[2] for r in rows]),
            labels=torch.from_numpy(np.stack([r[3] for r in rows])) if self.decoder.classes else None,
            keys=[r[0].key for r in rows],
            size=half * len(streams),
            bad=bad,
        )

    def batches(self, position: int) -> Iterator[Batch]:
        """Batches from `position` samples on (a multiple of the global batch), without end."""
        step, rest = divmod(position, self.config.global_batch)
        if rest:
            raise BadInput(
                f"position {position} is not a multiple of stream.global_batch {self.config.global_batch}: "
                "resume with the batch size that the checkpoint was made with"
            )
        chunks = _Chunks(self, step)
        if not self.workers:
            yield from chunks
            return
        loader = iter(
            DataLoader(
                chunks,
                batch_size=None,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                multiprocessing_context="fork",  # a worker shares the plan and the open indexes
            )
        )
        while True:
            yield join([next(loader) for _ in range(self.workers)])


def join(parts: list[Batch]) -> Batch:
    """Batches of consecutive logical streams as one: all right rows, then all wrong rows."""

    def rows(pick: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat([pick(p)[: p.size] for p in parts] + [pick(p)[p.size :] for p in parts])

    def flat(pick: Callable[[Batch], list[str]]) -> list[str]:
        return [x for p in parts for x in pick(p)[: p.size]] + [x for p in parts for x in pick(p)[p.size :]]

    texts: Tensor | list[str]
    if isinstance(parts[0].text, list):
        texts = flat(lambda p: cast(list[str], p.text))
    else:
        texts = rows(lambda p: cast(Tensor, p.text))
    return Batch(
        image=rows(lambda p: p.image),
        text=texts,
        labels=rows(lambda p: cast(Tensor, p.labels)) if parts[0].labels is not None else None,
        keys=flat(lambda p: p.keys),
        size=sum(p.size for p in parts),
        bad=[line for p in parts for line in p.bad],
    )


# ---------------------------------------------------------------------------------------------- a whole split, in order


@dataclass
class EvalBatch:
    """Consecutive samples of a split with all their texts."""

    image: Tensor
    """uint8 [n, 3, H, W] or float32 [n, F_i]."""
    text: Tensor | list[str]
    """All texts of the n samples one after another: m strings, or float32 [m, F_t]."""
    owner: Tensor
    """int64 [m]: row of the sample that each text belongs to."""
    labels: Tensor | None
    """bool [n, C] or None."""
    keys: list[str]
    samples: list[Sample]


def eval_batches(
    reader: ShardReader, *, image_size: int, batch: int, first: int = 0, stop: int | None = None, threads: int = 2
) -> Iterator[EvalBatch]:
    """Samples first..stop of a split in canonical order, not augmented.

    A bad sample ends an evaluation: a figure over other samples than the split's would not be comparable.
    Raises BadInput naming it."""
    manifest = reader.manifest
    decoder = Decoder(image_size, manifest.image_dim, manifest.text_dim, len(manifest.classes), augment=False)
    starts = np.concatenate([[0], np.cumsum(reader.counts)])
    stop = int(starts[-1]) if stop is None else stop

    def load(i: int) -> tuple[Sample, np.ndarray, list[str] | np.ndarray, np.ndarray]:
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        try:
            sample = reader.read(shard, i - int(starts[shard]))
            return (sample, *decoder(sample, reader.shards[shard].name, None))
        except BadSample as error:
            raise BadInput(
                f"split '{reader.split}' of {reader.folder} cannot be evaluated: {error}: "
                f"run 'python -m shards verify {reader.folder}'"
            ) from None

    with ThreadPoolExecutor(threads) as pool:
        for at in range(first, stop, batch):
            rows = list(pool.map(load, range(at, min(at + batch, stop))))
            texts = [t for r in rows for t in r[2]]
            yield EvalBatch(
                image=torch.from_numpy(np.stack([r[1] for r in rows])),
                text=_stack_texts(texts),
                owner=torch.tensor([i for i, r in enumerate(rows) for _ in range(len(r[2]))]),
                labels=torch.from_numpy(np.stack([r[3] for r in rows])) if decoder.classes else None,
                keys=[r[0].key for r in rows],
                samples=[r[0] for r in rows],
            )


def epoch_length(samples: int, config: StreamConfig) -> int:
    """Samples in an epoch of a split that holds `samples`."""
    return samples // config.global_batch * config.global_batch


def steps_for(epochs: float, epoch_samples: int, global_batch: int) -> int:
    """Global batches in a number of (possibly fractional) epochs, at least one."""
    return max(1, math.ceil(epochs * epoch_samples / global_batch - 1e-9))
