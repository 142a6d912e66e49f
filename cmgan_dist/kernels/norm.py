"""What follows every linear layer: the module GroupBatchNorm, BatchNorm per group of rows with LeakyReLU and dropout.

In the shared layers rows of image and text stand one after another and go through one GEMM; batch and running
statistics are kept per modality while weight and bias are shared (docs/reference.md). The discriminators use it too:
real, fake and mismatched rows are normalised apart, as separate forward passes would. The module chooses between the
Triton kernels of `norm_triton` and the torch operations of `norm_torch`.

Shapes: R rows in all, K groups of n_k rows, C channels, W processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.kernels.dispatch import use_triton
from cmgan_dist.kernels.dropout import dropout
from cmgan_dist.kernels.norm_torch import group_batch_norm


class GroupBatchNorm(nn.Module):
    """BatchNorm per group of rows, LeakyReLU and dropout, with BatchNorm's weight and bias, which all groups share.

    The weight begins as N(1, 0.02) and the bias as 0 (docs/reference.md). `statistics`: the number of groups that
    running statistics are kept for; 0 keeps none (a module that is never in eval mode). `affine`: false has neither
    weight nor bias. `slope`: the slope of the LeakyReLU; 1 leaves it out. `dropout`: the share of the output that is
    set to zero in training. `kernels`: model.kernels, which `dispatch.use_triton` reads."""

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
        """Whether statistics are over the rows of all processes; `distributed.sync_norm` sets it."""
        if statistics:
            self.register_buffer("running_mean", torch.zeros(statistics, channels))
            self.register_buffer("running_var", torch.ones(statistics, channels))

    def forward(self, x: Tensor, groups: Sequence[int], first: int = 0) -> Tensor:
        """Return x [R, C] normalised by group, activated and, in training, with dropout: [R, C] in x's dtype.

        `groups`: row counts of the groups, with sum R. `first`: which running statistics are those of groups[0] (in
        the shared layers image 0, text 1). Raises ValueError in training when a group has one row in all, and in eval
        mode without running statistics."""
        running = None
        if self.statistics:
            kept = slice(first, first + len(groups))
            running = (self.get_buffer("running_mean")[kept], self.get_buffer("running_var")[kept])
        elif not self.training:
            raise ValueError("a GroupBatchNorm without running statistics has no eval mode")
        if use_triton("BatchNorm, LeakyReLU and dropout", self.kernels, x, groups, self.training):
            from cmgan_dist.kernels.norm_triton import fused_group_batch_norm  # here: it imports Triton

            return fused_group_batch_norm(
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
        return dropout(x, self.dropout, self.training)
