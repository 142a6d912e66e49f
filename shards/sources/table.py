"""A table with a row for each image and text: CSV, TSV, JSONL, Parquet or Arrow, or a folder of them.

Columns: the image's path (relative to the table) or the picture itself, its text, and, if there are any, its label and
split. Rows with the same image become several captions of one sample. A label is a class name; several are separated by
``|`` or stand in a JSON list."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

import tyro

from cmgan_dist.data.manifest import LabelKind, natural_splits
from cmgan_dist.errors import BadInput, BadSample, shown
from shards.pack import BuildCommand
from shards.pairs import RawPair, RawPairs, Readable, hash_split, make_key, missing_val, split_shares
from shards.shard_file import try_sample
from shards.sources.cells import Picture, as_labels, as_picture, as_split, as_texts
from shards.sources.files import PlainFile, Spool, check_names, check_unicode
from shards.sources.rows import Row, TextFormat, column_names, read_rows, tables_of

Value = TypeVar("Value")
COMMON_NAMES = {
    "image": (
        "image",
        "image_path",
        "image_file",
        "filepath",
        "file_path",
        "filename",
        "file_name",
        "file",
        "path",
        "img",
    ),
    "text": ("text", "caption", "captions", "texts", "title", "sentence", "description", "comment"),
    "label": ("label", "labels", "class", "classes", "category", "categories", "class_name"),
    "split": ("split", "set", "partition", "subset"),
}
"""Column names that are recognised, in this order, whatever their case."""


@dataclass
class _Image:
    """The rows of one image, merged."""

    where: str
    key: str
    image: Readable
    labels: tuple[str, ...]
    split: str | None
    texts: list[str] = field(default_factory=list)


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
class _Table:
    """What a table says."""

    columns: dict[str, str]
    """Role -> column."""
    images: dict[str, _Image] = field(default_factory=dict)
    """Path, or checksum of a picture in the table -> its rows merged."""
    multi: bool = False
    """Whether any row has a list of labels."""
    left_out: list[str] = field(default_factory=list)
    """A line for each row that was left out."""


@dataclass(kw_only=True)
class TableCommand(BuildCommand):
    """Pack a table (.csv, .tsv, .jsonl, .parquet, .arrow) with columns for image (path or bytes), text, label, split.

    A folder is what Hugging Face's datasets write: Parquet or Arrow files, each a split by its name or folder, or
    metadata.jsonl beside pictures. Rows with the same image become several captions of one sample. Several labels:
    separated by | or a JSON list. Where nothing says a split, a hash of the image path does."""

    input: tyro.conf.Positional[Path]
    """The table, or a folder of tables; image paths are relative to a table's folder."""
    image_column: str | None = None
    """Column of image paths (None: the first of image, image_path, filepath, filename, ...)."""
    text_column: str | None = None
    """Column of texts (None: the first of text, caption, title, ...)."""
    label_column: str | None = None
    """Column of class names (None: the first of label, class, category, ..., or pairs without labels)."""
    split_column: str | None = None
    """Column of splits (None: the first of split, set, ..., or a hash split)."""
    delimiter: str = ""
    """Between the fields of a CSV or TSV, a single character ("": a comma, and a tab in .tsv)."""
    encoding: str = "utf-8-sig"
    """Of a CSV, TSV or JSONL: a codec of Python, such as latin-1 or utf-16."""
    name: str | None = None
    """Name of the data set (None: the table's)."""
    attribution: str = ""
    """Source and licence, for the manifest."""
    val: float | None = None
    """Share of images in val (None: 0.1 without a split column); with one that has no val, it is taken of train."""
    test: float | None = None
    """Share of images in test, as of val."""

    def pairs(self) -> RawPairs:
        """List the images of the table. Raises BadInput naming the row or column that is wrong."""
        split_shares(self.val, self.test, ())
        text = self._text_format()
        tables = tables_of(self.input)
        names = list(dict.fromkeys(name for path, _ in tables for name in column_names(path, text)))
        spool = Spool(self.output)
        table = _Table(self._columns(names))
        for path, split in tables:
            self._merge(path, split, text, table, spool)
        if not table.images:
            raise BadInput(f"{self.input} has no rows" + (" that can be used" if table.left_out else ""))
        images = table.images.values()
        classes = sorted({label for image in images for label in image.labels}, key=_class_order)
        _check_spelling(classes)
        index = {label: i for i, label in enumerate(classes)}
        name = self.name or self.input.stem
        check_names("--name", name)
        check_unicode("--attribution", self.attribution)
        named = natural_splits(image.split for image in images if image.split)
        val, test = split_shares(self.val, self.test, named)
        kind: LabelKind = "multi" if table.multi else "single" if classes else "none"

        def raw_pairs() -> Iterator[RawPair]:
            for image in images:
                of_train = image.split in (None, "train")
                yield RawPair(
                    key=image.key,
                    split=hash_split(image.key, val, test) if of_train else str(image.split),
                    image=image.image,
                    texts=tuple(image.texts),
                    labels=tuple(sorted(index[label] for label in image.labels)),
                    where=image.where,
                )

        hashed = [split for split, share in (("val", val), ("test", test)) if share]
        return RawPairs(
            name=name,
            label_kind=kind,
            classes=classes,
            pairs=raw_pairs(),
            attribution=self.attribution,
            details={"source": "table", "val": val, "test": test},
            expected_splits=(*(named or ["train"]), *hashed),
            notes=[_describe(table.columns, names, named, val, test), *missing_val([*named, *hashed])],
            left_out=table.left_out,
            close=spool.close,
        )

    def _text_format(self) -> TextFormat:
        if len(self.delimiter) > 1 or self.delimiter in ('"', "\n", "\r"):
            raise BadInput(f"--delimiter is {self.delimiter!r}: give a single character")
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):
            raise BadInput(
                f"--encoding is '{shown(self.encoding)}', which is no encoding of texts in Python: give one as latin-1"
            ) from None
        return TextFormat(self.delimiter, self.encoding)

    def _merge(self, path: Path, split: str, text: TextFormat, table: _Table, spool: Spool) -> None:
        """Read the rows at `path` into `table`, pictures in it into `spool`. Raises BadInput naming the row.

        `split`: of rows that name none. With `skip_bad` a row that cannot be used is left out and noted."""
        for where, row in read_rows(path, list(dict.fromkeys(table.columns.values())), text):
            place = f"{where} of {path.relative_to(self.input) if path != self.input else path.name}"
            found = try_sample(lambda r=row: _parse_row(r, table.columns), place, self.skip_bad, table.left_out)  # type: ignore[misc]
            if found is None:
                continue
            found.split = found.split or split or None
            identity, key, image = self._place(path, found.picture, spool, place)
            first = table.images.setdefault(identity, _Image(place, key, image, found.labels, found.split))
            if (first.labels, first.split) != (found.labels, found.split):
                raise BadInput(
                    f"{place} has another label or split than {first.where} for image {shown(found.picture.path)}"
                )
            first.texts += found.texts
            table.multi = table.multi or found.listed

    def _place(self, table: Path, picture: Picture, spool: Spool, place: str) -> tuple[str, str, Readable]:
        """Return what tells an image from others, its key, and its bytes. Raises BadInput when it has no name."""
        if picture.data is None:
            folder = table.parent.relative_to(self.input) if table != self.input else Path()
            path = (folder / picture.path).as_posix()
            return path, make_key(Path(path).with_suffix("").as_posix()), PlainFile(table.parent / picture.path)
        digest = hashlib.sha256(picture.data).hexdigest()
        stem = Path(picture.path).with_suffix("").as_posix() + "-" if Path(picture.path).name else ""
        return digest, make_key(f"{stem}{digest[:16]}"), spool.keep(digest, picture.data)

    def _columns(self, names: list[str]) -> dict[str, str]:
        """Return role -> column. Raises BadInput when an image or text column or one that was named is missing."""
        found: dict[str, str] = {}
        for role, common in COMMON_NAMES.items():
            wanted = getattr(self, f"{role}_column")
            lower = {name.lower(): name for name in reversed(names)}
            column = wanted if wanted is not None else next((lower[c] for c in common if c in lower), None)
            if wanted is not None and wanted not in names:
                raise BadInput(f"{self.input} has no column '{wanted}': it has {shown(', '.join(names))}")
            if column is not None:
                found[role] = column
            elif names and role in ("image", "text"):
                raise BadInput(f"{self.input} has no {role} column that is recognised: name it with --{role}-column")
        return found


def _parse_row(row: Row, columns: dict[str, str]) -> _Row:
    """Return what a row says. Raises BadSample when it cannot be used."""
    if isinstance(row, BadSample):
        raise row

    def cell(role: str, parse: Callable[[Any], Value]) -> Value:
        try:
            return parse(row.get(columns[role]))
        except BadSample as error:
            raise BadSample(f"{error} (column '{shown(columns[role])}')") from None

    labels, listed = cell("label", as_labels) if "label" in columns else ((), False)
    split = cell("split", as_split) if "split" in columns else None
    return _Row(cell("image", as_picture), cell("text", as_texts), labels, listed, split)


def _describe(columns: dict[str, str], names: list[str], splits: list[str], val: float, test: float) -> str:
    """Return a line that says which columns were taken for what, and which might have been."""
    taken = [f"{role} is column '{column}'" for role, column in columns.items()]
    if "label" not in columns:
        taken.append("no labels")
    if "split" not in columns and splits:
        taken.append(f"tables are splits by their names: {', '.join(splits)}")
    elif "split" not in columns:
        taken.append(f"a hash of the image puts {val:g} into val and {test:g} into test")
    known = {name for common in COMMON_NAMES.values() for name in common}
    passed = [name for name in names if name.lower() in known and name not in columns.values()]
    others = f"; not taken: {', '.join(passed)}" if passed else ""
    return shown("; ".join(taken) + others)


def _check_spelling(classes: list[str]) -> None:
    """Raise BadInput when two class names are the same number."""
    first: dict[Decimal, str] = {}
    for name in classes:
        try:
            number = Decimal(name)
        except InvalidOperation:
            continue
        if number.is_finite() and first.setdefault(number, name) != name:
            raise BadInput(f"labels '{first[number]}' and '{name}' are the same number: write it in one way")


def _class_order(name: str) -> tuple[int, str]:
    """Return a sort key that puts numbers by value, before names."""
    return (int(name), "") if name.isdecimal() and len(name) < 100 else (1 << 62, name)
