"""Evaluate a trained run on a split: MAP, recall, baselines, report.

python launchers/evaluate.py RUN --data DIR --split test [--json]
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cmgan_dist.config.cli import log_to_stderr, parse
from cmgan_dist.errors import BadInput, run_main

if TYPE_CHECKING:  # torch takes seconds to import
    from cmgan_dist.retrieval.evaluate import Evaluation
    from cmgan_dist.retrieval.gallery import GalleryItem

EMBEDDINGS = "embeddings_sha256"
"""Where evaluation.json has the checksum of the embeddings.npz that belongs to it."""


@dataclass
class Arguments:
    """Evaluate RUN's best generator on a split; writes RUN/evaluation.json, RUN/embeddings.npz and RUN/report.html."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
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


def main() -> None:
    log_to_stderr()
    arguments = parse(Arguments, sys.argv[1:], prog="launchers/evaluate.py")
    from cmgan_dist.data.folder import check_file
    from cmgan_dist.data.source import public_url
    from cmgan_dist.distributed.join import start_all_processes
    from cmgan_dist.distributed.processes import Parallel
    from cmgan_dist.jobs.cores import take_threads
    from cmgan_dist.jobs.lock import owning
    from cmgan_dist.jobs.machine import absolute
    from cmgan_dist.retrieval.evaluate import EMBEDDINGS_NAME, RECORD_NAME, REPORT_NAME, open_task, run_task
    from cmgan_dist.retrieval.gallery import gallery_items

    run = arguments.run
    for name in (EMBEDDINGS_NAME, RECORD_NAME, REPORT_NAME):
        check_file(run / name, "the evaluation")
    start_all_processes()
    task = open_task(run, arguments.data, split=arguments.split)
    asked = task.identity() | {"pictures": public_url(absolute(arguments.pictures))}
    known = known_record(run / RECORD_NAME)
    complete = bool(known.get("baselines")) or not arguments.baselines
    same = asked == {k: known.get(k) for k in asked} and complete and "metrics" in known
    if same and not arguments.again and is_whole(run, known):
        if int(os.environ.get("RANK", "0")):
            return
        print("already evaluated (--again does it anew)", file=sys.stderr)
        show(known, run / REPORT_NAME, arguments.json)
        return
    pictures = gallery_items(task.reader, arguments.pictures)  # first: a wrong folder is said before the work
    parallel = Parallel(task.saved.config.train.precision)
    take_threads(parallel.local_world, say=parallel.main)
    with contextlib.ExitStack() as held:
        parallel.on_main(lambda: held.enter_context(owning(run, "evaluate")))
        found = run_task(task, baselines=arguments.baselines, parallel=parallel)

        def finish() -> None:
            record, report = keep(run, found, asked, pictures)
            show(record, report, arguments.json)

        parallel.on_main(finish)
    parallel.close()


def keep(
    run: Path, found: Evaluation, asked: dict[str, Any], pictures: list[GalleryItem]
) -> tuple[dict[str, Any], Path]:
    """Write the three files of an evaluation, the report last; return what evaluation.json holds and where the report
    is.

    No report is there that is another evaluation's, and what was measured stays where none can be drawn. Raises
    BadInput when the run cannot be written."""
    from cmgan_dist.files import write_atomic
    from cmgan_dist.report.run import write_report
    from cmgan_dist.retrieval.evaluate import EMBEDDINGS_NAME, RECORD_NAME, REPORT_NAME, record_json

    try:
        embeddings = found.embeddings_npz()
        record = found.record | asked | {EMBEDDINGS: hashlib.sha256(embeddings).hexdigest()}
        (run / REPORT_NAME).unlink(missing_ok=True)
        write_atomic(run / EMBEDDINGS_NAME, embeddings)
        write_atomic(run / RECORD_NAME, record_json(record))
        report = write_report(run, pictures, record)
    except OSError as error:
        raise BadInput(f"{run} cannot be written ({error.strerror}): make it writable or free space") from None
    return record, report


def is_whole(run: Path, known: dict[str, Any]) -> bool:
    """Return whether the report and the embeddings of an evaluation are there; what is not is named on stderr."""
    from cmgan_dist.files import sha256_of
    from cmgan_dist.retrieval.evaluate import EMBEDDINGS_NAME, REPORT_NAME

    report, embeddings = run / REPORT_NAME, run / EMBEDDINGS_NAME
    for path in (report, embeddings):
        if not path.is_file():
            print(f"{path} is missing: evaluating anew", file=sys.stderr)
            return False
    if sha256_of(embeddings) != known.get(EMBEDDINGS):
        print(f"{embeddings} is not of this evaluation: evaluating anew", file=sys.stderr)
        return False
    return True


def known_record(path: Path) -> dict[str, Any]:
    """Return an earlier evaluation; {} where there is none or it has changed since, so that it is made anew.

    Raises OSError when it is there and cannot be read."""
    from cmgan_dist.files import read_bytes
    from cmgan_dist.retrieval.evaluate import parse_record

    try:
        return parse_record(read_bytes(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"{path} is not as it was written ({error}): evaluating anew", file=sys.stderr)
        return {}


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
