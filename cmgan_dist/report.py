"""RUN/report.html: one file that shows how a run went and what its common space retrieves; and its console twin.

Made from what lies in the run's folder; a part that is not there yet is left out:

    config.yaml       the whole Config
    metrics.jsonl     lines of kind "train" (loss/PHASE/TERM, accuracy/D/GROUP, margin/D) and "val" (`metrics.evaluate`)
    evaluation.json   "metrics" (`metrics.evaluate`), "baselines" {name: the same}, "classes", "zscore"; and, shown as
                      they are, "data", "split", "seed", "checkpoint"
    embeddings.npz    image [N, E], text [M, E], text_owner [M], keys [N], labels [N, C] where the pairs have classes
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from rich.console import Console
from rich.table import Table

from cmgan_dist.errors import BadInput
from cmgan_dist.files import write_atomic
from cmgan_dist.metrics import Embeddings, common_space, pair_ranks, rank_classes, top_k
from cmgan_dist.record import read_metrics

MODEL = "CM-GAN"
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
SHOWN = 8
"""Items shown per query."""
QUERY_QUANTILES = (0.0, 0.15, 0.35, 0.55, 0.8, 1.0)
"""Which queries are shown: places in the order from best answered to worst."""
TSNE_POINTS = 3000
"""Images and texts together that are drawn in the common space; of a larger set, every n-th image with its texts."""
MOST_CLASSES = 40
THUMBNAIL = 112

# Mid-tones that keep their contrast on a light and on a dark page.
COLOURS = ["#3b82c4", "#d9792b", "#3f9d63", "#c9496b", "#8b6cc9", "#a8853a", "#2a9fa8", "#b064b8", "#7f8a3c", "#c2604a"]
# Ink and grid lines stand in for CSS variables, so that figures follow the page's light or dark scheme.
INK, LINE = "#010203", "#040506"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
CSS = """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--ink:#22252b;--soft:#636976;--line:#e2e0da;--accent:#2f6fad;
--good:#2f8f57;--bad:#c4453f;--tint:#eef4fa}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--ink:#e6e7ea;--soft:#9aa1ad;--line:#343943;
--accent:#7db4e6;--good:#55b97e;--bad:#e5736c;--tint:#22303f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:48px 24px 96px}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:1rem;margin:28px 0 8px}
p{margin:4px 0 16px;max-width:76ch}
.read{color:var(--soft);font-size:.95rem}
.lead{color:var(--soft);font-size:1.05rem;margin:0 0 20px}
.chips{display:flex;flex-wrap:wrap;gap:8px;margin:0;padding:0;list-style:none;font-size:.85rem}
.chips li{border:1px solid var(--line);background:var(--card);border-radius:999px;padding:3px 12px;
overflow-wrap:anywhere}
.chips b{font-weight:600;color:var(--soft);margin-right:6px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px 28px;margin-top:24px}
figure{margin:0}
svg{width:100%;height:auto;display:block}
svg text{font-family:inherit!important}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
thead th{font-weight:600;color:var(--soft);font-size:.78rem}
thead tr:first-child th{border-bottom:none;padding-bottom:0;color:var(--ink)}
th[scope=colgroup]{text-align:left}
th.group,td.group{border-left:1px solid var(--line)}
tbody th{font-weight:500}
tr.model{background:var(--tint)}
tr.model th{font-weight:700}
td.best{font-weight:700;color:var(--accent)}
.row{display:grid;grid-template-columns:148px 1fr;gap:16px;padding:14px 0;border-top:1px solid var(--line);
align-items:start}
.row .note{font-size:.78rem;color:var(--soft);margin-top:4px;line-height:1.35}
.found{display:grid;grid-template-columns:repeat(8,minmax(0,1fr));gap:8px;margin:0;padding:0;list-style:none}
.found.text{grid-template-columns:repeat(4,minmax(0,1fr))}
@media(max-width:760px){.found{grid-template-columns:repeat(4,minmax(0,1fr))}
.found.text{grid-template-columns:repeat(2,minmax(0,1fr))}section{padding:20px 16px}.row{grid-template-columns:1fr}}
.tile{border:2px solid var(--line);border-radius:8px;overflow:hidden;background:var(--page);position:relative;
min-height:64px;font-size:.8rem;line-height:1.35}
.tile img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#fff}
.tile div{margin:6px 8px 18px;overflow-wrap:break-word;display:-webkit-box;-webkit-line-clamp:6;
-webkit-box-orient:vertical;overflow:hidden}
.tile.query{border-color:var(--accent)}
.tile.good{border-color:var(--good)}
.tile.bad{border-color:var(--bad)}
.mark{position:absolute;right:0;bottom:0;color:#fff;font-size:.68rem;line-height:1;padding:3px 6px;
border-radius:6px 0 0 0;font-weight:700}
.good .mark{background:#2f8f57}
.bad .mark{background:#c4453f}
details{margin-top:24px;border:1px solid var(--line);border-radius:14px;background:var(--card);padding:14px 28px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:12px 0 4px}
"""


@dataclass
class GalleryItem:
    """What the report shows of one image and its texts; items stand in the order of the embeddings' images."""

    key: str
    image: bytes | None = None
    """Encoded JPEG, PNG or WebP; None for data of features."""
    texts: list[str] = field(default_factory=list)
    """In the order of the texts' rows; empty for data of features."""


@dataclass
class Shown:
    """The test set of a run as the report needs it."""

    data: Embeddings
    image: torch.Tensor
    """float64 [N, E], unit length."""
    text: torch.Tensor
    """float64 [M, E], unit length."""
    items: list[GalleryItem]
    classes: list[str]

    def side(self, direction: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(query, gallery, row of each query's image, row of each gallery item's image)."""
        own = torch.arange(len(self.image))
        if direction == "image_to_text":
            return self.image, self.text, own, self.data.text_owner
        return self.text, self.image, self.data.text_owner, own

    def names(self, row: int) -> str:
        """The classes of image `row`."""
        if self.data.labels is None:
            return ""
        return ", ".join(self.classes[c] for c in self.data.labels[row].nonzero()[:, 0].tolist())


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


def _load_shown(path: Path, evaluation: dict[str, Any], items: Sequence[GalleryItem] | None) -> Shown | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        labels = torch.from_numpy(arrays["labels"]) if arrays.get("labels") is not None else None
        image, text, owner = (torch.from_numpy(arrays[name]) for name in ("image", "text", "text_owner"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is not a file of embeddings ({error}): evaluate the run again") from None
    data = Embeddings(image, text, owner, labels)
    n = len(data.image)
    if items is None:
        items = [GalleryItem(str(key)) for key in arrays.get("keys", np.arange(n))]
    if len(items) != n:
        raise BadInput(f"{path} holds {n} images, but {len(items)} items were given to show")
    classes = list(evaluation.get("classes") or [])
    if data.labels is not None and len(classes) != data.labels.shape[1]:
        classes = [f"class {c}" for c in range(data.labels.shape[1])]
    return Shown(data, *common_space(data, evaluation.get("zscore", True)), list(items), classes)


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


@dataclass
class Column:
    group: str
    title: str
    key: str
    percent: bool = False

    def show(self, value: float | None) -> str:
        """MAP as .123, recall as 12.3 (percent), – for what is not there."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}".replace("0.", ".", 1)


def _headline(evaluation: dict[str, Any]) -> tuple[list[Column], list[tuple[str, dict[str, Any]]]]:
    """Columns that any row has, and rows (name, metrics): the model, baselines, chance last."""
    baselines = dict(evaluation.get("baselines") or {})
    chance = {"chance": baselines.pop("chance")} if "chance" in baselines else {}
    rows = [(MODEL, evaluation.get("metrics") or {}), *baselines.items(), *chance.items()]
    columns = [
        *(Column("MAP", title, f"map/{name}") for name, title in DIRECTIONS.items()),
        Column("MAP", "mean", "map/mean"),
        Column("MAP, all-modal", "image → all", "map/image_to_all_without_query"),
        Column("MAP, all-modal", "text → all", "map/text_to_all_without_query"),
        *(
            Column(f"Recall {title}, %", f"@{k}", f"recall/{name}@{k}", percent=True)
            for name, title in DIRECTIONS.items()
            for k in (1, 5, 10)
        ),
    ]
    return [c for c in columns if any(row.get(c.key) is not None for _, row in rows)], rows


def _best(column: Column, rows: list[tuple[str, dict[str, Any]]]) -> float:
    return max((row[column.key] for _, row in rows if row.get(column.key) is not None), default=math.nan)


def results_table(evaluation: dict[str, Any], console: Console | None = None) -> None:
    """Print the headline table of an evaluation.json; the best value of each column is bold."""
    columns, rows = _headline(evaluation)
    where = " ".join(str(evaluation[name]) for name in ("data", "split") if evaluation.get(name) is not None)
    table = Table(title=f"Retrieval on {where}" if where else "Retrieval", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name, _ in rows:
        table.add_column(name, justify="right", style="cyan" if name == MODEL else None)
    for column, following in zip(columns, [*columns[1:], None], strict=True):
        best = _best(column, rows)
        cells = []
        for _, row in rows:
            value = row.get(column.key)
            text = column.show(value)
            cells.append(f"[bold]{text}[/bold]" if value == best else text)
        last = following is None or following.group != column.group
        measure = column.group.split(",")[0].replace("Recall", "R" + column.title) + (" %" if column.percent else "")
        label = measure if column.percent else f"{measure} {column.title}"
        table.add_row(label.replace(" → ", "→"), *cells, end_section=last)
    (console or Console()).print(table)


def _headline_section(evaluation: dict[str, Any]) -> str:
    columns, rows = _headline(evaluation)
    if not columns:
        return ""
    groups: dict[str, int] = defaultdict(int)
    for column in columns:
        groups[column.group] += 1
    first = {next(c.key for c in columns if c.group == group) for group in groups}
    top = "".join(f"<th class=group colspan={count} scope=colgroup>{group}</th>" for group, count in groups.items())
    head = "".join(f"<th scope=col{' class=group' * (c.key in first)}>{c.title}</th>" for c in columns)
    body = ""
    for name, row in rows:
        cells = ""
        for column in columns:
            value = row.get(column.key)
            kinds = " ".join(["group"] * (column.key in first) + ["best"] * (value == _best(column, rows)))
            cells += f'<td class="{kinds}">{column.show(value)}</td>'
        body += f"<tr{' class=model' * (name == MODEL)}><th scope=row>{html.escape(name)}</th>{cells}</tr>"
    table = (
        f"<div class=scroll><table><thead><tr><th></th>{top}</tr><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    read = (
        "MAP is the mean average precision over the whole ranking: 1 when everything of the query's class comes before "
        "everything else. In the all-modal columns the gallery holds images and texts together, without the query. "
        if any(not c.percent for c in columns)
        else ""
    )
    read += (
        "Recall@K is the share of queries whose own partner is among the first K. "
        "Chance is the exact expectation of a random ranking; the other rows are linear models on the same features, "
        "their settings chosen on the validation split. The best value of a column is coloured."
    )
    return section("Results", read, table)


# ---------------------------------------------------------------------------------------------- figures


def section(title: str, read: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p class=read>{read}</p>{''.join(parts)}</section>"


def svg(figure: Any, alt: str) -> str:
    """The figure as inline SVG in the page's colours, with `alt` for readers that do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None}, dpi=180)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are unique in a figure only: the page holds several.
    prefix = re.sub(r"\W+", "-", alt[:40]).lower()
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = f'<svg {box.group()} role="img" aria-label="{html.escape(alt)}"' + svg[svg.index(">") :]
    return f"<figure>{svg}</figure>"


def grid(count: int, columns: int, height: float, rows: int | None = None, **share: Any) -> tuple[Any, list[Any]]:
    """A figure of the page's width and its axes in reading order; those beyond `count` are hidden."""
    columns = min(columns, max(count, 1))
    rows = rows or math.ceil(count / columns)
    figure = Figure(figsize=(10.2, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes


def _series(lines: list[dict[str, Any]], key: str, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """(samples, values) of `key`, averaged in at most `points` equal groups so that long runs stay readable."""
    kept = [(line["samples"], line[key]) for line in lines if line.get(key) is not None]
    x, y = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    groups = np.array_split(np.arange(len(x)), min(points, len(x)) or 1)
    return np.array([x[g].mean() for g in groups if len(g)]), np.array([y[g].mean() for g in groups if len(g)])


def _tree(lines: list[dict[str, Any]], prefix: str) -> dict[str, list[str]]:
    """``prefix/NAME/REST`` keys of all lines: NAME -> [REST] in order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        for key in line:
            parts = key.split("/", 2)
            if parts[0] == prefix and len(parts) > 1:
                found.setdefault(parts[1], {}).setdefault(parts[2] if len(parts) > 2 else "", None)
    return {name: list(rest) for name, rest in found.items()}


def _samples_axis(axis: Any) -> None:
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("samples seen")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _validation_section(val: list[dict[str, Any]]) -> str:
    keys = {f"map/{name}": title for name, title in DIRECTIONS.items()} | {"map/mean": "mean"}
    name = "MAP"
    if not any(line.get("map/mean") is not None for line in val):
        keys = {f"recall/{d}@{k}": f"{title}, @{k}" for d, title in DIRECTIONS.items() for k in (1, 10)}
        name = "recall"
        for line in val:
            values = [line[key] for key in keys if line.get(key) is not None]
            if values:
                line["recall/mean"] = sum(values) / len(values)
        keys["recall/mean"] = "mean"
    drawn = {key: title for key, title in keys.items() if any(line.get(key) is not None for line in val)}
    if not drawn:
        return ""
    best_key = list(keys)[-1]
    figure, (axis,) = grid(1, 1, 3.3)
    for key, title in drawn.items():
        x, y = _series(val, key, points=len(val))
        mean = key == best_key
        axis.plot(x, y, label=title, marker="o", markersize=3.5 if mean else 2.5, linewidth=2.2 if mean else 1.2)
    best = max((line for line in val if line.get(best_key) is not None), key=lambda line: line[best_key])
    axis.plot(
        best["samples"], best[best_key], marker="*", markersize=16, color=COLOURS[3], linestyle="none", label="best"
    )
    axis.annotate(
        f"{best[best_key]:.3f}", (best["samples"], best[best_key]), (0, 10), textcoords="offset points", ha="center"
    )
    axis.margins(y=0.18)
    axis.set_ylabel(name)
    _samples_axis(axis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    alt = f"Validation {name} over training: best mean {best[best_key]:.3f} after {best['samples']:,} samples."
    read = (
        f"{name[0].upper() + name[1:]} on the validation split while training. The star marks the best mean; a curve "
        "that falls after it says that the rest of the training fitted the training set only. The test split has no "
        "part in it."
    )
    return section("Validation", read, svg(figure, alt))


def _loss_section(train: list[dict[str, Any]]) -> str:
    phases = _tree(train, "loss")
    if not phases:
        return ""
    figure, axes = grid(len(phases), 3, 2.8)
    for axis, (phase, terms) in zip(axes, phases.items(), strict=False):
        for term in terms:
            key = f"loss/{phase}/{term}" if term else f"loss/{phase}"
            axis.plot(*_series(train, key), label=_words(term) or "total")
        axis.set_title(phase)
        _samples_axis(axis)
        axis.legend()
    read = (
        "One panel per phase of the training loop, one line per term of its loss. A discriminator's loss and the "
        "adversarial term of the generator that faces it move against each other: neither should run to zero, or "
        "nothing is left to learn from."
    )
    return section("Losses", read, svg(figure, f"Losses of the phases {', '.join(phases)} over samples seen."))


def _discriminator_section(train: list[dict[str, Any]]) -> str:
    margins = _tree(train, "margin")
    accuracies = {name: groups for name, groups in _tree(train, "accuracy").items() if {"real", "fake"} <= {*groups}}
    if not accuracies:
        return ""
    columns = len(accuracies)
    figure, axes = grid(columns * 2 if margins else columns, columns, 2.5, rows=2 if margins else 1, sharex=True)
    colours = {"real": COLOURS[2], "fake": COLOURS[3], "wrong": COLOURS[5]}
    for column, (name, groups) in enumerate(accuracies.items()):
        axis = axes[column]
        axis.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
        for group in groups:
            axis.plot(*_series(train, f"accuracy/{name}/{group}"), color=colours.get(group), label=_words(group))
        axis.set_title(name)
        axis.set_ylim(-0.03, 1.03)
        if name in margins:
            lower = axes[columns + column]
            lower.axhline(0, color=INK, linewidth=0.8, linestyle=":")
            lower.plot(*_series(train, f"margin/{name}"), color=COLOURS[4])
        _samples_axis(axes[columns + column] if margins else axis)
    axes[0].set_ylabel("accuracy")
    axes[max(range(columns), key=lambda c: len(list(accuracies.values())[c]))].legend(loc="lower left")
    if margins:
        axes[columns].set_ylabel("margin (logits)")
    read = (
        "Above: the share of real, fake and mismatched (wrong) inputs that each discriminator judges rightly. Below: "
        "its mean logit for real minus that for fake. Near 0.5 and 0 it cannot tell them apart; at 1 with a growing "
        "margin it has won, and its gradient says little to the generator."
    )
    alt = f"Accuracy and margin of the discriminators {', '.join(accuracies)} over samples seen."
    return section("Discriminators", read, svg(figure, alt))


def _precision_section(evaluation: dict[str, Any]) -> str:
    _, rows = _headline(evaluation)
    if not any(f"precision/{name}" in row for _, row in rows for name in DIRECTIONS):
        return ""
    figure, axes = grid(2, 2, 3.4, sharey=True)
    recall = np.linspace(0, 1, 101)
    for axis, (direction, title) in zip(axes, DIRECTIONS.items(), strict=True):
        for i, (name, row) in enumerate(rows):
            if f"precision/{direction}" in row:
                width, front = (2.4, 3) if name == MODEL else (1.3, 2)
                y = row[f"precision/{direction}"]
                axis.plot(recall, y, label=name, color=COLOURS[i % len(COLOURS)], linewidth=width, zorder=front)
            elif row.get(f"prevalence/{direction}") is not None:
                axis.axhline(row[f"prevalence/{direction}"], color=INK, linewidth=1, linestyle=":", label=name)
        axis.set_title(title)
        axis.set_xlabel("recall")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("precision")
    axes[1].legend()
    read = (
        "Read from left to right: as more of the relevant items are to be found (recall), how much of what one must "
        "look through is relevant (precision, interpolated, mean over queries). Chance is the share of relevant items "
        "in the gallery."
    )
    alt = "Precision over recall in both directions, against the baselines."
    return section("Precision and recall", read, svg(figure, alt))


def _per_class_section(evaluation: dict[str, Any]) -> str:
    metrics = evaluation.get("metrics") or {}
    if not all(f"map_per_class/{name}" in metrics for name in DIRECTIONS):
        return ""
    values = np.array([metrics[f"map_per_class/{name}"] for name in DIRECTIONS], dtype=np.float64)
    present = np.flatnonzero(~np.isnan(values).any(0))
    if not len(present):
        return ""
    classes = evaluation.get("classes") or [f"class {c}" for c in range(values.shape[1])]
    order = present[np.argsort(-values[:, present].mean(0), kind="stable")]
    cut = len(order) > MOST_CLASSES
    if cut:
        order = np.concatenate([order[: MOST_CLASSES // 2], order[-MOST_CLASSES // 2 :]])
    figure, (axis,) = grid(1, 1, 0.9 + 0.34 * len(order))
    place = np.arange(len(order))
    for i, title in enumerate(DIRECTIONS.values()):
        bars = axis.barh(place + (i - 0.5) * 0.38, values[i, order], height=0.36, label=title)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set_yticks(place, [_short(classes[c], 28) for c in order])
    axis.invert_yaxis()
    axis.set_xlim(0, min(1.0, np.nanmax(values) * 1.12) if np.nanmax(values) > 0 else 1.0)
    axis.grid(False, axis="y")
    axis.set_xlabel("MAP")
    axis.legend(loc="lower right")
    chosen = f" The {MOST_CLASSES // 2} best and worst of {len(present)} classes." if cut else ""
    best, worst = classes[order[0]], classes[order[-1]]
    read = f"MAP of the queries of each class, best first.{chosen} A query of several classes counts in each."
    return section("Classes", read, svg(figure, f"MAP per class, from {best} (best) to {worst} (worst)."))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _matrix_section(shown: Shown | None) -> str:
    """Share of each class among the first ten items, by class of the query."""
    if shown is None or shown.data.labels is None or not 2 <= len(shown.classes) <= MOST_CLASSES:
        return ""
    labels = shown.data.labels.double()
    count = len(shown.classes)
    figure, axes = grid(2, 2, 2.2 + 0.22 * count + 0.4, sharey=True)
    for axis, (direction, title) in zip(axes, DIRECTIONS.items(), strict=True):
        query, gallery, query_owner, gallery_owner = shown.side(direction)
        found = labels[gallery_owner[top_k(query, gallery, 10)]].sum(1)
        of_query = labels[query_owner]
        counts = of_query.T @ found
        share = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
        # Colour by opacity, so that an empty cell has the page's own background.
        axis.imshow(np.dstack([np.broadcast_to(to_rgb(COLOURS[0]), (count, count, 3)), share**0.7]), aspect="auto")
        if count <= 12:
            for a, b in zip(*np.nonzero(share >= 0.005), strict=True):
                axis.text(b, a, f"{100 * share[a, b]:.0f}", ha="center", va="center", fontsize=8)
        names = [_short(c, 18) for c in shown.classes]
        axis.set_xticks(range(count), names, rotation=90, fontsize=8.5)
        axis.set_yticks(range(count), names, fontsize=8.5)
        axis.set_title(title)
        axis.set_xlabel("class found")
        axis.grid(False)
    axes[0].set_ylabel("class of the query")
    read = (
        "Each row: of which classes the first ten answers to its queries are"
        + (", in percent" if count <= 12 else "")
        + ". A full diagonal is perfect; a strong cell beside it names two classes that the common space mixes up."
    )
    alt = "Classes of the first ten items found, by class of the query."
    return section("What is taken for what", read, svg(figure, alt))


def _space_section(shown: Shown | None) -> str:
    if shown is None or len(shown.image) + len(shown.text) < 8:
        return ""
    step = math.ceil((len(shown.image) + len(shown.text)) / TSNE_POINTS)
    text_owner = shown.data.text_owner
    kept = text_owner % step == 0
    owner = (text_owner[kept] // step).numpy()
    points = torch.cat([shown.image[::step], shown.text[kept]]).numpy()
    n = len(points) - len(owner)
    from sklearn.decomposition import PCA  # seconds to import, and only here: a run that is not evaluated has no map
    from sklearn.manifold import TSNE

    flat = PCA(min(50, *points.shape), random_state=0).fit_transform(points)
    flat = TSNE(2, perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(flat)
    image, text = flat[:n], flat[n:]
    figure, (axis,) = grid(1, 1, 6.4)
    handles, marks = [], [INK, INK]
    if shown.data.labels is not None:
        count = len(shown.classes)
        palette = COLOURS if count <= len(COLOURS) else [hls_to_rgb(c / count, 0.52, 0.5) for c in range(count)]
        image_colour = np.array([to_rgb(palette[c]) for c in shown.data.labels[::step].int().argmax(1).tolist()])
        text_colour = image_colour[owner]
        if count <= 2 * len(COLOURS):
            names = [_short(name, 24) for name in shown.classes]
            handles = [
                Line2D([], [], marker="s", linestyle="none", color=colour, label=name)
                for colour, name in zip(palette, names, strict=False)
            ]
    else:
        marks = COLOURS[:2]
        image_colour, text_colour = (np.tile(to_rgb(c), (k, 1)) for c, k in zip(marks, (n, len(text)), strict=True))
        for j in np.linspace(0, len(text) - 1, min(60, len(text))).astype(int):
            axis.plot(*np.stack([image[owner[j]], text[j]]).T, color=COLOURS[3], linewidth=0.8, alpha=0.8)
        handles = [Line2D([], [], color=COLOURS[3], label="a pair")]
    size = float(np.clip(30_000 / len(points), 6, 26))
    for place, colours, marker, name, mark in (
        (image, image_colour, "o", "image", marks[0]),
        (text, text_colour, "^", "text", marks[1]),
    ):
        axis.scatter(*place.T, c=colours, s=size, marker=marker, alpha=0.8, linewidths=0, rasterized=True)
        handles.append(Line2D([], [], marker=marker, linestyle="none", color=mark, label=name))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    sampled = f", one image in {step} with its texts" if step > 1 else ""
    read = f"The images (circles) and texts (triangles) in the common space, laid flat by t-SNE{sampled}. "
    read += (
        "Colours are classes: circles and triangles of one colour should lie mixed in one place. "
        if shown.data.labels is not None
        else "Lines join some images to their texts: the shorter, the better they were matched. "
    )
    read += "Distances between far groups mean little in such a picture."
    alt = "Images and texts of the common space in two dimensions, by t-SNE."
    return section("The common space", read, svg(figure, alt))


# ---------------------------------------------------------------------------------------------- examples


def _example_section(shown: Shown | None) -> str:
    if shown is None:
        return ""
    by_class = shown.data.labels is not None
    right = "share a class with the query" if by_class else "belong to the query"
    read = (
        f"Queries from the best answered to the worst, at fixed places of that order, and the first {SHOWN} found. "
        f"Green (✓) items {right}, red (✗) ones do not; ★ marks the query's own partner."
    )
    parts = []
    for direction, title in DIRECTIONS.items():
        parts.append(f"<h3>{title[0].upper()}{title[1:]}</h3>" + "".join(_example_rows(shown, direction)))
    return section("Examples", read, *parts)


def _example_rows(shown: Shown, direction: str) -> Iterator[str]:
    query, gallery, query_owner, gallery_owner = shown.side(direction)
    labels = shown.data.labels
    if labels is not None:
        score = rank_classes(query, gallery, labels[query_owner], labels[gallery_owner], ks=()).ap
        name = "average precision {:.2f}"
    else:
        score = pair_ranks(query, gallery, query_owner, gallery_owner).astype(np.float64)
        score = np.where(score > 0, -score, np.nan)
        name = "partner at rank {:,.0f}"
    order = np.argsort(-score, kind="stable")[: int((~np.isnan(score)).sum())]
    if not len(order):
        return
    kind = "text" if direction == "image_to_text" else "image"
    places = [round(quantile * (len(order) - 1)) for quantile in QUERY_QUANTILES]
    chosen = order[sorted(set(places))]
    found = top_k(query[chosen], gallery, SHOWN).numpy()
    for q, answers in zip(chosen.tolist(), found.tolist(), strict=True):
        owner = int(query_owner[q])
        tiles = ""
        for j in answers:
            other = int(gallery_owner[j])
            partner = owner == other
            good = bool((labels[owner].bool() & labels[other].bool()).any()) if labels is not None else partner
            mark = ("✓" if good else "✗") + " ★" * partner
            content = _text_tile(shown, j) if direction == "image_to_text" else _image_tile(shown, other)
            tiles += (
                f'<li class="tile {"good" if good else "bad"}" title="{html.escape(shown.names(other))}">{content}'
                f"<span class=mark>{mark}</span></li>"
            )
        asked = _image_tile(shown, owner) if direction == "image_to_text" else _text_tile(shown, q)
        note = " · ".join(filter(None, [html.escape(shown.names(owner)), name.format(abs(score[q]))]))
        yield (
            f'<div class=row><div><div class="tile query">{asked}</div><div class=note>{note}</div></div>'
            f'<ol class="found {kind}">{tiles}</ol></div>'
        )


def _image_tile(shown: Shown, row: int) -> str:
    """The picture of image `row` as a small embedded JPEG; its key and classes where there is none to read."""
    item = shown.items[row]
    alt = html.escape("; ".join(item.texts[:1]) or item.key)
    if item.image is not None:
        try:
            with Image.open(io.BytesIO(item.image)) as picture:
                picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
                rgba = picture.convert("RGBA")
        except (OSError, ValueError):
            return f"<div>{alt}</div>"
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        file = io.BytesIO()
        flat.save(file, "JPEG", quality=82, optimize=True)
        return f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
    return f"<div>image {html.escape(item.key)}<br>{html.escape(shown.names(row))}</div>"


def _text_tile(shown: Shown, row: int) -> str:
    """The words of text `row`; the key and classes of its image where the words are not known."""
    owner = int(shown.data.text_owner[row])
    number = int((shown.data.text_owner[:row] == owner).sum())
    item = shown.items[owner]
    if number < len(item.texts):
        return f"<div>{html.escape(_short(item.texts[number], 160))}</div>"
    return f"<div>text {html.escape(item.key)}<br>{html.escape(shown.names(owner))}</div>"
