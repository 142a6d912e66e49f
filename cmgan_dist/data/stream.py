"""Training batches of a rank. The position is one integer: samples seen.

A plan (order.py) says by arithmetic which (shard, index) every row of global batch t is, whatever the number of ranks
and workers; `ShardReader` reads it by its offset, `SampleDecoder` turns it into arrays, and `Stream` joins rows to the
rank's Batch. A bad sample is replaced by the next good one of its window, counted and named.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmgan_dist.config.fields import DATA_SEPARATOR, StreamConfig, resolved_streams
from cmgan_dist.data.batch import Batch, SampleDecoder, join, stack_texts
from cmgan_dist.data.differences import other_features
from cmgan_dist.data.handover import LOOK_S, Packed, next_item, pack
from cmgan_dist.data.order import BalancedPlan, MixturePlan, Plan, SampleRef, streams_of_rank
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.resize import QUICK_WAY
from cmgan_dist.errors import BadInput, BadSample, shards_command

log = logging.getLogger(__name__)

MIN_READS_FOR_BAD_SHARE = 200
"""Samples read before the share of bad ones can stop a run."""
STALLED_S = 600.0
"""Seconds after which a worker that gives nothing is given up, beside the tries that a remote source has."""


class _Chunks(IterableDataset["Packed | Batch | BadInput"]):
    """What one worker yields: for every step the rows of its logical streams. BadInput is handed over as an item:
    raised in a worker it would arrive with a traceback in its message."""

    def __init__(self, stream: Stream, first_step: int) -> None:
        self.stream, self.first_step = stream, first_step

    def __iter__(self) -> Iterator[Packed | Batch | BadInput]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.stream.held
        each = len(mine) // workers
        part = mine[worker * each : (worker + 1) * each]
        for step in itertools.count(self.first_step):
            try:
                batch = self.stream.read_step(step, part)
                yield pack(batch) if info else batch
            except BadInput as error:
                yield error
                return


class Stream:
    """Training batches of one rank, from any position, without end."""

    def __init__(
        self, data: str, config: StreamConfig, *, seed: int, image_size: int = 224, rank: int = 0, world: int = 1
    ) -> None:
        """`data`: a folder or URL, or several with DATA_SEPARATOR between, mixed by config.weights.

        Raises BadInput when data and config do not fit together."""
        self.readers = [ShardReader(part, config.train_split, config) for part in data.split(DATA_SEPARATOR)]
        self.config = config
        self.manifest = self.readers[0].manifest
        self.held = streams_of_rank(resolved_streams(config), rank, world)
        self.plan = self._make_plan(config, seed)
        self.decoder = SampleDecoder.of(self.manifest, image_size, config.augment)
        self.workers = max(w for w in range(config.workers + 1) if w == 0 or len(self.held) % w == 0)
        if self.workers != config.workers:
            log.info("%d workers: the %d logical streams of a rank are shared evenly", self.workers, len(self.held))
        if config.augment and self.manifest.image_dim is None:
            log.info("training pictures: %s", QUICK_WAY)
        self._reads = self._bad = 0
        self._window: dict[tuple[int, int], tuple[int, int]] = {}

    def _make_plan(self, config: StreamConfig, seed: int) -> Plan | MixturePlan:
        """Return the order of the samples. Raises BadInput when data and config do not fit together."""
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
        if len(members) < 2 or self.manifest.label_kind != "single":
            raise BadInput(
                "stream.sampling=balanced needs samples of two classes or more, each of one class, and the labels of "
                f"{self.readers[0].data} are of the kind '{self.manifest.label_kind}': use epoch"
            )
        return BalancedPlan(plan, members)

    def _check_mixture(self, config: StreamConfig, streams: int) -> None:
        """Raise BadInput when the data sets of a mixture do not go together."""
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
                    way = "name one of them"
                    if name == "classes" and reader.manifest.labels == first.manifest.labels == "names":
                        way = (
                            "write the manifests of the raw shards anew by 'python -m shards index --overwrite DIR "
                            "--classes FILE', with the classes of all in that file"
                        )
                    raise BadInput(
                        f"{reader.place} and {first.place} cannot be mixed, as their {name} are {theirs!r} and "
                        f"{mine!r}: {way}"
                    )
            _check_features(first, reader)
            if reader.counts.sum() < streams:
                raise BadInput(
                    f"split '{reader.split}' of {reader.place} has {int(reader.counts.sum())} samples, fewer than the "
                    f"{streams} logical streams: lower stream.logical_streams"
                )

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: N less the remainder N mod G; N counts all data sets of a mixture."""
        return self.plan.epoch_samples

    def read_row(
        self, ref: SampleRef, image: np.ndarray, labels: np.ndarray, bad: list[str]
    ) -> tuple[str, str | np.ndarray]:
        """Fill a row of a batch with a sample, or with the next good one of its window; return its (key, text).

        A text is a string or float32 [F_t]. The reasons of bad samples are appended to `bad`. Raises BadInput when no
        sample is good, or too many have been bad."""
        reader, shard, index = self.readers[ref.source], ref.shard, ref.index
        for k in range(ref.replacements + 1):
            self._reads += 1
            try:
                sample = reader.read(shard, index)
                texts = self.decoder(sample, reader.shards[shard].name, ref.draw, image, labels)
                return sample.key, texts[ref.draw % len(texts)]
            except BadSample as error:
                self._bad += 1
                bad.append(str(error))
                self._check_share(reader, str(error))
            if k < ref.replacements:
                shard, index = ref.replacement(k)
        raise BadInput(
            f"no usable sample left in a window of {ref.replacements + 1} of split '{reader.split}' in {reader.place}; "
            f"the last one: {bad[-1]}: run {shards_command('verify', reader.place)}"
        )

    def _check_share(self, reader: ShardReader, last: str) -> None:
        """Raise BadInput when more samples were bad than stream.max_bad_share; `last`: the last one's reason."""
        if self._reads >= MIN_READS_FOR_BAD_SHARE and self._bad > self.config.max_bad_share * self._reads:
            raise BadInput(
                f"{self._bad} of {self._reads} samples read from {reader.place} are unusable, more than "
                f"stream.max_bad_share {self.config.max_bad_share:g}; the last one: {last}: "
                f"run {shards_command('verify', reader.place)}"
            )

    def read_step(self, step: int, streams: range) -> Batch:
        """Return the rows that the given logical streams have in a global batch. Raises BadInput as `read_row` does."""
        bad: list[str] = []
        parts = [self.plan.chunk_rows(step, s) for s in streams]
        half = self.plan.chunk
        refs = [ref for part in parts for ref in part[:half]] + [ref for part in parts for ref in part[half:]]
        self._read_ahead(step, streams, refs)
        image, labels = self.decoder.empty(len(refs))
        read = [self.read_row(ref, image[i], labels[i], bad) for i, ref in enumerate(refs)]
        return Batch(
            image=torch.from_numpy(image),
            text=stack_texts([text for _, text in read]),
            labels=torch.from_numpy(labels) if self.decoder.classes else None,
            keys=[key for key, _ in read],
            size=half * len(streams),
            bad=bad,
        )

    def _read_ahead(self, step: int, streams: range, refs: list[SampleRef]) -> None:
        """Have what these rows need read at a time, and the shards of the next window fetched where a logical stream
        has come to another window; at its first one, those of this window too."""
        later: list[list[int]] = [[] for _ in self.readers]
        for stream in streams:
            for position in self.plan.positions(step, stream):
                now, place = (position.epoch, position.window), (position.source, stream)
                if place not in self._window:
                    later[position.source] = position.shards + later[position.source]
                if self._window.get(place) != now:
                    self._window[place] = now
                    later[position.source] += position.following
        for source, reader in enumerate(self.readers):
            reader.read_ahead(list(dict.fromkeys(ref.shard for ref in refs if ref.source == source)), later[source])

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Yield batches from `position` samples on (a multiple of the global batch), without end.

        Raises BadInput when it is no multiple, and as `read_row` does."""
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
        patience = STALLED_S + 10 * self.config.timeout_s * (1 + self.config.retries)
        loader = iter(
            DataLoader(
                chunks,
                batch_size=None,
                num_workers=self.workers,
                timeout=LOOK_S,
                pin_memory=pinned and self.workers == 1,  # `join` makes new memory of the parts of several
                multiprocessing_context="fork",  # a worker shares the plan and the open indexes
            )
        )
        try:
            while True:
                yield join([_good(next_item(loader, patience)) for _ in range(self.workers)], pinned)
        finally:
            del loader  # ends the workers now: a traceback would keep them until it is collected


def _check_features(first: ShardReader, other: ShardReader) -> None:
    """Raise BadInput when the features of two data sets are known to be of different backbones, weights or pools."""
    for modality, kind in (("image", first.manifest.image), ("text", first.manifest.text)):
        mine, theirs = (reader.manifest.details.get(modality) for reader in (first, other))
        found = other_features(mine, theirs) if kind == "features" else ""
        if found:
            raise BadInput(
                f"the {modality} features of {other.place} and {first.place} cannot be mixed ({found}): "
                "make both alike by 'python -m shards features'"
            )


def _good(item: Packed | Batch | BadInput) -> Batch:
    """Return the batch that a worker yields. Raises the BadInput that it hands over."""
    if isinstance(item, BadInput):
        raise item
    return item.unpack() if isinstance(item, Packed) else item
