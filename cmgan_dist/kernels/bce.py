"""A discriminator's binary cross-entropy on logits with its weights, value and gradient, in one launch.

    mean softplus(-real) + fake_weight * mean softplus(fake) + wrong_weight * mean mask * softplus(wrong)

On a GPU eager torch takes some two dozen launches for it, each longer than its work. On a CPU nothing is gained that a
training step would notice (docs/kernels.md), so there is no kernel for it there.

Shapes: B rows; logits and gradient float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from cmgan_dist.kernels.bce_device import bce_kernel

BLOCK, WARPS = 1024, 8


@triton_op("cmgan::discriminator_bce", mutates_args=())
def discriminator_bce(
    real: Tensor,
    fake: Tensor,
    wrong: Tensor | None,
    mask: Tensor | None,
    fake_weight: float,
    wrong_weight: float,
) -> tuple[Tensor, Tensor]:
    """Logits [B] each, mask bool [B] or None -> (loss [], its gradient for real, fake and wrong one after another).

    Once differentiable: penalties take gradients of logits, not of losses."""
    rows = len(real)
    loss = real.new_empty(())
    grad = real.new_empty(rows * (2 if wrong is None else 3))
    parts = [t.contiguous() for t in (real, fake, real if wrong is None else wrong, real if mask is None else mask)]
    wrap_triton(bce_kernel)[(1,)](
        *parts, loss, grad, rows, fake_weight, wrong_weight,
        WRONG=wrong is not None, MASK=mask is not None, BLOCK_C=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return loss, grad


@discriminator_bce.register_fake
def _(
    real: Tensor, fake: Tensor, wrong: Tensor | None, mask: Tensor | None, fake_weight: float, wrong_weight: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return real.new_empty(()), real.new_empty(len(real) * (2 if wrong is None else 3))


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
