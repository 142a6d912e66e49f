"""The tables of a folder, and what the names of files and folders say of their rows: splits and partitions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from cmgan_dist.data.folder import check_link, walk_files
from cmgan_dist.errors import BadInput
from shards.pairs import brief
from shards.sources.rows import COLUMNAR, ENDINGS
from shards.sources.saved_to_disk import listed_by_datasets
from shards.split_words import split_in

PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
"""The name of a folder that holds the rows with one value of a column (Hive's partitions)."""
LIKE_A_TABLE = re.compile(
    r"\.(csv|tsv|jsonl|ndjson|parquet|parq|pq|arrow|feather|ipc|orc|xlsx?)(\.(gz|bz2|xz|zst|zip))?$", re.IGNORECASE
)
"""How the name of a table ends, also of one in a format that is not read."""
MARK = re.compile(r"_[^.]*")
"""The name of a file that says how the writing of tables went, or what they hold: _SUCCESS, _metadata."""
MOST_SHOWN = 5
"""Names of what is passed over that a line shows."""
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


@dataclass(frozen=True)
class Tables:
    """The tables of a folder that are read, and what is not."""

    read: list[Table]
    passed: str = ""
    """What lies in the folder too and is not read, in one line; "" where there is nothing."""


def tables_of(path: Path) -> Tables:
    """Return the tables of a folder, linked folders too; a file is its own.

    A folder is what Hugging Face's ``save_to_disk`` or a data set's repository is (Arrow or Parquet files, named or put
    into folders by split), one that is partitioned into folders ``column=value``, or a picture folder with
    ``metadata.jsonl`` or ``.csv`` files. Raises BadInput where there is no table in it, a link leads nowhere, a folder
    or what ``save_to_disk`` wrote beside its tables cannot be read, a table stands there in two formats, or a column is
    named twice."""
    if not path.is_dir():
        return Tables([Table(path)])
    found, marks, hidden = _files(path)
    meant = [each for each in found if not _is_cache(each)]
    tables = [each for each in meant if each.suffix.lower() in COLUMNAR and each.stem != "metadata"]
    tables = tables or [each for each in meant if each.stem == "metadata" and each.suffix.lower() in ENDINGS]
    tables = listed_by_datasets(path, tables)
    passed = _say_passed([str(each.relative_to(path)) for each in sorted({*found} - {*tables})] + marks, hidden)
    if not tables:
        expected = ".parquet or .arrow files, or metadata.jsonl or .csv beside pictures"
        way = f" ({passed}: name one of these itself, or write it anew)" if passed else ""
        raise BadInput(f"{path} has no table: expected {expected}{way}")
    _check_formats(tables)
    return Tables([_table(each, each.relative_to(path)) for each in tables], passed)


def _files(top: Path) -> tuple[list[Path], list[str], list[str]]:
    """Return the files that are like tables, sorted, the marks that Spark leaves beside them, and what is hidden,
    folders with "/" at their end, in and below a folder. Raises BadInput at a link to a table, or what may have been a
    folder, that leads nowhere."""
    others: list[str] = []
    hidden: list[str] = []
    names = walk_files(top, [ending[1:] for ending in ENDINGS], others, hidden)
    others = [name for name in others if LIKE_A_TABLE.search(name) or not PurePosixPath(name).suffix]
    found = sorted(top / name for name in [*names, *others])
    for each in found:
        check_link(each)
    marks = [name for name in others if MARK.fullmatch(PurePosixPath(name).name)]
    return [each for each in found if LIKE_A_TABLE.search(each.name)], marks, hidden


def _is_cache(path: Path) -> bool:
    """Return whether a file is what ``datasets`` leaves beside its tables when it maps or filters them."""
    return path.name.startswith("cache-") and path.suffix.lower() == ".arrow"


def _check_formats(tables: list[Path]) -> None:
    """Raise BadInput at two tables with one name before their endings: one may be the other in another format."""
    first: dict[Path, Path] = {}
    for table in tables:
        other = first.setdefault(table.with_suffix(""), table)
        if other != table:
            raise BadInput(f"{other} and {table.name} beside it may be one table in two formats: remove or rename one")


def _say_passed(files: list[str], hidden: list[str]) -> str:
    """Return which files, and which of what is `hidden`, are not read, and how many."""
    folders = [name.removesuffix("/") for name in hidden if name.endswith("/")]
    kinds = {
        "hidden folders": folders,
        "hidden files": [name for name in hidden if not name.endswith("/")],
        "other files": files,
    }
    parts = [f"{what} ({len(names)}): {_some(names)}" for what, names in kinds.items() if names]
    return f"passed over: {'; '.join(parts)}" if parts else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_SHOWN]) + (f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else "")


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
