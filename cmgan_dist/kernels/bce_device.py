"""Device code of `bce`, which says what the tensors are and launches it."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _terms(logits, sign, ok):
    """Return softplus(sign * logits) and its derivative by logits; neither overflows."""
    z = logits * sign
    small = tl.exp(-tl.abs(z))
    value = tl.maximum(z, 0.0) + tl.log(1.0 + small)
    slope = tl.where(z >= 0, 1.0, small) / (1.0 + small)
    return tl.where(ok, value, 0.0), slope * sign


@triton.jit(do_not_specialize=["rows"])
def bce_kernel(
    real, fake, mismatched, mask, loss, grad, rows, fake_weight, mismatched_weight,
    MISMATCHED: tl.constexpr, MASK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the loss and its gradient [2 * rows or 3 * rows]. One program, so that the sum has one order."""
    # torch.compile passes Python floats in float64
    fake_weight, mismatched_weight = tl.cast(fake_weight, tl.float32), tl.cast(mismatched_weight, tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)
        ok = at < rows
        value, slope = _terms(tl.load(real + at, mask=ok, other=0.0), -1.0, ok)
        total += value
        tl.store(grad + at, slope / rows, mask=ok)
        value, slope = _terms(tl.load(fake + at, mask=ok, other=0.0), 1.0, ok)
        total += value * fake_weight
        tl.store(grad + rows + at, slope * fake_weight / rows, mask=ok)
        if MISMATCHED:
            value, slope = _terms(tl.load(mismatched + at, mask=ok, other=0.0), 1.0, ok)
            weight = tl.zeros([BLOCK_C], tl.float32) + mismatched_weight
            if MASK:
                weight = tl.where(tl.load(mask + at, mask=ok, other=0) != 0, weight, 0.0)
            total += value * weight
            tl.store(grad + 2 * rows + at, slope * weight / rows, mask=ok)
    tl.store(loss, tl.sum(total, 0) / rows)
