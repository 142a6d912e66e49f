"""The order of samples is arithmetic: pure functions of (seed, epoch, shard sizes), without I/O.

Legend: N samples, G samples of a global batch, S logical streams, W processes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import NamedTuple

import numpy as np

from cmgan_dist.errors import BadInput

_MASK = (1 << 64) - 1
_START = 0x9E3779B97F4A7C15


def _mix_in(state: int, value: int) -> int:
    """Return the hash of all integers so far and one more (a step of splitmix64; Steele et al., OOPSLA 2014)."""
    state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def mix(*values: int) -> int:
    """Return a 64-bit hash of integers (splitmix64 steps): the random number that belongs to a position."""
    return reduce(_mix_in, values, _START)


def generator_for(*values: int) -> np.random.Generator:
    """Return a numpy generator that is seeded from a position."""
    return np.random.Generator(np.random.PCG64(mix(*values)))


def random_for(*values: int) -> random.Random:
    """Return a generator of few numbers that is seeded from a position, in a third of the time of numpy's."""
    return random.Random(mix(*values))


@dataclass(slots=True)
class SampleRef:
    """One row of a global batch: where its sample lies and how to draw from it."""

    source: int
    """Data set of a mixture; 0 where there is one."""
    shard: int
    """Number of the shard in its split."""
    index: int
    """Number of the sample in its shard."""
    draw: int
    """64-bit number of this position, for the caption and the augmentation."""
    at: int
    """Where the sample stands in its shuffled window or in its class."""
    replacements: int
    """How many samples can be taken instead when this one is bad."""
    replacement_of: Callable[[int, int], tuple[int, int]]
    """(at, k) -> the k-th of them, (shard, index); one function for all samples of a window or class."""

    def replacement(self, k: int) -> tuple[int, int]:
        """Return the (shard, index) of the k-th sample to take instead, 0 <= k < `replacements`."""
        return self.replacement_of(self.at, k)


class StreamPosition(NamedTuple):
    """Where a logical stream is in a data set, and which shards it needs."""

    source: int
    """Data set of a mixture; 0 where there is one."""
    epoch: int
    window: int
    """Number of the window in its epoch."""
    shards: list[int]
    """Shards of this window."""
    following: list[int]
    """Shards of the next window."""


class Plan:
    """The order of all epochs as a pure function of (seed, epoch, counts).

    The shards are permuted, laid end to end and rotated by a random offset; the first steps * G samples are cut into S
    equal contiguous logical streams; samples are shuffled inside windows of `window` consecutive shards of a stream.
    Global batch t holds the next G / S samples of every stream, stream by stream. The last N mod G samples of the
    rotated layout are left out of an epoch: another set each epoch.

    Instead of a bad sample comes the next good one of its window. A stream's first and last window, of which the cuts
    between streams can leave a single sample, go on with the window beside them."""

    def __init__(self, counts: np.ndarray, *, global_batch: int, streams: int, window: int, seed: int) -> None:
        """`counts`: int64 [shards], the samples of each; `streams` divides `global_batch`."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.global_batch, self.streams, self.window, self.seed = global_batch, streams, window, seed
        self.samples = int(self.counts.sum())
        self.chunk = global_batch // streams
        """Samples of one logical stream in a global batch."""
        self.steps = self.samples // global_batch
        """Global batches in an epoch."""
        self.epoch_samples = self.steps * global_batch
        self._layout = lru_cache(maxsize=2)(self._compute_layout)
        self.windows = lru_cache(maxsize=4 * streams)(self._compute_windows)
        """(epoch, stream) -> the windows of a logical stream, each a list of pieces (shard, first, stop), and int64
        [windows + 1]: where in the stream each window starts."""
        self._shuffled = lru_cache(maxsize=2 * streams)(self._compute_shuffled)

    def _compute_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return (shards in the order of the epoch [shards], where each starts [shards + 1], rotation)."""
        rng = generator_for(self.seed, epoch, 1)
        order = rng.permutation(len(self.counts))
        starts = np.concatenate([[0], np.cumsum(self.counts[order])])
        return order, starts, int(rng.integers(max(self.samples, 1)))

    def _compute_windows(self, epoch: int, stream: int) -> tuple[list[list[tuple[int, int, int]]], np.ndarray]:
        """Return what `windows` says."""
        order, starts, rotation = self._layout(epoch)
        length = self.steps * self.chunk
        pieces: list[tuple[int, int, int]] = []
        at, left = (rotation + stream * length) % self.samples, length
        while left:
            k = int(np.searchsorted(starts, at, side="right")) - 1
            first = at - int(starts[k])
            take = min(left, int(starts[k + 1]) - at)
            pieces.append((int(order[k]), first, first + take))
            left -= take
            at = (at + take) % self.samples
        windows = [pieces[i : i + self.window] for i in range(0, len(pieces), self.window)]
        sizes = [sum(stop - first for _, first, stop in w) for w in windows]
        return windows, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _compute_shuffled(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """Return the (shard, index) of a window's samples in shuffled order, int64 [samples of the window, 2]."""
        pieces = self.windows(epoch, stream)[0][window]
        samples = np.concatenate(
            [np.stack([np.full(b - a, s, np.int64), np.arange(a, b, dtype=np.int64)], 1) for s, a, b in pieces]
        )
        return samples[generator_for(self.seed, epoch, 2, stream, window).permutation(len(samples))]

    def rows(self, epoch: int, stream: int, first: int, count: int) -> list[SampleRef]:
        """Return the samples first..first + count of a logical stream in an epoch."""
        starts = self.windows(epoch, stream)[1]
        window = int(np.searchsorted(starts, first, side="right")) - 1
        state = mix(self.seed, epoch, 3, stream)
        rows: list[SampleRef] = []
        while len(rows) < count:
            replacements = self._replacements(epoch, stream, window)
            at, stop = first + len(rows) - int(starts[window]), first + count - int(starts[window])
            replacement_of, before = partial(self._replacement, epoch, stream, window), int(starts[window])
            for shard, index in self._shuffled(epoch, stream, window)[at:stop].tolist():
                rows.append(SampleRef(0, shard, index, _mix_in(state, before + at), at, replacements, replacement_of))
                at += 1
            window += 1
        return rows

    def _beside(self, epoch: int, stream: int, window: int) -> int | None:
        """Return the window that this one goes on with where samples are bad; None where it does not."""
        windows = len(self.windows(epoch, stream)[0])
        if 0 < window < windows - 1 or windows == 1:
            return None
        return window - 1 if window else 1

    def _replacements(self, epoch: int, stream: int, window: int) -> int:
        """Return how many samples can be taken instead of one of this window."""
        starts, beside = self.windows(epoch, stream)[1], self._beside(epoch, stream, window)
        own = int(starts[window + 1] - starts[window]) - 1
        return own if beside is None else own + int(starts[beside + 1] - starts[beside])

    def _replacement(self, epoch: int, stream: int, window: int, at: int, k: int) -> tuple[int, int]:
        """Return the (shard, index) of the k-th sample to take instead of that at `at` of this window."""
        order = self._shuffled(epoch, stream, window)
        beside = self._beside(epoch, stream, window)
        if k >= len(order) - 1 and beside is not None:
            k -= len(order)  # the first one is at `at` of the other window
            order = self._shuffled(epoch, stream, beside)
        shard, index = order[(at + 1 + k) % len(order)]
        return int(shard), int(index)

    def positions(self, step: int, stream: int) -> list[StreamPosition]:
        """Return where a logical stream is at global batch `step` of the run, in each data set of the plan."""
        epoch, within = divmod(step, self.steps)
        windows, starts = self.windows(epoch, stream)
        window = int(np.searchsorted(starts, within * self.chunk, side="right")) - 1
        last = window + 1 == len(windows)
        following = self.windows(epoch + 1, stream)[0][0] if last else windows[window + 1]
        shards, behind = ([shard for shard, _, _ in pieces] for pieces in (windows[window], following))
        return [StreamPosition(0, epoch, window, shards, behind)]

    def chunk_rows(self, step: int, stream: int) -> list[SampleRef]:
        """Return the G / S rows that a logical stream gives to global batch `step`, counted from the run's start."""
        epoch, within = divmod(step, self.steps)
        return self.rows(epoch, stream, within * self.chunk, self.chunk)


def _replacement_of_class(members: np.ndarray, at: int, k: int) -> tuple[int, int]:
    """Return the k-th member of a class behind the one at `at`, round its end."""
    shard, index = members[(at + 1 + k) % len(members)]
    return int(shard), int(index)


class BalancedPlan(Plan):
    """The reference recipe's draws: per slot two different classes, then one sample of each; order has no epochs.

    The chunk of a logical stream holds G / S samples, then the G / S mismatched ones of the same slots."""

    def __init__(self, plan: Plan, members: list[np.ndarray]) -> None:
        """`members`: per non-empty class int64 [n, 2], the (shard, index) of its samples."""
        super().__init__(
            plan.counts, global_batch=plan.global_batch, streams=plan.streams, window=plan.window, seed=plan.seed
        )
        self.members = members

    def chunk_rows(self, step: int, stream: int) -> list[SampleRef]:
        """Return the 2 G / S rows that a logical stream gives to global batch `step`: samples, then mismatched ones."""
        rng = generator_for(self.seed, 4, step, stream)
        n = len(self.members)
        matching = rng.integers(n, size=self.chunk)
        mismatched = (matching + rng.integers(1, n, size=self.chunk)) % n
        rows = []
        for which, chosen in enumerate((matching, mismatched)):
            for j, members in enumerate(self.members[c] for c in chosen):
                at = int(rng.integers(len(members)))
                shard, index = members[at]
                draw = mix(self.seed, 5, step, stream, 2 * j + which)
                others = partial(_replacement_of_class, members)
                rows.append(SampleRef(0, int(shard), int(index), draw, at, len(members) - 1, others))
        return rows

    def positions(self, step: int, stream: int) -> list[StreamPosition]:
        """Return nothing: any shard can be next."""
        return []


class MixturePlan:
    """Several data sets with weights. Every logical stream takes its rows from the sets in periods of `PERIOD` rows, in
    which each set has its share and the order is shuffled: how far each set has come is arithmetic, and each goes
    through its own epochs. Global batches are as independent of ranks and workers as those of one set."""

    PERIOD = 1000
    """Rows of a logical stream in which the shares are exact: a weight is rounded to this resolution."""

    def __init__(self, plans: list[Plan], weights: list[float], *, global_batch: int, seed: int) -> None:
        """`plans`: one per data set, each with the mixture's S as its streams and as its global batch.

        Raises BadInput when a data set would have less than one row in an epoch."""
        self.plans, self.seed, self.global_batch = plans, seed, global_batch
        self.streams = plans[0].streams
        self.chunk = global_batch // self.streams
        self.samples = sum(p.samples for p in plans)
        self.steps = self.samples // global_batch
        self.epoch_samples = self.steps * global_batch
        exact = np.asarray(weights) / sum(weights) * self.PERIOD
        self.quota = np.floor(exact).astype(np.int64)
        for k in np.argsort(self.quota - exact, kind="stable")[: self.PERIOD - int(self.quota.sum())]:
            self.quota[k] += 1
        for k, quota in enumerate(self.quota):
            if quota * self.epoch_samples < self.PERIOD:
                least = math.ceil(self.PERIOD / max(self.epoch_samples, 1)) / self.PERIOD
                span, share = "an epoch" if quota else f"{self.PERIOD:,}", exact[k] / self.PERIOD
                raise BadInput(
                    f"data set {k + 1} of {len(plans)} in --data has a share of {share:.2g}, less than one row in "
                    f"{span}: give it a share of {least:g} or more by stream.weights, or leave it out"
                )
        self._period = lru_cache(maxsize=2 * self.streams)(self._compute_period)

    def _compute_period(self, stream: int, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set of each row [PERIOD]; how many rows of that set came before it in the period [PERIOD])."""
        sources = np.repeat(np.arange(len(self.quota)), self.quota)
        sources = sources[generator_for(self.seed, 9, stream, period).permutation(self.PERIOD)]
        before = np.zeros(self.PERIOD, dtype=np.int64)
        for k in range(len(self.quota)):
            before[sources == k] = np.arange(self.quota[k])
        return sources, before

    def chunk_rows(self, step: int, stream: int) -> list[SampleRef]:
        """Return the rows that a logical stream gives to a global batch, as `Plan.chunk_rows` does."""
        rows = []
        for n in range(step * self.chunk, (step + 1) * self.chunk):
            period, at = divmod(n, self.PERIOD)
            sources, before = self._period(stream, period)
            source = int(sources[at])
            plan = self.plans[source]
            epoch, first = divmod(period * int(self.quota[source]) + int(before[at]), plan.steps)
            (ref,) = plan.rows(epoch, stream, first, 1)
            ref.source = source
            rows.append(ref)
        return rows

    def positions(self, step: int, stream: int) -> list[StreamPosition]:
        """Return for each data set where a logical stream takes its next row from it, as `Plan.positions` does."""
        period, at = divmod(step * self.chunk, self.PERIOD)
        taken = period * self.quota + np.bincount(self._period(stream, period)[0][:at], minlength=len(self.plans))
        return [
            position._replace(source=k)
            for k, plan in enumerate(self.plans)
            for position in plan.positions(int(taken[k]), stream)  # of one row of a stream each
        ]


def streams_of_rank(streams: int, rank: int, world: int) -> range:
    """Return the logical streams of a rank. Raises BadInput when the world size does not divide their number."""
    if streams % world:
        choices = [w for w in range(1, streams + 1) if streams % w == 0]
        raise BadInput(
            f"{streams} logical streams cannot be shared by {world} processes: use {', '.join(map(str, choices))} "
            "processes, or set stream.logical_streams to a multiple of the world size that divides stream.global_batch"
        )
    each = streams // world
    return range(rank * each, (rank + 1) * each)


def steps_for(epochs: float, epoch_samples: int, global_batch: int) -> int:
    """Return the global batches in a number of (possibly fractional) epochs, at least one."""
    return max(1, math.ceil(epochs * epoch_samples / global_batch - 1e-9))
