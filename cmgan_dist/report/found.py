"""The sections of a report that show what a common space retrieves: precision, classes, a map, examples."""

from __future__ import annotations

import base64
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from PIL import Image

from cmgan_dist.data.image import UNREADABLE, open_image
from cmgan_dist.errors import BadInput
from cmgan_dist.report.page import COLOURS, INK, Section, grid, render, svg
from cmgan_dist.retrieval.gallery import GalleryItem
from cmgan_dist.retrieval.headline import DIRECTIONS, MODEL, headline
from cmgan_dist.retrieval.metrics import Embeddings, common_space, pair_ranks, rank_classes, top_k

SHOWN = 8
"""Items shown per query."""
QUERY_QUANTILES = (0.0, 0.15, 0.35, 0.55, 0.8, 1.0)
"""Which queries are shown: places in the order from best answered to worst."""
TSNE_POINTS = 3000
"""Images and texts together that are drawn in the common space; of a larger set, every n-th image with its texts."""
MOST_CLASSES = 40
"""Classes that a figure shows at most."""
THUMBNAIL = 112
"""Longest side of a shown picture in CSS pixels; it is embedded at twice that."""


class Direction(NamedTuple):
    """Queries and gallery of one direction of retrieval, with the row of the image that each belongs to."""

    query: torch.Tensor
    """float64 [Q, D], no longer than 1."""
    gallery: torch.Tensor
    """float64 [G, D], no longer than 1."""
    query_owner: torch.Tensor
    """int64 [Q]."""
    gallery_owner: torch.Tensor
    """int64 [G]."""


@dataclass
class Retrieved:
    """The evaluated split of a run in its common space, and what is shown of each of its items."""

    data: Embeddings
    image: torch.Tensor
    """float64 [N, D], no longer than 1."""
    text: torch.Tensor
    """float64 [M, D], no longer than 1."""
    items: list[GalleryItem]
    """One for each image."""
    classes: list[str]

    def direction(self, name: str) -> Direction:
        """Return the queries and the gallery of "image_to_text" or "text_to_image"."""
        own = torch.arange(len(self.image))
        if name == "image_to_text":
            return Direction(self.image, self.text, own, self.data.text_owner)
        return Direction(self.text, self.image, self.data.text_owner, own)

    def class_names(self, row: int) -> str:
        """Return the classes of image `row`, joined by commas; "" where the pairs have none."""
        if self.data.labels is None:
            return ""
        return ", ".join(self.classes[c] for c in self.data.labels[row].nonzero()[:, 0].tolist())


def load_retrieved(path: Path, evaluation: dict[str, Any], items: Sequence[GalleryItem] | None) -> Retrieved | None:
    """Read embeddings.npz, or return None where there is none; without `items` the keys in it stand for the images.

    Raises BadInput when the file cannot be read or holds another number of images than `items`."""
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
        raise BadInput(
            f"{path} holds {n} images, but {len(items)} items were given to show: give one for each, or none"
        )
    classes = list(evaluation.get("classes") or [])
    if data.labels is not None and len(classes) != data.labels.shape[1]:
        classes = [f"class {c}" for c in range(data.labels.shape[1])]
    return Retrieved(data, *common_space(data), list(items), classes)


def precision_section(evaluation: dict[str, Any]) -> Section | None:
    """Return precision over recall of the run and the baselines, or None when it was not measured."""
    _, rows = headline(evaluation)
    if not any(f"precision/{name}" in row for _, row in rows for name in DIRECTIONS):
        return None
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
    return Section("Precision and recall", read, [svg(figure, alt)])


def frontier_section(evaluation: dict[str, Any]) -> Section | None:
    """Return MAP over Recall@10 between the ends of model and baselines, or None when it was not measured."""
    curves = evaluation.get("frontiers") or {}
    if not curves:
        return None
    figure, (axis,) = grid(1, 1, 3.6)
    for i, (name, points) in enumerate(curves.items()):
        style = {"linewidth": 2.4, "zorder": 3} if name == MODEL else {"linewidth": 1.3, "zorder": 2}
        recall, found = [100 * point[1] for point in points], [point[0] for point in points]
        axis.plot(recall, found, marker="o", markersize=4, label=name, color=COLOURS[i % len(COLOURS)], **style)
    axis.set_xlabel("Recall@10, mean of both directions, %")
    axis.set_ylabel("MAP, mean of both directions")
    axis.legend()
    read = (
        "Items of the same class first (MAP) and a query's own partner first (recall) pull against each other. A curve "
        "goes from the end that finds classes, at the top left, to the one that finds partners; further out is better."
    )
    return Section("Between both ends", read, [svg(figure, "MAP over Recall@10 of the model and of the baselines.")])


def per_class_section(evaluation: dict[str, Any]) -> Section | None:
    """Return MAP of each class in both directions, or None when it was not measured."""
    metrics = evaluation.get("metrics") or {}
    if not all(f"map_per_class/{name}" in metrics for name in DIRECTIONS):
        return None
    values = np.array([metrics[f"map_per_class/{name}"] for name in DIRECTIONS], dtype=np.float64)
    present = np.flatnonzero(~np.isnan(values).any(0))
    if not len(present):
        return None
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
    alt = f"MAP per class, from {best} (best) to {worst} (worst)."
    return Section("Classes", read, [svg(figure, alt)])


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def matrix_section(retrieved: Retrieved | None) -> Section | None:
    """Return the share of each class among the first ten items by class of the query; None without classes."""
    if retrieved is None or retrieved.data.labels is None or not 2 <= len(retrieved.classes) <= MOST_CLASSES:
        return None
    labels = retrieved.data.labels.double()
    count = len(retrieved.classes)
    figure, axes = grid(2, 2, 2.2 + 0.22 * count + 0.4, sharey=True)
    for axis, (name, title) in zip(axes, DIRECTIONS.items(), strict=True):
        query, gallery, query_owner, gallery_owner = retrieved.direction(name)
        found = labels[gallery_owner[top_k(query, gallery, 10)]].sum(1)
        of_query = labels[query_owner]
        counts = of_query.T @ found
        share = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
        # Colour by opacity, so that an empty cell has the page's own background.
        axis.imshow(np.dstack([np.broadcast_to(to_rgb(COLOURS[0]), (count, count, 3)), share**0.7]), aspect="auto")
        if count <= 12:
            for a, b in zip(*np.nonzero(share >= 0.005), strict=True):
                axis.text(b, a, f"{100 * share[a, b]:.0f}", ha="center", va="center", fontsize=8)
        names = [_short(c, 18) for c in retrieved.classes]
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
    return Section("What is taken for what", read, [svg(figure, alt)])


def space_section(retrieved: Retrieved | None) -> Section | None:
    """Return the common space laid flat by t-SNE, or None when there are too few items for that."""
    if retrieved is None or len(retrieved.image) + len(retrieved.text) < 8:
        return None
    step = math.ceil((len(retrieved.image) + len(retrieved.text)) / TSNE_POINTS)
    kept = retrieved.data.text_owner % step == 0
    owner = (retrieved.data.text_owner[kept] // step).numpy()
    flat = _lay_flat(torch.cat([retrieved.image[::step], retrieved.text[kept]]).numpy())
    n = len(flat) - len(owner)
    image, text = flat[:n], flat[n:]
    figure, (axis,) = grid(1, 1, 6.4)
    labels = retrieved.data.labels
    if labels is not None:
        marks = [INK, INK]
        image_colour, handles = _class_colours(labels[::step], retrieved.classes)
        text_colour = image_colour[owner]
    else:
        marks = COLOURS[:2]
        image_colour, text_colour = (np.tile(to_rgb(c), (k, 1)) for c, k in zip(marks, (n, len(text)), strict=True))
        for j in np.linspace(0, len(text) - 1, min(60, len(text))).astype(int):
            axis.plot(*np.stack([image[owner[j]], text[j]]).T, color=COLOURS[3], linewidth=0.8, alpha=0.8)
        handles = [Line2D([], [], color=COLOURS[3], label="a pair")]
    size = float(np.clip(30_000 / len(flat), 6, 26))
    for points, colours, marker, name, mark in (
        (image, image_colour, "o", "image", marks[0]),
        (text, text_colour, "^", "text", marks[1]),
    ):
        axis.scatter(*points.T, c=colours, s=size, marker=marker, alpha=0.8, linewidths=0, rasterized=True)
        handles.append(Line2D([], [], marker=marker, linestyle="none", color=mark, label=name))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    sampled = f", one image in {step} with its texts" if step > 1 else ""
    read = f"The images (circles) and texts (triangles) in the common space, laid flat by t-SNE{sampled}. "
    read += (
        "Colours are classes: circles and triangles of one colour should lie mixed in one place. "
        if labels is not None
        else "Lines join some images to their texts: the shorter, the better they were matched. "
    )
    read += "Distances between far groups mean little in such a picture."
    alt = "Images and texts of the common space in two dimensions, by t-SNE."
    return Section("The common space", read, [svg(figure, alt)])


def _lay_flat(points: np.ndarray) -> np.ndarray:
    """Return points [N, E] in two dimensions, [N, 2], by PCA and t-SNE (van der Maaten and Hinton, 2008)."""
    from sklearn.decomposition import PCA  # seconds to import, and only here: a run that is not evaluated has no map
    from sklearn.manifold import TSNE

    reduced = PCA(min(50, *points.shape), random_state=0).fit_transform(points)
    tsne = TSNE(2, perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=0)
    flat: np.ndarray = tsne.fit_transform(reduced)
    return flat


def _class_colours(labels: torch.Tensor, classes: list[str]) -> tuple[np.ndarray, list[Line2D]]:
    """Return the colour of each row's first class, [N, 3], and the legend's handles, none where classes are many."""
    count = len(classes)
    palette = COLOURS if count <= len(COLOURS) else [hls_to_rgb(c / count, 0.52, 0.5) for c in range(count)]
    colours = np.array([to_rgb(palette[c]) for c in labels.int().argmax(1).tolist()])
    if count > 2 * len(COLOURS):
        return colours, []
    names = [_short(name, 24) for name in classes]
    return colours, [
        Line2D([], [], marker="s", linestyle="none", color=colour, label=name)
        for colour, name in zip(palette, names, strict=False)
    ]


@dataclass(frozen=True)
class Tile:
    """What is shown of one item: its lines of text, or the picture that they describe."""

    lines: list[str]
    jpeg: str = ""
    """The picture as JPEG in base 64."""


@dataclass(frozen=True)
class Answer:
    """One item found for a query: whether it is relevant, the mark that says so, and its classes."""

    tile: Tile
    good: bool
    mark: str
    classes: str


@dataclass(frozen=True)
class Example:
    """A query, a note on it and how well it was answered, and the first items found."""

    query: Tile
    note: str
    answers: list[Answer]


def example_section(retrieved: Retrieved | None) -> Section | None:
    """Return queries of both directions with what they find, or None when there are no embeddings."""
    if retrieved is None:
        return None
    right = "share a class with the query" if retrieved.data.labels is not None else "belong to the query"
    read = (
        f"Queries from the best answered to the worst, at fixed places of that order, and the first {SHOWN} found. "
        f"Green (✓) items {right}, red (✗) ones do not; ★ marks the query's own partner."
    )
    parts = []
    for name, title in DIRECTIONS.items():
        examples = list(_examples(retrieved, name))
        kind = "text" if name == "image_to_text" else "image"
        parts.append(render("examples.html", title=title[0].upper() + title[1:], kind=kind, examples=examples))
    return Section("Examples", read, parts)


def _examples(retrieved: Retrieved, name: str) -> Iterator[Example]:
    """Yield queries of the direction `name` at fixed places of the order from best answered to worst."""
    query, gallery, query_owner, gallery_owner = retrieved.direction(name)
    score, text = _query_scores(retrieved, name)
    order = np.argsort(-score, kind="stable")[: int((~np.isnan(score)).sum())]
    if not len(order):
        return
    places = sorted({round(quantile * (len(order) - 1)) for quantile in QUERY_QUANTILES})
    chosen = order[places]
    found = top_k(query[chosen], gallery, SHOWN).numpy()
    for q, rows in zip(chosen.tolist(), found.tolist(), strict=True):
        owner = int(query_owner[q])
        if name == "image_to_text":
            asked, tiles = _image_tile(retrieved, owner), [_text_tile(retrieved, j) for j in rows]
        else:
            asked, tiles = _text_tile(retrieved, q), [_image_tile(retrieved, j) for j in rows]
        owners = gallery_owner[rows].tolist()
        answers = [_answer(retrieved, tile, owner, other) for tile, other in zip(tiles, owners, strict=True)]
        note = " · ".join(filter(None, [retrieved.class_names(owner), text.format(abs(score[q]))]))
        yield Example(asked, note, answers)


def _query_scores(retrieved: Retrieved, name: str) -> tuple[np.ndarray, str]:
    """Return the score of each query, higher is better and nan where nothing is relevant, and a format for it."""
    query, gallery, query_owner, gallery_owner = retrieved.direction(name)
    labels = retrieved.data.labels
    if labels is not None:
        ranking = rank_classes(query, gallery, labels[query_owner], labels[gallery_owner], ks=())
        return ranking.ap, "average precision {:.2f}"
    rank = pair_ranks(query, gallery, query_owner, gallery_owner).astype(np.float64)
    return np.where(rank > 0, -rank, np.nan), "partner at rank {:,.0f}"


def _answer(retrieved: Retrieved, tile: Tile, owner: int, other: int) -> Answer:
    """Return what is shown of an item of image `other` that was found for a query of image `owner`."""
    labels, partner = retrieved.data.labels, owner == other
    good = bool((labels[owner].bool() & labels[other].bool()).any()) if labels is not None else partner
    return Answer(tile, good, ("✓" if good else "✗") + " ★" * partner, retrieved.class_names(other))


def _image_tile(retrieved: Retrieved, row: int) -> Tile:
    """Return the picture of image `row` as a small JPEG; its key and classes where there is none to read."""
    item = retrieved.items[row]
    if item.image is None:
        return Tile([f"image {item.key}", retrieved.class_names(row)])
    words = "; ".join(item.texts[:1]) or item.key
    try:
        with open_image(item.image) as picture:
            picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
            rgba = picture.convert("RGBA")
    except (*UNREADABLE, Image.DecompressionBombError):
        return Tile([words])
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=82, optimize=True)
    return Tile([words], base64.b64encode(file.getvalue()).decode())


def _text_tile(retrieved: Retrieved, row: int) -> Tile:
    """Return the words of text `row`; the key and classes of its image where the words are not known."""
    owner = int(retrieved.data.text_owner[row])
    number = int((retrieved.data.text_owner[:row] == owner).sum())
    item = retrieved.items[owner]
    if number < len(item.texts):
        return Tile([_short(item.texts[number], 160)])
    return Tile([f"text {item.key}", retrieved.class_names(owner)])
