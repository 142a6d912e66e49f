"""What a common space retrieves: precision, classes, pictures."""

from __future__ import annotations

import base64
import html
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from PIL import Image

from cmgan_dist.errors import BadInput
from cmgan_dist.report.page import COLOURS, INK, grid, section, svg
from cmgan_dist.report.table import DIRECTIONS, MODEL, _headline
from cmgan_dist.retrieval.gallery import GalleryItem
from cmgan_dist.retrieval.metrics import Embeddings, common_space, pair_ranks, rank_classes, top_k

SHOWN = 8
"""Items shown per query."""
QUERY_QUANTILES = (0.0, 0.15, 0.35, 0.55, 0.8, 1.0)
"""Which queries are shown: places in the order from best answered to worst."""
TSNE_POINTS = 3000
"""Images and texts together that are drawn in the common space; of a larger set, every n-th image with its texts."""
MOST_CLASSES = 40
THUMBNAIL = 112


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
