"""How one module is trained under DeepSpeed ZeRO-1 or ZeRO-2; the one file that names deepspeed.

DeepSpeed steps all parameters that it was given, and takes a gradient that is not there for zero. So each set of
parameters that always step together is a group with a DeepSpeed engine of its own: with the alternate update those of
the image side, of the text side, and those that both reach; a module that trains as a whole is one group. A step is of
those groups whose parameters got gradients, as in plain torch; clipping and the loss scale see them as one.

Losses call the modules themselves, never DeepSpeed's engine: its forward would set hooks on outputs, which fire in the
inner derivatives of R1 and WGAN-GP too and reduce what is not there yet. What is left are hooks on parameters, which
fire in the outer backward alone, once each, and reduce gradients bucket by bucket while the backward goes on.

Parameters stay fp32 and lower precision is torch's autocast, as under DDP: `bf16.enabled` would leave BatchNorm's
buffers behind. The optimiser is torch's fused one, on the CPU too (`zero_force_ds_cpu_optimizer`): it is as fast there
as DeepSpeed's, which would have to be compiled first. Each of these has a test in tests/distributed/test_zero.py.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from cmgan_dist.distributed.engine import MOMENTS, AdamSettings, Engine, adamw
from cmgan_dist.errors import BadInput

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__ = {}  # else it compiles, for a minute, collectives that only its inference uses

warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's, not ours

BUCKET = 2**21
"""The most elements that are reduced at once unless the configuration says so: 8 MiB. DeepSpeed's own 2 GB would hold
all gradients of a module before the first are divided."""


class _Group:
    """Parameters that step together, and the DeepSpeed engine that divides their optimiser state (and gradients)."""

    def __init__(self, named: dict[str, nn.Parameter], settings: AdamSettings, config: dict[str, Any]) -> None:
        """Hand `named`, the parameters by name, over to DeepSpeed; `config` is its configuration."""
        self.named, self.settings = named, settings
        self.reached, self.trained = 0, False
        self.hooks = [p.register_post_accumulate_grad_hook(self._reach) for p in named.values()]
        self.optimizer = adamw(list(named.values()), settings)
        own = copy.deepcopy(config) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        size = sum(p.numel() for p in named.values())
        own["zero_optimization"].setdefault("reduce_bucket_size", min(size, BUCKET))
        model = nn.ParameterList(named.values())
        try:
            self.engine, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=own)
        except (ValidationError, DeepSpeedConfigError, ValueError, AssertionError) as error:
            raise BadInput(
                f"DeepSpeed's configuration {_reason(error)}; correct it in the file of --config_file, or in its "
                "deepspeed_config_file (see launchers/configs/)"
            ) from None
        self._share_parameters()
        self.norm = self.zero.scaled_global_norm
        """Returns the norm of this group's gradients over all processes, or -1 where one is not finite."""

    def _share_parameters(self) -> None:
        """Let the optimiser update this process's share of the parameters where they lie: DeepSpeed makes an fp32 copy
        of it, for parameters of fewer bits."""
        (updated,) = self.zero.single_partition_of_fp32_groups
        (shares,) = self.zero.parallel_partitioned_bit16_groups
        own = shares[dist.get_rank()]
        if updated.device == own.device:
            updated.data = own
            self.zero._link_all_hp_params()  # what it has of the copy

    def _reach(self, _: Tensor) -> None:
        self.reached += 1

    def reduce(self) -> None:
        """Reduce what a backward has left to reduce, where it reached this group."""
        if self.reached:
            assert self.reached == len(self.named), f"gradients for {self.reached} of {len(self.named)}: no group"
            self.engine.allreduce_gradients()
            self.reached, self.trained = 0, True

    def step(self, norm: Tensor, scale: float) -> None:
        """Update the parameters by gradients that are `scale` times too large, clipped as for a gradient of `norm`, or
        drop the gradients where that is not finite."""
        norm = norm.to(self.zero.device)
        self.zero.scaled_global_norm = lambda: norm  # DeepSpeed asks for it here: to clip, and whether to step at all
        self.zero.override_loss_scale(scale)
        self.engine.step()
        self.trained = False

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser state gathered from all processes, in the form of `Engine.state`."""
        out = {}
        for kept in self.optimizer.state.values():  # of the one flat parameter, after the first step
            for name, parameter in self.named.items():
                for key in MOMENTS:
                    out[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
                out[f"{name}/step"] = torch.as_tensor(float(kept["step"]))
        return out

    def load(self, state: dict[str, Tensor], step: float) -> None:
        """Take over what `state` returned for these parameters, all of which were updated `step` times."""
        (flat,) = self.optimizer.param_groups[0]["params"]
        count = torch.tensor(step, device=flat.device)
        self.optimizer.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self.zero._lazy_init_hp_params_optimizer_state()  # what the first step would do
        for name, parameter in self.named.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}/{key}"].to(parameter.device), key)

    def release(self) -> None:
        """End the DeepSpeed engine, which must not outlive the process group that it uses."""
        for hook in self.hooks:
            hook.remove()
        self.engine.destroy()
        self.optimizer.param_groups.clear()  # else it would, once collected, unlink what has another engine by then
        del self.engine, self.zero, self.norm


def _reason(error: Exception) -> str:
    """Return what DeepSpeed has against its configuration, in words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"has {place} {first['input']!r}: {first['msg']}" if place else f"is refused: {first['msg']}"
    return f"is refused: {(str(error).splitlines() or [type(error).__name__])[0]}"


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
        """Hand `module` and its optimiser over to DeepSpeed; `parts`: what losses call, by the part that they train.

        `config`: DeepSpeed's configuration, in which batch size, accumulation and clipping are replaced by ours. Raises
        BadInput where it asks for DeepSpeed's own fp16 or bf16."""
        if config.get("fp16", {}).get("enabled") or config.get("bf16", {}).get("enabled"):
            raise BadInput(
                "DeepSpeed's fp16 and bf16 are not used: drop them from its configuration, and set train.precision to "
                "fp16 or bf16, which is autocast with fp32 parameters"
            )
        if not dist.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.config = config
        super().__init__(module, parts, settings, device)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group that DeepSpeed reduces in, one for all engines of a process."""
        found: dist.ProcessGroup = self.groups[0].zero.dp_process_group
        return found

    def _build(self) -> None:
        self.groups: list[_Group] = []
        self._divide({})

    def _divide(self, steps: dict[str, float]) -> None:
        """Make the groups: parameters that are in the same parts, and were updated equally often by `steps`."""
        for group in self.groups:
            group.release()
        reached = {part: set(module.parameters()) for part, module in self.wrapped.items()}
        together: dict[object, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters.items():
            key = (*(part for part, of in reached.items() if parameter in of), steps.get(name, 0.0))
            together.setdefault(key, {})[name] = parameter
        self.groups = [_Group(named, self.settings, self.config) for named in together.values()]

    def set_rate(self, factor: float) -> None:
        """Set the learning rate from here on to `factor` times the one in the settings."""
        for group in self.groups:
            group.optimizer.param_groups[0]["lr"] = self.settings.lr * factor

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Surround one micro-batch of an update, and tell DeepSpeed whether it is the last one."""
        for group in self.groups:
            group.engine.set_gradient_accumulation_boundary(last)
        yield

    def zero_grad(self) -> None:
        """Forget the gradients of the update before."""
        for group in self.groups:
            group.zero.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` [], this micro-batch's part of the update's mean."""
        super().backward(loss)
        for group in self.groups:
            group.reduce()

    def step(self, loss: Tensor, measure: bool) -> dict[str, Tensor]:
        """Update the parameters that got gradients, unless the loss or one of them is not finite on any process.

        Returns what `Engine.step` returns."""
        trained = [group for group in self.groups if group.trained]
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        norm = combine_grad_norm_groups([group.norm() for group in trained])  # inf where one is not finite
        whole = loss.detach().float().clone()
        dist.all_reduce(whole)
        norm = torch.where(whole.isfinite(), norm, torch.inf)
        for group in trained:
            group.step(norm, scale)
        out = {"gradient_norm": norm / scale} if self.settings.clip or measure else {}
        return out if self.scaler is None else out | self._rescale(self.scaler, norm.isinf().float())

    def _rescale(self, scaler: torch.amp.GradScaler, skipped: Tensor) -> dict[str, Tensor]:
        """Do what the scaler's `update` does, which asks for the gradients of a whole optimiser."""
        scale, tracker = scaler._scale, scaler._growth_tracker
        assert scale is not None, "no backward since the engine was made"
        assert tracker is not None
        factors = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
        torch._amp_update_scale_(scale, tracker, skipped.to(scale.device), *factors)
        return {"scale": scale.clone(), "skipped": skipped}

    def state(self) -> dict[str, Tensor]:
        """Return the whole optimiser state, gathered from all processes, in the form of `Engine.state`."""
        return {key: value for group in self.groups for key, value in group.state().items()} | self._scaler_state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `Engine.state` or `ZeroEngine.state` returned, and the parameters as they are now."""
        steps = {name: float(state.get(f"{name}/step", 0.0)) for name in self.named_parameters}
        self._divide(steps)
        for group in self.groups:
            step = steps[next(iter(group.named))]
            if step:
                group.load(state, step)
        self._load_scaler(state)

    def release(self) -> None:
        """End DeepSpeed's engines, none of which may outlive the process group that they use."""
        super().release()
        for group in self.groups:
            group.release()
        self.groups.clear()
