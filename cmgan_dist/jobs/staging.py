"""Files that are not whole yet have a name that says which process of which host is writing them.

So what a killed process left can be told from what a running one still needs. Small files are written by
`files.write_atomic`, which gives such names too."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Give a new folder in `output` for files that get their names by a rename; it is removed at the end.

    Its name, ``.HOST-PID-RANDOM.tmp``, is given once among all hosts. Raises OSError when it cannot be made."""
    with TemporaryDirectory(prefix=f".{socket.gethostname()}-{os.getpid()}-", suffix=".tmp", dir=output) as folder:
        yield Path(folder)


def remove_leftovers(output: Path) -> None:
    """Remove what killed processes of this host left unfinished in `output` and the folders below it.

    Those of running processes and of other hosts stay. Raises OSError when one cannot be removed."""
    pattern = re.compile(re.escape(f".{socket.gethostname()}-") + r"(\d+)-\w+\.tmp")
    for path in sorted(output.rglob(".*.tmp")):
        match = pattern.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            with suppress(FileNotFoundError):  # it lay in a folder that is removed already, by us or by another task
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_running(pid: int) -> bool:
    """Return whether a process of this host runs; one that ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
