"""How many cores and threads there are for this process: by its affinity, its cgroups' quotas and OMP_NUM_THREADS."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
_LAUNCHERS = ("torch.distributed.run", "torchrun", "accelerate")


def usable_cores() -> int:
    """Return the number of cores that this process may use: those of its affinity, or less by a quota of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many cores' time the cgroups of this process grant it (`docker --cpus`, Kubernetes), None for all.

    The least of its own group and those above it, of cgroup v2 (cpu.max) and v1 (cpu.cfs_quota_us)."""
    found = [quota for folder in _groups(cgroups, own) if (quota := _quota_in(folder)) is not None]
    return min(found, default=None)


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """Give the folders of this process's groups that may limit its time, and those above them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            for top in {cgroups, cgroups / controllers, cgroups / "cpu"}:
                below = Path(path.lstrip("/"))
                yield from (top / part for part in (below, *below.parents))


def _quota_in(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if quota.strip() not in ("max", "-1") else None
    except (OSError, ValueError):  # no such group here, as where a container sees its own only
        return None


def openmp_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the threads that the user asks for by OMP_NUM_THREADS, None where nobody does.

    torchrun and accelerate set it themselves where it is not set: what only a launcher says is not asked for."""
    text = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not text.isdigit() or not int(text) or not _stood_before_launchers():
        return None
    return int(text)


def _stood_before_launchers() -> bool:
    """Return whether OMP_NUM_THREADS was set when the outermost launcher above this process was started."""
    try:
        launchers = [one for one in psutil.Process().parents() if _is_launcher(one)]
        return not launchers or "OMP_NUM_THREADS" in launchers[-1].environ()
    except psutil.Error:
        return True


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return False
    return any(name in word.replace("/", ".") for word in words[:3] for name in _LAUNCHERS)


def threads_for(processes: int, asked: int = 0) -> tuple[int, str]:
    """Return the threads of each of `processes` on this machine, and in words why.

    `asked`: as many, where it is above 0; else what OMP_NUM_THREADS says; else an even share of the usable cores."""
    if asked:
        return asked, "as asked for"
    by_environment = openmp_threads()
    if by_environment is not None:
        return by_environment, f"OMP_NUM_THREADS is {by_environment}"
    quota, cores = cpu_quota(), usable_cores()
    limit = f", by a quota of {quota:g}" if quota is not None and math.ceil(quota) <= cores else ""
    return max(1, cores // processes), f"{cores} usable cores{limit}, {processes} process{'es' * (processes > 1)} here"
