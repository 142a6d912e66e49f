"""Small folders of embeddings, as launchers/embed.py writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from cmgan_dist.data.store import FileStore
from cmgan_dist.jobs import ledger
from cmgan_dist.models.generator import Modality
from cmgan_dist.retrieval.embeddings import (
    ITEMS,
    MANIFEST_NAME,
    EmbeddedShard,
    EmbeddingManifest,
    ModelIdentity,
    SourceIdentity,
    write_shard,
)


@dataclass
class Made:
    """What a folder of embeddings holds, in the order of ids."""

    folder: Path
    vectors: np.ndarray
    """float32 [N, E], as a reader gets them."""
    rows: list[dict[str, object]] = field(default_factory=list)
    """Rows of the tables, with "id" and "owner" as ids."""


def clustered(rng: np.random.Generator, count: int, dim: int, clusters: int, spread: float) -> np.ndarray:
    """Unit vectors float32 [count, dim] around random centres, in random order."""
    centres = rng.normal(size=(clusters, dim)) / dim**0.5
    rows = centres[rng.integers(clusters, size=count)] + spread * rng.normal(size=(count, dim)) / dim**0.5
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def make_embeddings(
    folder: Path,
    shards: list[tuple[int, int]],
    *,
    dim: int = 16,
    classes: tuple[str, ...] = ("animal", "boat", "car"),
    dtype: str = "float32",
    model: str = "ab" * 32,
    run: str = "runs/nowhere",
    seed: int = 0,
    vectors: np.ndarray | None = None,
    captions: dict[int, str] | None = None,
    prefix: str = "train",
) -> Made:
    """Write EMB with (images, texts) a shard; text j belongs to image j modulo the images.

    `vectors`: float32 [N, E] instead of clustered ones. `captions`: item -> caption."""
    rng = np.random.default_rng(seed)
    total = sum(map(sum, shards))
    if vectors is None:
        vectors = clustered(rng, total, dim, max(1, total // 20), 0.4)
    stored = vectors.astype(dtype)
    made, base = Made(folder, stored.astype(np.float32)), 0
    listed: list[EmbeddedShard] = []
    store = FileStore(str(folder), "folder")
    for number, (images, texts) in enumerate(shards):
        name = f"{prefix}-{number:06d}"
        rows: list[dict[str, object]] = []
        for i in range(images + texts):
            own = i if i < images else (i - images) % images if images else -1
            sample = own if images else i
            rows.append(
                {
                    "modality": "image" if i < images else "text",
                    "key": f"{prefix}{number}-{sample}",
                    "caption": None if i < images else (captions or {}).get(base + i, f"caption {base + i}"),
                    "owner": own,
                    "labels": [(number + sample) % len(classes)] if classes else [],
                    "shard": name,
                    "row": sample,
                }
            )
        here = stored[base : base + len(rows)]
        parts: dict[Modality, np.ndarray] = {"image": here[:images], "text": here[images:]}
        present: dict[Modality, np.ndarray] = {modality: part for modality, part in parts.items() if len(part)}
        write_shard(store, name, present, pa.Table.from_pylist(rows, ITEMS), ledger.Record("0" * 64, {"model": model}))
        listed.append(EmbeddedShard(name, "train", images, texts))
        owners = [base + int(str(row["owner"])) if row["owner"] != -1 else -1 for row in rows]
        made.rows += [{**r, "id": base + i, "owner": owners[i]} for i, r in enumerate(rows)]
        base += len(rows)
    source = SourceIdentity("shards", f"/data/{folder.name}")
    identity = ModelIdentity(model, run, "toy")
    manifest = EmbeddingManifest(
        identity, stored.shape[1], dtype, source, list(classes), f"by {folder.name}", shards=listed
    )
    store.write(MANIFEST_NAME, manifest.to_json())
    return made
