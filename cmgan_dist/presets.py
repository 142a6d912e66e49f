"""Presets: functions that return a full Config. ``--preset NAME`` starts from one, overrides go on top."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from cmgan_dist.config import Config, from_yaml
from cmgan_dist.errors import BadInput


def reference() -> Config:
    """The authors' published recipe to the letter, on precomputed features (see docs/reference.md)."""
    config = Config(preset="reference")
    config.stream.sampling = "balanced"
    return config


def smoke() -> Config:
    """A few seconds on CPU: small networks, two epochs. To see that everything is in place."""
    config = Config(preset="smoke")
    config.model.hidden_dim = config.model.common_dim = config.model.discriminator_dim = 64
    config.optim.generator_steps = 1
    config.train.epochs = 2
    config.train.val_every = config.train.save_every = 1
    return config


PRESETS: dict[str, Callable[[], Config]] = {f.__name__.replace("_", "-"): f for f in (reference, smoke)}


def preset(name: str) -> Config:
    """The Config of preset `name`. Raises BadInput with the names there are."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise BadInput(f"unknown preset '{name}': {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[name]()


def load_config(path: str | Path) -> Config:
    """Read a config file; fields that it leaves out come from the preset that it names.

    Raises BadInput naming the file and the field."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"config file {path} does not exist")
    return from_yaml(path.read_text(encoding="utf-8"), str(path), preset)
