"""How processes wait for the first one while it works alone, however long that takes: it says again and again that it
is at work, and only when it says nothing for the time-out of a collective is it given up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cmgan_dist.jobs.repeat import every


def _tell(done: bool, group: dist.ProcessGroup) -> bool:
    """Return whether the first process says that it is done; every process calls it, the others with False."""
    state = torch.tensor([int(done)])
    dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)
    return bool(state.item())


@contextlib.contextmanager
def working(group: dist.ProcessGroup, every_s: float) -> Iterator[None]:
    """Tell the processes in `await_work` every so many seconds that this one is at work, until the block ends.

    `group`: one for CPU tensors that nothing else uses. Raises at the end what `_tell` raised where another process was
    lost meanwhile."""
    lost: list[RuntimeError] = []

    def tell(done: bool = False) -> None:
        if not lost:
            try:
                _tell(done, group)
            except RuntimeError as error:
                lost.append(error)

    try:
        with every(every_s, tell):
            yield
    finally:
        tell(done=True)
    if lost:
        raise lost[0]


def await_work(group: dist.ProcessGroup) -> None:
    """Wait until the work of the first process is done. Raises the collective's error when it is silent or gone."""
    while not _tell(False, group):
        pass
