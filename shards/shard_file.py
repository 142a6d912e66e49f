"""One shard: its members, its tar and its index sidecar."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import LabelKind, ShardInfo
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import write_atomic
from shards.pairs import RawPair, Readable
from shards.scan import check_image, scan_shard


def _npy(array: np.ndarray) -> bytes:
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise BadSample("the features hold NaN or Inf")
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _read_texts(texts: tuple[str, ...] | Readable) -> tuple[str, ...]:
    if isinstance(texts, tuple):
        lines: Iterable[str] = texts
    else:
        try:
            lines = texts.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise BadSample(f"the text is not UTF-8 ({error.reason} at byte {error.start})") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise BadSample("the text is empty")
    return found


def read_members(record: RawPair, label_kind: LabelKind, classes: int) -> dict[str, bytes]:
    """Extension -> bytes of a sample's members, in their order in the tar. Raises BadSample."""
    if any(not 0 <= label < classes for label in record.labels):
        raise BadSample(f"label {list(record.labels)} is out of range: there are {classes} classes")
    if label_kind == "single" and len(record.labels) != 1:
        raise BadSample(f"has {len(record.labels)} labels, expected one")
    members: dict[str, bytes] = {}
    if isinstance(record.image, np.ndarray):
        members["image.npy"] = _npy(record.image)
    else:
        data = record.image.read()
        extension, _, _ = check_image(data)
        members[extension] = data
    record_json: dict[str, Any] = {}
    if isinstance(record.texts, np.ndarray):
        members["text.npy"] = _npy(record.texts)
    else:
        texts = _read_texts(record.texts)
        if len(texts) == 1:
            members["txt"] = texts[0].encode()
        else:
            record_json["texts"] = texts
    if label_kind == "single":
        record_json["label"] = record.labels[0]
    elif label_kind == "multi":
        record_json["labels"] = record.labels
    if record_json:
        members["json"] = json.dumps(record_json, sort_keys=True, ensure_ascii=False).encode()
    return members


@dataclass(frozen=True)
class PlannedShard:
    name: str
    split: str
    records: list[RawPair]


T = TypeVar("T")


def _try_sample(record: RawPair, skip_bad: bool, left_out: list[str], read: Callable[[], T]) -> T | None:
    """``read()``; a BadSample of it becomes a BadInput that names the pair, or with `skip_bad` a note and None."""
    try:
        return read()
    except BadSample as error:
        message = f"{record.where}: {error}"
        if not skip_bad:
            raise BadInput(f"{message}; mend or remove it, or pass --skip-bad to leave such pairs out") from None
        left_out.append(message)
        return None


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid, gid are 0 and the owner's names empty unless set
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def write_shard(
    output: Path, shard: PlannedShard, label_kind: LabelKind, classes: int, skip_bad: bool
) -> tuple[ShardInfo | None, list[str]]:
    """Write the tar aside, fsync, rename; then its sidecar. A whole shard that an interrupted run left behind is kept.

    Returns what was written (None: no good record) and what was left out. Raises BadInput on a bad record."""
    final = output / shard.name
    if final.exists():
        scan = scan_shard(final, shard.name)
        if not scan.damage and len(scan.samples) == len(shard.records):
            write_atomic(output / index_name(shard.name), scan.index.to_bytes())
            return scan.info, []
    left_out: list[str] = []
    aside = output / f".{shard.name}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
                for record in shard.records:
                    read = partial(read_members, record, label_kind, classes)
                    members = _try_sample(record, skip_bad, left_out, read)
                    for extension, data in (members or {}).items():
                        add_member(tar, f"{record.key}.{extension}", data)
            file.flush()
            os.fsync(file.fileno())
        if len(left_out) == len(shard.records):
            return None, left_out
        scan = scan_shard(aside, shard.name)
        os.replace(aside, final)
        write_atomic(output / index_name(shard.name), scan.index.to_bytes())
    except OSError as error:
        raise BadInput(f"cannot write {final}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    return scan.info, left_out
