"""RUN/report.html: one file that shows how a run went and what its common space retrieves; and its console twin.

Made from what lies in the run's folder; a part that is not there yet is left out:

    config.yaml       the whole Config
    metrics.jsonl     lines of kind "train" (loss/PHASE/TERM, accuracy/D/GROUP, margin/D) and "val" (`metrics.evaluate`)
    evaluation.json   "metrics" (`metrics.evaluate`), "baselines" {name: the same}, "classes", "zscore"; and, shown as
                      they are, "data", "split", "seed", "checkpoint"
    embeddings.npz    image [N, E], text [M, E], text_owner [M], keys [N], labels [N, C] where the pairs have classes
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from cmgan_dist.errors import BadInput
from cmgan_dist.files import write_atomic
from cmgan_dist.report.curves import _discriminator_section, _loss_section, _validation_section
from cmgan_dist.report.found import (
    _example_section,
    _load_shown,
    _matrix_section,
    _per_class_section,
    _precision_section,
    _space_section,
)
from cmgan_dist.report.page import CSS, STYLE
from cmgan_dist.report.table import _headline_section
from cmgan_dist.retrieval.gallery import GalleryItem
from cmgan_dist.training.recorder import read_metrics


def write_report(run: Path, items: Sequence[GalleryItem] | None = None) -> Path:
    """Write RUN/report.html from what the run's folder holds and return its path.

    `items`, one per image of embeddings.npz in its order, give pictures and texts; without them keys and classes are
    shown. Raises BadInput when a file of the run cannot be read or disagrees with another."""
    run = Path(run)
    lines = read_metrics(run)
    evaluation = _read_json(run / "evaluation.json")
    shown = _load_shown(run / "embeddings.npz", evaluation, items)
    train = [line for line in lines if line.get("kind") == "train"]
    val = [line for line in lines if line.get("kind") == "val"]
    with mpl.rc_context(STYLE):
        sections = [
            _headline_section(evaluation),
            _validation_section(val),
            _loss_section(train),
            _discriminator_section(train),
            _precision_section(evaluation),
            _per_class_section(evaluation),
            _matrix_section(shown),
            _space_section(shown),
            _example_section(shown),
        ]
    body = "".join(section for section in sections if section)
    if not body:
        body = "<section><p>Nothing has been recorded yet.</p></section>"
    config = run / "config.yaml"
    if config.is_file():
        text = html.escape(config.read_text(encoding="utf-8"))
        body += f"<details><summary>Configuration</summary><pre>{text}</pre></details>"
    title = html.escape(run.resolve().name)
    path = run / "report.html"
    write_atomic(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body><main>'
        f"<header><h1>{title}</h1>"
        "<p class=lead>A common space for images and texts: how it was trained and what it finds.</p>"
        f"{_chips(evaluation, lines)}</header>{body}</main></body></html>\n",
    )
    return path


# ---------------------------------------------------------------------------------------------- reading


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}): evaluate the run again") from None
    if not isinstance(record, dict):
        raise BadInput(f"{path} is not a JSON object: evaluate the run again")
    return record


def _chips(evaluation: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    metrics = evaluation.get("metrics") or {}
    said = ("data", "split", "seed", "checkpoint")
    facts = {name: evaluation[name] for name in said if evaluation.get(name) is not None}
    facts |= {name: f"{metrics[name]:,}" for name in ("images", "texts") if name in metrics}
    if lines:
        facts["samples seen"] = f"{max(line['samples'] for line in lines):,}"
    chips = "".join(f"<li><b>{html.escape(k)}</b>{html.escape(str(v))}</li>" for k, v in facts.items())
    return f"<ul class=chips>{chips}</ul>"


# ---------------------------------------------------------------------------------------------- headline


# ---------------------------------------------------------------------------------------------- figures


# ---------------------------------------------------------------------------------------------- examples
