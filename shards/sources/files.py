"""Files that a source names: their bytes, and names that a tar and a manifest can hold."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from cmgan_dist.data.folder import is_plain, is_unicode, read_file
from cmgan_dist.errors import BadInput, BadSample, shown
from cmgan_dist.jobs.staging import staging
from shards.pairs import FileBytes, FileSlice


@dataclass(frozen=True)
class PlainFile(FileBytes):
    """The bytes of a file that is one: a pipe or a device is not waited for."""

    def read(self) -> bytes:
        """Return the bytes of the file. Raises BadSample when it is no regular file, too large, or cannot be read."""
        try:
            return read_file(self.path)
        except BadSample as error:
            raise BadSample(f"{self.path} {error}") from None


class Spool:
    """Pictures that a source holds inside, kept in one file beside the output until they are packed."""

    def __init__(self, output: Path) -> None:
        """`output`: the folder that is packed into; nothing is made before there is a picture to keep."""
        self.output = output
        self._stack = contextlib.ExitStack()
        self._path: Path | None = None
        self._kept: dict[str, FileSlice] = {}

    def keep(self, digest: str, data: bytes) -> FileSlice:
        """Return the place of a picture, which is written unless one with its checksum is there. Raises BadInput."""
        if digest in self._kept:
            return self._kept[digest]
        try:
            if self._path is None:
                self.output.mkdir(parents=True, exist_ok=True)
                self._path = self._stack.enter_context(staging(self.output)) / "pictures"
            with open(self._path, "ab") as file:
                place = FileSlice(self._path, file.tell(), len(data))
                file.write(data)
        except OSError as error:
            raise BadInput(f"cannot write into the output folder {self.output}: {error.strerror}") from None
        self._kept[digest] = place
        return place

    def close(self) -> None:
        """Remove the file."""
        self._stack.close()


def check_unicode(what: str, *texts: str) -> None:
    """Raise BadInput naming `what` when one of the texts cannot be written as UTF-8."""
    for text in texts:
        if not is_unicode(text):
            raise BadInput(f"{what} {shown(text)} is not UTF-8: rename it")


def check_names(what: str, *names: str) -> None:
    """Raise BadInput naming `what` when one of the names is not UTF-8 or holds control characters."""
    check_unicode(what, *names)
    for name in names:
        if not is_plain(name):
            raise BadInput(f"{what} {shown(name)} holds control characters: rename it")
