"""The rows of Parquet and Arrow files, of which a bounded number of bytes is in memory, however long they are.

Rows may share a value that the file holds once, in a dictionary: a long text or a picture that stands in all of them.
Each row that is read has it anew, so how many are read at a time goes by the longest value that a row can have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import check_regular, parse_json, parse_json_once
from shards.pairs import brief


class ClassName(str):
    """The name of a class that a number in a file stands for: it is taken whole, whatever it holds."""


class ShortFloat(float):
    """A number of a column of 16 or 32 bits, which tells fewer whole numbers apart than a float of Python."""

    exact_bits: int
    """It is exact below 2 to the power of this."""


Row = dict[str, Any] | BadSample
"""Column -> value; or why it is no row."""
Numbered = Iterator[tuple[int, Row]]
COLUMNAR = (".parquet", ".arrow", ".feather")
"""Those that know their columns, and where they are Hugging Face's the names of classes."""
BATCH_ROWS = 16
"""Most rows in memory at a time: they may hold pictures."""
BATCH_BYTES = 32 << 20
"""What these may take, where they are more than one row."""
CHUNK_BYTES = BATCH_BYTES // BATCH_ROWS
"""A column of fewer in a row group has no longer value."""
READ_BYTES = 1 << 20
"""What is read of a column at a time."""
ARROW_FILE = b"ARROW1"
"""First bytes of Arrow's file format; else it is a stream of batches."""


@dataclass(frozen=True)
class Head:
    """What a table says of its rows before they are read."""

    names: list[str]
    """Of its columns."""
    rows: int
    """About how many there are."""
    labels: dict[str, Literal["names", "numbers"]] = field(default_factory=dict)
    """Column -> whether it has numbers with the names of their classes, or numbers alone; without those of texts."""


def columnar_head(path: Path) -> Head:
    """Return what a file says of its rows. Raises what pyarrow does at one that is damaged, and BadInput."""
    with _batches(path) as (schema, rows, _):
        named = _class_names(path, schema)
        forms: dict[str, Literal["names", "numbers"]] = {each.name: "numbers" for each in schema if _is_number(each)}
        return Head(list(schema.names), rows, forms | {name: "names" for name in named if name in schema.names})


def _is_number(column: Any) -> bool:
    import pyarrow.types as kinds

    kind = _inner(column.type)
    return bool(kinds.is_integer(kind) or kinds.is_floating(kind))


def columnar_rows(path: Path, columns: list[str]) -> Numbered:
    """Give (number from 1, row) of each row of a file, with those of `columns` that it has.

    Raises what pyarrow does at a file that is damaged, and BadInput."""
    number = 0
    with _batches(path) as (schema, _, batches):
        named, encoded, short = _class_names(path, schema), _json_columns(schema), _short_floats(schema)
        for batch in batches([column for column in columns if column in schema.names]):
            for row in _python_rows(batch):
                number += 1
                if named and isinstance(row, dict):
                    row = {column: _named(value, named.get(column)) for column, value in row.items()}
                if short and isinstance(row, dict):
                    row = {column: _shortened(value, short.get(column)) for column, value in row.items()}
                yield number, _decoded(row, encoded)


# ---------------------------------------------------------------------------------------------- batches


@contextlib.contextmanager
def _batches(path: Path) -> Iterator[tuple[Any, int, Callable[[list[str]], Iterator[Any]]]]:
    """Give the schema of a Parquet or Arrow file, about how many rows it has, and what reads its batches of some
    columns."""
    import pyarrow
    import pyarrow.parquet

    check_regular(path)
    if path.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as file:
            yield file.schema_arrow, file.metadata.num_rows, lambda columns: _parquet_batches(path, file, columns)
        return
    with pyarrow.memory_map(str(path)) as memory, _opened_arrow(memory) as (schema, whole):

        def batches(columns: list[str]) -> Iterator[Any]:
            for batch in whole:
                chosen = batch.select(columns)
                yield from (chosen.slice(at, BATCH_ROWS) for at in range(0, len(chosen), BATCH_ROWS))

        yield schema, guessed_rows(path), batches


def guessed_rows(path: Path) -> int:
    """Return about how many rows a table has that does not say it: one for each 100 bytes."""
    return path.stat().st_size // 100


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


def _parquet_batches(path: Path, file: Any, columns: list[str]) -> Iterator[Any]:
    """Give the batches of a Parquet file, row group by row group."""
    for group in range(file.num_row_groups):
        rows = _rows_at_a_time(path, file.metadata, group, columns)
        yield from file.iter_batches(batch_size=rows, row_groups=[group], columns=columns)


def _rows_at_a_time(path: Path, metadata: Any, group: int, columns: list[str]) -> int:
    """Return how many rows of a row group are read at a time, by the longest values that its columns may repeat."""
    import pyarrow.parquet

    chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    long = [
        chunk
        for chunk in chunks
        if chunk.physical_type == "BYTE_ARRAY"
        and chunk.total_uncompressed_size > CHUNK_BYTES
        and any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns)
    ]
    if not long:
        return BATCH_ROWS
    longest = sum(chunk.total_uncompressed_size for chunk in long if "DELTA_BYTE_ARRAY" in chunk.encodings)
    names = [chunk.path_in_schema for chunk in long if "DELTA_BYTE_ARRAY" not in chunk.encodings]
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": READ_BYTES, "metadata": metadata}
    with pyarrow.parquet.ParquetFile(path, read_dictionary=names, **options) as file:
        for first in file.iter_batches(batch_size=1, row_groups=[group], columns=names):
            longest += sum(map(_longest, first.columns))
            break
    each = max(-(-chunk.num_values // metadata.row_group(group).num_rows) for chunk in long)  # of lists, in a row
    return min(max(BATCH_BYTES // max(longest * each, 1), 1), BATCH_ROWS)


def _longest(array: Any) -> int:
    """Return the bytes of the longest value of the dictionaries in an array: of a row group's first batch, these hold
    what any row of it may repeat."""
    import pyarrow.compute
    import pyarrow.types as kinds

    if kinds.is_dictionary(array.type):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return int(pyarrow.compute.max(lengths).as_py() or 0)
    if kinds.is_struct(array.type):
        return sum(map(_longest, array.flatten()))
    return _longest(array.values) if hasattr(array, "values") else 0


# ---------------------------------------------------------------------------------------------- values


def _python_rows(batch: Any) -> Iterator[Row]:
    """Yield the rows of a batch, of a large one each by itself; one with a value that Python does not have comes as a
    BadSample."""
    rows: list[Row] | None = None
    if batch.nbytes <= CHUNK_BYTES:
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
            yield BadSample(f"has a value that cannot be read ({brief(str(error), 200)}): write it as a text")
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
            raise BadInput(f"{path} has no list of class names for column '{brief(name)}': write it anew by datasets")
    return found


def _json_columns(schema: Any) -> list[str]:
    """Return the columns whose texts are JSON, as Hugging Face's datasets writes values of several kinds."""
    return [field.name for field in schema if getattr(_inner(field.type), "extension_name", "") == "arrow.json"]


def _short_floats(schema: Any) -> dict[str, int]:
    """Return column -> bits of the whole numbers that it tells apart, of columns of floats of 16 and 32 bits."""
    bits = {"halffloat": 11, "float": 24}
    found = {field.name: bits.get(str(_inner(field.type))) for field in schema}
    return {name: exact for name, exact in found.items() if exact is not None}


def _shortened(value: Any, bits: int | None) -> Any:
    if bits is None or value is None:
        return value
    if isinstance(value, list):
        return [_shortened(each, bits) for each in value]
    short = ShortFloat(value)
    short.exact_bits = bits
    return short


def _inner(kind: Any) -> Any:
    """Return the type of a column's values, or of the items of its lists."""
    import pyarrow.types as kinds

    while (
        kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind) or kinds.is_dictionary(kind)
    ):
        kind = kind.value_type
    return kind


def _decoded(row: Row, encoded: list[str]) -> Row:
    """Return a row with the values of JSON columns as they are; a BadSample where one is no JSON."""
    if isinstance(row, BadSample) or not encoded:
        return row
    try:
        return {column: _from_json(value) if column in encoded else value for column, value in row.items()}
    except ValueError as error:
        return BadSample(f"has a value that is not JSON ({brief(str(error), 200)}): write the table anew by datasets")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    return parse_json_once(value) if isinstance(value, str) else value


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
    return ClassName(names[value]) if isinstance(value, int) and 0 <= value < len(names) else None
