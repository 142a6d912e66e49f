"""Files that a source names: their bytes, and names that a tar and a manifest can hold."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import PurePosixPath

from cmgan_dist.data.folder import is_plain, is_unicode, read_file
from cmgan_dist.errors import BadInput, BadSample
from shards.pairs import FileBytes, brief


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
