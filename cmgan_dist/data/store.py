"""Where files are: those of a data set for reading, and a folder of results for reading and writing.

There are two kinds, for two needs. A `ShardStore` only reads, millions of times and from many processes: it gives whole
and verified shards as open files (here from a local folder, in ``cache.py`` from a URL), tries again where a source
fails, and its sentences speak of data sets. A `FileStore` reads and writes a few small files under one folder or URL.
"""

from __future__ import annotations

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cmgan_dist.data.folder import KINDS, check_output, checked_path, read_file
from cmgan_dist.data.manifest import MANIFEST_NAME, ShardInfo, manifest_path, read_manifest
from cmgan_dist.data.source import (
    BLOCK,
    LEAST_BYTES_S,
    describe,
    failures_of,
    http_status,
    is_beyond_the_end,
    lower_protocol,
    public_url,
    refuse_full,
)
from cmgan_dist.errors import BadInput, BadSample, shards_command
from cmgan_dist.files import check_regular, open_descriptor, read_bytes, sha256_of, write_atomic

OBJECT_STORES = ("s3", "s3a", "gs", "gcs")
"""Protocols of stores that know no folders."""
ANSWER_S = 60.0
"""Seconds in which an object store has to answer, beside the time that bytes may take at LEAST_BYTES_S."""
LIST_S = 300.0
"""Seconds in which it has to list a folder: a million names come within that."""


class ShardStore(ABC):
    """The files of a data set. One object may be used by several threads and by forked processes.

    For writing, or for files that are not a data set's, see `FileStore`."""

    @abstractmethod
    def location(self, name: str) -> str:
        """Return the file's path or URL, for messages."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a small file (manifest, sidecar). Raises BadInput when it does not exist or cannot be read."""

    @abstractmethod
    def check(self, shards: Sequence[ShardInfo]) -> None:
        """Raise BadInput when a local shard is absent. A remote source is not asked: `open` says it."""

    @abstractmethod
    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor for reading the whole shard; the caller closes it. Raises BadInput when there is none."""

    def file(self, shard: ShardInfo) -> BinaryIO:
        """Return the whole shard as a file at its start; the caller closes it. Raises BadInput when there is none."""
        descriptor = self.open(shard)
        os.lseek(descriptor, 0, os.SEEK_SET)  # who has fetched it has read it
        return os.fdopen(descriptor, "rb")

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:  # noqa: B027 - nothing to do for a local folder
        """Start fetching shards that are needed soon, in this order, in the background. Never raises, never waits."""

    def close(self) -> None:  # noqa: B027
        """Forget what was to be prefetched, and end connections."""


class LocalStore(ShardStore):
    """A folder of shards: its files are opened where they lie, neither copied nor verified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def location(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        if name == MANIFEST_NAME:
            return read_manifest(manifest_path(self.folder))
        path, anew = self.folder / name, shards_command("index", "--overwrite", self.folder)
        if not path.is_file():
            raise BadInput(f"shard index {path} does not exist: run {anew}")
        try:
            return read_file(path)
        except BadSample as error:
            raise BadInput(f"shard index {path} {error}: run {anew}") from None

    def check(self, shards: Sequence[ShardInfo]) -> None:
        for shard in shards:
            if not (self.folder / shard.name).is_file():
                raise BadInput(f"shard {self.folder / shard.name} is in the manifest but not in the folder: restore it")

    def open(self, shard: ShardInfo) -> int:
        try:
            return open_descriptor(self.folder / shard.name)
        except FileNotFoundError:
            self.check([shard])
            raise


class FileStore:
    """A folder for reading and writing: a local path, or a URL of any protocol that fsspec knows (s3://, gs://).

    A file is seen whole or not at all: in a folder because it gets its name by a rename, in an object store because
    that shows an object when all of it has arrived. An object store that does not answer within ANSWER_S, or gives or
    takes less than LEAST_BYTES_S, is as good as dead."""

    def __init__(self, url: str, flag: str) -> None:
        """`flag`: the flag or field that named the folder, for messages. The folder need not exist yet.

        Raises BadInput when the protocol is unknown, its package missing, or no path has such characters."""
        checked_path(url, flag)
        url = lower_protocol(url)
        try:
            self.filesystem, path = fsspec.core.url_to_fs(url)
            # ValueError: of a URL that no server can be asked by
            self.failures: tuple[type[Exception], ...] = (*failures_of(url.partition("://")[0]), ValueError)
        except (ValueError, ImportError) as error:
            named = f"{flag} {public_url(url)}"
            raise BadInput(f"{named} cannot be opened ({error}): use a folder or install what it needs") from None
        self.url, self.flag = url.rstrip("/"), flag
        self.path = str(path).rstrip("/")
        """Where the folder is in `filesystem`, without the protocol."""
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self.objects = url.partition("://")[0] in OBJECT_STORES
        if self.objects and not self.path:
            raise BadInput(f"{flag} {public_url(url)} names no bucket: name one, such as s3://BUCKET/FOLDER")

    def check_writable(self) -> None:
        """Raise BadInput when nothing can be written by the URL's protocol."""
        protocol = self.url.partition("://")[0]
        if protocol in ("http", "https"):
            place = f"{self.flag} {public_url(self.url)}"
            raise BadInput(f"{place} cannot be written by {protocol}: name a folder, or a URL of s3 or gs")

    def location(self, name: str) -> str:
        """Return the file's path or URL, for messages."""
        return f"{public_url(self.url)}/{name}"

    def is_at(self, place: str) -> bool:
        """Return whether the folder is the one that `place` names, a path or a URL, links followed."""
        return _real(self.url) == _real(place)

    def check_output(self, own: str) -> None:
        """Raises BadInput as `folder.check_output` does, of a URL too."""
        if self.local:
            return check_output(Path(self.path), own, self.flag)
        for name, kind in KINDS.items():
            if name != own and self.size(name) is not None:
                raise BadInput(f"{self.flag} {public_url(self.url)} is {kind}: name another place ({name} lies in it)")
        return None

    def _ask(
        self, method: str, *arguments: object, seconds: float | None = None, size: int = 0, **options: object
    ) -> Any:
        """Call a method of the file system; one of an object store may take `seconds` (ANSWER_S), and longer
        for `size` bytes.

        Raises what the file system raises, and TimeoutError."""
        if self.objects:
            options["timeout"] = (seconds or ANSWER_S) + size / LEAST_BYTES_S
        return getattr(self.filesystem, method)(*arguments, **options)

    def _size_to_read(self, name: str) -> int:
        """Return the bytes of a file of an object store, of which the time to read it depends, else 0."""
        return int(self._ask("size", f"{self.path}/{name}")) if self.objects else 0

    def read(self, name: str) -> bytes:
        """Return a whole file. Raises FileNotFoundError when there is none, BadInput when it cannot be read."""
        try:
            if self.local:
                return read_bytes(f"{self.path}/{name}")
            found = self._beginning(name)
            if found is None:
                found = self._ask("cat_file", f"{self.path}/{name}", size=self._size_to_read(name))
        except FileNotFoundError:
            raise
        except self.failures as error:
            raise self._unreadable(error, name) from None
        return found

    def _beginning(self, name: str) -> bytes | None:
        """Return a file of an object store that is smaller than BLOCK, whose size is not asked for, else None."""
        if not self.objects:
            return None
        try:
            found: bytes = self._ask("cat_file", f"{self.path}/{name}", size=BLOCK, start=0, end=BLOCK)
        except self.failures as error:
            if is_beyond_the_end(error):
                return b""
            raise
        return found if len(found) < BLOCK else None

    def sha256(self, name: str) -> str | None:
        """Return the SHA-256 of a file's bytes, None when there is none. Raises BadInput when it cannot be read."""
        if (size := self.size(name)) is None:
            return None
        try:
            if self.local:
                return sha256_of(f"{self.path}/{name}")
            digest = hashlib.sha256()
            for at in range(0, size, BLOCK):
                span = {"start": at, "end": min(at + BLOCK, size)}
                digest.update(self._ask("cat_file", f"{self.path}/{name}", size=BLOCK, **span))
            return digest.hexdigest()
        except FileNotFoundError:
            return None
        except self.failures as error:
            raise self._unreadable(error, name) from None

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to the local `path`. Raises BadInput when it cannot be read, or `path` not be written."""
        try:
            if self.local:
                check_regular(f"{self.path}/{name}")
            self._ask("get_file", f"{self.path}/{name}", str(path), size=self._size_to_read(name))
        except self.failures as error:
            refuse_full(error, path)
            raise self._unreadable(error, name) from None

    def write(self, name: str, data: bytes | str) -> None:
        """Write a file in one step, text as UTF-8: a reader sees the old file or the new one, whole.

        Raises BadInput when it cannot be written."""
        content = data.encode() if isinstance(data, str) else data
        try:
            if self.local:
                write_atomic(f"{self.path}/{name}", content)
            else:
                self._ask("pipe_file", self._target(name), content, size=len(content))
        except self.failures as error:
            raise self._unwritable(error, name) from None

    def _target(self, name: str) -> str:
        """Return where a file goes, with the folders above it made; object stores have none, and their buckets stay."""
        target = f"{self.path}/{name}"
        if not self.objects:
            self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        return target

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None when there is none. Raises BadInput when that cannot be found out."""
        try:
            self.filesystem.invalidate_cache()  # other processes write too
            return int(self._ask("size", f"{self.path}/{name}"))
        except FileNotFoundError:
            return None
        except self.failures as error:
            raise self._unreadable(error, name) from None

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files in the folder and those below it, sorted; [] when there is no folder.

        `below`: a folder in it, whose files are listed from there. Raises BadInput when they cannot be listed."""
        folder = f"{self.path}/{below}" if below else self.path
        try:
            self.filesystem.invalidate_cache()
            found = self._ask("find", folder, seconds=LIST_S)
        except FileNotFoundError:
            return []
        except self.failures as error:
            raise self._unreadable(error) from None
        return sorted(path[len(folder) + 1 :] for path in found)

    def own_names(self) -> set[str]:
        """Return the names of what lies in the folder itself, not below; none when there is no folder.

        Raises BadInput when they cannot be listed."""
        try:
            self.filesystem.invalidate_cache()
            found = os.listdir(self.path) if self.local else self._ask("ls", self.path, seconds=LIST_S, detail=False)
        except FileNotFoundError:
            return set()
        except self.failures as error:
            raise self._unreadable(error) from None
        return {path.rstrip("/").rpartition("/")[2] for path in found}

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises BadInput when it cannot be removed."""
        try:
            self._ask("rm_file", f"{self.path}/{name}")
        except FileNotFoundError:
            return
        except self.failures as error:
            raise self._unwritable(error, name) from None

    def put_file(self, path: Path, name: str) -> None:
        """Copy a local file to `name`. Raises BadInput when that cannot be written."""
        try:
            self._ask("put_file", str(path), self._target(name), size=path.stat().st_size)
        except self.failures as error:
            raise self._unwritable(error, name) from None

    def put(self, folder: Path, name: str) -> None:
        """Copy the files of a local folder to `name`, file by file. Raises BadInput when that cannot be written, or
        there is none."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise BadInput(f"{folder} has no file that could be copied to {self.location(name)}: restore it")
        for file in files:
            self.put_file(file, f"{name}/{file.relative_to(folder).as_posix()}")

    def _unreadable(self, error: Exception, name: str = "") -> BadInput:
        return self._failed("read", error, name)

    def _unwritable(self, error: Exception, name: str) -> BadInput:
        if isinstance(error, FileNotFoundError) and not self.local:
            error = FileNotFoundError(errno.ENOENT, "there is no such bucket or folder")
        return self._failed("written", error, name)

    def _failed(self, what: str, error: Exception, name: str) -> BadInput:
        reason = f"{name}: {_reason(error)}" if name else _reason(error)
        return BadInput(f"{self.flag} {public_url(self.url)} cannot be {what} ({reason}): use another place")


def _real(place: str) -> str:
    """Return a path without links, or a URL, so that one place has one name."""
    path = lower_protocol(place).removeprefix("file://")
    return path.rstrip("/") if "://" in path else os.path.realpath(path)


def _reason(error: Exception) -> str:
    """Return in words what failed, without a URL that may be signed."""
    if isinstance(error, TimeoutError):
        return "no whole answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError):
        return "it is no URL that can be asked for"
    return describe(error, http_status(error))
