"""RUN/report.html: one file that shows how a run went and what its common space retrieves.

Made from what lies in the run's folder; a part that is not there yet is left out:

    config.yaml       the whole Config
    metrics.jsonl     lines of kind "train" (loss/PHASE/TERM, accuracy/D/GROUP, margin/D) and "val" (`metrics.evaluate`)
    evaluation.json   "metrics" (`metrics.evaluate`), "ends" and "baselines" {name: the same}, "frontiers",
                      "classes"; and, shown as they are, "data", "split", "seed", "checkpoint"
    embeddings.npz    image [N, D], text [M, D], text_owner [M], keys [N], labels [N, C] where the pairs have classes
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from cmgan_dist.config.fields import CONFIG_NAME
from cmgan_dist.config.safe_yaml import read_text
from cmgan_dist.data.source import public_url
from cmgan_dist.files import write_atomic
from cmgan_dist.models.saved import BEST, SPEC_NAME, read_spec
from cmgan_dist.report.curves import discriminator_section, loss_section, validation_section
from cmgan_dist.report.found import (
    example_section,
    frontier_section,
    load_retrieved,
    matrix_section,
    per_class_section,
    precision_section,
    space_section,
)
from cmgan_dist.report.page import STYLE, render_page
from cmgan_dist.report.record import read_evaluation
from cmgan_dist.report.table import headline_section
from cmgan_dist.retrieval.evaluate import EMBEDDINGS_NAME, RECORD_NAME, REPORT_NAME, is_of_model
from cmgan_dist.retrieval.gallery import GalleryItem
from cmgan_dist.training.recorder import read_metrics

log = logging.getLogger(__name__)

GONE = "of another model than best/ holds, and left out: evaluate the run again"
"""What is said of an evaluation whose model is gone."""


def write_report(
    run: Path, items: Sequence[GalleryItem] | None = None, evaluation: dict[str, Any] | None = None
) -> Path:
    """Write RUN/report.html from what the run's folder holds and return its path.

    `items`, one per image of embeddings.npz in its order, give pictures and texts; without them keys and classes are
    shown. `evaluation`: the record of the one that made embeddings.npz; None is that of evaluation.json, which is left
    out where best/ holds another model. Raises BadInput when a file of the run cannot be read or disagrees with
    another."""
    run = Path(run)
    lines = read_metrics(run)
    known = read_evaluation(run / RECORD_NAME) if evaluation is None else evaluation
    gone = is_of_gone_model(run, known)
    evaluation = {} if gone else known
    retrieved = None if gone else load_retrieved(run / EMBEDDINGS_NAME, evaluation, items)
    train = [line for line in lines if line.get("kind") == "train"]
    val = [line for line in lines if line.get("kind") == "val"]
    with mpl.rc_context(STYLE):
        sections = [
            headline_section(evaluation),
            validation_section(val),
            loss_section(train),
            discriminator_section(train),
            frontier_section(evaluation),
            precision_section(evaluation),
            per_class_section(evaluation),
            matrix_section(retrieved),
            space_section(retrieved),
            example_section(retrieved),
        ]
    config = run / CONFIG_NAME
    page = render_page(
        title=run.resolve().name,
        lead="A common space for images and texts: how it was trained and what it finds.",
        facts=_facts(evaluation, lines) | ({"evaluation": GONE} if gone else {}),
        sections=sections,
        when_empty="Nothing has been recorded yet.",
        config=_without_secrets(read_text(config, f"config file {config}")) if config.is_file() else None,
    )
    path = run / REPORT_NAME
    write_atomic(path, page)
    return path


def is_of_gone_model(run: Path, evaluation: dict[str, Any]) -> bool:
    """Return whether best/ holds another model than the one that was evaluated; the log says so.

    Raises BadInput when its model.json is damaged."""
    path = run / BEST / SPEC_NAME
    if not evaluation or not path.is_file() or is_of_model(evaluation, read_spec(path)):
        return False
    log.warning("%s is %s", run / RECORD_NAME, GONE)
    return True


def _without_secrets(config: str) -> str:
    """Return the text of a config, in which URLs end at white space, a quote or an escaped end of line."""
    return re.sub(r"\w+://(?:[^\s'\"\\]|\\(?!n))+", lambda found: public_url(found[0]), config)


def _facts(evaluation: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the chips below the title say of the data, the seed, the checkpoint and the training."""
    metrics = evaluation.get("metrics") or {}
    named = ("data", "split", "seed", "checkpoint")
    facts = {name: evaluation[name] for name in named if evaluation.get(name) is not None}
    facts |= {name: f"{metrics[name]:,}" for name in ("images", "texts") if name in metrics}
    if lines:
        facts["samples seen"] = f"{max(line['samples'] for line in lines):,}"
    return facts
