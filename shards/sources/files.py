"""Files that a source names: their bytes, and names that a tar and a manifest can hold."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath

from cmgan_dist.data.folder import is_plain, is_unicode, read_file
from cmgan_dist.errors import BadInput, BadSample, shown
from shards.pairs import FileBytes, brief

MOST_CLASSES = 8
"""Names of classes that a line shows."""
MISSING = frozenset(("nan", "none", "null", "nil", "<na>", "n/a", "#n/a"))
"""What programs write for a value that is missing, in lower case."""


@dataclass(frozen=True)
class PlainFile(FileBytes):
    """The bytes of a file that is one: a pipe or a device is not waited for."""

    def read(self) -> bytes:
        """Return the bytes of the file. Raises BadSample when it is no regular file, too large, or cannot be read."""
        try:
            return read_file(self.path)
        except BadSample as error:
            raise BadSample(f"{self.named} {error}") from None


def plain_path(folder: str, path: str) -> str:
    """Return the one way in which a picture's path, relative to `folder` or not, is taken: without ``.``, ``x/..`` and
    ``//``, and relative where it lies below `folder`.

    ``x/..`` stays where x is a link to another place."""
    flat = posixpath.normpath(path)
    if ".." in path.split("/"):
        both = (os.path.realpath(posixpath.join(folder, each)) for each in (flat, path))
        flat = flat if len(set(both)) == 1 else str(PurePosixPath(path))
    top = posixpath.normpath(folder).rstrip("/") + "/"
    return flat.removeprefix(top)


def check_unicode(what: str, *texts: str) -> None:
    """Raise BadInput naming `what` when one of the texts cannot be written as UTF-8."""
    for text in texts:
        if not is_unicode(text):
            raise BadInput(f"{what} {brief(text)} is not UTF-8: rename it")


def check_names(what: str, *names: str) -> None:
    """Raise BadInput naming `what` when one of the names is not UTF-8 or holds control characters."""
    check_unicode(what, *names)
    for name in names:
        if not is_plain(name):
            raise BadInput(f"{what} {brief(name)} holds control characters: rename it")


def _is_invisible(c: str) -> bool:
    """Return whether a character changes nothing that one sees; joiners do, and tags, of which flags are made."""
    if c in "\u200c\u200d" or "\U000e0020" <= c <= "\U000e007f":
        return False
    return unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f" or c in "\u115f\u1160\u3164\uffa0"


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
                f"{what} '{shown(other)}' and '{shown(name)}' differ by characters that nobody sees: make them one"
            )


def say_missing(classes: list[str]) -> list[str]:
    """Return a line with the names of classes by which programs write a missing value, none where there are none."""
    words = [name for name in classes if name.lower() in MISSING]
    found = ", ".join(map(brief, words))
    return [f"classes {found}: a missing value is often written so, take such rows out if it is"] * bool(words)


def say_classes(classes: list[str]) -> list[str]:
    """Return a line with how many classes there are and the first of their names; none where there are none."""
    more = f" and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
    return [f"{len(classes)} classes: {', '.join(map(brief, classes[:MOST_CLASSES]))}{more}"] * bool(classes)
