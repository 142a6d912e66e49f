"""Which task a process is, by its flag, a SLURM array and torchrun; shares that cover every shard once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.ranks import Task, find_task

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        ("", {}, Task(0, 1)),
        ("2/3", {}, Task(2, 3)),
        ("", {"RANK": "1", "WORLD_SIZE": "2"}, Task(1, 2)),
        ("", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Task(3, 4)),
        ("", {**ARRAY, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, Task(3, 4)),
        ("1/2", {**ARRAY, "RANK": "2", "WORLD_SIZE": "3"}, Task(5, 6)),
    ],
)
def test_a_task_is_found(asked: str, environment: dict[str, str], expected: Task) -> None:
    assert find_task(asked, environment) == expected


@pytest.mark.parametrize("asked", ["2/2", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_flag_that_makes_no_sense_is_refused(asked: str) -> None:
    with pytest.raises(BadInput, match=r"--task is .*: write I/N"):
        find_task(asked, {})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (ARRAY, "SLURM_ARRAY_TASK_ID makes this task 7 of 4"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, "SLURM_ARRAY_TASK_COUNT='', which is no number"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        find_task("", environment)


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 5))
def test_every_shard_is_in_one_share(shards: int, outer: int, inner: int) -> None:
    tasks = [Task(j, inner).within(Task(i, outer)) for i in range(outer) for j in range(inner)]
    shares = [list(task.share(shards)) for task in tasks]
    assert sorted(n for share in shares for n in share) == list(range(shards))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
