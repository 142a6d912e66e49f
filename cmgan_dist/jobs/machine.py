"""What of a machine a job of several processes takes: a device, processes, threads of each."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.cores import usable_cores


@dataclass(frozen=True)
class Share:
    """What one task takes of its machine."""

    device: str
    """"cpu", or "cuda:N" of the task's own GPU."""
    processes: int
    """Processes that work at a time."""
    threads: int
    """Threads of each of them that decode."""


def share_of_machine(device: str, processes: int | None) -> Share:
    """Return the share of this process: torchrun's processes on a machine divide its GPUs and its cores.

    `device`: auto, cpu or cuda. `processes`: None is one on a GPU, else one a core. Raises BadInput naming the flag."""
    import torch

    if processes is not None and processes < 1:
        raise BadInput(f"--processes is {processes}: it must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device is cuda but there is no GPU: pass --device cpu")
    local, place = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), "cpu"
    if device != "cpu" and torch.cuda.is_available():
        place = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    cores = max(1, usable_cores() // local)
    processes = processes or (1 if place != "cpu" else cores)
    return Share(place, processes, max(1, cores // processes))
