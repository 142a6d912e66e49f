"""The rows of a table: CSV, TSV, JSONL, Parquet or Arrow, read one after the other.

Rows count as an editor shows them: a CSV's header is row 1. What is no row comes as the BadSample that says why, so
that the caller can leave it out."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cmgan_dist.data.sample import MOST_JSON_BYTES
from cmgan_dist.errors import BadInput, BadSample, shown
from cmgan_dist.files import check_regular, open_regular, parse_json, parse_json_once

Row = dict[str, Any] | BadSample
"""Column -> value; or why it is no row."""
Numbered = Iterator[tuple[int, Row]]
PARQUET_ROWS = 16
"""Rows of a Parquet file in memory at a time: they may hold pictures, or all one long text."""
COLUMNAR = (".parquet", ".arrow", ".feather")
"""Those that know their columns, and where they are Hugging Face's the names of classes."""
ENDINGS = (".csv", ".tsv", ".jsonl", *COLUMNAR)
LARGE_BATCH_BYTES = 64 << 20
"""A batch of more becomes Python's values a row at a time."""
MOST_LINE_CHARS = 2 * MOST_JSON_BYTES
"""Of a row of JSONL, the longest."""
ARROW_FILE = b"ARROW1"
"""First bytes of Arrow's file format; else it is a stream of batches."""


@dataclass(frozen=True)
class TextFormat:
    """How the text of a CSV, TSV or JSONL file is written."""

    delimiter: str = ""
    """Between the fields of a row; "" is a comma, and a tab in .tsv files."""
    encoding: str = "utf-8-sig"
    """A codec of Python; this one is UTF-8 with or without a mark at its beginning."""


def check_ending(name: str) -> None:
    """Raise BadInput unless a path, or a URL without its query, ends like a table."""
    if PurePosixPath(name).suffix.lower() not in ENDINGS:
        raise BadInput(f"{name} is not a table that can be read: expected {', '.join(ENDINGS)}")


def column_names(path: Path, text: TextFormat) -> list[str]:
    """Return the columns of a table, in their order; of JSONL, the fields that any row has.

    Raises BadInput when the file is missing, of another kind or encoding or damaged, or has a column twice."""
    check_ending(str(path))
    if not path.is_file():
        raise BadInput(f"table {path} {'is no file' if path.exists() else 'does not exist'}: name a file")
    with _naming_damage(path):
        names = _names(path, text)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadInput(f"{path} has two columns '{shown(twice[0])}': rename one")
    return names


def about_rows(path: Path) -> int:
    """Return about how many rows a table has: of Parquet as many as it says, else one for each 100 bytes.

    Raises BadInput when the file is damaged."""
    import pyarrow.parquet

    if path.suffix.lower() != ".parquet":
        return path.stat().st_size // 100
    with _naming_damage(path):
        return int(pyarrow.parquet.read_metadata(path).num_rows)


def read_rows(path: Path, columns: list[str], text: TextFormat) -> Iterator[tuple[str, Row]]:
    """Give (how a message names the row, row) of each row that is not empty, with `columns` at least.

    Raises BadInput when the file is of another encoding or damaged."""
    kind = path.suffix.lower()
    with _naming_damage(path):
        if kind in COLUMNAR:
            rows = _columnar(path, columns)
        else:
            rows = _jsonl(path, text) if kind == ".jsonl" else _csv(path, text)
        for number, row in rows:
            yield f"row {number}", row


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn what is raised at a damaged table into BadInput."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not {error.encoding.upper()} ({error.reason} at byte {error.start}): name its own by --encoding"
        ) from None
    except UnicodeError as error:  # as of UTF-16 without a mark of its byte order
        raise BadInput(f"{path} is not of its --encoding ({error}): name its own, as utf-16-le or utf-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise BadInput(f"{path} cannot be read ({error.strerror})") from None
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        raise BadInput(f"{path} is not a whole {kind} file ({shown(str(error))})") from None


def _names(path: Path, text: TextFormat) -> list[str]:
    kind = path.suffix.lower()
    if kind in COLUMNAR:
        with _batches(path) as (schema, _):
            return list(schema.names)
    if kind == ".jsonl":
        return list(dict.fromkeys(name for _, row in _jsonl(path, text) if isinstance(row, dict) for name in row))
    return next((fields for _, fields in _fields(path, text)), [])


def _fields(path: Path, text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    """Give (number, fields) of the rows of a CSV or TSV, the header too."""
    delimiter = text.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    csv.field_size_limit(MOST_JSON_BYTES)  # of all readers; the judge of samples has narrower ones
    with io.TextIOWrapper(open_regular(path), text.encoding, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        for number in itertools.count(1):
            line = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise _no_row(f"row {number} of {path}, from line {line} on,", str(error)) from None
            if fields:
                yield number, fields


def _no_row(where: str, said: str) -> BadInput:
    """Return what is wrong with a row at which a CSV reader ends, in which all that follows may lie."""
    if "field limit" in said:
        return BadInput(
            f"{where} has a field of more than {MOST_JSON_BYTES} characters: shorten it, or close its quote"
        )
    if "unexpected end" in said:
        return BadInput(f"{where} is not whole ({said}): close the quote that opens there")
    return BadInput(f"{where} is not whole ({said}): write a quote inside a text twice, in a text that is in quotes")


def _csv(path: Path, text: TextFormat) -> Numbered:
    rows = _fields(path, text)
    names = next(rows, (0, list[str]()))[1]
    for number, fields in rows:
        if len(fields) == len(names):
            yield number, dict(zip(names, fields, strict=True))
        else:
            advice = "put a text that holds the separator in quotes" if len(fields) > len(names) else "fill it up"
            yield number, BadSample(f"has {len(fields)} fields, the header has {len(names)}: {advice}")


def _jsonl(path: Path, text: TextFormat) -> Numbered:
    with io.TextIOWrapper(open_regular(path), text.encoding) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_CHARS), ""), start=1):
            if len(line) == MOST_LINE_CHARS and not line.endswith("\n"):
                while line and not line.endswith("\n"):  # on to the next row
                    line = file.readline(MOST_LINE_CHARS)
                yield number, BadSample(f"has {MOST_LINE_CHARS} characters or more: shorten its texts")
            elif line.strip():
                yield number, _json_row(line)


def _json_row(line: str) -> Row:
    try:
        row = parse_json_once(line)
    except ValueError as error:
        return BadSample(f"is not JSON ({error})")
    return row if isinstance(row, dict) else BadSample("is not a JSON object")


@contextlib.contextmanager
def _batches(path: Path) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
    """Give the schema of a Parquet or Arrow file, and what reads its batches of some columns."""
    import pyarrow
    import pyarrow.parquet

    check_regular(path)
    if path.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file.schema_arrow, lambda columns: file.iter_batches(batch_size=PARQUET_ROWS, columns=columns)
        return
    with pyarrow.memory_map(str(path)) as memory, _opened_arrow(memory) as (schema, whole):

        def batches(columns: list[str]) -> Iterator[Any]:
            for batch in whole:
                chosen = batch.select(columns)
                yield from (chosen.slice(at, PARQUET_ROWS) for at in range(0, len(chosen), PARQUET_ROWS))

        yield schema, batches


@contextlib.contextmanager
def _opened_arrow(memory: Any) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Give the schema and the batches of an Arrow file, in either of its formats."""
    import pyarrow

    is_file = memory.read(len(ARROW_FILE)) == ARROW_FILE
    memory.seek(0)
    if is_file:
        with pyarrow.ipc.open_file(memory) as file:
            yield file.schema, map(file.get_batch, range(file.num_record_batches))
    else:
        with pyarrow.ipc.open_stream(memory) as stream:
            yield stream.schema, iter(stream)


def _columnar(path: Path, columns: list[str]) -> Numbered:
    number = 0
    with _batches(path) as (schema, batches):
        named = _class_names(path, schema)
        for batch in batches([column for column in columns if column in schema.names]):
            for row in _python_rows(batch):
                number += 1
                if named and isinstance(row, dict):
                    row = {column: _named(value, named.get(column)) for column, value in row.items()}
                yield number, row


def _python_rows(batch: Any) -> Iterator[Row]:
    """Yield the rows of a batch, of a large one each by itself; one with a value that Python does not have comes as a
    BadSample."""
    rows: list[Row] | None = None
    if batch.nbytes <= LARGE_BATCH_BYTES:
        with contextlib.suppress(ValueError, OverflowError):  # then its rows are read singly
            rows = batch.to_pylist()
    if rows is not None:
        yield from rows
        return
    for i in range(len(batch)):
        try:
            row = batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadSample(f"has a text that is not UTF-8 ({error.reason}): write the table anew from texts in UTF-8")
        except (OverflowError, ValueError) as error:
            yield BadSample(f"has a value that cannot be read ({shown(str(error))}): write it as a text")
        else:
            yield row


def _class_names(path: Path, schema: Any) -> dict[str, list[str]]:
    """Return column -> names of its classes, where Hugging Face's datasets wrote numbers for them (ClassLabel)."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        inner = {name: _of_an_item(made) for name, made in features.items()}
        found = {name: made["names"] for name, made in inner.items() if made.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    for name, names in found.items():
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise BadInput(f"{path} has no list of class names for column '{shown(name)}': write it anew by datasets")
    return found


def _of_an_item(made: Any) -> dict[str, Any]:
    """Return how a column is made, or the items of its lists, which are written as [item] or {"feature": item}."""
    while (isinstance(made, list) and len(made) == 1) or (isinstance(made, dict) and "feature" in made):
        made = made[0] if isinstance(made, list) else made["feature"]
    return made if isinstance(made, dict) else {}


def _named(value: Any, names: list[str] | None) -> Any:
    """Return the names of the classes that a cell numbers; None for one that has no name, such as -1, no label."""
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
