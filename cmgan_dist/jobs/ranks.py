"""Which of several processes this one is, and which of the shards are its: arithmetic on what a launcher has set.

`--task I/N` or a SLURM array divide the work among machines or jobs; torchrun (and `accelerate launch`) divides a task
among its processes. Nothing is sent between them: what is done is told by records (`ledger`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cmgan_dist.errors import BadInput


@dataclass(frozen=True)
class Task:
    """One of several processes that divide the shards among them."""

    number: int = 0
    """From 0 to `count` - 1."""
    count: int = 1

    def share(self, shards: int) -> range:
        """Return which of `shards` shards this task takes: every `count`-th, so that no task has two more than
        another."""
        return range(self.number, shards, self.count)

    def within(self, outer: Task) -> Task:
        """Return this task, which divides the work of `outer`, among all tasks."""
        return Task(outer.number * self.count + self.number, outer.count * self.count)

    def lock(self, work: str) -> str:
        """Return the name of this task's lock on the output of `work`: other tasks have other ones."""
        return work if self.count == 1 else f"{work}-{self.number}-of-{self.count}"

    def __str__(self) -> str:
        """Return I/N."""
        return f"{self.number}/{self.count}"


def parse_task(text: str) -> Task:
    """Return the task I/N. Raises BadInput unless 0 <= I < N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise BadInput(f"--task is '{text}': write I/N with I from 0 to N - 1, such as 0/4")
    return Task(int(found[1]), int(found[2]))


def find_task(asked: str = "", environment: Mapping[str, str] = os.environ) -> Task:
    """Return which task this process is: by `asked` (I/N) or else its place in a SLURM array, and in that its rank
    under torchrun.

    Raises BadInput when `asked` or a variable of the environment makes no sense."""
    if asked:
        outer = parse_task(asked)
    elif "SLURM_ARRAY_TASK_ID" in environment:
        first, step = (_integer(environment, f"SLURM_ARRAY_TASK_{name}", d) for name, d in (("MIN", 0), ("STEP", 1)))
        number = _integer(environment, "SLURM_ARRAY_TASK_ID") - first
        outer = _checked(number // max(step, 1), _integer(environment, "SLURM_ARRAY_TASK_COUNT"), "SLURM_ARRAY_TASK_ID")
    else:
        outer = Task()
    if "RANK" not in environment:
        return outer
    return _checked(_integer(environment, "RANK"), _integer(environment, "WORLD_SIZE"), "RANK").within(outer)


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"-?\d+", text):
        raise BadInput(f"the environment has {name}='{text}', which is no number: name the task by --task I/N")
    return int(text)


def _checked(number: int, count: int, name: str) -> Task:
    if not 0 <= number < count:
        raise BadInput(f"the environment's {name} makes this task {number} of {count}: name the task by --task I/N")
    return Task(number, count)
