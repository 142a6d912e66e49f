"""What is done: beside each file that a job makes lies a record of it, which is written last.

A job that begins writes a record that is not finished yet. A file beside such a record is the job's own, but nobody
knows whether it is whole, so it is made anew."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmgan_dist.files import sha256_of, write_atomic

WRITTEN = {"name", "samples", "bytes", "sha256"}
"""What a record says of the file that was written."""


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

    def is_of(self, source: str, settings: dict[str, Any]) -> bool:
        """Return whether the record is of a job with this source and these settings."""
        return (self.source, self.settings) == (source, settings)


def read(path: Path) -> Record | None:
    """Return the record at `path`, None when there is none or it is no record."""
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    written_is_known = record.written is None or (isinstance(record.written, dict) and set(record.written) == WRITTEN)
    return record if written_is_known and isinstance(record.left_out, list) else None


def write(path: Path, record: Record) -> None:
    """Write a record: it is whole under its name or not there at all. Raises OSError when it cannot be written."""
    write_atomic(path, json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


def abandon(path: Path) -> None:
    """Remove the record of a job that failed; one that is finished, because another process ended the job, stays."""
    record = read(path)
    if record is None or not record.finished:
        path.unlink(missing_ok=True)


def is_done(record: Record, folder: Path) -> bool:
    """Return whether the job ended and what it wrote lies in `folder`, the same to the byte.

    Raises OSError when the file is there and cannot be read."""
    if not record.finished or record.written is None:
        return record.finished
    path = folder / record.written["name"]
    try:
        return path.stat().st_size == record.written["bytes"] and sha256_of(path) == record.written["sha256"]
    except FileNotFoundError:
        return False
