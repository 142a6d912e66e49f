"""How one module is trained under DeepSpeed ZeRO-1 or ZeRO-2; the one file that names deepspeed.

Each module has a DeepSpeed engine of its own. The traps, each with a test in tests/distributed/test_zero.py:

- Losses of the generator go through the unwrapped discriminators with frozen parameters (training/phases.py): else
  they leave gradients in the discriminators' engines, and some stages then train silently wrong.
- Parameters stay fp32 and lower precision is torch's autocast, as under DDP: `bf16.enabled` would leave BatchNorm's
  buffers behind. DeepSpeed's own fp16 is refused.
- A parameter without gradient counts as one with gradient zero, whose Adam moments decay: the alternate update is
  refused.

The optimiser is torch's fused one, on the CPU too (`zero_force_ds_cpu_optimizer`): it is as fast there as DeepSpeed's,
which would have to be compiled first.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmgan_dist.distributed.engine import MOMENTS, AdamSettings, Engine
from cmgan_dist.errors import BadInput

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__ = {}  # else it compiles, for a minute, collectives that only its inference uses


class ZeroEngine(Engine):
    """An engine whose optimiser state (stage 1), or that and the gradients (stage 2), is divided among the processes
    (Rajbhandari et al., SC 2020)."""

    def __init__(
        self,
        module: nn.Module,
        parts: dict[str, nn.Module],
        settings: AdamSettings,
        device: torch.device,
        config: dict[str, Any],
    ) -> None:
        """Hand `module` and its optimiser over to DeepSpeed; `parts` is {"": module}, as ZeRO takes no other parts.

        `config`: DeepSpeed's configuration, in which batch size, accumulation and clipping are replaced by ours. Raises
        BadInput where ZeRO would not train what DDP does."""
        if settings.fp16 or config.get("fp16", {}).get("enabled") or config.get("bf16", {}).get("enabled"):
            raise BadInput(
                "DeepSpeed's fp16 and bf16 are not used: drop them from its configuration, and set train.precision to "
                "bf16 (or fp32), which is autocast with fp32 parameters"
            )
        if set(parts) != {""}:
            raise BadInput(
                "optim.update=alternate leaves half of the generator without gradient in each step, which DeepSpeed "
                "counts as zero gradients: set optim.update=joint, or train without DeepSpeed"
            )
        super().__init__(module, parts, settings, device)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        own = copy.deepcopy(config) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, self.zero, _, _ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=own)
        self.wrapped = {"": self.engine}

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Surround one micro-batch of an update, and tell DeepSpeed whether it is the last one."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def zero_grad(self) -> None:
        """Forget the gradients of the update before."""
        self.zero.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` [], this micro-batch's part of the update's mean."""
        self.engine.backward(loss)

    def step(self, loss: Tensor, measure: bool) -> dict[str, Tensor]:
        """Update the parameters, unless a gradient is not finite; with `measure` return "gradient_norm"."""
        self.engine.step()  # left out by DeepSpeed where the gradient norm is not finite
        norm = self.engine.get_global_grad_norm()
        return {"gradient_norm": torch.as_tensor(norm, dtype=torch.float32)} if measure and norm is not None else {}

    def state(self) -> dict[str, Tensor]:
        """Return the whole optimiser state, gathered from all processes, in the form of `Engine.state`."""
        states = list(self.optimizer.state.values())
        if not states:  # no step yet
            return {}
        step = torch.as_tensor(float(states[0]["step"]))
        out = {}
        for name, parameter in self.named_parameters.items():
            for key in MOMENTS:
                out[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
            out[f"{name}/step"] = step
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `Engine.state` or `ZeroEngine.state` returned, and the parameters as they are now.

        Raises BadInput where parameters have different step counts, since DeepSpeed has one count for all."""
        self.zero.refresh_fp32_params()
        steps = {float(state[f"{name}/step"]) for name in self.named_parameters if f"{name}/step" in state}
        if not steps:
            return
        if len(steps) > 1 or any(f"{name}/step" not in state for name in self.named_parameters):
            raise BadInput(
                "this checkpoint was trained with optim.update=alternate or other loss terms: its Adam step counts "
                "differ among parameters and DeepSpeed has one for all; go on without DeepSpeed"
            )
        (step,) = steps
        for group in self.optimizer.param_groups:
            for flat in group["params"]:
                count = torch.tensor(step, device=flat.device)
                self.optimizer.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self.zero._lazy_init_hp_params_optimizer_state()  # what the first step would do
        for name, parameter in self.named_parameters.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}/{key}"].to(parameter.device), key)

    def release(self) -> None:
        """End the DeepSpeed engine, which must not outlive the process group that it uses."""
        self.engine.destroy()
        super().release()
        del self.engine, self.zero
