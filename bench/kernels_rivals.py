"""The contestants of bench/kernels.py, CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.kernels.norm_torch import group_batch_norm
from cmgan_dist.kernels.pair_linear import pair_linear

SLOPE, EPS = 0.2, 1e-5
WIDTH = 1024
"""Hidden and common dimension of the reference recipe."""
Run = Callable[[], Any]


def eager(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """What the torch path does."""
    out = F.leaky_relu(group_batch_norm(x, groups, weight, bias, None, training=True, eps=EPS), SLOPE)
    return F.dropout(out, dropout) if dropout else out


def cudnn(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    parts = [
        torch.cudnn_batch_norm(part[:, :, None, None], weight, bias, None, None, True, 0.1, EPS)[0].flatten(1)
        for part in x.split(list(groups))
    ]
    out = F.leaky_relu(torch.cat(parts), SLOPE)
    return F.dropout(out, dropout) if dropout else out


class _ApexNorm(torch.autograd.Function):
    """apex's SyncBatchNorm on one process, by the copies of its kernels in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, rstd = torch.batch_norm_stats(x, EPS)
        count = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        return torch.batch_norm_elemt(x, weight, bias, mean, rstd, EPS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd, count = ctx.saved_tensors
        dy = grads[0].contiguous()
        sum_dy, sum_dy_xmu, dw, db = torch.batch_norm_backward_reduce(dy, x, mean, rstd, weight, True, True, True)
        dx = torch.batch_norm_backward_elemt(dy, x, mean, rstd, weight, sum_dy, sum_dy_xmu, count)
        return dx, dw, db


def apex_style(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    parts = [_ApexNorm.apply(part.contiguous(), weight, bias) for part in x.split(list(groups))]
    out = F.leaky_relu(torch.cat(parts), SLOPE)
    return F.dropout(out, dropout) if dropout else out


def ours(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    from cmgan_dist.kernels.norm_triton import fused_group_batch_norm

    return fused_group_batch_norm(
        x, groups, weight, bias, None, training=True, momentum=0.1, eps=EPS, slope=SLOPE, dropout=dropout,
        synchronised=False,
    )  # fmt: skip


class _BackwardByHand(torch.autograd.Function):
    """A fused epilogue as far as torch's own CPU operations go: activation in place, one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, EPS)
        F.leaky_relu_(y, SLOPE)
        ctx.save_for_backward(x, weight, mean, rstd, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd, y = ctx.saved_tensors
        g = torch.ops.aten.leaky_relu_backward(grads[0], y, SLOPE, True)
        mask = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(g, x, weight, None, None, mean, rstd, True, EPS, mask)


def by_hand(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    parts = [_BackwardByHand.apply(part, weight, bias) for part in x.split(list(groups))]
    return torch.cat(parts)


def step_of(function: Callable[..., Tensor], x: Tensor, groups: Sequence[int], dropout: float) -> Run:
    """Forward and backward of one contestant."""
    weight = torch.ones(x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    x, gradient = x.detach().requires_grad_(), torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x, groups, weight, bias, dropout), (x, weight, bias), gradient)


def discriminator_runs(batch: int, features: int, device: str, dtype: torch.dtype) -> dict[str, Run]:
    """An inter-modality discriminator's hidden layer, forward and backward: its own phase (weight gradient; `wrong` has
    another feature, or with model.mismatch=conditional the same) and the generator's (gradient of common)."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    weight = draw(512, WIDTH + features).requires_grad_()
    frozen = weight.detach()
    common, first, second = draw(3 * batch, WIDTH), draw(batch, features), draw(batch, features)
    own, gradient = draw(batch, WIDTH).requires_grad_(), draw(3 * batch, 512)
    groups = [batch] * 3

    def joined(common: Tensor, parts: list[Tensor], weight: Tensor) -> Tensor:
        return F.linear(torch.cat([common, torch.cat(parts)], 1), weight)

    def split(common: Tensor, parts: list[Tensor], weight: Tensor) -> Tensor:
        return pair_linear(common, parts, groups[: len(parts)], weight)

    def phase(run: Callable[..., Tensor], parts: list[Tensor]) -> Run:
        return lambda: torch.autograd.grad(run(common, parts, weight), weight, gradient)

    def turn(run: Callable[..., Tensor]) -> Run:
        return lambda: torch.autograd.grad(run(own, [first], frozen), own, gradient[:batch])

    runs: dict[str, Run] = {}
    for name, run in (("concat", joined), ("split", split)):
        runs[f"D {name}"] = phase(run, [first, first, second])
        runs[f"D conditional {name}"] = phase(run, [first] * 3)
        runs[f"G {name}"] = turn(run)
    return runs
