"""RUN/evaluation.json as a report reads it: whoever wrote it, what is not of its kind is refused before it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput
from cmgan_dist.files import read_bytes
from cmgan_dist.retrieval.evaluate import parse_record

RECALL_POINTS = 101
"""Values of each curve of precision over recall, at 0, 0.01, ..., 1."""


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the object in evaluation.json, empty where there is no such file.

    Raises BadInput naming the file and the part that is not of its kind."""
    if not path.is_file():
        return {}
    try:
        evaluation = parse_record(read_bytes(path))
    except ValueError as error:
        raise BadInput(f"{path} is not as it was written ({error}): evaluate the run again") from None
    names = evaluation.get("classes")
    classes = len(names) if isinstance(names, list) else 0
    for name, is_right in _PARTS.items():
        if evaluation.get(name) and not is_right(evaluation[name], classes):
            raise BadInput(f"{path} has '{name}' that no evaluation writes: evaluate the run again")
    return evaluation


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_metrics(value: Any, classes: int) -> bool:
    """Return whether these are metrics by name: numbers, a curve of precision, or a number for each class.

    What stands beside them, such as the settings of a baseline, has no "/" in its name."""

    def is_right(name: str, one: Any) -> bool:
        if not isinstance(one, list):
            return _is_number(one)
        length = {"precision": RECALL_POINTS, "map_per_class": classes or len(one)}.get(name.split("/")[0], len(one))
        return len(one) == length and all(map(_is_number, one))

    return isinstance(value, dict) and all(is_right(k, one) for k, one in value.items() if "/" in k)


def _is_table(value: Any, classes: int) -> bool:
    return isinstance(value, dict) and all(_is_metrics(one, classes) for one in value.values())


def _is_points(value: Any, classes: int) -> bool:
    """Return whether these are curves by name, each of points (MAP, recall)."""

    def is_point(point: Any) -> bool:
        return isinstance(point, list) and len(point) >= 2 and all(isinstance(x, int | float) for x in point[:2])

    curves = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(curve, list) and all(map(is_point, curve)) for curve in curves)


def _is_names(value: Any, classes: int) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_PARTS: dict[str, Callable[[Any, int], bool]] = {
    "classes": _is_names,
    "metrics": _is_metrics,
    "ends": _is_table,
    "baselines": _is_table,
    "frontiers": _is_points,
    "trained_features": _is_names,
}
