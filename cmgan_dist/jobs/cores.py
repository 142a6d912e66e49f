"""How many cores and threads there are for this process: by its affinity, its cgroups' quotas and OMP_NUM_THREADS."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
MOST_THREADS = 4096
"""Of a process; `train.threads` has the same bound."""
_LAUNCHERS = re.compile(
    r"(\S*\.)?(torchrun|accelerate|accelerate-launch|torch\.distributed\.(run|launch)|accelerate\.commands\.\w+"
    r"|cmgan_dist\.distributed\.launch)(\.py)?"
)
"""A word of a command line, with dots for slashes, that names a launcher; the text that a shell runs has spaces."""


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


def _unusable_openmp() -> str:
    """Return in words that OMP_NUM_THREADS says what is no number of threads; "" where it does not."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text or openmp_threads() is not None or not _stood_before_launchers():
        return ""
    return f"; OMP_NUM_THREADS is '{text[:20]}', not a number from 1 to {MOST_THREADS}, and not used"


def openmp_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the threads that the user asks for by OMP_NUM_THREADS, None where nobody does.

    torchrun and accelerate set it themselves where it is not set: what only a launcher says is not asked for."""
    text = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not re.fullmatch("[0-9]+", text) or not 0 < int(text) <= MOST_THREADS or not _stood_before_launchers():
        return None
    return int(text)


def _stood_before_launchers() -> bool:
    """Return whether OMP_NUM_THREADS was set when the outermost launcher above this process was started, or is what its
    command line says (accelerate's)."""
    try:
        lines = [(one, one.cmdline()) for one in psutil.Process().parents()]
        launchers = [(one, words) for one, words in lines if any(map(_names_launcher, words[:4]))]
        if not launchers:
            return True
        outermost, words = launchers[-1]
        asked = any(word.replace("-", "_").startswith("__num_cpu_threads_per_process") for word in words)
        return asked or "OMP_NUM_THREADS" in outermost.environ()
    except psutil.Error:
        return True


def _names_launcher(word: str) -> bool:
    return _LAUNCHERS.fullmatch(word.replace("/", ".")) is not None


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
    usable = f"{cores} usable core{'s' * (cores > 1)}{limit}"
    here = f"{processes} process{'es' * (processes > 1)} here"
    return max(1, cores // processes), f"{usable}, {here}{_unusable_openmp()}"


def take_threads(processes: int, asked: int = 0, *, say: bool = True) -> None:
    """Set how many threads torch computes with in this one of `processes` on this machine, as `threads_for` says; with
    `say` the log tells how many, and why."""
    import torch

    threads, why = threads_for(processes, asked)
    torch.set_num_threads(threads)
    if say:
        log.info("%d thread%s a process (%s)", threads, "s" * (threads > 1), why)
