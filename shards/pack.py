"""Pack raw pairs into deterministic WebDataset shards.

The way of a pair: source -> RawPair (nothing read yet) -> partitions on disk, each merged and in hash order -> plan of
shards -> a process reads, checks and writes a whole shard with its index sidecar and record -> manifest.json, last.

The same pairs give the same bytes: the order is the sha256 of the keys, tar headers carry no time and no owner,
JSON keys are sorted, and the plan is made before the work is shared out to processes."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, natural_splits
from cmgan_dist.data.output import read_record
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput, reasons_of, shown
from cmgan_dist.jobs.lock import lock_name, owning, owning_in_turn
from cmgan_dist.jobs.machine import Share, absolute
from cmgan_dist.jobs.ranks import Task, find_task
from shards.assemble import assemble, print_summary, say_unfilled
from shards.make import Found, Made, Making, files_of_shard, find_shard, make_shard, record_name
from shards.output import (
    LOCK,
    PACKING_NAME,
    being_packed,
    existing_manifest,
    find_work,
    finish_output,
    leave_work,
    prepare_output,
    refuse,
)
from shards.pairs import Draw, RawPairs, Together, split_shares
from shards.partitions import Partitions
from shards.plan import Plan, PlannedShard, plan_shards
from shards.plan_files import planned, were_renewed

Result = TypeVar("Result")


@dataclass(kw_only=True)
class BuildCommand:
    """Options that every source shares."""

    output: str
    """Folder or URL (s3, gs) for the shards and manifest.json."""
    overwrite: bool = False
    """Replace another data set in the output folder; of the same one, try again what was left out."""
    skip_bad: bool = False
    """Leave bad pairs out, count and list them, instead of stopping at the first."""
    shard_samples: int = 1000
    """Most samples a shard."""
    shard_mib: float = 256.0
    """Most MiB of images and texts a shard."""
    processes: int | None = None
    """Processes that write shards (None: one a core). The bytes do not depend on it."""
    task: str = ""
    """I/N: every N-th shard from I on, where several machines share the work and --output; a SLURM array and torchrun
    say it by themselves. Whoever finds all shards made writes the manifest."""
    ray: str = ""
    """"auto" or HOST:PORT of a Ray cluster, whose nodes see the source and --output: they write the shards."""
    work: Path | None = None
    """Folder for the plan of an --output that is a URL (None: in the user's cache); tasks that see it share the plan,
    and all nodes of a Ray cluster must."""

    def stamp(self) -> str:
        """Return a hash of all that the plan is made from, "" where nothing less than planning tells."""
        return ""

    @abstractmethod
    def pairs(self, rows: Partitions) -> RawPairs:
        """Put the raw pairs of the source into `rows`. Raises BadInput when the source is missing or wrong."""

    def run(self) -> None:
        """Pack the source and print what was packed. Raises BadInput as `pack` does."""
        if self.shard_samples < 1 or not 0 < self.shard_mib < math.inf:
            raise BadInput("--shard-samples and --shard-mib must be positive, and finite")
        packed = pack(self)
        if packed is None:
            return
        place = public_url(self.output)
        headline = f"already packed: {place}" if packed.was_complete else f"packed {place}"
        print_summary(headline, packed.manifest, notes=packed.notes, left_out=packed.left_out)


MOST_TRIED = 10_000
"""Samples among which a larger share of a split is tried, where one of them is empty."""


@dataclass(kw_only=True)
class DrawCommand(BuildCommand):
    """Options of the sources whose splits are drawn where they name none."""

    val: float | None = None
    """Share of pairs in val (None: 0.1 where the source names no splits); where it does, it is of train."""
    test: float | None = None
    """Share of pairs in test, as of val."""
    together: Together = "images-and-texts"
    """What keeps pairs on one side when it is equal; images: for captions that many pictures share."""

    def draw(self, named: Collection[str]) -> Draw:
        """Return how splits are drawn where the source names some already. Raises BadInput naming the flag."""
        return Draw(*split_shares(self.val, self.test, named), self.together)


@dataclass
class Packed:
    """What a run has made."""

    manifest: Manifest
    notes: list[str]
    """What the user should know of it at its end."""
    left_out: list[str]
    """A line for each pair left out."""
    was_complete: bool
    """Whether all was there already."""


# ---------------------------------------------------------------------------------------------- the whole output


def _fingerprint(source: RawPairs, shards: list[PlannedShard], settings: dict[str, Any]) -> str:
    digests = [[shard.name, shard.digest] for shard in shards]
    described = [digests, settings, source.name, source.label_kind, source.classes, source.attribution]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def plan_in(folder: Path, options: BuildCommand) -> tuple[RawPairs, Plan]:
    """Return what the source says of its pairs and the plan of the shards, which is made in `folder`.

    Raises BadInput as `pack` does, also where a split that should be there has no samples."""
    source, plan = _plan_in(folder, options)
    for split in _empty(source, plan):
        left_out = [*source.left_out, *plan.left_out]
        why = f", {len(left_out)} pairs were left out ({reasons_of(left_out)})" if left_out else ""
        ways = ["mend some"] * bool(left_out) + ["add pairs"]
        if isinstance(options, DrawCommand) and source.draw.splits:
            ways += _ways(folder, options, source.draw, sum(shard.samples for shard in plan.shards))
        else:
            ways += ["change how they are split"]
        raise BadInput(f"split '{split}' of {source.name} has no samples{why}: {', or '.join(ways)}")
    return source, plan


def _plan_in(folder: Path, options: BuildCommand) -> tuple[RawPairs, Plan]:
    rows = Partitions(folder)
    source = options.pairs(rows)
    limits = options.shard_samples, options.shard_mib * 2**20
    return source, plan_shards(rows, source, *limits, options.skip_bad, options.processes)


def _empty(source: RawPairs, plan: Plan) -> list[str]:
    """Return the splits that should have samples and have none."""
    return [split for split in source.expected_splits if split not in {shard.split for shard in plan.shards}]


def _ways(folder: Path, options: DrawCommand, draw: Draw, samples: int) -> list[str]:
    """Return what fills, or leaves away, splits that are drawn: flags that were tried on these pairs."""
    splits = draw.splits
    tries: list[dict[str, Any]] = [{"together": "images"}] if draw.together != "images" else []
    if samples <= MOST_TRIED:
        tries += [dict.fromkeys(splits, share) for share in (0.2, 0.3, 0.4) if share > max(draw.val, draw.test)]
    works = list[str]()
    for number, flags in enumerate([*tries, dict.fromkeys(splits, 0)]):
        inside = folder / f"try-{number}"
        inside.mkdir(parents=True)
        with redirect_stdout(StringIO()):  # what is taken was said
            empty = _empty(*_plan_in(inside, replace(options, **flags)))
        if not empty:
            works.append("pass " + " ".join(f"--{name} {value}" for name, value in flags.items()))
    return works


def pack(options: BuildCommand) -> Packed | None:
    """Write the pairs of a source to `options.output`, this task's share of them, and when all are there the manifest.

    Returns what was made, None while other tasks have shards to make. Where another process makes the same share, this
    waits for it. Raises BadInput on a bad pair (unless `skip_bad`), an empty split, or an output that holds another
    data set."""
    output, task = FileStore(options.output, "--output"), find_task(options.task)
    output.check_writable()
    output.check_output(MANIFEST_NAME)
    work = find_work(output, options.work, options.ray)
    is_new, stamp = not work.exists(), options.stamp()
    is_shared = bool(stamp) and (output.local or options.work is not None)
    try:
        with (
            owning_in_turn(work, task.lock(LOCK)),
            planned(work, stamp, partial(plan_in, options=options), options.processes) as (source, plan),
        ):
            return _Job(source, plan, options, task, output, work, is_shared).run()
    finally:
        leave_work(output, work, keep=is_shared, is_new=is_new)


@dataclass
class _Job:
    """What a run is to do."""

    source: RawPairs
    plan: Plan
    options: BuildCommand
    task: Task
    output: FileStore
    work: Path
    """Folder for locks and plans."""
    is_shared: bool
    """Whether other tasks go by the plans in `work`; else each has made its own."""

    def run(self) -> Packed | None:
        """Say what was taken and make what is not there. Raises BadInput as `pack` does."""
        for note in self.source.notes:
            print(shown(note), flush=True)
        output, overwrite, shards = self.output, self.options.overwrite, self.plan.shards
        own = [shards[i] for i in self.task.share(len(shards))]
        fingerprint = _fingerprint(self.source, shards, self._settings)
        old, found = existing_manifest(output), self._find(own, self._names(own), read_inputs=True)
        made = {name: one.made for name, one in found.items() if one.made is not None}
        is_same = old is not None and old.details.get("fingerprint") == fingerprint
        if is_same and overwrite:  # pictures by URL may be there by now; without a manifest, such a start goes on
            made = {name: one for name, one in made.items() if not one[1]}
        todo = [shard for shard in own if shard.name not in made]
        if old is not None and is_same and not todo:
            output.remove(PACKING_NAME)  # of a run that was killed behind its manifest
            return Packed(old, *self._left_out(), was_complete=True)
        if old is not None and any(one.other for one in found.values()) and not overwrite:
            raise refuse(output)
        again = {name for shard in todo if is_same and overwrite for name in files_of_shard(shard.name)}
        keep = {name for shard in shards for name in files_of_shard(shard.name)} - again
        self._check_others(fingerprint)
        prepare_output(output, fingerprint, overwrite, keep, done=made)
        made |= self._make(todo)
        made |= self._made_by_others([shard for shard in shards if shard.name not in made])
        if len(made) < len(shards):
            left = len(shards) - len(made)
            print(f"task {self.task} is done; {left} of {len(shards)} shards are left to other tasks")
            return None
        return self._finish(fingerprint, made)

    def _left_out(self) -> tuple[list[str], list[str]]:
        """Return the notes on a data set that is complete, and a line for each pair that its records leave out."""
        records = [read_record(self.output, record_name(shard.name)) for shard in self.plan.shards]
        packed = [line for record in records if record is not None for line in record.left_out]
        way = ["pairs were left out when this was packed: --overwrite tries them again"] if packed else []
        return way, [*self.source.left_out, *self.plan.left_out, *packed]

    def _check_others(self, fingerprint: str) -> None:
        """Raise BadInput where tasks of another data set are at work in the output."""
        if being_packed(self.output) not in ("", fingerprint):
            names = {path.name for path in self.work.glob(lock_name(f"{LOCK}*"))} - {lock_name(self.task.lock(LOCK))}
            for name in sorted(names):
                with owning(self.work, name.removeprefix(".").removesuffix(".lock")):
                    pass  # nobody has it

    @property
    def _settings(self) -> dict[str, Any]:
        chosen = {name: getattr(self.options, name) for name in ("shard_samples", "shard_mib", "skip_bad")}
        return {**self.source.details, **chosen}

    @property
    def _how(self) -> Making:
        return Making(self.source.label_kind, len(self.source.classes), self.options.skip_bad)

    def _each(
        self, function: Callable[..., Result], title: str, shards: list[PlannedShard], *rest: object
    ) -> list[Result]:
        """Return what `function` makes of shards: in processes of this machine, or of a Ray cluster."""
        output, counts = absolute(self.options.output), [shard.samples for shard in shards]
        tasks = [(output, self.plan.folder, shard, self._how, *rest) for shard in shards]
        share = Share("cpu", self.options.processes, 1, self.options.ray)
        return share.map(function, tasks, title=title, unit_counts=counts)

    def _names(self, shards: list[PlannedShard]) -> set[str]:
        """Return the names of what lies in the output, where there are shards to look for."""
        return self.output.own_names() if shards else set()

    def _find(self, shards: list[PlannedShard], names: set[str], *, read_inputs: bool) -> dict[str, Found]:
        """Return what earlier runs, or other tasks, left of some shards, by name.

        `names`: of what lies in the output."""
        there = [shard for shard in shards if not names.isdisjoint(files_of_shard(shard.name))]
        found = self._each(find_shard, "comparing", there, read_inputs)
        for said in (one.said for one in found if one.said):
            print(shown(said))
        return {shard.name: one for shard, one in zip(there, found, strict=True)}

    def _make(self, todo: list[PlannedShard]) -> dict[str, Made]:
        """Make shards and return what was made of each, by name."""
        made = self._each(make_shard, "packing", todo)
        return {shard.name: one for shard, one in zip(todo, made, strict=True)}

    def _made_by_others(self, shards: list[PlannedShard]) -> dict[str, Made]:
        """Return what other tasks made of their shards, by name; nothing is compared before all are there, nor what
        the pairs hold now where all went by this plan."""
        names = self._names(shards)
        if not names.issuperset(record_name(shard.name) for shard in shards):
            return {}
        found = self._find(shards, names, read_inputs=not self.is_shared or were_renewed(self.work))
        return {name: one.made for name, one in found.items() if one.made is not None}

    def _finish(self, fingerprint: str, made: dict[str, Made]) -> Packed:
        """Write the manifest of all shards."""
        shards, source = self.plan.shards, self.source
        splits: dict[str, list[ShardInfo | None]] = {split: [] for split in natural_splits(s.split for s in shards)}
        left_out = [*source.left_out, *self.plan.left_out]
        for shard in shards:
            info, messages = made[shard.name]
            splits[shard.split].append(info)
            left_out += messages
        manifest = assemble(
            name=source.name,
            label_kind=source.label_kind,
            classes=source.classes,
            splits=splits,
            image_dim=self.plan.image_dim,
            text_dim=self.plan.text_dim,
            attribution=source.attribution,
            details={**self._settings, "fingerprint": fingerprint, "left_out": len(left_out)},
            left_out=left_out,
        )
        finish_output(self.output, manifest)
        return Packed(manifest, say_unfilled(self.output, manifest, left_out), left_out, False)
