"""Which path an operation takes, said once in the log with the reason."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cmgan_dist.errors import BadInput

log = logging.getLogger(__name__)

TRITON = importlib.util.find_spec("triton") is not None
"""Triton comes with torch for CUDA on Linux only."""
MAX_GROUPS = 4
"""Row counts of the groups are kernel arguments, so that nothing is copied to the device."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the tensors that the kernels take."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU, for tests: TRITON_INTERPRET=1 was set."""
    import triton  # type: ignore[import-untyped]  # here: it takes a while, and it may be absent

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _say(operation: str, path: str, reason: str) -> None:
    log.info("%s: %s (%s)", operation, path, reason)


def _obstacle(x: Tensor, groups: Sequence[int]) -> str:
    """Why the kernels cannot take this input; "" when they can."""
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
    if x.device.type != "cuda" and not interpreted():
        return f"the tensors are on {x.device.type}"
    return ""


def use_triton(operation: str, kernels: str, x: Tensor, groups: Sequence[int] = (), training: bool = True) -> bool:
    """Whether x goes through the Triton kernels; `kernels` is model.kernels.

    "triton" with input that they cannot take raises BadInput in training; evaluation then goes through torch, so that
    a model trained on a GPU can be used without one."""
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
        _say(operation, path, reason)
    return path == "triton"
