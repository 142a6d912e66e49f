"""The tables of a folder, and what the names of files and folders say of their rows: splits and partitions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from cmgan_dist.errors import BadInput
from shards.pairs import brief
from shards.sources.rows import COLUMNAR, ENDINGS
from shards.split_words import split_in

PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
"""The name of a folder that holds the rows with one value of a column (Hive's partitions)."""
NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Table:
    """A table, and what its path says of its rows."""

    path: Path
    split: str = ""
    """Of rows that name none; "" where no name says one."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Column -> value, of partitions."""
    folder: str = ""
    """Where its pictures are, relative to the folder of all tables: partitions hold none."""


def tables_of(path: Path) -> list[Table]:
    """Return the tables of a folder; a file is its own.

    A folder is what Hugging Face's ``save_to_disk`` or a data set's repository is (Arrow or Parquet files, named or put
    into folders by split), one that is partitioned into folders ``column=value``, or a picture folder with
    ``metadata.jsonl`` or ``.csv`` files. Raises BadInput where there is no table in it, or a column is named twice."""
    if not path.is_dir():
        return [Table(path)]
    found = [each for each in sorted(path.rglob("*")) if each.is_file() and not each.name.startswith((".", "cache-"))]
    tables = [each for each in found if each.suffix.lower() in COLUMNAR and each.stem != "metadata"]
    tables = tables or [each for each in found if each.stem == "metadata" and each.suffix.lower() in ENDINGS]
    if not tables:
        expected = ".parquet or .arrow files, or metadata.jsonl or .csv beside pictures"
        raise BadInput(f"{path} has no table: expected {expected}")
    return [_table(each, each.relative_to(path)) for each in tables]


def _table(path: Path, inside: Path) -> Table:
    plain = [name for name in inside.parts if not PARTITION.fullmatch(name) or name == inside.name]
    folder = Path(*plain[:-1]) if path.suffix.lower() in COLUMNAR else inside.parent
    return Table(path, split_in(plain), _partitions(path, inside.parent.parts), folder.as_posix())


def _partitions(path: Path, folders: Iterable[str]) -> dict[str, str | None]:
    """Return column -> value of the rows below folders."""
    columns: dict[str, str | None] = {}
    for match in filter(None, map(PARTITION.fullmatch, folders)):
        name, value = (unquote(part, errors="surrogateescape") for part in match.groups())
        if name in columns:
            raise BadInput(f"{path} lies in two partitions of column '{brief(name)}': rename one of these folders")
        columns[name] = None if value == NULL else value
    return columns


def check_partitions(table: Table, names: list[str]) -> None:
    """Raise BadInput when a table has itself a column (one of `names`) that a folder above it gives a value."""
    twice = [name for name in table.columns if name in names]
    if twice:
        raise BadInput(
            f"{table.path} has a column '{brief(twice[0])}', for which a folder above it names a value: rename one"
        )
