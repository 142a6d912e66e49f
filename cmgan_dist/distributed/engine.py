"""How one module is trained: its optimiser, its loss scaler, its gradient clipping, and its part in the collectives.

One engine owns each parameter. `Engine` is plain torch, with or without DDP around the module; `shard.ShardedEngine`
is the same where backbones are sharded, `zero.ZeroEngine` under DeepSpeed ZeRO. Their states have one form, named by
parameter, so that each loads the others'.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the tensors that Adam keeps for each parameter, beside its step count (Kingma & Ba, ICLR 2015)."""
FIRST_SCALE = 2.0**16
"""The loss scale with which an fp16 run starts, the same as in torch.amp."""


@dataclass(frozen=True)
class AdamSettings:
    """The settings of an engine's AdamW optimiser (Loshchilov & Hutter, ICLR 2019) and of what stands around it."""

    lr: float
    """The learning rate at the start; `Engine.set_rate` multiplies it."""
    beta1: float
    """The decay of Adam's first moment."""
    beta2: float
    """The decay of Adam's second moment."""
    weight_decay: float = 0.0
    """The decoupled weight decay."""
    clip: float = 0.0
    """The largest gradient norm over all parameters of the engine; 0 turns clipping off."""
    fp16: bool = False
    """Scale losses, skip steps whose gradients overflow and lower the scale (Micikevicius et al., ICLR 2018)."""


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers that hide its methods from torch.compile: their first call would import the
    compiler, which takes longer than all else that a training imports beside torch."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(parameters: Sequence[nn.Parameter], settings: AdamSettings) -> AdamW:
    """Return the optimiser of `parameters`, torch's fused one, which a CPU has too."""
    betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
    return AdamW(parameters, lr=settings.lr, betas=betas, weight_decay=decay, fused=True)


class Engine:
    """An engine trains one module with one optimiser."""

    def __init__(
        self, module: nn.Module, wrapped: dict[str, nn.Module], settings: AdamSettings, device: torch.device
    ) -> None:
        """Build the optimiser of `module`, whose parameters lie on `device` already.

        `wrapped`: what losses call, by the part of `module` that they train ("" is all of it), with DDP around it where
        there are several processes."""
        self.module, self.wrapped, self.settings = module, wrapped, settings
        self.named_parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.updated = dict(self.named_parameters)
        """What the optimiser updates, by the names of the parameters."""
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE) if settings.fp16 else None
        self._build()

    def _build(self) -> None:
        self.parameters = list(self.updated.values())
        self.vectors = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = adamw(self.parameters, self.settings)

    def set_rate(self, factor: float) -> None:
        """Set the learning rate from here on to `factor` times the one in the settings."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro-batch of an update.

        Gradients add up on each process, and are averaged over the processes in the `last` micro-batch only."""
        with contextlib.ExitStack() as stack:
            for part in self.wrapped.values():
                if isinstance(part, DistributedDataParallel) and not last:
                    stack.enter_context(part.no_sync())
            yield

    def zero_grad(self) -> None:
        """Forget the gradients of the update before."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` [], this micro-batch's part of the update's mean."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, loss: Tensor, measure: bool) -> dict[str, Tensor]:
        """Update the parameters. Where the loss or a gradient is not finite they stay as they are, on every process.

        Return what was measured, as scalars on the device: "gradient_norm" before clipping (with clipping, or when
        `measure` is set) and, with a loss scaler, "scale" and "skipped" (1 when this step was left out). Nothing here
        waits for the device."""
        out: dict[str, Tensor] = {}
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            for found in self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"].values():
                self._anywhere(found)
        if self.settings.clip or measure:
            out["gradient_norm"] = self._gradient_norm()
        if self.settings.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, out["gradient_norm"])
        if self.scaler is not None:
            scale = self.scaler._scale
            assert scale is not None, "no backward since the engine was made"
            before = scale.clone()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            out["scale"] = scale.clone()
            out["skipped"] = (scale < before).float()
        else:
            # Every way back from a loss leads through a bias or a BatchNorm's affine parameters, so their gradients
            # tell of another process's NaN; the fused optimiser reads the flag where it is.
            grads = [p.grad for p in self.vectors if p.grad is not None]
            signs = [loss.detach().float(), *(g.sum() for g in grads)]
            bad = ~torch.isfinite(torch.stack(signs)).all()
            self.optimizer.found_inf = self._anywhere(bad.float())  # type: ignore[attr-defined]
            self.optimizer.step()
        return out

    def _anywhere(self, flag: Tensor) -> Tensor:
        """Return whether `flag` [] is 1 on any process, given that gradients are equal on all."""
        return flag

    def _gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's state by name: NAME/exp_avg, NAME/exp_avg_sq and NAME/step of each parameter NAME that
        was updated before, and scaler/* of the loss scaler where there is one."""
        out = {}
        for name, parameter in self.updated.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = value
        return out | self._scaler_state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of an engine of the same module returned, `ZeroEngine` included.

        Parameters that `state` does not name begin anew."""
        for name, parameter in self.updated.items():
            if f"{name}/step" in state:
                made = {k: state[f"{name}/{k}"].to(parameter.device).clone() for k in MOMENTS}
                step = state[f"{name}/step"].to(parameter.device, torch.float32).clone()
                self.optimizer.state[parameter] = {"step": step, **made}
        self._load_scaler(state)

    def _scaler_state(self) -> dict[str, Tensor]:
        if self.scaler is None or self.scaler._scale is None:
            return {}
        found = self.scaler.state_dict().items()
        return {f"scaler/{key}": torch.tensor(value, dtype=torch.float64) for key, value in found}

    def _load_scaler(self, state: dict[str, Tensor]) -> None:
        if self.scaler is not None and "scaler/scale" in state:
            found = {k.removeprefix("scaler/"): float(v) for k, v in state.items() if k.startswith("scaler/")}
            whole = ("growth_interval", "_growth_tracker")
            self.scaler.load_state_dict({k: int(v) if k in whole else v for k, v in found.items()})

    def release(self) -> None:
        """Drop the wrapped modules, which must not outlive the process group that they use."""
        self.wrapped.clear()
