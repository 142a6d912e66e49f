"""What the generator is judged by: intra-modality discriminators D_I, D_T, inter-modality ones D_CI, D_CT, and D_M.

The four are those of Peng, Qi & Yuan (2019), arXiv 1710.05106, as docs/reference.md lists them; D_M tells the modality
of a common representation, given its class. Each takes rows of several groups (real, fake, mismatched) one after
another, so that one call serves them all; groups are normalised apart, as by separate calls. Outputs are logits in
fp32.

Shapes: R rows in all, K groups of n_k rows, F feature dimensions of the discriminator's own modality, E common,
C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.kernels.pair_linear import pair_linear
from cmgan_dist.models.generator import SLOPE, Reconstruction

NAMES = ("d_image", "d_text", "d_image_inter", "d_text_inter", "d_modality")
"""The names of D_I, D_T, D_CI (which conditions on the image feature), D_CT (on the text feature) and D_M, in this
order."""


def _linear(inputs: int, outputs: int, config: ModelConfig, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    if config.spectral_norm:
        spectral_norm(layer)
    return layer


class IntraDiscriminator(nn.Module):
    """D_I or D_T: is a row an original feature or a reconstruction? Linear(F, 1)."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.out = _linear(features, 1, config)

    def forward(self, *parts: Tensor | Reconstruction) -> Tensor:
        """Return the logits [R] of the rows of one or more parts, [n_k, F] each."""
        weight, bias = self.out.weight, self.out.bias  # once: spectral normalisation goes on with each look at it
        logits = [F.linear(p, weight) if isinstance(p, Tensor) else p.along(weight) for p in parts]
        return torch.cat([x.float() for x in logits]).squeeze(1) + bias


class InterDiscriminator(nn.Module):
    """D_CI or D_CT: does a common representation belong to this modality and this feature?

    Linear(E + F, 512) BN LeakyReLU Linear(512, 1), where 512 is model.discriminator_dim."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.discriminator_dim
        self.hidden = _linear(config.common_dim + features, width, config, bias=False)
        self.norm = GroupBatchNorm(width, statistics=0, slope=SLOPE, kernels=config.kernels)
        self.out = _linear(width, 1, config)

    @torch.no_grad()
    def condition(self, feature: Tensor) -> Tensor | None:
        """Return the feature's [R, F] part of the hidden layer, [R, 512], before its BatchNorm.

        It serves several calls of `forward` with the same features and frozen weights. Returns None with spectral
        normalisation, whose weights change from call to call."""
        if is_parametrized(self.hidden):
            return None
        return F.linear(feature, self.hidden.weight[:, -feature.shape[1] :])

    def forward(
        self,
        common: Tensor,
        feature: Tensor | Sequence[Tensor],
        groups: Sequence[int],
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [R] of common representations [R, E], each beside its feature.

        `feature`: [R, F], or one [n_k, F] per group; the same tensor for several groups is then used once. `groups`:
        row counts n_1 .. n_K. `condition`: what the method `condition` returned for these features."""
        if condition is None:
            x = pair_linear(common, feature, groups, self.hidden.weight)
        else:
            x = F.linear(common, self.hidden.weight[:, : common.shape[1]]) + condition
        return self.out(self.norm(x, groups)).squeeze(1).float()


class ModalityDiscriminator(nn.Module):
    """D_M: is a common representation of an image or of a text, given its classes?

    A projection discriminator (Miyato & Koyama, "cGANs with Projection Discriminator", ICLR 2018, eq. 4): with h =
    LeakyReLU(Linear(E, 512)) of the representation, the logit is Linear(512, 1) of h plus the inner product of h with
    the mean of the classes' embeddings. Without classes the first part is all."""

    def __init__(self, classes: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.discriminator_dim
        self.hidden = _linear(config.common_dim, width, config)
        self.out = _linear(width, 1, config)
        self.classes = _linear(classes, width, config, bias=False) if classes else None

    def forward(self, common: Tensor, labels: Tensor | None) -> Tensor:
        """Return the logits [R] of common representations [R, E] with labels bool [R, C]; > 0 says image.

        Rows without a label, and `labels` None, are judged by the part that knows no class."""
        x = F.leaky_relu(self.hidden(common), SLOPE)
        logit = self.out(x).squeeze(1)
        if self.classes is not None and labels is not None:
            share = labels.to(x.dtype) / labels.sum(1, keepdim=True).clamp_min(1)
            logit = logit + (x * self.classes(share)).sum(1)
        return logit.float()


def build_discriminators(config: ModelConfig, image_dim: int, text_dim: int, classes: int) -> nn.ModuleDict:
    """Return the five discriminators by name; `image_dim` is F_i, `text_dim` F_t and `classes` C, 0 without labels."""
    return nn.ModuleDict(
        {
            "d_image": IntraDiscriminator(image_dim, config),
            "d_text": IntraDiscriminator(text_dim, config),
            "d_image_inter": InterDiscriminator(image_dim, config),
            "d_text_inter": InterDiscriminator(text_dim, config),
            "d_modality": ModalityDiscriminator(classes, config),
        }
    )
