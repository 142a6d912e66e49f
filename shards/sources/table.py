"""A table with a row for each image and text: CSV, TSV, JSONL, Parquet or Arrow, or a folder of them.

Columns: the image's path (relative to the table) or the picture itself, its text, and, if there are any, its label and
split. Rows with the same image become several captions of one sample. A label is a class name; several are separated by
``|`` or stand in a JSON list."""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from cmgan_dist.data.manifest import LabelKind, natural_splits
from cmgan_dist.data.sample import IMAGE_EXTENSIONS
from cmgan_dist.data.source import public_url
from cmgan_dist.errors import BadInput, BadSample, reasons_of, shown
from cmgan_dist.files import sha256_of
from cmgan_dist.jobs.cores import usable_cores
from cmgan_dist.jobs.local import parallel_map
from shards.pack import DrawCommand
from shards.pairs import RawPair, RawPairs, Readable, brief, make_key, missing_val, say_splits
from shards.partitions import Partitions, partitions_for
from shards.shard_file import try_sample
from shards.sources.cells import Picture, as_labels, as_picture, as_split, as_texts
from shards.sources.class_names import (
    check_classes,
    check_spelling,
    class_order,
    count_missing,
    say_classes,
    say_missing,
    say_missing_texts,
)
from shards.sources.columnar import Head
from shards.sources.files import PlainFile, check_names, check_unicode, plain_path
from shards.sources.rows import Row, TextFormat, check_ending, check_label_forms, head_of, read_rows
from shards.sources.table_folder import Table, Tables, check_partitions, tables_of
from shards.split_words import say_named_splits
from shards.urls import UrlBytes, fetch, is_file_url, is_url, joined, key_of, path_of

Value = TypeVar("Value")
COMMON_NAMES = {
    "image": (
        "image",
        *IMAGE_EXTENSIONS,  # the picture itself, as img2dataset names it
        "image_path",
        "image_file",
        "filepath",
        "file_path",
        "filename",
        "image_name",
        "file_name",
        "file",
        "path",
        "img",
        "url",
        "image_url",
        "images",
        "img_url",
    ),
    "text": ("text", "caption", "captions", "texts", "sentences", "title", "sentence", "description", "comment", "txt"),
    "label": ("label", "labels", "class", "classes", "category", "categories", "class_name"),
    "split": ("split", "set", "partition", "subset"),
}
"""Column names that are recognised, in this order, whatever their case and spaces around them."""


DECLINED = ("label", "split")
"""Roles that a data set can do without."""
MOST_COLUMNS = 50
"""Columns that a message names."""
NOT_OF_THE_PLAN = ("output", "overwrite", "processes", "task", "ray", "work")
"""Options that change no plan."""


@dataclass
class _Row:
    """What a row says."""

    picture: Picture
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    listed: bool
    """Whether its labels are a list."""
    split: str | None


@dataclass
class _Said:
    """What the rows of some tables say together."""

    classes: set[str] = field(default_factory=set)
    splits: set[str] = field(default_factory=set)
    """With "", where a row names none."""
    rows: int = 0
    multi: bool = False
    """Whether any row has a list of labels."""
    missing: int = 0
    """Texts that are a word for a missing value."""
    left_out: list[str] = field(default_factory=list)
    """A line for each row that was left out."""

    def add(self, other: _Said) -> None:
        """Take in what the tables after these say."""
        self.classes |= other.classes
        self.splits |= other.splits
        self.rows += other.rows
        self.multi = self.multi or other.multi
        self.missing += other.missing
        self.left_out += other.left_out


@dataclass(kw_only=True)
class TableCommand(DrawCommand):
    """Pack a table (.csv, .tsv, .jsonl, .parquet, .arrow, .feather): columns image (path or bytes), text, label, split.

    A folder is what Hugging Face's datasets write: Parquet or Arrow files, each a split by a word in its name or its
    folder's, or metadata.jsonl beside pictures; or one partitioned into folders column=value. Rows with the same image
    become several captions of one sample. Several labels: separated by | or a JSON list. Where nothing says a split, a
    hash of the image path does."""

    input: tyro.conf.Positional[str]
    """The table, its URL (http, s3, gs), or a folder of tables; image paths are relative to a table's folder, or
    URLs."""
    image_column: str | None = None
    """Column of image paths (None: the first of image, image_path, filepath, filename, ...)."""
    text_column: str | None = None
    """Column of texts (None: the first of text, caption, title, ...)."""
    label_column: str | None = None
    """Column of class names (None: the first of label, class, category, ...; '': pairs without labels)."""
    split_column: str | None = None
    """Column of splits (None: the first of split, set, ...; '': a hash split, or one by the tables' names)."""
    delimiter: str = ""
    r"""Between the fields of a CSV or TSV, a single character, \t for a tab ("": a comma, and a tab in .tsv)."""
    encoding: str = "utf-8-sig"
    """Of a CSV, TSV or JSONL: a codec of Python, such as latin-1 or utf-16."""
    quoting: Literal["standard", "none"] = "standard"
    """Of a CSV or TSV: whether quotes stand around fields, or (none) are part of the texts."""
    name: str | None = None
    """Name of the data set (None: the table's)."""
    attribution: str = ""
    """Source and licence, for the manifest."""
    retries: int = 4
    """How often a picture, or the table, by URL is tried again, with growing waits."""
    timeout_s: float = 30.0
    """Seconds to connect to a server, and without a byte from it, after which a try has failed."""

    def stamp(self) -> str:
        """Return a hash of the tables and of the options that decide how they are read; "" where `pairs` will say what
        is wrong with them."""
        asked = {each.name: str(getattr(self, each.name)) for each in fields(self) if each.name not in NOT_OF_THE_PLAN}
        if is_url(str(self.input)):
            return ""
        paths = [table.path for table in self._found.read]
        try:
            if not all(path.is_file() for path in paths):
                return ""
            tables = [[str(path), sha256_of(path)] for path in paths]
        except OSError:
            return ""
        return hashlib.sha256(json.dumps([str(Path.cwd()), asked, tables]).encode()).hexdigest()

    @functools.cached_property
    def _found(self) -> Tables:
        """The tables of `input`, a path, which is walked once. Raises BadInput as `tables_of` does."""
        return tables_of(Path(self.input))

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the rows of the table. Raises BadInput naming the row or column that is wrong."""
        self.draw(())
        if not (0 <= self.retries <= 100 and 0.01 <= self.timeout_s <= 1e5):  # as stream.retries, stream.timeout_s
            raise BadInput("--retries must be from 0 to 100, and --timeout-s from 0.01 to 100000")
        text, url = self._text_format(), str(self.input)
        top = self._fetched(rows.folder / "table") if is_url(url) else Path(self.input)
        found_tables = Tables([Table(top)]) if is_url(url) else self._found
        tables = found_tables.read
        heads = [(table.path, _head(table, text)) for table in tables]
        columned = zip(heads, tables, strict=True)
        names = list(dict.fromkeys(name for (_, head), table in columned for name in [*head.names, *table.columns]))
        columns, said = self._columns(names), _Said()
        print(_describe(columns, names, tables), flush=True)
        if found_tables.passed:
            print(shown(found_tables.passed), flush=True)
        if "label" in columns:
            check_label_forms(heads, columns["label"])
        rows.partitions = partitions_for(sum(head.rows for _, head in heads))
        units = _units(tables, usable_cores() if self.processes is None else self.processes)
        places = [Partitions(rows.folder, rows.partitions, i) for i in range(len(units))]
        tasks = [(replace(self), top, own, unit, text, columns) for own, unit in zip(places, units, strict=True)]
        for found in parallel_map(_read_tables, tasks, title="reading", processes=self.processes):
            said.add(found)
        if not said.rows:
            why = f" that can be used, {reasons_of(said.left_out)}: mend some" if said.left_out else ": add some"
            raise BadInput(f"{public_url(url)} has no rows{why}")
        classes = sorted(said.classes, key=class_order)
        check_classes("class", classes)
        check_spelling(classes)
        name = self.name or top.stem
        check_names("--name", name)
        check_unicode("--attribution", self.attribution)
        named = natural_splits(said.splits - {""})
        splits = natural_splits(split or "train" for split in said.splits)
        draw = self.draw(splits if named else ())
        kind: LabelKind = "multi" if said.multi else "single" if classes else "none"
        return RawPairs(
            name=name,
            label_kind=kind,
            classes=classes,
            attribution=self.attribution,
            details={"source": "table", **asdict(draw)},
            draw=draw,
            expected_splits=(*splits, *draw.splits),
            notes=[
                *say_classes(classes),
                *say_missing(classes),
                *say_missing_texts(said.missing),
                say_splits(named, draw),
                *missing_val([*splits, *draw.splits]),
            ],
            left_out=said.left_out,
        )

    def _fetched(self, folder: Path) -> Path:
        """Return a copy in `folder` of the table at a URL. Raises BadInput when it is none, or cannot be had."""
        url = str(self.input)
        if not public_url(url).endswith("/"):  # `fetch` says that it names no file
            check_ending(public_url(url))
        return fetch(url, folder, self.retries, self.timeout_s)

    def _text_format(self) -> TextFormat:
        delimiter = "\t" if self.delimiter == "\\t" else self.delimiter  # a shell hands a tab on as it is typed
        if len(delimiter) > 1 or delimiter in ('"', "\n", "\r"):
            raise BadInput(f"--delimiter is {delimiter!r}: give a single character, or \\t for a tab")
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):
            raise BadInput(
                f"--encoding is '{shown(self.encoding)}', which is no encoding of texts in Python: give one as latin-1"
            ) from None
        return TextFormat(delimiter, self.encoding, self.quoting == "standard")

    def read(self, top: Path, table: Table, text: TextFormat, columns: dict[str, str], rows: Partitions) -> _Said:
        """Put the rows of a table into `rows` and return what they say. Raises BadInput naming the row.

        `top`: the table, or the folder of all tables. With `skip_bad` a row that cannot be used is left out and
        noted."""
        said, path = _Said(), table.path
        inside = path.relative_to(top) if path != top else Path(path.name)
        folder = f"{table.folder}/" if table.folder else ""
        base = str((top if path != top else top.parent).absolute())
        parent = posixpath.join(base, table.folder)
        for where, own_row in read_rows(path, list(dict.fromkeys(columns.values())), text):
            place, row = f"{where} of {inside}", own_row if isinstance(own_row, BadSample) else own_row | table.columns
            found = try_sample(lambda r=row: self._parsed(r, columns), place, self.skip_bad, said.left_out)  # type: ignore[misc]
            if found is None:
                continue
            own = found.split or table.split
            key, identity = _place(base, folder, found.picture)
            image = self._image(parent, found.picture.path)
            pair = RawPair(key, own, image, found.texts, found.labels, place, identity)
            rows.add(pair, found.picture.data)
            said.classes.update(found.labels)
            said.splits.add(own)
            said.rows += 1
            said.missing += count_missing(found.texts)
            said.multi = said.multi or found.listed
        return said

    def _parsed(self, row: Row, columns: dict[str, str]) -> _Row:
        """Return what a row says, a file's URL as its path. Raises BadSample when it cannot be used."""
        found = _parse_row(row, columns)
        picture = found.picture
        if picture.data is not None or not is_file_url(picture.path):
            return found
        if is_url(str(self.input)):
            raise BadSample(f"{brief(picture.path)} names a file of this machine in a table by URL: name a URL")
        return replace(found, picture=Picture(path_of(picture.path)))

    def _image(self, folder: str, path: str) -> Readable:
        """Return where the bytes of a picture are; `folder`: of its table."""
        table = str(self.input)
        if is_url(path) or is_url(table):
            return UrlBytes(joined(table, path), self.retries, self.timeout_s)
        return PlainFile(posixpath.join(folder, path))

    def _columns(self, names: list[str]) -> dict[str, str]:
        """Return role -> column. Raises BadInput when an image or text column or one that was named is missing."""
        found: dict[str, str] = {}
        table = public_url(str(self.input))
        for role, common in COMMON_NAMES.items():
            wanted = getattr(self, f"{role}_column")
            if wanted == "" and role in DECLINED:
                continue
            lower = {name.strip().lower(): name for name in reversed(names)}
            column = wanted if wanted is not None else next((lower[c] for c in common if c in lower), None)
            if wanted is not None and wanted not in names:
                raise BadInput(f"{table} has no column '{wanted}': it has {_listed(names)}")
            if column is not None:
                found[role] = column
            elif names and role in ("image", "text"):
                raise BadInput(
                    f"{table} has no {role} column that is recognised: name it with --{role}-column; it has "
                    f"{_listed(names)}{_other_delimiter(names)}"
                )
        return found


def _head(table: Table, text: TextFormat) -> Head:
    """Return what a table says of its rows, but for the columns of its partitions. Raises BadInput as `head_of` does,
    and where it has one of these too."""
    head = head_of(table.path, text)
    check_partitions(table, head.names)
    return head


def _units(tables: list[Table], processes: int) -> list[list[Table]]:
    """Return the tables in parts of neighbours, some for each process."""
    size = -(-len(tables) // (4 * max(processes, 1)))
    return [tables[i : i + size] for i in range(0, len(tables), size)]


def _read_tables(
    command: TableCommand,
    top: Path,
    rows: Partitions,
    tables: list[Table],
    text: TextFormat,
    columns: dict[str, str],
) -> _Said:
    """Put the rows of some tables into `rows` and return what they say. Raises BadInput naming the row."""
    said = _Said()
    for table in tables:
        said.add(command.read(top, table, text, columns, rows))
    rows.flush()
    return said


def _place(top: str, folder: str, picture: Picture) -> tuple[str, str]:
    """Return the key of a picture, and what tells it from others. Raises BadInput when it has no name.

    `top`: folder of all tables; `folder`: that of its own, relative to it."""
    if picture.data is None and is_url(picture.path):
        key = make_key(key_of(picture.path))
        return key, key
    if picture.data is None:
        path = plain_path(top, posixpath.join(folder, picture.path))
        return make_key(posixpath.splitext(path)[0]), path
    digest = hashlib.sha256(picture.data).hexdigest()
    stem = posixpath.splitext(public_url(picture.path))[0]
    return make_key(f"{stem}-{digest[:16]}" if posixpath.basename(stem) else digest[:16]), digest


def _parse_row(row: Row, columns: dict[str, str]) -> _Row:
    """Return what a row says. Raises BadSample when it cannot be used."""
    if isinstance(row, BadSample):
        raise row

    def cell(role: str, parse: Callable[[Any], Value]) -> Value:
        try:
            return parse(row.get(columns[role]))
        except BadSample as error:
            way = f", or --{role}-column '' to do without" if role in DECLINED else ""
            raise BadSample(f"{error} (column '{brief(columns[role])}'{way})") from None

    labels, listed = cell("label", as_labels) if "label" in columns else ((), False)
    split = cell("split", as_split) if "split" in columns else None
    return _Row(cell("image", as_picture), cell("text", as_texts), labels, listed, split)


def _describe(columns: dict[str, str], names: list[str], tables: list[Table]) -> str:
    """Return a line that says which columns were taken for what, and which might have been; and splits from names."""
    taken = [f"{role} is column '{brief(column)}'" for role, column in columns.items()]
    taken += [] if "split" in columns else say_named_splits((table.split, table.path) for table in tables)
    if "label" not in columns:
        taken.append("no labels")
    known = {name for common in COMMON_NAMES.values() for name in common}
    passed = [name for name in names if name.strip().lower() in known and name not in columns.values()]
    others = f"; not taken: {', '.join(passed)}" if passed else ""
    return shown("; ".join(taken) + others)


def _listed(names: list[str]) -> str:
    """Return the names of columns for a message."""
    return ", ".join(map(brief, names[:MOST_COLUMNS])) + (", …" if len(names) > MOST_COLUMNS else "")


def _other_delimiter(names: list[str]) -> str:
    """Return the advice for a header that was read as a single column."""
    if len(names) != 1:
        return ""
    found = next((mark for mark in (";", "\t", "|", ",") if mark in names[0]), "").replace("\t", "\\t")
    return f", a single column: if '{found}' is between its fields, pass --delimiter '{found}'" if found else ""
