"""The rows of a table: CSV, TSV, JSONL, Parquet or Arrow, read one after the other.

Rows count as an editor shows them: a CSV's header is row 1. What is no row comes as the BadSample that says why, so
that the caller can leave it out."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cmgan_dist.data.sample import MOST_JSON_BYTES
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import open_regular, parse_json_once
from shards.pairs import brief
from shards.sources.columnar import COLUMNAR, Head, Numbered, Row, columnar_head, columnar_rows, guessed_rows

ENDINGS = (".csv", ".tsv", ".jsonl", *COLUMNAR)
UNQUOTED = "--quoting none where quotes are part of texts"
"""What to do about quotes that stand for nothing else."""
MOST_LINE_CHARS = 2 * MOST_JSON_BYTES
"""Of a row of JSONL, the longest."""


@dataclass(frozen=True)
class TextFormat:
    """How the text of a CSV, TSV or JSONL file is written."""

    delimiter: str = ""
    """Between the fields of a row; "" is a comma, and a tab in .tsv files."""
    encoding: str = "utf-8-sig"
    """A codec of Python; this one is UTF-8 with or without a mark at its beginning."""
    quoted: bool = True
    """Whether quotes stand around fields; else they are part of them."""


def check_ending(name: str) -> None:
    """Raise BadInput unless a path, or a URL without its query, ends like a table."""
    if PurePosixPath(name).suffix.lower() not in ENDINGS:
        raise BadInput(f"{name} is not a table that can be read: expected {', '.join(ENDINGS)}")


def head_of(path: Path, text: TextFormat) -> Head:
    """Return what a table says of its rows, with its columns in their order; of JSONL, the fields that any row has.

    Raises BadInput when the file is missing, of another kind or encoding or damaged, or has a column twice."""
    check_ending(str(path))
    if not path.is_file():
        raise BadInput(f"table {path} {'is no file' if path.exists() else 'does not exist'}: name a file")
    with _naming_damage(path):
        head = columnar_head(path) if path.suffix.lower() in COLUMNAR else Head(_names(path, text), guessed_rows(path))
    twice = [name for name, count in Counter(head.names).items() if count > 1]
    if twice and not twice[0].strip():
        places = [str(number) for number, name in enumerate(head.names, 1) if name == twice[0]]
        raise BadInput(
            f"{path} has no name for its columns {', '.join(places[:-1])} and {places[-1]}: give each its own, or "
            "remove those columns"
        )
    if twice:
        raise BadInput(f"{path} has two columns '{brief(twice[0])}': rename one")
    return head


def check_label_forms(heads: list[tuple[Path, Head]], column: str) -> None:
    """Raise BadInput where a column has numbers of classes, in some tables with their names and in others without: a
    number and a name may be one class."""
    first: dict[str, Path] = {}
    for path, head in heads:
        if column in head.labels:
            first.setdefault(head.labels[column], path)
    if {"names", "numbers"} <= first.keys():
        raise BadInput(
            f"column '{brief(column)}' has names of classes in {first['names']} and numbers alone in "
            f"{first['numbers']}: write both with names, or pass --label-column '' for no labels"
        )


def read_rows(path: Path, columns: list[str], text: TextFormat) -> Iterator[tuple[str, Row]]:
    """Give (how a message names the row, row) of each row that is not empty, with `columns` at least.

    Raises BadInput when the file is of another encoding or damaged."""
    kind = path.suffix.lower()
    with _naming_damage(path):
        if kind in COLUMNAR:
            rows = columnar_rows(path, columns)
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
        raise BadInput(f"{path} is not a whole {kind} file ({brief(str(error), 200)})") from None


def _names(path: Path, text: TextFormat) -> list[str]:
    """Return the columns of a table of text."""
    if path.suffix.lower() == ".jsonl":
        return list(dict.fromkeys(name for _, row in _jsonl(path, text) if isinstance(row, dict) for name in row))
    return next((fields for _, fields in _fields(path, text)), [])


def _fields(path: Path, text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    """Give (number, fields) of the rows of a CSV or TSV, the header too."""
    delimiter = text.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    csv.field_size_limit(MOST_JSON_BYTES)  # of all readers; the judge of samples has narrower ones
    with io.TextIOWrapper(open_regular(path), text.encoding, newline="") as file:
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if text.quoted else csv.QUOTE_NONE
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        width = 0
        for number in itertools.count(1):
            line = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise _no_row(f"row {number} of {path}, from line {line} on,", str(error)) from None
            width = width or len(fields)
            if any(_swallows(fields, at, delimiter, width) for at in range(len(fields))):
                raise BadInput(
                    f"row {number} of {path} goes from line {line} to {rows.line_num} between two quotes, and a line "
                    f"in it looks like a row: pass {UNQUOTED}, or write that text in one line"
                )
            if fields:
                yield number, fields


def _swallows(fields: list[str], at: int, delimiter: str, width: int) -> bool:
    """Return whether field `at` has several lines of which one is a row, or the first and the last are with what stands
    beside them: a quote that was not meant as one has swallowed rows. Of tabs, any in such a field."""
    if "\n" not in fields[at] or delimiter not in fields[at]:
        return False
    first, *inner, last = fields[at].split("\n")

    def is_row(line: str, beside: int = 0) -> bool:
        parts = line.split(delimiter)
        return 1 < len(parts) == width - beside and not any(part[:1] in ("", " ") for part in parts)

    ends = is_row(first, at) and is_row(last, len(fields) - at - 1)
    return delimiter == "\t" or ends or any(map(is_row, inner))


def _no_row(where: str, said: str) -> BadInput:
    """Return what is wrong with a row at which a CSV reader ends, in which all that follows may lie."""
    if "field limit" in said:
        return BadInput(
            f"{where} has a field of more than {MOST_JSON_BYTES} characters: shorten it, or close its quote"
        )
    if "unexpected end" in said:
        return BadInput(f"{where} is not whole ({said}): close the quote that opens there, or pass {UNQUOTED}")
    way = f"write a quote inside a text twice, in a text that is in quotes, or pass {UNQUOTED}"
    return BadInput(f"{where} is not whole ({said}): {way}")


def _csv(path: Path, text: TextFormat) -> Numbered:
    rows = _fields(path, text)
    names = next(rows, (0, list[str]()))[1]
    for number, fields in rows:
        if len(fields) == len(names):
            yield number, dict(zip(names, fields, strict=True))
        else:
            split = "put a text that holds the separator in quotes"
            split += "" if text.quoted else ", and leave --quoting none away"
            advice = split if len(fields) > len(names) else "fill it up"
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
        return BadSample(f"is not JSON ({brief(str(error), 200)})")
    return row if isinstance(row, dict) else BadSample("is not a JSON object")
