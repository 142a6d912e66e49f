"""What trains a module: its optimiser, its loss scaler, its clipping, and its share of the collectives.

One engine owns each parameter. `Engine` is plain torch, with or without DDP around the module; `zero.ZeroEngine` is the
same under DeepSpeed ZeRO. Their states have one form, named by parameter, so that either loads the other's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state per parameter, beside its step count."""
FIRST_SCALE = 2.0**16
"""Loss scale that an fp16 run starts with, as torch.amp does."""


@dataclass(frozen=True)
class AdamSettings:
    """Of one engine."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float = 0.0
    clip: float = 0.0
    """Largest gradient norm; 0 is off."""
    fp16: bool = False
    """Scale losses, skip steps whose gradients overflow and lower the scale (Micikevicius et al., ICLR 2018)."""


class Engine:
    """One module, one optimiser."""

    def __init__(
        self, module: nn.Module, wrapped: dict[str, nn.Module], settings: AdamSettings, device: torch.device
    ) -> None:
        """`wrapped`: what losses call, by the part of `module` that they train ("" is all of it), with DDP around it
        where there are several processes."""
        self.module, self.wrapped, self.settings = module, wrapped, settings
        self.named_parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named_parameters.values())
        self.vectors = [p for p in self.parameters if p.ndim == 1]
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE) if settings.fp16 else None
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        betas = (s.beta1, s.beta2)
        return torch.optim.AdamW(self.parameters, lr=s.lr, betas=betas, weight_decay=s.weight_decay, fused=True)

    def set_rate(self, factor: float) -> None:
        """The learning rate from here on, as a multiple of the first one."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor

    # ------------------------------------------------------------------------------------------ one update

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch of an update; gradients are reduced in the `last` one."""
        with contextlib.ExitStack() as stack:
            for part in self.wrapped.values():
                if isinstance(part, DistributedDataParallel) and not last:
                    stack.enter_context(part.no_sync())
            yield

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, this micro-batch's part of the update's mean."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, loss: Tensor, measure: bool) -> dict[str, Tensor]:
        """Update the parameters. Where the loss or a gradient is not finite they stay as they are, on every process.

        Returns what was measured: gradient_norm (with clipping, or when `measure` is set), with a scaler scale and
        skipped (1 when this step was left out). Nothing here waits for the device."""
        out: dict[str, Tensor] = {}
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.settings.clip or measure:
            largest = self.settings.clip or float("inf")
            out["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, largest)
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
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        return out

    # ------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """NAME/exp_avg, NAME/exp_avg_sq and NAME/step of every parameter that was updated, scaler/*."""
        out = {}
        for name, parameter in self.named_parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = value
        if self.scaler is not None and self.scaler._scale is not None:
            for key, value in self.scaler.state_dict().items():
                out[f"scaler/{key}"] = torch.tensor(value, dtype=torch.float64)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of any engine of this module gave."""
        for name, parameter in self.named_parameters.items():
            if f"{name}/step" in state:
                made = {k: state[f"{name}/{k}"].to(parameter.device).clone() for k in MOMENTS}
                step = state[f"{name}/step"].to(parameter.device, torch.float32).clone()
                self.optimizer.state[parameter] = {"step": step, **made}
        if self.scaler is not None and "scaler/scale" in state:
            found = {k.removeprefix("scaler/"): float(v) for k, v in state.items() if k.startswith("scaler/")}
            whole = ("growth_interval", "_growth_tracker")
            self.scaler.load_state_dict({k: int(v) if k in whole else v for k, v in found.items()})

    def release(self) -> None:
        """Let go of what the process group knows of: nothing wrapped may outlive it."""
        self.wrapped.clear()
