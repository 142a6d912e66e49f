"""One function over many shards in the processes of one machine, with a progress bar, or a line every minute."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process, util
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmgan_dist.errors import EXIT_LOST, BadInput
from cmgan_dist.jobs.cores import usable_cores
from cmgan_dist.jobs.repeat import every

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Says how many more units are done."""
LINE_EVERY_S = 60.0
LOOK_S = 1.0
"""Seconds between two looks at what workers have done of tasks that are not ended."""
ENDING_S = 3.0
"""Seconds that a worker has to close what it has open."""


@contextlib.contextmanager
def _for_parents(number: signal.Signals) -> Iterator[None]:
    """Keep a signal from the processes that are started within, from their first moment on; ours comes at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever. Ctrl-C is left to the parent, whose
    SIGTERM lets it close what it has open."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


class _Counter:
    """What `multiprocessing.Value` is, for one process."""

    value = 0

    def get_lock(self) -> contextlib.AbstractContextManager[None]:
        """Return what need not be waited for."""
        return contextlib.nullcontext()


class _Units:
    """How many units of tasks that are not ended are done, of all workers; and how many this process did of its own."""

    def __init__(self, shared: Any = None) -> None:
        """`shared`: what all workers count in, a number of `multiprocessing`; None: units are not counted."""
        self.shared, self.own = shared, 0

    def add(self, count: int) -> None:
        """Count units of the task at hand."""
        if self.shared is not None:
            with self.shared.get_lock():
                self.shared.value += count
            self.own += count

    def end(self) -> None:
        """Forget the units of the task at hand, which is ended: who gave it out counts them all."""
        self.add(-self.own)


_units = _Units()


def units_done(count: int) -> None:
    """Say, in a task of `parallel_map`, that `count` more of its units are done; elsewhere this does nothing."""
    _units.add(count)


def _begin_worker(shared: Any) -> None:
    """Prepare a worker, whose units are counted in `shared`."""
    _end_with_parent()
    atexit.register(gc.freeze)  # as `run_main` does at the end of a program
    _units.shared = shared


@contextlib.contextmanager
def _following(advance: Advance, shared: Any) -> Iterator[Advance]:
    """Give what counts the units of tasks that are ended; beside them the bar moves by what is done of others."""
    lock, told, done = threading.Lock(), 0, 0

    def look(count: int) -> None:
        nonlocal told, done
        with lock:
            done += count
            more = max(done + shared.value - told, 0)
            told += more
            advance(more)

    with every(LOOK_S, lambda: look(0)):
        yield look


def _in_worker(function: Callable[..., Result], task: tuple[Any, ...]) -> Result:
    """Return ``function(*task)``. Where SIGTERM ends it, the worker ends too: its pool would take SystemExit for the
    task's result, and give it the next task."""
    try:
        return function(*task)
    except SystemExit:
        util._exit_function()  # type: ignore[attr-defined]  # what libraries left to it, such as semaphores
        os._exit(EXIT_LOST)
    finally:
        _units.end()


def _end_workers() -> None:
    """End the workers of this process: by SIGTERM, and who does not heed it within ENDING_S by SIGKILL."""
    workers, deadline = active_children(), time.monotonic() + ENDING_S
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()


class _Turns:
    """The tasks of a `parallel_map`: whoever is free takes the next, and nobody takes one after a failure."""

    def __init__(
        self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], counts: Sequence[int], advance: Advance
    ) -> None:
        """`counts` [tasks]: how far each moves the bar."""
        self.function, self.tasks, self.counts, self.advance = function, tasks, counts, advance
        self.next, self.lock = iter(range(len(tasks))), threading.Lock()
        self.results: dict[int, Any] = {}
        self.failed: dict[int, Exception] = {}

    def take(self, do: Callable[..., Any]) -> None:
        """Do task after task by ``do(function, task)`` until none is left or one has failed, here or elsewhere."""
        while True:
            with self.lock:
                number = None if self.failed else next(self.next, None)
            if number is None:
                return
            try:
                self.results[number] = do(self.function, self.tasks[number])
            except Exception as error:  # noqa: BLE001  # all_results raises it
                self.failed[number] = error
                return
            self.advance(self.counts[number])

    @property
    def has_lost_a_worker(self) -> bool:
        """Whether a task failed because a worker ended."""
        return any(isinstance(error, BrokenProcessPool) for error in self.failed.values())

    def all_results(self) -> list[Any]:
        """Return the results in the order of the tasks. Raises what the first failing task raised."""
        if self.failed:
            raise self.failed[min(self.failed)]
        return [self.results[number] for number in range(len(self.tasks))]


def _here(function: Callable[..., Result], task: tuple[Any, ...]) -> Result:
    """Return ``function(*task)``, made by the process that gives out the tasks."""
    try:
        return function(*task)
    finally:
        _units.end()


@contextlib.contextmanager
def _counting_in(shared: Any) -> Iterator[None]:
    """Count in `shared` the units of what this process does of its own tasks."""
    global _units
    before, _units = _units, _Units(shared)
    try:
        yield
    finally:
        _units = before


def parallel_map(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    *,
    title: str,
    unit_counts: Sequence[int] | None = None,
    processes: int | None = None,
) -> list[Result]:
    """Return ``[function(*task) for task in tasks]``, made in `processes` (None: one a core), which change no result.

    `unit_counts` [tasks] is how far each task moves the bar (None: by 1), on the way too where it says `units_done`. A
    bar is drawn on a terminal; elsewhere a line a minute tells how far the work is. This process is one of them, which
    has loaded already what others load for seconds; the others are spawned, so `function` and the tasks must pickle.
    Raises what the first failing task raised, in the order of the tasks, after the tasks that had begun; BadInput when
    a worker was killed."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes is {processes}: it must be at least 1")
    processes = min(processes or usable_cores(), max(len(tasks), 1))
    counts = unit_counts if unit_counts is not None else [1] * len(tasks)
    context = get_context("spawn")
    shared: Any = _Counter() if processes == 1 else context.Value("q", 0)
    with progress_of(title, sum(counts)) as bar, _following(bar, shared) as advance, _counting_in(shared):
        turns = _Turns(function, tasks, counts, advance)
        if processes == 1:
            turns.take(_here)
        else:
            with ProcessPoolExecutor(processes - 1, context, initializer=_begin_worker, initargs=(shared,)) as pool:
                _share_out(turns, pool, processes - 1)
    try:
        return turns.all_results()
    except BrokenProcessPool:
        raise BadInput(f"{title}: a worker process was killed (out of memory?); try fewer --processes") from None


def _share_out(turns: _Turns, pool: ProcessPoolExecutor, workers: int) -> None:
    """Have the workers of `pool` and this process take the tasks until all are done."""

    def in_worker(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
        return pool.submit(_in_worker, function, task).result()

    try:
        with ThreadPoolExecutor(workers) as threads:
            with _for_parents(signal.SIGINT):  # the threads start the workers
                given = [threads.submit(turns.take, in_worker) for _ in range(workers)]
            try:
                turns.take(_here)
                for each in given:
                    each.result()
            except KeyboardInterrupt:
                _end_workers()  # their threads would wait for what has begun
                raise
    finally:
        if turns.has_lost_a_worker:
            _end_workers()  # the pool would wait for ever for one that was being started when another ended


def threaded_map(function: Callable[[Task], Result], tasks: Sequence[Task], *, title: str) -> list[Result]:
    """Return ``[function(task) for task in tasks]``, made in a thread for each core, with the same progress.

    Raises what the first failing task raised, in the order of the tasks."""
    found = []
    with ThreadPoolExecutor(usable_cores()) as pool, progress_of(title, len(tasks)) as advance:
        for result in pool.map(function, tasks):
            found.append(result)
            advance(1)
    return found


@contextlib.contextmanager
def progress_of(title: str, total: int | None) -> Iterator[Advance]:
    """Give a function that is told how many more of `total` units (None: nobody knows) are done; any thread may call
    it.

    On a terminal it moves a bar. Elsewhere stderr gets a line every minute, with the rate and the time left."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(title, total=total)
            yield lambda count: progress.advance(bar, count)
        return
    lock, begun, done = threading.Lock(), time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count

    def report() -> None:
        print(progress_line(title, done, total, time.monotonic() - begun), file=sys.stderr, flush=True)

    with every(LINE_EVERY_S, report):
        yield advance


def progress_line(title: str, done: int, total: int | None, seconds: float) -> str:
    """Return what is told of work of which `done` of `total` units took `seconds`."""
    if not done:
        return f"{title}: 0" + (f" of {total}" if total is not None else "") + f" after {seconds / 60:.0f} min"
    rate = done / seconds
    if total is None:
        return f"{title}: {done}, {rate:.1f} a second"
    minutes = (total - done) / rate / 60
    left = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.0f} min"
    return f"{title}: {done} of {total}, {rate:.1f} a second, {left} left"
