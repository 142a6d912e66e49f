"""How far a score lies above what random items have: the same for the page, the API and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NEAR = 2.0
"""Standard deviations above chance from which on the best hit counts as near."""


def above_chance(score: float, chance: tuple[float, float]) -> float | None:
    """Return by how many standard deviations a score lies above chance; None where chance does not vary.

    `chance`: (mean, standard deviation) of scores between random items."""
    mean, deviation = chance
    return (score - mean) / deviation if deviation > 0 else None


def is_near(hits: Sequence[Any], chance: tuple[float, float]) -> bool:
    """Return whether the best hit is further above chance than chance itself reaches now and then."""
    scores = [above_chance(hit.score, chance) for hit in hits]
    return any(score is None or score >= NEAR for score in scores)
