"""Files that the processes of one node share: each has one writer at a time, and what one has fetched the others find.

A lock is flock on the file itself; the kernel drops those of a killed process. One that is stopped, or hangs, keeps
its own: it is waited for while its work goes on, and no longer (`Patience`)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from cmgan_dist.errors import BadInput

log = logging.getLogger(__name__)

COPY_FRESH_S = 60.0
"""Seconds for which the copy of a manifest is good, since a data set can be written anew under its URL."""
FAILED = b"\0failed: "
"""Starts the note that a failed download leaves to those who wait: no tar begins with a zero byte."""

TOLD_AFTER_S = 5.0
"""Seconds without a sign of another's work after which the log says for whom this waits."""
POLL_S = 0.02
"""Seconds between two looks whether another is done."""

held_locks: set[int] = set()
"""Descriptors of this process that have a lock."""


def _drop_locks() -> None:
    """Close a parent's locks in its child. A lock belongs to the open file, which a fork shares: the child would keep
    it past the death of its parent."""
    while held_locks:
        os.close(held_locks.pop())


os.register_at_fork(after_in_child=_drop_locks)


class Held(BadInput):
    """Another process keeps a file, and nothing comes of its work."""


def holder_of(path: Path) -> str:
    """Return in words which process has the lock on a file."""
    try:
        stat, locks = path.stat(), Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process"
    place = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    pids = [fields[4] for fields in map(str.split, locks) if fields[1] == "FLOCK" and fields[5] == place]
    return f"process {pids[0]}" if pids else "another process"


class Patience:
    """How long other processes are waited for: while there are signs of their work, and some seconds longer."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long there may be no sign."""
        self.seconds, self._sign, self._since, self._told = seconds, object(), time.monotonic(), False

    def wait(self, path: Path, sign: object) -> None:
        """Sleep a moment for whoever has the lock on `path`. `sign`: another one than before where work goes on.

        Raises Held, naming the process, when it was the same for too long."""
        now = time.monotonic()
        if sign != self._sign:
            self._sign, self._since = sign, now
        if now - self._since > self.seconds:
            raise Held(
                f"{path} is kept by {holder_of(path)}, of whose work nothing was seen for {self.seconds:.0f} s: end "
                "that process"
            )
        if not self._told and now - self._since > TOLD_AFTER_S:
            log.warning("waiting for %s, which keeps %s", holder_of(path), path)
            self._told = True
        time.sleep(POLL_S)


def _lock(file: int, path: Path, patience: Patience | None) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if patience is None:
                raise
            patience.wait(path, os.fstat(file).st_mtime_ns)


@contextlib.contextmanager
def locked(path: Path, patience: Patience | None) -> Iterator[int]:
    """Give a descriptor of `path`, made if need be, with the only lock on it.

    Raises BlockingIOError when another has the lock and there is no patience, Held when it is at its end: what is
    written to the file is the sign that its owner works."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(file, path, patience)
        held_locks.add(file)
        try:
            yield file
        finally:
            held_locks.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # not by closing alone: a child may have been forked just now
    finally:
        os.close(file)


def is_at(file: int, path: Path) -> bool:
    """Return whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def read_once(path: Path, fetch: Callable[[], bytes], patience_s: float) -> bytes:
    """Return what `fetch` gives, or what it gave another process of this node, which keeps a copy at `path`.

    A copy is good when it was made since this process began, and less than COPY_FRESH_S ago: it is then no older than
    what the process could have read itself. Those who wait for a `fetch` that fails raise its BadInput too; one that
    takes longer than `patience_s` is not waited for."""
    asked = time.time()
    try:
        with locked(path, Patience(patience_s)) as file:
            return _copy_or_fetched(file, asked, fetch)
    except Held as error:
        log.warning("fetching without the copy: %s", error)
        return fetch()


def _copy_or_fetched(file: int, asked: float, fetch: Callable[[], bytes]) -> bytes:
    made, data = os.fstat(file).st_mtime, os.pread(file, os.fstat(file).st_size, 0)
    if data.startswith(FAILED) and made >= asked:
        raise BadInput(data.removeprefix(FAILED).decode())
    digest, copy = data[:32], data[32:]
    if made >= max(asked - COPY_FRESH_S, psutil.Process().create_time()) and digest_of(copy) == digest:
        return copy
    try:
        copy = fetch()
    except BadInput as error:
        _rewrite(file, FAILED + str(error).encode())
        raise
    _rewrite(file, digest_of(copy) + copy)
    return copy


def digest_of(data: bytes) -> bytes:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(data).digest()


def _rewrite(file: int, data: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, data, 0)
