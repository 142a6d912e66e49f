"""Files that are not whole yet lie in a folder whose name says which process of which host is writing them.

So what a killed process left can be told from what a running one still needs."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from cmgan_dist.files import write_atomic


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Give a new folder in `output` for files that get their names by a rename; it is removed at the end.

    Its name, ``.HOST-PID-RANDOM.tmp``, is given once among all hosts. Raises OSError when it cannot be made."""
    with TemporaryDirectory(prefix=f".{socket.gethostname()}-{os.getpid()}-", suffix=".tmp", dir=output) as folder:
        yield Path(folder)


def write_staged(path: Path, data: bytes | str) -> None:
    """Write a small file by way of `staging`: it is whole under its name or not there at all.

    Missing folders are made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging(path.parent) as folder:
        write_atomic(folder / path.name, data)
        os.replace(folder / path.name, path)


def remove_leftovers(output: Path) -> None:
    """Remove the staging folders that killed processes of this host left in `output` and the folders below it.

    Those of running processes and of other hosts stay. Raises OSError when one cannot be removed."""
    pattern = re.compile(re.escape(f".{socket.gethostname()}-") + r"(\d+)-\w+\.tmp")
    for path in sorted(output.rglob(".*.tmp")):
        match = pattern.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(path)


def is_running(pid: int) -> bool:
    """Return whether a process of this host runs; one that ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
