"""What is searched: a plain dict from config paths to ranges.

    {"log": [low, high]}        a number, even on a logarithmic scale
    {"uniform": [low, high]}    a number
    {"int": [low, high]}        a whole number, both ends included
    [a, b, c]                   one of these

`--space FILE` replaces it by a YAML file of the same form.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import validate
from cmgan_dist.config.paths import find_setting, get_value, with_values
from cmgan_dist.config.safe_yaml import parse_yaml, read_text, shown_value
from cmgan_dist.errors import BadInput

Space = dict[str, Any]

SPACE: Space = {
    "optim.generator_lr": {"log": [2e-4, 2e-2]},
    "optim.discriminator_lr": {"log": [1e-4, 1e-2]},
    "optim.generator_steps": {"int": [1, 3]},
    "loss.adversarial": ["bce", "hinge"],
    "loss.mismatch": ["reference", "conditional"],
    "loss.intra": {"uniform": [0.0, 1.0]},
    "loss.inter": {"uniform": [0.0, 3.0]},
    "loss.classification": {"log": [0.03, 3.0]},
    "loss.contrastive": {"log": [0.03, 3.0]},
    "loss.temperature": {"log": [0.03, 0.5]},
    "loss.class_contrastive": {"log": [0.1, 3.0]},
    "loss.class_temperature": {"log": [0.05, 0.5]},
    "model.dropout": {"uniform": [0.0, 0.7]},
    "model.input_dropout": {"uniform": [0.0, 0.7]},
}
"""generator_steps is the D:G ratio: updates of the generator per update of each discriminator."""

MOST_TRIED = 100
"""Whole numbers of a range of which each is tried, as one between the ends may not do."""
KINDS = ("log", "uniform", "int")
SECTIONS = ("stream", "model", "loss", "optim", "train")
FIXED = ("train.epochs", "train.val_every", "train.save_every", "train.keep", "train.threads", "train.seed")
"""What the search sets itself."""


def mutable(path: str) -> bool:
    """Return whether a run can go on with another value of this setting, as population-based training asks."""
    return find_setting(path).mutable


def load_space(file: str) -> Space:
    """Return the space in a YAML file, or SPACE when `file` is "". Raises BadInput naming the file."""
    if not file:
        return copy.deepcopy(SPACE)
    where = f"--space {file}"
    record = parse_yaml(read_text(Path(file), where), where)
    if not isinstance(record, dict) or not record:
        raise BadInput(f"{where} is not a mapping from config paths to ranges: see tune/space.py")
    return record


def check_space(space: Space, base: Config) -> Space:
    """Return `space` with numbers as numbers. Raises BadInput naming the entry that is no range or no field of
    `base`."""
    out: Space = {}
    for path, spec in space.items():
        where = f"the search space's {path}"
        try:
            kind = find_setting(str(path)).kind
        except BadInput as error:
            raise BadInput(f"the search space: {error}") from None
        current = get_value(base, path)
        if path in FIXED or path.split(".")[0] not in SECTIONS:
            raise BadInput(f"{where} cannot be searched: it is set by the search itself")
        if isinstance(spec, list):
            if not spec:
                raise BadInput(f"{where} is an empty list: name its values")
            tried, out[path] = spec, spec
        else:
            if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
                raise BadInput(
                    f"{where} is {shown_value(spec)}, expected a list or one of {', '.join(KINDS)} with [low, high]"
                )
            (name, ends), *_ = spec.items()
            out[path] = {name: _range(where, name, ends, whole=kind is int)}
            tried = list(_tried(*out[path][name]))
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        for value in tried:
            if choices and value not in choices:
                raise BadInput(f"{where} has {shown_value(value)}, expected one of {', '.join(map(str, choices))}")
            numeric = isinstance(current, int | float) and not isinstance(current, bool)
            if numeric != (isinstance(value, int | float) and not isinstance(value, bool)):
                raise BadInput(f"{where} has {shown_value(value)}, expected a value like {current!r}")
            try:
                validate(with_values(base, {path: value}))
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
    return out


def _range(where: str, name: str, ends: Any, *, whole: bool) -> list[Any]:
    """Return [low, high] of a range of the kind `name` as numbers. Raises BadInput when they are none, or no range for
    a setting that is a `whole` number."""
    try:
        low, high = (float(x) for x in ends)
        good = not any(isinstance(x, bool) for x in ends)
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise BadInput(f"{where} is {shown_value(ends)}, expected two numbers [low, high]")
    if low >= high or (name == "log" and low <= 0):
        raise BadInput(f"{where} goes from {low:g} to {high:g}: expected low < high, and low > 0 for log")
    if whole and name != "int":
        raise BadInput(f"{where} is a whole number: use int, or a list")
    if name != "int":
        return [low, high]
    if not (low.is_integer() and high.is_integer()):
        raise BadInput(f"{where} goes from {low:g} to {high:g}: int takes whole numbers")
    return [int(low), int(high)]


def _tried(low: float, high: float) -> Sequence[float]:
    """Return the values of a range that are tried: all where they are few whole numbers, else its ends."""
    few = isinstance(low, int) and isinstance(high, int) and high - low < MOST_TRIED
    return range(int(low), int(high) + 1) if few else (low, high)


def outside_of(space: Space, values: dict[str, Any]) -> list[str]:
    """Return the paths whose value lies outside the space."""
    out = []
    for path, spec in space.items():
        if isinstance(spec, list):
            inside = values[path] in spec
        else:
            ((_, (low, high)),) = spec.items()
            inside = low <= values[path] <= high
        if not inside:
            out.append(path)
    return out


def clip(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with numbers moved to the nearest end of their range; PBT multiplies without looking at it."""
    out = dict(values)
    for path, spec in space.items():
        if isinstance(spec, dict) and path in out:
            ((name, (low, high)),) = spec.items()
            out[path] = min(max(out[path], low), high)
            if name == "int":
                out[path] = round(out[path])
    return out


def domains(space: Space) -> dict[str, Any]:
    """Return the space in Ray Tune's terms."""
    from ray.tune import choice, loguniform, randint, uniform

    out: dict[str, Any] = {}
    for path, spec in space.items():
        if isinstance(spec, list):
            out[path] = choice(spec)
            continue
        ((name, (low, high)),) = spec.items()
        out[path] = (
            {"log": loguniform, "uniform": uniform}[name](low, high) if name != "int" else randint(low, high + 1)
        )
    return out


def draw_settings(space: Space, count: int, seed: int, start: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `count` settings: `start`, and others that are drawn from the space, the same for the same seed."""
    import numpy as np

    draw, drawn = np.random.RandomState(seed), domains(space)
    others = [{path: domain.sample(random_state=draw) for path, domain in drawn.items()} for _ in range(count - 1)]
    return [start, *(_plain(values) for values in others)]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON has them: numpy's numbers as Python's."""
    return {path: value.item() if hasattr(value, "item") else value for path, value in values.items()}
