"""A config from YAML and back, and what can be said against it before anything is read."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from cmgan_dist.config.commands import program_name
from cmgan_dist.config.fields import Config, micro_batch
from cmgan_dist.config.paths import Setting, find_setting, get_value, settings
from cmgan_dist.config.presets import preset
from cmgan_dist.config.safe_yaml import parse_yaml, read_text, shown_value
from cmgan_dist.errors import BadInput, refuse_url

LOSS_TERMS = ("intra", "inter", "modality", "classification", "contrastive", "class_contrastive")
"""Weights of the terms that train the generator."""
TEST_SPLIT = "test"
"""The split that has no part in training, neither for updates nor to choose the best checkpoint."""


def validate(config: Config) -> Config:
    """Check what a config alone can tell and return it. Raises BadInput naming the field."""
    _check_sections(Config, config, "")
    for path, setting in settings().items():
        check_numbers(path, get_value(config, path), setting)
    _from_dict(Config, dataclasses.asdict(config), "")  # types and choices, as of a config from a file
    preset(config.preset)
    _check_batch(config)
    _check_splits(config)
    if not any(getattr(config.loss, name) for name in LOSS_TERMS):
        names = ", ".join(f"loss.{name}" for name in LOSS_TERMS)
        raise BadInput(f"no loss term trains the generator: set one of {names} above 0")
    if config.train.compile and (config.loss.r1 or config.loss.adversarial == "wgan-gp"):
        name = "loss.r1" if config.loss.r1 else "loss.adversarial=wgan-gp"
        raise BadInput(
            f"train.compile is on with {name}, which takes gradients of gradients, and torch.compile has none: set "
            "train.compile to false"
        )
    if config.train.shard_backbones:
        _check_sharding(config)
    if not config.model.text.kernel_sizes:
        raise BadInput("model.text.kernel_sizes is empty: name the width of one convolution or more")
    return config


def _check_sections(kind: type, section: object, path: str) -> None:
    """Raises BadInput where a config or a section of it is another thing, or has an attribute that is no field: it was
    set by a name that is not quite right, and would do nothing."""
    if not isinstance(section, kind):
        raise BadInput(f"{path or 'config'} is {shown_value(section)}: give a {kind.__name__}, as preset() makes it")
    for name in sorted(vars(section).keys() - {field.name for field in dataclasses.fields(kind)}):
        find_setting(f"{path}.{name}".lstrip("."))  # it is none
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            _check_sections(typing.cast(type, hint), getattr(section, name), f"{path}.{name}".lstrip("."))


def check_places(config: Config) -> None:
    """Raises BadInput when the config names no data or no output, or a URL as output."""
    for name in ("data", "output"):
        if not getattr(config, name):
            raise BadInput(f"--{name} is missing: name a folder, see {program_name('launchers/train.py')} --help")
    refuse_url(config.output, "--output")


def check_numbers(path: str, value: Any, setting: Setting) -> None:
    """Raises BadInput for a number, or an element of a tuple, that is of another type or outside its range."""
    if setting.number is None or setting.range is None:
        return
    several = isinstance(value, list | tuple)
    for number in value if several else [value]:
        says = f"{path} {'has' if several else 'is'} {shown_value(number)}, expected"
        if isinstance(number, bool) or not isinstance(number, int if setting.number is int else int | float):
            raise BadInput(f"{says} {'a whole' if setting.number is int else 'a'} number from {setting.range}")
        if number not in setting.range:
            raise BadInput(f"{says} {setting.range}")


def _check_batch(config: Config) -> None:
    """Raises BadInput when a global batch does not fall into equal parts and logical streams."""
    batch, parts = config.stream.global_batch, config.optim.accumulate
    if batch % parts or batch // parts < 2:
        raise BadInput(
            f"optim.accumulate is {parts}: stream.global_batch {batch} does not fall into such parts of 2 or more"
        )
    streams, micro = config.stream.logical_streams, micro_batch(config)
    if streams and micro % streams:
        raise BadInput(
            f"stream.logical_streams is {streams} and does not divide the {micro} samples of stream.global_batch"
            f"{f' / optim.accumulate {parts}' if parts > 1 else ''}: set it to {math.gcd(streams, micro)} or another "
            "divisor of theirs, or to 0"
        )


def _check_sharding(config: Config) -> None:
    """Raises BadInput when there is no trained backbone that can be sharded."""
    image, text = config.model.image, config.model.text
    if not (text.name == "cnn" or any(each.trainable and each.name != "features" for each in (image, text))):
        raise BadInput(
            "train.shard_backbones is on and no backbone is trained: set model.image.trainable or "
            "model.text.trainable to true, or train.shard_backbones to false"
        )
    if config.train.compile:
        raise BadInput("train.compile is on with train.shard_backbones, which it cannot take: set one to false")


def _check_splits(config: Config) -> None:
    """Raises BadInput unless training and validation use two splits, neither of them the test split."""
    train, val = config.stream.train_split, config.stream.val_split
    for name, split, usual in (("train_split", train, "train"), ("val_split", val, "val")):
        if split == TEST_SPLIT:
            raise BadInput(f"stream.{name} is 'test', and the test split has no part in training: use '{usual}'")
    if val == train:
        raise BadInput(f"stream.val_split and stream.train_split are both '{val}': use two splits")


def _convert(value: Any, kind: Any, path: str) -> Any:
    """Return `value` from YAML as the annotated type `kind`. Raises BadInput naming `path`."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _from_dict(typing.cast(type, kind), value, path + ".")
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise BadInput(f"{path} is {shown_value(value)}, expected one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BadInput(f"{path} is {shown_value(value)}, expected a list")
        return tuple(_convert(v, typing.get_args(kind)[0], path) for v in value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise BadInput(f"{path} is {shown_value(value)}, expected {kind.__name__}")


def _from_dict(cls: type, record: Any, prefix: str) -> Any:
    """Return the dataclass `cls` with the fields in `record`. Raises BadInput naming the field below `prefix`."""
    if not isinstance(record, dict):
        raise BadInput(f"{prefix.rstrip('.')} is {shown_value(record)}, expected a mapping")
    hints = typing.get_type_hints(cls)
    for key in record:
        if key not in hints:
            key = " ".join(key.split())[:80] if isinstance(key, str) else shown_value(key)
            close = difflib.get_close_matches(key, hints, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise BadInput(f"unknown config field {prefix}{key}: {hint}")
    return cls(**{k: _convert(v, hints[k], prefix + k) for k, v in record.items()})


def to_yaml(config: Config) -> str:
    """Return the whole config as YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def from_yaml(text: str, where: str) -> Config:
    """Return the config that a YAML text describes; fields that it leaves out come from the preset that it names.

    Raises BadInput naming the file, which is `where`, and the field."""
    record = parse_yaml(text, where) or {}
    try:
        if not isinstance(record, dict):
            raise BadInput("it is not a mapping of fields")
        name = record.get("preset", "reference")
        start = dataclasses.asdict(preset(name if isinstance(name, str) else shown_value(name)))
        return typing.cast(Config, _from_dict(Config, _merge(start, record), ""))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def load_config(path: str | Path) -> Config:
    """Return the config in a YAML file; fields that it leaves out come from the preset that it names.

    Raises BadInput naming the file and the field."""
    where = f"config file {path}"
    return from_yaml(read_text(Path(path), where), where)
