"""Small data sets made on the spot: features in which a class lies together, and small pictures with captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from cmgan_dist.data.index import Layout, ShardIndex, index_name
from cmgan_dist.data.manifest import Manifest, ShardInfo
from cmgan_dist.data.sample import parse_labels
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.files import sha256_of


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def jpeg(rng: np.random.Generator, height: int = 40, width: int = 48) -> bytes:
    out = io.BytesIO()
    pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((height // 4, width // 4, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """By the standard library, so that our own reader meets what others write."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index_tar(path: Path) -> ShardInfo:
    """Write the sidecar of a tar and return its line of the manifest."""
    with open(path, "rb") as file:
        found = list(iter_groups(file, path.name))
    records = [{m.extension: m.data for m in group}.get("json", b"{}") for group in found]
    end = path.stat().st_size
    if found and (last := found[-1][-1]).header:
        end = last.start + 512 + len(last.data) + -len(last.data) % 512
    labels = [parse_labels(json.loads(record)) for record in records]
    index = ShardIndex.build([group[0].start for group in found], end, labels, [Layout.of(group) for group in found])
    (path.parent / index_name(path.name)).write_bytes(index.to_bytes())
    return ShardInfo(path.name, len(found), path.stat().st_size, sha256_of(path))


def write_manifest(folder: Path, splits: dict[str, list[ShardInfo]], **fields: object) -> None:
    defaults: dict[str, object] = {"name": "toy", "label_kind": "none", "classes": []}
    (folder / "manifest.json").write_text(Manifest(splits=splits, **{**defaults, **fields}).to_json())  # type: ignore[arg-type]


def make_features(
    folder: Path,
    *,
    splits: dict[str, list[int]] | None = None,
    classes: int = 3,
    dims: tuple[int, int] = (12, 7),
    captions: int = 1,
    label_kind: str = "single",
    seed: int = 0,
) -> Path:
    """A data set of features in which image and text of a class lie near each other; `splits`: samples per shard."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    centres = [rng.normal(size=(classes, d)) for d in dims]
    infos: dict[str, list[ShardInfo]] = {}
    for split, counts in (splits or {"train": [40, 25, 31], "val": [24], "test": [24]}).items():
        infos[split] = []
        for shard, count in enumerate(counts):
            members = []
            for i in range(count):
                key = f"{split}{shard}-{i:04d}"
                label = int(rng.integers(classes))
                image = centres[0][label] + 0.5 * rng.normal(size=dims[0])
                text = centres[1][label] + 0.5 * rng.normal(size=(captions, dims[1]))
                members.append((f"{key}.image.npy", npy(image.astype(np.float32))))
                members.append((f"{key}.text.npy", npy((text if captions > 1 else text[0]).astype(np.float32))))
                if label_kind == "single":
                    members.append((f"{key}.json", json.dumps({"label": label}).encode()))
                elif label_kind == "multi":
                    both = sorted({label, int(rng.integers(classes))})
                    members.append((f"{key}.json", json.dumps({"labels": both}).encode()))
            path = folder / f"{split}-{shard:06d}.tar"
            write_tar(path, members)
            infos[split].append(index_tar(path))
    write_manifest(
        folder,
        infos,
        label_kind=label_kind,
        classes=[f"class {c}" for c in range(classes)] if label_kind != "none" else [],
        image="features",
        image_dim=dims[0],
        text="features",
        text_dim=dims[1],
    )
    return folder


def make_raw(
    folder: Path,
    *,
    counts: dict[str, int] | None = None,
    classes: int = 3,
    seed: int = 0,
    spoil: dict[int, str] | None = None,
) -> Path:
    """Small JPEGs with one to three captions each. `spoil`: training sample -> "image", "text" or "label" to break."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "square", "circle", "dog", "boat"]
    folder.mkdir()
    infos: dict[str, list[ShardInfo]] = {}
    for split, count in (counts or {"train": 40, "val": 16, "test": 16}).items():
        members = []
        for i in range(count):
            texts = [" ".join(rng.choice(words, 4)) for _ in range(1 + i % 3)]
            record: dict[str, object] = {"texts": texts, "label": int(rng.integers(classes))}
            image = jpeg(rng)
            fault = (spoil or {}).get(i) if split == "train" else None
            if fault == "image":
                image = image[:200]
            elif fault == "text":
                del record["texts"]
            elif fault == "label":
                record["label"] = classes + 4
            members += [(f"{split}{i}.jpg", image), (f"{split}{i}.json", json.dumps(record).encode())]
        path = folder / f"{split}-000000.tar"
        write_tar(path, members)
        infos[split] = [index_tar(path)]
    write_manifest(folder, infos, label_kind="single", classes=[f"class {c}" for c in range(classes)])
    return folder
