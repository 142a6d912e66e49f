"""Names of classes: which are none, which are the same to whoever reads them, and what is said of them; and words
that programs write for what is missing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

from cmgan_dist.errors import BadInput, shown
from shards.pairs import brief
from shards.sources.files import check_names

MOST_CLASSES = 8
"""Names of classes that a line shows."""
MISSING = frozenset(("nan", "none", "null", "nil", "<na>", "n/a", "#n/a"))
"""What programs write for a value that is missing, in lower case."""
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Fillers, variation selectors and other characters without a shape, beside those of Unicode's category Cf."""


def _is_invisible(c: str) -> bool:
    """Return whether a character changes nothing that one sees; joiners do, and tags, of which flags are made."""
    if c in "\u200c\u200d" or "\U000e0020" <= c <= "\U000e007f":
        return False
    return unicodedata.category(c) == "Cf" or bool(_UNSEEN.match(c))


def _spelt(name: str) -> str:
    """Return a name in which what nobody sees, and spaces but the usual one, are escaped."""
    odd = (c for c in name if _is_invisible(c) or (c.isspace() and c != " "))
    return shown(name.translate({ord(c): ascii(c)[1:-1] for c in odd}))


def check_classes(what: str, classes: list[str]) -> None:
    """Raise BadInput naming `what` as `check_names` does, and when two names differ only by what nobody sees."""
    check_names(what, *classes)
    first: dict[str, str] = {}
    for name in classes:
        visible = " ".join("".join(c for c in name if not _is_invisible(c)).split())
        if not visible:
            raise BadInput(f"{what} '{shown(name)}' has nothing that one sees: rename it")
        other = first.setdefault(visible, name)
        if other != name:
            raise BadInput(
                f"{what} '{_spelt(other)}' and '{_spelt(name)}' differ by characters that nobody sees: make them one"
            )


def check_spelling(classes: list[str]) -> None:
    """Raise BadInput when two class names are the same number."""
    first: dict[Decimal, str] = {}
    for name in classes:
        try:
            number = Decimal(name)
        except InvalidOperation:
            continue
        if number.is_finite() and first.setdefault(number, name) != name:
            pair = f"'{brief(first[number])}' and '{brief(name)}'"
            raise BadInput(f"labels {pair} are the same number: write it in one way")


def class_order(name: str) -> tuple[int, str]:
    """Return a sort key that puts numbers by value, before names."""
    return (int(name), name) if name.isdecimal() and len(name) < 100 else (1 << 62, name)


def count_missing(texts: Iterable[str]) -> int:
    """Return how many texts are words by which programs write a missing value."""
    return sum(text.lower() in MISSING for text in texts)


def say_missing_texts(count: int) -> list[str]:
    """Return a line with how many texts are such words, none for 0."""
    return [f"texts that are nan, null or the like: {count}; take such rows out if values are missing"] * bool(count)


def say_missing(classes: list[str]) -> list[str]:
    """Return a line with the names of classes by which programs write a missing value, none where there are none."""
    words = [name for name in classes if name.lower() in MISSING]
    found = ", ".join(map(brief, words))
    return [f"classes {found}: a missing value is often written so, take such rows out if it is"] * bool(words)


def first_names(names: list[str], most: int = MOST_CLASSES) -> str:
    """Return the first of some names, at most so many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(brief, names[:most]))}{more}"


def say_classes(classes: list[str]) -> list[str]:
    """Return a line with how many classes there are and the first of their names; none where there are none."""
    return [f"{len(classes)} classes: {first_names(classes)}"] * bool(classes)
