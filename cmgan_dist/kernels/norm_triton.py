"""How BatchNorm per group of rows, LeakyReLU and dropout are fused: the Triton operators and their launches.

The GEMM before it stays the vendor's. Forward, two launches: `moments_kernel` reduces x to count, mean and squared
deviations per group, channel and split of the rows; `apply_kernel` merges the splits, normalises, activates and drops.
Backward, two launches: `sums_kernel` reduces the gradient, `input_grad_kernel` writes the input's. Only x is kept for
backward: the output is made again from it. Synchronised statistics put one all-reduce for all groups between the two,
forward (and a small launch on each side of it) and backward.

A mean is kept as two floats, mean + low: of values near 1e4 that differ by 1e-2 a single float gives it to 1e-3 only,
and the output would be off by a tenth of a standard deviation.

Shapes: R rows in all, K groups of n_k rows, C channels, P parts (splits of the rows).
    x, y, dy   [R, C]         float32, bfloat16 or float16; last stride 1, else copied
    moments    [P, K, 4, C]   count, mean, low, squared deviations; float32
    totals     [K, 2C + 1]    sum of x, sum of its square, count; float64, to be summed over processes
    stats      [K, 4, C]      1/N (0 in evaluation: the statistics are constants), mean, low, variance; float32
    sums       [P, K, 2, C]   sum of g and of g * normalised x, with g the gradient before the activation; float32

Dropout: element (r, c) is kept where lane c % 4 of Philox4x32-10 with key `seed` and counter r * ceil(C / 4) + c // 4
is at least p; nothing depends on tiles or launches, so backward draws the mask anew. `seed` is a tensor: CUDA graphs
replay and activation checkpointing recompute the right mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from cmgan_dist.kernels.collective import sum_over_processes
from cmgan_dist.kernels.dispatch import MAX_GROUPS
from cmgan_dist.kernels.norm_device import (
    apply_kernel,
    input_grad_kernel,
    moments_kernel,
    pack_kernel,
    sums_kernel,
    unpack_kernel,
    update_running_kernel,
)
from cmgan_dist.kernels.norm_torch import group_batch_norm

PROGRAMS = 264
"""Programs up to which reductions split the rows: two on each of the 132 multiprocessors of an H100."""
MAX_SPLITS = 32
"""The most splits of the rows: every program of the second launch reads all of them."""


@dataclass(frozen=True)
class Tile:
    """The block of rows and columns that a program of a kernel takes at a time, and its warps.

    Sizes choose it, not a timing: all processes sum in the same order, in every run."""

    rows: int
    columns: int
    warps: int


TILES = (Tile(16, 64, 2), Tile(32, 64, 4), Tile(32, 128, 16))
"""Every tile that `choose_tile` may return: the compile tests and the benchmark go through them."""


def choose_tile(rows: int, channels: int) -> Tile:
    """Return the tile for groups of at most `rows` rows with C = `channels`."""
    if rows <= 128:
        return TILES[0]
    return TILES[2] if rows > 1024 and channels >= 512 else TILES[1]


# ---------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class LaunchPlan:
    """How rows in groups of a certain size, with C channels, are cut into programs."""

    tile: Tile
    column_blocks: int
    """Programs side by side, each of `tile.columns` channels."""
    row_blocks: int
    """Programs one below another of a kernel that writes rows, each of `steps` tiles."""
    splits: int
    """Programs that share the rows of a group in a reduction: P."""
    steps: int
    """Tiles that a program writes one after another."""
    sizes: list[int]
    """Row counts of the groups, padded with 0 to MAX_GROUPS."""

    @classmethod
    def of(cls, groups: Sequence[int], channels: int) -> LaunchPlan:
        """Return the plan for groups of n_1 .. n_K rows and C = `channels`."""
        rows = max(groups)
        tile = choose_tile(rows, channels)
        columns = triton.cdiv(channels, tile.columns)
        tiles = max(triton.cdiv(rows, tile.rows), 1)
        splits = min(triton.cdiv(PROGRAMS, columns * len(groups)), triton.cdiv(tiles, 4), MAX_SPLITS)
        steps = 4 if columns * tiles * len(groups) >= 8 * PROGRAMS else 1
        sizes = list(groups) + [0] * (MAX_GROUPS - len(groups))
        return cls(tile, columns, triton.cdiv(tiles, steps), splits, steps, sizes)

    def block(self) -> dict[str, int]:
        """Return the keyword arguments of a launch that say what a program's block is."""
        return {"BLOCK_R": self.tile.rows, "BLOCK_C": self.tile.columns, "num_warps": self.tile.warps}


def _rows(x: Tensor) -> Tensor:
    """Return x [R, C] with last stride 1, copied where it is not so."""
    return x if x.stride(1) == 1 else x.contiguous()


def _run_moments(x: Tensor, groups: Sequence[int]) -> Tensor:
    """Return the moments [P, K, 4, C] of x [R, C]."""
    plan, channels = LaunchPlan.of(groups, x.shape[1]), x.shape[1]
    x = _rows(x)
    out = x.new_empty((plan.splits, len(groups), 4, channels), dtype=torch.float32)
    wrap_triton(moments_kernel)[(plan.column_blocks, len(groups), plan.splits)](
        x, out, x.stride(0), channels, len(groups), plan.splits, *plan.sizes, **plan.block()
    )  # fmt: skip
    return out


def _over_processes(moments: Tensor) -> Tensor:
    """Return the moments [1, K, 4, C] of all processes, given those [P, K, 4, C] of this process."""
    parts, groups, _, channels = moments.shape
    grid = (triton.cdiv(channels, 128), groups)
    totals = moments.new_empty((groups, 2 * channels + 1), dtype=torch.float64)
    wrap_triton(pack_kernel)[grid](moments, totals, channels, groups, parts, BLOCK_C=128, num_warps=4)
    totals = sum_over_processes(totals)
    out = moments.new_empty((1, groups, 4, channels))
    wrap_triton(unpack_kernel)[grid](totals, out, channels, BLOCK_C=128, num_warps=4)
    return out


def _run_apply(
    x: Tensor, groups: Sequence[int], moments: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, seed: Tensor | None,
    eps: float, slope: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, stats); without `moments` by running statistics, as in evaluation."""
    plan, channels = LaunchPlan.of(groups, x.shape[1]), x.shape[1]
    x = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = x.new_empty((len(groups), 4, channels), dtype=torch.float32)
    # Absent tensors are never read: any pointer does.
    wrap_triton(apply_kernel)[(plan.column_blocks, plan.row_blocks, len(groups))](
        x, y, stats if moments is None else moments, stats,
        stats if weight is None else weight, stats if bias is None else bias,
        stats if running_mean is None else running_mean, stats if running_var is None else running_var,
        stats if seed is None else seed,
        x.stride(0), channels, len(groups), 0 if moments is None else moments.shape[0], plan.steps, *plan.sizes,
        eps, slope, dropout,
        TRAINING=moments is not None, AFFINE=weight is not None, DROPOUT=seed is not None, **plan.block(),
    )  # fmt: skip
    return y, stats


def _run_sums(
    dy: Tensor, x: Tensor, groups: Sequence[int], weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    seed: Tensor | None, eps: float, slope: float, dropout: float,
) -> Tensor:  # fmt: skip
    plan, channels = LaunchPlan.of(groups, x.shape[1]), x.shape[1]
    x, dy = _rows(x), _rows(dy)
    out = x.new_empty((plan.splits, len(groups), 2, channels), dtype=torch.float32)
    wrap_triton(sums_kernel)[(plan.column_blocks, len(groups), plan.splits)](
        dy, x, stats, stats if weight is None else weight, stats if bias is None else bias,
        stats if seed is None else seed, out, dy.stride(0), x.stride(0), channels, len(groups), plan.splits,
        *plan.sizes, eps, slope, dropout, AFFINE=weight is not None, DROPOUT=seed is not None, **plan.block(),
    )  # fmt: skip
    return out


def _run_input_grad(
    dy: Tensor, x: Tensor, groups: Sequence[int], weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    sums: Tensor, seed: Tensor | None, eps: float, slope: float, dropout: float, parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan, channels = LaunchPlan.of(groups, x.shape[1]), x.shape[1]
    x, dy = _rows(x), _rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    like = stats if weight is None else weight
    dweight, dbias = (like.new_empty(channels if parameters else 0) for _ in range(2))
    wrap_triton(input_grad_kernel)[(plan.column_blocks, plan.row_blocks, len(groups))](
        dy, x, stats, sums, stats if weight is None else weight, stats if bias is None else bias,
        stats if seed is None else seed, dx, dweight if parameters else stats, dbias if parameters else stats,
        dy.stride(0), x.stride(0), channels, len(groups), sums.shape[0], plan.steps, *plan.sizes, eps, slope, dropout,
        AFFINE=weight is not None, PARAMETERS=parameters, DROPOUT=seed is not None, **plan.block(),
    )  # fmt: skip
    return dx, dweight, dbias


# ---------------------------------------------------------------------------------------------- operators


@triton_op("cmgan::group_norm_act", mutates_args=())
def group_norm_act(
    x: Tensor,
    groups: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    seed: Tensor | None,
    training: bool,
    synchronised: bool,
    eps: float,
    slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Return (y [R, C] in x's dtype, stats [K, 4, C]): x normalised by group, activated, with dropout; forward.

    `synchronised`: statistics of training are over the rows of all processes. `running_mean`, `running_var`: float32
    [K, C], read in evaluation only. A `slope` of 1 has no activation; `seed`, int64 [1], None has no dropout. Autocast
    leaves the operator alone, as it does batch_norm: x keeps the dtype that the GEMM gave it, parameters and statistics
    are float32. Twice differentiable: the second derivative is made of torch operations. Call it through
    `fused_group_batch_norm`, which checks the input."""
    moments = _run_moments(x, groups) if training else None
    if moments is not None and synchronised:
        moments = _over_processes(moments)
    return _run_apply(x, groups, moments, weight, bias, running_mean, running_var, seed, eps, slope, dropout)


@group_norm_act.register_fake
def _(
    x: Tensor, groups: Sequence[int], weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, seed: Tensor | None, training: bool, synchronised: bool,
    eps: float, slope: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stats = x.new_empty((len(groups), 4, x.shape[1]), dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), stats


@triton_op("cmgan::group_norm_act_backward", mutates_args=())
def group_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    groups: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    training: bool,
    synchronised: bool,
    eps: float,
    slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, the latter two empty without affine parameters.

    Those of weight and bias are this process's own: DDP averages them."""
    sums = _run_sums(dy, x, groups, weight, bias, stats, seed, eps, slope, dropout)
    if not synchronised:
        return _run_input_grad(dy, x, groups, weight, bias, stats, sums, seed, eps, slope, dropout, weight is not None)
    own = sums.sum(0)  # [K, 2, C]
    every = sum_over_processes(own)[None]
    made = _run_input_grad(dy, x, groups, weight, bias, stats, every, seed, eps, slope, dropout, False)
    if weight is None:
        return made
    return made[0], own[:, 1].sum(0).to(weight.dtype), own[:, 0].sum(0).to(weight.dtype)


@group_norm_act_backward.register_fake
def _(
    dy: Tensor, x: Tensor, groups: Sequence[int], weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    seed: Tensor | None, training: bool, synchronised: bool, eps: float, slope: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    like, size = (stats, 0) if weight is None else (weight, x.shape[1])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, like.new_empty(size), like.new_empty(size)


@triton_op("cmgan::update_running", mutates_args=("running_mean", "running_var"))
def update_running(stats: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Move running statistics [K, C] towards those of a batch, `stats` [K, 4, C].

    It is an operator of its own, since one that writes into its arguments has no derivative."""
    channels = stats.shape[2]
    wrap_triton(update_running_kernel)[(triton.cdiv(channels, 128), stats.shape[0])](
        stats, running_mean, running_var, channels, momentum, BLOCK_C=128, num_warps=4
    )


@update_running.register_fake
def _(stats: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, groups, weight, bias, _, _, seed, training, synchronised, eps, slope, dropout = inputs
    ctx.save_for_backward(x, weight, bias, output[1], seed)
    ctx.groups, ctx.constants = list(groups), (training, synchronised, eps, slope, dropout)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 12
    x, weight, bias, stats, seed = ctx.saved_tensors
    dx, dweight, dbias = group_norm_act_backward(dy, x, ctx.groups, weight, bias, stats, seed, *ctx.constants)
    none = weight is None
    return dx, None, None if none else dweight, None if none else dbias, *(None,) * 8


group_norm_act.register_autograd(_backward, setup_context=_setup)


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, groups, weight, bias, stats, _, training, synchronised, eps, slope, dropout = inputs
    ctx.save_for_backward(dy, x, weight, bias, stats)
    ctx.groups, ctx.constants = list(groups), (training, synchronised, eps, slope, dropout)


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    dy, x, weight, bias, stats = ctx.saved_tensors
    ddy, dx, dw, db = second_derivative(dy, x, ctx.groups, weight, bias, stats, ctx.constants, grads)
    return ddy, dx, None, dw, db, *(None,) * 7


group_norm_act_backward.register_autograd(_second_backward, setup_context=_second_setup)


def second_derivative(
    dy: Tensor,
    x: Tensor,
    groups: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    constants: tuple[bool, bool, float, float, float],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of dy, x, weight and bias, given those (`grads`) of what the backward returned.

    It is made of torch's own operations. `constants`: training, synchronised, eps, slope and dropout.

    R1 and WGAN-GP differentiate the discriminators' gradients; they are rare or small, so nothing here is fused.
    Raises RuntimeError with dropout, whose mask torch cannot draw."""
    training, synchronised, eps, slope, dropout = constants
    if dropout:
        raise RuntimeError("the fused BatchNorm with dropout has no second derivative: set model.kernels to torch")
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (dy, x, weight, bias)]
        at, point, w, b = leaves
        assert at is not None
        assert point is not None
        fixed = None
        if not training:
            fixed = [(group[1], group[3]) for group in stats.detach()]
        y = group_batch_norm(point, groups, w, b, fixed, training=training, eps=eps, synchronised=synchronised)
        if slope != 1:
            y = F.leaky_relu(y, slope)
        inputs = [t for t in (point, w, b) if t is not None]
        first = torch.autograd.grad(y, inputs, at, create_graph=True)
        pairs = [(f, g) for f, g in zip(first, grads, strict=False) if g is not None and f.requires_grad]
        if not pairs:
            return [None] * 4
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad([f for f, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return [None if t is None else next(found) for t in leaves]


def fused_group_batch_norm(
    x: Tensor,
    groups: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
    dropout: float,
    synchronised: bool,
) -> Tensor:
    """Return x [R, C] normalised by group, activated and with dropout, [R, C]; update running statistics in training.

    Arguments are those of `norm_torch.group_batch_norm`, but for `running`, which is (mean, variance), float32 [K, C]
    each, and for `slope` of the LeakyReLU and `dropout`, a share. Raises ValueError when a group has one row in all in
    training, or when x has not as many channels as the parameters."""
    sizes = list(groups)
    mean, variance = running if running is not None else (None, None)
    for known in (weight, mean):
        if known is not None and known.shape[-1] != x.shape[1]:  # the kernels would read beyond its end
            raise ValueError(f"BatchNorm of {known.shape[-1]} channels, x has {x.shape[1]}")
    drop = training and dropout > 0
    # The seed is drawn by the device's generator: activation checkpointing and CUDA graphs restore it.
    seed = torch.randint(2**62, (1,), device=x.device) if drop else None
    share = dropout if drop else 0.0
    synchronised = training and synchronised
    if training and not synchronised and 1 in sizes:
        raise ValueError(f"BatchNorm in training needs two rows or more in a group, the groups have {sizes}")
    y, stats = group_norm_act(x, sizes, weight, bias, mean, variance, seed, training, synchronised, eps, slope, share)
    if synchronised and 1 in sizes and bool((stats[:, 0, 0] == 1).any()):  # waits for the device, so not always
        raise ValueError("BatchNorm in training needs two rows or more in a group over all processes")
    if training and mean is not None and variance is not None:
        update_running(stats.detach(), mean, variance, momentum)
    return y
