"""A shard on disk: the members of its samples, its tar, and the index sidecar beside it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeVar

import numpy as np

from cmgan_dist.data.cache import kept_store
from cmgan_dist.data.folder import is_unicode
from cmgan_dist.data.index import ShardIndex, index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import LabelKind, ShardInfo, check_shard_name
from cmgan_dist.data.sample import MOST_NUMBERS, NumberOf, no_names, parse_sample
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore, LocalStore
from cmgan_dist.errors import BadInput, BadSample, shards_command, shown
from cmgan_dist.files import sha256_of, write_atomic
from cmgan_dist.jobs.ledger import WRITTEN, Record
from cmgan_dist.jobs.staging import staging
from shards.pairs import RawPair, Readable, lines_of
from shards.scan import ShardScan, scan_shard

Members = Iterable[tuple[str, bytes]]
"""(extension, bytes) of a sample's members, in their order in the tar."""
Result = TypeVar("Result")


def npy(array: np.ndarray, dtype: str = "float32") -> bytes:
    """Return the ``.npy`` file of an array as `dtype`. Raises BadSample when a number is not finite in that type, and
    when there are more than are read."""
    if array.size > MOST_NUMBERS:
        raise BadSample(f"its features of shape {array.shape} have {array.size} numbers, more than {MOST_NUMBERS}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=dtype)
    if not np.isfinite(array).all():
        raise BadSample(f"the features hold NaN or Inf, or numbers too large for {dtype}")
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def read_texts(texts: tuple[str, ...] | Readable) -> tuple[str, ...]:
    """Return the texts of a pair without spaces around them, at least one. Raises BadSample."""
    if isinstance(texts, tuple):
        lines: Iterable[str] = texts
    else:
        try:
            lines = lines_of(texts.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadSample(f"the text is not UTF-8 ({error.reason} at byte {error.start})") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise BadSample("the text is empty")
    if not all(map(is_unicode, found)):
        raise BadSample("the text has half a character, a lone surrogate")
    return found


def read_members(pair: RawPair, label_kind: LabelKind, classes: int) -> list[tuple[str, bytes]]:
    """Read a raw pair and return its sample's `Members`; there are `classes` classes. Raises BadSample."""
    labels = tuple(map(int, pair.labels))
    if label_kind != "none":
        Judge(label_kind, classes, None, None).check_labels(labels)
    members: list[tuple[str, bytes]] = []
    if isinstance(pair.image, np.ndarray):
        members.append(("image.npy", npy(pair.image)))
    else:
        data = pair.image.read()
        from cmgan_dist.data.image import check_image  # torch takes seconds to import, and --help waits

        extension, _, _ = check_image(data)
        members.append((extension, data))
    fields: dict[str, Any] = {}
    if isinstance(pair.texts, np.ndarray):
        members.append(("text.npy", npy(pair.texts)))
    else:
        texts = read_texts(pair.texts)
        if len(texts) == 1:
            members.append(("txt", texts[0].encode()))
        else:
            fields["texts"] = texts
    if label_kind == "single":
        fields["label"] = labels[0]
    elif label_kind == "multi":
        fields["labels"] = labels
    if fields:
        members.append(("json", json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()))
    parse_sample(pair.key, dict(members), labelled=label_kind != "none")  # what is read must be what is written
    return members


def try_sample(read: Callable[[], Result], where: str, skip_bad: bool, left_out: list[str]) -> Result | None:
    """Return ``read()``, or None when it raises BadSample and `skip_bad` is on; `left_out` then gets a line.

    Raises BadInput naming `where` for a bad sample when `skip_bad` is off."""
    try:
        return read()
    except BadSample as error:
        message = f"{where}: {error}"
        if not skip_bad:
            raise BadInput(f"{message}; mend or remove it, or pass --skip-bad to leave such pairs out") from None
        left_out.append(message)
        return None


def distinct(key: str, taken: dict[str, int]) -> str:
    """Return a key that no sample of a shard has yet: the key itself, or with a number behind it, as samples of one key
    that follow each other would be read as one. `taken`: key -> how often it was asked for; it is added to."""
    found, times = key, taken.get(key, 0)
    while found in taken:
        times += 1
        found = f"{key}-{times + 1}"
    taken[key], taken[found] = times, taken.get(found, 0)
    return found


def _write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> int:
    """Write a tar of (key, members) and flush it to disk; returns the number of samples.

    The headers carry no time and no owner, so the same samples give the same bytes."""
    count = 0
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for key, members in samples:
                count += 1
                for extension, data in members:
                    header = tarfile.TarInfo(f"{key}.{extension}")
                    header.size, header.mode = len(data), 0o644
                    tar.addfile(header, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
    return count


def _check_all_found(scan: ShardScan, count: int, final: Path) -> None:
    """Raise BadInput where a shard was read back otherwise than the `count` samples that were written."""
    if scan.info.samples != count or scan.damage:
        what = shown(scan.damage or scan.first_foreign or "some were read as one")
        raise BadInput(
            f"{final}: {count} samples were written and {scan.info.samples} are found in it: {what}; "
            "give these samples other names"
        )


def write_shard(
    output: Path, name: str, samples: Iterable[tuple[str, Members]], number_of: NumberOf = no_names
) -> ShardInfo | None:
    """Write the shard `name` of (key, members) and its index sidecar into the folder `output`.

    `number_of`: for classes that samples name.

    The tar is written aside, flushed to disk and read back for its checksum and index. The sidecar gets its name first
    and the tar last, so a tar that is there is whole and has its sidecar. Several processes may write one shard at
    once: the last one wins. Returns None when there are no samples; then no file is written.
    Raises BadInput when a file cannot be written, a sample that was written is not found when it is read back, or
    `name` is none for a shard, and whatever `samples` raises."""
    try:
        check_shard_name(name)
    except ValueError as error:
        raise BadInput(f"{error}: write the manifest anew") from None
    final, index = output / name, output / index_name(name)
    try:
        with staging(output) as folder:
            count = _write_tar(folder / "tar", samples)
            if not count:
                return None
            scan = scan_shard(folder / "tar", name, number_of=number_of)
            _check_all_found(scan, count, final)
            write_atomic(folder / "index", scan.index.to_bytes())
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / "index", index)
            os.replace(folder / "tar", final)
    except OSError as error:
        raise BadInput(f"cannot write {final}: {error.strerror}") from None
    return scan.info


def put_shard(
    output: FileStore, name: str, samples: Iterable[tuple[str, Members]], number_of: NumberOf = no_names
) -> ShardInfo | None:
    """Write a shard as `write_shard` does, into a folder or to a URL.

    For a URL it is made in a temporary folder of this machine and copied, sidecar first. Raises as that does."""
    if output.local:
        return write_shard(Path(output.path), name, samples, number_of)
    with TemporaryDirectory() as folder:
        info = write_shard(Path(folder), name, samples, number_of)
        if info is not None:
            for file in (index_name(name), name):
                output.put_file(Path(folder) / file, file)
    return info


def tars_among(names: list[str]) -> list[str]:
    """Return the tars among the names of files, those that are hidden or in hidden folders apart."""
    tars = [name for name in names if name.endswith(".tar")]
    return [name for name in tars if not any(part.startswith(".") for part in name.split("/"))]


def has_index(output: FileStore, shard: ShardInfo) -> bool:
    """Return whether the sidecar of a shard can be read, is the one listed, and has as many samples as the shard."""
    name = index_name(shard.name)
    try:
        data = output.read(name)
        index = ShardIndex.from_bytes(data, name)
    except (FileNotFoundError, BadInput):
        return False
    same = shard.index_sha256 in ("", hashlib.sha256(data).hexdigest())
    return same and len(index) == shard.samples


def finished_record(
    source: str, settings: dict[str, Any], info: ShardInfo | None, output: FileStore, left_out: list[str]
) -> Record:
    """Return the record of a shard that was written, or of which no sample was good, and of the sidecar beside it.

    `source`: SHA-256 of what it was made from; `settings`: how."""
    if info is None:
        return Record(source, settings, True, None, left_out)
    written = {name: value for name, value in asdict(info).items() if name in WRITTEN}
    sidecar = index_name(info.name)
    beside = {"name": sidecar, "samples": info.samples, "sha256": info.index_sha256, "bytes": output.size(sidecar)}
    return Record(source, settings, True, written, left_out, [beside])


def see_verify(data: str) -> str:
    """Return what to do about a shard of a data set that is damaged."""
    place = public_url(data)
    listed = f"mend or remove what {shards_command('verify', place)} lists"
    return listed if "://" in place else f"{listed}, then {shards_command('index', '--overwrite', place)}"


def opened_source(data: str, source: ShardInfo) -> BinaryIO:
    """Open a shard of a data set that another is made of; a remote one is compared when it is fetched.

    Raises BadInput when it is not what its manifest says, and OSError when it cannot be read."""
    store = kept_store(data)
    if isinstance(store, LocalStore) and sha256_of(store.folder / source.name) != source.sha256:
        raise BadInput(f"{store.location(source.name)} is not what its manifest says: {see_verify(data)}")
    return store.file(source)


def check_count(source: ShardInfo, found: int) -> None:
    """Raise BadInput when a shard that was read has another number of samples than its manifest says."""
    if found != source.samples:
        raise BadInput(
            f"{source.name} has {found} samples, its manifest says {source.samples}: "
            "write the manifest anew by 'python -m shards index --overwrite'"
        )
