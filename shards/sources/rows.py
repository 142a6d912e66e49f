"""The rows of a table: CSV, TSV, JSONL or Parquet, read one after the other.

Rows count as an editor shows them: a CSV's header is row 1. What is no row comes as the BadSample that says why, so
that the caller can leave it out."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput, BadSample, shown
from cmgan_dist.files import parse_json_once

Row = dict[str, Any] | BadSample
"""Column -> value; or why it is no row."""
Numbered = Iterator[tuple[int, Row]]
PARQUET_ROWS = 64
"""Rows of a Parquet file in memory at a time: they may hold pictures."""
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


def column_names(path: Path) -> list[str]:
    """Return the columns of a table, in their order; of JSONL, the fields that any row has.

    Raises BadInput when the file is missing, of another kind, not UTF-8 or damaged, or has a column twice."""
    if path.suffix.lower() not in ENDINGS:
        raise BadInput(f"{path} is not a table that can be read: expected {', '.join(ENDINGS)}")
    if not path.is_file():
        raise BadInput(f"table {path} does not exist")
    with _naming_damage(path):
        names = _names(path)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadInput(f"{path} has two columns '{shown(twice[0])}': rename one")
    return names


def read_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, Row]]:
    """Give (how a message names the row, row) of each row that is not empty, with `columns` at least.

    Raises BadInput when the file is not UTF-8 or damaged."""
    kind = path.suffix.lower()
    with _naming_damage(path):
        rows = _csv(path) if kind in (".csv", ".tsv") else _jsonl(path) if kind == ".jsonl" else _parquet(path, columns)
        for number, row in rows:
            yield f"row {number}", row


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn what is raised at a damaged table into BadInput."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise BadInput(f"{path} is not a whole table ({error})") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise BadInput(f"{path} cannot be read ({error.strerror})") from None
        raise BadInput(f"{path} is not a whole Parquet file ({shown(str(error))})") from None


def _names(path: Path) -> list[str]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.ParquetFile(path).schema_arrow.names)
    if kind == ".jsonl":
        return list(dict.fromkeys(name for _, row in _jsonl(path) if isinstance(row, dict) for name in row))
    return next((fields for _, fields in _fields(path)), [])


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Give (number, fields) of the rows of a CSV or TSV, the header too."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, fields in enumerate(csv.reader(file, delimiter=delimiter, strict=True), start=1):
            if fields:
                yield number, fields


def _csv(path: Path) -> Numbered:
    rows = _fields(path)
    names = next(rows, (0, list[str]()))[1]
    for number, fields in rows:
        if len(fields) == len(names):
            yield number, dict(zip(names, fields, strict=True))
        else:
            advice = "put a text that holds the separator in quotes" if len(fields) > len(names) else "fill it up"
            yield number, BadSample(f"has {len(fields)} fields, the header has {len(names)}: {advice}")


def _jsonl(path: Path) -> Numbered:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _json_row(line)


def _json_row(line: str) -> Row:
    try:
        row = parse_json_once(line)
    except ValueError as error:
        return BadSample(f"is not JSON ({error})")
    return row if isinstance(row, dict) else BadSample("is not a JSON object")


def _parquet(path: Path, columns: list[str]) -> Numbered:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield number, row
