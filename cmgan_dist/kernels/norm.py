"""BatchNorm with statistics per group of rows, LeakyReLU, dropout: the epilogue of the shared layers' GEMM.

Rows of image and text stand one after another and go through one GEMM; statistics and running statistics are kept per
modality while weight and bias are shared (recipe: Networks). The discriminators use it too: real and fake rows are
normalised apart, as separate forward passes would. Here are the torch operations and the module that chooses between
them and the Triton kernels of `norm_triton`.

Shapes: R rows in all, K groups of n_k rows, C channels, W processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.kernels.dispatch import use_triton
from cmgan_dist.kernels.norm_torch import group_batch_norm


class GroupBatchNorm(nn.Module):
    """BatchNorm per group, LeakyReLU and dropout with their parameters: BN weight ~ N(1, 0.02), bias 0 (recipe: Init).

    `statistics`: number of groups that running statistics are kept for; 0 keeps none (a module never in eval mode).
    `affine`: false has neither weight nor bias. `slope`: of the LeakyReLU; 1 has none. `dropout`: share of the output
    set to zero in training. `kernels`: model.kernels."""

    def __init__(
        self,
        channels: int,
        statistics: int = 1,
        affine: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        slope: float = 1.0,
        dropout: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.momentum, self.eps, self.statistics = momentum, eps, statistics
        self.slope, self.dropout, self.kernels = slope, dropout, kernels
        self.weight = nn.Parameter(1.0 + 0.02 * torch.randn(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.synchronised = False
        """Set by the parallel layer: statistics over the rows of all processes."""
        if statistics:
            self.register_buffer("running_mean", torch.zeros(statistics, channels))
            self.register_buffer("running_var", torch.ones(statistics, channels))

    def forward(self, x: Tensor, groups: Sequence[int], first: int = 0) -> Tensor:
        """x [R, C]; `groups` row counts; `first`: the running statistics of groups[0] (image 0, text 1)."""
        running = None
        if self.statistics:
            kept = slice(first, first + len(groups))
            running = (self.get_buffer("running_mean")[kept], self.get_buffer("running_var")[kept])
        elif not self.training:
            raise ValueError("a GroupBatchNorm without running statistics has no eval mode")
        if use_triton("BatchNorm, LeakyReLU and dropout", self.kernels, x, groups, self.training):
            from cmgan_dist.kernels.norm_triton import fused_epilogue  # here: it imports Triton

            return fused_epilogue(
                x,
                groups,
                self.weight,
                self.bias,
                running,
                training=self.training,
                momentum=self.momentum,
                eps=self.eps,
                slope=self.slope,
                dropout=self.dropout,
                synchronised=self.synchronised,
            )
        x = group_batch_norm(
            x,
            groups,
            self.weight,
            self.bias,
            None if running is None else list(zip(*running, strict=True)),
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            synchronised=self.synchronised,
        )
        if self.slope != 1:
            x = F.leaky_relu(x, self.slope)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
