"""Files that are not whole yet have a name that says which process of which host is writing them.

So what a killed process left can be told from what a running one still needs. Small files are written by
`files.write_atomic`, which gives such names too."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

LEFT_AFTER_S = 24 * 3600.0
"""Seconds without a write after which what another host was writing counts as left."""
CLOCKS_S = 60.0
"""Seconds that the clock of a file system may be behind that of the host."""


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Give a new folder in `output` for files that get their names by a rename; it is removed at the end.

    Its name, ``.HOST-PID-RANDOM.tmp``, is given once among all hosts. Raises OSError when it cannot be made."""
    with TemporaryDirectory(prefix=f".{socket.gethostname()}-{os.getpid()}-", suffix=".tmp", dir=output) as folder:
        yield Path(folder)


def remove_leftovers(output: Path) -> None:
    """Remove what killed processes left unfinished in `output` and the folders below it.

    Those of running processes stay, and those of other hosts for a day. Raises OSError when one cannot be removed."""
    for path in sorted(output.rglob(".*.tmp")):
        match = re.fullmatch(r"\.(.+)-(\d+)-\w+\.tmp", path.name)
        if match and _is_left(path, match[1], int(match[2])):
            shutil.rmtree(path, onerror=_unless_gone) if path.is_dir() else path.unlink(missing_ok=True)


def _is_left(path: Path, host: str, pid: int) -> bool:
    """Return whether nobody writes to a file or folder any more: its process has ended, or that of another host, of
    which nothing is known, has written nothing for a day."""
    try:
        newest = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
    except FileNotFoundError:  # it goes just now
        return False
    return not is_running(pid, newest) if host == socket.gethostname() else time.time() - newest > LEFT_AFTER_S


def _unless_gone(_: object, __: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    """Pass over what somebody else has removed meanwhile, as the last processes of a killed run do; raise the rest."""
    if not issubclass(error[0], FileNotFoundError):
        raise error[1]


def is_running(pid: int, wrote: float) -> bool:
    """Return whether the process of this host that wrote something at the time `wrote`, in seconds, runs still.

    One that ended and was not waited for does not, nor does one that has its number since: in a container that is
    started again the numbers are those of last time."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= wrote + CLOCKS_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
