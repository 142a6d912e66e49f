"""A folder that a user names: the files in it and in the folders below, the bytes of one, and names in messages.

Such a folder may hold anything: links in a circle, folders that may not be read, pipes, names that are not UTF-8."""

from __future__ import annotations

import heapq
import logging
import os
import stat
import unicodedata
from collections.abc import Collection
from pathlib import Path

from cmgan_dist.errors import BadInput, BadSample, refuse_url, shown
from cmgan_dist.files import NotRegular, open_regular

MOST_FILE_BYTES = 256 << 20
"""A larger file is not read: RGB of the largest picture that is decoded takes as much without any compression."""
log = logging.getLogger(__name__)


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can hold a text: file names of other bytes and JSON's "\\ud800" cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain(text: str) -> bool:
    """Return whether a name is one that any terminal, file and figure can show: no control characters, line ends or
    halves of characters."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): what looks alike and is written in two ways, as a Mac's file
    names and a table may be, is one class, key or split."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def checked_path(path: object, what: str) -> Path:
    """Return a path that a user gave as `what`. Raises BadInput when it is none, or holds what no path can."""
    if path == "":  # which would be the folder that the program was started in
        raise BadInput(f"{what} is empty: give a path")
    if not isinstance(path, str | os.PathLike):
        raise BadInput(f"{what} is {path!r}: give a path")
    try:
        valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise BadInput(f"{what} is {os.fspath(path)!r}, which holds characters that no path can: name another")
    return Path(path)


KINDS = {
    "manifest.json": "a data set",
    "model.json": "a model",
    "config.yaml": "a run",
    "embeddings.json": "embeddings",
    "index.json": "an index",
    "search.json": "a search",
}
"""What a folder is that holds a file of this name."""


def check_link(path: Path, what: str = "") -> None:
    """Raises BadInput when a path, which is `what`, is a link that leads nowhere: what it leads to may be there at
    another time, so it is not the same as nothing."""
    if os.path.islink(path) and not os.path.exists(path):
        named = f"{what} {shown(str(path))}".lstrip()
        raise BadInput(f"{named} is a link that leads nowhere: mount what it leads to, or remove the link")


def check_file(path: Path, what: str) -> None:
    """Raises BadInput when something else than a file stands where `what` is to be written, or a link that leads
    nowhere."""
    check_link(path)
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is no file: move it away, so that {what} can be written there")


def check_output(folder: Path, own: str, flag: str = "--output") -> None:
    """Raises BadInput when what is written to a folder, with its file `own` of KINDS, would mix with another kind,
    or it is no folder, or it lies behind a link that leads nowhere."""
    refuse_url(folder, flag)
    for path in (*reversed(folder.parents), folder):
        check_link(path, flag)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{flag} {shown(str(folder))} is a file: name another folder, which is made")
    for name, kind in KINDS.items():
        if name != own and (folder / name).is_file():
            raise BadInput(f"{flag} {shown(str(folder))} is {kind}: name another folder ({name} lies in it)")


def read_file(path: str | os.PathLike[str], most: int = MOST_FILE_BYTES, *, follow: bool = True) -> bytes:
    """Return the bytes of a regular file; a pipe or a device is not waited for.

    `most`: bytes of the largest file that is read. `follow`: whether the path may be a symbolic link. Raises BadSample,
    saying why, when the file is another kind of file or larger, or cannot be read."""
    if "\0" in os.fspath(path):
        raise BadSample("cannot be read (no file has such a name)")
    try:
        with open_regular(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise BadSample(f"has more than {most >> 20} MiB")
            data = file.read(size + 1)  # no more than is there: `read` makes room for all of it
    except NotRegular:
        raise BadSample("is no regular file") from None
    except OSError as error:
        raise BadSample(f"cannot be read ({error.strerror or error})") from None
    except UnicodeEncodeError:
        raise BadSample("cannot be read (no file has such a name)") from None
    if len(data) > size:
        raise BadSample("grows while it is read")
    return data


def walk_files(
    folder: Path, endings: Collection[str], others: list[str] | None = None, hidden: list[str] | None = None
) -> list[str]:
    """Return the paths from `folder`, with "/" between names, of what has one of `endings` in it and below, sorted.

    `endings`: in lower case, without dots. `others` gets the paths of other files. What is hidden stays apart: `hidden`
    gets the paths of such files, and of such folders, which end in "/" and are not walked. Linked folders are walked
    too, but each folder once: under its own path where it lies below `folder`, else under the link that sorts first; a
    line of the log names each further way, and each link without such an ending that leads nowhere. Whether a path is a
    file that can be read is found out by reading it. Raises BadInput naming a folder that cannot be read."""
    walk = _Walk(folder, endings)
    while walk.links:
        walk.go(heapq.heappop(walk.links))
    if others is not None:
        others += sorted(walk.others)
    if hidden is not None:
        hidden += sorted(walk.hidden)
    return sorted(walk.found)


def say_hidden(names: list[str]) -> list[str]:
    """Return a line that says how many hidden files and folders are passed over, none where there are none."""
    return [
        f"{len(names)} hidden files and folders are passed over, the first is {shown(first)}" for first in names[:1]
    ]


class _Walk:
    """What is found in a folder, and which of its folders and links are still to be walked."""

    def __init__(self, folder: Path, endings: Collection[str]) -> None:
        self.folder, self.endings = folder, endings
        self.found: list[str] = []
        self.others: list[str] = []
        self.hidden: list[str] = []
        self.links = [""]
        """Ways to folders, as a heap; the folder itself is the first."""
        self.met: dict[tuple[int, int], Path] = {}
        """(device, inode) of a folder -> under which path it is walked."""

    def go(self, start: str) -> None:
        """Walk a folder and what lies in it; links to folders are put off, so that own paths come first."""
        rest = [start]
        while rest:
            place = rest.pop()
            path = self.folder / place
            try:
                folders = self._enter(place)
            except OSError as error:
                raise BadInput(
                    f"folder {shown(str(path))} cannot be read ({error.strerror}): make it readable, or move it away"
                ) from None
            rest += reversed(folders)

    def _enter(self, place: str) -> list[str]:
        """Note what one folder holds; return the folders in it, sorted. Raises OSError."""
        path = self.folder / place
        status = path.stat()
        known = self.met.setdefault((status.st_dev, status.st_ino), path)
        if known != path:
            log.warning("%s is the folder %s: its files are taken once", shown(str(path)), shown(str(known)))
            return []
        with os.scandir(path) as opened:
            entries = sorted(opened, key=lambda entry: entry.name)
        folders = []
        for entry in entries:
            inside = f"{place}/{entry.name}" if place else entry.name
            if entry.name.startswith("."):
                self.hidden.append(f"{inside}/" if entry.is_dir() else inside)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(inside)
            elif entry.is_symlink() and self._leads_to_folder(inside):
                heapq.heappush(self.links, inside)
            else:
                (self.found if self._is_wanted(inside) else self.others).append(inside)
        return folders

    def _leads_to_folder(self, inside: str) -> bool:
        path = self.folder / inside
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            if not self._is_wanted(inside):
                log.warning("%s leads nowhere (%s): it is left out", shown(str(path)), error.strerror)
            return False

    def _is_wanted(self, name: str) -> bool:
        return os.path.splitext(name)[1].lower()[1:] in self.endings
