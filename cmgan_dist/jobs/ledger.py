"""What is done: beside each file that a job makes lies a record of it, which is written last.

A job that begins writes a record that is not finished yet. A file beside such a record is the job's own, but nobody
knows whether it is whole, so it is made anew."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cmgan_dist.files import parse_sealed, sealed_json

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
