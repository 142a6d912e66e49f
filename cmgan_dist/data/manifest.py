"""``manifest.json``: what a data set holds, and what a model must know of it.

A data set is a folder (or URL) that holds ``manifest.json``, WebDataset tars and, beside each tar, an index sidecar:

    DIR/manifest.json
    DIR/train-000000.tar          plain WebDataset shard: the members of a sample stand together (sample.py)
    DIR/train-000000.index.npz    where its samples and their members lie, and their labels (index.py)
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cmgan_dist.data.folder import composed, is_plain, is_unicode, read_file
from cmgan_dist.errors import BadInput, BadSample, Unreadable, shards_command, shown
from cmgan_dist.files import parse_json_once

MANIFEST_NAME = "manifest.json"
UNFINISHED = (".packing", "*.build.json", "*.features.json")
"""What 'shards build' and 'shards features' leave in a folder before its manifest."""
MANIFEST_VERSION = 1
MOST_MANIFEST_BYTES = 64 << 20
"""Bytes of the largest manifest, of some 250,000 shards."""
LabelKind = Literal["single", "multi", "none"]
"""Whether a sample has one class, any number of them, or the data set has none."""


def check_shard_name(name: str) -> None:
    """Raise ValueError unless a name is one for a shard: a path in the data set's folder or below, without control
    characters."""
    if not is_plain(name) or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"{shown(name) or 'an empty name'} is no name for a shard in the folder or below")


def repeated(names: Iterable[str]) -> str:
    """Return the first name that stands there twice, "" where none does."""
    return next((name for name, count in Counter(names).items() if count > 1), "")


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str
    """File name relative to the manifest."""
    samples: int
    bytes: int
    sha256: str
    """SHA-256 of the whole tar, in hexadecimal."""
    index_sha256: str = ""
    """SHA-256 of its sidecar; '' where the manifest does not say it."""

    def __post_init__(self) -> None:
        """Check the fields. Raises ValueError."""
        if not isinstance(self.name, str) or not isinstance(self.sha256, str) or not isinstance(self.index_sha256, str):
            raise ValueError("the name or a checksum of a shard is no text")
        check_shard_name(self.name)
        for number in (self.samples, self.bytes):
            if type(number) is not int or number < 0:
                raise ValueError(f"shard {self.name} has {number!r} samples or bytes")


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
    labels: str = "numbers"
    """What the labels of samples are: ``numbers`` of classes, or their ``names``."""
    attribution: str = ""
    """Source and licence of the data, one paragraph."""
    details: dict[str, Any] = field(default_factory=dict)
    """How it was made: source, options, backbones. Informative."""

    def shards(self, split: str, place: str = "DIR") -> list[ShardInfo]:
        """Return the shards of a split; `place` is where the data set lies, for messages.

        Raises BadInput when it is missing or has no samples."""
        if split not in self.splits:
            found = ", ".join(self.splits) or "none"
            command = f"draw one by {shards_command('split', place, f'--{split}', 0.1, '--output', 'NEW')}, or "
            way = command if split in ("val", "test") and "train" in self.splits else ""
            raise BadInput(f"{self.name} has no split '{split}': its manifest has {found}; {way}name another split")
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
    def from_json(cls, text: str | bytes, location: str) -> Manifest:
        """Return the manifest in the text of a file, UTF-8; `location` is its path or URL, for messages.

        Raises BadInput when the text is not a manifest of this version."""
        try:
            record = parse_json_once(text)
            version = record.pop("version")
            if version != MANIFEST_VERSION:
                raise BadInput(
                    f"{location} has version {version!r}, this program reads {MANIFEST_VERSION}: pack the data again"
                )
            splits = {k: [ShardInfo(**s) for s in v] for k, v in record.pop("splits").items()}
            manifest = cls(splits=splits, **record)
            manifest.check()
            manifest.classes = [composed(name) for name in manifest.classes]
        except BadInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = shown(str(error))
            raise BadInput(f"{location} is not a manifest ({said}): {_write_anew(location)}") from None
        return manifest

    def check(self) -> None:
        """Check the fields, and that terminals and figures can show the names. Raises ValueError."""
        if self.label_kind not in ("single", "multi", "none"):
            raise ValueError(f"label_kind is {self.label_kind!r}, expected single, multi or none")
        if self.labels not in ("numbers", "names"):
            raise ValueError(f"its labels are {self.labels!r}, expected numbers or names")
        if not isinstance(self.classes, list) or not isinstance(self.details, dict):
            raise ValueError("its classes are no list, or its details no record")
        for name in (self.name, *self.classes, *self.splits):
            if not isinstance(name, str) or not is_plain(name):
                raise ValueError(f"{name!r} is no name: one of a line without control characters is")
        twice = repeated(map(composed, self.classes))
        if twice:
            raise ValueError(f"it has class {twice!r} twice")
        if not isinstance(self.attribution, str) or not is_unicode(self.attribution):
            raise ValueError("its attribution is no text")
        for kind, dim, features in ((self.image, self.image_dim, "encoded"), (self.text, self.text_dim, "utf8")):
            if kind not in (features, "features") or (kind == "features") != (dim is not None):
                raise ValueError(f"it holds {kind!r} of size {dim}")
            if dim is not None and (type(dim) is not int or dim < 1):
                raise ValueError(f"features of size {dim!r}")
        twice = repeated(shard.name for shards in self.splits.values() for shard in shards)
        if twice:
            raise ValueError(f"it lists {twice} twice")


def unfinished_mark(names: Iterable[str]) -> str | None:
    """Return the first of the names of files that says that a data set beside it is unfinished, None for none: one of
    UNFINISHED, in a folder that has no manifest."""
    found = sorted(names)
    finished = {PurePosixPath(name).parent for name in found if PurePosixPath(name).name == MANIFEST_NAME}
    paths = (path for path in map(PurePosixPath, found) if path.parent not in finished)
    return next((str(path) for path in paths if any(fnmatchcase(path.name, each) for each in UNFINISHED)), None)


def manifest_path(folder: Path) -> Path:
    """Return DIR/manifest.json. Raises BadInput when the folder or the file is missing."""
    if not folder.is_dir():
        several = " (for several data sets give --data several times)" if "," in str(folder) else ""
        raise BadInput(f"data folder {folder} does not exist{several}: pack one with 'python -m shards build'")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if unfinished_mark(os.listdir(folder)) is not None:
            raise BadInput(
                f"{folder} has no {MANIFEST_NAME}, as it is unfinished: start the same 'python -m shards build' (or "
                "features), all its tasks, again"
            )
        raise BadInput(f"{folder} has no {MANIFEST_NAME}: write it with {shards_command('index', folder)}")
    return path


def load_manifest(data: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of a folder. Raises BadInput when the folder or the manifest is missing or wrong."""
    path = manifest_path(Path(data))
    return Manifest.from_json(read_manifest(path), str(path))


def read_manifest(path: Path) -> bytes:
    """Return the bytes of a manifest in a folder. Raises BadInput when it is too large or no file, Unreadable when the
    system does not give it."""
    try:
        return read_file(path, MOST_MANIFEST_BYTES)
    except BadSample as error:
        if isinstance(error.__context__, OSError):
            raise Unreadable(f"{path} {error}: make it readable, or restore it") from None
        raise BadInput(f"{path} {error}: {_write_anew(str(path))}") from None


def _write_anew(location: str) -> str:
    """Return what to do about a manifest at a path or URL. The one that is there is not kept: it cannot be read."""
    folder = location.rpartition("/")[0] or "."
    if "://" in location:
        command = "'python -m shards index --overwrite DIR'"
        return f"restore it, or run {command} where the files of {folder} are kept and upload it"
    return f"restore it, or remove it and run {shards_command('index', '--overwrite', folder)}"


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
