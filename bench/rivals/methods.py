"""The rival methods: networks on features, what they minimise, and the settings that are searched.

Every method takes standardised features and is trained by AdamW. `SHARED` and each method's own choices make its space;
the first value of each is where its search begins.
Shapes: B pairs of a batch, F_i and F_t features, E dimensions of the common space, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.rivals import losses

Settings = Mapping[str, float]
Dims = tuple[int, int, int]
"""F_i, F_t and C; the latter 0 without labels."""

SHARED: dict[str, tuple[float, ...]] = {
    "rate": (1e-3, 3e-4, 3e-3, 1e-4),
    "decay": (1e-3, 1e-2, 1e-1),
    "batch": (128, 64, 256),
    "dropout": (0.2, 0.0, 0.4, 0.6),
}
"""Learning rate, weight decay, pairs of a batch, and the share that is dropped of features and of hidden layers."""


def mlp(*dims: int, dropout: float, activation: type[nn.Module] = nn.ReLU, last: bool = False) -> nn.Sequential:
    """Return linear layers from dims[0] to dims[-1], dropout before each and an activation between.

    `last`: an activation at the end too."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(dims):
        layers += [nn.Dropout(dropout), nn.Linear(a, b), activation()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class Rival(nn.Module):
    """A rival embeds both modalities in a common space, and has a loss of its own."""

    image: nn.Module
    """[B, F_i] -> [B, E]."""
    text: nn.Module
    """[B, F_t] -> [B, E]."""

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)

    def loss(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        """Return what is minimised on a batch of pairs, [B, F_i], [B, F_t] and labels bool [B, C], as a scalar."""
        raise NotImplementedError

    def posteriors(self, x: Tensor) -> Tensor | None:
        """Return class probabilities [n, C] of common representations [n, E]; None without a classifier."""
        return None


def share_class(labels: Tensor) -> Tensor:
    """Return bool [B, B]: whether two rows of the labels [B, C] have a class in common."""
    return labels.float() @ labels.float().T > 0


class Dscmr(Rival):
    """Zhen et al., CVPR 2019: a layer per modality, then one of both, and one linear classifier P."""

    def __init__(self, dims: Dims, settings: Settings) -> None:
        super().__init__()
        width, drop = int(settings["width"]), settings["dropout"]
        shared = mlp(width, width // 2, dropout=drop)
        self.image = nn.Sequential(mlp(dims[0], width, dropout=drop, last=True), shared)
        self.text = nn.Sequential(mlp(dims[1], width, dropout=drop, last=True), shared)
        self.classifier = nn.Linear(width // 2, dims[2], bias=False)
        self.common, self.invariance = settings["common"], settings["invariance"]

    def loss(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        u, v = self(image, text)
        return (
            losses.dscmr_label_space(self.classifier(u), self.classifier(v), labels)
            + self.common * losses.dscmr_common_space(u, v, share_class(labels))
            + self.invariance * losses.dscmr_invariance(u, v)
        )

    def posteriors(self, x: Tensor) -> Tensor:
        """Return the positive parts of the class scores, which are fitted to 0 and 1, divided by their sum."""
        scores: Tensor = self.classifier(x).clamp_min(1e-6)
        return scores / scores.sum(1, keepdim=True)


class Acmr(Rival):
    """Wang et al., ACM MM 2017: label prediction and triplets against a modality classifier."""

    def __init__(self, dims: Dims, settings: Settings) -> None:
        super().__init__()
        width, drop = int(settings["width"]), settings["dropout"]
        common = width // 2
        self.image, self.text = (
            mlp(features, width, common, dropout=drop, activation=nn.Tanh, last=True) for features in dims[:2]
        )
        self.classifier = mlp(common, dims[2], dropout=0.0)
        self.modality = mlp(common, common // 2, common // 4, 1, dropout=0.0)
        self.structure, self.adversary = settings["structure"], settings["adversary"]
        self.margin, self.negatives = settings["margin"], settings["negatives"]

    def loss(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        u, v = self(image, text)
        of_modality = [self.modality(losses.reverse_gradient(x, self.adversary)).squeeze(1) for x in (u, v)]
        return (
            losses.soft_cross_entropy(self.classifier(u), labels)
            + losses.soft_cross_entropy(self.classifier(v), labels)
            + self.structure * losses.acmr_structure(u, v, share_class(labels), self.margin, self.negatives)
            + losses.acmr_modality(of_modality[0], of_modality[1])
        )

    def posteriors(self, x: Tensor) -> Tensor:
        probabilities: Tensor = self.classifier(x).softmax(1)
        return probabilities


class Prototypes(Rival):
    """Zeng & Mao (2022), CLIP4CMR: an MLP per modality, pulled to learnable prototypes of the classes."""

    def __init__(self, dims: Dims, settings: Settings) -> None:
        super().__init__()
        width, drop = int(settings["width"]), settings["dropout"]
        self.image, self.text = (mlp(features, width, width // 2, dropout=drop) for features in dims[:2])
        self.prototypes = nn.Parameter(torch.randn(dims[2], width // 2))
        self.temperature = settings["temperature"]

    def loss(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        u, v = self(image, text)
        return losses.prototype_contrast(u, v, self.prototypes, labels, self.temperature)

    def posteriors(self, x: Tensor) -> Tensor:
        return (losses.cosines(x, self.prototypes) / self.temperature).softmax(1)


class ClipProjection(Rival):
    """Radford et al., ICML 2021: a linear projection per modality, InfoNCE with a learned temperature."""

    def __init__(self, dims: Dims, settings: Settings) -> None:
        super().__init__()
        width, drop = int(settings["width"]), settings["dropout"]
        self.image, self.text = (mlp(features, width, dropout=drop) for features in dims[:2])
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / settings["temperature"])))

    def loss(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        u, v = self(image, text)
        return losses.info_nce(u, v, self.log_scale.clamp_max(math.log(100)).exp())


class VsePlusPlus(Rival):
    """Faghri et al., BMVC 2018: linear heads, or MLPs of one hidden layer, and the hardest negative of the batch."""

    def __init__(self, dims: Dims, settings: Settings) -> None:
        super().__init__()
        width, drop = int(settings["width"]), settings["dropout"]
        hidden = (width,) if settings["hidden"] else ()
        self.image, self.text = (mlp(features, *hidden, width, dropout=drop) for features in dims[:2])
        self.margin = settings["margin"]

    def loss(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        u, v = self(image, text)
        return losses.max_of_hinges(u, v, self.margin)


@dataclass(frozen=True)
class Method:
    """A method is how a rival is built, and what is searched."""

    build: Callable[[Dims, Settings], Rival]
    own: dict[str, tuple[float, ...]]
    """Setting -> the values that are tried beside `SHARED`."""
    labelled: bool
    """Whether it learns from labels; then MAP on validation chooses, else the mean R@10."""

    @property
    def space(self) -> dict[str, tuple[float, ...]]:
        """Return all settings with their values."""
        return {**SHARED, **self.own}


METHODS: dict[str, Method] = {
    "DSCMR": Method(
        Dscmr,
        {
            "width": (1024, 256, 512),
            "common": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
            "invariance": (1e-1, 1e-3, 1e-2, 1.0),
        },
        True,
    ),
    "ACMR": Method(
        Acmr,
        {
            "width": (512, 256, 1024),
            "structure": (0.1, 0.01, 1.0),
            "adversary": (1.0, 0.03, 0.1, 0.3),
            "margin": (1.0, 3.0, 10.0),
            "negatives": (0.1, 0.5, 1.0, 3.0),
        },
        True,
    ),
    "CLIP4CMR (PCL)": Method(
        Prototypes,
        {"width": (1024, 256, 512), "temperature": (0.1, 0.05, 0.2, 0.4, 1.0)},
        True,
    ),
    "CLIP projection": Method(
        ClipProjection,
        {"width": (512, 256, 1024), "temperature": (0.07, 0.15, 0.3)},
        False,
    ),
    "VSE++": Method(
        VsePlusPlus,
        {"width": (1024, 256, 512), "hidden": (0, 1), "margin": (0.2, 0.1, 0.05, 0.4)},
        False,
    ),
}
