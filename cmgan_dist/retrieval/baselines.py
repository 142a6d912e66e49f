"""What a model must beat: chance, CCA, ridge regression and logistic regression, on the same features.

Every choice (dimensions, regularisation, scoring) is made on the validation split, by the measure that the method is
for: methods that learn pairs by Recall@10, a classifier by MAP. The test split is read once.
Shapes: N images of F_i features, M texts of F_t, C classes. A set of features is an `Embeddings` whose
two modalities may differ in their dimensions.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.cca import PairedRows
from cmgan_dist.retrieval.metrics import (
    CHUNK_ELEMENTS,
    Embeddings,
    add_map,
    add_means,
    directions,
    evaluate,
    mean,
    recall_of,
    score_of,
)
from cmgan_dist.retrieval.metrics import Score as VectorScore

if TYPE_CHECKING:
    from cmgan_dist.distributed.processes import Parallel

PAIRS, CLASSIFIER = "CCA", "logistic regression"
"""Names of the baselines that find partners and classes best."""
COSINE: VectorScore = "cosine"
ZSCORE: VectorScore = "zscore"
INNER: VectorScore = "inner"
RIDGES = (1e-2, 1e-1, 1.0, 3.0, 10.0)
"""Tried on validation; in units of the mean feature variance."""
DIMS = (7, 20, 50, 100, 200, 384)
"""Canonical dimensions tried on validation, as far as the features have them."""
POWERS = (0.0, 0.5, 1.0, 1.5)
"""Powers of its correlation by which a canonical dimension is weighted, tried on validation."""
PENALTIES = (1e-3, 1e-2, 1e-1)
"""Inverse L2 penalties C of logistic regression tried on validation, for features of variance 1."""
MOST_ROWS = 20_000
"""Rows that logistic regression is fitted on; of a larger split so many are drawn."""


@dataclass(frozen=True)
class Projection:
    """A projection is two maps into one space, with the settings that made them."""

    image: Callable[[np.ndarray], np.ndarray]
    """[n, F_i] -> float64 [n, E]."""
    text: Callable[[np.ndarray], np.ndarray]
    """[n, F_t] -> float64 [n, E]."""
    settings: dict[str, Any]
    score: VectorScore = "cosine"
    """How what it makes is compared."""

    def first(self, dims: int) -> Projection:
        """Return this projection with its first `dims` dimensions only."""
        return replace(
            self,
            image=lambda x: self.image(x)[:, :dims],
            text=lambda x: self.text(x)[:, :dims],
            settings={**self.settings, "dims": dims},
        )

    def weighted(self, weights: np.ndarray, power: float) -> Projection:
        """Return this projection with each dimension times its weight [E] to a power."""
        scale = weights**power
        return replace(
            self,
            image=lambda x: self.image(x) * scale,
            text=lambda x: self.text(x) * scale,
            settings={**self.settings, "power": power},
        )

    def scored(self, score: VectorScore) -> Projection:
        """Return this projection with another way to compare."""
        return replace(self, score=score, settings={**self.settings, "score": score})

    def __call__(self, data: Embeddings) -> Embeddings:
        image, text = self.image(_numpy(data.image)), self.text(_numpy(data.text))
        return Embeddings(torch.from_numpy(image), torch.from_numpy(text), data.text_owner.cpu(), _labels(data))

    def measured(self, data: Embeddings, **options: Any) -> dict[str, Any]:
        """Return `metrics.evaluate` of what it makes of a set of features, with `options` of that."""
        return evaluate(self(data), self.score, **options)


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _labels(data: Embeddings) -> torch.Tensor | None:
    return None if data.labels is None else data.labels.cpu()


# ---------------------------------------------------------------------------------------------- CCA


def _projection(rows: PairedRows, ridges: tuple[float, float], dims: int) -> tuple[Projection, np.ndarray]:
    """Return a CCA in at most its first `dims` dimensions, and the correlations [E] of these."""
    found, centre_i, centre_t = rows.solve(ridges, dims), rows.image.centre, rows.text.centre
    projection = Projection(
        lambda x: (np.asarray(x, np.float64) - centre_i) @ found.image,
        lambda x: (np.asarray(x, np.float64) - centre_t) @ found.text,
        {"dims": len(found.correlation), "image_ridge": ridges[0], "text_ridge": ridges[1]},
    )
    return projection, found.correlation


def cca(
    image: np.ndarray, text: np.ndarray, dims: int, ridges: tuple[float, float] = (0.0, 0.0), power: float = 0.0
) -> Projection:
    """Fit regularised linear CCA of paired rows, image [n, F_i] and text [n, F_t] (Hotelling 1936; ridge: Vinod 1976).

    `ridges`, of image and text, times the mean variance are added to the diagonals of the covariances; `dims` is cut to
    min(F_i, F_t). Each dimension is weighted by its correlation to the `power`. A direction that the pairs do not span
    gets weight 0, so that no inverse is taken of nothing."""
    projection, correlation = _projection(PairedRows(image, text), ridges, dims)
    return projection.weighted(correlation, power)


def _best_cca(train: Embeddings, ridges: Sequence[float], dims: Sequence[int], score: Score) -> Projection:
    """Return the CCA that `score` likes best: first the ridges, then dimensions, power and z-scores or none."""
    pairs, widest = PairedRows(*_pairs(train)), max(dims)

    def reached(solved: tuple[Projection, np.ndarray]) -> float:
        return score(solved[0].weighted(solved[1], 1.0))

    solutions = (_projection(pairs, both, widest) for both in itertools.product(ridges, ridges))
    projection, correlation = max(solutions, key=reached)
    choices = [
        projection.first(d).weighted(correlation[:d], power).scored(way)
        for d in sorted({min(d, len(correlation)) for d in dims})
        for power, way in [*((power, COSINE) for power in POWERS), (0.0, ZSCORE)]
    ]
    return max(choices, key=score)


# ---------------------------------------------------------------------------------------------- regressions


class _LeastSquares:
    """Least squares of y [n, K] on x [n, F] with an intercept, for any ridges: products of rows are made once."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        y = np.asarray(y, np.float64)
        self.centre, self.bias = x.mean(0), y.mean(0)
        centred = x - self.centre
        self.covariance = centred.T @ centred / len(x)
        self.cross = centred.T @ (y - self.bias) / len(x)

    def solve(self, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
        """Return the map of new rows; `ridge` times the mean variance of x is added."""
        covariance = self.covariance.copy()
        covariance[np.diag_indices_from(covariance)] += ridge * np.trace(covariance) / len(covariance)
        weight = np.linalg.solve(covariance, self.cross)
        return lambda new: (np.asarray(new, np.float64) - self.centre) @ weight + self.bias


def ridges_image_to_text(image: np.ndarray, text: np.ndarray, ridges: Sequence[float] = (0.1,)) -> Iterator[Projection]:
    """Map image features [n, F_i] to the text features [n, F_t] of their pair by each ridge; texts stay as they are."""
    pairs = _LeastSquares(image, text)
    for ridge in ridges:
        yield Projection(pairs.solve(ridge), lambda x: np.asarray(x, np.float64), {"ridge": ridge})


def logistic_regression(x: np.ndarray, labels: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Fit class probabilities [n, C] on features x [n, F], which are standardised first, by scikit-learn.

    `labels` bool [n, C]: softmax where every row has one class, else a regression for each class. `penalty`: C of
    scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    centre, deviation = x.mean(0), x.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    model: Any = LogisticRegression(C=penalty, max_iter=200, tol=1e-3)
    single = bool((labels.sum(1) == 1).all())
    target: np.ndarray = labels.argmax(1) if single else labels.astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps of L-BFGS are far enough for any C here
        fitted = (model if single else OneVsRestClassifier(model)).fit(
            ((x - centre) / deviation).astype(np.float32), target
        )
    seen = fitted.classes_ if single else np.arange(labels.shape[1])

    def probabilities(new: np.ndarray) -> np.ndarray:
        out = np.zeros((len(new), labels.shape[1]))
        scaled = (np.asarray(new, np.float64) - centre) / deviation
        out[:, seen] = fitted.predict_proba(scaled.astype(np.float32))
        return out

    return probabilities


def _logistic_choices(train: Embeddings, labels: np.ndarray, penalties: Sequence[float]) -> Iterator[Projection]:
    """Give a classifier per modality for each penalty, by cosine, by z-scored cosine and, of single labels, by
    the inner product of the class probabilities: the chance that both are of one class."""
    rng = np.random.default_rng(0)
    image, text = _numpy(train.image), _numpy(train.text)
    rows = [np.sort(rng.permutation(len(x))[:MOST_ROWS]) for x in (image, text)]
    text_labels = labels[train.text_owner.cpu().numpy()]
    for penalty in penalties:
        maps = (
            logistic_regression(image[rows[0]], labels[rows[0]], penalty),
            logistic_regression(text[rows[1]], text_labels[rows[1]], penalty),
        )
        plain = Projection(*maps, {"C": penalty})
        single = bool((labels.sum(1) == 1).all())
        yield from (plain.scored(score) for score in ((COSINE, ZSCORE, INNER) if single else (COSINE, ZSCORE)))


# ---------------------------------------------------------------------------------------------- the table

Score = Callable[[Projection], float]
"""What validation gives a projection."""


def _pairs(data: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """One row per text: (image features [M, F_i], text features [M, F_t])."""
    return _numpy(data.image[data.text_owner]), _numpy(data.text)


def check_features(train: Embeddings, other: Embeddings, name: str) -> None:
    """Raises BadInput when the features of the split `name` have other dimensions than those of the training split."""
    if other.image.shape[1] != train.image.shape[1] or other.text.shape[1] != train.text.shape[1]:
        raise BadInput(f"the {name} features have other dimensions than the train features: pack both the same way")


def best_baselines(
    train: Embeddings,
    val: Embeddings,
    dims: Sequence[int] = DIMS,
    ridges: Sequence[float] = RIDGES,
    penalties: Sequence[float] = PENALTIES,
    parallel: Parallel | None = None,
) -> dict[str, Projection]:
    """Return name -> the projection that validation chose, for CCA, ridge from image to text and, with labels, logistic
    regression; `parallel` as in `metrics.evaluate`. Raises BadInput when the splits' features disagree."""
    check_features(train, val, "val")
    pairs = replace(val, labels=None)  # MAP would be measured for nothing

    def by_pairs(projection: Projection) -> float:
        return recall_of(projection.measured(pairs, parallel=parallel))

    def by_classes(projection: Projection) -> float:
        return score_of(projection.measured(val, all_modal=False, parallel=parallel))

    image, text = _pairs(train)
    regressions = (each.scored(s) for each in ridges_image_to_text(image, text, ridges) for s in (COSINE, ZSCORE))
    best = {PAIRS: _best_cca(train, ridges, dims, by_pairs), "ridge image to text": max(regressions, key=by_pairs)}
    if train.labels is not None:
        labels = train.labels.cpu().numpy()
        best[CLASSIFIER] = max(_logistic_choices(train, labels, penalties), key=by_classes)
    return best


def baseline_table(
    best: dict[str, Projection], test: Embeddings, parallel: Parallel | None = None
) -> dict[str, dict[str, Any]]:
    """Return name -> `metrics.evaluate` of the test split, for what `best_baselines` found and `chance`; ``settings``
    of each holds what validation chose."""
    table = {name: {**p.measured(test, parallel=parallel), "settings": p.settings} for name, p in best.items()}
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
        relevant = (
            torch.cat([((part.float() @ classes) > 0).sum(1, dtype=torch.int32) for part in labels.split(chunk)])
            .cpu()
            .numpy()
        )
        size = len(gallery_labels) - (own is not None)
        relevant = relevant - ((labels.sum(1) > 0).cpu().numpy() if own is not None else 0)
        add_map(result, name, chance_ap(relevant, size), {k: chance_ap(relevant, size, k) for k in map_ks})
        result[f"prevalence/{name}"] = mean(np.where(relevant > 0, relevant / size, np.nan))
    add_means(result, map_ks)
    return result
