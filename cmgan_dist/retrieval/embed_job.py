"""The job that embeds: every part of a source, by `embed_part`, in the processes of this machine and of others.

A part's files are written by one process and its record last. A run does what has no record of the same source, model
and settings, or files that are not what their record says; so a job that was killed goes on, and whoever embeds which
part gives the same bytes. Whoever finds all records at its end writes embeddings.json."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmgan_dist.data.folder import is_unicode
from cmgan_dist.data.output import clear_leftovers, is_whole, owning_output
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput, reasons_of, shown
from cmgan_dist.jobs import ledger
from cmgan_dist.jobs.local import threaded_map
from cmgan_dist.jobs.machine import Share, absolute, find_share
from cmgan_dist.jobs.ranks import Task, find_task
from cmgan_dist.models.saved import MODEL_NAME, Saved, load_backbone, read_model
from cmgan_dist.retrieval.embed_options import EmbedOptions
from cmgan_dist.retrieval.embed_part import Job, embed_part, raw_modalities, worker_of
from cmgan_dist.retrieval.embed_source import FLAGS, Part, Source, open_source
from cmgan_dist.retrieval.embeddings import (
    MANIFEST_NAME,
    EmbeddedShard,
    EmbeddingManifest,
    EmbeddingSet,
    ModelIdentity,
    counted,
    items_name,
    read_record,
    record_name,
    vectors_name,
)
from cmgan_dist.retrieval.evaluate import check_kinds

RECORD_END = record_name("")


# ---------------------------------------------------------------------------------------------- what is to be done


@dataclass
class Plan:
    """What a run is to do: its source, its parts in order, and which of them are this task's."""

    job: Job
    saved: Saved
    source: Source
    parts: list[Part]
    task: Task
    machines: Share
    overwrite: bool
    store: FileStore

    @property
    def share(self) -> list[Part]:
        """Return the parts that this task embeds."""
        return [self.parts[number] for number in self.task.share(len(self.parts))]


def make_plan(options: EmbedOptions) -> Plan:
    """Read the run and look at the source. Raises BadInput naming the flag, the file, or what does not fit."""
    given = [(kind, getattr(options, flag[2:])) for kind, flag in FLAGS.items() if getattr(options, flag[2:])]
    if len(given) != 1:
        raise BadInput("name what is to be embedded by one of --data, --pictures and --texts")
    if options.batch is not None and options.batch < 1:
        raise BadInput(f"--batch is {options.batch}: it must be at least 1")
    task = find_task(options.task)
    splits = [split for split in options.splits.split(",") if split]
    if splits and not options.data:
        raise BadInput("--splits is given without --data: pictures and texts have no splits")
    saved = read_model(options.run)
    source = open_source(*given[0], saved.config.stream)
    for flag, place in (("RUN", options.run), ("--output", options.output), (FLAGS[given[0][0]], source.address)):
        if not is_unicode(place):
            raise BadInput(f"{flag} {shown(place)} is not UTF-8, so that no file could name it: rename it")
    check_source(saved, source)
    parts = source.parts(splits)
    store = FileStore(options.output, "--output")
    store.check_output(MANIFEST_NAME)
    share = find_share(options.device, options.processes, options.ray)
    job = Job(
        run=options.run,
        model=saved.spec.files[MODEL_NAME],
        kind=source.identity.kind,
        location=source.address,
        output=options.output,
        batch=options.batch or saved.config.eval.batch,
        dtype=options.dtype,
        device=share.device,
        threads=share.threads,
        skip_bad=options.skip_bad,
        label_kind=source.spec.label_kind,
        classes=tuple(source.classes),
    )
    return Plan(job, saved, source, parts, task, share, options.overwrite, store)


def check_source(saved: Saved, source: Source) -> None:
    """Raises BadInput unless the run can embed the source: features of its own sizes, or raw data for its backbones."""
    check_kinds(saved, source.location, source.spec, source.details, raw_fits=True)
    for modality in raw_modalities(source):
        if getattr(saved.spec, modality).name == "features":
            load_backbone(saved, modality)  # says why it cannot


# ---------------------------------------------------------------------------------------------- what is done


def is_done(plan: Plan, part: Part) -> bool:
    """Return whether a part's files are there, whole, of this source and made with these settings.

    With --overwrite what was made otherwise is removed. Raises BadInput when there is such without it."""
    record = read_record(plan.store, part.name)
    if record is None:
        return False
    if not record.is_of(plan.source.checksum(part), plan.job.settings):
        if plan.overwrite:
            plan.store.remove(record_name(part.name))
            return False
        raise BadInput(
            f"{plan.store.location(record_name(part.name))} is of {_otherwise(plan, record)}: "
            "name a new --output, or pass --overwrite to make it anew"
        )
    if record.left_out and not plan.job.skip_bad:
        return False
    return all(is_whole(plan.store, written) for written in record.files)


def _otherwise(plan: Plan, record: ledger.Record) -> str:
    """Return how a part was made that was made otherwise, in words."""
    if record.settings.get("model") != plan.job.model:
        return f"embeddings by another model than that of {plan.job.run}"
    now = plan.job.settings
    if any(record.settings.get(name) != now[name] for name in ("label_kind", "classes")):
        return "embeddings of data with other labels or classes"
    if record.settings != now:
        differing = [f"{k} {v}" for k, v in record.settings.items() if now.get(k) != v]
        return f"embeddings with other options ({', '.join(differing)})"
    return "embeddings of other data"


def remove_foreign(plan: Plan) -> None:
    """Remove the embeddings in the output that are of no part. Raises BadInput rather than do that unasked."""
    names = {part.name for part in plan.parts}
    found = [name.removesuffix(RECORD_END) for name in plan.store.names() if name.endswith(RECORD_END)]
    foreign = [name for name in found if name not in names]
    if foreign and not plan.overwrite:
        raise BadInput(
            f"--output {public_url(plan.job.output)} holds embeddings of other data ({foreign[0]} is none of "
            f"{plan.source.location}'s chosen parts): name a new --output, or pass --overwrite to remove them"
        )
    for name in foreign:
        endings = (record_name(name), items_name(name), vectors_name(name, "image"), vectors_name(name, "text"))
        for file in endings:
            plan.store.remove(file)


def find_todo(plan: Plan, parts: Sequence[Part]) -> list[Part]:
    """Return which of the parts have no whole embeddings yet. Raises BadInput as `is_done` does."""
    done = threaded_map(lambda part: is_done(plan, part), parts, title="comparing finished parts")
    return [part for part, is_whole in zip(parts, done, strict=True) if not is_whole]


def missing_records(plan: Plan) -> list[Part]:
    """Return which parts have no record of this model and these settings; the files are not read."""

    def has_record(part: Part) -> bool:
        record = read_record(plan.store, part.name)
        return record is not None and record.settings == plan.job.settings

    return [part for part in plan.parts if not has_record(part)]


# ---------------------------------------------------------------------------------------------- the whole


def embed(options: EmbedOptions) -> EmbeddingSet | None:
    """Embed what `options` ask for; return the embeddings, None while other tasks have parts to embed.

    Raises BadInput in one sentence, before anything is written where that can be."""
    try:
        plan = make_plan(options)
    except BadInput as error:
        error.everywhere = True  # every process of torchrun finds it
        raise
    with owning_output(plan.store, plan.task.lock("embed")):
        return _embed_owned(plan, options)


def _embed_owned(plan: Plan, options: EmbedOptions) -> EmbeddingSet | None:
    try:
        remove_foreign(plan)
        todo = find_todo(plan, plan.parts if options.finish else plan.share)
    except BadInput as error:
        error.everywhere = True  # every process of torchrun finds it
        raise
    if options.finish and todo:
        raise BadInput(
            f"{len(todo)} of {len(plan.parts)} parts have no whole embeddings yet ({todo[0].name}): run the tasks that "
            "have them, then --finish"
        )
    if todo:
        _embed_parts(plan, todo)
    missing = missing_records(plan)
    if missing:
        print(f"task {plan.task} is done; {len(missing)} of {len(plan.parts)} parts are left to other tasks")
        return None
    mine = {part.name for part in plan.share}
    others = [] if options.finish else find_todo(plan, [part for part in plan.parts if part.name not in mine])
    if others:  # whoever is making it anew finishes
        print(f"task {plan.task} is done; {len(others)} of {len(plan.parts)} parts of other tasks are not whole")
        return None
    return finish(plan, todo)


def _embed_parts(plan: Plan, todo: Sequence[Part]) -> None:
    """Embed parts in the processes of this machine and print the rate."""
    plan.store.remove(MANIFEST_NAME)  # until it is written anew, the folder is no whole set
    count, done = sum(part.items for part in todo), len(plan.share) - len(todo)
    print(f"{done} parts are there already, {len(todo)} are to be made of {count} samples", flush=True)
    begun = time.monotonic()
    job = dataclasses.replace(plan.job, run=absolute(plan.job.run), output=absolute(plan.job.output))
    left_out = plan.machines.map(
        embed_part, [(job, part) for part in todo], title="embedding", unit_counts=[part.items for part in todo]
    )
    worker_of.cache_clear()  # of this process
    seconds = time.monotonic() - begun
    print(f"{count} samples in {seconds:.0f} s, {count / seconds:.1f} samples/s", flush=True)
    lines = [line for part in left_out for line in part]
    if lines:
        print(f"left out {len(lines)} bad samples:", file=sys.stderr)
        for line in lines:
            print(f"  {line}", file=sys.stderr)


def finish(plan: Plan, made: Sequence[Part]) -> EmbeddingSet:
    """Remove what killed processes left and write embeddings.json; all parts are whole. Return the embeddings."""
    clear_leftovers(plan.store)
    shards: list[EmbeddedShard] = []
    left_out: list[str] = []
    for part in plan.parts:
        record = read_record(plan.store, part.name)
        if record is None:
            raise BadInput(f"{plan.store.location(record_name(part.name))} was removed meanwhile: start again")
        shards.append(counted(part.name, part.split, record))
        left_out += record.left_out
    if not any(shard.images or shard.texts for shard in shards):
        why = f" ({reasons_of(left_out)})" if left_out else ""
        raise BadInput(f"{plan.source.location} has no sample that can be embedded{why}: mend some, or name another")
    spec = plan.saved.spec
    manifest = EmbeddingManifest(
        model=ModelIdentity(plan.job.model, str(Path(plan.job.run).resolve()), spec.data_name),
        dim=plan.saved.dim,
        dtype=plan.job.dtype,
        source=plan.source.identity,
        classes=list(plan.source.classes),
        attribution=plan.source.attribution,
        shards=shards,
    )
    plan.store.write(MANIFEST_NAME, manifest.to_json())
    images, texts = (sum(shard.count(modality) for shard in shards) for modality in ("image", "text"))
    said = f"{'wrote' if made else 'already written:'} {public_url(plan.job.output)}"
    print(f"{said}: {images} images and {texts} texts in {len(shards)} shards, {manifest.dim} numbers each")
    return EmbeddingSet.open(plan.job.output)
