"""Batches of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cmgan_dist.data.batch import batch_ranges, eval_batches
from cmgan_dist.data.reader import ShardReader


def test_batches_begin_anew_in_each_shard() -> None:
    assert batch_ranges(np.array([5, 0, 3]), 2) == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    assert batch_ranges(np.array([], dtype=np.int64), 2) == []


def test_batches_of_a_split_are_those_ranges(feature_data: Callable[..., Path]) -> None:
    reader = ShardReader(str(feature_data()), "train")
    for first, stop in ((0, None), (40, 65), (38, 70)):
        found = [batch.numbers for batch in eval_batches(reader, image_size=0, batch=16, first=first, stop=stop)]
        inside = [n for numbers in found for n in numbers]
        assert inside == list(range(first, stop or 96))
        shard_of = np.repeat([0, 1, 2], [40, 25, 31])
        assert all(len({shard_of[n] for n in numbers}) == 1 for numbers in found)
        if stop is None:
            assert [(numbers[0], numbers[-1] + 1) for numbers in found] == batch_ranges(reader.counts, 16)
