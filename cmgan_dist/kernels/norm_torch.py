"""How BatchNorm per group of rows is computed by torch's own operations, on any device.

Shapes: R rows in all, K groups of n_k rows, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.kernels.collective import sum_over_processes


def synchronised_statistics(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return per group (mean [C], biased variance [C], rows []) over all processes, from one all-reduce for all groups.

    `parts`: this process's rows of each group, [n_k, C].

    Each process sums squared deviations from its own mean in float32. What is summed over processes is float64, about
    zero: the deviation comes out within about 1e-16 (mean / deviation)^2 of itself."""
    local = []
    for x in parts:
        x = x.float()
        mean = x.sum(0) / max(len(x), 1)  # of no rows: 0
        squares, wide = (x - mean).square().sum(0).double(), mean.double()
        count = wide.new_full((1,), float(len(x)))
        local.append(torch.cat([count * wide, squares + count * wide.square(), count]))
    total = sum_over_processes(torch.stack(local))  # [K, 2C + 1]
    channels = parts[0].shape[1]
    count = total[:, -1:]
    some = count.clamp(min=1)
    mean = total[:, :channels] / some
    variance = (total[:, channels:-1] / some - mean.square()).clamp(min=0)
    return [(mean[k].float(), variance[k].float(), count[k, 0].float()) for k in range(len(parts))]


def group_batch_norm(
    x: Tensor,
    groups: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    running: Sequence[tuple[Tensor, Tensor]] | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synchronised: bool = False,
) -> Tensor:
    """BatchNorm (Ioffe & Szegedy, 2015) of x [R, C] with own statistics for each group of rows.

    `groups`: n_1 .. n_K with sum R; a group may be empty. `running`: per group (mean [C], variance [C]), updated in
    place in training and used in evaluation; None keeps none. Statistics are fp32 in any dtype of x.
    `synchronised`: those of training are over the rows of all processes.
    Raises ValueError when a group has one row in all in training: it has no variance."""
    out = []
    parts = x.split(list(groups))
    synced = synchronised_statistics(parts) if training and synchronised else None
    for k, part in enumerate(parts):
        mean_var: tuple[Tensor | None, Tensor | None] = running[k] if running is not None else (None, None)
        if synced is not None:
            mean, variance, rows = synced[k]
            if len(part) == 1 and int(rows) == 1:  # reading it waits for the device, so not always
                raise ValueError(f"BatchNorm in training needs two rows or more in a group, group {k} has one in all")
            if mean_var[0] is not None and mean_var[1] is not None:
                with torch.no_grad():
                    share = momentum * (rows > 0)
                    mean_var[0].lerp_(mean, share)
                    mean_var[1].lerp_(variance * (rows / (rows - 1).clamp(min=1)), share)
            normalised = (part.float() - mean) * torch.rsqrt(variance + eps)
            if weight is not None and bias is not None:
                normalised = normalised * weight + bias
            out.append(normalised.to(part.dtype))
        elif len(part):
            out.append(F.batch_norm(part, mean_var[0], mean_var[1], weight, bias, training, momentum, eps))
    return torch.cat(out) if len(out) > 1 else out[0] if out else x
