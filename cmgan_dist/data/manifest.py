"""``manifest.json``: what a data set holds, and what a model must know of it.

A data set is a folder (or URL) that holds ``manifest.json``, WebDataset tars and, beside each tar, an index sidecar:

    DIR/manifest.json
    DIR/train-000000.tar          plain WebDataset shard: the members of a sample stand together (sample.py)
    DIR/train-000000.index.npz    where its samples and their members lie, and their labels (index.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
LabelKind = Literal["single", "multi", "none"]
"""Whether a sample has one class, any number of them, or the data set has none."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str
    """File name relative to the manifest."""
    samples: int
    bytes: int
    sha256: str
    """SHA-256 of the whole tar, in hexadecimal."""


@dataclass
class Manifest:
    """What a data set holds."""

    name: str
    label_kind: LabelKind
    classes: list[str]
    """Class i is ``classes[i]``; empty for pairs without labels."""
    splits: dict[str, list[ShardInfo]]
    """Split name -> shards in their canonical order."""
    image: str = "encoded"
    """``encoded`` or ``features``."""
    image_dim: int | None = None
    """F_i when `image` is ``features``."""
    text: str = "utf8"
    """``utf8`` or ``features``."""
    text_dim: int | None = None
    """F_t when `text` is ``features``."""
    attribution: str = ""
    """Source and licence of the data, one paragraph."""
    details: dict[str, Any] = field(default_factory=dict)
    """How it was made: source, options, backbones. Informative."""

    def shards(self, split: str) -> list[ShardInfo]:
        """Return the shards of a split. Raises BadInput when it is missing or has no samples."""
        if split not in self.splits:
            packing = f"pack it again with --{split} 0.1, or " if split in ("val", "test") else ""
            found = ", ".join(self.splits) or "none"
            raise BadInput(f"{self.name} has no split '{split}': its manifest has {found}; {packing}name another split")
        shards = self.splits[split]
        if not sum(s.samples for s in shards):
            raise BadInput(f"split '{split}' of {self.name} has no samples: pack some or name another split")
        return shards

    def samples(self, split: str) -> int:
        """Return the number of samples in a split, 0 when there is none of this name."""
        return sum(s.samples for s in self.splits.get(split, []))

    def to_json(self) -> str:
        """Return the text of ``manifest.json``; `from_json` reads it."""
        record = {"version": MANIFEST_VERSION, **asdict(self)}
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, location: str) -> Manifest:
        """Return the manifest in the text of a file; `location` is its path or URL, for messages.

        Raises BadInput when the text is not a manifest of this version."""
        try:
            record = parse_json(text)
            version = record.pop("version")
            splits = {k: [ShardInfo(**s) for s in v] for k, v in record.pop("splits").items()}
            manifest = cls(splits=splits, **record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{location} is not a manifest ({error}); write it with 'python -m shards index'") from None
        if version != MANIFEST_VERSION:
            raise BadInput(
                f"{location} has version {version}, this program reads {MANIFEST_VERSION}: pack the data again"
            )
        if manifest.label_kind not in ("single", "multi", "none"):
            raise BadInput(f"{location}: label_kind is {manifest.label_kind!r}, expected single, multi or none")
        return manifest


def manifest_path(folder: Path) -> Path:
    """Return DIR/manifest.json. Raises BadInput when the folder or the file is missing."""
    if not folder.is_dir():
        raise BadInput(f"data folder {folder} does not exist: pack one with 'python -m shards build'")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BadInput(f"{folder} has no {MANIFEST_NAME}: write it with 'python -m shards index {folder}'")
    return path


def load_manifest(data: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of a folder. Raises BadInput when the folder or the manifest is missing or wrong."""
    path = manifest_path(Path(data))
    return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))


def natural_splits(names: Iterable[str]) -> list[str]:
    """Return split names in the order a reader expects: train, val, test, then the rest by name."""
    first = ["train", "val", "test"]
    found = set(names)
    return [n for n in first if n in found] + sorted(found - set(first))


@dataclass
class DataSpec:
    """What a model must know of its data; stored beside its weights."""

    classes: list[str]
    """Class names in label order; empty without labels."""
    label_kind: str
    """single, multi or none (LabelKind)."""
    image_dim: int | None
    """F_i of precomputed image features; None for encoded images."""
    text_dim: int | None
    """F_t of precomputed text features; None for texts."""

    @classmethod
    def of(cls, manifest: Manifest) -> DataSpec:
        """Return what a model must know of the manifest's data."""
        return cls(manifest.classes, manifest.label_kind, manifest.image_dim, manifest.text_dim)
