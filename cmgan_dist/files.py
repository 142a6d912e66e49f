"""Files that are whole or not there, and what is in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

LATER = ".new"
"""Ending of a file that is written and waits for the record that names it, see `commit_files`."""


class NotRegular(OSError):
    """A pipe, a device, a socket or a folder is in the place of a file."""


def open_descriptor(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Return a descriptor for reading a regular file; a pipe or a device is not waited for.

    `follow`: whether the path may be a symbolic link. Raises OSError, NotRegular where it is another kind of file."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    other = NotRegular(errno.EINVAL, "it is a pipe, a device or a socket, and no file", os.fspath(path))
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise other if error.errno == errno.ENXIO else error from None  # so is a socket told
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise NotRegular(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise other


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> BinaryIO:
    """Open a file that is read, by whatever it is read: see `open_descriptor`."""
    return open(open_descriptor(path, follow=follow), "rb")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless a path is a regular file that can be opened: before a library opens it by its name."""
    os.close(open_descriptor(path))


_HANDED = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Paths of what a process was started with open; a shell's <(...) is one."""


def open_once(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that is read once, which may be a pipe that the process was handed: its other end is open.

    Raises OSError."""
    handed = os.fspath(path).startswith(_HANDED)
    return open(path, "rb") if handed else open_regular(path)


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds. Raises ValueError when it is not JSON, not UTF-8, or nested without bound."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:  # whose own words are the whole file
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)!r} twice")
    return found


_once = json.JSONDecoder(object_pairs_hook=_fields_once)


def parse_json_once(text: str | bytes) -> Any:
    """Return what a JSON text holds. Raises ValueError when it is none or not UTF-8, is nested without bound, or has an
    object with a field twice, of which only the last would be seen."""
    try:
        return _once.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sealed_json(record: Mapping[str, Any]) -> str:
    """Return a JSON text of `record` that carries a checksum of itself, as "sha256"; `parse_sealed` reads it.

    What is no Unicode, as of file names that are not UTF-8, comes as JSON's own escape."""
    text = json.dumps({**record, "sha256": _record_sha256(record)}, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def parse_sealed(text: str | bytes, version: int) -> dict[str, Any]:
    """Return the record in a text of `sealed_json`, without its "version", which must be `version`.

    Raises OtherVersion when it has another, ValueError when the text is no such record or a byte of it has changed."""
    record = parse_json(text)
    if not isinstance(record, dict):
        raise ValueError("it holds no record")
    if record.get("version") != version:
        raise OtherVersion(record.get("version"))
    checksum = record.pop("sha256", None)
    if checksum != _record_sha256(record):
        raise ValueError("its checksum is another")
    del record["version"]
    return record


class OtherVersion(ValueError):
    """A file has another version than this program reads."""

    def __init__(self, version: object) -> None:
        """`version`: that of the file."""
        super().__init__(f"version {version!r}")
        self.version = version


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file, text as UTF-8, so that it is whole under its name or not there at all, after a crash too.

    The bytes are written aside, flushed to disk and renamed. Processes of several hosts may write one path at once:
    the last one wins. Missing folders are made. Raises OSError, leaving nothing behind, when writing fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def commit_files(folder: Path, record: str, text: str, names: Iterable[str]) -> None:
    """Make the files NAME.new of a folder its files NAME, in one step; they must be on disk. Raises OSError.

    The file `record` is replaced first. Its `text` has the checksums of the files, which tell whenever this is killed
    which of NAME and NAME.new belong to it; the next change must finish the renames before it writes a NAME.new."""
    write_atomic(folder / record, text)
    for name in names:
        os.replace(folder / (name + LATER), folder / name)


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where its file system can (else the kernel does in its own time)."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that know no fsync of folders
            raise
    finally:
        os.close(file)


def sha256_of(file: str | os.PathLike[str] | int) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal: of a path, or of an open descriptor from where it stands.

    Raises OSError when it cannot be read."""
    given = isinstance(file, int)
    with open(file if isinstance(file, int) else open_descriptor(file), "rb", closefd=not given) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
