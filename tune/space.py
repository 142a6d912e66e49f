"""What is searched: a plain dict from config paths to ranges.

    {"log": [low, high]}        a number, even on a logarithmic scale
    {"uniform": [low, high]}    a number
    {"int": [low, high]}        a whole number, both ends included
    [a, b, c]                   one of these

`--space FILE` replaces it by a YAML file of the same form.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml

from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import validate
from cmgan_dist.errors import BadInput

Space = dict[str, Any]

SPACE: Space = {
    "optim.generator_lr": {"log": [2e-4, 2e-2]},
    "optim.discriminator_lr": {"log": [1e-4, 1e-2]},
    "optim.generator_steps": {"int": [1, 3]},
    "loss.adversarial": ["bce", "hinge"],
    "loss.mismatch": ["reference", "conditional"],
    "loss.intra": {"log": [0.01, 1.0]},
    "loss.inter": {"log": [0.01, 3.0]},
    "loss.classification": {"log": [0.03, 3.0]},
    "loss.contrastive": {"log": [0.03, 3.0]},
    "loss.temperature": {"log": [0.03, 0.5]},
    "loss.class_contrastive": {"log": [0.1, 3.0]},
    "loss.class_temperature": {"log": [0.05, 0.5]},
    "model.dropout": {"uniform": [0.0, 0.7]},
    "model.input_dropout": {"uniform": [0.0, 0.7]},
}
"""generator_steps is the D:G ratio: updates of the generator per update of each discriminator."""

KINDS = ("log", "uniform", "int")
SECTIONS = ("stream", "model", "loss", "optim", "train")
FIXED = ("train.epochs", "train.val_every", "train.save_every", "train.keep", "train.threads", "train.seed")
"""What the search sets itself."""


def mutable(path: str) -> bool:
    """Whether a run can go on with another value: no shape, no order and no optimiser state hangs on it."""
    return path.startswith("loss.") or path in (
        "optim.generator_lr",
        "optim.discriminator_lr",
        "optim.generator_steps",
        "model.dropout",
        "model.input_dropout",
    )


def load_space(file: str) -> Space:
    """The space in a YAML file, or SPACE when `file` is "". Raises BadInput naming the file."""
    if not file:
        return copy.deepcopy(SPACE)
    path = Path(file)
    if not path.is_file():
        raise BadInput(f"--space {file} does not exist")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"--space {file} is not YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(record, dict) or not record:
        raise BadInput(f"--space {file} is not a mapping from config paths to ranges: see tune/space.py")
    return record


def get_value(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def apply_values(base: Config, values: dict[str, Any]) -> Config:
    """A copy of `base` with dotted fields replaced."""
    config = copy.deepcopy(base)
    for path, value in values.items():
        section, _, leaf = path.rpartition(".")
        setattr(get_value(config, section), leaf, value)
    return config


def check_space(space: Space, base: Config) -> Space:
    """`space` with numbers as numbers. Raises BadInput naming the entry that is no range or no field of `base`."""
    out: Space = {}
    for path, spec in space.items():
        where = f"the search space's {path}"
        current, kind = _field(path, base)
        if path in FIXED or path.split(".")[0] not in SECTIONS:
            raise BadInput(f"{where} cannot be searched: it is set by the search itself")
        if isinstance(spec, list):
            if not spec:
                raise BadInput(f"{where} is an empty list: name its values")
            ends, out[path] = spec, spec
        else:
            if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
                raise BadInput(f"{where} is {spec!r}, expected a list or one of {', '.join(KINDS)} with [low, high]")
            (name, ends), *_ = spec.items()
            try:
                low, high = (float(x) for x in ends)
            except (TypeError, ValueError):
                raise BadInput(f"{where} is {spec!r}, expected two numbers [low, high]") from None
            if low >= high or (name == "log" and low <= 0):
                raise BadInput(f"{where} goes from {low:g} to {high:g}: expected low < high, and low > 0 for log")
            if kind is int and name != "int":
                raise BadInput(f"{where} is a whole number: use int, or a list")
            ends = [int(low), int(high)] if name == "int" else [low, high]
            out[path] = {name: ends}
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        for value in ends:
            if choices and value not in choices:
                raise BadInput(f"{where} has {value!r}, expected one of {', '.join(map(str, choices))}")
            numeric = isinstance(current, int | float) and not isinstance(current, bool)
            if numeric != (isinstance(value, int | float) and not isinstance(value, bool)):
                raise BadInput(f"{where} has {value!r}, expected a value like {current!r}")
            try:
                validate(apply_values(base, {path: value}))
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
    return out


def _field(path: str, base: Config) -> tuple[Any, Any]:
    """(value in `base`, annotated type) of a dotted path. Raises BadInput with the nearest name."""
    node: Any = base
    *sections, leaf = path.split(".")
    for at, part in enumerate([*sections, leaf]):
        names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            close = difflib.get_close_matches(part, names, 1)
            hint = f"did you mean {'.'.join([*sections[:at], close[0]])}?" if close else "see config.py"
            raise BadInput(f"the search space names {path}, which is no config field: {hint}")
        kind = typing.get_type_hints(type(node))[part]
        node = getattr(node, part)
    if dataclasses.is_dataclass(node):
        raise BadInput(f"the search space names {path}, which is a section: name a field in it")
    return node, kind


def outside_of(space: Space, values: dict[str, Any]) -> list[str]:
    """Paths whose value lies outside the space."""
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
    """`values` with numbers moved to the nearest end of their range; PBT multiplies without looking at it."""
    out = dict(values)
    for path, spec in space.items():
        if isinstance(spec, dict) and path in out:
            ((name, (low, high)),) = spec.items()
            out[path] = min(max(out[path], low), high)
            if name == "int":
                out[path] = round(out[path])
    return out


def domains(space: Space) -> dict[str, Any]:
    """The space in Ray Tune's terms."""
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
