"""Check a packed data set and say what was found, a line each.

A *problem* makes training wrong or a result untrue; a *warning* should be known."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from cmgan_dist.data.folder import composed
from cmgan_dist.data.index import ShardIndex, index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.source import public_url
from cmgan_dist.errors import BadInput, BadSample, shards_command, shown
from cmgan_dist.jobs.local import parallel_map
from shards.data_files import DataFiles
from shards.scan import SampleFacts, ShardScan, foreign_files, scan_shard

FOUND_PROBLEMS = 1
"""Exit code when there are problems; 0 when there are none."""
ACROSS, WITHIN = "across splits", "within a split"
MOST_LINES, MOST_PLACES = 10, 5
"""Lines on keys, or images, that are there again and make nothing wrong; samples that such a line names."""


@dataclass
class Report:
    """What `verify` counted and found."""

    samples: int = 0
    shards: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class VerifyCommand:
    """Check counts, checksums, sidecars, every sample, label ranges, and duplicates within and across splits.

    Exit code 0: clean. 1: problems found, a line each. 2: not a data set."""

    data: tyro.conf.Positional[str]
    """Folder or URL (http, s3, gs) with manifest.json and tars."""
    decode: bool = True
    """Decode every image; without, only the bytes are checked."""
    processes: int | None = None
    """Processes that read shards (None: one a core)."""

    def run(self) -> int:
        """Check the data set, print what was found and return the exit code. Raises BadInput as `verify` does."""
        report = verify(self.data, decode=self.decode, processes=self.processes)
        for line in report.problems:
            print(f"problem: {shown(line)}")
        for line in report.warnings:
            print(f"warning: {shown(line)}")
        print(
            f"{public_url(self.data)}: {report.samples} samples in {report.shards} shards, "
            f"{len(report.problems)} problems, {len(report.warnings)} warnings"
        )
        return FOUND_PROBLEMS if report.problems else 0


def verify(data: str | Path, *, decode: bool = True, processes: int | None = None) -> Report:
    """Check the data set in the folder, or at the URL, `data`. Raises BadInput when it has no readable manifest."""
    files = DataFiles(str(data))
    manifest = files.manifest()
    report = Report()
    listed = [(split, shard) for split, shards in manifest.splits.items() for shard in shards]
    report.problems += _stray_files(files, {shard.name for _, shard in listed})
    report.problems += [
        f"split '{split}' has no samples"
        for split, shards in manifest.splits.items()
        if not sum(s.samples for s in shards)
    ]
    if not listed:
        report.problems.append("the manifest lists no shards")
    tasks = [(str(data), shard.name, decode, Judge.of(manifest)) for _, shard in listed]
    found = parallel_map(_scan, tasks, title="verifying", processes=processes)
    scanned = [(split, shard, scan) for (split, shard), scan in zip(listed, found, strict=True) if scan is not None]
    absent = [shard.name for (_, shard), scan in zip(listed, found, strict=True) if scan is None]
    report.problems[:0] = [f"{name} is in the manifest but not in the {files.kind}" for name in absent]
    for _, shard, scan in scanned:
        report.problems += _shard_problems(files, shard, scan)
        report.warnings += foreign_files(scan)
        for facts in scan.samples:
            if facts.fault:
                report.problems.append(f"{shard.name}: {_sample_problem(facts)}")
    report.samples = sum(len(scan.samples) for _, _, scan in scanned)
    report.shards = len(scanned)
    of_splits = [(split, scan) for split, _, scan in scanned]
    _find_duplicates(of_splits, report)
    report.warnings += _shared_texts(of_splits)
    return report


def _scan(data: str, name: str, decode: bool, judge: Judge) -> ShardScan | None:
    """Scan a shard, None where there is none. Raises BadInput when it cannot be read."""
    files = DataFiles(data)
    with files.local(name) as path:
        return None if path is None else scan_shard(path, name, decode, judge)


def _stray_files(files: DataFiles, listed: set[str]) -> Iterator[str]:
    """Give a line for each shard, sidecar and leftover that the manifest does not list.

    Raises BadInput naming a folder that cannot be read."""
    known = listed | {index_name(name) for name in listed}
    for name in files.names(["tar", "npz"]):
        if name.endswith((".tar", ".index.npz")) and name not in known:
            yield f"{name} is in the {files.kind} but not in the manifest"
    for name in files.leftovers():
        yield f"{name} is left from a run that did not end"


def _shard_problems(files: DataFiles, listed: ShardInfo, scan: ShardScan) -> Iterator[str]:
    """Give a line for each thing wrong with a shard's file, its entry in the manifest and its sidecar."""
    name = listed.name
    if scan.info.bytes != listed.bytes:
        yield f"{name} has {scan.info.bytes} bytes, the manifest says {listed.bytes}"
    elif scan.info.sha256 != listed.sha256:
        yield f"{name} has another checksum than the manifest says: its bytes were changed"
    if scan.damage:
        yield scan.damage
    if scan.info.samples != listed.samples:
        yield f"{name} has {scan.info.samples} samples, the manifest says {listed.samples}"
    try:
        data_of_index = files.read(index_name(name))
        if data_of_index is None:
            yield f"{index_name(name)} is missing: write it with {shards_command('index', '--overwrite', files.place)}"
            return
        index = ShardIndex.from_bytes(data_of_index, index_name(name), files.place)
    except (BadInput, BadSample) as error:
        yield str(error) if isinstance(error, BadInput) else f"{index_name(name)} {error}"
        return
    if listed.index_sha256 not in ("", hashlib.sha256(data_of_index).hexdigest()):
        yield f"{index_name(name)} has another checksum than the manifest says"
    if index.to_bytes() != scan.index.to_bytes():
        yield f"{index_name(name)} does not agree with the samples of {name}"


def _sample_problem(facts: SampleFacts) -> str:
    # A member whose image or text stands elsewhere, or nowhere, is an orphan.
    kind = "orphan member" if facts.fault.startswith(("has no image", "has no text")) else "sample"
    names = ", ".join(f"{facts.key}.{extension}" for extension in facts.members)
    return f"{kind} {names}: {facts.fault}"


def _find_duplicates(scans: list[tuple[str, ShardScan]], report: Report) -> None:
    """Report equal keys and equal images: images across splits are a problem, as what is measured was trained on; the
    rest are warnings, as some tools begin keys anew in each shard."""
    for what, value_of in (("key", lambda facts: composed(facts.key)), ("image", lambda facts: facts.image_digest)):
        places: dict[str | bytes, list[tuple[str, str]]] = defaultdict(list)
        for split, scan in scans:
            for facts in scan.samples:
                if value_of(facts):
                    places[value_of(facts)].append((split, f"{facts.key} ({split}, {scan.info.name})"))
        repeated = [same for same in places.values() if len(same) > 1]
        across = [same for same in repeated if len({split for split, _ in same}) > 1]
        within = [same for same in repeated if len({split for split, _ in same}) == 1]
        if what == "image":
            report.problems += [_same(what, ACROSS, same) for same in across]
        else:
            report.warnings += _first_of(what, ACROSS, across)
        report.warnings += _first_of(what, WITHIN, within)


def _first_of(what: str, where: str, repeated: list[list[tuple[str, str]]]) -> Iterator[str]:
    """Give a line for each of the first of what is repeated, and one that counts the rest: where keys begin anew in
    each shard, that is nearly all there are."""
    yield from (_same(what, where, same) for same in repeated[:MOST_LINES])
    if len(repeated) > MOST_LINES:
        samples = sum(map(len, repeated))
        yield (
            f"the same {what} {where}: {len(repeated)} {what}s in {samples} samples, of which the first {MOST_LINES} "
            "are named"
        )


def _same(what: str, where: str, same: list[tuple[str, str]]) -> str:
    """Return a line that says where something stands again."""
    more = f" and {len(same) - MOST_PLACES} more" if len(same) > MOST_PLACES else ""
    return f"the same {what} {where}: {', '.join(place for _, place in same[:MOST_PLACES])}{more}"


def _shared_texts(scans: list[tuple[str, ShardScan]]) -> Iterator[str]:
    """Give a line for each two splits of which samples have an equal text: results are better than on new texts."""
    first: dict[bytes, tuple[str, str]] = {}
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for split, scan in scans:
        for facts in scan.samples:
            found = [first.setdefault(digest, (split, facts.key)) for digest in facts.text_digests]
            for other, key in {place[0]: place for place in found if place[0] != split}.values():
                shared[split, other].append((facts.key, key))
    for (split, other), keys in shared.items():
        yield (
            f"{len(keys)} samples of split '{split}' have a text that split '{other}' has too, but for case and "
            f"punctuation; the first is {keys[0][0]}, as {keys[0][1]}: leave them out of one, or draw that split from "
            "train by 'python -m shards split', which keeps such on one side"
        )
