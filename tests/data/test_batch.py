"""Batches of an evaluation."""

from __future__ import annotations

import numpy as np

from cmgan_dist.data.batch import batch_ranges


def test_batches_begin_anew_in_each_shard() -> None:
    assert batch_ranges(np.array([5, 0, 3]), 2) == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    assert batch_ranges(np.array([], dtype=np.int64), 2) == []
