"""How a discriminator's binary cross-entropy on logits is computed in one launch, value and gradient.

    mean softplus(-real) + fake_weight * mean softplus(fake) + mismatched_weight * mean mask * softplus(mismatched)

On a GPU eager torch takes some two dozen launches for it, each longer than its work. On a CPU nothing is gained that a
training step would notice (docs/kernels.md), so there is no kernel for it there.

It is `training.losses.discriminator_loss` of kind bce, which says where it comes from.

Shapes: B rows; logits and gradient float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from cmgan_dist.kernels.bce_device import bce_kernel

BLOCK, WARPS = 1024, 8
"""Rows that the one program takes at a time, and its warps."""


@triton_op("cmgan::discriminator_bce", mutates_args=())
def discriminator_bce(
    real: Tensor,
    fake: Tensor,
    mismatched: Tensor | None,
    mask: Tensor | None,
    fake_weight: float,
    mismatched_weight: float,
) -> tuple[Tensor, Tensor]:
    """Return (loss [], its gradient [2B or 3B] for real, fake and mismatched one after another).

    `real`, `fake`, `mismatched`: logits [B] each, the last None where there are none. `mask`: bool [B], rows of
    `mismatched` that count, or None when all do. Once differentiable, since penalties take gradients of logits and not
    of losses: a second derivative raises RuntimeError."""
    rows = len(real)
    loss = real.new_empty(())
    grad = real.new_empty(rows * (2 if mismatched is None else 3))
    parts = [
        t.contiguous() for t in (real, fake, real if mismatched is None else mismatched, real if mask is None else mask)
    ]
    wrap_triton(bce_kernel)[(1,)](
        *parts, loss, grad, rows, fake_weight, mismatched_weight,
        MISMATCHED=mismatched is not None, MASK=mask is not None, BLOCK_C=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return loss, grad


@discriminator_bce.register_fake
def _(
    real: Tensor, fake: Tensor, mismatched: Tensor | None, mask: Tensor | None,
    fake_weight: float, mismatched_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return real.new_empty(()), real.new_empty(len(real) * (2 if mismatched is None else 3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.rows = len(inputs[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 6
    if torch.is_grad_enabled():
        raise RuntimeError("the fused cross-entropy has no second derivative: set model.kernels to torch")
    (grad,) = ctx.saved_tensors
    parts = (grad * upstream).split(ctx.rows)
    return parts[0], parts[1], parts[2] if len(parts) > 2 else None, None, None, None


discriminator_bce.register_autograd(_backward, setup_context=_setup)
