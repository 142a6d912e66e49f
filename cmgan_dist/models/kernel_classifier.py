"""A kernel classifier: class logits of a feature by its likeness to training items that are kept.

Shapes: n items, F feature dimensions, L landmarks, C classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["rbf", "chi2"]
"""exp of minus a distance: the squared Euclidean one, or for histograms sum (x - z)^2 / (x + z) (Zhang et al., "Local
Features and Kernels for Classification of Texture and Object Categories", IJCV 2007)."""
CHUNK_ELEMENTS = 1 << 12
"""Numbers that the chi-squared distance makes at a time, for each item: a program that is exported takes any number."""


def distance(kernel: Kernel, x: Tensor, z: Tensor) -> Tensor:
    """Return the distances [n, L] that a kernel goes by, of x [n, F] and z [L, F]; both non-negative for chi2."""
    if kernel == "rbf":
        return (x.square().sum(1)[:, None] + z.square().sum(1) - 2 * x @ z.T).clamp_min(0)
    tiny, x = torch.finfo(x.dtype).tiny, x[:, None]
    some = z.split(max(1, CHUNK_ELEMENTS // z.shape[1]))
    return torch.cat([((x - part).square() / (x + part).clamp_min(tiny)).sum(-1) for part in some], dim=1)


@dataclass(frozen=True)
class KernelClassifier:
    """Logits of items with features x: exp(-distance(x * scale, landmarks)) @ weight + bias."""

    kernel: Kernel
    scale: Tensor
    """[F]."""
    landmarks: Tensor
    """[L, F], scaled already."""
    weight: Tensor
    """[L, C]."""
    bias: Tensor
    """[C]."""

    def __call__(self, feature: Tensor) -> Tensor:
        """Return the class logits [n, C] of features [n, F], in the landmarks' dtype."""
        x = feature.to(self.landmarks.dtype) * self.scale
        if self.kernel == "chi2":
            x = x.clamp_min(0)
        return torch.exp(-distance(self.kernel, x, self.landmarks)) @ self.weight + self.bias

    def tensors(self, modality: str) -> dict[str, Tensor]:
        """Return its tensors by the names that `scoring.Scoring` has for those of a modality."""
        parts = {"scale": self.scale, "landmarks": self.landmarks, "weight": self.weight, "bias": self.bias}
        return {f"{modality}_class_{name}": tensor.float() for name, tensor in parts.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None], modality: str, kernel: Kernel) -> KernelClassifier:
        """Return the classifier whose `tensors` are among these. Raises KeyError where they are not."""
        found = [tensors[f"{modality}_class_{name}"] for name in ("scale", "landmarks", "weight", "bias")]
        scale, landmarks, weight, bias = (tensor.double() for tensor in found if tensor is not None)
        return cls(kernel, scale, landmarks, weight, bias)
