"""The shards of a remote data set, kept in a bounded folder of this node.

The folder is one per node, and all its processes share it (ranks, DataLoader workers, other runs):

    CACHE/<sha256>.tar       a whole, verified shard. Named by content: two URLs of one shard share it
    CACHE/.part-<sha256>     a shard on its way. The file is also the lock: who holds flock on it downloads, others wait
                             as long as bytes come
    CACHE/.lock              held while room is made, so that the sum of all files stays within the bound
    CACHE/.manifest-<hash>   the manifest of a URL, which one process of a node fetches and the others find

The kernel drops the locks of a killed process: a ``.part`` that nobody holds is a leftover, taken over or removed.
A failed download leaves its sentence in the unlinked ``.part``: those who waited read it and fail too, at once,
instead of trying the dead source one after the other.

A cached shard is checked by size at each open and by sha256 at a process's first open of it (a sequential read, which
the kernel then has in memory); a damaged one is fetched again. A shard is evicted by cutting it to nothing, so that its
disk space is free at once, whoever has it open: they find it shorter and without a name, and open it again (reader.py).

How a source is read, and how it fails, is in ``source.py``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import math
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from cmgan_dist.data.folder import MOST_FILE_BYTES
from cmgan_dist.data.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES, ShardInfo
from cmgan_dist.data.shared_file import COPY_FRESH_S, FAILED, Patience, digest_of, is_at, locked, read_once
from cmgan_dist.data.source import PACKAGES, BadBody, RemoteSource, lower_protocol, public_url
from cmgan_dist.data.store import LocalStore, ShardStore
from cmgan_dist.errors import BadInput
from cmgan_dist.files import sha256_of

log = logging.getLogger(__name__)
T = TypeVar("T")

CACHE_BYTES = 32 << 30
"""Most bytes of a cache folder where the caller names no bound."""
PREFETCH_THREADS = 8
"""Shards that a process fetches at a time in the background."""
COPY = ".manifest-"
"""Starts the name of a manifest's copy."""
PART = ".part-"
"""Starts the name of a shard on its way."""
ELSEWHERE = "name another by stream.cache of a run, elsewhere by XDG_CACHE_HOME"
"""What a sentence says of another cache folder."""
GRACE_S = 10.0
"""Seconds that another process has, beyond what its source may take, for what is not the source's."""


def open_store(
    data: str | os.PathLike[str],
    *,
    cache: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    retries: int = 4,
    timeout_s: float = 30.0,
) -> ShardStore:
    """Return the store of a folder, or of a ``file://``, ``http(s)://``, ``s3://`` or ``gs://`` URL.

    `cache`: the folder for remote shards; None takes ``cmgan_dist/shards`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    `timeout_s`: to connect, and without a byte. A dead source ends after at most `RemoteSource.dead_after_s`.
    Raises BadInput when the protocol is unknown, its package missing or the cache folder unusable."""
    data = lower_protocol(os.fspath(data))
    protocol, separator, rest = data.partition("://")
    if not separator:
        return LocalStore(Path(data))
    if protocol == "file":
        return LocalStore(Path(unquote(rest)))
    if protocol not in PACKAGES:
        raise BadInput(
            f"{public_url(data)}: protocol '{protocol}' is unknown, use a folder, file, http, https, s3 or gs"
        )
    source = RemoteSource(data, retries=retries, timeout_s=timeout_s)
    return CachedStore(source, Path(cache) if cache else own_cache("shards"), cache_bytes=cache_bytes)


kept_store = lru_cache(maxsize=1)(open_store)
"""`open_store` for a process that reads one shard after another of one data set."""


def own_cache(name: str) -> Path:
    """Return the folder of that name in this project's part of the user's cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmgan_dist" / name


def rounded_up(value: float) -> str:
    """Return a number above 0 with three digits that is no less."""
    least = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / least) * least:.3g}"


def _make_cache_folder(folder: Path) -> None:
    """Make the folder. Raises BadInput when it cannot be written or its locks do not hold between descriptors (NFS)."""
    advice = f"{ELSEWHERE}, on a disk of this node"
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


class Background:
    """What one process fetches in advance: the threads that do it, and the shards that wait for them.

    A fork copies neither threads nor what they hold, so every process has its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.queue: queue.SimpleQueue[ShardInfo] = queue.SimpleQueue()
        self.pending: dict[str, int] = {}
        """sha256 -> bytes of each shard that waits or is fetched."""
        self.threads: list[threading.Thread] = []
        self.checks: dict[str, threading.Lock] = {}
        """sha256 -> held while a shard is verified: who opens it too has to wait, not to read it a second time."""


class CachedStore(ShardStore):
    """The shards of a remote source, kept in a folder of this node."""

    def __init__(self, source: RemoteSource, folder: Path, *, cache_bytes: int) -> None:
        """Raises BadInput when the folder cannot be used."""
        _make_cache_folder(folder)
        self.source, self.folder, self.cache_bytes = source, folder, cache_bytes
        self.patience_s = source.silent_s + GRACE_S
        """Seconds for which others that fetch are waited for without a sign of their work."""
        self._verified: set[tuple[str, int]] = set()
        self._fetched: set[str] = set()
        """sha256 of each shard that this process has fetched."""
        self._told = False
        self._backgrounds: dict[int, Background] = {}
        gib = cache_bytes / 2**30
        log.info("%s is read by %s, at most %.1f GiB kept in %s", source.place, source.package, gib, folder)

    @property
    def background(self) -> Background:
        """What this process fetches in advance."""
        return self._backgrounds.setdefault(os.getpid(), Background())

    def location(self, name: str) -> str:
        return self.source.location(name)

    def check(self, shards: Sequence[ShardInfo]) -> None:
        """Do nothing: the source is not asked before a shard is needed."""

    def read(self, name: str) -> bytes:
        if name != MANIFEST_NAME:
            return self.source.read(name, MOST_FILE_BYTES)
        path = self.folder / f"{COPY}{digest_of(f'{self.source.base}{self.source.query}'.encode()).hex()}"
        try:
            return read_once(path, lambda: self.source.read(name, MOST_MANIFEST_BYTES), self.patience_s)
        except OSError as error:
            raise BadInput(f"cache folder {self.folder} cannot be used ({error}): {ELSEWHERE}") from None

    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor for reading the whole shard, which is fetched when it is not in the folder.

        The caller closes it. Raises BadInput when it cannot be fetched or kept, or another process that fetches it
        hangs."""
        url = self.location(shard.name)
        if shard.bytes < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a file name
            raise BadInput(
                f"{url} has no bytes or sha256 in its manifest: run 'python -m shards index --overwrite DIR' where the "
                f"files of {self.source.place} are kept, and upload them anew"
            )
        if shard.bytes > self.cache_bytes:
            raise BadInput(
                f"{url} has {shard.bytes} bytes, more than the whole cache of {self.cache_bytes}: "
                f"set stream.cache_gib to {rounded_up(shard.bytes / 2**30)} or more"
            )
        aside = self._aside(shard)
        try:
            while True:
                if (file := self.cached(shard)) is not None:
                    return file
                with locked(aside, Patience(self.patience_s)) as part:
                    if not is_at(part, aside):  # another was first, and has renamed or given up the file of this lock
                        note = os.pread(part, 4096, 0)
                        if note.startswith(FAILED):
                            raise BadInput(note.removeprefix(FAILED).decode())
                    elif (file := self.cached(shard)) is not None:  # ready since the first look
                        aside.unlink()
                        return file
                    else:
                        return self._download(shard, part)
        except OSError as error:  # the source's own errors have become BadInput
            raise BadInput(f"cache folder {self.folder} cannot be used ({error}): {ELSEWHERE}") from None

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Start fetching shards that are needed soon, in this order, in the background. Never raises, never waits.

        At most half of the cache is asked for in advance, lest shards push out those that are needed first."""
        background = self.background
        with background.lock:
            for shard in shards:
                if shard.sha256 in background.pending:
                    continue
                if sum(background.pending.values()) + shard.bytes > self.cache_bytes // 2:
                    break
                background.pending[shard.sha256] = shard.bytes
                background.queue.put(shard)
                if len(background.threads) < PREFETCH_THREADS:
                    # A daemon: a process must not wait for a slow source when it ends.
                    thread = threading.Thread(target=self._work, args=[background], daemon=True)
                    thread.start()
                    background.threads.append(thread)

    def close(self) -> None:
        """Forget what was to be prefetched, and end connections; the store is still of use."""
        self.source.close()
        background = self.background
        with background.lock, contextlib.suppress(queue.Empty):
            while True:
                background.pending.pop(background.queue.get_nowait().sha256, None)

    def _work(self, background: Background) -> None:
        """Fetch what is put into the queue; the life of a background thread."""
        while True:
            shard = background.queue.get()
            try:
                os.close(self.open(shard))
            except BadInput as error:  # told again, and to the caller, when the shard is needed
                log.warning("prefetch: %s", error)
            finally:
                with background.lock:
                    background.pending.pop(shard.sha256, None)

    def _fetch(self, shard: ShardInfo, part: int) -> None:
        """Try once to bring the shard into the file `part`. Raises BadBody when what came is not the shard."""
        digest, at = hashlib.sha256(), 0
        with contextlib.closing(self.source.blocks(shard.name, shard.bytes)) as blocks:
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

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _aside(self, shard: ShardInfo) -> Path:
        return self.folder / f"{PART}{shard.sha256}"

    def cached(self, shard: ShardInfo) -> int | None:
        """Return a descriptor of the cached shard, or None when it is not there. A damaged file is removed."""
        path = self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # whatever it is, it is not waited for
        except FileNotFoundError:
            return None
        if not os.fstat(file).st_nlink:  # evicted just now
            os.close(file)
            return None
        if self._is_whole(shard, file):
            os.utime(file)  # the least recently used goes first
            return file
        if is_at(file, path):
            log.warning("%s is damaged, fetching %s again", path, self.location(shard.name))
            path.unlink(missing_ok=True)
            self._fetched.discard(shard.sha256)
        os.close(file)
        return None

    def _is_whole(self, shard: ShardInfo, file: int) -> bool:
        """Return whether an open file has the bytes of the shard; they are read once a process."""
        if os.fstat(file).st_size != shard.bytes:
            return False
        known = (shard.sha256, os.fstat(file).st_ino)
        with self.background.checks.setdefault(shard.sha256, threading.Lock()):
            if known not in self._verified and sha256_of(file) != shard.sha256:
                return False
            self._verified.add(known)
        return True

    def _download(self, shard: ShardInfo, part: int) -> int:
        """Fetch into `part`, whose lock is held, give it its name, and return a descriptor for reading."""
        aside = self._aside(shard)
        try:
            self._make_room(shard, part)
            self.source.retrying(shard.name, lambda: self._fetch(shard, part))
        except BadInput as error:
            with contextlib.suppress(OSError):
                os.ftruncate(part, 0)
                os.pwrite(part, FAILED + str(error).encode(), 0)
            aside.unlink(missing_ok=True)
            raise
        self._note_fetched(shard)
        os.fsync(part)
        file = os.open(aside, os.O_RDONLY)  # before others can see, and evict, the file
        with self._counting():  # a count during a rename could miss the file
            os.rename(aside, self._path(shard))
        self._verified.add((shard.sha256, os.fstat(file).st_ino))
        return file

    def _note_fetched(self, shard: ShardInfo) -> None:
        """Warn, once, when this process has had to fetch a shard that it had fetched before."""
        if shard.sha256 in self._fetched and not self._told:
            self._told = True
            log.warning(
                "%s is fetched again: %.3g GiB do not hold the shards that are read in turn: set stream.cache_gib to "
                "the size of the data set",
                self.location(shard.name),
                self.cache_bytes / 2**30,
            )
        self._fetched.add(shard.sha256)

    def _make_room(self, shard: ShardInfo, part: int) -> None:
        """Take the shard's bytes from the bound and from the disk, so that no later write can fail for want of them."""
        patience = Patience(COPY_FRESH_S + self.patience_s)
        while True:
            with self._counting():
                os.ftruncate(part, 0)
                while (used := self._used()) + shard.bytes > self.cache_bytes and self._evict():
                    pass
                if used + shard.bytes <= self.cache_bytes:
                    self._with_space(shard, partial(os.posix_fallocate, part, 0, shard.bytes))
                    return
                self._check_foreign(shard)
            self._wait_for_others(patience)  # the rest is being downloaded by others: evictable when they are done

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Hold the lock under which room is made."""
        with locked(self.folder / ".lock", Patience(self.patience_s)) as file:
            os.utime(file)  # a sign for those who wait
            yield

    def _check_foreign(self, shard: ShardInfo) -> None:
        """Raise BadInput when files that are not this cache's leave no room for the shard."""
        entries = ((entry, stat) for entry, stat in self._entries() if not entry.name.startswith((COPY, PART)))
        foreign = sum(stat.st_size for entry, stat in entries if not entry.name.endswith(".tar"))
        if foreign + shard.bytes > self.cache_bytes:
            least = rounded_up((foreign + shard.bytes) / 2**30)
            raise BadInput(
                f"cache folder {self.folder} has {foreign} bytes in files that are no shards, which leave no room for "
                f"{self.location(shard.name)}: move them away, or set stream.cache_gib to {least} or more"
            )

    def _wait_for_others(self, patience: Patience) -> None:
        """Wait a moment for those whose files fill the folder. Raises BadInput, naming one, when all hang."""
        found = ((entry, stat) for entry, stat in self._entries() if entry.name.startswith((COPY, PART)))
        last = max(((stat.st_mtime_ns, entry.path) for entry, stat in found if stat.st_size), default=None)
        patience.wait(Path(last[1]) if last else self.folder, last)

    def _entries(self) -> list[tuple[os.DirEntry[str], os.stat_result]]:
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                entries.append((entry, entry.stat()))
        return entries

    def _used(self) -> int:
        """Return the bytes of all files. Removes what killed processes left, and copies that are good no more."""
        used = 0
        for entry, stat in self._entries():
            old = entry.name.startswith(COPY) and time.time() - stat.st_mtime > COPY_FRESH_S
            if old or entry.name.startswith(PART):
                with contextlib.suppress(BlockingIOError), locked(Path(entry.path), None):
                    os.unlink(entry.path)  # who opened it just now sees that it is gone, and makes another
                    continue
            used += stat.st_size
        return used

    def _evict(self) -> bool:
        """Remove the least recently used shard; return False when there is none.

        It is cut to nothing, lest whoever has it open keep its bytes on disk: they open it again."""
        shards = [(stat.st_mtime_ns, entry.path) for entry, stat in self._entries() if entry.name.endswith(".tar")]
        if shards:
            path = min(shards)[1]
            with contextlib.suppress(FileNotFoundError):
                file = os.open(path, os.O_WRONLY)
                try:
                    os.unlink(path)
                    os.ftruncate(file, 0)
                finally:
                    os.close(file)
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
                    f"({error.strerror}): free space, or {ELSEWHERE}"
                ) from None
