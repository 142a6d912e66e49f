"""What the vectors of an index are of: one row an item, in the order of their ids."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmgan_dist.data.folder import composed, is_unicode
from cmgan_dist.errors import BadInput

if TYPE_CHECKING:
    from cmgan_dist.retrieval.embeddings import EmbeddedShard, EmbeddingSet

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("modality", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("owner", pa.int64()),  # id of the item's image, its own for an image, -1 without one
        ("labels", pa.list_(pa.int32())),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
)
"""Columns of items.parquet."""
LISTED = 20
"""Classes that a sentence lists."""
FEW = ("modality", "shard")
"""Columns of few values, kept as dictionaries."""


@dataclass(frozen=True)
class Hit:
    """One item of an index, with the score that a search gave it."""

    id: int
    score: float
    """Inner product with the query's vector; 1 where nothing was searched."""
    modality: str
    key: str
    caption: str | None
    """Of texts; None where the data holds none, and of images."""
    texts: tuple[str, ...]
    """Its caption; of an image those of all its texts that are in the index."""
    labels: tuple[str, ...]
    """Names of its classes."""
    shard: str
    """Name of the tar, or of the cut of pictures or texts, that it comes from."""
    row: int
    """Number of the sample in the shard."""
    owner: int
    """Id of the image it belongs to, its own for an image; -1 without one."""


class Items:
    """The table of items, in memory."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        """Read items.parquet. Raises BadInput when it is no such table."""
        self.path, self.classes = path, list(classes)
        try:
            self.table = pq.read_table(path, read_dictionary=list(FEW)).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise BadInput(f"{path} cannot be read ({error}): restore it or index again") from None
        if self.table.column_names != SCHEMA.names:
            raise BadInput(f"{path} has the columns {', '.join(self.table.column_names)}: restore it or index again")
        self.ids: np.ndarray = self.table["id"].to_numpy()
        """int64 [N], ascending."""
        self.allowed = lru_cache(maxsize=16)(self._allowed)
        """(modality or None, classes or None) -> ids of the items that fit, ascending.

        Raises BadInput when a class or modality is not known."""

    def __len__(self) -> int:
        return len(self.table)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Return where the items with these ids are, int64 [n]. Raises BadInput naming the first that is not there."""
        found = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        missing = np.flatnonzero(self.ids[found] != ids)
        if len(missing):
            raise BadInput(f"item {ids[missing[0]]} is not in the index {self.path.parent}: name one that is")
        return found

    def captions(self, count: int) -> list[str]:
        """Return at most `count` different captions that are not blank, the first ones."""
        found = pc.unique(self.table["caption"]).to_pylist()
        return [caption for caption in found if caption and caption.strip()][:count]

    def of_key(self, key: str) -> np.ndarray:
        """Return the ids of all items with a key. Raises BadInput when there is none."""
        found: np.ndarray = self.ids[pc.equal(self.table["key"], key).to_numpy()] if is_unicode(key) else self.ids[:0]
        if not len(found):
            raise BadInput(f"no item of the index {self.path.parent} has the key {key!r}: name one that has")
        return found

    def _allowed(self, modality: str | None, classes: tuple[str, ...] | None) -> np.ndarray:
        fits = np.ones(len(self), bool)
        if modality is not None:
            if modality not in ("image", "text"):
                raise BadInput(f"modality is {modality!r}: it must be image or text")
            fits &= pc.equal(self.table["modality"].cast(pa.string()), modality).to_numpy()
        if classes is not None:
            wanted = [self._label(name) for name in classes]
            labels = self.table["labels"].combine_chunks()
            item = np.repeat(np.arange(len(self)), lengths_of(labels))
            has = np.zeros(len(self), bool)
            has[item[np.isin(labels.flatten().to_numpy(), wanted)]] = True
            fits &= has
        return self.ids[fits]

    def _label(self, name: str) -> int:
        name = composed(name)
        if name not in self.classes:
            raise BadInput(f"the index {self.path.parent} has no class {name!r}: {other_classes(name, self.classes)}")
        return self.classes.index(name)

    def hits(self, scores: np.ndarray, ids: np.ndarray) -> list[Hit]:
        """Return items by their ids, with their scores. Raises BadInput naming the first that is not there."""
        rows = self.table.take(pa.array(self.positions(ids))).to_pylist()
        own = self._captions_of([row["id"] for row in rows if row["modality"] == "image"])
        for row, score in zip(rows, scores.tolist(), strict=True):
            row["labels"] = tuple(self.classes[label] for label in row["labels"] or ())
            row["score"] = score
            found = own[row["id"]] if row["modality"] == "image" else [row["caption"]]
            row["texts"] = tuple(text for text in found if text is not None)
        return [Hit(**row) for row in rows]

    def _captions_of(self, images: Sequence[int]) -> dict[int, list[str | None]]:
        """Return the captions of the texts that belong to each of some images, in the order of their ids."""
        owners, rows = self._by_owner
        first, last = (np.searchsorted(owners, np.asarray(images, np.int64) + after) for after in (0, 1))
        ranges = [rows[a:b] for a, b in zip(first, last, strict=True)]
        taken = self.table["caption"].take(pa.array(np.concatenate([*ranges, rows[:0]]))).to_pylist()
        captions = iter(taken)
        return {image: [next(captions) for _ in each] for image, each in zip(images, ranges, strict=True)}

    @cached_property
    def _by_owner(self) -> tuple[np.ndarray, np.ndarray]:
        """Owners of all texts, ascending, and the row of each."""
        rows = self.positions(self.allowed("text", None))
        owners = self.owners(rows)
        order = np.argsort(owners, kind="stable")
        return owners[order], rows[order]

    def owners(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of the images that items at some rows belong to, int64 [n]; -1 for one without."""
        found: np.ndarray = self.table["owner"].to_numpy()[rows]
        return found

    def kept(self, kept: np.ndarray) -> pa.Table:
        """Return the rows where `kept`, bool [N], is true; texts whose image goes have no owner any more."""
        owner = self.table["owner"].to_numpy()
        owner = np.where(np.isin(owner, self.ids[kept]), owner, -1)
        column = self.table.schema.get_field_index("owner")
        return self.table.set_column(column, "owner", pa.array(owner)).filter(kept)


def are_several(values: object) -> bool:
    """Return whether these are several values, and no text or number."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes)


def other_classes(name: object, known: Sequence[str]) -> str:
    """Return what may be meant by a class that is not known, in words."""
    close = difflib.get_close_matches(str(name), known, 1)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(map(repr, known[:LISTED])) + (f" and {len(known) - LISTED} more" if len(known) > LISTED else "")
    return f"it has {listed}" if known else "its items have no classes"


def chosen_classes(given: Iterable[str], known: Sequence[str]) -> list[str] | None:
    """Return the classes to filter by, None for all. Each value is a class, or several with commas between.

    Raises BadInput when one is not known."""
    names: list[str] = []
    for value in map(composed, given):
        names += [value] if value in known else [name for part in value.split(",") if (name := part.strip())]
    for name in names:
        if name not in known:
            raise BadInput(f"class {name!r} is unknown: {other_classes(name, known)}")
    return list(dict.fromkeys(names)) or None


def lengths_of(lists: pa.ListArray) -> np.ndarray:
    """Return the length of each list, 0 for null."""
    found: np.ndarray = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return found


def items_of_shard(embeddings: EmbeddingSet, shard: EmbeddedShard, first: int, lookup: np.ndarray) -> pa.Table:
    """Return a shard's rows of items.parquet; `first`: id of its first item; `lookup` [classes]: label -> new label.

    Raises BadInput when a label is of no class."""
    table = embeddings.items(shard)
    count = len(table)
    owner = table["owner"].to_numpy().astype(np.int64)
    labels = table["labels"].combine_chunks()
    values = labels.flatten().to_numpy()
    if len(values) and not 0 <= values.min() <= values.max() < len(lookup):
        raise BadInput(f"{embeddings.location}: {shard.name} has labels beyond its {len(lookup)} classes: embed again")
    offsets = np.concatenate([[0], lengths_of(labels).cumsum()]).astype(np.int32)
    columns = {
        **{name: table[name] for name in SCHEMA.names if name not in ("id", "owner", "labels")},
        "id": np.arange(first, first + count),
        "owner": np.where(owner >= 0, owner + first, -1),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(lookup[values], pa.int32())),
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}, SCHEMA)


def write_items(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write items.parquet from tables that are read one after the other. Raises OSError."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.cast(SCHEMA))
