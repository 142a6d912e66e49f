"""The words in names of files and folders that say a split: one rule for shards, tables, folders and annotations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Name of a split -> the one that it means."""
NAMED_SPLITS = {**SPLIT_ALIASES, **dict.fromkeys(("eval", "evaluation"), "test")}
"""Word in a name -> split, as Hugging Face's datasets has them."""
SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(NAMED_SPLITS)})(?:set)?(?![^\W\d_])", re.IGNORECASE)
"""Such a word, between what are no letters."""


def split_in(names: Sequence[str]) -> str:
    """Return the split that a file's name says, or else the nearest folder's, by its first such word; "" for none.

    `names`: of the folders, the outermost first, and of the file."""
    found = (SPLIT_WORD.search(name) for name in reversed(names))
    return next((NAMED_SPLITS[word[1].lower()] for word in found if word), "")


def say_named_splits(named: Iterable[tuple[str, PurePath]]) -> list[str]:
    """Return a line for each split that names say: which, and by which name it can be seen; none where none does.

    `named`: each file or folder with its split, "" for none."""
    paths_of: dict[str, list[PurePath]] = {}
    for split, path in named:
        paths_of.setdefault(split, []).append(path)
    rest = paths_of.pop("", [])
    lines = [f"split {split} by the name of {_first_of(paths)}" for split, paths in paths_of.items()]
    return [*lines, f"no split in the name of {_first_of(rest)}"] if lines and rest else lines


def _first_of(paths: list[PurePath]) -> str:
    shortest = PurePath(*paths[0].parts[-2:])
    return f"{shortest}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
