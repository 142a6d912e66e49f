"""Remote files as fsspec reads them: which package, which errors, how often and how long to try.

fsspec knows many protocols but leaves to each backend how it fails, how often it tries again and how long it waits.
`RemoteSource` makes them alike: a try has one time limit and a least rate, tries are counted here, and every failure
ends in one sentence that names the URL without its signature, user and password. Proxies (``http_proxy``) and
``.netrc`` are heeded. Nothing here knows of shards or of a cache (see ``cache.py``).
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from cmgan_dist.config.fields import DATA_SEPARATOR, Config
from cmgan_dist.errors import BadInput

log = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF_S = 0.5
"""Longest wait after the first failed try; it doubles with every further one, up to BACKOFF_MAX_S."""
BACKOFF_MAX_S = 30.0
BLOCK = 8 << 20
"""Bytes asked for in one read."""
LEAST_BYTES_S = 16 << 10
"""Bytes a second that must come, over each time of timeout_s: who sends one now and then is as good as dead."""
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# Else gcsfs asks by gRPC, which does not outlive a fork nor knows STORAGE_EMULATOR_HOST, what kind of bucket it is.

PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""How a URL begins."""
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""Protocol -> the package that fsspec reads it by."""
FAILURES = {
    "aiohttp": ["aiohttp.ClientError"],
    "s3fs": ["aiohttp.ClientError", "botocore.exceptions.BotoCoreError", "http.client.HTTPException"],
    "gcsfs": ["aiohttp.ClientError", "gcsfs.retry.HttpError", "google.auth.exceptions.GoogleAuthError"],
}
"""What a backend raises besides OSError (which holds connection errors and timeouts)."""
TRANSIENT = (408, 425, 429)
"""HTTP states below 500 that another try can cure."""

_filesystems: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The file systems that this process has made."""
inherited: list[Any] = []
"""File systems of the parent: to collect one would wait for its event loop, which a child does not have."""


def _keep_those_of_the_parent() -> None:
    inherited.extend(_filesystems.values())


os.register_at_fork(after_in_child=_keep_those_of_the_parent)


def lower_protocol(place: str) -> str:
    """Return a URL with its protocol in lower case, which means the same (RFC 3986); a path as it is."""
    begins = PROTOCOL.match(place)
    return begins[0].lower() + place[begins.end() :] if begins else place


def public_url(url: str) -> str:
    """Return a URL, or a path, without what is secret in it: user, password and signature."""
    protocol, mark, rest = url.partition("://")
    if not mark:
        return url
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"


def failures_of(protocol: str) -> tuple[type[Exception], ...]:
    """Return what reading and writing by a protocol can raise. Raises ImportError when its package is missing."""
    names = [name.rpartition(".") for name in FAILURES.get(PACKAGES.get(protocol, ""), [])]
    return (OSError, *(getattr(importlib.import_module(module), name) for module, _, name in names))


def public_data(data: str) -> str:
    """Return a config's data, folders and URLs, without what is secret in them."""
    return DATA_SEPARATOR.join(map(public_url, data.split(DATA_SEPARATOR)))


def public_config(config: Config) -> Config:
    """Return a config that may be written down: its data without what is secret in them."""
    return dataclasses.replace(config, data=public_data(config.data))


class NotThere(BadInput):
    """A source says that it has no such file."""


class BadBody(Exception):
    """What arrived is not what was asked for: too short, too long, or other bytes."""


def http_status(error: Exception) -> int | None:
    """Return the HTTP status that a backend's error stands for, None when it stands for none.

    aiohttp keeps it in `status`, gcsfs in `code`, botocore in a dictionary."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        state = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        state = getattr(error, "status", None) or getattr(error, "code", None)
    return int(state) if str(state).isdigit() else None


def describe(error: Exception, state: int | None) -> str:
    """Return in words what happened, without the request's URL, which may be signed; `state`: its HTTP status."""
    if state is not None:
        return f"HTTP {state}"
    if isinstance(error, TimeoutError):
        return "nothing came in time"
    return " ".join(f"{type(error).__name__} {error}".split())


class NoRoom(BadInput):
    """What is read finds no room on a disk of this machine: the source is not to blame."""


def refuse_full(error: BaseException, path: Path) -> None:
    """Raise NoRoom where an error while a copy is written to `path` is that of a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise NoRoom(f"{path} cannot be written ({error.strerror}): free space there, and start again") from None


def is_beyond_the_end(error: Exception) -> bool:
    """Return whether an object store says so of a range: by HTTP 416, or EINVAL, which s3fs makes of that."""
    return getattr(error, "errno", None) == errno.EINVAL or http_status(error) == 416


class _Pace:
    """How fast a body comes."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the time over which the rate is looked at."""
        self.seconds, self._waited, self._bytes = seconds, 0.0, 0

    def came(self, count: int, waited: float) -> None:
        """Note bytes and the seconds that were waited for them. Raises BadBody when they come too slowly."""
        self._bytes, self._waited = self._bytes + count, self._waited + waited
        if self._waited < self.seconds:
            return
        if self._bytes < LEAST_BYTES_S * self._waited:
            raise BadBody(f"{self._bytes} bytes in {self._waited:.1f} s, less than {LEAST_BYTES_S >> 10} KiB a second")
        self._bytes, self._waited = 0, 0.0


async def _answer(files: Any, url: str) -> Any:
    """Return the response to a GET request, of which the header is there. Raises what aiohttp and fsspec raise."""
    session = await files.set_session()
    response = await session.get(files.encode_url(url), **files.kwargs)
    try:
        files._raise_not_found_for_status(response, url)
    except BaseException:
        response.close()
        raise
    return response


class _Connection:
    """The fsspec file system of one process, and the lock under which it is made."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.filesystem: Any = None


class RemoteSource:
    """The files under one URL. An object may be used by several threads and by forked processes."""

    def __init__(self, url: str, *, retries: int, timeout_s: float) -> None:
        """`url`: http(s)://, s3:// or gs://; `timeout_s` is for connecting, and for a time without a byte.

        Raises BadInput when the package for its protocol is missing."""
        url = lower_protocol(url)
        self.protocol = url.partition("://")[0]
        self.package = PACKAGES[self.protocol]
        try:
            fsspec.get_filesystem_class(self.protocol)
            # RuntimeError: of a connection that another thread has closed, or that the interpreter's end has
            self.failures: tuple[type[Exception], ...] = (*failures_of(self.protocol), BadBody, RuntimeError)
        except ImportError as error:
            raise BadInput(f"{public_url(url)} needs a package ({error}): run 'pip install {self.package}'") from None
        self.base, mark, query = url.partition("?") if self.package == "aiohttp" else (url, "", "")
        self.base = self.base.rstrip("/")
        self.query = mark + query  # of a signed URL
        self.place = public_url(self.base)
        """The URL for messages, without secrets."""
        self.tries, self.timeout_s = retries + 1, timeout_s
        self._connections: dict[int, _Connection] = {}

    @property
    def dead_after_s(self) -> float:
        """The most seconds after which a source that does not answer ends in an error: per try `timeout_s` to connect
        and `timeout_s` for the first byte, and the waits between tries."""
        return self.tries * 2 * self.timeout_s + sum(self._longest_wait(n) for n in range(1, self.tries))

    @property
    def silent_s(self) -> float:
        """The most seconds for which a source that works gives nothing: an object store gives whole blocks."""
        return self.dead_after_s + (0 if self.package == "aiohttp" else BLOCK / LEAST_BYTES_S)

    def location(self, name: str) -> str:
        """Return the file's URL without secrets, for messages."""
        return f"{self.place}/{name}"

    def read(self, name: str, most: int) -> bytes:
        """Return a whole small file. Raises BadInput as `retrying` does, and when it has more than `most` bytes."""

        def once() -> bytes:
            read = bytearray()
            for block in self.blocks(name):
                read += block
                if len(read) > most:
                    raise BadInput(f"{self.location(name)} has more than {most >> 20} MiB: check the data set")
            return bytes(read)

        return self.retrying(name, once)

    def copy(self, name: str, path: Path) -> None:
        """Copy a file, as it is there now, to a local path. Raises BadInput as `retrying` does, and NoRoom."""

        def once() -> None:
            try:
                with open(path, "wb") as file:
                    file.writelines(self.blocks(name))
            except OSError as error:
                refuse_full(error, path)
                raise

        self.retrying(name, once)

    def blocks(self, name: str, size: int | None = None) -> Generator[bytes]:
        """Yield the bytes of a file, of `size` bytes if that is known, as they come: one request by HTTP, one for each
        BLOCK from an object store. This is one try and raises what the backend raises: call it under `retrying`."""
        url = f"{self.base}/{name}{self.query}"
        if self.package == "aiohttp":  # many HTTP servers do not know ranges
            yield from self._body(url)
            return
        files, limit = self._filesystem(), 2 * self.timeout_s + BLOCK / LEAST_BYTES_S
        at = 0
        while size is None or at < size:
            stop = at + BLOCK if size is None else min(at + BLOCK, size)
            try:
                block = sync(files.loop, files._cat_file, url, start=at, end=stop, timeout=limit)
            except self.failures as error:
                if size is None and is_beyond_the_end(error):
                    return
                raise
            yield block
            at = stop
            if size is None and len(block) < BLOCK:
                return

    def _body(self, url: str) -> Generator[bytes]:
        """Yield the body of a URL by HTTP as it comes. Raises what aiohttp and fsspec raise, BadBody if it drips."""
        files, pace = self._filesystem(), _Pace(self.timeout_s)
        response = sync(files.loop, _answer, files, url, timeout=2 * self.timeout_s)
        try:
            while True:
                began = time.monotonic()
                block = sync(files.loop, response.content.read, BLOCK)
                if not block:
                    return
                pace.came(len(block), time.monotonic() - began)
                yield block
        finally:
            files.loop.call_soon_threadsafe(response.close)

    def retrying(self, name: str, once: Callable[[], T]) -> T:
        """Call `once`, which reads the file `name`, until it works, and return what it returns.

        Raises BadInput, naming the URL, when the source refuses or stays bad."""
        url, began, reason = self.location(name), time.monotonic(), ""
        for n in range(1, self.tries + 1):
            try:
                return once()
            except BadInput:
                raise
            except ValueError:  # of yarl, aiohttp and idna; their words may hold what is secret in the URL
                raise BadInput(f"{url} is no URL that can be asked for: check its host and port") from None
            except self.failures as error:
                reason = self._curable(url, error)
                level = logging.DEBUG if isinstance(error, RuntimeError) else logging.INFO
            log.log(level, "try %d of %d to read %s: %s", n, self.tries, url, reason)
            if n < self.tries:
                time.sleep(self._longest_wait(n) * random.uniform(0.5, 1.0))  # spread: many processes fail at once
        raise BadInput(
            f"{url} could not be read in {self.tries} tries and {time.monotonic() - began:.1f} s, "
            f"the last one: {reason}: check the source, and start again"
        )

    def close(self) -> None:
        """Let go of this process's file system, whose connections end with it; the next read makes another."""
        connection = self._connection()
        with connection.lock:
            connection.filesystem = None

    def _curable(self, url: str, error: Exception) -> str:
        """Return in words what failed. Raises BadInput when another try cannot cure it."""
        state = http_status(error)
        if isinstance(error, FileNotFoundError) or state in (404, 410):
            raise NotThere(f"{url} does not exist: check the URL, or run 'python -m shards index'") from None
        if isinstance(error, PermissionError) or "Forbidden" in str(error) or state in (401, 403):
            raise BadInput(
                f"{url} may not be read ({describe(error, state)}): check the credentials; a run and an index keep "
                "none of a URL: name it with them by --data"
            ) from None
        if "Credentials" in type(error).__name__:
            raise BadInput(f"{url} needs credentials ({error}): set them as {self.package} says") from None
        reason = describe(error, state)
        if state is not None and state < 500 and state not in TRANSIENT:
            raise BadInput(f"{url} cannot be read: {reason}: check the URL") from None
        return reason

    def _longest_wait(self, tries: int) -> float:
        return min(BACKOFF_S * 2 ** (tries - 1), BACKOFF_MAX_S)

    def _connection(self) -> _Connection:
        return self._connections.setdefault(os.getpid(), _Connection())

    def _filesystem(self) -> Any:
        """Return the file system of this process: its connections belong to a thread that a fork does not copy."""
        connection = self._connection()
        with connection.lock:
            if connection.filesystem is None:
                made = fsspec.filesystem(self.protocol, **self._options())
                # Tries are counted here, not by the backends.
                made.retries = 1  # s3fs
                if self.package == "gcsfs":  # a decorator makes six: the function under it makes one
                    made._request = partial(type(made)._request.__wrapped__, made)
                _filesystems[id(made)] = made
                connection.filesystem = made
            return connection.filesystem

    def _options(self) -> dict[str, Any]:
        """Return what makes fsspec's file systems alike: no caches, our time limits, one try."""
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.package == "s3fs":
            limits = {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s}
            options["config_kwargs"] = {**limits, "retries": {"total_max_attempts": 1}}
            options["max_concurrency"] = 1  # else a read asks for the size first
            return options
        client = importlib.import_module("aiohttp")
        limit = client.ClientTimeout(total=None, connect=self.timeout_s, sock_read=self.timeout_s)
        if self.package == "aiohttp":
            options["client_kwargs"] = {"timeout": limit, "read_bufsize": 1 << 20, "trust_env": True}
        else:
            options["requests_timeout"] = limit
            options["session_kwargs"] = {"trust_env": True}
        return options
