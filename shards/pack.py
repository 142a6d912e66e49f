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
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmgan_dist.data.folder import check_output
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest, natural_splits
from cmgan_dist.errors import BadInput
from cmgan_dist.files import write_atomic
from cmgan_dist.jobs.local import parallel_map
from cmgan_dist.jobs.lock import owning
from cmgan_dist.jobs.staging import remove_leftovers
from shards.assemble import assemble, print_summary, write_manifest
from shards.make import Found, Made, Making, files_of_shard, find_shard, make_shard
from shards.pairs import RawPair, RawPairs
from shards.plan import PlannedShard, plan_shards

PACKING_NAME = ".packing"
"""Marks an output that is not complete; holds the fingerprint of what is being packed."""
LOCK = "build"
"""What is owned of an output while a data set is written there."""
OUTPUT_PATTERN = re.compile(r".+-\d{6,}\.(tar|index\.npz|build\.json)|\.packing")
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


# ---------------------------------------------------------------------------------------------- the whole output


def _existing_manifest(output: Path) -> Manifest | None:
    try:
        return load_manifest(output)
    except BadInput:
        return None


def prepare_output(output: Path, fingerprint: str, overwrite: bool, keep: Collection[str] = ()) -> None:
    """Make the folder and room in it for the plan with this fingerprint, until `finish_output`.

    `keep`: files that stay where the folder holds this plan, or one that was not finished. Raises BadInput rather than
    replace another data set unasked, and when the folder cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        _make_room(output, fingerprint, overwrite, keep)
    except OSError as error:
        raise BadInput(f"cannot write into the output folder {output}: {error.strerror}") from None


def finish_output(output: Path) -> None:
    """Say that the folder is complete: its manifest is written."""
    (output / PACKING_NAME).unlink(missing_ok=True)


def _refuse(output: Path) -> BadInput:
    return BadInput(f"{output} holds another data set: name a new folder, or pass --overwrite to replace it")


def _make_room(output: Path, fingerprint: str, overwrite: bool, keep: Collection[str]) -> None:
    packing = output / PACKING_NAME
    interrupted = packing.read_text() if packing.exists() else ""
    occupied = (output / MANIFEST_NAME).exists() or (not interrupted and any(output.glob("*.tar")))
    old = _existing_manifest(output)
    same = fingerprint in (interrupted, old.details.get("fingerprint") if old else "")
    if occupied and not same and not overwrite:
        raise _refuse(output)
    # The manifest goes first: until the new one is written, the folder is not a data set.
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    for path in output.iterdir():
        if OUTPUT_PATTERN.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)
    remove_leftovers(output)
    write_atomic(packing, fingerprint)


def _fingerprint(source: RawPairs, shards: list[PlannedShard], settings: dict[str, Any]) -> str:
    digests = [[shard.name, shard.digest] for shard in shards]
    described = [digests, settings, source.name, source.label_kind, source.classes, source.attribution]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _feature_dims(pairs: list[RawPair]) -> tuple[int | None, int | None]:
    """Return (F_i, F_t) of the pairs, None for encoded images and for texts. Raises BadInput when they differ."""
    image_dims = {p.image.shape[-1] if isinstance(p.image, np.ndarray) else None for p in pairs}
    text_dims = {p.texts.shape[-1] if isinstance(p.texts, np.ndarray) else None for p in pairs}
    for what, dims in (("image", image_dims), ("text", text_dims)):
        if len(dims) > 1:
            raise BadInput(f"the {what} features have different sizes: {', '.join(sorted(map(str, dims)))}")
    return image_dims.pop(), text_dims.pop()


def pack(source: RawPairs, options: BuildCommand) -> tuple[Manifest, list[str], bool]:
    """Write the pairs of a source to `options.output`.

    Returns the manifest, a line for each pair left out, and whether all was there already.
    Raises BadInput on a bad pair (unless `skip_bad`), an empty split, or an output that holds another data set or that
    another process writes."""
    output, left_out = options.output, list(source.left_out)
    check_output(output, MANIFEST_NAME)
    shards = plan_shards(source.pairs, options.shard_samples, options.shard_mib * 2**20, options.skip_bad, left_out)
    for split in source.expected_splits:
        if split not in {shard.split for shard in shards}:
            raise BadInput(f"split '{split}' of {source.name} has no samples: add pairs or change how they are split")
    chosen = {name: getattr(options, name) for name in ("shard_samples", "shard_mib", "skip_bad")}
    settings = {**source.details, **chosen}
    job = _Job(source, options, shards, settings, left_out)
    with owning(output, LOCK):
        return job.run()


@dataclass
class _Job:
    """What a run is to do."""

    source: RawPairs
    options: BuildCommand
    shards: list[PlannedShard]
    settings: dict[str, Any]
    left_out: list[str]
    """A line for each pair that the plan leaves out."""

    def run(self) -> tuple[Manifest, list[str], bool]:
        """Make what is not there and return what `pack` does. Raises BadInput as that does."""
        output, overwrite = self.options.output, self.options.overwrite
        fingerprint = _fingerprint(self.source, self.shards, self.settings)
        old, found = _existing_manifest(output), self._find()
        made = {name: one.made for name, one in found.items() if one.made is not None}
        same = old is not None and old.details.get("fingerprint") == fingerprint
        if old is not None and same and len(made) == len(self.shards):
            return old, [], True
        if old is not None and any(one.other for one in found.values()) and not overwrite:
            raise _refuse(output)
        keep = {name for shard in self.shards for name in files_of_shard(shard.name)}
        prepare_output(output, fingerprint, overwrite, keep)
        made |= self._make([shard for shard in self.shards if shard.name not in made])
        return self._finish(fingerprint, made)

    @property
    def _how(self) -> Making:
        return Making(self.source.label_kind, len(self.source.classes), self.options.skip_bad)

    def _find(self) -> dict[str, Found]:
        """Return what earlier runs left of the shards, by name."""
        there = [s for s in self.shards if any((self.options.output / n).exists() for n in files_of_shard(s.name))]
        tasks = [(self.options.output, shard, self._how, True) for shard in there]
        counts = [len(shard.pairs) for shard in there]
        processes = self.options.processes
        found = parallel_map(find_shard, tasks, title="comparing", unit_counts=counts, processes=processes)
        return {shard.name: one for shard, one in zip(there, found, strict=True)}

    def _make(self, todo: list[PlannedShard]) -> dict[str, Made]:
        """Make shards and return what was made of each, by name."""
        tasks = [(self.options.output, shard, self._how) for shard in todo]
        counts = [len(shard.pairs) for shard in todo]
        made = parallel_map(make_shard, tasks, title="packing", unit_counts=counts, processes=self.options.processes)
        return {shard.name: one for shard, one in zip(todo, made, strict=True)}

    def _finish(self, fingerprint: str, made: dict[str, Made]) -> tuple[Manifest, list[str], bool]:
        """Write the manifest of all shards; returns what `pack` does."""
        image_dim, text_dim = _feature_dims([pair for shard in self.shards for pair in shard.pairs])
        splits: dict[str, list[ShardInfo | None]] = {
            split: [] for split in natural_splits(s.split for s in self.shards)
        }
        left_out = list(self.left_out)
        for shard in self.shards:
            info, messages = made[shard.name]
            splits[shard.split].append(info)
            left_out += messages
        manifest = assemble(
            name=self.source.name,
            label_kind=self.source.label_kind,
            classes=self.source.classes,
            splits=splits,
            image_dim=image_dim,
            text_dim=text_dim,
            attribution=self.source.attribution,
            details={**self.settings, "fingerprint": fingerprint, "left_out": len(left_out)},
        )
        write_manifest(self.options.output, manifest)
        finish_output(self.options.output)
        return manifest, left_out, False
