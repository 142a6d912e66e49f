"""Where the files of a data set are: a local folder, or a URL read through fsspec and a bounded cache on local disk.

The cache is one folder per node that all its processes share (ranks, DataLoader workers, other runs):

    CACHE/<sha256>.tar       a whole, verified shard. Named by content: two URLs of one shard share it
    CACHE/.part-<sha256>     a shard on its way. The file is also the lock: who holds flock on it downloads, others wait
    CACHE/.lock              held while room is made, so that the sum of all files stays within the bound

The kernel drops the locks of a killed process: a ``.part`` that nobody holds is a leftover, taken over or removed.
A failed download leaves its sentence in the unlinked ``.part``: those who waited read it and fail too, at once,
instead of trying the dead source one after the other.

A cached shard is checked by size at each open and by sha256 at a process's first open of it (a sequential read, which
the kernel then has in memory); a damaged one is fetched again. An evicted shard stays readable through descriptors
that are open, and its disk space is free when the last of them is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import logging
import os
import queue
import random
import re
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec

from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.source import (
    BACKOFF_MAX_S,
    BACKOFF_S,
    BLOCK,
    FAILURES,
    PACKAGES,
    TRANSIENT,
    BadBody,
    describe,
    http_status,
)
from cmgan_dist.data.store import LocalStore, ShardStore
from cmgan_dist.errors import BadInput

log = logging.getLogger(__name__)
T = TypeVar("T")

CACHE_BYTES = 32 << 30
PREFETCH_THREADS = 2
FAILED = b"\0failed: "
"""Starts the note that a failed download leaves to those who wait: no tar begins with a zero byte."""


def open_store(
    data: str | os.PathLike[str],
    *,
    cache: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    retries: int = 4,
    timeout_s: float = 30.0,
) -> ShardStore:
    """The store of a folder, ``file://``, ``http(s)://``, ``s3://`` or ``gs://`` URL.

    `cache`: folder for remote shards, None: ``$XDG_CACHE_HOME`` or ``~/.cache``, ``cmgan_dist/shards`` in it.
    `timeout_s`: to connect, and without a byte. A dead source ends after at most `CachedStore.dead_after_s`.
    Raises BadInput when the protocol is unknown, its package missing or the cache folder unusable."""
    data = os.fspath(data)
    protocol, separator, rest = data.partition("://")
    if not separator:
        return LocalStore(Path(data))
    if protocol == "file":
        return LocalStore(Path(unquote(rest)))
    if protocol not in PACKAGES:
        raise BadInput(f"{data}: protocol '{protocol}' is unknown, use a folder, file, http, https, s3 or gs")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) if cache else Path(home) / "cmgan_dist" / "shards"
    return CachedStore(data, folder, cache_bytes=cache_bytes, retries=retries, timeout_s=timeout_s)


# ---------------------------------------------------------------------------------------------- local


# ---------------------------------------------------------------------------------------------- forks and locks

_held: set[int] = set()
"""Descriptors of this process that have a lock."""
_filesystems: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_inherited: list[Any] = []
"""File systems of the parent: to collect one would wait for its event loop, which a child does not have."""


def _after_fork() -> None:
    _inherited.extend(_filesystems.values())
    # A lock belongs to the open file, which a fork shares: a child would keep it past the death of its parent.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """A descriptor of `path`, made if need be, with the only lock on it. Raises BlockingIOError without `wait`."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        _held.add(file)
        try:
            yield file
        finally:
            _held.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # not by closing alone: a child may have been forked just now
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _make_cache_folder(folder: Path) -> None:
    """Raises BadInput when the folder cannot be written or its locks do not hold between descriptors (NFS)."""
    advice = "set stream.cache to a folder on a disk of this node"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as one, open(one.name, "r+b") as other:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
    except OSError as error:
        raise BadInput(f"cache folder {folder} cannot be used ({error}): {advice}") from None
    raise BadInput(f"cache folder {folder} is on a file system without working locks: {advice}")


# ---------------------------------------------------------------------------------------------- remote


class _Process:
    """What a process must not share with those it forks: connections, threads and their locks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.filesystem: Any = None
        self.queue: queue.SimpleQueue[ShardInfo] = queue.SimpleQueue()
        self.pending: dict[str, int] = {}
        """Bytes of each shard that waits or is fetched in the background."""
        self.threads: list[threading.Thread] = []


class CachedStore(ShardStore):
    """A URL, its shards kept in a folder of this node."""

    def __init__(self, data: str, folder: Path, *, cache_bytes: int, retries: int, timeout_s: float) -> None:
        self.protocol = data.partition("://")[0]
        self.package = PACKAGES[self.protocol]
        # Else gcsfs asks by gRPC, which does not outlive a fork, what kind of bucket it is.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            fsspec.get_filesystem_class(self.protocol)
            names = [name.rpartition(".") for name in FAILURES[self.package]]
            failures = [getattr(importlib.import_module(module), name) for module, _, name in names]
        except ImportError as error:
            raise BadInput(f"{data} needs a package ({error}): run 'pip install {self.package}'") from None
        self.failures: tuple[type[Exception], ...] = (OSError, BadBody, *failures)
        _make_cache_folder(folder)
        self.base, mark, query = data.partition("?") if self.package == "aiohttp" else (data, "", "")
        self.base = self.base.rstrip("/")
        self.query = mark + query  # of a signed URL: a secret, left out of messages
        self.folder, self.cache_bytes, self.tries, self.timeout_s = folder, cache_bytes, retries + 1, timeout_s
        self._verified: set[tuple[str, int]] = set()
        self._processes: dict[int, _Process] = {}
        log.info("%s is read by %s, at most %.1f GiB kept in %s", self.base, self.package, cache_bytes / 2**30, folder)

    @property
    def dead_after_s(self) -> float:
        """A source that does not answer ends in an error after at most this many seconds: per try `timeout_s` to
        connect and `timeout_s` for the first byte, and the waits between tries."""
        return self.tries * 2 * self.timeout_s + sum(self._longest_wait(n) for n in range(1, self.tries))

    def location(self, name: str) -> str:
        return f"{self.base}/{name}"

    def check(self, shards: Sequence[ShardInfo]) -> None:
        pass

    def read(self, name: str) -> bytes:
        return self._trying(name, lambda: self._files().cat_file(self.location(name) + self.query))

    def open(self, shard: ShardInfo) -> int:
        url = self.location(shard.name)
        if shard.bytes < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a file name
            raise BadInput(
                f"{url} has no bytes or sha256 in its manifest: run 'python -m shards index' on the data set"
            )
        if shard.bytes > self.cache_bytes:
            raise BadInput(
                f"{url} has {shard.bytes} bytes, more than the whole cache of {self.cache_bytes}: "
                f"set stream.cache_gib to {shard.bytes / 2**30:.3g} or more"
            )
        aside = self._aside(shard)
        try:
            while True:
                if (file := self._cached(shard)) is not None:
                    return file
                with _locked(aside) as part:
                    if not _is_at(part, aside):  # another was first, and has renamed or given up the file of this lock
                        note = os.pread(part, 4096, 0)
                        if note.startswith(FAILED):
                            raise BadInput(note.removeprefix(FAILED).decode())
                    elif (file := self._cached(shard)) is not None:  # ready since the first look
                        aside.unlink()
                        return file
                    else:
                        return self._download(shard, part)
        except OSError as error:  # the source's own errors have become BadInput
            raise BadInput(f"cache folder {self.folder} cannot be used ({error}): set stream.cache") from None

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """At most half of the cache is asked for in advance, lest shards push out those that are needed first."""
        process = self._process()
        with process.lock:
            for shard in shards:
                if shard.sha256 in process.pending:
                    continue
                if sum(process.pending.values()) + shard.bytes > self.cache_bytes // 2:
                    break
                process.pending[shard.sha256] = shard.bytes
                process.queue.put(shard)
                if len(process.threads) < PREFETCH_THREADS:
                    # A daemon: a process must not wait for a slow source when it ends.
                    thread = threading.Thread(target=self._work, args=[process], daemon=True)
                    thread.start()
                    process.threads.append(thread)

    def close(self) -> None:
        process = self._process()
        with process.lock, contextlib.suppress(queue.Empty):
            process.filesystem = None  # its connections end with it
            while True:
                process.pending.pop(process.queue.get_nowait().sha256, None)

    # ------------------------------------------------------------------------------------------ this process

    def _process(self) -> _Process:
        return self._processes.setdefault(os.getpid(), _Process())

    def _files(self) -> Any:
        """The fsspec file system of this process: its connections belong to a thread that a fork does not copy."""
        process = self._process()
        with process.lock:
            if process.filesystem is None:
                options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
                if self.package == "s3fs":
                    limits = {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s}
                    options["config_kwargs"] = {**limits, "retries": {"total_max_attempts": 1}}
                    options["max_concurrency"] = 1  # else a read asks for the size first
                else:
                    client = importlib.import_module("aiohttp")
                    limit = client.ClientTimeout(total=None, connect=self.timeout_s, sock_read=self.timeout_s)
                    if self.package == "aiohttp":
                        options["client_kwargs"] = {"timeout": limit, "read_bufsize": 1 << 20}
                    else:
                        options["requests_timeout"] = limit
                process.filesystem = fsspec.filesystem(self.protocol, **options)
                # Tries are counted here, not by the backends.
                process.filesystem.retries = 1  # s3fs
                if self.package == "gcsfs":  # a decorator makes six: the function under it makes one
                    request = type(process.filesystem)._request.__wrapped__
                    process.filesystem._request = partial(request, process.filesystem)
                _filesystems[id(process.filesystem)] = process.filesystem
            return process.filesystem

    def _work(self, process: _Process) -> None:
        while True:
            shard = process.queue.get()
            try:
                os.close(self.open(shard))
            except BadInput as error:  # told again, and to the caller, when the shard is needed
                log.warning("prefetch: %s", error)
            finally:
                with process.lock:
                    process.pending.pop(shard.sha256, None)

    # ------------------------------------------------------------------------------------------ source

    def _longest_wait(self, tries: int) -> float:
        return min(BACKOFF_S * 2 ** (tries - 1), BACKOFF_MAX_S)

    def _trying(self, name: str, once: Callable[[], T]) -> T:
        """Call `once` until it works. Raises BadInput, naming the URL, when the source refuses or stays bad."""
        url, began, reason = self.location(name), time.monotonic(), ""
        for n in range(1, self.tries + 1):
            try:
                return once()
            except self.failures as error:
                state = http_status(error)
                if isinstance(error, FileNotFoundError) or state in (404, 410):
                    raise BadInput(f"{url} does not exist: check the URL, or run 'python -m shards index'") from None
                if isinstance(error, PermissionError) or "Forbidden" in str(error) or state in (401, 403):
                    raise BadInput(f"{url} may not be read ({describe(error, state)}): check the credentials") from None
                if "Credentials" in type(error).__name__:
                    raise BadInput(f"{url} needs credentials ({error}): set them as {self.package} says") from None
                reason = describe(error, state)
                if state is not None and state < 500 and state not in TRANSIENT:
                    raise BadInput(f"{url} cannot be read: {reason}: check the URL") from None
            log.info("try %d of %d to read %s: %s", n, self.tries, url, reason)
            if n < self.tries:
                time.sleep(self._longest_wait(n) * random.uniform(0.5, 1.0))  # spread: many processes fail at once
        raise BadInput(
            f"{url} could not be read in {self.tries} tries and {time.monotonic() - began:.1f} s, "
            f"the last one: {reason}: check the source, or raise stream.retries"
        )

    def _blocks(self, shard: ShardInfo) -> Generator[bytes]:
        """The shard's bytes as they come: one request by HTTP, one for each block from an object store."""
        files, url = self._files(), self.location(shard.name) + self.query
        if self.package == "aiohttp":  # many HTTP servers do not know ranges
            with files.open(url, "rb", block_size=0, size=shard.bytes) as body:
                while block := body.read(BLOCK):
                    yield block
            return
        for start in range(0, shard.bytes, BLOCK):
            yield files.cat_file(url, start=start, end=min(start + BLOCK, shard.bytes))

    def _fetch(self, shard: ShardInfo, part: int) -> None:
        """One try. Raises BadBody when what came is not the shard."""
        digest, at = hashlib.sha256(), 0
        with contextlib.closing(self._blocks(shard)) as blocks:
            for block in blocks:
                if at + len(block) > shard.bytes:
                    raise BadBody(f"the body is longer than the manifest's {shard.bytes} bytes")
                digest.update(block)
                view = memoryview(block)
                while view:
                    done = self._with_space(shard, partial(os.pwrite, part, view, at))
                    view, at = view[done:], at + done
        if at < shard.bytes:
            raise BadBody(f"the body ended after {at} of {shard.bytes} bytes")
        if digest.hexdigest() != shard.sha256:
            raise BadBody(f"the body's sha256 is {digest.hexdigest()[:12]}…, the manifest's {shard.sha256[:12]}…")

    # ------------------------------------------------------------------------------------------ cache

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _aside(self, shard: ShardInfo) -> Path:
        return self.folder / f".part-{shard.sha256}"

    def _cached(self, shard: ShardInfo) -> int | None:
        """A descriptor of the cached shard, or None. A damaged file is removed."""
        path = self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        known = (shard.sha256, os.fstat(file).st_ino)
        if os.fstat(file).st_size == shard.bytes and (known in self._verified or _sha256(file) == shard.sha256):
            self._verified.add(known)
            os.utime(file)  # the least recently used goes first
            return file
        log.warning("%s is damaged, fetching %s again", path, self.location(shard.name))
        if _is_at(file, path):
            path.unlink(missing_ok=True)
        os.close(file)
        return None

    def _download(self, shard: ShardInfo, part: int) -> int:
        """Fetch into `part`, whose lock is held, and give it its name. Returns a descriptor for reading."""
        aside = self._aside(shard)
        try:
            self._make_room(shard, part)
            self._trying(shard.name, lambda: self._fetch(shard, part))
        except BadInput as error:
            with contextlib.suppress(OSError):
                os.ftruncate(part, 0)
                os.pwrite(part, FAILED + str(error).encode(), 0)
            aside.unlink(missing_ok=True)
            raise
        os.fsync(part)
        file = os.open(aside, os.O_RDONLY)  # before others can see, and evict, the file
        with _locked(self.folder / ".lock"):  # a count during a rename could miss the file
            os.rename(aside, self._path(shard))
        self._verified.add((shard.sha256, os.fstat(file).st_ino))
        return file

    def _make_room(self, shard: ShardInfo, part: int) -> None:
        """Take the shard's bytes from the bound and from the disk, so that no later write can fail for want of them."""
        while True:
            with _locked(self.folder / ".lock"):
                os.ftruncate(part, 0)
                while (used := self._used()) + shard.bytes > self.cache_bytes and self._evict():
                    pass
                if used + shard.bytes <= self.cache_bytes:
                    self._with_space(shard, partial(os.posix_fallocate, part, 0, shard.bytes))
                    return
            time.sleep(0.05)  # the rest is being downloaded by others: evictable when they are done

    def _entries(self) -> list[tuple[os.DirEntry[str], os.stat_result]]:
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                entries.append((entry, entry.stat()))
        return entries

    def _used(self) -> int:
        """Bytes of all files. Removes what killed processes left."""
        used = 0
        for entry, stat in self._entries():
            if entry.name.startswith(".part-"):
                with contextlib.suppress(BlockingIOError), _locked(Path(entry.path), wait=False):
                    os.unlink(entry.path)  # who opened it just now sees that it is gone, and makes another
                    continue
            used += stat.st_size
        return used

    def _evict(self) -> bool:
        """Remove the least recently used shard. False when there is none."""
        shards = [(stat.st_mtime_ns, entry.path) for entry, stat in self._entries() if entry.name.endswith(".tar")]
        if shards:
            Path(min(shards)[1]).unlink(missing_ok=True)
        return bool(shards)

    def _with_space(self, shard: ShardInfo, action: Callable[[], T]) -> T:
        """Call `action`, evicting while the disk is full. Raises BadInput when that does not help."""
        while True:
            try:
                return action()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._evict():
                    continue
                raise BadInput(
                    f"cache folder {self.folder} cannot take the {shard.bytes} bytes of {self.location(shard.name)} "
                    f"({error.strerror}): free space, or set stream.cache to a folder on another disk"
                ) from None


def _sha256(file: int) -> str:
    with open(file, "rb", closefd=False) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    os.lseek(file, 0, os.SEEK_SET)
    return digest
