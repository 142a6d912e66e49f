"""Which path an operation takes, Triton or torch; the log says once which and why."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from cmgan_dist.errors import BadInput
from cmgan_dist.interrupts import is_first_process

log = logging.getLogger(__name__)

TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed: it comes with torch for CUDA on Linux only."""
MAX_GROUPS = 4
"""The most groups that the kernels take: row counts are their arguments, so that nothing is copied to the device."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the rows that the kernels take."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton's interpreter runs the kernels on the CPU, as tests ask for; a constant, since torch.compile cannot
trace how Triton reads its settings."""


@functools.cache
def log_path(operation: str, path: str, reason: str) -> None:
    """Say in the log, once a run, which path an operation takes and why."""
    if is_first_process():
        log.info("%s: %s (%s)", operation, path, reason)


def _obstacle(x: Tensor, groups: Sequence[int]) -> str:
    """Return why the kernels cannot take this input, or "" when they can."""
    if not TRITON:
        return "Triton is not installed"
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are not tested on ROCm"
        major, minor = torch.cuda.get_device_capability(x.device)
        if major < 8:
            return f"the kernels want compute capability 8.0 or more, this GPU has {major}.{minor}"
    if x.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {x.dtype}"
    if len(groups) > MAX_GROUPS:
        return f"the kernels take {MAX_GROUPS} groups, not {len(groups)}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {x.device.type}"
    return ""


def use_triton(operation: str, kernels: str, x: Tensor, groups: Sequence[int] = (), training: bool = True) -> bool:
    """Return whether x [R, ...] goes through the Triton kernels; `kernels` is model.kernels: auto, triton or torch.

    `groups`: row counts of the groups of x. Raises BadInput in training where `kernels` is triton and they cannot take
    x; evaluation then goes through torch, so that a model trained on a GPU can be used without one."""
    path = kernels
    if kernels == "torch":
        reason = "model.kernels is torch"
    elif kernels == "auto" and x.device.type != "cuda":
        path, reason = "torch", f"model.kernels is auto, the tensors are on {x.device.type}"
    else:
        obstacle = _obstacle(x, groups)
        if obstacle and kernels == "triton" and training:
            raise BadInput(f"model.kernels is triton but {obstacle}: set it to auto or torch")
        path = "torch" if obstacle else "triton"
        reason = f"model.kernels is {kernels}" + (f", {obstacle}" if obstacle else "")
    if not torch.compiler.is_compiling():
        log_path(operation, path, reason)
    return path == "triton"
