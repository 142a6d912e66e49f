"""Settings by their dotted names, such as ``optim.generator_lr``."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cmgan_dist.config.fields import Config
from cmgan_dist.config.markers import Mutable, Range, Resumable, markers_of, range_of
from cmgan_dist.errors import BadInput


@dataclass(frozen=True)
class Setting:
    """What a field's annotation says about a setting."""

    kind: Any
    """Its type without markers."""
    range: Range | None
    """The numbers that it, or each of its elements, may be; None for a setting that holds no numbers."""
    resumable: bool
    """A resumed run may have another value."""
    mutable: bool
    """A run can go on with another value."""

    @property
    def number(self) -> type | None:
        """int or float for a setting that is a number or a tuple of numbers, else None."""
        kind = typing.get_args(self.kind)[0] if typing.get_origin(self.kind) is tuple else self.kind
        return kind if kind in (int, float) else None


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Give the fields of a dataclass, those of its sections included, by their dotted names behind `prefix`."""
    kinds, hints = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, hint, path = kinds[field.name], hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from walk(typing.cast(type, kind), path + ".")
        else:
            markers = markers_of(hint)
            yield path, Setting(kind, range_of(hint), Resumable in markers, Mutable in markers)


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return every setting of a Config by its dotted name, in the order of the fields."""
    return MappingProxyType(dict(walk(Config)))


def find_setting(path: str) -> Setting:
    """Return the setting with this dotted name. Raises BadInput with the nearest name for one that there is not."""
    known = settings()
    if path in known:
        return known[path]
    inside = next((name for name in known if name.startswith(path + ".")), None)
    if inside:
        raise BadInput(f"{path} is a section of the config: name a field in it, such as {inside}")
    close = difflib.get_close_matches(path, known, 1)
    raise BadInput(f"{path} is no config field: {f'did you mean {close[0]}?' if close else 'see train.py --help'}")


def get_value(config: object, path: str) -> Any:
    """Return the value of the setting with this dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy of `config` with other values of settings, given by dotted name. Raises BadInput for a name that
    is none."""
    changed = copy.deepcopy(config)
    for path, value in values.items():
        find_setting(path)
        *sections, leaf = path.split(".")
        setattr(functools.reduce(getattr, sections, changed), leaf, value)
    return changed
