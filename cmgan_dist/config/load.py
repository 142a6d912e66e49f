"""A config from YAML and back, and what can be said against it before anything is read."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from cmgan_dist.config.fields import Config, micro_batch
from cmgan_dist.config.presets import preset
from cmgan_dist.errors import BadInput

_BOUNDS: dict[str, tuple[float, float]] = {
    "stream.global_batch": (2, 1e9),
    "stream.logical_streams": (0, 1e6),
    "stream.window": (1, 1e9),
    "stream.workers": (0, 1024),
    "stream.max_bad_share": (0, 1),
    "stream.cache_gib": (1e-6, 1e9),
    "stream.retries": (0, 100),
    "stream.timeout_s": (0.01, 1e5),
    "model.image.image_size": (8, 4096),
    "model.text.max_tokens": (1, 1e6),
    "model.hidden_dim": (1, 1e6),
    "model.common_dim": (1, 1e6),
    "model.discriminator_dim": (1, 1e6),
    "model.input_dropout": (0, 0.999),
    "model.dropout": (0, 0.999),
    "loss.intra": (0, 1e9),
    "loss.inter": (0, 1e9),
    "loss.classification": (0, 1e9),
    "loss.contrastive": (0, 1e9),
    "loss.class_contrastive": (0, 1e9),
    "loss.temperature": (1e-4, 1e4),
    "loss.class_temperature": (1e-4, 1e4),
    "loss.label_smoothing": (0, 0.999),
    "loss.r1": (0, 1e9),
    "loss.r1_every": (1, 1e9),
    "loss.gradient_penalty": (0, 1e9),
    "optim.generator_lr": (0, 1e3),
    "optim.discriminator_lr": (0, 1e3),
    "optim.generator_beta1": (0, 0.99999),
    "optim.discriminator_beta1": (0, 0.99999),
    "optim.beta2": (0, 0.9999999),
    "optim.weight_decay": (0, 1e3),
    "optim.generator_steps": (1, 1000),
    "optim.halve_every": (1e-6, 1e9),
    "optim.warmup_epochs": (0, 1e9),
    "optim.clip": (0, 1e9),
    "optim.accumulate": (1, 1e6),
    "train.epochs": (1e-9, 1e9),
    "train.seed": (0, 2**31 - 1),
    "train.ema": (0, 0.999999),
    "train.val_every": (0, 1e9),
    "train.save_every": (1e-9, 1e9),
    "train.keep": (1, 1e6),
    "train.log_every": (1, 1e9),
    "train.threads": (0, 4096),
    "train.timeout_s": (1, 1e6),
    "train.trace": (0, 1e6),
    "eval.batch": (1, 1e9),
}


def validate(config: Config) -> Config:
    """Check what a config alone can tell. Raises BadInput naming the field; returns `config`."""
    for path, (low, high) in _BOUNDS.items():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        if not (low <= value <= high):  # also false for NaN
            raise BadInput(f"{path} is {value}, expected {low:g} to {high:g}")
    batch, parts = config.stream.global_batch, config.optim.accumulate
    if batch % parts or batch // parts < 2:
        raise BadInput(
            f"optim.accumulate is {parts}: stream.global_batch {batch} does not fall into such parts of 2 or more"
        )
    streams, micro = config.stream.logical_streams, micro_batch(config)
    if streams and micro % streams:
        raise BadInput(
            f"stream.logical_streams is {streams} and does not divide the {micro} samples of stream.global_batch"
            f"{f' / optim.accumulate {parts}' if parts > 1 else ''}"
        )
    if config.stream.val_split == config.stream.train_split:
        raise BadInput(f"stream.val_split and stream.train_split are both '{config.stream.val_split}': use two splits")
    return config


def _convert(value: Any, kind: Any, path: str) -> Any:
    """`value` from YAML as the annotated type `kind`. Raises BadInput naming `path`."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _from_dict(typing.cast(type, kind), value, path + ".")
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise BadInput(f"{path} is {value!r}, expected one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BadInput(f"{path} is {value!r}, expected a list")
        return tuple(_convert(v, typing.get_args(kind)[0], path) for v in value)
    if origin is types.UnionType:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise BadInput(f"{path} is {value!r}, expected {kind.__name__}")


def _from_dict(cls: type, record: Any, prefix: str) -> Any:
    if not isinstance(record, dict):
        raise BadInput(f"{prefix.rstrip('.') or 'the config'} is {record!r}, expected a mapping")
    hints = typing.get_type_hints(cls)
    for key in record:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise BadInput(f"unknown config field {prefix}{key}: {hint}")
    return cls(**{k: _convert(v, hints[k], prefix + k) for k, v in record.items()})


def to_yaml(config: Config) -> str:
    """The whole config as YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def from_yaml(text: str, where: str, base: Callable[[str], Config]) -> Config:
    """Parse a (partial) config; fields that are absent keep the values of the preset that it names.

    `base` gives a preset's Config by name. Raises BadInput naming the file and the field."""
    try:
        record = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"{where} is not YAML ({' '.join(str(error).split())}): mend it") from None
    try:
        if not isinstance(record, dict):
            raise BadInput("it is not a mapping of fields")
        start = dataclasses.asdict(base(str(record.get("preset", "reference"))))
        return typing.cast(Config, _from_dict(Config, _merge(start, record), ""))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def load_config(path: str | Path) -> Config:
    """Read a config file; fields that it leaves out come from the preset that it names.

    Raises BadInput naming the file and the field."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"config file {path} does not exist")
    return from_yaml(path.read_text(encoding="utf-8"), str(path), preset)
