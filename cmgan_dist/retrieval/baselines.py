"""What a model must beat: chance, CCA and ridge regression, on the same features.

Every choice (dimensions, regularisation) is made on the validation split; the test split is read once.
Shapes: N images of F_i features, M texts of F_t, C classes. A set of features is an `Embeddings` whose
two modalities may differ in their dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.metrics import (
    CHUNK_ELEMENTS,
    Embeddings,
    add_map,
    add_means,
    directions,
    evaluate,
    mean,
    score_of,
)

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried on validation; in units of the mean feature variance."""
DIMS = (5, 7, 10, 20, 50, 100, 200, 400)
"""Canonical dimensions tried on validation, as far as the features have them."""


@dataclass
class Projection:
    """A projection is two linear maps into one space, with the settings that made them."""

    image: Callable[[np.ndarray], np.ndarray]
    """[n, F_i] -> float64 [n, E]."""
    text: Callable[[np.ndarray], np.ndarray]
    """[n, F_t] -> float64 [n, E]."""
    settings: dict[str, float]

    def first(self, dims: int) -> Projection:
        """Return this projection with its first `dims` dimensions only."""
        return Projection(
            lambda x: self.image(x)[:, :dims], lambda x: self.text(x)[:, :dims], {**self.settings, "dims": dims}
        )

    def __call__(self, data: Embeddings) -> Embeddings:
        image, text = self.image(_numpy(data.image)), self.text(_numpy(data.text))
        return Embeddings(torch.from_numpy(image), torch.from_numpy(text), data.text_owner.cpu(), _labels(data))


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _labels(data: Embeddings) -> torch.Tensor | None:
    return None if data.labels is None else data.labels.cpu()


def cca(image: np.ndarray, text: np.ndarray, dims: int, ridge: float = 0.0) -> Projection:
    """Fit regularised linear CCA of paired rows, image [n, F_i] and text [n, F_t] (Hotelling 1936; ridge: Vinod 1976).

    `ridge` times the mean variance is added to the diagonal of each covariance; `dims` is cut to min(F_i, F_t).
    A direction that the pairs do not span gets weight 0, so that no inverse is taken of nothing."""
    centre_i, centre_t = image.mean(0), text.mean(0)
    x, y = image - centre_i, text - centre_t
    whiten_x, whiten_y = _whitener(x, ridge), _whitener(y, ridge)
    u, _, vt = np.linalg.svd(whiten_x.T @ (x.T @ y / len(x)) @ whiten_y, full_matrices=False)
    dims = min(dims, len(vt))
    weight_i, weight_t = whiten_x @ u[:, :dims], whiten_y @ vt[:dims].T
    return Projection(
        lambda x: (np.asarray(x, np.float64) - centre_i) @ weight_i,
        lambda x: (np.asarray(x, np.float64) - centre_t) @ weight_t,
        {"dims": dims, "ridge": ridge},
    )


def _whitener(x: np.ndarray, ridge: float) -> np.ndarray:
    """[F, r] with W^T (cov(x) + ridge * mean variance * I) W = I, for centred x [n, F] of rank r (F with a ridge)."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    values = values.clip(min=0.0) + ridge * values.mean()
    kept = values > values.max() * 1e-10
    return np.asarray(vectors[:, kept] / np.sqrt(values[kept]))


def _ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares of y [n, K] on x [n, F] with an intercept; `ridge` times the mean variance of x is added."""
    y = np.asarray(y, np.float64)
    centre, bias = x.mean(0), y.mean(0)
    covariance = (x - centre).T @ (x - centre) / len(x)
    covariance[np.diag_indices_from(covariance)] += ridge * np.trace(covariance) / len(covariance)
    weight = np.linalg.solve(covariance, (x - centre).T @ (y - bias) / len(x))
    return lambda new: (np.asarray(new, np.float64) - centre) @ weight + bias


def ridge_onehot(
    image: np.ndarray, text: np.ndarray, image_labels: np.ndarray, text_labels: np.ndarray, ridge: float = 0.1
) -> Projection:
    """Map each modality to C class scores by ridge regression on its labels [n, C]: the semantic space of Rasiwasia et
    al. (ACM MM 2010), with a linear regressor. Rows need not be paired."""
    return Projection(_ridge(image, image_labels, ridge), _ridge(text, text_labels, ridge), {"ridge": ridge})


def ridge_image_to_text(image: np.ndarray, text: np.ndarray, ridge: float = 0.1) -> Projection:
    """Map image features [n, F_i] to the text features [n, F_t] of their pair by ridge; texts stay as they are."""
    return Projection(_ridge(image, text, ridge), lambda x: np.asarray(x, np.float64), {"ridge": ridge})


def _pairs(data: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """One row per text: (image features [M, F_i], text features [M, F_t])."""
    return _numpy(data.image[data.text_owner]), _numpy(data.text)


def _cca_choices(train: Embeddings, dims: Sequence[int], ridges: Sequence[float]) -> Iterator[Projection]:
    image, text = _pairs(train)
    for ridge in ridges:
        widest = cca(image, text, max(dims), ridge)
        for d in sorted({min(d, int(widest.settings["dims"])) for d in dims}):
            yield widest.first(d)


def baseline_table(
    train: Embeddings,
    val: Embeddings,
    test: Embeddings,
    dims: Sequence[int] = DIMS,
    ridges: Sequence[float] = RIDGES,
) -> dict[str, dict[str, Any]]:
    """Return name -> `metrics.evaluate` of the test split, for CCA, ridge to classes (with labels), ridge from image to
    text, and `chance`. ``settings`` of each holds what validation chose. Raises BadInput when the splits' features
    disagree."""
    for name, other in (("val", val), ("test", test)):
        if other.image.shape[1] != train.image.shape[1] or other.text.shape[1] != train.text.shape[1]:
            raise BadInput(f"the {name} features have other dimensions than the train features: pack both the same way")
    image, text = _pairs(train)
    candidates: dict[str, Iterator[Projection]] = {"CCA": _cca_choices(train, dims, ridges)}
    if train.labels is not None:
        own_image, image_labels = _numpy(train.image), train.labels.cpu().numpy()
        text_labels = image_labels[train.text_owner.cpu().numpy()]
        candidates["ridge to classes"] = (
            ridge_onehot(own_image, text, image_labels, text_labels, ridge) for ridge in ridges
        )
    candidates["ridge image to text"] = (ridge_image_to_text(image, text, ridge) for ridge in ridges)
    table = {}
    for name, projections in candidates.items():
        best = max(projections, key=lambda projection: score_of(evaluate(projection(val), all_modal=False)))
        table[name] = {**evaluate(best(test)), "settings": best.settings}
    table["chance"] = chance(test)
    return table


def chance_ap(relevant: np.ndarray, gallery: int, k: int | None = None) -> np.ndarray:
    """Return the exact expected AP (or AP@k) of a random ranking, for each count R of relevant items among G =
    `gallery`; float64.

    E[AP] = (H_G + (R - 1) (G - H_G) / (G - 1)) / G with H the harmonic number (Bestgen, "Exact Expected Average
    Precision of the Random Baseline for System Evaluation", PBML 103, 2015). Given r relevant items in the first k,
    E[AP@k] is the same with (r, k) for (R, G); r is hypergeometric, and the formula is linear in r. NaN where R = 0."""
    count = np.asarray(relevant, dtype=np.float64)
    n = min(k or gallery, gallery)
    harmonic = (1.0 / np.arange(1, n + 1)).sum()
    any_found = 1.0 - _none_of(count, gallery, n) if n < gallery else np.ones_like(count)
    slope = (n - harmonic) / (n - 1) if n > 1 else 0.0
    value = (any_found * harmonic + (count * n / gallery - any_found) * slope) / n
    return np.where(count > 0, value, np.nan)


def _none_of(wanted: np.ndarray, total: int, drawn: int) -> np.ndarray:
    """Probability that `drawn` of `total` items, at random, hold none of the `wanted` ones: C(t - w, d) / C(t, d)."""
    draws = np.arange(min(drawn, total), dtype=np.float64)
    return np.prod(np.clip(1.0 - np.asarray(wanted, np.float64)[:, None] / (total - draws), 0.0, 1.0), axis=1)


def chance(data: Embeddings, map_ks: Sequence[int] = (50,), recall_ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """Return the exact expectation, under random rankings, of the MAP and recall keys of `evaluate`. ``prevalence/DIR``
    is the mean relevant share of the gallery: the level of the precision-recall curve. Only shapes and labels are
    read."""
    n, m = len(data.image), len(data.text)
    captions = torch.bincount(data.text_owner, minlength=n).cpu().numpy()
    captions = captions[captions > 0]
    result: dict[str, Any] = {"images": n, "texts": m}
    for k in recall_ks:
        result[f"recall/image_to_text@{k}"] = float((1.0 - _none_of(captions, m, k)).mean())
        result[f"recall/text_to_image@{k}"] = min(k, n) / n
    if data.labels is None:
        return result
    # A query's relevant items are counted as `rank_classes` counts them, chunk by chunk and without similarities.
    for name, (_, _, labels, gallery_labels, own) in directions(data, data.image[:, :1], data.text[:, :1], True):
        classes, chunk = gallery_labels.float().T, max(1, CHUNK_ELEMENTS // len(gallery_labels))
        relevant = torch.cat([((part.float() @ classes) > 0).sum(1) for part in labels.split(chunk)]).cpu().numpy()
        size = len(gallery_labels) - (own is not None)
        relevant = relevant - ((labels.sum(1) > 0).cpu().numpy() if own is not None else 0)
        add_map(result, name, chance_ap(relevant, size), {k: chance_ap(relevant, size, k) for k in map_ks})
        result[f"prevalence/{name}"] = mean(np.where(relevant > 0, relevant / size, np.nan))
    add_means(result, map_ks)
    return result
