"""One owner of an output: who writes to a folder holds a lock on it, and whoever comes second is told who that is.

    FOLDER/.NAME.lock    locked by flock(2), which ends with the process however that ends; in it who holds the lock. An
                         owner that ends by itself removes it

flock reaches over hosts on NFS, and on Lustre and GPFS where they are mounted so. Elsewhere it does not, so the owner
also counts on in the file, and a process of another machine first watches whether the count stands still: a run whose
node was lost goes on elsewhere without a hand, STILL_S seconds later."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json, read_bytes
from cmgan_dist.jobs.staging import is_running

log = logging.getLogger(__name__)


class InUse(BadInput):
    """Another process owns the folder."""


BEAT_S, STILL_S = 5.0, 30.0
"""Seconds between two counts of an owner, and how long the count must stand still before another machine takes over."""
GRACE_S = 2.0
"""Seconds that a lock is asked for: the kernel takes a moment to end a process that was killed."""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on file systems that have none."""
_RECORD_BYTES = 512
_held: set[int] = set()


def _forget_in_child() -> None:
    """Close the locks that a forked process has got from its parent: they would outlive the parent in it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def lock_name(name: str) -> str:
    """Return the name of the file that is locked for work of the kind `name`."""
    return f".{name}.lock"


@contextmanager
def owning(folder: Path, name: str) -> Iterator[None]:
    """Own `folder` for work of the kind `name`, such as "train", until the end; the folder is made when need be.

    Other kinds of work on it go on. Raises BadInput when another process owns it, naming that, or the folder cannot be
    written."""
    path = folder / lock_name(name)
    try:
        descriptor = _made_and_locked(folder, path)
    except OSError as error:
        raise BadInput(
            f"{folder} cannot be written ({error.strerror}): name a folder that is yours, or make it writable"
        ) from None
    try:
        with _counting(folder, descriptor):
            yield
    finally:
        if descriptor in _held:  # else this is a forked process, and the lock its parent's
            path.unlink(missing_ok=True)
            _close(descriptor)


@contextmanager
def owning_in_turn(folder: Path, name: str) -> Iterator[None]:
    """Own `folder` as `owning` does, after whoever owns it now; stderr says for whom this waits."""
    with ExitStack() as stack:
        said = False
        while True:
            try:
                stack.enter_context(owning(folder, name))
                break
            except InUse as error:
                if not said:
                    print(f"{str(error).partition(': wait')[0]}: waiting for that", file=sys.stderr, flush=True)
                said = True
        yield


def _made_and_locked(folder: Path, path: Path) -> int:
    """Return what `_locked` does of a folder that is made when need be; who ends its work there may just remove it."""
    for _ in range(100):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return _locked(folder, path)
    return _locked(folder, path)


def _locked(folder: Path, path: Path) -> int:
    """Return a descriptor of the file that holds the lock. Raises BadInput when its owner lives, and OSError."""
    deadline = time.monotonic() + GRACE_S
    while True:
        # a link could lead to a file of somebody's, which would be written to
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        _held.add(descriptor)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, f"{path.name} there is no regular file")
            locked = _lock(descriptor)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                owner = _owner(path)
                if owner and (_machine() != owner.get("machine") or not locked):
                    _watch(folder, path, owner)
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                _close(descriptor)
                raise _refusal(folder, _owner(path)) from None
            time.sleep(0.05)
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)  # its owner has ended and removed the file


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file and return whether the file system can. Raises BlockingIOError when another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _watch(folder: Path, path: Path, owner: dict[str, Any]) -> None:
    """Return when the owner is gone: by its count or, on this machine, by its process. Raises BadInput if it lives."""
    if owner.get("machine") == _machine():
        since = owner.get("since")
        if is_running(owner["pid"], since if isinstance(since, float) else math.inf):
            raise _refusal(folder, owner)
        return
    log.warning(
        "%s was left by process %s on %s: looking for %.0f s whether that still runs",
        folder, owner.get("pid"), owner.get("host"), STILL_S,
    )  # fmt: skip
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STILL_S / 4))
        now = _owner(path)
        if not now:  # it has ended
            return
        if now != owner:
            raise _refusal(folder, now)


def _owner(path: Path) -> dict[str, Any]:
    """Return what the owner says of itself, {} where nobody does. NFS looks again only where a file is opened anew."""
    try:
        found = parse_json(read_bytes(path).strip(b" \0\n"))
    except (FileNotFoundError, ValueError):  # its owner has ended, or not begun to count
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _refusal(folder: Path, owner: dict[str, Any]) -> InUse:
    who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
    return InUse(f"{folder} is in use by {who}: wait until that has ended, or name another folder")


def _machine() -> str:
    """Return what tells this machine, as it runs now, from all others, whatever containers call themselves."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


@contextmanager
def _counting(folder: Path, descriptor: int) -> Iterator[None]:
    """Say in the locked file who owns it and count on there until the end."""
    record = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "since": time.time()}
    ended = threading.Event()

    def write(count: int) -> None:
        os.pwrite(descriptor, json.dumps(record | {"count": count}).encode().ljust(_RECORD_BYTES), 0)

    def count_on() -> None:
        count = 0
        while not ended.wait(BEAT_S):
            count += 1
            try:
                write(count)
            except OSError as error:
                log.warning("%s: its lock cannot be kept up (%s)", folder, error.strerror)

    try:
        write(0)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}): free space there") from None
    thread = threading.Thread(target=count_on, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if descriptor in _held:
            ended.set()
            thread.join()
