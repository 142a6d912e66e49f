"""The class head: a kernel classifier of the backbones' features for each modality, whose class posteriors are mixed
with those of the network.

It is kernel ridge regression from features to classes in closed form, with a temperature that makes posteriors of its
outputs; validation chooses the kernel's width, the ridge and the temperature by the likelihood of its classes. On sets
of a few thousand labelled items it errs elsewhere than a network does, so that both together are better than either.

Shapes: n items of F features, C classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.models.generator import Modality
from cmgan_dist.models.kernel_classifier import Kernel, KernelClassifier, distance
from cmgan_dist.models.scoring import MODALITIES, posterior_of
from cmgan_dist.retrieval.metrics import Embeddings

LANDMARKS = 2000
"""Training items of a modality, at most, on which a classifier is fitted; all of them are kept with the model."""
WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Factors of the distances, whose mean is made 1."""
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Added to the diagonal of the kernel matrix, which is all 1."""
TEMPERATURES = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Factors of the outputs, which are 0 or 1 where they fit, before softmax or sigmoid."""


@dataclass(frozen=True)
class _Items:
    """Labelled items of one modality."""

    x: Tensor
    """float64 [n, F]."""
    y: Tensor
    """float64 [n, C], 0 or 1."""


def _items(data: Embeddings, modality: Modality) -> _Items:
    """Return the items of a modality that have a label."""
    assert data.labels is not None
    labels = data.labels if modality == "image" else data.labels[data.text_owner]
    labelled = labels.any(1)
    return _Items((data.image if modality == "image" else data.text)[labelled].double(), labels[labelled].double())


def is_histogram(x: Tensor) -> bool:
    """Whether each row of x [n, F] is a histogram: nothing below 0, and the same sum in each within a thousandth."""
    sums = x.sum(1)
    return x.shape[1] > 2 and bool((x >= 0).all()) and bool(((sums - sums.mean()).abs() <= 1e-3 * sums.mean()).all())


def log_likelihood(posterior: Tensor, y: Tensor, multi_label: bool) -> float:
    """Return the mean log likelihood of classes y [n, C], 0 or 1, by posteriors [n, C] as `posterior_of` makes them."""
    p = (posterior * math.sqrt(y.shape[1]) if multi_label else posterior).clamp(1e-12, 1 - 1e-12)
    if multi_label:
        return float(torch.where(y.bool(), p, 1 - p).log().sum(1).mean())
    return float((p.log() * y).sum(1).mean())


@dataclass(frozen=True)
class _Ridge:
    """Kernel ridge regression from the items of a training split to their classes."""

    train: _Items
    kernel: Kernel
    scale: Tensor
    """[F]."""
    apart: Tensor
    """[n, n], distances of the scaled items, of mean 1."""
    factor: Tensor
    """By which the scaled items are to be multiplied for a mean distance of 1."""

    @classmethod
    def of(cls, train: _Items) -> _Ridge:
        """Measure the distances of training items: chi-squared between histograms, else standardised Euclidean."""
        kernel: Kernel = "chi2" if is_histogram(train.x) else "rbf"
        deviation = train.x.std(0, correction=0)
        scale = torch.ones_like(deviation) if kernel == "chi2" else torch.where(deviation > 0, 1 / deviation, 0.0)
        apart = distance(kernel, train.x * scale, train.x * scale)
        mean = apart.mean()
        # chi-squared is of the first degree in x, the squared distance of the second
        return cls(train, kernel, scale, apart / mean, 1 / mean if kernel == "chi2" else 1 / mean.sqrt())

    def solve(self, width: float, ridge: float, multi_label: bool) -> KernelClassifier:
        """Return the classifier of a width and a ridge, whose logits beyond the bias are 0 or 1 where they fit."""
        prior = self.train.y.mean(0).clamp(1e-6, 1 - 1e-6)
        matrix = torch.exp(-width * self.apart)
        matrix.diagonal().add_(ridge)
        weight = torch.cholesky_solve(self.train.y - prior, torch.linalg.cholesky(matrix))
        scale = self.scale * self.factor * (width if self.kernel == "chi2" else math.sqrt(width))
        bias = prior.logit() if multi_label else prior.log()
        return KernelClassifier(self.kernel, scale, self.train.x * scale, weight, bias)


def _warmed(made: KernelClassifier, val: _Items, multi_label: bool) -> tuple[float, KernelClassifier]:
    """Return a classifier with the temperature under which the validation split is likeliest, behind its likelihood."""
    outputs = made(val.x) - made.bias

    def reached(temperature: float) -> float:
        return log_likelihood(posterior_of(temperature * outputs + made.bias, multi_label), val.y, multi_label)

    best = max(TEMPERATURES, key=reached)
    return reached(best), dataclasses.replace(made, weight=best * made.weight)


def _fitted(train: _Items, val: _Items, multi_label: bool) -> tuple[str, KernelClassifier]:
    """Return the classifier under which the validation split is likeliest, behind its settings in words: first the
    width is chosen, then the ridge."""
    regression = _Ridge.of(train)

    def warmed(width: float, ridge: float) -> tuple[float, KernelClassifier]:
        return _warmed(regression.solve(width, ridge, multi_label), val, multi_label)

    width = max(WIDTHS, key=lambda each: warmed(each, 1.0)[0])
    found = {ridge: warmed(width, ridge) for ridge in RIDGES}
    ridge = max(found, key=lambda each: found[each][0])
    return f"{regression.kernel}, width {width:g}, ridge {ridge:g}", found[ridge][1]


def fit_class_head(
    train: Embeddings, val: Embeddings, multi_label: bool, seed: int, say: Callable[[str], None]
) -> dict[Modality, KernelClassifier] | None:
    """Fit a classifier for each modality on labelled features of a training split, by the likelihood that classes of
    the validation split have under it; modality -> classifier.

    `seed`: of the draw of LANDMARKS items where there are more. `say` gets a line for each. Return None where a split
    has no labelled items, or features have no variance."""
    rng, out = np.random.default_rng(seed), dict[Modality, KernelClassifier]()
    for modality in MODALITIES:
        items, held = _items(train, modality), _items(val, modality)
        rows = torch.from_numpy(np.sort(rng.permutation(len(items.x))[:LANDMARKS]))
        items = _Items(items.x[rows], items.y[rows])
        if not len(held.x) or len(rows) < 2 or not bool((items.x != items.x[0]).any()):
            return None
        words, out[modality] = _fitted(items, held, multi_label)
        say(f"class head: kernel ridge of {modality}s, {words}")
    return out
