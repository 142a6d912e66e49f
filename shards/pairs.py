"""Pairs as a source finds them, before anything is read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np

from cmgan_dist.data.folder import composed
from cmgan_dist.data.manifest import LabelKind
from cmgan_dist.errors import BadInput, BadSample, shards_command, shown
from cmgan_dist.files import open_regular, read_bytes

Together = Literal["images-and-texts", "images"]
"""What keeps pairs on one side of a split when it is equal; images: for captions that many pictures share."""


MOST_SHOWN, MOST_PATH_SHOWN = 80, 256
"""Characters of a cell that a message shows, and of the path of a file."""


def brief(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text of the input as a message shows it: in one line, what is beyond `most` characters left out."""
    return shown(text if len(text) <= most else f"{text[: most - 1]}…")


def lines_of(text: str) -> list[str]:
    """Return the lines of a text file, which end at \\n, \\r\\n or \\r; str.splitlines cuts sentences at more."""
    return re.split(r"\r\n|\n|\r", text)


class Readable(Protocol):
    """Bytes that a worker process reads or makes."""

    def size(self) -> int:
        """Return the number of bytes, for the plan of shards. Raises BadSample when there is nothing to read."""

    def identity(self) -> str:
        """Return what tells these bytes from all others: their SHA-256, or what they are made from.

        Raises BadSample when there is nothing to read."""

    def read(self) -> bytes:
        """Return the bytes. Raises BadSample when they cannot be read."""


@dataclass(frozen=True)
class FileBytes:
    """The bytes of a whole file."""

    path: str | Path

    @property
    def named(self) -> str:
        """The path as messages show it: what is too long for a path, such as a picture in base64, is cut."""
        path = str(self.path)
        return path if len(path) < MOST_PATH_SHOWN else brief(path)

    def size(self) -> int:
        """Return the size of the file in bytes. Raises BadSample when there is no such file."""
        try:
            return os.stat(self.path).st_size
        except OSError as error:
            raise BadSample(f"{self.named} cannot be read ({error.strerror})") from None
        except ValueError:
            raise BadSample(f"{self.named} cannot be read (no file has such a name)") from None

    def identity(self) -> str:
        """Return the SHA-256 of the file. Raises BadSample when it cannot be read."""
        return hashlib.sha256(self.read()).hexdigest()

    def read(self) -> bytes:
        """Return the bytes of the file. Raises BadSample when it cannot be read."""
        try:
            return read_bytes(self.path)
        except OSError as error:
            raise BadSample(f"{self.named} cannot be read ({error.strerror})") from None
        except ValueError:
            raise BadSample(f"{self.named} cannot be read (no file has such a name)") from None


@dataclass(frozen=True)
class FileSlice:
    """The bytes of a member of an uncompressed archive."""

    path: str | Path
    start: int
    length: int
    sha256: str = ""
    """Of the bytes, where that is known."""

    def size(self) -> int:
        """Return the number of bytes."""
        return self.length

    def identity(self) -> str:
        """Return the SHA-256 of the bytes. Raises BadSample when the archive cannot be read."""
        return self.sha256 or hashlib.sha256(self.read()).hexdigest()

    def read(self) -> bytes:
        """Return the bytes. Raises BadSample when the archive cannot be read."""
        try:
            with open_regular(self.path) as file:
                file.seek(self.start)
                return file.read(self.length)
        except OSError as error:
            raise BadSample(f"{self.path} cannot be read ({error.strerror})") from None


@dataclass(frozen=True, eq=False)
class RawPair:
    """One image with its texts, not yet read."""

    key: str
    """See `make_key`."""
    split: str
    """"" where it is drawn (`RawPairs.draw`); of train, a draw takes some for other splits too."""
    image: Readable | np.ndarray
    """Encoded image, or features [F_i]."""
    texts: tuple[str, ...] | Readable | np.ndarray
    """Texts, a UTF-8 file with one text a line, or features [F_t] or [captions, F_t]."""
    labels: tuple[int | str, ...]
    """Numbers of classes, or their names where the source does not know them all beforehand."""
    where: str
    """What a message calls this pair: its file, or a row of its table."""
    identity: str = ""
    """Rows in which it is equal are captions of one sample; "" for one that stands alone."""

    def with_image(self, image: Readable) -> RawPair:
        """Return the pair with another image."""
        return RawPair(self.key, self.split, image, self.texts, self.labels, self.where, self.identity)

    def numbered(self, index: dict[str, int]) -> RawPair:
        """Return the pair with its classes by number, ascending. `index`: name of a class -> its number."""
        if not self.labels:
            return self
        labels = sorted(index[label] if isinstance(label, str) else label for label in self.labels)
        return RawPair(self.key, self.split, self.image, self.texts, tuple(labels), self.where, self.identity)


@dataclass(frozen=True)
class Draw:
    """How splits are drawn from the pairs of train and of no split, by a hash of the keys, equal ones together."""

    val: float
    test: float
    """Shares of them."""
    together: Together = "images-and-texts"

    @property
    def splits(self) -> list[str]:
        """The splits that are drawn."""
        return [split for split, share in (("val", self.val), ("test", self.test)) if share]


@dataclass
class RawPairs:
    """What a source says of the pairs that it has found, for the manifest too."""

    name: str
    label_kind: LabelKind
    classes: list[str]
    attribution: str
    details: dict[str, Any]
    """The source and its options, for the manifest; no paths, so that equal data gives an equal manifest."""
    draw: Draw = field(default_factory=lambda: Draw(0, 0))
    expected_splits: tuple[str, ...] = ("train",)
    notes: list[str] = field(default_factory=list)
    """What the user should know, said once after packing."""
    left_out: list[str] = field(default_factory=list)
    """A line for each bad pair that the source has left out."""


PASSED_OVER = re.compile(r"_*(\.+[^.]|__MACOSX\Z)")
"""How a folder begins that a reader passes over (`Member.is_foreign`), or that `make_key` has made of one."""


def make_key(name: str) -> str:
    """Return a sample's key, made from a relative path without its extension.

    Slashes stay; dots in the base name become ``_``, because a WebDataset key ends at the base name's first dot; a
    folder that readers of tars pass over gets a ``_`` before it, as one that looks like that does, so that two stay
    two; the name is `composed`.
    Raises BadInput when nothing is left of the name."""
    path = PurePosixPath(composed(name))
    parts = [part for part in path.parts if part not in ("/", "..", ".")]
    if not parts:
        raise BadInput(f"'{brief(name)}' is not the name of an image")
    folders = [f"_{part}" if PASSED_OVER.match(part) else part for part in parts[:-1]]
    return "/".join([*folders, parts[-1].replace(".", "_")])


def hash_number(text: str) -> int:
    """Return 32 bits that only the text decides: the first 8 hexadecimal digits of its sha256."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def hash_split(key: str, val: float, test: float) -> str:
    """Return the split of a key by its hash; `test` and `val` are shares of all pairs, the rest is train."""
    share = hash_number(key) / 2**32
    return "test" if share < test else "val" if share < test + val else "train"


def split_shares(val: float | None, test: float | None, named: Collection[str]) -> tuple[float, float]:
    """Return the shares for `hash_split`, of what belongs to train or to no split where the source has `named` splits.

    `val` and `test` are as the user gave them: None is a tenth where the source names no splits, else nothing. Raises
    BadInput unless they leave some pairs for train, and when the source has such a split already, or has no train."""
    for split, share in (("val", val), ("test", test)):
        if share and split in named:
            raise BadInput(f"--{split} is {share:g} but there is a split '{split}' already: pass --{split} 0")
        if share and named and "train" not in named:
            raise BadInput(
                f"--{split} is {share:g}, of the split 'train', and there is none, only {brief(', '.join(named))}: "
                "name the one to draw from train, or leave the flag away"
            )
    rest = 0.0 if named else 0.1
    shares = rest if val is None else val, rest if test is None else test
    if not (min(shares) >= 0 and sum(shares) < 1):
        raise BadInput(f"--val {shares[0]:g} and --test {shares[1]:g} must be shares that leave some pairs for train")
    return shares


def say_splits(named: Collection[str], draw: Draw) -> str:
    """Return a line that says where the splits of a source are from, which names those in `named`."""
    drawn = [f"{share:g} into {split}" for split, share in (("val", draw.val), ("test", draw.test)) if share]
    parts = [f"the source names the splits {', '.join(named)}"] if named else []
    of = "train" if named else "all"
    return shown("; ".join([*parts, *[f"of {of} a hash puts {' and '.join(drawn)}"] * bool(drawn)]) or "all is train")


FLAG = "add --val 0.1, or draw one later by 'python -m shards split'"
"""How a command that packs makes a split for validation."""


def missing_val(splits: Collection[str], way: str = FLAG) -> list[str]:
    """Return a line that says, where there is no split 'train', from which 'val' is drawn too, how to name one; or,
    where there is no split 'val', which `way` leads to one; else nothing."""
    if "train" not in splits:
        others = shown(", ".join(sorted(splits)))
        return [f"there is no split 'train', which training reads: name one so; there are {others}"]
    return [] if "val" in splits else [f"there is no split 'val', which training validates on: {way}"]


def drawing(data: Path | str) -> str:
    """Return how a split for validation is drawn from the data set in the folder, or at the URL, `data`."""
    return f"{shards_command('split', data, '--val', 0.1, '--output', 'NEW')} draws one"
