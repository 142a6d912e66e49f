"""The fused cross-entropy against torch's in float64: one set of tests, run by Triton's interpreter
(test_interpreter.py) and on a GPU (tests/gpu/test_bce.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmgan_dist.kernels.bce import discriminator_bce
from cmgan_dist.training.losses import fused_discriminator_loss
from tests.kernels.norm_cases import CHECKS, DEVICE, close


@pytest.mark.parametrize("rows", [1, 3, 127, 1500])
@pytest.mark.parametrize("kind", ["fake only", "mismatched", "masked"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_value_and_gradient(rows: int, kind: str, scale: float) -> None:
    """Targets 1, 0, 0 with weights 1, 1/2, 1/2; logits of 1e4 overflow nothing."""
    torch.manual_seed(0)
    logits = (torch.randn(3 * rows, device=DEVICE) * scale).requires_grad_()
    mask = torch.rand(rows, device=DEVICE) > 0.3 if kind == "masked" else None
    real, fake, mismatched = logits.chunk(3)
    fakes = [(fake, 0.5, None)] + ([] if kind == "fake only" else [(mismatched, 0.5, mask)])
    ours = fused_discriminator_loss("bce", real, fakes, "triton")
    twin = logits.detach().double().requires_grad_()
    weight = torch.ones(3 * rows, dtype=torch.float64, device=DEVICE)
    weight[rows:] = 0.5
    if kind == "fake only":
        weight[2 * rows :] = 0
    if mask is not None:
        weight[2 * rows :] *= mask
    target = (torch.arange(3 * rows, device=DEVICE) < rows).double()
    theirs = F.binary_cross_entropy_with_logits(twin, target, weight, reduction="sum") / rows
    close(ours, theirs, 1e-5)
    (ours * 3).backward()
    (theirs * 3).backward()
    close(logits.grad, twin.grad, 1e-5)


def test_opcheck() -> None:
    real, fake, mismatched = (torch.randn(9, device=DEVICE, requires_grad=True) for _ in range(3))
    mask = torch.rand(9, device=DEVICE) > 0.3
    for args in (
        (real, fake, None, None, 1.0, 0.0),
        (real, fake, mismatched, None, 0.5, 0.5),
        (real, fake, mismatched, mask, 0.5, 0.5),
    ):
        torch.library.opcheck(discriminator_bce, args, test_utils=CHECKS)


def test_second_derivative_is_refused() -> None:
    real = torch.randn(4, device=DEVICE, requires_grad=True)
    loss = fused_discriminator_loss("bce", real, [(real.detach(), 1.0, None)], "triton")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, real, create_graph=True)
