"""What a setting's annotation says about it beside its type: ``Annotated[int, Range(1, 8), Resumable]``."""

from __future__ import annotations

import typing
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take, or that each element of it may take; both ends are included."""

    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        """Return whether `number` lies in the range; NaN does not."""
        return self.low <= number <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Marker:
    """A property that a setting has or has not."""

    name: str


Resumable = Marker("resumable")
"""A run that is resumed may have another value: neither model, data nor order hang on it."""
Mutable = Marker("mutable")
"""A run can go on with another value: no shape, order or optimiser state hangs on it. Population-based training changes
it between two validations."""


def markers_of(hint: object) -> tuple[object, ...]:
    """Return the markers of an annotation, those of a tuple's elements included."""
    own: tuple[object, ...] = getattr(hint, "__metadata__", ())
    return own + tuple(marker for part in typing.get_args(hint) for marker in markers_of(part))


def range_of(hint: object) -> Range | None:
    """Return the range that an annotation gives, None where it gives none."""
    return next((marker for marker in markers_of(hint) if isinstance(marker, Range)), None)
