"""Embeddings of a data set as files, for reading.

    EMB/embeddings.json        what the folder holds (`EmbeddingManifest`), written last
    EMB/NAME.image.npy         float32 or float16 [n, E], unit length, a row for each image of the shard NAME
    EMB/NAME.text.npy          [m, E]: every text of the first image, then of the second ...
    EMB/NAME.items.parquet     a row for each of these n + m vectors, images first

Shapes: n images and m texts of a shard, E dimensions of the common space."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmgan_dist.errors import BadInput

MANIFEST_NAME, VERSION = "embeddings.json", 1


@dataclass(frozen=True)
class EmbeddedShard:
    """One shard of embeddings as embeddings.json lists it."""

    name: str
    split: str
    images: int
    texts: int


@dataclass(frozen=True)
class ModelIdentity:
    """Which model made the vectors."""

    sha256: str
    run: str
    data_name: str


@dataclass(frozen=True)
class SourceIdentity:
    """What the vectors are of."""

    kind: str
    location: str


@dataclass(frozen=True)
class EmbeddingManifest:
    """The contents of embeddings.json."""

    model: ModelIdentity
    dim: int
    dtype: str
    source: SourceIdentity
    classes: list[str]
    attribution: str
    shards: list[EmbeddedShard]


class EmbeddingSet:
    """Embeddings that lie in a folder, for reading; iteration gives the shards in canonical order."""

    def __init__(self, location: str, manifest: EmbeddingManifest) -> None:
        self.location, self.manifest, self.dim = location, manifest, manifest.dim

    @classmethod
    def open(cls, location: str | Path) -> EmbeddingSet:
        """Open a folder. Raises BadInput, naming the file, when it is missing or of another version."""
        path = Path(location) / MANIFEST_NAME
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read ({error}): make it by launchers/embed.py") from None
        if record["version"] != VERSION:
            raise BadInput(f"{path} has version {record['version']}, this program reads {VERSION}: embed again")
        model, source = ModelIdentity(**record["model"]), SourceIdentity(**record["source"])
        shards = [EmbeddedShard(**shard) for shard in record["shards"]]
        rest = {name: record[name] for name in ("dim", "dtype", "classes", "attribution")}
        return cls(str(location), EmbeddingManifest(model=model, source=source, shards=shards, **rest))

    def __iter__(self) -> Iterator[EmbeddedShard]:
        """Give the shards in canonical order."""
        return iter(self.manifest.shards)

    def vectors(self, modality: str, shard: EmbeddedShard) -> np.ndarray:
        """Return the vectors [n, E] of a shard's images or [m, E] of its texts, mapped."""
        if not (shard.images if modality == "image" else shard.texts):
            return np.zeros((0, self.dim), self.manifest.dtype)
        found: np.ndarray = np.load(f"{self.location}/{shard.name}.{modality}.npy", mmap_mode="r")
        return found

    def items(self, shard: EmbeddedShard) -> Any:
        """Return the table of what a shard's vectors are of, n images and then m texts."""
        import pyarrow.parquet as pq

        return pq.read_table(f"{self.location}/{shard.name}.items.parquet")
