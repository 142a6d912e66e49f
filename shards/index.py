"""Write the manifest and the sidecars for tars made elsewhere, such as img2dataset's output."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal

import tyro

from cmgan_dist.data.folder import composed, is_plain, say_hidden, walk_files
from cmgan_dist.data.index import index_name
from cmgan_dist.data.manifest import (
    MANIFEST_NAME,
    LabelKind,
    Manifest,
    ShardInfo,
    load_manifest,
    natural_splits,
    repeated,
    unfinished_mark,
)
from cmgan_dist.data.output import owning_output
from cmgan_dist.data.sample import MEMBERS
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput, BadSample, Unreadable, shards_command, shown
from cmgan_dist.files import open_once
from cmgan_dist.jobs.local import parallel_map
from shards.assemble import assemble, print_summary
from shards.output import LOCK, PACKING_NAME
from shards.pairs import drawing, lines_of, missing_val
from shards.scan import SampleFacts, ShardScan, foreign_files, scan_shard
from shards.shard_file import tars_among
from shards.sources.cells import as_labels
from shards.sources.class_names import check_classes, check_spelling, class_order, say_classes, say_missing
from shards.split_words import say_named_splits, split_in

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.z")
"""How tars end that were compressed: no sample of these can be read alone, so no training reads them."""
SORTED = (
    "the members of a sample must follow each other, so pack its folder anew: tar --sort=name -cf SHARD.tar -C FOLDER ."
)
"""What to do about tars in which the members of a sample stand apart."""


def split_of_shard(name: str) -> str:
    """Return the split of a shard by a word in its name (``val-0.tar``) or its folder's (``val/0.tar``), else train."""
    return split_in(PurePosixPath(name).parts) or "train"


def _tars(store: FileStore) -> tuple[list[str], list[str], list[str]]:
    """Return the tars of a place, which is looked through once, the other files, and lines that say which are passed
    over: compressed ones, and what is hidden. Raises BadInput when it cannot be listed."""
    others: list[str] = []
    hidden: list[str] = []
    if store.local:
        names = walk_files(Path(store.path), ["tar"], others, hidden)
    else:
        others = store.names()
        names = tars_among(others)
        hidden = sorted({name for name in others if name.endswith(".tar")} - {*names})
    return names, others, _packed(others) + say_hidden([name for name in hidden if name.endswith((".tar", "/"))])


def _packed(names: list[str]) -> list[str]:
    """Return a line with how many compressed tars are among files, the first, and what to do; none where there are
    none."""
    found = sorted(name for name in names if name.lower().endswith(PACKED))
    if not found:
        return []
    return [f"{len(found)} compressed tars are passed over, the first is {shown(found[0])}: unpack them to .tar"]


def _taken(samples: list[SampleFacts], kind: LabelKind) -> str:
    """Return a line that says what images, texts and labels are taken from, and what is left out."""
    images, texts, labels = (Counter(facts.sources[i] for facts in samples if facts.sources[i]) for i in range(3))
    left = Counter(f".{each}" for facts in samples for each in facts.members if each not in MEMBERS)
    if kind != "none":
        left += Counter(".cls" for facts in samples if "cls" in facts.members and facts.sources[2] not in ("", ".cls"))
    counts = [(images, "images are"), (texts, "texts are of")] + [(labels, "labels are")] * (kind != "none")
    parts = [f"{what} {_listed(found)}" for found, what in counts if found]
    if kind == "none":
        parts.append(f"labels of {_listed(labels)} are not taken (--label-kind)" if labels else "no labels")
    return "; ".join([*parts, *[f"not taken: {_listed(left)}"] * bool(left)])


def _listed(counts: Counter[str]) -> str:
    """Return names with their counts, the most frequent ones first."""
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(12))


def label_kind_of(samples: list[SampleFacts]) -> LabelKind:
    """Return ``none`` when no sample has a label, ``multi`` when one has several, else ``single``."""
    most = max((len(facts.labels) for facts in samples), default=0)
    return "none" if most == 0 else "single" if most == 1 else "multi"


def check_labels(samples: list[SampleFacts], kind: LabelKind) -> None:
    """Raise BadInput when some of the samples have no label, or several where one is expected."""
    bare = [facts for facts in samples if not facts.labels]
    if bare:
        raise BadInput(
            f"{len(bare)} of {len(samples)} samples have no label (the first: {shown(bare[0].key)}): "
            "label them all, or pass --label-kind none to train without labels"
        )
    several = [facts for facts in samples if len(facts.labels) > 1]
    if several and kind == "single":
        raise BadInput(
            f"{len(several)} of {len(samples)} samples have several labels (the first: {shown(several[0].key)}): "
            "pass --label-kind multi"
        )


def _one_kind(what: str, samples: list[SampleFacts], dims: list[int | None]) -> int | None:
    """Return the feature size that all samples share, None for encoded data. Raises BadInput when they differ."""
    counts = Counter(dims).most_common()
    if len(counts) > 1:
        kinds = [f"{'encoded' if dim is None else f'features of {dim}'} ({count})" for dim, count in counts]
        odd = shown(samples[dims.index(counts[-1][0])].key)
        raise BadInput(
            f"the samples' {what} are of different kinds: {', '.join(kinds[:4])}; the first of the fewest is {odd}: "
            "mend or remove them"
        )
    return counts[0][0]


@dataclass
class IndexCommand:
    """Write manifest.json and an index beside each tar, for WebDataset shards made elsewhere.

    Splits: by a word in the name (cc3m-val-00000.tar) or the folder's (val/00000.tar), else train. Labels are read
    from KEY.json ("label" or "labels") or KEY.cls: numbers or names of classes."""

    data: tyro.conf.Positional[str]
    """Folder or URL (s3, gs) of tars, searched to its depth; a URL's tars are read where this runs, and stay."""
    classes: Path | None = None
    """File with a class name a line (None: the names that labels are, or as many numbers as labels need)."""
    label_kind: Literal["single", "multi", "none"] | None = None
    """How labels are read (None: seen from the samples)."""
    name: str | None = None
    """Name of the data set (None: the folder's)."""
    attribution: str = ""
    """Source and licence, for the manifest."""
    overwrite: bool = False
    """Replace a manifest; its name, classes and attribution stay unless given anew, its details if no shard changed."""
    decode: bool = True
    """Decode every image, to count those that cannot be used; without, this is many times faster."""
    skip_bad: bool = False
    """Leave damaged and empty shards out and list them, instead of stopping at the first."""
    processes: int | None = None
    """Processes that read shards (None: one a core)."""

    def run(self) -> None:
        """Index the folder and print what was found. Raises BadInput as `index` does."""
        manifest, notes = self.index()
        notes += missing_val(manifest.splits, drawing(self.place))
        print_summary(f"wrote {self.place}/{MANIFEST_NAME}", manifest, notes=notes)

    def index(self) -> tuple[Manifest, list[str]]:
        """Scan, write the sidecars and then the manifest; returns it and lines that the user should know.

        Raises BadInput on a folder without tars or that another process writes, a damaged or empty shard, or labels
        that do not fit."""
        store = FileStore(self.data, "folder")
        if store.local and not Path(store.path).is_dir():
            raise BadInput(f"folder {self.place} does not exist")
        store.check_output(MANIFEST_NAME)
        with owning_output(store, LOCK):
            return self._index(store)

    @property
    def place(self) -> str:
        """Path, or URL without what is secret in it."""
        return public_url(self.data).rstrip("/") or "/"

    def _index(self, store: FileStore) -> tuple[Manifest, list[str]]:
        """Do what `index` says."""
        lost: list[str] = []
        old = self._old_manifest(store, lost)
        names, others, passed = _tars(store)
        if store.size(MANIFEST_NAME) is None and not self.overwrite:
            self._check_finished(store, others)
        if not names:
            raise BadInput("; ".join([f"{self.place} holds no .tar files", *passed]))
        odd = next((name for name in names if not is_plain(name)), None)
        if odd is not None:
            raise BadInput(f"{shown(odd)} in {self.place} is not UTF-8 or holds control characters: rename it")
        tasks = [(self.data, name, self.decode) for name in names]
        scans, notes = self._usable(parallel_map(_scan, tasks, title="indexing", processes=self.processes))
        notes += [*lost, *passed] + _gone(old, names) + _shrunk(old, scans)
        notes += [line for scan in scans for line in foreign_files(scan)]
        good = self._good([facts for scan in scans for facts in scan.samples], notes)
        image_dim = _one_kind("images", good, [facts.image_dim for facts in good])
        text_dim = _one_kind("texts", good, [facts.text_dim for facts in good])
        kind = self.label_kind or label_kind_of(good)
        print(shown("; ".join([_taken(good, kind), *_splits_said(scans)])), flush=True)
        if kind != "none":
            check_labels(good, kind)
        classes, named = ([], False) if kind == "none" else self._class_names(scans, good, old, notes)
        scans = [scan.numbered({name: number for number, name in enumerate(classes)}) for scan in scans]
        splits = {split: [s.info for s in scans if split_of_shard(s.info.name) == split] for split in _splits(scans)}
        manifest = assemble(
            name=self.name or (old.name if old else _name_of(store)),
            label_kind=kind,
            classes=classes,
            labels="names" if named else "numbers",
            splits=splits,
            image_dim=image_dim,
            text_dim=text_dim,
            attribution=self.attribution or (old.attribution if old else ""),
            details=old.details if old and _contents(old.splits) == _contents(splits) else {"source": "index"},
        )
        for scan in scans:
            store.write(index_name(scan.info.name), scan.index.to_bytes())
        store.write(MANIFEST_NAME, manifest.to_json())
        if named:
            new = classes[len(old.classes) :] if old is not None and old.labels == "names" and not self.classes else []
            added = f"classes that the old manifest had not, behind its own: {', '.join(map(shown, new))}"
            notes += [*say_classes(classes), *say_missing(classes), *[added] * bool(new)]
        elif classes and self.classes is None and old is None:
            way = f"{shards_command('index', '--overwrite', self.place, '--classes', 'FILE')} gives them others"
            notes.append(f"the {len(manifest.classes)} classes have numbers for names: {way}")
        return manifest, notes

    def _check_finished(self, store: FileStore, names: list[str]) -> None:
        """Raise BadInput when the folder is what a build or features began and have not finished.

        `names`: of the files in it that are no tars."""
        found = unfinished_mark([*names, *[PACKING_NAME] * (store.size(PACKING_NAME) is not None)])
        if found is not None:
            raise BadInput(
                f"{self.place} holds {found} and no {MANIFEST_NAME}, so it is unfinished: start the same build (or "
                "features), all its tasks, again; or pass --overwrite to take what is there for all"
            )

    def _good(self, samples: list[SampleFacts], notes: list[str]) -> list[SampleFacts]:
        """Return the samples that can be used; how many cannot goes to `notes`. Raises BadInput when none can."""
        faults = [
            (facts, fault)
            for facts in samples
            if (fault := facts.fault or ("" if self.label_kind == "none" else facts.label_fault))
        ]
        if not faults:
            return samples
        first, reason = faults[0]
        found = f"the first: {shown(first.key)}, {reason}"
        if len(faults) == len(samples):
            advice = "pass --label-kind none to train without labels" if first.label_fault else "mend them"
            advice = SORTED if _are_apart([facts for facts, _ in faults]) else advice
            raise BadInput(f"no sample in {self.place} can be used ({found}): {advice}")
        notes.append(_unusable(len(faults), len(samples), first, reason))
        bad = {id(facts) for facts, _ in faults}
        return [facts for facts in samples if id(facts) not in bad]

    def _old_manifest(self, store: FileStore, lost: list[str]) -> Manifest | None:
        """Return the manifest that is there, None where there is none, or `lost` gets a line that it is lost.

        Raises BadInput at any when `overwrite` is off, and at one that cannot be read unless the class names are given
        anew: they stand there alone."""
        path = f"{self.place}/{MANIFEST_NAME}"
        if store.size(MANIFEST_NAME) is None:
            return None
        if not self.overwrite:
            raise BadInput(f"{path} exists already: pass --overwrite to write it anew")
        try:
            return load_manifest(store.path) if store.local else Manifest.from_json(store.read(MANIFEST_NAME), path)
        except Unreadable:
            raise
        except BadInput as error:
            said = str(error).rpartition(": ")[0]
            if self.classes is None and self.label_kind != "none":
                raise BadInput(
                    f"{said}, so its class names are lost: give them anew by --classes, or remove {path} to take what "
                    "labels say"
                ) from None
            lost.append(f"{said}: its name, attribution and details are lost")
            return None

    def _usable(self, scans: list[ShardScan]) -> tuple[list[ShardScan], list[str]]:
        """Return the shards to index, and a line for each one left out. Raises BadInput at one unless `skip_bad`."""
        usable, notes = [], []
        for scan in scans:
            fault = scan.damage or ("" if scan.samples else f"{scan.info.name} has no samples")
            if fault and not self.skip_bad:
                raise BadInput(f"{fault}: mend or remove it, or pass --skip-bad to leave such shards out")
            if fault:
                notes.append(f"left out {scan.info.name}: {fault}")
            else:
                usable.append(scan)
        if not usable:
            raise BadInput(f"no shard in {self.place} can be used: {notes[0]}")
        return usable, notes

    def _class_names(
        self, scans: list[ShardScan], good: list[SampleFacts], old: Manifest | None, notes: list[str]
    ) -> tuple[list[str], bool]:
        """Return the classes' names, and whether labels are these, not numbers. A few names among numbers that are of
        no class make bad samples, of which `notes` gets a line.

        Raises BadInput when as many labels or more are names as numbers, or one has no class in the file."""
        usable = {id(facts) for facts in good}
        named = {id(facts): scan.named(facts) for scan in scans for facts in scan.samples if id(facts) in usable}
        by_name = [facts for facts in good if named[id(facts)]]
        by_number = [facts for facts in good if facts.labels and not named[id(facts)]]
        if by_number and len(by_name) >= len(by_number):
            raise BadInput(
                f"the labels of {len(by_number)} samples are numbers (the first: {shown(by_number[0].key)}) and of "
                f"{len(by_name)} names (the first: {shown(by_name[0].key)}): write all in one way, or pass "
                "--label-kind none to train without labels"
            )
        given = None if self.classes is None else _read_names(self.classes)
        if by_name and not by_number:
            first = {name: facts.key for facts in reversed(by_name) for name in named[id(facts)]}
            return self._names_of(first, given, old), True
        largest, key = max((max(facts.labels), facts.key) for facts in by_number)
        names = given or [str(i) for i in range(largest + 1)]
        if given is None and old is not None and len(old.classes) >= len(names):
            names = old.classes
        if largest >= len(names):
            raise BadInput(
                f"label {largest} is out of range: there are {len(names)} classes (sample {shown(key)}): mend it, or "
                "name a file with more"
            )
        lost = [(facts, name) for facts in by_name for name in named[id(facts)] if name not in names]
        if lost:
            reason = f"label '{lost[0][1]}' is none of the {len(names)} classes"
            notes.append(_unusable(len({id(facts) for facts, _ in lost}), len(good), lost[0][0], reason))
        return names, False

    def _check_name(self, name: str, key: str) -> None:
        """Raise BadInput where the name of a class is none in a table either, such as a list as Python prints it."""
        try:
            if as_labels(name)[1]:
                raise BadSample(f"{shown(name)} is a list in a text: write the list itself")
        except BadSample as error:
            raise BadInput(f"in sample {shown(key)} of {self.place} the label {error}, in all samples of it") from None

    def _names_of(self, first: dict[str, str], given: list[str] | None, old: Manifest | None) -> list[str]:
        """Return the classes' names where labels are names; `first`: name -> key of a sample. Raises BadInput at one
        that is not in the file, and at two that look alike."""
        if given is None:
            before = old.classes if old is not None and old.labels == "names" else []
            for name in first:
                self._check_name(name, first[name])
            names = [*before, *sorted(first.keys() - {*before}, key=class_order)]
            check_classes("class", names)
            check_spelling(names)
            return names
        lost = sorted(first.keys() - {*given})
        if lost:
            raise BadInput(
                f"class file {self.classes} lacks {len(lost)} of the {len(first)} classes that labels name, the first "
                f"is '{shown(lost[0])}' (sample {shown(first[lost[0]])}): add it, or leave --classes away"
            )
        return given


def _unusable(count: int, samples: int, first: SampleFacts, reason: str) -> str:
    """Return a line that says how many samples cannot be used, and why the first of them."""
    return (
        f"{count} of {samples} samples cannot be used (the first: {shown(first.key)}, {shown(reason)}); "
        "training replaces them, 'python -m shards verify' lists them"
    )


def _scan(data: str, name: str, decode: bool) -> ShardScan:
    """Scan a shard of a folder, or of a URL, from where it is copied for so long. Raises BadInput as `scan_shard`."""
    store = FileStore(data, "folder")
    if store.local:
        return scan_shard(Path(store.path) / name, name, decode)
    with TemporaryDirectory() as folder:
        store.fetch(name, Path(folder) / "tar")
        return scan_shard(Path(folder) / "tar", name, decode)


def _name_of(store: FileStore) -> str:
    """Return the name of a folder, or the last one of a URL."""
    return Path(store.path).resolve().name if store.local else store.path.rpartition("/")[2]


def _gone(old: Manifest | None, names: list[str]) -> list[str]:
    """Return a line for each split of the old manifest with shards that the folder no longer has."""
    gone = {
        split: [shard for shard in shards if shard.name not in names]
        for split, shards in (old.splits if old else {}).items()
    }
    return [
        f"{len(shards)} shards of split '{split}' with {sum(s.samples for s in shards)} samples are gone that the old "
        f"manifest listed, the first is {shards[0].name}: restore them and run this again, if they are part of it"
        for split, shards in gone.items()
        if shards
    ]


def _shrunk(old: Manifest | None, scans: list[ShardScan]) -> list[str]:
    """Return a line for each shard that has fewer samples than the old manifest says."""
    before = {shard.name: shard.samples for shards in (old.splits if old else {}).values() for shard in shards}
    return [
        f"{scan.info.name} has {scan.info.samples} samples, the old manifest listed {before[scan.info.name]}: restore "
        "it and run this again, if it was cut"
        for scan in scans
        if scan.info.samples < before.get(scan.info.name, 0)
    ]


def _splits(scans: list[ShardScan]) -> list[str]:
    return natural_splits(split_of_shard(scan.info.name) for scan in scans)


def _splits_said(scans: list[ShardScan]) -> list[str]:
    """Return a line for each split that names of shards say."""
    paths = [PurePosixPath(scan.info.name) for scan in scans]
    return say_named_splits((split_in(path.parts), path) for path in paths)


def _are_apart(samples: list[SampleFacts]) -> bool:
    """Return whether samples of one key have other members each: members of one that do not follow each other."""
    first: dict[str, SampleFacts] = {}
    return any(set(first.setdefault(s.key, s).members).isdisjoint(s.members) for s in samples)


def _contents(splits: dict[str, list[ShardInfo]]) -> dict[str, list[tuple[str, str]]]:
    """Return the names and checksums of the shards of each split."""
    return {split: [(shard.name, shard.sha256) for shard in shards] for split, shards in splits.items()}


def _read_names(path: Path) -> list[str]:
    try:
        with open_once(path) as file:
            lines = lines_of(file.read().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"class file {path} cannot be read ({reason}): name a UTF-8 file with a name a line") from None
    names = [composed(line.strip()) for line in lines if line.strip()]
    if not names:
        raise BadInput(f"class file {path} is empty: write a name a line")
    if twice := repeated(names):
        raise BadInput(f"class file {path} has '{shown(twice)}' twice: take one out")
    check_classes("class", names)
    return names
