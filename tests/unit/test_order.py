"""The order is arithmetic: every sample once an epoch, the same global batches at any world size, exact resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmgan_dist.errors import BadInput
from cmgan_dist.order import BalancedPlan, MixturePlan, Plan, streams_of_rank

plans = st.builds(
    lambda counts, streams, chunk, window, seed: Plan(
        np.array(counts), global_batch=streams * chunk, streams=streams, window=window, seed=seed
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 99),
).filter(lambda p: p.steps > 0)


def global_batch(plan: Plan, step: int) -> list[tuple[int, int]]:
    return [(r.shard, r.index) for s in range(plan.streams) for r in plan.chunk_rows(step, s)]


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 3))
def test_every_sample_at_most_once_and_the_remainder_is_n_mod_g(plan: Plan, epoch: int) -> None:
    seen = [x for t in range(plan.steps) for x in global_batch(plan, epoch * plan.steps + t)]
    assert len(seen) == len(set(seen)) == plan.samples - plan.samples % plan.global_batch
    for shard, index in seen:
        assert 0 <= index < plan.counts[shard]


@settings(max_examples=40, deadline=None)
@given(plans, st.data())
def test_global_batches_do_not_depend_on_the_world_size(plan: Plan, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([w for w in range(1, plan.streams + 1) if plan.streams % w == 0]))
    step = data.draw(st.integers(0, 3 * plan.steps))
    by_rank = [
        (row.shard, row.index, row.draw)
        for rank in range(world)
        for s in streams_of_rank(plan.streams, rank, world)
        for row in plan.chunk_rows(step, s)
    ]
    assert [x[:2] for x in by_rank] == global_batch(plan, step)


@settings(max_examples=30, deadline=None)
@given(plans, st.integers(0, 50))
def test_resume_needs_no_history(plan: Plan, step: int) -> None:
    for t in range(step):
        global_batch(plan, t)
    fresh = Plan(plan.counts, global_batch=plan.global_batch, streams=plan.streams, window=plan.window, seed=plan.seed)
    assert global_batch(plan, step) == global_batch(fresh, step)


def test_epochs_differ_and_leave_out_different_samples() -> None:
    plan = Plan(np.array([103]), global_batch=10, streams=5, window=2, seed=0)
    epochs = [[x for t in range(10) for x in global_batch(plan, e * 10 + t)] for e in range(6)]
    assert len({tuple(e) for e in epochs}) == 6
    left_out = [frozenset((0, i) for i in range(103)) - set(e) for e in epochs]
    assert len(set(left_out)) > 3


def test_a_window_bounds_the_shards_that_are_open() -> None:
    plan = Plan(np.full(64, 10), global_batch=8, streams=4, window=2, seed=3)
    for stream in range(4):
        for start in range(0, 80, 10):
            rows = [r for t in range(start, start + 10) for r in plan.chunk_rows(t, stream)]
            assert len({r.shard for r in rows}) <= 4  # 20 rows lie in two neighbouring windows of two shards each


def test_balanced_draws_are_of_two_classes_and_belong_to_the_position() -> None:
    plan = Plan(np.array([30]), global_batch=12, streams=3, window=1, seed=5)
    classes = np.arange(30) % 3
    classes[classes == 2] = 0  # class sizes 20 and 10
    members = [np.stack([np.zeros(n, int), np.flatnonzero(classes == c)], 1) for c, n in ((0, 20), (1, 10))]
    balanced = BalancedPlan(plan, members)
    drawn = []
    for step in range(200):
        for s in range(3):
            rows = balanced.chunk_rows(step, s)
            right, wrong = rows[:4], rows[4:]
            assert all(classes[a.index] != classes[b.index] for a, b in zip(right, wrong, strict=True))
            drawn += [classes[r.index] for r in right]
    assert abs(np.mean(drawn) - 0.5) < 0.03  # classes alike, not samples
    assert [r.index for r in balanced.chunk_rows(7, 1)] == [r.index for r in balanced.chunk_rows(7, 1)]


def test_world_size_that_does_not_divide_names_the_choices() -> None:
    with pytest.raises(BadInput, match=r"16 logical streams cannot be shared by 3 processes: use 1, 2, 4, 8, 16"):
        streams_of_rank(16, 0, 3)


def test_a_billion_samples_are_planned_by_arithmetic() -> None:
    counts = np.full(100_000, 10_000)
    plan = Plan(counts, global_batch=4096, streams=32, window=4, seed=1)
    rows = plan.chunk_rows(plan.steps * 2 + 12345, 17)
    assert len(rows) == 128
    assert all(0 <= r.shard < 100_000 and 0 <= r.index < 10_000 for r in rows)


def mixture(weights: list[float], seed: int = 0) -> MixturePlan:
    counts = ([30, 50], [17], [200, 9])
    plans = [Plan(np.array(c), global_batch=4, streams=4, window=2, seed=seed) for c in counts[: len(weights)]]
    return MixturePlan(plans, weights, global_batch=16, seed=seed)


def test_a_mixture_has_its_shares_and_every_set_has_its_own_epochs() -> None:
    plan = mixture([0.5, 0.2, 0.3])
    rows = [r for t in range(2000) for s in range(4) for r in plan.chunk_rows(t, s)]
    share = np.bincount([r.source for r in rows]) / len(rows)
    np.testing.assert_allclose(share, [0.5, 0.2, 0.3], atol=1e-9)  # 8000 rows of a stream are whole periods
    for source, part in enumerate(plan.plans):
        for s in range(4):
            mine = [r for t in range(2000) for r in plan.chunk_rows(t, s) if r.source == source]
            length = part.steps
            for epoch in range(3):  # each of its epochs goes through its part of the set once
                seen = [(r.shard, r.index) for r in mine[epoch * length : (epoch + 1) * length]]
                assert len(set(seen)) == length


def test_a_mixture_resumes_anywhere_and_gives_rare_sets_their_turn() -> None:
    plan, fresh = mixture([0.995, 0.005]), mixture([0.995, 0.005])
    for t in range(300):
        plan.chunk_rows(t, 2)
    key = [(r.source, r.shard, r.index, r.draw) for r in plan.chunk_rows(777, 2)]
    assert key == [(r.source, r.shard, r.index, r.draw) for r in fresh.chunk_rows(777, 2)]
    assert sum(r.source for t in range(250) for r in plan.chunk_rows(t, 1)) == 5


@settings(max_examples=30, deadline=None)
@given(plans, st.integers(0, 3))
def test_the_next_window_is_what_comes_next(plan: Plan, stream: int) -> None:
    stream = stream % plan.streams
    window, following = plan.next_window(0, stream)
    for step in range(3 * plan.steps):
        now, after = plan.next_window(step, stream)
        if now != window:
            last = len(plan._windows(window[0], stream)[0]) - 1
            successor = (window[0] + 1, 0) if window[1] == last else (window[0], window[1] + 1)
            if now == successor:  # windows smaller than a chunk are passed by
                assert plan.row(now[0], stream, step % plan.steps * plan.chunk).shard in following
            window, following = now, after
