"""A data set without a split for validation or test -> one that has them, drawn from its training split.

Samples with an equal picture, or an equal text, stay on one side: they are groups, and whole groups are drawn, in the
order of a hash of their keys, so that the same data set gives the same splits. Where keys begin anew in each shard, as
some tools write them, the shard and the position are drawn by; in a new shard an equal key gets a number behind it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tyro

from cmgan_dist.data.cache import kept_store
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from cmgan_dist.data.output import owning_output
from cmgan_dist.data.reader import open_data_set
from cmgan_dist.data.sample import Sample
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.data.tar import iter_groups, members_of
from cmgan_dist.errors import BadInput, BadSample, shown
from cmgan_dist.jobs.local import parallel_map
from shards.assemble import assemble, print_summary
from shards.groups import linked_groups, links_of_equal
from shards.output import LOCK, finish_output, prepare_output
from shards.pairs import split_shares
from shards.same_text import compared
from shards.shard_file import Members, check_count, distinct, opened_source, put_shard, see_verify

TRAIN = "train"
"""The split from which others are drawn."""
Place = tuple[str, int]
"""A shard's name, and the position of a sample in it."""


@dataclass
class SplitCommand:
    """Draw a validation or test split from the training split, into a new data set.

    Samples with an equal picture or an equal text stay together, so that nothing that is trained on is measured on."""

    data: tyro.conf.Positional[str]
    """Folder or URL with manifest.json and tars."""
    output: str
    """Folder or URL (s3, gs) for the new data set; the old one stays as it is."""
    val: float = 0.1
    """Share of the training split for a split "val"; 0 makes none."""
    test: float = 0.0
    """Share of the training split for a split "test"; 0 makes none."""
    together: Literal["images-and-texts", "images"] = "images-and-texts"
    """What keeps samples on one side when it is equal; images: for captions that many pictures share."""
    shard_samples: int = 1000
    """Most samples of a new shard."""
    overwrite: bool = False
    """Replace another data set in the output folder."""
    processes: int | None = None
    """Processes that read and write shards (None: one a core). The bytes do not depend on it."""

    def run(self) -> None:
        """Write the new data set and print its sizes. Raises BadInput as `split` does."""
        print_summary(f"wrote {public_url(self.output)}", split(self))


def _samples(data: str, shard: ShardInfo) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of each sample of a shard. Raises BadInput where it is not what its manifest says."""
    place, key, found = kept_store(data).location(shard.name), "", 0
    try:
        with opened_source(data, shard) as file:
            for group in iter_groups(file, shard.name):
                key = f" sample {shown(group[0].key)}"
                yield group[0].key, members_of(group)
                key, found = "", found + 1
        check_count(shard, found)
    except BadSample as error:
        raise BadInput(f"{place}{key}: {error}: {see_verify(data)}") from None
    except OSError as error:
        raise BadInput(f"{place} cannot be read ({error.strerror}): restore it") from None


def _digests(sample: Sample, texts_too: bool) -> list[bytes]:
    """Return what keeps a sample beside others: digests of its picture and, with `texts_too`, of each of its texts."""
    found = [b"image" + (sample.image if isinstance(sample.image, bytes) else sample.image.tobytes())]
    if texts_too and isinstance(sample.texts, np.ndarray):
        found += [b"text" + row.tobytes() for row in sample.texts]
    elif texts_too:
        found += [b"text" + compared(text).encode() for text in sample.texts]
    return [hashlib.sha256(each).digest()[:16] for each in found]


def _facts(data: str, shard: ShardInfo, texts_too: bool, judge: Judge) -> list[tuple[str, list[bytes]]]:
    """Return key and digests of each sample of a shard. Raises BadInput where one cannot be used."""
    facts = []
    for key, members in _samples(data, shard):
        try:
            facts.append((key, _digests(judge.read(key, members), texts_too)))
        except BadSample as error:
            place = kept_store(data).location(shard.name)
            raise BadInput(f"{place} sample {shown(key)}: {error}: {see_verify(data)}") from None
    return facts


def grouped(digests: Sequence[list[bytes]]) -> list[list[int]]:
    """Return the groups of samples that are joined by equal digests, directly or through others, by position."""
    return linked_groups(len(digests), links_of_equal(digests))


def unlike(keys: Sequence[str], places: Sequence[Place]) -> list[str]:
    """Return what each sample is drawn by: its key, or its place where another sample has that key too."""
    counts = Counter(keys)
    return [
        key if counts[key] == 1 else f"{key}\n{shard}\n{position}"
        for key, (shard, position) in zip(keys, places, strict=True)
    ]


def drawn(keys: Sequence[str], groups: list[list[int]], shares: dict[str, float]) -> dict[str, list[int]]:
    """Draw whole groups for each split of `shares`, no more samples than its share of all, by a hash of their keys.

    Returns split -> positions, ascending. Raises BadInput where no group fits into a share."""
    order = sorted(
        groups, key=lambda group: hashlib.sha256("\n".join(sorted(keys[i] for i in group)).encode()).digest()
    )
    out: dict[str, list[int]] = {}
    for name, share in shares.items():
        room, left, taken = round(share * len(keys)), list[list[int]](), list[int]()
        for group in order:
            if len(taken) + len(group) <= room:
                taken += group
            else:
                left.append(group)
        if not taken:
            raise BadInput(
                f"--{name} {share:g}: no group of samples with equal pictures or texts is as small as {room}: "
                "take a larger share, or pass --together images"
            )
        order, out[name] = left, sorted(taken)
    return out


def _write(
    data: str, output: str, name: str, sources: dict[str, ShardInfo], places: list[Place], judge: Judge
) -> ShardInfo | None:
    """Write a shard of samples from shards of `data`, `sources` by name, whose order in them is that of `places`.

    `judge`: of the data set."""

    taken = dict[str, int]()

    def samples() -> Iterator[tuple[str, Members]]:
        for source, of_source in itertools.groupby(places, key=lambda place: place[0]):
            wanted = {position for _, position in of_source}
            for position, (key, members) in enumerate(_samples(data, sources[source])):
                if position in wanted:
                    yield distinct(key, taken), list(members.items())

    return put_shard(FileStore(output, "--output"), name, samples(), judge.number_of)


def _plan(command: SplitCommand, manifest: Manifest, shares: dict[str, float]) -> dict[str, dict[str, list[Place]]]:
    """Return split -> new shard -> its samples."""
    counts = {shard.name: shard.samples for shards in manifest.splits.values() for shard in shards}
    texts_too, judge = command.together != "images", Judge.of(manifest)
    tasks = [(command.data, shard, texts_too, judge) for shard in manifest.splits[TRAIN]]
    facts = parallel_map(_facts, tasks, title="comparing", processes=command.processes)
    places = [(task[1].name, i) for task, of_shard in zip(tasks, facts, strict=True) for i in range(len(of_shard))]
    keys = unlike([key for of_shard in facts for key, _ in of_shard], places)
    chosen = drawn(keys, grouped([digests for of_shard in facts for _, digests in of_shard]), shares)
    gone = {places[i] for positions in chosen.values() for i in positions}
    plan = {
        split: {s.name: [(s.name, i) for i in range(counts[s.name]) if (s.name, i) not in gone] for s in shards}
        for split, shards in manifest.splits.items()
    }
    for name, positions in chosen.items():
        parts = [positions[i : i + command.shard_samples] for i in range(0, len(positions), command.shard_samples)]
        plan[name] = {f"{name}-{n:06d}.tar": [places[i] for i in part] for n, part in enumerate(parts)}
    return plan


def split(command: SplitCommand) -> Manifest:
    """Write the data set of `command` with its new splits and return its manifest.

    Raises BadInput when there is such a split already, no group fits into a share, a shard is damaged, or the output
    holds another data set, or is written by another process."""
    _, manifest = open_data_set(command.data)
    output, place = FileStore(command.output, "--output"), public_url(command.data)
    if TRAIN not in manifest.splits:
        raise BadInput(f"{place} has no split '{TRAIN}' to draw from: it has {', '.join(manifest.splits)}")
    if output.is_at(command.data):
        raise BadInput(f"--output {public_url(command.output)} is the data set itself: name another place")
    output.check_output(MANIFEST_NAME)
    if command.shard_samples < 1:
        raise BadInput(f"--shard-samples is {command.shard_samples}: it must be at least 1")
    val, test = split_shares(command.val, command.test, manifest.splits)
    shares = {name: share for name, share in (("val", val), ("test", test)) if share}
    if not shares:
        raise BadInput("--val and --test are 0: give one of them a share")
    plan = _plan(command, manifest, shares)
    asked = [manifest.to_json(), shares, command.together, command.shard_samples]
    fingerprint = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    details = {**manifest.details, "split": {**shares, "together": command.together}, "fingerprint": fingerprint}
    with owning_output(output, LOCK):
        return _written(command, manifest, plan, details)


def _written(
    command: SplitCommand, manifest: Manifest, plan: dict[str, dict[str, list[Place]]], details: dict[str, Any]
) -> Manifest:
    """Write the shards of a plan and their manifest, which is returned. Raises BadInput as `split` does."""
    output = FileStore(command.output, "--output")
    prepare_output(output, details["fingerprint"], command.overwrite)
    judge = Judge.of(manifest)
    infos_of = {shard.name: shard for shards in manifest.splits.values() for shard in shards}
    tasks = []
    for name, places in ((name, places) for shards in plan.values() for name, places in shards.items()):
        sources = {source: infos_of[source] for source, _ in places}
        tasks.append((command.data, command.output, name, sources, places, judge))
    written = parallel_map(
        _write, tasks, title="splitting", unit_counts=[len(task[4]) for task in tasks], processes=command.processes
    )
    infos = iter(written)
    made = assemble(
        name=manifest.name,
        label_kind=manifest.label_kind,
        classes=manifest.classes,
        labels=manifest.labels,
        splits={name: [next(infos) for _ in shards] for name, shards in plan.items()},
        image_dim=manifest.image_dim,
        text_dim=manifest.text_dim,
        attribution=manifest.attribution,
        details=details,
    )
    finish_output(output, made)
    return made
