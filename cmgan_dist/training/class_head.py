"""The class head: a kernel classifier of the backbones' features for each modality, whose class posteriors are mixed
with those of the network.

It is kernel ridge regression from features to classes in closed form, with a temperature that makes posteriors of its
outputs; validation chooses the kernel's width, the ridge and the temperature by the likelihood of its classes. On sets
of a few thousand labelled items it errs elsewhere than a network does, so that both together are better than either.

Shapes: n items of F features, C classes."""

from __future__ import annotations

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
"""Training items of a modality, at most, on which a classifier is fitted; all of them are kept with the model. Of the
validation split as many judge it."""
MOST_BINS = 512
"""Of a histogram, at most, for the chi-squared kernel, whose time goes with them; longer ones get the other."""
LEAST_VARIED, LEAST_DEVIATION = 1e-6, 1e-30
"""Least deviation of a feature that counts, as a share of its largest value, and by itself."""
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
    """Whether each row of x [n, F] is a histogram of at most MOST_BINS: nothing below 0, and the same sum in each,
    within a thousandth."""
    sums = x.sum(1)
    alike = bool(((sums - sums.mean()).abs() <= 1e-3 * sums.mean()).all())
    return 2 < x.shape[1] <= MOST_BINS and bool((x >= 0).all()) and alike


def log_likelihood(posterior: Tensor, y: Tensor, multi_label: bool) -> float:
    """Return the mean log likelihood of classes y [n, C], 0 or 1, by posteriors [n, C] as `posterior_of` makes them."""
    p = (posterior * math.sqrt(y.shape[1]) if multi_label else posterior).clamp(1e-12, 1 - 1e-12)
    if multi_label:
        return float(torch.where(y.bool(), p, 1 - p).log().sum(1).mean())
    return float((p.log() * y).sum(1).mean())


def _scales(x: Tensor) -> Tensor:
    """Return by what each feature of x [n, F] is multiplied for a deviation of 1; 0 for one that has none but rounding,
    or one so small that float32 has no such factor."""
    deviation = x.std(0, correction=0)
    varied = (deviation > LEAST_VARIED * x.abs().amax(0)) & (deviation > LEAST_DEVIATION)
    return torch.where(varied, 1 / deviation, 0.0)


class _Ridge:
    """Kernel ridge regression from the items of a training split to their classes, judged by a validation split.

    Its kernel is the chi-squared one between histograms, else the radial one of standardised features; distances are
    divided by their mean."""

    def __init__(self, train: _Items, val: _Items, multi_label: bool) -> None:
        self.train, self.val, self.multi_label = train, val, multi_label
        self.kernel: Kernel = "chi2" if is_histogram(train.x) else "rbf"
        chi2 = self.kernel == "chi2"
        self.centre = torch.zeros_like(train.x[0]) if chi2 else train.x.mean(0)
        scale = torch.ones_like(train.x[0]) if chi2 else _scales(train.x)
        scaled = (train.x - self.centre) * scale
        apart = distance(self.kernel, scaled, scaled)
        mean = apart.mean()
        # chi-squared is of the first degree in x, the squared distance of the second
        self.scale = scale / (mean if chi2 else mean.sqrt())
        self.apart, self.landmarks = apart / mean, (train.x - self.centre) * self.scale
        self.val_apart = distance(self.kernel, (val.x - self.centre) * self.scale, self.landmarks)
        self.prior = train.y.mean(0).clamp(1e-6, 1 - 1e-6)
        self.bias = self.prior.logit() if multi_label else self.prior.log()

    def solve(self, width: float, ridge: float) -> tuple[float, Tensor]:
        """Return the weights [n, C] for the kernel exp(-width * distance), times the temperature under which the
        validation split is likeliest, behind that likelihood. Raises LinAlgError where there are none."""
        matrix = torch.exp(-width * self.apart)
        matrix.diagonal().add_(ridge)
        weight = torch.cholesky_solve(self.train.y - self.prior, torch.linalg.cholesky(matrix))
        outputs = torch.exp(-width * self.val_apart) @ weight

        def reached(temperature: float) -> float:
            posterior = posterior_of(temperature * outputs + self.bias, self.multi_label)
            return log_likelihood(posterior, self.val.y, self.multi_label)

        best = max(TEMPERATURES, key=reached)
        return reached(best), best * weight

    def classifier(self, width: float, weight: Tensor) -> KernelClassifier:
        """Return what these weights make of any features."""
        factor = width if self.kernel == "chi2" else math.sqrt(width)
        return KernelClassifier(
            self.kernel, self.centre, factor * self.scale, factor * self.landmarks, weight, self.bias
        )


def _fitted(train: _Items, val: _Items, multi_label: bool) -> tuple[str, KernelClassifier]:
    """Return the classifier under which the validation split is likeliest, behind its settings in words: first the
    width is chosen, then the ridge. Raises LinAlgError where there is none."""
    regression = _Ridge(train, val, multi_label)
    solved = {each: regression.solve(each, 1.0) for each in WIDTHS}
    width = max(solved, key=lambda each: solved[each][0])
    found = {ridge: solved[width] if ridge == 1.0 else regression.solve(width, ridge) for ridge in RIDGES}
    ridge = max(found, key=lambda each: found[each][0])
    words = f"{regression.kernel}, width {width:g}, ridge {ridge:g}"
    return words, regression.classifier(width, found[ridge][1])


def _drawn(items: _Items, rng: np.random.Generator) -> _Items:
    """Return LANDMARKS of the items, or all where there are fewer."""
    rows = torch.from_numpy(np.sort(rng.permutation(len(items.x))[:LANDMARKS]))
    return _Items(items.x[rows], items.y[rows])


def fit_class_head(
    train: Embeddings, val: Embeddings, multi_label: bool, seed: int, say: Callable[[str], None]
) -> dict[Modality, KernelClassifier] | None:
    """Fit a classifier for each modality on labelled features of a training split, by the likelihood that classes of
    the validation split have under it; modality -> classifier.

    `seed`: of the draw of LANDMARKS items of a split where there are more. `say` gets a line for each. Return None
    where a split has no labelled items, features have no variance, or numbers leave the range of float32."""
    rng, out = np.random.default_rng(seed), dict[Modality, KernelClassifier]()
    for modality in MODALITIES:
        items, held = _drawn(_items(train, modality), rng), _drawn(_items(val, modality), rng)
        if not len(held.x) or len(items.x) < 2 or not bool(_scales(items.x).any()):
            return None
        try:
            words, made = _fitted(items, held, multi_label)
        except torch.linalg.LinAlgError:
            say(f"class head: none, the {modality}s' features have no kernel that can be solved")
            return None
        if not all(bool(tensor.isfinite().all()) for tensor in made.tensors(modality).values()):
            say(f"class head: none, the {modality}s' features leave the range of float32")
            return None
        out[modality] = made
        say(f"class head: kernel ridge of {modality}s, {words}")
    return out
