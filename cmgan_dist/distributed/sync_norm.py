"""How every BatchNorm of a model, a timm backbone's included, takes its statistics over the rows of all processes."""

from __future__ import annotations

import types

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmgan_dist.kernels.norm import GroupBatchNorm
from cmgan_dist.kernels.norm_torch import group_batch_norm


def _synchronised_forward(self: _BatchNorm, x: Tensor) -> Tensor:
    """Run a backbone's BatchNorm of x [B, C, ...] over the rows of all processes.

    torch's own SyncBatchNorm does the same but needs a GPU."""
    if not self.training:
        return type(self).forward(self, x)
    running = None
    if self.running_mean is not None and self.running_var is not None:
        running = [(self.running_mean, self.running_var)]
    if self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
    momentum = 1 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
    rows = x.movedim(1, -1)
    flat = rows.reshape(-1, x.shape[1])
    made = group_batch_norm(
        flat,
        [len(flat)],
        self.weight,
        self.bias,
        running,
        training=True,
        momentum=momentum,
        eps=self.eps,
        synchronised=True,
    )
    made = made.view(rows.shape).movedim(-1, 1)
    if hasattr(self, "act"):  # timm's BatchNormAct2d: dropout and activation in the same module
        made = self.act(self.drop(made))  # type: ignore[operator]
    return made


def synchronise_statistics(module: nn.Module) -> None:
    """Make every BatchNorm inside `module` take the statistics of training over the rows of all processes."""
    for part in module.modules():
        if isinstance(part, GroupBatchNorm):
            part.synchronised = True
        elif isinstance(part, _BatchNorm):
            part.forward = types.MethodType(_synchronised_forward, part)  # type: ignore[method-assign]
