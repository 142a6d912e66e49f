"""What of a machine, or of a cluster, a job of several processes takes: a device, processes, threads of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.cores import usable_cores
from cmgan_dist.jobs.local import parallel_map
from cmgan_dist.jobs.ray import joined, ray_map, resources

Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """What one task takes of its machine, or of a Ray cluster."""

    device: str
    """"cpu", or "cuda:N" of the task's own GPU; on a cluster every process has a GPU for itself, as "cuda:0"."""
    processes: int | None
    """Processes that work at a time; None: as many as the cluster has room for."""
    threads: int
    """Threads of each of them that decode."""
    cluster: str = ""
    """Address of the Ray cluster whose machines do the work; "" for this machine."""

    def map(
        self,
        function: Callable[..., Result],
        tasks: Sequence[tuple[Any, ...]],
        *,
        title: str,
        unit_counts: Sequence[int] | None = None,
    ) -> list[Result]:
        """Return ``[function(*task) for task in tasks]``, made here or by the cluster; see `parallel_map`, `ray_map`.

        On a cluster, which is not joined for nothing, paths in the tasks must be absolute. Raises as these do."""
        if not self.cluster or not tasks:
            return parallel_map(function, tasks, title=title, unit_counts=unit_counts, processes=self.processes)
        return ray_map(
            function,
            tasks,
            title=title,
            unit_counts=unit_counts,
            address=self.cluster,
            processes=self.processes,
            gpus=self.device != "cpu",
        )


def find_share(device: str, processes: int | None, cluster: str = "") -> Share:
    """Return the share of this process, of its machine or of the Ray cluster at the address `cluster`.

    `device`: auto, cpu or cuda. `processes`: None is one on a GPU, else one a core; of a cluster one for each GPU, else
    for each CPU. Raises BadInput naming the flag."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes is {processes}: it must be at least 1")
    return _share_of_cluster(device, processes, cluster) if cluster else _share_of_machine(device, processes)


def _share_of_machine(device: str, processes: int | None) -> Share:
    """Return the share of this process: torchrun's processes on a machine divide its GPUs and its cores."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device is cuda but there is no GPU: pass --device cpu")
    local, place = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), "cpu"
    if device != "cpu" and torch.cuda.is_available():
        place = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    cores = max(1, usable_cores() // local)
    processes = processes or (1 if place != "cpu" else cores)
    return Share(place, processes, max(1, cores // processes))


def _share_of_cluster(device: str, processes: int | None, cluster: str) -> Share:
    with joined(cluster):
        cpus, gpus = resources()
    if device == "cuda" and not gpus:
        raise BadInput("--device is cuda but the Ray cluster has no GPU: pass --device cpu")
    place = "cuda:0" if gpus and device != "cpu" else "cpu"
    count = processes or max(1, int(cpus if place == "cpu" else gpus))
    return Share(place, processes, max(1, int(cpus) // count), cluster)


def absolute(place: str) -> str:
    """Return a path as it is called from any folder; a URL, and "" for none, stay as they are."""
    return place if not place or "://" in place else os.path.abspath(place)
