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
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.ranks import (
    BLOCK_ELEMENTS,
    LAST,
    RECALL_LEVELS,
    average_precision,
    interpolated_precision,
    relevant_ranks,
)

if TYPE_CHECKING:
    from cmgan_dist.distributed.processes import Parallel

T = TypeVar("T")
GRID = 2.0**26
UNIT = 2.0**-20
"""A float32 vector whose length is as near to 1 as this has unit length already, and was rounded since."""
CHUNK_ELEMENTS = 1 << 23
"""Similarities held at a time when no chunk is given: 64 MiB, and at most about twice that while they are ranked."""

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
                raise BadInput(
                    f"{name} embeddings have shape {tuple(value.shape)}, expected [items, dimensions]: give a row for "
                    "each item"
                )
            if not torch.isfinite(value).all():
                raise BadInput(f"{name} embeddings hold NaN or Inf: use a model that has not diverged")
        n, m = len(self.image), len(self.text)
        if self.text_owner.shape != (m,) or int(self.text_owner.min()) < 0 or int(self.text_owner.max()) >= n:
            raise BadInput(f"text_owner must give one of {n} images for each of {m} texts")
        if self.labels is not None and (self.labels.ndim != 2 or len(self.labels) != n):
            raise BadInput(
                f"labels have shape {tuple(self.labels.shape)}, expected [{n}, classes]: give a row for each image"
            )


@dataclass
class Ranking:
    """A ranking holds what one direction of retrieval gives, query by query, on the CPU."""

    ap: np.ndarray
    """float64 [Q]: average precision over the whole ranking; NaN where the gallery has nothing relevant."""
    ap_at: dict[int, np.ndarray]
    """k -> float64 [Q]: AP@k; NaN where `ap` is."""
    precision: np.ndarray
    """float64 [Q, 101]: interpolated precision at recall 0, 0.01 ... 1; 0 where `ap` is NaN."""

    @staticmethod
    def joined(parts: Sequence[Ranking]) -> Ranking:
        """Return the ranking of all queries whose parts these are."""
        ap_at = {k: np.concatenate([part.ap_at[k] for part in parts]) for k in parts[0].ap_at}
        ap, precision = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ap", "precision"))
        return Ranking(ap, ap_at, precision)

    def curve(self) -> list[float]:
        """Return the 101 points of the precision-recall curve, means over the queries with an AP."""
        total = np.zeros(RECALL_LEVELS)
        for of_query in self.precision:  # one at a time, so that the sum does not depend on their number
            total += of_query
        return [float(value) for value in total / (~np.isnan(self.ap)).sum()]


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

    `chunk` counts queries; None takes about CHUNK_ELEMENTS similarities at a time. Values are scaled by 2**52, and
    there until the next are asked for: all are put into the same memory."""
    query, gallery = (query.double() * GRID).round_(), (gallery.double() * GRID).round_()
    most = chunk or max(1, CHUNK_ELEMENTS // len(gallery))
    chunk = -(-len(query) // max(1, -(-len(query) // most))) or 1  # all of about the same size
    products = query.new_empty(chunk, len(gallery))
    for start in range(0, len(query), chunk):
        rows = slice(start, min(start + chunk, len(query)))
        yield rows, torch.mm(query[rows], gallery.T, out=products[: rows.stop - start])


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
    precision = np.zeros((len(query), RECALL_LEVELS))
    own = None if query_position is None else query_position[:, None]
    labels, classes = query_labels.float(), gallery_labels.float().T.contiguous()
    for rows, similarity in similarities(query, gallery, chunk):
        blocks = _with_relevant(similarity, labels[rows], classes, None if own is None else own[rows])
        for row, ranks in zip(range(rows.start, rows.stop), relevant_ranks(blocks), strict=True):
            if len(ranks):
                at_ranks = np.arange(1, len(ranks) + 1) / ranks
                ap[row], at = average_precision(ranks, at_ranks, ks)
                for k in ks:
                    ap_at[k][row] = at[k]
                precision[row] = interpolated_precision(at_ranks)
    return Ranking(ap, ap_at, precision)


def _with_relevant(
    similarity: Tensor, labels: Tensor, classes: Tensor, own: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of `similarity` [n, G] as `relevant_ranks` takes them, by float labels [n, C] and classes [C, G].

    `own` int64 [n, 1]: what is left out of each row, or None."""
    size = max(1, BLOCK_ELEMENTS // similarity.shape[1]) if similarity.device.type == "cpu" else len(similarity)
    for start in range(0, len(similarity), size):
        rows = slice(start, start + size)
        block, relevant = similarity[rows], labels[rows] @ classes > 0
        if own is not None:
            block.scatter_(1, own[rows], LAST)
            relevant.scatter_(1, own[rows], False)
        yield block, relevant


def pair_ranks(
    query: Tensor, gallery: Tensor, query_owner: Tensor, gallery_owner: Tensor, chunk: int | None = None
) -> np.ndarray:
    """Return int64 [Q]: the rank, from 1, of the first gallery item with the query's owner; 0 where there is none."""
    position = torch.arange(len(gallery), device=query.device)
    ranks = np.zeros(len(query), dtype=np.int64)
    for rows, similarity in similarities(query, gallery, chunk):
        row, item = (query_owner[rows, None] == gallery_owner).nonzero(as_tuple=True)
        value, count = similarity[row, item], len(similarity)
        best = value.new_full((count,), -torch.inf).scatter_reduce(0, row, value, "amax")
        is_best = value == best[row]
        first = item.new_full((count,), len(gallery)).scatter_reduce(0, row[is_best], item[is_best], "amin")
        better = similarity > best[:, None]
        better |= (similarity == best[:, None]) & (position < first[:, None])
        before = better.sum(1, dtype=torch.int32)  # in a twentieth of the time that int64 takes
        ranks[rows] = torch.where(first < len(gallery), before + 1, 0).cpu().numpy()
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


def share(count: int, parallel: Parallel | None) -> slice:
    """Return which of `count` queries this process ranks."""
    rank, world = (parallel.rank, parallel.world) if parallel else (0, 1)
    return slice(count * rank // world, count * (rank + 1) // world)


def gathered(part: T, parallel: Parallel | None) -> list[T]:
    """Return the parts of all processes, in the order of their shares."""
    return parallel.gather_objects(part) if parallel else [part]


def evaluate(
    data: Embeddings,
    score: Score = "inner",
    all_modal: bool = True,
    map_ks: Sequence[int] = (50,),
    recall_ks: Sequence[int] = (1, 5, 10),
    chunk: int | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Any]:
    """Return every metric of one set, as a flat dict that JSON can hold; DIR is a direction such as ``image_to_text``.

    ``recall/DIR@K``, ``median_rank/DIR``: by pairs, always there; images without a text are left out.
    With labels: ``map/DIR``, ``map50/DIR`` and their ``mean`` over both bi-modal directions; with `all_modal` also
    image_to_all and text_to_all, where the gallery is both modalities and holds the query itself, and the same
    ``_without_query``. ``left_out/DIR`` counts queries without a relevant item, which no MAP includes;
    ``map_per_class/DIR`` lists C means (None without queries), ``precision/DIR`` the 101 points of the curve.

    `parallel`: processes that all call this with the same data; each ranks a share of the queries, and every one gets
    the whole, the same bits for any number of them. None: this process ranks all."""
    image, text = common_space(data, score)
    result: dict[str, Any] = {"images": len(image), "texts": len(text)}
    image_owner = torch.arange(len(image), device=image.device)
    for name, query, gallery, owner, gallery_owner in (
        ("image_to_text", image, text, image_owner, data.text_owner),
        ("text_to_image", text, image, data.text_owner, image_owner),
    ):
        mine = share(len(query), parallel)
        ranks = pair_ranks(query[mine], gallery, owner[mine], gallery_owner, chunk)
        ranks = np.concatenate(gathered(ranks, parallel))
        ranks = ranks[ranks > 0]
        result |= {f"recall/{name}@{k}": float((ranks <= k).mean()) for k in recall_ks}
        result[f"median_rank/{name}"] = float(np.median(ranks))
    if data.labels is None:
        return result
    for name, (query, gallery, labels, gallery_labels, own) in directions(data, image, text, all_modal):
        mine = share(len(query), parallel)
        own = None if own is None else own[mine]
        part = rank_classes(query[mine], gallery, labels[mine], gallery_labels, map_ks, own, chunk)
        _add_classes(result, name, labels, Ranking.joined(gathered(part, parallel)))
    add_means(result, map_ks)
    return result


def _add_classes(result: dict[str, Any], name: str, labels: Tensor, ranking: Ranking) -> None:
    """Add what `evaluate` says of the classes in one direction to the metrics; `labels` [Q, C] are the queries'."""
    add_map(result, name, ranking.ap, ranking.ap_at)
    members = labels.bool().cpu().numpy()
    result[f"left_out/{name}"] = int(np.isnan(ranking.ap).sum())
    result[f"map_per_class/{name}"] = [mean(ranking.ap[members[:, c]]) for c in range(members.shape[1])]
    if result[f"map/{name}"] is not None:
        result[f"precision/{name}"] = ranking.curve()


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
