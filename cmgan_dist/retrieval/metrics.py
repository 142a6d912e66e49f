"""Retrieval metrics: MAP, MAP@k, recall of pairs and precision-recall curves.

Shapes: N images, M texts, E dimensions of the common space, C classes, Q queries, G gallery items.

Rankings do not depend on the chunk size, and equal vectors tie: vectors no longer than 1 are rounded to multiples of
2**-26, so that each product is a multiple of 2**-52 and each sum of them fits the 53 bits of a float64. The dot product
is then exact, in whatever order a BLAS or a GPU adds. Ties rank by position in the gallery.

Nothing of size N x N is allocated: similarities exist for one chunk of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.errors import BadInput

GRID = 2.0**26
UNIT = 2.0**-20
"""A float32 vector whose length is as near to 1 as this has unit length already, and was rounded since."""
CHUNK_ELEMENTS = 1 << 21
"""Similarities held at a time when no chunk is given: 16 MiB, and about four times that while they are ranked."""
LAST = -(2.0**53)
"""Similarity of what is left out of a gallery: less than any."""
COARSE = 2.0**23
"""What similarities are divided by to fit 31 bits."""
MOST_MIXED = 64
"""Groups of equal upper bits in a row that are put in order one by one."""
RECALL_LEVELS = 101

Score = Literal["inner", "cosine", "zscore"]
"""How two vectors are compared (`common_space`)."""


@dataclass
class Embeddings:
    """Embeddings of the images and texts of one set; `text_owner` says which belong together.

    Before a projection into a common space, image and text may differ in their dimensions. Raises BadInput when shapes
    disagree or a value is not finite."""

    image: Tensor
    """float [N, E]."""
    text: Tensor
    """float [M, E]; several captions per image make M > N."""
    text_owner: Tensor
    """int64 [M]: row of the image to which each text belongs."""
    labels: Tensor | None = None
    """bool or uint8 [N, C], multi-hot; a text has its image's labels. None for pairs without classes."""

    def __post_init__(self) -> None:
        for name, value in (("image", self.image), ("text", self.text)):
            if value.ndim != 2 or not len(value):
                raise BadInput(f"{name} embeddings have shape {tuple(value.shape)}, expected [items, dimensions]")
            if not torch.isfinite(value).all():
                raise BadInput(f"{name} embeddings hold NaN or Inf: the model that made them has diverged")
        n, m = len(self.image), len(self.text)
        if self.text_owner.shape != (m,) or int(self.text_owner.min()) < 0 or int(self.text_owner.max()) >= n:
            raise BadInput(f"text_owner must give one of {n} images for each of {m} texts")
        if self.labels is not None and (self.labels.ndim != 2 or len(self.labels) != n):
            raise BadInput(f"labels have shape {tuple(self.labels.shape)}, expected [{n}, classes]")


@dataclass
class Ranking:
    """A ranking holds what one direction of retrieval gives, query by query, on the CPU."""

    ap: np.ndarray
    """float64 [Q]: average precision over the whole ranking; NaN where the gallery has nothing relevant."""
    ap_at: dict[int, np.ndarray]
    """k -> float64 [Q]: AP@k; NaN where `ap` is."""
    precision: np.ndarray
    """float64 [101]: interpolated precision at recall 0, 0.01 ... 1, mean over the queries with an AP."""


def zscore(x: Tensor) -> Tensor:
    """Return x [n, E], float64, each dimension with mean 0 and deviation 1 over the set; a constant one becomes 0."""
    x = x.double()
    varies = x.amax(0) > x.amin(0)
    deviation = torch.where(varies, x.std(0, correction=0), 1.0)
    return torch.where(varies, (x - x.mean(0)) / deviation, 0.0)


def l2_normalise(x: Tensor) -> Tensor:
    """Return the rows of x [n, E] at unit length, float64; a row of zeros stays so."""
    x = x.double()
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def unit_vectors(x: Tensor) -> Tensor:
    """Return the rows of x [n, E] at unit length, float32; a row of zeros stays so.

    Rows that have unit length already keep their bits."""
    is_unit = (x.double().norm(dim=1, keepdim=True) - 1).abs() <= UNIT
    return torch.where(is_unit, x.float(), l2_normalise(x).float())


def common_space(data: Embeddings, score: Score = "inner") -> tuple[Tensor, Tensor]:
    """Return image [N, E] and text [M, E], float64, such that the inner product is their score.

    inner: as they are, no longer than 1. cosine: at unit length, rounded to float32. zscore: z-scored per modality over
    the set before, as the CM-GANs authors do. Raises BadInput when their dimensions differ, or one is too long."""
    if data.image.shape[1] != data.text.shape[1]:
        raise BadInput(f"image has {data.image.shape[1]} dimensions, text {data.text.shape[1]}: project them first")
    if score == "zscore":
        return l2_normalise(zscore(data.image)), l2_normalise(zscore(data.text))
    if score == "cosine":
        return unit_vectors(data.image).double(), unit_vectors(data.text).double()
    longest = max(float(x.double().norm(dim=1).max()) for x in (data.image, data.text))
    if longest > 1 + UNIT:
        raise BadInput(f"a vector has length {longest:.4g}, more than 1: score by cosine, or give vectors of a model")
    return data.image.double(), data.text.double()


def similarities(query: Tensor, gallery: Tensor, chunk: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield exact dot products of vectors no longer than 1, [Q, E] by [G, E], as (rows, float64 [rows, G]).

    `chunk` counts queries; None takes about CHUNK_ELEMENTS similarities at a time. Values are scaled by 2**52."""
    query, gallery = (query.double() * GRID).round(), (gallery.double() * GRID).round()
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(gallery))
    for start in range(0, len(query), chunk):
        rows = slice(start, min(start + chunk, len(query)))
        yield rows, query[rows] @ gallery.T


def top_k(query: Tensor, gallery: Tensor, k: int, chunk: int | None = None) -> Tensor:
    """Return int64 [Q, min(k, G)]: the gallery positions of each query, most similar first."""
    order = torch.empty(len(query), min(k, len(gallery)), dtype=torch.int64, device=query.device)
    for rows, similarity in similarities(query, gallery, chunk):
        order[rows] = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return order


def rank_classes(
    query: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    ks: Sequence[int] = (50,),
    query_position: Tensor | None = None,
    chunk: int | None = None,
) -> Ranking:
    """Rank the gallery [G, E] for each query [Q, E]; relevant is what shares a class (labels [Q, C], [G, C]).

    AP = sum(precision at each relevant rank) / relevant items in the gallery. AP@k divides by the relevant items *among
    the first k*, as DSCMR's published evaluation does (`fx_calc_map_label`), and is 0 when there are none.
    `query_position` int64 [Q] leaves each query itself out of the gallery."""
    ap, ap_at = np.full(len(query), np.nan), {k: np.full(len(query), np.nan) for k in ks}
    precision = np.zeros(RECALL_LEVELS)
    gallery_classes = gallery_labels.float().T
    for rows, similarity in similarities(query, gallery, chunk):
        shared = query_labels[rows].float() @ gallery_classes > 0
        if query_position is not None:
            own = query_position[rows, None]
            similarity.scatter_(1, own, LAST)
            shared.scatter_(1, own, False)
        for row, ranks in zip(range(rows.start, rows.stop), relevant_ranks(similarity, shared), strict=True):
            if len(ranks):
                ap[row], at = average_precision(ranks, ks)
                for k in ks:
                    ap_at[k][row] = at[k]
                precision += interpolated_precision(ranks)
    answered = (~np.isnan(ap)).sum()
    with np.errstate(invalid="ignore"):
        return Ranking(ap, ap_at, precision / answered)


def relevant_ranks(similarity: Tensor, relevant: Tensor) -> Iterator[np.ndarray]:
    """Yield int64 [R], ascending from 1, for each row: the ranks of its R relevant items among all G, by similarity.

    `similarity` float64 [n, G], whole numbers as `similarities` gives them, or LAST; `relevant` bool [n, G]. Ties rank
    by position. What is sorted is 32 bits an item, the similarity's upper ones and whether it is relevant, three times
    as fast as positions by all 53; where an item that is relevant and one that is not agree in all upper bits, these
    few are put in order by all of them, and the whole row where such are many."""
    upper = ~(similarity / COARSE).int()  # ascending: the most similar first
    keys = (upper << 1) | ~relevant
    in_order = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(1).values
    mixed, hits = (in_order[:, 1:] ^ in_order[:, :-1]) == 1, (in_order & 1) == 0
    groups = mixed.nonzero()
    many = torch.bincount(groups[:, 0], minlength=len(keys)) > MOST_MIXED
    for row in many.nonzero()[:, 0]:
        hits[row] = relevant[row, similarity[row].argsort(descending=True, stable=True)]
    for row, place in groups[~many[groups[:, 0]]]:
        _settle(hits[row], in_order[row], upper[row], similarity[row], relevant[row], in_order[row, place] >> 1)
    found = hits.nonzero().cpu().numpy()
    yield from np.split(found[:, 1] + 1, np.searchsorted(found[:, 0], np.arange(1, len(hits))))


def _settle(hits: Tensor, in_order: Tensor, upper: Tensor, similarity: Tensor, relevant: Tensor, bits: Tensor) -> None:
    """Put the items whose upper bits are `bits`, a scalar, in order by all bits; the others are [G], of one row."""
    items = (upper == bits).nonzero()[:, 0]
    items = items[similarity[items].argsort(descending=True, stable=True)]
    first = int(torch.searchsorted(in_order, bits << 1))
    hits[first : first + len(items)] = relevant[items]


def average_precision(ranks: np.ndarray, ks: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Return AP and k -> AP@k of one query from the ranks of its relevant items, ascending (`rank_classes`)."""
    gained = np.cumsum(np.arange(1, len(ranks) + 1) / ranks)  # a running sum, whose order does not depend on the length
    among = {k: int(np.searchsorted(ranks, k, side="right")) for k in ks}
    return gained[-1] / len(ranks), {k: gained[n - 1] / n if n else 0.0 for k, n in among.items()}


def interpolated_precision(ranks: np.ndarray) -> np.ndarray:
    """Return float64 [101]: the largest precision from each recall 0, 0.01 ... 1 on, of one query as above."""
    best_from = np.maximum.accumulate((np.arange(1, len(ranks) + 1) / ranks)[::-1])[::-1]
    needed = (np.arange(RECALL_LEVELS) * len(ranks) + RECALL_LEVELS - 2) // (RECALL_LEVELS - 1)
    return best_from[np.maximum(needed, 1) - 1]


def pair_ranks(
    query: Tensor, gallery: Tensor, query_owner: Tensor, gallery_owner: Tensor, chunk: int | None = None
) -> np.ndarray:
    """Return int64 [Q]: the rank, from 1, of the first gallery item with the query's owner; 0 where there is none."""
    position = torch.arange(len(gallery), device=query.device)
    ranks = np.zeros(len(query), dtype=np.int64)
    for rows, similarity in similarities(query, gallery, chunk):
        own = query_owner[rows, None] == gallery_owner
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        first = torch.where(own & (similarity == best), position, len(gallery)).amin(1, keepdim=True)
        before = (similarity > best) | ((similarity == best) & (position < first))
        ranks[rows] = torch.where(own.any(1), before.sum(1) + 1, 0).cpu().numpy()
    return ranks


def pair_recall(data: Embeddings, k: int = 10) -> float:
    """Return Recall@k of pairs by the cosine, mean of both directions (`evaluate`)."""
    metrics = evaluate(Embeddings(data.image, data.text, data.text_owner), "cosine", recall_ks=(k,))
    return recall_of(metrics, k)


def recall_of(metrics: Mapping[str, Any], k: int = 10) -> float:
    """Return Recall@k among what `evaluate` returned, mean of both directions."""
    return float(metrics[f"recall/image_to_text@{k}"] + metrics[f"recall/text_to_image@{k}"]) / 2


def directions(data: Embeddings, image: Tensor, text: Tensor, all_modal: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Return name -> (query, gallery, query labels, gallery labels, query's own position in the gallery or None)."""
    assert data.labels is not None
    image_labels, text_labels = data.labels, data.labels[data.text_owner]
    yield "image_to_text", (image, text, image_labels, text_labels, None)
    yield "text_to_image", (text, image, text_labels, image_labels, None)
    if all_modal:
        both, both_labels = torch.cat([image, text]), torch.cat([image_labels, text_labels])
        own = torch.arange(len(both), device=image.device)
        for suffix in ("", "_without_query"):
            of_image, of_text = (own[: len(image)], own[len(image) :]) if suffix else (None, None)
            yield f"image_to_all{suffix}", (image, both, image_labels, both_labels, of_image)
            yield f"text_to_all{suffix}", (text, both, text_labels, both_labels, of_text)


def mean(values: np.ndarray) -> float | None:
    """Return the mean over what is not NaN, or None when nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def add_map(result: dict[str, Any], name: str, ap: np.ndarray, ap_at: dict[int, np.ndarray]) -> None:
    """Add the keys ``map/NAME`` and ``mapK/NAME`` to the metrics."""
    result[f"map/{name}"] = mean(ap)
    result |= {f"map{k}/{name}": mean(values) for k, values in ap_at.items()}


def add_means(result: dict[str, Any], ks: Sequence[int]) -> None:
    """Add the keys ``map/mean`` and ``mapK/mean``, means over both bi-modal directions, to the metrics."""
    for key in ("map", *(f"map{k}" for k in ks)):
        pair = [result[f"{key}/{name}"] for name in ("image_to_text", "text_to_image")]
        result[f"{key}/mean"] = None if None in pair else sum(pair) / 2


def evaluate(
    data: Embeddings,
    score: Score = "inner",
    all_modal: bool = True,
    map_ks: Sequence[int] = (50,),
    recall_ks: Sequence[int] = (1, 5, 10),
    chunk: int | None = None,
) -> dict[str, Any]:
    """Return every metric of one set, as a flat dict that JSON can hold; DIR is a direction such as ``image_to_text``.

    ``recall/DIR@K``, ``median_rank/DIR``: by pairs, always there; images without a text are left out.
    With labels: ``map/DIR``, ``map50/DIR`` and their ``mean`` over both bi-modal directions; with `all_modal` also
    image_to_all and text_to_all, where the gallery is both modalities and holds the query itself, and the same
    ``_without_query``. ``left_out/DIR`` counts queries without a relevant item, which no MAP includes;
    ``map_per_class/DIR`` lists C means (None without queries), ``precision/DIR`` the 101 points of the curve."""
    image, text = common_space(data, score)
    result: dict[str, Any] = {"images": len(image), "texts": len(text)}
    image_owner = torch.arange(len(image), device=image.device)
    for name, ranks in (
        ("image_to_text", pair_ranks(image, text, image_owner, data.text_owner, chunk)),
        ("text_to_image", pair_ranks(text, image, data.text_owner, image_owner, chunk)),
    ):
        ranks = ranks[ranks > 0]
        result |= {f"recall/{name}@{k}": float((ranks <= k).mean()) for k in recall_ks}
        result[f"median_rank/{name}"] = float(np.median(ranks))
    if data.labels is None:
        return result
    for name, (query, gallery, labels, gallery_labels, own) in directions(data, image, text, all_modal):
        ranking = rank_classes(query, gallery, labels, gallery_labels, map_ks, own, chunk)
        add_map(result, name, ranking.ap, ranking.ap_at)
        members = labels.bool().cpu().numpy()
        result[f"left_out/{name}"] = int(np.isnan(ranking.ap).sum())
        result[f"map_per_class/{name}"] = [mean(ranking.ap[members[:, c]]) for c in range(members.shape[1])]
        if result[f"map/{name}"] is not None:
            result[f"precision/{name}"] = ranking.precision.tolist()
    add_means(result, map_ks)
    return result


def direction_scores(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return one score for "image_to_text" and "text_to_image" each: MAP, or without labels the mean of R@1, 5 and 10.

    Raises BadInput when no image and text of the set share a class, so that there is no MAP."""
    scores = {}
    for name in ("image_to_text", "text_to_image"):
        keys = [k for k in metrics if k == f"map/{name}"] or [k for k in metrics if k.startswith(f"recall/{name}@")]
        values = [cast("float | None", metrics[k]) for k in keys]
        if None in values:
            raise BadInput("MAP cannot be measured, no image and text share a class: use a split with labelled samples")
        scores[name] = sum(cast(list[float], values)) / len(values)
    return scores


def score_of(metrics: Mapping[str, object]) -> float:
    """Return what validation maximises: the mean of both directions' scores (`direction_scores`)."""
    scores = direction_scores(metrics)
    return sum(scores.values()) / len(scores)
