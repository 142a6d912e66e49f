"""A table with a row for each image and text: CSV, TSV, JSONL or Parquet.

Columns: the image's path (relative to the table), its text, and, if there are any, its label and split. Rows with the
same image become several captions of one sample. A label is a class name; several are separated by ``|`` or stand in a
JSON list."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cmgan_dist.data.manifest import LabelKind, natural_splits
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json
from shards.pack import BuildCommand
from shards.pairs import RawPair, RawPairs, check_shares, hash_split, make_key
from shards.scan import SPLIT_ALIASES
from shards.sources.files import PlainFile, check_unicode

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
    texts: list[str]
    labels: tuple[str, ...]
    split: str | None


@dataclass(kw_only=True)
class TableCommand(BuildCommand):
    """Pack a table (.csv, .tsv, .jsonl or .parquet) with columns for image path, text, label and split.

    Rows with the same image become several captions of one sample. Several labels: separated by | or a JSON list.
    Without a split column a hash of the image path splits the pairs."""

    input: tyro.conf.Positional[Path]
    """The table; image paths are relative to its folder."""
    image_column: str | None = None
    """Column of image paths (None: the first of image, image_path, filepath, filename, ...)."""
    text_column: str | None = None
    """Column of texts (None: the first of text, caption, title, ...)."""
    label_column: str | None = None
    """Column of class names (None: the first of label, class, category, ..., or pairs without labels)."""
    split_column: str | None = None
    """Column of splits (None: the first of split, set, ..., or a hash split)."""
    name: str | None = None
    """Name of the data set (None: the table's)."""
    attribution: str = ""
    """Source and licence, for the manifest."""
    val: float = 0.1
    """Share of images in val, when there is no split column."""
    test: float = 0.1
    """Share of images in test, when there is no split column."""

    def pairs(self) -> RawPairs:
        """List the images of the table. Raises BadInput naming the row or column that is wrong."""
        check_shares(self.val, self.test)
        images, multi, empty = self._merge()
        classes = sorted({label for image in images.values() for label in image.labels}, key=_class_order)
        index = {label: i for i, label in enumerate(classes)}
        name = self.name or self.input.stem
        for what, written in (("--name", [name]), ("--attribution", [self.attribution])):
            check_unicode(what, *written)
        kind: LabelKind = "multi" if multi else "single" if classes else "none"

        def raw_pairs() -> Iterator[RawPair]:
            for path, image in images.items():
                key = make_key(Path(path).with_suffix("").as_posix())
                yield RawPair(
                    key=key,
                    split=image.split or hash_split(key, self.val, self.test),
                    image=PlainFile(self.input.parent / path),
                    texts=tuple(image.texts),
                    labels=tuple(sorted(index[label] for label in image.labels)),
                    where=f"{image.where} of {self.input.name}",
                )

        hashed = [split for split, share in (("val", self.val), ("test", self.test)) if share]
        named = natural_splits(image.split for image in images.values() if image.split)
        return RawPairs(
            name=name,
            label_kind=kind,
            classes=classes,
            pairs=raw_pairs(),
            attribution=self.attribution,
            details={"source": "table", "val": self.val, "test": self.test},
            expected_splits=tuple(named) or ("train", *hashed),
            notes=[f"{len(empty)} rows have no text, the first is {empty[0]}"] if empty else [],
        )

    def _merge(self) -> tuple[dict[str, _Image], bool, list[str]]:
        """Return image path -> its rows merged, whether any row had a list of labels, and the rows without text.

        Raises BadInput naming the row, at a row without text only unless `skip_bad`."""
        images: dict[str, _Image] = {}
        multi = False
        empty: list[str] = []
        columns: dict[str, str] = {}
        for where, row in read_rows(self.input):
            columns = columns or self._columns(list(row))
            path = str(row.get(columns["image"]) or "").strip()
            if not path:
                raise BadInput(f"{where} of {self.input} has no image path in column '{columns['image']}'")
            texts = _as_texts(row.get(columns["text"]))
            labels, listed = _as_labels(row.get(columns["label"])) if "label" in columns else ((), False)
            if "label" in columns and not labels and not listed:
                raise BadInput(f"{where} of {self.input} has no label in column '{columns['label']}'")
            split = _as_split(row.get(columns["split"])) if "split" in columns else None
            if "split" in columns and split is None:
                raise BadInput(f"{where} of {self.input} has no split in column '{columns['split']}'")
            check_unicode(f"{where} of {self.input}: image path or label", path, *labels)
            multi = multi or listed
            first = images.setdefault(path, _Image(where, [], labels, split))
            if (first.labels, first.split) != (labels, split):
                raise BadInput(
                    f"{where} of {self.input} has another label or split than {first.where} for image {path}"
                )
            if not texts:
                empty.append(where)
            first.texts += texts
        if empty and not self.skip_bad:
            column = columns["text"]
            raise BadInput(f"{empty[0]} of {self.input} has no text in column '{column}' ({len(empty)} such rows)")
        if not images:
            raise BadInput(f"{self.input} has no rows")
        return images, multi, empty

    def _columns(self, names: list[str]) -> dict[str, str]:
        """Return role -> column. Raises BadInput when an image or text column or one that was named is missing."""
        found: dict[str, str] = {}
        for role, common in COMMON_NAMES.items():
            wanted = getattr(self, f"{role}_column")
            lower = {name.lower(): name for name in reversed(names)}
            column = wanted if wanted is not None else next((lower[c] for c in common if c in lower), None)
            if wanted is not None and wanted not in names:
                raise BadInput(f"{self.input} has no column '{wanted}': it has {', '.join(names)}")
            if column is not None:
                found[role] = column
            elif role in ("image", "text"):
                raise BadInput(f"{self.input} has no {role} column that is recognised: name it with --{role}-column")
        return found


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give (how a message names the row, column -> value) of each row.

    Rows count as an editor shows them: a CSV's header is row 1.

    Raises BadInput when the file is missing, of another kind, not UTF-8 or damaged."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise BadInput(f"{path} is not a table that can be read: expected {', '.join(readers)}")
    if not path.is_file():
        raise BadInput(f"table {path} does not exist")
    try:
        for number, row in readers[path.suffix.lower()](path):
            yield f"row {number}", row
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield from enumerate(csv.DictReader(file, delimiter=delimiter, strict=True), start=2)
        except csv.Error as error:
            raise BadInput(f"{path} is not a whole table ({error})") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise BadInput(f"row {number} of {path} is not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise BadInput(f"row {number} of {path} is not a JSON object")
                yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is not a whole Parquet file ({error})") from None


def _as_texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(text).strip() for text in values if text is not None and str(text).strip()]


def _as_labels(value: Any) -> tuple[tuple[str, ...], bool]:
    """Return the class names and whether the cell is a list: ``a|b`` and ``["a", "b"]`` are."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return (value.strip(),), False  # a class name that begins with a bracket
    if isinstance(value, str) and "|" in value:
        value = value.split("|")
    listed = isinstance(value, list)
    names = {str(name).strip() for name in (value if listed else [value]) if name is not None}
    return tuple(sorted(names - {""})), listed


def _as_split(value: Any) -> str | None:
    name = str(value).strip() if value is not None else ""
    return SPLIT_ALIASES.get(name.lower(), name) or None


def _class_order(name: str) -> tuple[int, str]:
    """Return a sort key that puts numbers by value, before names."""
    return (int(name), "") if name.isdecimal() else (1 << 62, name)
