"""A kernel classifier: class logits of a feature by its likeness to training items that are kept.

Shapes: n items, F feature dimensions, L landmarks, C classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["rbf", "chi2"]
"""exp of minus a distance: the squared Euclidean one, or for histograms sum (x - z)^2 / (x + z) (Zhang et al., "Local
Features and Kernels for Classification of Texture and Object Categories", IJCV 2007)."""
ROWS = 512
"""Items of which distances are made at a time."""
CHUNK_ELEMENTS = 1 << 12
"""Numbers that the chi-squared distance of one of them makes at a time."""


def distance(kernel: Kernel, x: Tensor, z: Tensor) -> Tensor:
    """Return the distances [n, L] that a kernel goes by, of x [n, F] and z [L, F]; both non-negative for chi2.

    A program that is exported takes any number of items, all at a time."""
    if not torch.compiler.is_exporting() and len(x) > ROWS:
        return torch.cat([distance(kernel, part, z) for part in x.split(ROWS)])
    if kernel == "rbf":
        return (x.square().sum(1)[:, None] + z.square().sum(1) - 2 * x @ z.T).clamp_min(0)
    tiny, x = torch.finfo(x.dtype).tiny, x[:, None]
    some = z.split(max(1, CHUNK_ELEMENTS // z.shape[1]))
    return torch.cat([((x - part).square() / (x + part).clamp_min(tiny)).sum(-1) for part in some], dim=1)


@dataclass(frozen=True)
class KernelClassifier:
    """Logits of items with features x: exp(-distance((x - centre) * scale, landmarks)) @ weight + bias."""

    kernel: Kernel
    centre: Tensor
    """[F], 0 for chi2."""
    scale: Tensor
    """[F]."""
    landmarks: Tensor
    """[L, F], centred and scaled already."""
    weight: Tensor
    """[L, C]."""
    bias: Tensor
    """[C]."""

    def __call__(self, feature: Tensor) -> Tensor:
        """Return the class logits [n, C] of features [n, F], in the landmarks' dtype."""
        x = (feature.to(self.landmarks.dtype) - self.centre) * self.scale
        if self.kernel == "chi2":
            x = x.clamp_min(0)
        return torch.exp(-distance(self.kernel, x, self.landmarks)) @ self.weight + self.bias

    def tensors(self, modality: str) -> dict[str, Tensor]:
        """Return its tensors, float32, by the names that `scoring.Scoring` has for those of a modality."""
        return {f"{modality}_class_{name}": getattr(self, name).float() for name in TENSORS}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None], modality: str, kernel: Kernel) -> KernelClassifier:
        """Return the classifier whose `tensors` are among these. Raises KeyError where they are not."""
        found = [tensors[f"{modality}_class_{name}"] for name in TENSORS]
        return cls(kernel, *(tensor.double() for tensor in found if tensor is not None))


TENSORS = tuple(field.name for field in dataclasses.fields(KernelClassifier) if field.name != "kernel")
"""Names of its tensors."""
