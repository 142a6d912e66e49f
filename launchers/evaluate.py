"""Evaluate a trained run on a split: MAP, recall, baselines, report.

python launchers/evaluate.py RUN --data DIR --split test [--json]
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from cmgan_dist.config.cli import log_to_stderr, parse
from cmgan_dist.errors import BadInput, run_main


@dataclass
class Arguments:
    """Evaluate RUN's best generator on a split; writes RUN/evaluation.json, RUN/embeddings.npz and RUN/report.html."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    data: str = ""
    """Folder of shards; the one that the run was trained on when left out."""
    split: str = "test"
    """Split to evaluate."""
    pictures: str = ""
    """Folder of raw shards with the same keys, for the report's pictures; found by itself for shards that
    'python -m shards features' wrote."""
    json: bool = False
    """Print the metrics as JSON on stdout instead of a table."""
    baselines: bool = True
    """Fit CCA and ridge on the same features and put them beside."""
    again: bool = False
    """Evaluate even if RUN/evaluation.json is of this checkpoint, data and split."""
    zscore: bool = True
    """Standardise common representations per modality over the split, as the authors do."""


def main() -> None:
    log_to_stderr()
    arguments = parse(Arguments, sys.argv[1:], prog="launchers/evaluate.py")
    from cmgan_dist.data.reader import ShardReader
    from cmgan_dist.distributed.processes import Parallel
    from cmgan_dist.files import sha256_of, write_atomic
    from cmgan_dist.models.saved import MODEL, load_best, load_model
    from cmgan_dist.report.run import write_report
    from cmgan_dist.retrieval.baselines import baseline_table
    from cmgan_dist.retrieval.embed import Embedded, embed_split
    from cmgan_dist.retrieval.gallery import gallery_items
    from cmgan_dist.retrieval.metrics import evaluate

    run = arguments.run
    generator, config, spec = load_model(run)
    data = arguments.data or config.data.split(",")[0]
    if not data:
        raise BadInput("--data is missing and the run names no data: name a folder of shards")
    reader = ShardReader(data, arguments.split, config.stream)
    manifest = reader.manifest.to_json()
    asked = {
        "data": data,
        "split": arguments.split,
        "zscore": arguments.zscore,
        "manifest": hashlib.sha256(manifest.encode()).hexdigest(),
        "model": sha256_of(run / "best" / MODEL),
    }
    known = json.loads((run / "evaluation.json").read_text()) if (run / "evaluation.json").is_file() else {}
    complete = bool(known.get("baselines")) or not arguments.baselines
    if asked == {k: known.get(k) for k in asked} and complete and not arguments.again:
        print("already evaluated (--again does it anew)", file=sys.stderr)
        show(known, run / "report.html", arguments.json)
        return
    parallel = Parallel(config.train.precision)
    generator.to(parallel.device)

    def embedded(split: str) -> Embedded:
        return embed_split(generator, ShardReader(data, split, config.stream), config, parallel)

    found = embedded(arguments.split)
    metrics = evaluate(found.common, zscore=arguments.zscore)
    baselines: dict[str, Any] = {}
    if arguments.baselines:
        train, val = embedded(config.stream.train_split), embedded(config.stream.val_split)
        baselines = baseline_table(train.features, val.features, found.features)
    _, metadata = load_best(run)
    record = {
        "metrics": metrics,
        "baselines": baselines,
        "classes": spec.classes,
        **asked,
        "seed": config.train.seed,
        "checkpoint": f"best, at sample {metadata.get('best_position')} of training",
    }
    arrays = {"image": found.common.image, "text": found.common.text, "text_owner": found.common.text_owner}
    if found.common.labels is not None:
        arrays["labels"] = found.common.labels
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, keys=np.array(found.keys), **{k: v.numpy() for k, v in arrays.items()})
    write_atomic(run / "embeddings.npz", packed.getvalue())
    write_atomic(run / "evaluation.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    report = write_report(run, gallery_items(reader, arguments.pictures))
    show(record, report, arguments.json)


def show(record: dict[str, Any], report: Path, as_json: bool) -> None:
    """JSON on stdout, or the table and where the report is."""
    from cmgan_dist.report.table import results_table

    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        results_table(record)
        print(f"report: {report}")


if __name__ == "__main__":
    run_main(main)
