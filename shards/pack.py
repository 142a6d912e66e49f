"""Pack pairs into deterministic WebDataset shards.

The way of a pair: source -> RawPair (nothing read yet) -> splits, each in hash order -> plan of shards
-> a process reads, checks and writes a whole shard -> its index sidecar -> manifest.json, last.

The same records give the same bytes: the order is the sha256 of the keys, tar headers carry no time and no owner,
JSON keys are sorted, and the plan is made before the work is shared out to processes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cmgan_dist.data.index import ShardIndex, index_name
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest, natural_splits
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import write_atomic
from cmgan_dist.jobs.local import parallel_map
from shards.pairs import RawPair, RawPairs
from shards.shard_file import PlannedShard, _try_sample, write_shard

PACKING_NAME = ".packing"
"""Marks an output that is not complete; holds the fingerprint of what is being packed."""
OUTPUT_PATTERN = re.compile(r".+-\d{6,}\.(tar|index\.npz)|\..+\.tmp|\.packing")
"""Every file that packing leaves in its folder, the manifest apart."""


# ---------------------------------------------------------------------------------------------- records


# ---------------------------------------------------------------------------------------------- members of a sample


# ---------------------------------------------------------------------------------------------- plan


def _size(record: RawPair) -> int:
    image = record.image.nbytes if isinstance(record.image, np.ndarray) else record.image.size()
    if isinstance(record.texts, tuple):
        if not any(text.strip() for text in record.texts):
            raise BadSample("the text is empty")
        return image + sum(len(text) for text in record.texts)
    return image + (record.texts.nbytes if isinstance(record.texts, np.ndarray) else record.texts.size())


def plan_shards(
    records: Iterable[RawPair], shard_samples: int, shard_bytes: float, skip_bad: bool, left_out: list[str]
) -> tuple[list[PlannedShard], str]:
    """The shards of every split, and a fingerprint of the records: keys, splits, texts, labels and sizes.

    A shard holds at most `shard_samples` records and closes before `shard_bytes` of images and texts; within a split
    the records come in the order of their keys' hashes, so a shard is a random sample of its split.
    Raises BadInput on two records with one key, and on a split that cannot be part of a file name."""
    sized: dict[str, tuple[RawPair, int]] = {}
    for record in records:
        if record.key in sized:
            first = sized[record.key][0].where
            raise BadInput(f"{record.where} has the same key '{record.key}' as {first}: rename one of them")
        if not re.fullmatch(r"[\w-]+", record.split):
            raise BadInput(f"{record.where}: split '{record.split}' may hold only letters, digits, '-' and '_'")
        size = _try_sample(record, skip_bad, left_out, partial(_size, record))
        if size is not None:
            sized[record.key] = record, size
    order = sorted(sized.values(), key=lambda item: hashlib.sha256(item[0].key.encode()).digest())

    digest = hashlib.sha256()
    for record, size in order:
        texts = record.texts if isinstance(record.texts, tuple) else ()
        digest.update(json.dumps([record.key, record.split, record.labels, texts, size]).encode())
        for array in (record.image, record.texts):
            if isinstance(array, np.ndarray):
                digest.update(array.tobytes())

    shards: list[PlannedShard] = []
    for split in natural_splits(record.split for record, _ in order):
        chosen = [item for item in order if item[0].split == split]
        count = -(-len(chosen) // shard_samples)
        limit = -(-len(chosen) // count)  # equal shards, not full ones and a small rest
        number, filled, size_sum = 0, list[RawPair](), 0
        for record, size in chosen:
            if filled and (len(filled) == limit or size_sum + size > shard_bytes):
                shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, filled))
                number, filled, size_sum = number + 1, [], 0
            filled.append(record)
            size_sum += size
        shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, filled))
    return shards, digest.hexdigest()


# ---------------------------------------------------------------------------------------------- one shard


# ---------------------------------------------------------------------------------------------- the whole output


def _is_complete(output: Path, manifest: Manifest) -> bool:
    shards = [shard for split in manifest.splits.values() for shard in split]
    try:
        for shard in shards:
            if (output / shard.name).stat().st_size != shard.bytes:
                return False
            ShardIndex.from_bytes((output / index_name(shard.name)).read_bytes(), shard.name)
    except (FileNotFoundError, BadInput):  # or the sidecar is of an older version
        return False
    return True


def _existing_manifest(output: Path) -> Manifest | None:
    try:
        return load_manifest(output)
    except BadInput:
        return None


def _prepare(output: Path, fingerprint: str, overwrite: bool) -> None:
    """Make room for the plan with this fingerprint. Raises BadInput rather than replace another data set unasked."""
    packing = output / PACKING_NAME
    interrupted = packing.read_text() if packing.exists() else ""
    occupied = (output / MANIFEST_NAME).exists() or (not interrupted and any(output.glob("*.tar")))
    old = _existing_manifest(output)
    same = fingerprint in (interrupted, old.details.get("fingerprint") if old else "")
    if occupied and not same and not overwrite:
        raise BadInput(f"{output} holds another data set: name a new folder, or pass --overwrite to replace it")
    # The manifest goes first: until the new one is written, the folder is not a data set.
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    for path in output.iterdir():
        if OUTPUT_PATTERN.fullmatch(path.name) and (not same or path.name.endswith(".tmp")):
            path.unlink()
    write_atomic(packing, fingerprint)


def _feature_dims(records: list[RawPair]) -> tuple[int | None, int | None]:
    """(F_i, F_t) of the records; None for encoded images and for texts. Raises BadInput when they differ."""
    image_dims = {r.image.shape[-1] if isinstance(r.image, np.ndarray) else None for r in records}
    text_dims = {r.texts.shape[-1] if isinstance(r.texts, np.ndarray) else None for r in records}
    for what, dims in (("image", image_dims), ("text", text_dims)):
        if len(dims) > 1:
            raise BadInput(f"the {what} features have different sizes: {', '.join(sorted(map(str, dims)))}")
    return image_dims.pop(), text_dims.pop()


@dataclass(kw_only=True)
class BuildCommand:
    """Options that every source shares."""

    output: Path
    """Folder for the shards and manifest.json."""
    overwrite: bool = False
    """Replace another data set in the output folder."""
    skip_bad: bool = False
    """Leave bad pairs out, count and list them, instead of stopping at the first."""
    shard_samples: int = 1000
    """Most samples a shard."""
    shard_mib: float = 256.0
    """Most MiB of images and texts a shard."""
    processes: int | None = None
    """Processes that write shards (None: one a core). The bytes do not depend on it."""

    @abstractmethod
    def pairs(self) -> RawPairs:
        """List the source's records. Raises BadInput when the source is missing or wrong."""

    def run(self) -> None:
        if self.shard_samples < 1 or self.shard_mib <= 0:
            raise BadInput("--shard-samples and --shard-mib must be positive")
        pairs = self.pairs()
        manifest, left_out, was_complete = pack(pairs, self)
        print(f"already packed: {self.output}" if was_complete else f"packed {self.output}")
        print_sizes(manifest)
        for note in pairs.notes:
            print(note)
        if left_out:
            print(f"left out {len(left_out)} bad pairs:", file=sys.stderr)
            for message in left_out:
                print(f"  {message}", file=sys.stderr)


def print_sizes(manifest: Manifest) -> None:
    """A table: samples, shards and MB of each split."""
    table = Table("split", "samples", "shards", "MB", title=manifest.name)
    for split, shards in manifest.splits.items():
        size = sum(shard.bytes for shard in shards) / 1e6
        table.add_row(split, str(manifest.samples(split)), str(len(shards)), f"{size:.1f}")
    Console().print(table)


def pack(pairs: RawPairs, options: BuildCommand) -> tuple[Manifest, list[str], bool]:
    """Write the pairs to `options.output`. Returns the manifest, what was left out, and whether all was there already.

    Raises BadInput on a bad pair (unless `skip_bad`), an empty split, or an output that holds another data set."""
    left_out: list[str] = []
    shards, fingerprint = plan_shards(
        pairs.records, options.shard_samples, options.shard_mib * 2**20, options.skip_bad, left_out
    )
    settings = {
        **pairs.details,
        "shard_samples": options.shard_samples,
        "shard_mib": options.shard_mib,
        "skip_bad": options.skip_bad,
    }
    described = [fingerprint, settings, pairs.name, pairs.label_kind, pairs.classes, pairs.attribution]
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    found = {shard.split for shard in shards}
    for split in pairs.expected_splits:
        if split not in found:
            raise BadInput(f"split '{split}' of {pairs.name} has no samples: add pairs or change how they are split")
    output = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        old = _existing_manifest(output)
        if old is not None and old.details.get("fingerprint") == fingerprint and _is_complete(output, old):
            return old, [], True
        _prepare(output, fingerprint, options.overwrite)
    except OSError as error:
        raise BadInput(f"cannot write into the output folder {output}: {error.strerror}") from None

    image_dim, text_dim = _feature_dims([record for shard in shards for record in shard.records])
    tasks = [(output, shard, pairs.label_kind, len(pairs.classes), options.skip_bad) for shard in shards]
    written = parallel_map(
        write_shard,
        tasks,
        title="packing",
        unit_counts=[len(shard.records) for shard in shards],
        processes=options.processes,
    )
    splits: dict[str, list[ShardInfo]] = {split: [] for split in natural_splits(found)}
    for shard, (info, messages) in zip(shards, written, strict=True):
        left_out += messages
        if info is not None:
            splits[shard.split].append(info)
    for split, infos in splits.items():
        if not infos:
            raise BadInput(f"split '{split}' of {pairs.name} has no samples: every pair of it was bad")
    manifest = Manifest(
        name=pairs.name,
        label_kind=pairs.label_kind,
        classes=pairs.classes,
        splits=splits,
        image="encoded" if image_dim is None else "features",
        image_dim=image_dim,
        text="utf8" if text_dim is None else "features",
        text_dim=text_dim,
        attribution=pairs.attribution,
        details={**settings, "left_out": len(left_out), "fingerprint": fingerprint},
    )
    write_atomic(output / MANIFEST_NAME, manifest.to_json())
    (output / PACKING_NAME).unlink()
    return manifest, left_out, False
