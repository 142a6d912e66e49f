"""What keeps two data sets, or a run and a data set, apart though their kinds and sizes are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmgan_dist.data.folder import composed
from cmgan_dist.errors import shown

MADE = {
    "backbone": "backbone",
    "weights_sha256": "weights with the SHA-256",
    "image_size": "image size",
    "mean": "pixel mean",
    "std": "pixel deviation",
    "max_tokens": "max tokens",
    "pools": "text pools",
}
"""What decides the space in which features lie, as a manifest's details name it, and the words for it."""


def other_class(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """Return which class is the first of `theirs` that is another, such as ``class 2 is 'dog', not 'cat'``; "" where
    all are the same. Names are compared in their composed form."""
    mine, theirs = ([composed(name) for name in names] for names in (mine, theirs))
    if mine == theirs:
        return ""
    pairs = enumerate(zip(mine, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
    first = [names[at] if at < len(names) else "none" for names in (mine, theirs)]
    return f"class {at} is '{first[1]}', not '{first[0]}'"


def other_features(mine: object, theirs: object) -> str:
    """Return in what the making of `theirs` is another, such as ``text pools max, not cls``; "" where it is the same,
    or either side does not say it.

    `mine`, `theirs`: what the details of manifests say of the features of one modality."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for name, word in MADE.items():
            a, b = mine.get(name), theirs.get(name)
            if a and b and a != b:
                return f"{word} {_brief(b)}, not {_brief(a)}"
    return ""


def _brief(value: Any) -> str:
    """Return a value of the details for a message."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown(text if len(text) <= 60 else f"{text[:12]}…")
