"""The stream: manifest -> order -> windows -> decode -> Batch. The position is one integer, samples seen.

A sample's journey: a plan (order.py) says by arithmetic which (shard, index) every row of global batch t is, whatever
the number of ranks and workers; `ShardReader` reads it by its offset, `Decoder` turns it into arrays, and `Stream`
joins rows to the rank's Batch. A bad sample is replaced by the next good one of its window, counted and named.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmgan_dist.config.fields import StreamConfig, resolved_streams
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.imaging import decode_image
from cmgan_dist.order import BalancedPlan, MixturePlan, Plan, Row, generator_for, streams_of_rank
from cmgan_dist.remote import open_store
from cmgan_dist.schema import MANIFEST_NAME, Manifest, Sample, ShardIndex, index_name, iter_samples, parse_sample

log = logging.getLogger(__name__)

MIN_READS_FOR_BAD_SHARE = 200
"""Samples read before the share of bad ones can stop a run."""
PIECE = 1 << 18
"""Bytes that are read at a time where samples follow each other; much more is slower: fresh memory each time."""


# ---------------------------------------------------------------------------------------------- reading


class ShardReader:
    """Samples of one split by (shard, index), read by their offsets."""

    def __init__(
        self, data: str, split: str, config: StreamConfig | None = None, *, open_files: int = 64, indexes: int = 1024
    ) -> None:
        """`data`: folder or URL; `config` says where remote shards are kept. Raises BadInput."""
        remote = config or StreamConfig()
        self.store = open_store(
            data,
            cache=remote.cache or None,
            cache_bytes=int(remote.cache_gib * 2**30),
            retries=remote.retries,
            timeout_s=remote.timeout_s,
        )
        self.data, self.split = data, split
        manifest = self.store.read(MANIFEST_NAME).decode("utf-8", "replace")
        self.manifest = Manifest.from_json(manifest, self.store.where(MANIFEST_NAME))
        self.shards = self.manifest.shards(split)
        for shard in self.shards:
            if shard.samples == 0:
                where = self.store.where(shard.name)
                raise BadInput(f"shard {where} is empty: remove it and run 'python -m shards index'")
        self.store.check(self.shards)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._open_files = open_files
        self._lock = threading.Lock()
        self.index = lru_cache(maxsize=indexes)(self._read_index)

    @property
    def counts(self) -> np.ndarray:
        return np.asarray([s.samples for s in self.shards], dtype=np.int64)

    def _read_index(self, shard: int) -> ShardIndex:
        name = index_name(self.shards[shard].name)
        index = ShardIndex.from_bytes(self.store.read(name), self.store.where(name))
        if len(index) != self.shards[shard].samples:
            raise BadInput(
                f"{self.store.where(name)} lists {len(index)} samples, the manifest {self.shards[shard].samples}: "
                f"run 'python -m shards index {self.data}'"
            )
        if index.offsets[-1] > self.shards[shard].bytes:
            raise BadInput(f"{self.store.where(name)} is damaged: run 'python -m shards index {self.data}'")
        return index

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= self._open_files:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = self.store.open(self.shards[shard])
        return self._files[shard]

    def _bytes(self, shard: int, start: int, stop: int) -> bytes:
        with self._lock:  # another thread could close the descriptor before it is read
            return os.pread(self._descriptor(shard), stop - start, start)

    def raw(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """(key, members by extension), nothing parsed. Raises BadSample, naming shard and reason."""
        where, name = self.index(shard), self.shards[shard].name
        start, stop = where.offsets[index : index + 2].tolist()
        data = self._bytes(shard, start, stop)
        if len(data) < stop - start:
            raise BadSample(f"{name} sample {index}: the shard is truncated at byte {start + len(data)}")
        row = where.layouts[index].tolist()
        if found := where.cut(row, data, data):
            return found
        for key, _, members in iter_samples(io.BytesIO(data), name):  # the first one; or it says where damage is
            if row[0]:
                raise BadSample(f"{name} sample {index}: byte {start} has other headers than those that were indexed")
            return key, members
        raise BadSample(f"{name} sample {index}: nothing at byte {start}")

    def read(self, shard: int, index: int) -> Sample:
        """Raises BadSample, naming shard and reason, when the sample cannot be used."""
        return self._parse(shard, *self.raw(shard, index))

    def _parse(self, shard: int, key: str, members: dict[str, bytes]) -> Sample:
        name = self.shards[shard].name
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

    def raw_samples(self) -> Iterator[tuple[int, str, dict[str, memoryview]]]:
        """(shard, key, members by extension) of every whole sample in canonical order, read in large pieces.

        The members are views: one that is kept keeps its piece, PIECE bytes or the whole sample."""
        for shard in range(len(self.shards)):
            where, first = self.index(shard), 0
            while first < len(where):
                start = int(where.offsets[first])
                stop = max(first + 1, int(np.searchsorted(where.offsets, start + PIECE, side="right")) - 1)
                data = self._bytes(shard, start, int(where.offsets[stop]))
                whole, view = len(data), memoryview(data)
                places = (where.offsets[first : stop + 1] - start).tolist()
                for i, row in enumerate(where.layouts[first:stop].tolist()):
                    found = where.cut(row, data, view, places[i]) if places[i + 1] <= whole else None
                    if found:
                        yield shard, *found
                        continue
                    with contextlib.suppress(BadSample):
                        key, members = self.raw(shard, first + i)
                        yield shard, key, {extension: memoryview(member) for extension, member in members.items()}
                first = stop

    def __iter__(self) -> Iterator[Sample]:
        """Every usable sample in canonical order; bad ones are passed over: training and evaluation name them."""
        for shard, key, members in self.raw_samples():
            with contextlib.suppress(BadSample):
                yield self._parse(shard, key, {extension: bytes(member) for extension, member in members.items()})

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
    """uint8 [R, H, W, 4], red, green, blue and a byte that nothing uses, or float32 [R, F_i] features. R = B, or 2B
    when sampling is balanced: wrong rows follow."""
    text: Tensor | list[str]
    """R texts, or float32 [R, F_t] features."""
    labels: Tensor | None
    """bool [R, C], or None without labels."""
    keys: list[str]
    size: int
    """B."""
    bad: list[str] = field(default_factory=list)
    """Why samples were replaced, one line each."""

    @property
    def wrong_follow(self) -> bool:
        """Whether wrong rows follow, R = 2B."""
        return len(self.image) > self.size

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which it is copied to a GPU while that works; a DataLoader asks so."""
        text = self.text.pin_memory() if isinstance(self.text, Tensor) else self.text
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, image=self.image.pin_memory(), text=text, labels=labels)


@dataclass
class Decoder:
    """A stored Sample as arrays: decodes and augments the image, draws one text."""

    image_size: int
    image_dim: int | None
    """Expected F_i of image features; None for encoded images."""
    text_dim: int | None
    classes: int
    augment: bool

    @classmethod
    def of(cls, manifest: Manifest, image_size: int, augment: bool) -> Decoder:
        return cls(image_size, manifest.image_dim, manifest.text_dim, len(manifest.classes), augment)

    def empty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory for a batch, to be filled by rows: images uint8 [rows, H, W, 4] or float32 [rows, F_i], and labels,
        False, bool [rows, C]."""
        if self.image_dim is None:
            image = np.empty((rows, self.image_size, self.image_size, 4), np.uint8)
        else:
            image = np.empty((rows, self.image_dim), np.float32)
        return image, np.zeros((rows, self.classes), bool)

    def __call__(
        self, sample: Sample, shard: str, draw: int | None, image: np.ndarray, labels: np.ndarray
    ) -> list[str] | np.ndarray:
        """Fill a row of `image` and of `labels`; return the texts, or float32 [captions, F_t].

        `draw` seeds the augmentation; None does none. Raises BadSample naming shard and key."""
        try:
            texts = self.texts(sample)
            self.image(sample, draw, image)
        except BadSample as error:
            raise BadSample(f"{shard} sample {sample.key}: {error}") from None
        for label in sample.labels:
            labels[label] = True
        return texts

    def image(self, sample: Sample, draw: int | None, out: np.ndarray) -> None:
        if isinstance(sample.image, bytes):
            if self.image_dim is not None:
                raise BadSample("has an encoded image, expected image features")
            rng = generator_for(draw, 6) if self.augment and draw is not None else None
            decode_image(sample.image, self.image_size, rng, out)
        elif self.image_dim == len(sample.image):
            out[:] = sample.image
        else:
            expected = self.image_dim or "an encoded image"
            raise BadSample(f"has {len(sample.image)} image features, expected {expected}")

    def texts(self, sample: Sample) -> list[str] | np.ndarray:
        if isinstance(sample.texts, list):
            if self.text_dim is not None:
                raise BadSample("has a text, expected text features")
        elif self.text_dim != sample.texts.shape[1]:
            raise BadSample(f"has {sample.texts.shape[1]} text features, expected {self.text_dim or 'a text'}")
        return sample.texts


def _stack_texts(texts: list[str | np.ndarray]) -> Tensor | list[str]:
    if isinstance(texts[0], str):
        return cast(list[str], texts)
    return torch.from_numpy(np.concatenate(texts).reshape(len(texts), -1))


class _Chunks(IterableDataset["Batch | BadInput"]):
    """What one worker yields: for every step the rows of its logical streams. BadInput is handed over as an item:
    raised in a worker it would arrive with a traceback in its message."""

    def __init__(self, stream: Stream, first_step: int) -> None:
        self.stream, self.first_step = stream, first_step

    def __iter__(self) -> Iterator[Batch | BadInput]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.stream.held
        each = len(mine) // workers
        part = mine[worker * each : (worker + 1) * each]
        for step in itertools.count(self.first_step):
            try:
                yield self.stream.read_step(step, part)
            except BadInput as error:
                yield error
                return


class Stream:
    """Training batches of one rank, from any position, without end."""

    def __init__(
        self, data: str, config: StreamConfig, *, seed: int, image_size: int = 224, rank: int = 0, world: int = 1
    ) -> None:
        """`data`: a folder or URL, or several with commas between, mixed by config.weights.

        Raises BadInput when data and config do not fit together."""
        self.readers = [ShardReader(part, config.train_split, config) for part in data.split(",")]
        self.config = config
        self.manifest = self.readers[0].manifest
        self.held = streams_of_rank(resolved_streams(config), rank, world)
        self.plan = self._make_plan(config, seed)
        self.decoder = Decoder.of(self.manifest, image_size, config.augment)
        self.workers = max(w for w in range(config.workers + 1) if w == 0 or len(self.held) % w == 0)
        if self.workers != config.workers:
            log.info("%d workers: the %d logical streams of a rank are shared evenly", self.workers, len(self.held))
        self._reads = self._bad = 0
        self._window: dict[tuple[int, int], tuple[int, int]] = {}

    def _make_plan(self, config: StreamConfig, seed: int) -> Plan | MixturePlan:
        batch, streams = config.global_batch, resolved_streams(config)
        samples = sum(int(r.counts.sum()) for r in self.readers)
        if samples < batch:
            raise BadInput(
                f"split '{config.train_split}' has {samples} samples, fewer than one global batch: "
                f"set stream.global_batch to {samples} or less"
            )

        def plan_of(reader: ShardReader, global_batch: int) -> Plan:
            return Plan(reader.counts, global_batch=global_batch, streams=streams, window=config.window, seed=seed)

        if len(self.readers) > 1:
            self._check_mixture(config, streams)
            plans = [plan_of(reader, streams) for reader in self.readers]
            weights = list(config.weights) or [float(p.samples) for p in plans]
            return MixturePlan(plans, weights, global_batch=batch, seed=seed)
        plan = plan_of(self.readers[0], batch)
        if config.sampling == "epoch":
            return plan
        members = [m for m in self.readers[0].samples_by_class() if len(m)]
        if len(members) < 2:
            raise BadInput("stream.sampling=balanced needs samples of two classes or more: use epoch")
        return BalancedPlan(plan, members)

    def _check_mixture(self, config: StreamConfig, streams: int) -> None:
        """Raises BadInput when the data sets of a mixture do not go together."""
        first = self.readers[0]
        if config.sampling != "epoch":
            raise BadInput("stream.sampling=balanced takes one data set, --data names several: use epoch")
        if config.weights and (len(config.weights) != len(self.readers) or min(config.weights) <= 0):
            raise BadInput(
                f"stream.weights is {list(config.weights)}: give a number above 0 for each of the "
                f"{len(self.readers)} data sets"
            )
        for reader in self.readers:
            for name in ("classes", "label_kind", "image", "image_dim", "text", "text_dim"):
                mine, theirs = getattr(first.manifest, name), getattr(reader.manifest, name)
                if mine != theirs:
                    raise BadInput(
                        f"{reader.data} and {first.data} cannot be mixed: their {name} are {theirs!r} and {mine!r}"
                    )
            if reader.counts.sum() < streams:
                raise BadInput(
                    f"split '{reader.split}' of {reader.data} has {int(reader.counts.sum())} samples, fewer than the "
                    f"{streams} logical streams: lower stream.logical_streams"
                )

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: N less the remainder N mod G; N counts all data sets of a mixture."""
        return self.plan.epoch_samples

    def read_row(self, row: Row, image: np.ndarray, labels: np.ndarray, bad: list[str]) -> tuple[str, str | np.ndarray]:
        """Fill a row of a batch with the row's sample, or with the next good one of its window; (key, text).

        Raises BadInput when none is good."""
        reader, shard, index = self.readers[row.source], row.shard, row.index
        for k in range(row.spares + 1):
            self._reads += 1
            try:
                sample = reader.read(shard, index)
                texts = self.decoder(sample, reader.shards[shard].name, row.draw, image, labels)
                return sample.key, texts[row.draw % len(texts)]
            except BadSample as error:
                self._bad += 1
                bad.append(str(error))
                self._check_share(reader, str(error))
            if k < row.spares:
                shard, index = row.spare(k)
        raise BadInput(
            f"no usable sample left in a window of {row.spares + 1} of split '{reader.split}' in {reader.data}; "
            f"the last one: {bad[-1]}: run 'python -m shards verify {reader.data}'"
        )

    def _check_share(self, reader: ShardReader, last: str) -> None:
        if self._reads >= MIN_READS_FOR_BAD_SHARE and self._bad > self.config.max_bad_share * self._reads:
            raise BadInput(
                f"{self._bad} of {self._reads} samples read from {reader.data} are unusable, more than "
                f"stream.max_bad_share {self.config.max_bad_share:g}; the last one: {last}: "
                f"run 'python -m shards verify {reader.data}'"
            )

    def read_step(self, step: int, streams: range) -> Batch:
        """The rows that the given logical streams have in a global batch."""
        bad: list[str] = []
        for stream in streams:
            for place in self.plan.place(step, stream):
                now = (place.epoch, place.window)
                if self._window.get((place.source, stream)) != now:
                    self._window[place.source, stream] = now
                    reader = self.readers[place.source]
                    reader.store.prefetch([reader.shards[shard] for shard in place.following])
        parts = [self.plan.chunk_rows(step, s) for s in streams]
        half = self.plan.chunk
        rows = [r for part in parts for r in part[:half]] + [r for part in parts for r in part[half:]]
        image, labels = self.decoder.empty(len(rows))
        read = [self.read_row(row, image[i], labels[i], bad) for i, row in enumerate(rows)]
        return Batch(
            image=torch.from_numpy(image),
            text=_stack_texts([text for _, text in read]),
            labels=torch.from_numpy(labels) if self.decoder.classes else None,
            keys=[key for key, _ in read],
            size=half * len(streams),
            bad=bad,
        )

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Batches from `position` samples on (a multiple of the global batch), without end."""
        step, rest = divmod(position, self.config.global_batch)
        if rest:
            raise BadInput(
                f"position {position} is not a multiple of stream.global_batch {self.config.global_batch}: "
                "resume with the batch size that the checkpoint was made with"
            )
        chunks = _Chunks(self, step)
        if not self.workers:
            yield from map(_good, chunks)
            return
        pinned = torch.cuda.is_available()
        loader = iter(
            DataLoader(
                chunks,
                batch_size=None,
                num_workers=self.workers,
                pin_memory=pinned and self.workers == 1,  # `join` makes new memory of the parts of several
                multiprocessing_context="fork",  # a worker shares the plan and the open indexes
            )
        )
        try:
            while True:
                yield join([_good(next(loader)) for _ in range(self.workers)], pinned)
        finally:
            del loader  # ends the workers now: a traceback would keep them until it is collected


def _good(item: Batch | BadInput) -> Batch:
    if isinstance(item, BadInput):
        raise item
    return item


def join(parts: list[Batch], pinned: bool = False) -> Batch:
    """Batches of consecutive logical streams as one: all right rows, then all wrong rows. `pinned`: in page-locked
    memory, unless it is one batch."""
    if len(parts) == 1:
        return parts[0]

    def rows(pick: Callable[[Batch], Tensor]) -> Tensor:
        pieces = [pick(p)[: p.size] for p in parts] + [pick(p)[p.size :] for p in parts]
        shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
        return torch.cat(pieces, out=torch.empty(shape, dtype=pieces[0].dtype, pin_memory=pinned))

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
    """uint8 [n, H, W, 4] or float32 [n, F_i]."""
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
    decoder = Decoder.of(reader.manifest, image_size, augment=False)
    starts = np.concatenate([[0], np.cumsum(reader.counts)])
    stop = int(starts[-1]) if stop is None else stop

    def load(i: int, image: np.ndarray, labels: np.ndarray) -> tuple[Sample, list[str] | np.ndarray]:
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        try:
            sample = reader.read(shard, i - int(starts[shard]))
            return sample, decoder(sample, reader.shards[shard].name, None, image, labels)
        except BadSample as error:
            raise BadInput(
                f"split '{reader.split}' of {reader.data} cannot be evaluated: {error}: "
                f"run 'python -m shards verify {reader.data}'"
            ) from None

    with ThreadPoolExecutor(threads) as pool:
        for at in range(first, stop, batch):
            numbers = range(at, min(at + batch, stop))
            image, labels = decoder.empty(len(numbers))
            rows = list(pool.map(load, numbers, image, labels))
            yield EvalBatch(
                image=torch.from_numpy(image),
                text=_stack_texts([t for _, texts in rows for t in texts]),
                owner=torch.tensor([i for i, (_, texts) in enumerate(rows) for _ in texts]),
                labels=torch.from_numpy(labels) if decoder.classes else None,
                keys=[sample.key for sample, _ in rows],
                samples=[sample for sample, _ in rows],
            )
