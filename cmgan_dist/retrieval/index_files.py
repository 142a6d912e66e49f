"""The folder of an index, replaced in one step.

    INDEX/index.json       what the folder holds (`IndexManifest`) with the checksums of the other files
    INDEX/vectors.npy      exact: float32 [N, E]
    INDEX/vectors.faiss    ivf_sq8
    INDEX/items.parquet    a row for each of the N items, in the order of their ids
    INDEX/query.*.onnx     image and text: the model that made the vectors, for queries (`query_encoder`), where asked

A change writes each file as NAME.new, then replaces index.json, then gives the files their names. Whenever it is
killed, the checksums in index.json tell which of NAME and NAME.new belong to it, so one whole index is always there.

Opening an index must not read gigabytes, so each file has two checksums: the SHA-256 of all of it, which is compared
when asked for, and a fingerprint that is compared always: the SHA-256 of its size and of 64 pieces spread over it, or
of all of a file up to 4 MiB. A cut file, a file of another index or one that is half written never has the
fingerprint; a few flipped bytes in a large file may."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmgan_dist.data.folder import composed
from cmgan_dist.errors import BadInput
from cmgan_dist.files import (
    LATER,
    OtherVersion,
    commit_files,
    open_regular,
    parse_sealed,
    read_bytes,
    sealed_json,
    sha256_of,
)
from cmgan_dist.jobs.lock import owning

MANIFEST_NAME, ITEMS_NAME = "index.json", "items.parquet"
VECTORS_NAMES = {"exact": "vectors.npy", "ivf_sq8": "vectors.faiss"}
"""Kind -> name of the vectors' file."""
ENCODER_NAMES = {"image": "query.image.onnx", "text": "query.text.onnx"}
"""Modality -> name of the query encoder's file."""
VERSION = 1
SMALL = 1 << 22
"""Files up to 4 MiB are hashed whole at each opening, in about 10 ms."""
PIECES, PIECE = 64, 1 << 12


@dataclass(frozen=True)
class FileSums:
    """What index.json says of a file."""

    bytes: int
    sha256: str
    fingerprint: str


@dataclass(frozen=True)
class IndexManifest:
    """The contents of index.json."""

    kind: str
    """exact or ivf_sq8."""
    dim: int
    """E."""
    count: int
    """N."""
    model: dict[str, str]
    """Which model made the vectors: "sha256", "run", "data_name"."""
    source: dict[str, str]
    """What the first embeddings are of: "kind", "location"."""
    classes: list[str]
    attribution: str
    embeddings: list[dict[str, Any]]
    """What was indexed: "location", "sha256" of its embeddings.json, "source", "first_id"."""
    recall: float = 1.0
    """Recall@10 against exact search, measured when the index was built."""
    nprobe: int = 0
    """ivf_sq8: cells that a query visits."""
    chance: tuple[float, float] = (0.0, 0.0)
    """Mean and standard deviation of scores between random items."""
    near: float = 0.0
    """Score that the best hit of 9 in 10 stored items reaches, their own sample left out."""
    next_id: int = 0
    """Id of the next item that is added; ids of removed ones are not given again."""
    files: dict[str, FileSums] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of index.json; `read_manifest` reads it."""
        return sealed_json({"version": VERSION, **asdict(self)})


def read_manifest(folder: Path) -> IndexManifest:
    """Return what index.json says. Raises BadInput when it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    try:
        record = parse_sealed(read_bytes(path), VERSION)
        files = {name: FileSums(**sums) for name, sums in record.pop("files").items()}
        mean, std = record.pop("chance")
        classes = [composed(name) for name in record.pop("classes")]
        manifest = IndexManifest(**record, classes=classes, chance=(float(mean), float(std)), files=files)
        if set(files) - set(ENCODER_NAMES.values()) == {VECTORS_NAMES[manifest.kind], ITEMS_NAME}:
            return manifest
        raise ValueError(f"files are {sorted(files)}")
    except OtherVersion as error:
        raise BadInput(f"{path} has version {error.version}, this program reads {VERSION}: index again") from None
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: make the index by launchers/index.py, or name another") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} cannot be read ({error!r}): restore it or index again") from None


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's size and of pieces spread over it; of all its bytes up to SMALL.

    Raises OSError when it cannot be read."""
    size = path.stat().st_size
    if size <= SMALL:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with open_regular(path) as file:
        for piece in range(PIECES):
            digest.update(os.pread(file.fileno(), PIECE, piece * (size - PIECE) // (PIECES - 1)))
    return digest.hexdigest()


def sums_of(path: Path) -> FileSums:
    """Return what index.json says of a file. Raises OSError when it cannot be read."""
    return FileSums(path.stat().st_size, sha256_of(path), fingerprint(path))


def whole_file(folder: Path, name: str, expected: FileSums, *, verify: bool) -> Path:
    """Return the file that index.json means: NAME, or NAME.new where a change was killed before its last step.

    `verify`: compare the SHA-256 of all of it. Raises BadInput when it is missing, cut, of another index or damaged."""
    for path in (folder / name, folder / (name + LATER)):
        try:
            same = path.stat().st_size == expected.bytes and fingerprint(path) == expected.fingerprint
            if same and (not verify or sha256_of(path) == expected.sha256):
                return path
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}): restore it or index again") from None
    path = folder / name
    if not path.is_file():
        raise BadInput(f"{path} is missing, but named in {MANIFEST_NAME}: restore it or index again")
    size = path.stat().st_size
    what = f"has {size} bytes, expected {expected.bytes}" if size != expected.bytes else "has another checksum"
    raise BadInput(f"{path} is damaged or of another index ({what}): restore it or index again")


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Hold the right to change an index; nobody else can until the end.

    The folder is made when need be. Raises BadInput when somebody else is changing it, or it cannot be written."""
    try:
        with owning(folder, "index"):
            _settle(folder)
            yield
    except OSError as error:
        raise BadInput(
            f"the index {folder} cannot be written ({error.strerror or error}): free space there and start again; what "
            "was there before is whole"
        ) from None


def _settle(folder: Path) -> None:
    """Give the files of an index whose change was killed after index.json their names: NAME.new is written anew soon.

    A folder without a whole index stays as it is. Raises OSError when a file cannot be renamed."""
    if (folder / MANIFEST_NAME).exists():
        with suppress(BadInput):
            for name, sums in read_manifest(folder).files.items():
                os.replace(whole_file(folder, name, sums, verify=False), folder / name)


def aside(folder: Path, name: str) -> Path:
    """Return where a file is written before `commit`."""
    return folder / (name + LATER)


def commit(folder: Path, manifest: IndexManifest, changed: Sequence[str]) -> None:
    """Make the files `changed`, which were written `aside`, those of the index, in one step. Raises OSError.

    `manifest.files` are the checksums of all its files."""
    for name in changed:
        with open(aside(folder, name), "rb") as file:
            os.fsync(file.fileno())
    commit_files(folder, MANIFEST_NAME, manifest.to_json(), changed)
    optional = (*VECTORS_NAMES.values(), *ENCODER_NAMES.values())
    _remove(folder / name for name in optional if name not in manifest.files)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        path.with_name(path.name + LATER).unlink(missing_ok=True)
