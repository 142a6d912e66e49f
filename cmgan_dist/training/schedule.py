"""The learning rate over a run, as a factor of the rates in the config."""

from __future__ import annotations

import math

from cmgan_dist.config.fields import OptimConfig


def rate(config: OptimConfig, epoch: float, epochs: float) -> float:
    """Return the factor of the learning rates at `epoch` of a run of `epochs`, both of which may be fractions."""
    warmup = min(1.0, (epoch + 1e-9) / config.warmup_epochs) if config.warmup_epochs else 1.0
    if config.schedule == "halve":
        return warmup * 0.5 ** math.floor(epoch / config.halve_every + 1e-9)
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))
    return warmup
