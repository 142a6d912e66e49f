"""The four discriminators: intra-modality D_I, D_T and inter-modality D_CI, D_CT (recipe: Networks).

Each takes rows of several groups (real, fake, wrong) one after another, so that one call serves them all; groups are
normalised apart, as by separate calls. Outputs are logits in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cmgan_dist.config import ModelConfig
from cmgan_dist.kernels.shared_layer import GroupBatchNorm
from cmgan_dist.networks import SLOPE

NAMES = ("d_image", "d_text", "d_image_inter", "d_text_inter")
"""D_I, D_T, D_CI (conditions on the image feature), D_CT (on the text feature)."""


def _linear(inputs: int, outputs: int, config: ModelConfig, bias: bool = True) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=bias)
    return spectral_norm(layer) if config.spectral_norm else layer


class IntraDiscriminator(nn.Module):
    """Original feature or reconstruction? Linear(F, 1)."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.out = _linear(features, 1, config)

    def forward(self, feature: Tensor) -> Tensor:
        """[R, F] -> logits [R]."""
        return self.out(feature).squeeze(1).float()


class InterDiscriminator(nn.Module):
    """Whose common representation goes with this feature? Linear(E + F, 512) BN LeakyReLU Linear(512, 1)."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.discriminator_dim
        self.hidden = _linear(config.common_dim + features, width, config, bias=False)
        self.norm = GroupBatchNorm(width, statistics=0, slope=SLOPE, kernels=config.kernels)
        self.out = _linear(width, 1, config)

    def forward(self, common: Tensor, feature: Tensor, groups: Sequence[int]) -> Tensor:
        """[R, E], [R, F], row counts of the groups -> logits [R]."""
        x = self.hidden(torch.cat([common, feature.to(common.dtype)], dim=1))
        return self.out(self.norm(x, groups)).squeeze(1).float()


def build_discriminators(config: ModelConfig, image_dim: int, text_dim: int) -> nn.ModuleDict:
    """The four discriminators by name; `image_dim` F_i, `text_dim` F_t."""
    return nn.ModuleDict(
        {
            "d_image": IntraDiscriminator(image_dim, config),
            "d_text": IntraDiscriminator(text_dim, config),
            "d_image_inter": InterDiscriminator(image_dim, config),
            "d_text_inter": InterDiscriminator(text_dim, config),
        }
    )
