"""What a score means: how far above random items, and whether anything is near. The same for the page, the API and the
command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def above_chance(score: float, chance: tuple[float, float]) -> float | None:
    """Return by how many standard deviations a score lies above chance; None where chance does not vary.

    `chance`: (mean, standard deviation) of scores between random items."""
    mean, deviation = chance
    return (score - mean) / deviation if deviation > 0 else None


def is_near(hits: Sequence[Any], near: float) -> bool:
    """Return whether the best hit is as near as what 9 in 10 of the index's own items find, `near`.

    Random items are no measure of that: the best of thousands always lies far above them."""
    return any(hit.score >= near for hit in hits)
