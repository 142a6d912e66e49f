"""Pack raw pairs into deterministic WebDataset shards.

The way of a pair: source -> RawPair (nothing read yet) -> splits, each in hash order -> plan of shards
-> a process reads, checks and writes a whole shard with its index sidecar -> manifest.json, last.

The same pairs give the same bytes: the order is the sha256 of the keys, tar headers carry no time and no owner,
JSON keys are sorted, and the plan is made before the work is shared out to processes."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmgan_dist.data.folder import check_output
from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import MANIFEST_NAME, LabelKind, Manifest, ShardInfo, load_manifest, natural_splits
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import write_atomic
from cmgan_dist.jobs.local import parallel_map
from cmgan_dist.jobs.lock import owning
from cmgan_dist.jobs.staging import remove_leftovers
from shards.assemble import assemble, print_summary, write_manifest
from shards.pairs import RawPair, RawPairs
from shards.scan import scan_shard
from shards.shard_file import Members, has_index, read_members, try_sample, write_shard

PACKING_NAME = ".packing"
"""Marks an output that is not complete; holds the fingerprint of what is being packed."""
LOCK = "build"
"""What is owned of an output while a data set is written there."""
OUTPUT_PATTERN = re.compile(r".+-\d{6,}\.(tar|index\.npz)|\.packing")
"""Every file that packing leaves in its folder, the manifest apart."""


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
        """List the raw pairs of the source. Raises BadInput when the source is missing or wrong."""

    def run(self) -> None:
        """Pack the source and print what was packed. Raises BadInput as `pack` does."""
        if self.shard_samples < 1 or self.shard_mib <= 0:
            raise BadInput("--shard-samples and --shard-mib must be positive")
        source = self.pairs()
        try:
            manifest, left_out, was_complete = pack(source, self)
        finally:
            source.close()
        headline = f"already packed: {self.output}" if was_complete else f"packed {self.output}"
        print_summary(headline, manifest, notes=source.notes, left_out=left_out)


# ---------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class PlannedShard:
    """The pairs that one shard will hold, in their order."""

    name: str
    split: str
    pairs: list[RawPair]


def _size(pair: RawPair) -> int:
    """Return the bytes of a pair's image and texts. Raises BadSample when one is missing."""
    image = pair.image.nbytes if isinstance(pair.image, np.ndarray) else pair.image.size()
    if isinstance(pair.texts, tuple):
        if not any(text.strip() for text in pair.texts):
            raise BadSample("the text is empty")
        return image + sum(len(text) for text in pair.texts)
    return image + (pair.texts.nbytes if isinstance(pair.texts, np.ndarray) else pair.texts.size())


def plan_shards(
    pairs: Iterable[RawPair], shard_samples: int, shard_bytes: float, skip_bad: bool, left_out: list[str]
) -> tuple[list[PlannedShard], str]:
    """Return the shards of every split, and a fingerprint of the pairs: keys, splits, texts, labels and sizes.

    A shard holds at most `shard_samples` pairs and closes before `shard_bytes` of images and texts; within a split
    the pairs come in the order of their keys' hashes, so a shard is a random sample of its split.
    Raises BadInput on two pairs with one key, on a split that cannot be part of a file name, and on a bad pair unless
    `skip_bad`, with which `left_out` gets a line for it."""
    sized: dict[str, tuple[RawPair, int]] = {}
    for pair in pairs:
        if pair.key in sized:
            first = sized[pair.key][0].where
            raise BadInput(f"{pair.where} has the same key '{pair.key}' as {first}: rename one of them")
        if not re.fullmatch(r"[\w-]+", pair.split):
            raise BadInput(f"{pair.where}: split '{pair.split}' may hold only letters, digits, '-' and '_'")
        size = try_sample(partial(_size, pair), pair.where, skip_bad, left_out)
        if size is not None:
            sized[pair.key] = pair, size
    order = sorted(sized.values(), key=lambda item: hashlib.sha256(item[0].key.encode()).digest())

    shards: list[PlannedShard] = []
    for split in natural_splits(pair.split for pair, _ in order):
        chosen = [item for item in order if item[0].split == split]
        parts = _cut(chosen, shard_samples, shard_bytes)
        shards += [PlannedShard(f"{split}-{number:06d}.tar", split, part) for number, part in enumerate(parts)]
    return shards, _fingerprint_pairs(order)


def _cut(sized: list[tuple[RawPair, int]], most: int, most_bytes: float) -> Iterator[list[RawPair]]:
    """Cut (pair, bytes) into equal shards of at most `most` pairs, and smaller ones where `most_bytes` asks for it."""
    count = -(-len(sized) // most)
    limit = -(-len(sized) // count)  # equal shards, not full ones and a small rest
    filled, size_sum = list[RawPair](), 0
    for pair, size in sized:
        if filled and (len(filled) == limit or size_sum + size > most_bytes):
            yield filled
            filled, size_sum = [], 0
        filled.append(pair)
        size_sum += size
    yield filled


def _fingerprint_pairs(sized: list[tuple[RawPair, int]]) -> str:
    digest = hashlib.sha256()
    for pair, size in sized:
        texts = pair.texts if isinstance(pair.texts, tuple) else ()
        digest.update(json.dumps([pair.key, pair.split, pair.labels, texts, size]).encode())
        for array in (pair.image, pair.texts):
            if isinstance(array, np.ndarray):
                digest.update(array.tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- shards


def pack_shard(
    output: Path, shard: PlannedShard, label_kind: LabelKind, classes: int, skip_bad: bool
) -> tuple[ShardInfo | None, list[str]]:
    """Read the pairs of a shard and write it. A whole shard that an interrupted run left behind is kept.

    Returns what was written (None when no pair was good) and a line for each pair left out.
    Raises BadInput on a bad pair, unless `skip_bad`, and when the shard cannot be written."""
    final = output / shard.name
    if final.exists():
        scan = scan_shard(final, shard.name)
        if not scan.damage and len(scan.samples) == len(shard.pairs):
            write_atomic(output / index_name(shard.name), scan.index.to_bytes())
            return scan.info, []
    left_out: list[str] = []

    def samples() -> Iterator[tuple[str, Members]]:
        for pair in shard.pairs:
            members = try_sample(partial(read_members, pair, label_kind, classes), pair.where, skip_bad, left_out)
            if members is not None:
                yield pair.key, members

    return write_shard(output, shard.name, samples()), left_out


def _feature_dims(pairs: list[RawPair]) -> tuple[int | None, int | None]:
    """Return (F_i, F_t) of the pairs, None for encoded images and for texts. Raises BadInput when they differ."""
    image_dims = {p.image.shape[-1] if isinstance(p.image, np.ndarray) else None for p in pairs}
    text_dims = {p.texts.shape[-1] if isinstance(p.texts, np.ndarray) else None for p in pairs}
    for what, dims in (("image", image_dims), ("text", text_dims)):
        if len(dims) > 1:
            raise BadInput(f"the {what} features have different sizes: {', '.join(sorted(map(str, dims)))}")
    return image_dims.pop(), text_dims.pop()


def _pack_shards(
    shards: list[PlannedShard], source: RawPairs, options: BuildCommand, left_out: list[str]
) -> dict[str, list[ShardInfo | None]]:
    """Write the shards and return what was written of each split; `left_out` gets a line for each pair left out."""
    written = parallel_map(
        pack_shard,
        [(options.output, shard, source.label_kind, len(source.classes), options.skip_bad) for shard in shards],
        title="packing",
        unit_counts=[len(shard.pairs) for shard in shards],
        processes=options.processes,
    )
    splits: dict[str, list[ShardInfo | None]] = {split: [] for split in natural_splits(s.split for s in shards)}
    for shard, (info, messages) in zip(shards, written, strict=True):
        left_out += messages
        splits[shard.split].append(info)
    return splits


# ---------------------------------------------------------------------------------------------- the whole output


def _is_complete(output: Path, manifest: Manifest) -> bool:
    """Return whether every shard has its size and a sidecar of this version."""
    shards = [shard for split in manifest.splits.values() for shard in split]
    try:
        return all((output / s.name).stat().st_size == s.bytes and has_index(output, s) for s in shards)
    except FileNotFoundError:
        return False


def _existing_manifest(output: Path) -> Manifest | None:
    try:
        return load_manifest(output)
    except BadInput:
        return None


def prepare_output(output: Path, fingerprint: str, overwrite: bool) -> None:
    """Make the folder and room in it for the plan with this fingerprint, until `finish_output`.

    Raises BadInput rather than replace another data set unasked, and when the folder cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        _make_room(output, fingerprint, overwrite)
    except OSError as error:
        raise BadInput(f"cannot write into the output folder {output}: {error.strerror}") from None


def finish_output(output: Path) -> None:
    """Say that the folder is complete: its manifest is written."""
    (output / PACKING_NAME).unlink(missing_ok=True)


def _make_room(output: Path, fingerprint: str, overwrite: bool) -> None:
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
        if OUTPUT_PATTERN.fullmatch(path.name) and not same:
            path.unlink(missing_ok=True)
    remove_leftovers(output)
    write_atomic(packing, fingerprint)


def _fingerprint(source: RawPairs, pairs_fingerprint: str, settings: dict[str, Any]) -> str:
    described = [pairs_fingerprint, settings, source.name, source.label_kind, source.classes, source.attribution]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def pack(source: RawPairs, options: BuildCommand) -> tuple[Manifest, list[str], bool]:
    """Write the pairs of a source to `options.output`.

    Returns the manifest, a line for each pair left out, and whether all was there already.
    Raises BadInput on a bad pair (unless `skip_bad`), an empty split, or an output that holds another data set or that
    another process writes."""
    output, left_out = options.output, list(source.left_out)
    check_output(output, MANIFEST_NAME)
    shards, fingerprint = plan_shards(
        source.pairs, options.shard_samples, options.shard_mib * 2**20, options.skip_bad, left_out
    )
    chosen = {name: getattr(options, name) for name in ("shard_samples", "shard_mib", "skip_bad")}
    settings = {**source.details, **chosen}
    fingerprint = _fingerprint(source, fingerprint, settings)
    for split in source.expected_splits:
        if split not in {shard.split for shard in shards}:
            raise BadInput(f"split '{split}' of {source.name} has no samples: add pairs or change how they are split")
    old = _existing_manifest(output)
    if old is not None and old.details.get("fingerprint") == fingerprint and _is_complete(output, old):
        return old, [], True
    with owning(output, LOCK):
        manifest = _written(source, options, shards, {**settings, "fingerprint": fingerprint}, left_out)
    return manifest, left_out, False


def _written(
    source: RawPairs, options: BuildCommand, shards: list[PlannedShard], details: dict[str, Any], left_out: list[str]
) -> Manifest:
    """Write the shards and the manifest with these details; `left_out` gets a line for each pair left out.

    Raises BadInput as `pack` does."""
    output = options.output
    prepare_output(output, details["fingerprint"], options.overwrite)
    image_dim, text_dim = _feature_dims([pair for shard in shards for pair in shard.pairs])
    splits = _pack_shards(shards, source, options, left_out)
    manifest = assemble(
        name=source.name,
        label_kind=source.label_kind,
        classes=source.classes,
        splits=splits,
        image_dim=image_dim,
        text_dim=text_dim,
        attribution=source.attribution,
        details={**details, "left_out": len(left_out)},
    )
    write_manifest(output, manifest)
    finish_output(output)
    return manifest
