"""A Ray cluster, started on this machine or joined, and one function over many shards in workers of all its nodes."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cmgan_dist.errors import BadInput, shown
from cmgan_dist.jobs.local import Advance, progress_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")
OBJECT_STORE = 100 * 2**20
"""Bytes; nothing is kept there."""
CONNECT_WITHIN_S = 10.0
NODES_WITHIN_S = 180.0
WORKERS_WITHIN_S = 600.0
"""How long a cluster may have no worker for us: nodes may have to be started first, or others' work has to end."""
LOOK_S = 5.0
"""Seconds between two looks at what the cluster has."""
MOST_LOST = 3
"""Workers that one task may lose, and workers that may fail to start one after the other."""
ROOT = Path(__file__).resolve().parents[2]
"""Where the project's packages lie: workers import them from there, installed or not."""


def start_ray(address: str, least: int, flag: str = "--address") -> None:
    """Start Ray on this machine ("") or join the cluster at `address`, and wait until it has `least` nodes.

    `flag`: the one that named the address. Raises BadInput when there is no such cluster, or fewer nodes have joined
    within three minutes."""
    import ray

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    settings["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if address:
        try:
            _reach(address)
            ray.init(address=address, **settings)
        except (OSError, RuntimeError, ValueError) as error:
            reason = shown(str(error).strip().splitlines()[0])
            raise BadInput(f"{flag} {address} is no running Ray cluster ({reason}): start it by 'ray start'") from None
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **settings)
    deadline = time.monotonic() + NODES_WITHIN_S
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < least:
        if time.monotonic() > deadline:
            raise BadInput(
                f"--nodes is {least}, but {nodes} joined within {NODES_WITHIN_S:.0f} s: see the others' logs"
            )
        time.sleep(0.5)
    log.info("Ray: %d node%s, %g CPUs, %g GPUs", nodes, "s" * (nodes > 1), *resources())


def _reach(address: str) -> None:
    """Raises OSError or ValueError when nobody answers at HOST:PORT; Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_WITHIN_S).close()


def resources() -> tuple[float, float]:
    """Return the numbers of CPUs and GPUs of the cluster."""
    import ray

    found = ray.cluster_resources()
    return found.get("CPU", 0.0), found.get("GPU", 0.0)


@contextlib.contextmanager
def joined(address: str, flag: str = "--ray") -> Iterator[None]:
    """Be in the cluster at `address` until the end; a process that is in one already stays in that.

    Raises BadInput, naming `flag`, when there is no such cluster."""
    import ray

    if ray.is_initialized():
        yield
        return
    start_ray(address, 1, flag)
    try:
        yield
    finally:
        ray.shutdown()


def ray_map(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    *,
    title: str,
    unit_counts: Sequence[int] | None = None,
    address: str,
    processes: int | None = None,
    gpus: bool = False,
) -> list[Result]:
    """Return ``[function(*task) for task in tasks]`` as `local.parallel_map` does, made by the cluster at `address`.

    `processes`: workers at most (None: one for each CPU of the cluster, or with `gpus` for each GPU, which it has for
    itself). A worker is one process from its first task to its last, so that what `function` caches stays. The task of
    a worker that is lost, with its node or alone, is given to another; nodes that join later get workers too.

    `function` must be importable on every node, and what the tasks name must be the same there. Raises what the first
    failing task raised, in the order of the tasks, after the tasks that had begun; BadInput when there is no such
    cluster, it gives no worker within ten minutes, or one task loses three."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes is {processes}: it must be at least 1")
    counts = unit_counts if unit_counts is not None else [1] * len(tasks)
    with joined(address), progress_of(title, sum(counts)) as advance:
        crew = _Crew(title, function, tasks, processes, gpus)
        try:
            return crew.run(advance, counts)
        finally:
            crew.dismiss()


class _Worker:
    """What runs on a node."""

    def ready(self) -> None:
        """Return when the process is there."""

    def call(self, function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
        return function(*task)


class _Crew:
    """The workers of a cluster, and who does which task."""

    def __init__(
        self,
        title: str,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        processes: int | None,
        gpus: bool,
    ) -> None:
        import ray

        self.title, self.function, self.tasks, self.processes, self.gpus = title, function, tasks, processes, gpus
        self.worker = ray.remote(num_cpus=1, num_gpus=int(gpus))(_Worker)
        self.todo = deque(range(len(tasks)))
        self.starting: dict[Any, Any] = {}
        """What a worker that starts will answer -> the worker."""
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, int]] = {}
        """What a worker will answer -> the worker, and the number of its task."""
        self.results: dict[int, Any] = {}
        self.failures: dict[int, BaseException] = {}
        self.lost: Counter[int] = Counter()
        """Workers that each task has lost."""
        self.start_failures = 0
        self.had_worker = time.monotonic()
        self._wanted, self._looked = 0, float("-inf")

    def run(self, advance: Advance, counts: Sequence[int]) -> list[Any]:
        """Return the results in the order of the tasks. Raises as `ray_map` does."""
        import ray

        while self.todo or self.running:
            self._hire()
            self._give_out()
            answered, _ = ray.wait([*self.starting, *self.running], timeout=LOOK_S)
            for answer in answered:
                if answer in self.starting:
                    self._welcome(answer)
                else:
                    self._take(answer, advance, counts)
            self._check_alive()
        if self.failures:
            raise self.failures[min(self.failures)]
        return [self.results[number] for number in range(len(self.tasks))]

    def dismiss(self) -> None:
        """End all workers."""
        for worker in [*self.starting.values(), *self.idle, *(worker for worker, _ in self.running.values())]:
            self._end(worker)

    def _hire(self) -> None:
        """Start as many workers as the cluster has room for and there is work for."""
        if time.monotonic() > self._looked + LOOK_S:
            self._looked, (cpus, gpus) = time.monotonic(), resources()
            self._wanted = max(1, self.processes or int(gpus if self.gpus else cpus))
        wanted = min(self._wanted, len(self.todo) + len(self.running))
        for _ in range(wanted - len(self.starting) - len(self.idle) - len(self.running)):
            worker = self.worker.remote()
            self.starting[worker.ready.remote()] = worker

    def _give_out(self) -> None:
        while self.idle and self.todo:
            worker, number = self.idle.pop(), self.todo.popleft()
            self.running[worker.call.remote(self.function, self.tasks[number])] = worker, number

    def _welcome(self, answer: Any) -> None:
        """Have a worker that has started. Raises BadInput when none after the other can start."""
        import ray
        from ray.exceptions import RayError

        worker = self.starting.pop(answer)
        try:
            ray.get(answer)
        except RayError as error:
            self._end(worker)
            self.start_failures += 1
            if self.start_failures >= MOST_LOST:
                raise BadInput(
                    f"{self.title}: no worker of the Ray cluster starts ({_last_line(error)}): every node needs this "
                    f"project, at {ROOT} or installed"
                ) from None
            return
        self.start_failures = 0
        self.idle.append(worker)

    def _take(self, answer: Any, advance: Advance, counts: Sequence[int]) -> None:
        """Keep what a task has given, or what it has raised; the task of a lost worker is to be done again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        worker, number = self.running.pop(answer)
        try:
            self.results[number] = ray.get(answer)
        except RayTaskError as error:
            self.failures[number] = error.cause
            self.todo = deque(n for n in self.todo if n < number)  # the first failing task is to be told
        except RayError as error:
            self._end(worker)
            self._redo(number, error)
            return
        else:
            advance(counts[number])
        self.idle.append(worker)

    def _redo(self, number: int, error: Exception) -> None:
        """Have a task done again whose worker was lost. Raises BadInput when it has lost too many."""
        self.lost[number] += 1
        if self.lost[number] >= MOST_LOST:
            raise BadInput(
                f"{self.title}: {MOST_LOST} workers in turn were lost with one task (out of memory?): see Ray's logs, "
                "and start again, which goes on where this ended"
            )
        log.warning("%s: a worker was lost (%s): its task goes to another", self.title, _last_line(error))
        if number < min(self.failures, default=len(self.tasks)):
            self.todo.appendleft(number)

    def _check_alive(self) -> None:
        """Raises BadInput when there has been no worker for too long."""
        now = time.monotonic()
        if self.idle or self.running:
            self.had_worker = now
        elif now - self.had_worker > WORKERS_WITHIN_S:
            cpus, gpus = resources()
            raise BadInput(
                f"{self.title}: the Ray cluster, of {cpus:g} CPUs and {gpus:g} GPUs, has given no worker for "
                f"{WORKERS_WITHIN_S:.0f} s: end what uses them, or add nodes, and start again"
            )

    def _end(self, worker: Any) -> None:
        import ray

        ray.kill(worker)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[-1] if lines else type(error).__name__)
