"""What is done: beside each file that a job makes lies a record of it, which is written last.

A job that begins writes a record that is not finished yet. A file beside such a record is the job's own, but nobody
knows whether it is whole, so it is made anew."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmgan_dist.files import parse_sealed, sealed_json, sha256_of, write_atomic

VERSION = 1
WRITTEN = {"name", "samples", "bytes", "sha256"}
"""What a record says of a file that was written."""


@dataclass(frozen=True)
class Record:
    """What one file was made from, how, and what was written."""

    source: str
    """SHA-256 of what the file is made from."""
    settings: dict[str, Any]
    """What decides the file's bytes beside its source, as JSON holds it; equal settings compare equal."""
    finished: bool = False
    """Whether the job ended."""
    written: dict[str, Any] | None = None
    """`WRITTEN` of the file; None when the source gave nothing to write."""
    left_out: list[str] = field(default_factory=list)
    """A line for each sample that was left out."""
    beside: list[dict[str, Any]] = field(default_factory=list)
    """`WRITTEN` of each other file that belongs to the one in `written`."""

    @property
    def files(self) -> list[dict[str, Any]]:
        """`WRITTEN` of every file that was written."""
        return ([] if self.written is None else [self.written]) + self.beside

    def is_of(self, source: str, settings: dict[str, Any]) -> bool:
        """Return whether the record is of a job with this source and these settings."""
        return (self.source, self.settings) == (source, settings)


def parse(text: str | bytes) -> Record | None:
    """Return the record in the text of a file, None when it is no record, or a byte of it has changed."""
    try:
        record = Record(**parse_sealed(text, VERSION))
        known = all(isinstance(one, dict) and set(one) == WRITTEN for one in record.files)
    except (ValueError, TypeError):
        return None
    return record if known and isinstance(record.left_out, list) else None


def text_of(record: Record) -> str:
    """Return the text of a record's file; `parse` reads it."""
    return sealed_json({"version": VERSION, **asdict(record)})


def read(path: Path) -> Record | None:
    """Return the record at `path`, None when there is none or it is no record.

    Raises OSError when it is there and cannot be read."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None


def write(path: Path, record: Record) -> None:
    """Write a record: it is whole under its name or not there at all. Raises OSError when it cannot be written."""
    write_atomic(path, text_of(record))


def abandon(path: Path) -> None:
    """Remove the record of a job that failed; one that is finished, because another process ended the job, stays."""
    record = read(path)
    if record is None or not record.finished:
        path.unlink(missing_ok=True)


def is_done(record: Record, folder: Path) -> bool:
    """Return whether the job ended and what it wrote lies in `folder`, the same to the byte.

    Raises OSError when a file is there and cannot be read."""

    def is_whole(written: dict[str, Any]) -> bool:
        path = folder / written["name"]
        return path.stat().st_size == written["bytes"] and sha256_of(path) == written["sha256"]

    try:
        return record.finished and all(is_whole(written) for written in record.files)
    except FileNotFoundError:
        return False
