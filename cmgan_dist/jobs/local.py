"""One function over many shards in the processes of one machine, with a progress bar."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmgan_dist.errors import BadInput

Result = TypeVar("Result")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def parallel_map(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    *,
    title: str,
    unit_counts: Sequence[int] | None = None,
    processes: int | None = None,
) -> list[Result]:
    """Return ``[function(*task) for task in tasks]``, made in `processes` (None: one a core), which change no result.

    `unit_counts` [tasks] is how far each task moves the bar (None: by 1). The bar is drawn on a terminal only.
    `function` and the tasks must pickle: workers are spawned. Raises what the first failing task raised, in the order
    of the tasks, after the tasks that had begun; BadInput when a worker was killed."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes is {processes}: it must be at least 1")
    processes = min(processes or usable_cores(), max(len(tasks), 1))
    counts = unit_counts if unit_counts is not None else [1] * len(tasks)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(title, total=sum(counts))
        if processes == 1:
            results = []
            for task, count in zip(tasks, counts, strict=True):
                results.append(function(*task))
                progress.advance(bar, count)
            return results
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_end_with_parent) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            for future, count in zip(futures, counts, strict=True):
                future.add_done_callback(_advance(progress, bar, count))
            try:
                return [future.result() for future in futures]
            except BrokenProcessPool:
                raise BadInput(
                    f"{title}: a worker process was killed (out of memory?); try fewer --processes"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _advance(progress: Progress, bar: Any, count: int) -> Callable[[Future[Any]], None]:
    return lambda future: progress.advance(bar, 0 if future.cancelled() else count)
