"""Small folders of embeddings, as launchers/embed.py writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cmgan_dist.files import sha256_of

ITEMS = pa.schema(
    [
        ("modality", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("owner", pa.int32()),
        ("labels", pa.list_(pa.int32())),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
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
    made, base, listed = Made(folder, stored.astype(np.float32)), 0, []
    folder.mkdir(parents=True)
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
        files = []
        for modality, part in (("image", slice(0, images)), ("text", slice(images, images + texts))):
            if part.stop > part.start:
                np.save(folder / f"{name}.{modality}.npy", stored[base + part.start : base + part.stop])
                files.append((f"{name}.{modality}.npy", part.stop - part.start))
        pq.write_table(pa.Table.from_pylist(rows, ITEMS), folder / f"{name}.items.parquet")
        files.append((f"{name}.items.parquet", len(rows)))
        _write_record(folder, name, model, files)
        listed.append({"name": name, "split": "train", "images": images, "texts": texts})
        owners = [base + int(str(row["owner"])) if row["owner"] != -1 else -1 for row in rows]
        made.rows += [{**r, "id": base + i, "owner": owners[i]} for i, r in enumerate(rows)]
        base += len(rows)
    manifest = {
        "version": 1,
        "model": {"sha256": model, "run": run, "data_name": "toy"},
        "dim": stored.shape[1],
        "dtype": dtype,
        "standardised": False,
        "source": {"kind": "shards", "location": f"/data/{folder.name}"},
        "classes": list(classes),
        "attribution": f"by {folder.name}",
        "shards": listed,
    }
    (folder / "embeddings.json").write_text(json.dumps(manifest))
    return made


def _write_record(folder: Path, name: str, model: str, files: list[tuple[str, int]]) -> None:
    written = [
        {"name": file, "samples": rows, "bytes": (folder / file).stat().st_size, "sha256": sha256_of(folder / file)}
        for file, rows in files
    ]
    record = {
        "source": "0" * 64,
        "settings": {"model": model},
        "finished": True,
        "written": written[-1],
        "left_out": [],
        "beside": written[:-1],
    }
    (folder / f"{name}.record.json").write_text(json.dumps(record))
