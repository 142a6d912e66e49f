"""Pictures and tables by URL (http, https, s3, gs), with the time limits and tries of `cmgan_dist/data/source.py`."""

from __future__ import annotations

import functools
import hashlib
import os
import posixpath
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cmgan_dist.data.folder import MOST_FILE_BYTES
from cmgan_dist.data.source import PACKAGES, PROTOCOL, NoRoom, RemoteSource, public_url
from cmgan_dist.errors import BadInput, BadSample
from shards.pairs import brief

MOST_HOSTS = 32
"""Servers with which a process keeps connections: each is an open file."""
USUAL_BYTES = 100_000
"""What a picture by URL is planned with: nobody asks a server for the sizes of all."""

FILE = "file://"


def is_url(name: str) -> bool:
    """Return whether a name is a URL that is read here."""
    return name.partition("://")[0].lower() in PACKAGES and "://" in name


def check_protocol(name: str) -> None:
    """Raise BadSample when a name is a URL by a protocol that is not read here."""
    if PROTOCOL.match(name) and not is_url(name):
        known = ", ".join(["file", *PACKAGES])
        raise BadSample(f"{brief(public_url(name))} is a URL by none of {known}: name one, or a path")


def is_file_url(name: str) -> bool:
    """Return whether a name is the URL of a file on this machine, or says that it is."""
    return name[: len(FILE)].lower() == FILE


def path_of(name: str) -> str:
    """Return the path that a URL file:///PATH names (RFC 8089), of what is none the name itself.

    Raises BadSample where it names another machine."""
    if not is_file_url(name):
        return name
    host, slash, path = name[len(FILE) :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise BadSample(f"{brief(name)} names a file of another machine: write file:///PATH, with three slashes")
    return unquote(slash + path, errors="surrogateescape")


class _Host(RemoteSource):
    """All files of one server, or of one bucket; a file's name may have a query."""

    def __init__(self, start: str, *, retries: int, timeout_s: float) -> None:
        super().__init__(start, retries=retries, timeout_s=timeout_s)
        weakref.finalize(self, _hang_up, self._connections).atexit = False

    def location(self, name: str) -> str:
        """Return the file's URL without secrets, for messages."""
        return public_url(f"{self.place}/{name}")


def _hang_up(connections: dict[int, Any]) -> None:
    """End the connections that this process has by HTTP, when nobody uses them any more: fsspec's own end of them waits
    for the collector of circles."""
    from fsspec.implementations.http import HTTPFileSystem  # takes a second to import, and --help waits

    connection = connections.get(os.getpid())
    session = getattr(connection and connection.filesystem, "_session", None)
    if connection is not None and isinstance(connection.filesystem, HTTPFileSystem) and session is not None:
        connection.filesystem.close_session(connection.filesystem.loop, session)


@functools.lru_cache(MOST_HOSTS)
def _host(start: str, retries: int, timeout_s: float) -> _Host:
    """Return a server's files; whoever reads from one that is forgotten ends that first."""
    return _Host(start, retries=retries, timeout_s=timeout_s)


def _split(url: str) -> tuple[str, str]:
    """Return the server or bucket of a URL, and the rest."""
    protocol, _, rest = url.partition("://")
    host, _, name = rest.partition("/")
    return f"{protocol.lower()}://{host}", name


@dataclass(frozen=True)
class UrlBytes:
    """The bytes behind a URL, which are taken not to change while it is the same."""

    url: str
    retries: int
    timeout_s: float

    def size(self) -> int:
        """Return what a picture usually has."""
        return USUAL_BYTES

    def identity(self) -> str:
        """Return the URL: to read all pictures again would take as long as to pack them."""
        return self.url

    def read(self) -> bytes:
        """Return the bytes. Raises BadSample, naming the URL without secrets, when they cannot be had."""
        start, name = _split(self.url)
        try:
            return _host(start, self.retries, self.timeout_s).read(name, MOST_FILE_BYTES)
        except BadInput as error:
            raise BadSample(reason(error)) from None


def reason(error: BadInput) -> str:
    """Return what was wrong with a source, without what to do where a run of training reads it."""
    return str(error).partition(": check ")[0].replace("could not be read in", "was not read in")


def key_of(url: str) -> str:
    """Return the key of a picture by URL: its name, and a hash of the whole URL."""
    stem = posixpath.splitext(posixpath.basename(public_url(url)))[0]
    return f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:16]}".lstrip("-")


def joined(table: str, path: str) -> str:
    """Return the URL of a picture that a table at a URL names by its path, or by a URL of its own.

    The path is a file's name as it stands: by HTTP, what is no part of a URL's path, such as %, # and ?, is quoted."""
    if is_url(path):
        return path
    start, name = _split(table)
    plain = quote(path, errors="surrogatepass") if start.startswith("http") else path
    return f"{start}/{posixpath.join(posixpath.dirname(name.partition('?')[0]), plain).lstrip('/')}"


def fetch(url: str, folder: Path, retries: int, timeout_s: float) -> Path:
    """Bring the file at a URL into a folder and return its path. Raises BadInput when it cannot be had."""
    start, name = _split(url)
    host, file_name = _host(start, retries, timeout_s), posixpath.basename(name.partition("?")[0])
    if not file_name:
        raise BadInput(f"{public_url(url)} names no file: give that of a table, such as https://HOST/table.csv")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name
    try:
        host.copy(name, path)
    except NoRoom:
        raise
    except BadInput as error:
        raise BadInput(f"{reason(error)}: check the URL, or raise --retries or --timeout-s") from None
    return path
