"""How synchronised statistics are summed over processes: an operator, so that torch.compile keeps it in its graph and a
derivative of any order takes the same sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.library.custom_op("cmgan::sum_over_processes", mutates_args=())
def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum of x [...] over all processes, by one all-reduce.

    Every process must call it as often as the others, and with the same shape."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@sum_over_processes.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return sum_over_processes(grad)


sum_over_processes.register_autograd(_backward)
