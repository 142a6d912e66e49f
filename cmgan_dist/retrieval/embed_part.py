"""One part of a source (`embed_source`) -> its files of embeddings (`embeddings`), by one process.

Shapes: n images and m texts of the part, D dimensions of a vector."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch

from cmgan_dist.data.batch import EvalBatch
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput, shown
from cmgan_dist.jobs import ledger
from cmgan_dist.jobs.memory import keep_freed_memory
from cmgan_dist.models.generator import Modality
from cmgan_dist.models.saved import MODEL_NAME, read_model
from cmgan_dist.retrieval.embed import embed_items, evaluating
from cmgan_dist.retrieval.embed_source import Part, Reading, Source, open_source
from cmgan_dist.retrieval.embeddings import ITEMS, write_shard
from cmgan_dist.retrieval.model import Model


@dataclass(frozen=True)
class Job:
    """What a process needs to know; hashable, so that it loads the model once."""

    run: str
    model: str
    """SHA-256 of best/model.safetensors."""
    kind: str
    location: str
    output: str
    batch: int
    dtype: str
    device: str
    threads: int
    """Threads that decode images."""
    skip_bad: bool
    label_kind: str
    """Whether samples have labels: single, multi or none (LabelKind)."""
    classes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Return what decides the bytes of a part's files, and what they mean, beside its source: the same on every
        machine."""
        named = hashlib.sha256(repr(self.classes).encode()).hexdigest()
        labels = {"label_kind": self.label_kind, "classes": named}
        return {"model": self.model, "batch": self.batch, "dtype": self.dtype, **labels}


class Worker:
    """The model and the source of one process."""

    def __init__(self, job: Job) -> None:
        """Load them. Raises BadInput when they cannot be read, or the run has another model by now."""
        keep_freed_memory()
        saved = read_model(job.run)
        if saved.spec.files[MODEL_NAME] != job.model:
            raise BadInput(f"{saved.folder} was replaced while it was in use: start again when its training has ended")
        self.source = open_source(job.kind, job.location, saved.config.stream)
        self.model = Model(saved, job.device)
        self.generator = self.model.generator_for(raw_modalities(self.source))
        size = saved.spec.image.image_size or saved.config.model.image.image_size
        self.reading = Reading(job.batch, size, job.threads)
        self.job = job

    def project(self, part: Part, left_out: list[str]) -> tuple[list[Entry], dict[Modality, torch.Tensor]]:
        """Return the samples of a part and their vectors, image [n, D] and text [m, D].

        A modality without any is not there. Raises BadInput at a bad sample unless the job skips them; a line for each
        is added to `left_out`."""
        entries: list[Entry] = []
        made: dict[Modality, list[torch.Tensor]] = {modality: [] for modality in self.source.modalities}
        with evaluating(self.generator):
            for batch in self.source.batches(part, self.reading, left_out):
                self._check(left_out)
                for modality, items in (("image", batch.image), ("text", batch.text)):
                    if modality in made:
                        made[modality].append(self._vectors(modality, items, part))
                entries += entries_of(batch)
        self._check(left_out)
        return entries, {modality: torch.cat(rows) for modality, rows in made.items() if rows}

    def _vectors(self, modality: Modality, items: torch.Tensor | list[str], part: Part) -> torch.Tensor:
        """Return the vectors of a batch. Raises BadInput when they are not finite."""
        made = embed_items(self.generator, modality, items, self.model)
        if not torch.isfinite(made.common).all():
            raise BadInput(
                f"the vectors of {part.origin} are not finite: the model in {self.job.run} has diverged, use another"
            )
        return made.vectors(self.model.scoring, modality)

    def _check(self, left_out: Sequence[str]) -> None:
        if left_out and not self.job.skip_bad:
            where = f"{self.source.location}: {shown(left_out[0])}"
            raise BadInput(f"{where}: mend it, or pass --skip-bad to leave such samples out")


worker_of = lru_cache(maxsize=1)(Worker)
"""``worker_of(job)`` returns the process's Worker, which is loaded once."""


def raw_modalities(source: Source) -> list[Modality]:
    """Return which modalities of a source are pictures and texts, and not features."""
    return [m for m in source.modalities if getattr(source.spec, f"{m}_dim") is None]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: a process a core is faster, and the bits do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Entry:
    """What is kept of a sample beside its vectors."""

    number: int
    """Its number in the part."""
    key: str
    captions: list[str | None]
    """One for each text; None where texts are features."""
    labels: tuple[int, ...]


def entries_of(batch: EvalBatch) -> list[Entry]:
    """Return what is kept of each sample of a batch."""

    def plain(text: object) -> str | None:
        """A text as UTF-8 can hold it: what is none becomes an escape, so that names stay different."""
        return text.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(text, str) else None

    return [
        Entry(number, plain(sample.key) or "", [plain(text) for text in sample.texts], sample.labels)
        for number, sample in zip(batch.numbers, batch.samples, strict=True)
    ]


def items_of(entries: Sequence[Entry], part: Part, modalities: Sequence[Modality]) -> pa.Table:
    """Return the table ITEMS: a row for each image, then for each text."""
    rows: list[tuple[Any, ...]] = []
    if "image" in modalities:
        rows += [("image", e.key, None, row, e.labels, part.origin, e.number) for row, e in enumerate(entries)]
    if "text" in modalities:
        owners = range(len(entries)) if "image" in modalities else [-1] * len(entries)
        rows += [
            ("text", e.key, caption, owner, e.labels, part.origin, e.number)
            for owner, e in zip(owners, entries, strict=True)
            for caption in e.captions
        ]
    columns = list(zip(*rows, strict=True)) or [()] * len(ITEMS)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, ITEMS, strict=True)], schema=ITEMS)


def embed_part(job: Job, part: Part) -> list[str]:
    """Write the files of a part, its record last; return a line for each sample that was left out.

    Raises BadInput at a bad sample unless the job skips them, when the part cannot be read or changes meanwhile, and
    when a file cannot be written."""
    left_out: list[str] = []
    with one_thread():
        worker = worker_of(job)
        source = worker.source.checksum(part)
        entries, made = worker.project(part, left_out)
        if worker.source.checksum(part) != source:
            raise BadInput(f"{worker.source.location}: {part.origin} was changed while it was embedded: start again")
        vectors = {modality: rows.numpy().astype(job.dtype) for modality, rows in made.items()}
        items = items_of(entries, part, worker.source.modalities)
        left_out = [shown(line) for line in left_out]
        record = ledger.Record(source, job.settings, left_out=left_out)
    write_shard(FileStore(job.output, "--output"), part.name, vectors, items, record)
    return left_out
