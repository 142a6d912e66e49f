"""The order is arithmetic: every sample once an epoch, the same global batches at any world size, exact resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmgan_dist.data.order import BalancedPlan, MixturePlan, Plan, mix, streams_of_rank
from cmgan_dist.errors import BadInput

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
    plan, fresh = mixture([0.985, 0.015]), mixture([0.985, 0.015])
    for t in range(300):
        plan.chunk_rows(t, 2)
    key = [(r.source, r.shard, r.index, r.draw) for r in plan.chunk_rows(777, 2)]
    assert key == [(r.source, r.shard, r.index, r.draw) for r in fresh.chunk_rows(777, 2)]
    assert sum(r.source for t in range(250) for r in plan.chunk_rows(t, 1)) == 15


@settings(max_examples=30, deadline=None)
@given(plans, st.integers(0, 3))
def test_the_next_window_is_what_comes_next(plan: Plan, stream: int) -> None:
    stream = stream % plan.streams
    (before,) = plan.positions(0, stream)
    for step in range(3 * plan.steps):
        (now,) = plan.positions(step, stream)
        if (now.epoch, now.window) != (before.epoch, before.window):
            last = len(plan.windows(before.epoch, stream)[0]) - 1
            successor = (before.epoch + 1, 0) if before.window == last else (before.epoch, before.window + 1)
            if (now.epoch, now.window) == successor:  # windows smaller than a chunk are passed by
                assert plan.chunk_rows(step, stream)[0].shard in before.following
            before = now


def test_every_set_of_a_mixture_says_where_it_is_and_what_comes_next() -> None:
    """Each set's next row lies in its present window, its next window's rows in the shards that were named."""
    plan = mixture([0.5, 0.2, 0.3])
    named: dict[int, list[int]] = {}
    windows: dict[int, tuple[int, int]] = {}
    changes = 0
    for step in range(600):
        for position in plan.positions(step, 1):
            now, part = (position.epoch, position.window), plan.plans[position.source]
            upcoming = (r for t in range(step, step + 99) for r in plan.chunk_rows(t, 1) if r.source == position.source)
            row = next(upcoming)
            assert row.shard in {shard for shard, _, _ in part.windows(position.epoch, 1)[0][position.window]}
            if windows.setdefault(position.source, now) != now:
                assert row.shard in named[position.source]
                changes += 1
            windows[position.source], named[position.source] = now, position.following
    assert set(windows) == {0, 1, 2}
    assert changes > 30


@settings(max_examples=60, deadline=None)
@given(plans, st.data())
def test_replacements_are_the_rest_of_the_window_and_at_its_stream_s_ends_the_window_beside(
    plan: Plan, data: st.DataObject
) -> None:
    step, stream = data.draw(st.integers(0, 3 * plan.steps)), data.draw(st.integers(0, plan.streams - 1))
    epoch, within = divmod(step, plan.steps)
    pieces, starts = plan.windows(epoch, stream)
    inside = [{(s, i) for s, first, stop in window for i in range(first, stop)} for window in pieces]
    for j, row in enumerate(plan.chunk_rows(step, stream)):
        window = int(np.searchsorted(starts, within * plan.chunk + j, side="right")) - 1
        replacements = [row.replacement(k) for k in range(row.replacements)]
        own = inside[window] - {(row.shard, row.index)}
        assert set(replacements[: len(own)]) == own
        beside: set[tuple[int, int]] = set()
        if len(inside) > 1 and window == len(inside) - 1:
            beside = inside[-2]
        elif len(inside) > 1 and window == 0:
            beside = inside[1]
        assert set(replacements[len(own) :]) == beside
        assert len(replacements) == len(own) + len(beside) == len(set(replacements))


def test_rows_are_those_asked_for_one_by_one() -> None:
    """A chunk that crosses windows is the same rows as when they are asked for singly."""
    plan = Plan(np.array([3, 1, 4, 2, 9, 1]), global_batch=10, streams=2, window=1, seed=4)
    for epoch in range(4):
        together = plan.rows(epoch, 1, 0, 10)
        single = [plan.rows(epoch, 1, first, 1)[0] for first in range(10)]
        assert [(r.shard, r.index, r.draw, r.replacements) for r in together] == [
            (r.shard, r.index, r.draw, r.replacements) for r in single
        ]
        assert [r.draw for r in together] == [mix(4, epoch, 3, 1, position) for position in range(10)]
        assert len({(r.shard, r.index) for r in together}) == 10


@pytest.mark.parametrize(
    ("weights", "sizes", "reason"),
    [
        (
            [0.9999, 0.0001],
            [4000, 4000],
            r"data set 2 of 2 .* share of 0\.0001, .* one row in 1,000: .* 0\.001 or more",
        ),
        ([1, 499], [60, 40], r"data set 1 of 2 .* share of 0\.002, less than one row in an epoch.* 0\.01 or more"),
    ],
)
def test_a_weight_that_gives_no_rows_is_one_sentence(weights: list[float], sizes: list[int], reason: str) -> None:
    plans = [Plan(np.array([n]), global_batch=4, streams=4, window=2, seed=0) for n in sizes]
    with pytest.raises(BadInput, match=reason):
        MixturePlan(plans, weights, global_batch=20, seed=0)
    MixturePlan(plans, [0.9, 0.1], global_batch=20, seed=0)
