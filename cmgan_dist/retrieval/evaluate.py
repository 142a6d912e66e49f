"""How good a trained run is on a split: embeddings, metrics, and baselines on the same features."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmgan_dist.config.fields import DATA_SEPARATOR
from cmgan_dist.data.differences import other_class, other_features
from cmgan_dist.data.folder import checked_path
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.source import public_url
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_sealed, sealed_json
from cmgan_dist.models.saved import MODEL_NAME, BackboneSpec, ModelSpec, Saved, load_generator, read_model
from cmgan_dist.retrieval.embed import embed_split
from cmgan_dist.retrieval.embeddings import EmbeddingSet
from cmgan_dist.retrieval.headline import MODEL
from cmgan_dist.retrieval.metrics import Embeddings
from cmgan_dist.retrieval.metrics import evaluate as evaluate_embeddings

RECORD_NAME, EMBEDDINGS_NAME, REPORT_NAME, VERSION = "evaluation.json", "embeddings.npz", "report.html", 1


def record_json(record: Mapping[str, Any]) -> str:
    """Return the text of evaluation.json, with a checksum of itself; `parse_record` reads it."""
    return sealed_json({"version": VERSION, **record})


def parse_record(text: str | bytes) -> dict[str, Any]:
    """Return the record in the text of evaluation.json.

    Raises ValueError when it is none, has changed since it was written, or is of another version."""
    return parse_sealed(text, VERSION)


def is_of_model(record: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Return whether an evaluation is one of this very model; best/ may hold another since."""
    return record.get("model") == spec.files.get(MODEL_NAME)


@dataclass(frozen=True)
class EvaluationTask:
    """A task names what is to be evaluated: a run, and a split of a data set that fits it."""

    saved: Saved
    reader: ShardReader

    def identity(self) -> dict[str, Any]:
        """Return what decides the result: data, split, and checksums of the manifest and the model."""
        manifest = self.reader.manifest.to_json()
        return {
            "data": self.reader.place,
            "split": self.reader.split,
            "manifest": hashlib.sha256(manifest.encode()).hexdigest(),
            "model": self.saved.spec.files[MODEL_NAME],
        }


@dataclass
class Evaluation:
    """An evaluation holds what a task gave; it is equal on every process."""

    record: dict[str, Any]
    """The contents of evaluation.json: "metrics" (`metrics.evaluate`), "ends" and "baselines" {name: the same},
    "trained_features" (modalities whose features the model itself has trained), "frontiers", "classes", "scoring", what
    was asked, "seed" and "checkpoint"."""
    vectors: Embeddings
    keys: list[str]

    def embeddings_npz(self) -> bytes:
        """Return a ``.npz`` file: image [N, D], text [M, D], text_owner [M], keys [N], labels [N, C] if there are."""
        vectors, packed = self.vectors, io.BytesIO()
        arrays = {"image": vectors.image, "text": vectors.text, "text_owner": vectors.text_owner}
        if vectors.labels is not None:
            arrays["labels"] = vectors.labels
        keys = np.array(self.keys)
        np.savez(packed, allow_pickle=False, keys=keys, **{k: v.numpy() for k, v in arrays.items()})
        return packed.getvalue()


def _as_details(made: BackboneSpec) -> dict[str, Any]:
    """Return what a run knows of its features as a manifest's details say it."""
    return {} if made.name == "features" else {"backbone": made.name, **dataclasses.asdict(made)}


def check_kinds(
    saved: Saved, data: str, theirs: DataSpec, details: Mapping[str, Any], *, raw_fits: bool = False
) -> None:
    """Compare what a run takes with the images and texts of the data set `data`. Raises BadInput where they differ.

    `details`: those of the data set's manifest, which say of what backbones its features are. `raw_fits`: raw images
    and texts fit any run, because its backbones make features of them."""
    mine, place = saved.spec.data, public_url(data)
    for what, a, b in (("images", mine.image_dim, theirs.image_dim), ("texts", mine.text_dim, theirs.text_dim)):
        if a != b and not (raw_fits and b is None):
            said = [f"features of {dim} numbers" if dim is not None else "raw" for dim in (a, b)]
            raise BadInput(
                f"the {what} of {place} are {said[1]}, those that {saved.folder} was trained on are "
                f"{said[0]}: name data of the same kind"
            )
    for what, dim, made in (("image", theirs.image_dim, saved.spec.image), ("text", theirs.text_dim, saved.spec.text)):
        found = other_features(_as_details(made), details.get(what)) if dim is not None else ""
        if found:
            raise BadInput(
                f"the {what} features of {place} are not made as those that {saved.folder} was trained on ({found}): "
                "name data whose features are made alike"
            )


def check_data(saved: Saved, reader: ShardReader) -> None:
    """Compare a run with a data set. Raises BadInput, naming the first difference, unless it can be evaluated on it."""
    mine, theirs = saved.spec.data, DataSpec.of(reader.manifest)
    check_kinds(saved, reader.data, theirs, reader.manifest.details)
    found = other_class(mine.classes, theirs.classes) if mine.classes and theirs.classes else ""
    if found:
        raise BadInput(
            f"{reader.place} has other classes than {saved.folder} was trained on ({found}): "
            "name data with the same classes"
        )


def open_task(run: str | Path, data: str = "", *, split: str = "test") -> EvaluationTask:
    """Read the best model of a run and open the split on which it is to be evaluated.

    `data`: folder or URL; "" is the data that the run was trained on (the first of a mixture). Raises BadInput when run
    or data cannot be read, or do not fit together."""
    saved = read_model(run)
    if not data:
        data = saved.config.data.split(DATA_SEPARATOR)[0]
        if not data:
            raise BadInput("--data is missing and the run names no data: name a folder of shards")
        if "://" not in data and not Path(data).is_dir():
            raise BadInput(f"the data that {run} was trained on is not at {data}: name where it is by --data")
    checked_path(data, "data")
    reader = ShardReader(data, split, saved.config.stream)
    check_data(saved, reader)
    return EvaluationTask(saved, reader)


def run_task(task: EvaluationTask, *, baselines: bool = True, parallel: Parallel | None = None) -> Evaluation:
    """Embed the split and measure retrieval on it; every process calls it.

    `baselines`: fit CCA and ridge on the same features of the training split, with settings from the validation split.
    Raises BadInput at a bad sample."""
    saved, reader, config = task.saved, task.reader, task.saved.config
    parallel = parallel or Parallel(config.train.precision)
    generator = load_generator(saved).to(parallel.device)
    embedded = embed_split(generator, reader, config, parallel)
    vectors = embedded.vectors(saved.scoring)
    record: dict[str, Any] = {
        "metrics": evaluate_embeddings(vectors, parallel=parallel),
        "ends": {},
        "baselines": {},
    }
    spec = saved.scoring.spec
    for objective in spec.shares:
        if objective != spec.objective:
            of_end = embedded.vectors(saved.scoring.made_for(objective))
            record["ends"][objective] = evaluate_embeddings(of_end, parallel=parallel)
    if baselines:
        from cmgan_dist.retrieval.baselines import CLASSIFIER, PAIRS, baseline_table, best_baselines, check_features
        from cmgan_dist.retrieval.frontier import baseline_frontier, model_frontier

        train, val = (
            embed_split(generator, reader.of(s), config, parallel).features
            for s in (config.stream.train_split, config.stream.val_split)
        )
        check_features(train, embedded.features, "test")
        best = best_baselines(train, val, parallel=parallel)
        record["baselines"] = baseline_table(best, embedded.features, parallel)
        parts = {"image": generator.image_backbone, "text": generator.text_backbone}
        record["trained_features"] = [
            name for name, backbone in parts.items() if backbone.trainable and any(True for _ in backbone.parameters())
        ]
        curves = {MODEL: model_frontier(saved.scoring, embedded)}
        curves |= {f"{CLASSIFIER} + {PAIRS}": baseline_frontier(best, embedded.features)}
        record["frontiers"] = {name: points for name, points in curves.items() if points}
    record |= {
        "classes": saved.spec.data.classes,
        "scoring": dataclasses.asdict(spec),
        **task.identity(),
        "seed": config.train.seed,
        "checkpoint": f"best, at sample {saved.spec.progress.get('best_position')} of training",
    }
    return Evaluation(record, vectors, embedded.keys)


def evaluate(run: str | Path, data: str = "", *, split: str = "test") -> dict[str, Any]:
    """Return the metrics of a run's best model on a split: MAP and recall of every direction by name.

    Arguments and errors are those of `open_task`."""
    metrics: dict[str, Any] = run_task(open_task(run, data, split=split), baselines=False).record["metrics"]
    return metrics


def embeddings_of(made: EmbeddingSet, split: str) -> Embeddings:
    """Return the vectors of a split of embedded data as metrics take them.

    Raises BadInput when the split is not there, or has not both modalities."""
    shards = [shard for shard in made if shard.split == split]
    if not any(shard.images for shard in shards) or not any(shard.texts for shard in shards):
        raise BadInput(f"{made.location} has no images and texts of a split {split!r}: embed that split of a data set")
    owners: list[int] = []
    labels: list[list[int]] = []
    for shard in shards:
        items = made.items(shard)
        owners += [len(labels) + owner for owner in items["owner"][shard.images :].to_pylist()]
        labels += items["labels"][: shard.images].to_pylist()
    multi_hot = torch.zeros(len(labels), len(made.manifest.classes), dtype=torch.bool)
    for row, classes in enumerate(labels):
        multi_hot[row, classes] = True
    image, text = (
        torch.from_numpy(np.concatenate([made.vectors(modality, shard) for shard in shards]))
        for modality in ("image", "text")
    )
    return Embeddings(image, text, torch.tensor(owners), multi_hot if made.manifest.classes else None)


def evaluate_embedded(embeddings: str | Path, *, split: str = "test") -> dict[str, Any]:
    """Return the metrics, as `evaluate`, of a split whose vectors launchers/embed.py has written.

    Raises BadInput when the embeddings are not whole or not of both modalities of that split."""
    return evaluate_embeddings(embeddings_of(EmbeddingSet.open(embeddings), split))
