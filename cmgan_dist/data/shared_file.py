"""Files that the processes of one node share: each has one writer at a time, and what one has fetched the others find.

A lock is flock on the file itself; the kernel drops those of a killed process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from cmgan_dist.errors import BadInput

COPY_FRESH_S = 60.0
"""Seconds for which the copy of a manifest is good, since a data set can be written anew under its URL."""
FAILED = b"\0failed: "
"""Starts the note that a failed download leaves to those who wait: no tar begins with a zero byte."""

held_locks: set[int] = set()
"""Descriptors of this process that have a lock."""


def _drop_locks() -> None:
    """Close a parent's locks in its child. A lock belongs to the open file, which a fork shares: the child would keep
    it past the death of its parent."""
    while held_locks:
        os.close(held_locks.pop())


os.register_at_fork(after_in_child=_drop_locks)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Give a descriptor of `path`, made if need be, with the only lock on it.

    Raises BlockingIOError when another has the lock and `wait` is False."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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


def read_once(path: Path, fetch: Callable[[], bytes]) -> bytes:
    """Return what `fetch` gives, or what it gave another process of this node, which keeps a copy at `path`.

    A copy is good when it was made since this process began, and less than COPY_FRESH_S ago: it is then no older than
    what the process could have read itself. Those who wait for a `fetch` that fails raise its BadInput too."""
    asked = time.time()
    with locked(path) as file:
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
