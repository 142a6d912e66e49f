"""Embeddings of a data set as files: a folder, or a URL, of vectors, of what they are vectors of, and of how they came.

    EMB/embeddings.json        what the folder holds (`EmbeddingManifest`), written last: without it nothing is whole
    EMB/NAME.image.npy         float32 or float16 [n, E], a row for each image of the shard NAME
    EMB/NAME.text.npy          [m, E]: every text of the first image, then of the second ...
    EMB/NAME.items.parquet     a row for each of these n + m vectors, images first (ITEMS)
    EMB/NAME.record.json       what the three were made from, with their checksums (`jobs.ledger`)

Vectors are no longer than 1. A modality that a shard does not have has no ``.npy`` file. Items are numbered shard by
shard, images before texts: the number is ``base[shard] + row``, so that vectors and items cannot slip against each
other.

Shapes: n images and m texts of a shard, E dimensions of the common space."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cmgan_dist.data import output
from cmgan_dist.data.folder import checked_path, composed
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.files import OtherVersion, parse_sealed, sealed_json
from cmgan_dist.jobs import ledger

if TYPE_CHECKING:  # an index is built without torch
    from cmgan_dist.models.generator import Modality

MANIFEST_NAME, VERSION = "embeddings.json", 1
DTYPES = ("float32", "float16")
ITEMS = pa.schema(
    [
        pa.field("modality", pa.string()),  # "image" or "text"
        pa.field("key", pa.string()),
        pa.field("caption", pa.string()),  # null for images, and where the data holds features of texts
        pa.field("owner", pa.int32()),  # row of its image in this shard, an image's own row, -1 without an image
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("shard", pa.string()),  # name of the source's tar, or of the cut of pictures or texts
        pa.field("row", pa.int32()),  # number of the sample in it
    ]
)
"""Columns of NAME.items.parquet."""


@dataclass(frozen=True)
class EmbeddedShard:
    """One shard of embeddings as embeddings.json lists it."""

    name: str
    """The source shard's name without ``.tar``."""
    split: str
    """"" where the source has no splits."""
    images: int
    texts: int

    def count(self, modality: Modality) -> int:
        """Return the number of images or texts."""
        return self.images if modality == "image" else self.texts


@dataclass(frozen=True)
class ModelIdentity:
    """Which model made the vectors."""

    sha256: str
    """SHA-256 of its best/model.safetensors."""
    run: str
    """The run's path, absolute."""
    data_name: str
    """Name of the data set that it was trained on."""


@dataclass(frozen=True)
class SourceIdentity:
    """What the vectors are of."""

    kind: str
    """"shards" of a data set, "pictures" of a folder, or "texts" of a file."""
    location: str
    """URL without what is secret in it, or absolute path."""
    sha256: str = ""
    """`origin.sha256_of_data` of a data set; "" of others."""


@dataclass(frozen=True)
class EmbeddingManifest:
    """The contents of embeddings.json."""

    model: ModelIdentity
    dim: int
    """E."""
    dtype: str
    """float32 or float16."""
    source: SourceIdentity
    classes: list[str] = field(default_factory=list)
    """Label i of an item is ``classes[i]``; empty for data without classes."""
    attribution: str = ""
    """Source and licence of the data."""
    shards: list[EmbeddedShard] = field(default_factory=list)
    """In canonical order: splits in the order of the data's manifest, then shards."""

    def to_json(self) -> str:
        """Return the text of embeddings.json; `from_json` reads it."""
        return sealed_json({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: bytes | str, location: str) -> EmbeddingManifest:
        """Return the manifest in the text of a file; `location` is its path or URL, for messages.

        Raises BadInput when the text is not a manifest of this version."""
        try:
            record = parse_sealed(text, VERSION)
            model, source = ModelIdentity(**record.pop("model")), SourceIdentity(**record.pop("source"))
            shards = [EmbeddedShard(**shard) for shard in record.pop("shards")]
            classes = [composed(name) for name in record.pop("classes", [])]
            return cls(model=model, source=source, shards=shards, classes=classes, **record)
        except OtherVersion as error:
            raise BadInput(
                f"{location} has version {error.version}, this program reads {VERSION}: embed again"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{location} cannot be read ({error!r}): embed again by launchers/embed.py") from None


# ---------------------------------------------------------------------------------------------- names


def vectors_name(shard: str, modality: Modality) -> str:
    """Return the name of a shard's vectors of one modality."""
    return f"{shard}.{modality}.npy"


def items_name(shard: str) -> str:
    """Return the name of a shard's table of items."""
    return f"{shard}.items.parquet"


def record_name(shard: str) -> str:
    """Return the name of a shard's record."""
    return f"{shard}.record.json"


# ---------------------------------------------------------------------------------------------- one shard


def write_shard(
    store: FileStore,
    shard: str,
    vectors: dict[Modality, np.ndarray],
    items: pa.Table,
    record: ledger.Record,
) -> ledger.Record:
    """Write the vectors, the items and then the record of a shard; return the record with what was written.

    `vectors`: [n, E] and [m, E], a modality without any left out. `record`: source, settings and what was left out.
    All of them are made before the first is written. Raises BadInput when a file cannot be written."""
    files: dict[str, bytes] = {}
    written = []
    for modality, rows in vectors.items():
        packed = io.BytesIO()
        np.save(packed, rows, allow_pickle=False)
        files[vectors_name(shard, modality)] = packed.getvalue()
        written.append(_written(vectors_name(shard, modality), packed.getvalue(), len(rows)))
    table = io.BytesIO()
    pq.write_table(items, table)
    files[items_name(shard)] = table.getvalue()
    main = _written(items_name(shard), table.getvalue(), len(items))
    done = ledger.Record(record.source, record.settings, True, main, record.left_out, written)
    files[record_name(shard)] = ledger.text_of(done).encode()
    for name, data in files.items():
        store.write(name, data)
    return done


def _written(name: str, data: bytes, rows: int) -> dict[str, Any]:
    return {"name": name, "samples": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_record(store: FileStore, shard: str) -> ledger.Record | None:
    """Return the record of a shard whose embedding has ended, None where there is none.

    Raises BadInput when it cannot be read."""
    record = output.read_record(store, record_name(shard))
    return record if record is not None and record.finished and record.written is not None else None


def counted(shard: str, split: str, record: ledger.Record) -> EmbeddedShard:
    """Return a shard's line of embeddings.json, from its record."""
    rows = {written["name"]: written["samples"] for written in record.beside}
    return EmbeddedShard(
        shard, split, rows.get(vectors_name(shard, "image"), 0), rows.get(vectors_name(shard, "text"), 0)
    )


# ---------------------------------------------------------------------------------------------- reading


class EmbeddingSet:
    """Embeddings that lie in a folder or at a URL, for reading; iteration gives the shards in canonical order."""

    def __init__(self, store: FileStore, manifest: EmbeddingManifest, sha256: str, sums: dict[str, str]) -> None:
        """Take what `open` has checked; `sums`: name of a file -> its SHA-256, compared when it is first read."""
        self.store, self.manifest, self._unread = store, manifest, sums
        self.sha256 = sha256
        """Checksum of embeddings.json and all records: of the same vectors it is the same."""
        self._number = {shard.name: number for number, shard in enumerate(manifest.shards)}

    @classmethod
    def open(cls, location: str | Path) -> EmbeddingSet:
        """Open a folder or URL and check that every file is there with the size that its record tells.

        Raises BadInput, naming the file, when one is missing, cut, of another version or of another model."""
        checked_path(location, "embeddings")
        store = FileStore(str(location), "embeddings")
        where = store.location(MANIFEST_NAME)
        try:
            manifest = EmbeddingManifest.from_json(store.read(MANIFEST_NAME), where)
        except FileNotFoundError:
            raise BadInput(f"{where} does not exist: make it by launchers/embed.py, or name another folder") from None
        if manifest.dtype not in DTYPES:
            raise BadInput(f"{where} has vectors of a kind that this program does not know: embed again")
        records = [_checked(store, manifest, shard) for shard in manifest.shards]
        told = [manifest.to_json(), *map(ledger.text_of, records)]
        sums = {written["name"]: written["sha256"] for record in records for written in record.files}
        return cls(store, manifest, hashlib.sha256("\0".join(told).encode("utf-8", "surrogatepass")).hexdigest(), sums)

    @property
    def location(self) -> str:
        """Path, or URL without what is secret in it."""
        return public_url(self.store.url)

    @property
    def dim(self) -> int:
        """E."""
        return self.manifest.dim

    @property
    def counts(self) -> np.ndarray:
        """int64 [shards, 2]: images and texts of each shard."""
        return np.asarray([(s.images, s.texts) for s in self.manifest.shards], np.int64).reshape(-1, 2)

    @property
    def base(self) -> np.ndarray:
        """int64 [shards + 1]: number of each shard's first item, and behind the last one the number of all items."""
        return np.concatenate([[0], self.counts.sum(1).cumsum()]).astype(np.int64)

    def __iter__(self) -> Iterator[EmbeddedShard]:
        """Give the shards in canonical order."""
        return iter(self.manifest.shards)

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.manifest.shards)

    def first_item(self, shard: EmbeddedShard | int) -> int:
        """Return the number of a shard's first item."""
        return int(self.base[shard if isinstance(shard, int) else self._number[shard.name]])

    def vectors(self, modality: Modality, shard: EmbeddedShard | int) -> np.ndarray:
        """Return the vectors [n, E] of a shard's images or [m, E] of its texts; a local file is mapped, not read.

        Raises BadInput when the file is not what embeddings.json says."""
        shard = self.manifest.shards[shard] if isinstance(shard, int) else shard
        rows, dtype = shard.count(modality), np.dtype(self.manifest.dtype)
        if not rows:
            return np.zeros((0, self.dim), dtype)
        name = vectors_name(shard.name, modality)
        try:
            self._check(name)
            if self.store.local:
                found: np.ndarray = np.load(f"{self.store.path}/{name}", mmap_mode="r")
            else:
                found = np.load(io.BytesIO(self.store.read(name)))
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None
        if found.shape != (rows, self.dim) or found.dtype != dtype:
            raise BadInput(
                f"{self.store.location(name)} holds {found.dtype} {list(found.shape)}, expected {dtype} "
                f"{[rows, self.dim]}: embed again"
            )
        return found

    def items(self, shard: EmbeddedShard | int) -> pa.Table:
        """Return what a shard's vectors are of (ITEMS), n images and then m texts.

        Raises BadInput when the file is not what embeddings.json says."""
        shard = self.manifest.shards[shard] if isinstance(shard, int) else shard
        name = items_name(shard.name)
        try:
            self._check(name)
            table = pq.read_table(io.BytesIO(self.store.read(name)))
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(name, error) from None
        if not table.schema.equals(ITEMS) or len(table) != shard.images + shard.texts:
            raise BadInput(f"{self.store.location(name)} is not the table of its shard's items: embed again")
        return table

    def _check(self, name: str) -> None:
        """Compare a file with its checksum, once. Raises BadInput when it is another."""
        expected = self._unread.pop(name, None)
        if expected is None:
            return
        if self.store.sha256(name) != expected:
            self._unread[name] = expected
            raise BadInput(f"{self.store.location(name)} is damaged: embed again, which makes it anew")

    def _unreadable(self, name: str, error: Exception) -> BadInput:
        return BadInput(f"{self.store.location(name)} cannot be read ({error}): restore it or embed again")


def _checked(store: FileStore, manifest: EmbeddingManifest, shard: EmbeddedShard) -> ledger.Record:
    """Return the record of a shard. Raises BadInput unless its files are there with the sizes that it tells."""
    record, where = read_record(store, shard.name), store.location(record_name(shard.name))
    if record is None:
        raise BadInput(f"{where} is missing or damaged: embed again, which makes what is missing")
    if record.settings.get("model") != manifest.model.sha256 or counted(shard.name, shard.split, record) != shard:
        raise BadInput(f"{where} is of other embeddings than {MANIFEST_NAME} tells of: embed again")
    for written in record.files:
        size = store.size(written["name"])
        if size != written["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, its record says {written['bytes']}"
            raise BadInput(f"{store.location(written['name'])} {found}: embed again, which makes it anew")
    return record
