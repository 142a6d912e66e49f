"""The rows of a source on disk, in partitions by the hash of their keys: planning holds one partition in memory.

    rows-PPPP-UUUU.jsonl      the rows of partition P that unit U of the source has, in their order
    pictures-PPPP-UUUU        pictures that such rows hold inside, one after the other

The partitions are ranges of the hash in whose order the samples stand in shards, so their number changes no byte."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cmgan_dist.errors import BadInput
from cmgan_dist.files import open_regular
from shards.pairs import FileSlice, RawPair, Readable

ROWS_IN_PARTITION = 100_000
"""How many rows a partition is to have at most: some 100 MB."""
MOST_PARTITIONS = 4096
BUFFER_ROWS, BUFFER_BYTES = 50_000, 32 << 20
"""What waits in memory at most for being written."""
DIGEST_AT_END = re.compile(r"(?:^|-)([0-9a-f]{16})$")
"""Of the key of a picture that came without a file: the picture's own hash."""


def place_of(key: str) -> bytes:
    """Return the hash by which samples stand in order: a SHA-256 of the key, or of the picture's hash in it."""
    found = DIGEST_AT_END.search(key)
    return hashlib.sha256((found[1] if found else key).encode()).digest()


def partitions_for(rows: int) -> int:
    """Return how many partitions some number of rows is to have."""
    return min(1 + rows // ROWS_IN_PARTITION, MOST_PARTITIONS)


class Partitions:
    """Rows on disk; one object is one unit's, which writes them, and any process may read what was flushed.

    A picture that is kept here has its SHA-256 as the row's identity."""

    def __init__(self, folder: Path, partitions: int = 1, unit: int = 0) -> None:
        """`folder` is made when there is something to write; `unit`: rows of a smaller one come first."""
        self.folder, self.partitions, self.unit = folder, partitions, unit
        self._waiting: dict[int, list[RawPair]] = defaultdict(list)
        self._pictures: dict[int, bytes] = {}
        self._count = self._bytes = 0

    def add(self, pair: RawPair, picture: bytes | None = None) -> None:
        """Put in a row; `picture`: of one that holds it inside, in place of the pair's image. Raises BadInput."""
        number = int.from_bytes(place_of(pair.key)[:4], "big") * self.partitions >> 32
        self._waiting[number].append(pair)
        if picture is not None:
            self._pictures[id(pair)] = picture
            self._bytes += len(picture)
        self._count += 1
        self._bytes += sum(map(len, pair.texts)) if isinstance(pair.texts, tuple) else 0
        if self._count >= BUFFER_ROWS or self._bytes >= BUFFER_BYTES:
            self.flush()

    def add_all(self, pairs: Iterable[RawPair]) -> None:
        """Put in all rows and bring them to disk. Raises BadInput when they cannot be written."""
        for pair in pairs:
            self.add(pair)
        self.flush()

    def flush(self) -> None:
        """Bring to disk what waits in memory. Raises BadInput when it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, pairs in self._waiting.items():
                with open(self.folder / f"rows-{number:04d}-{self.unit:04d}.jsonl", "a") as file:
                    file.writelines(f"{encode(pair)}\n" for pair in self._with_pictures(number, pairs))
        except OSError as error:
            raise BadInput(f"cannot write into {self.folder}: {error.strerror}") from None
        self._waiting.clear()
        self._pictures.clear()
        self._count = self._bytes = 0

    def _with_pictures(self, number: int, pairs: list[RawPair]) -> Iterator[RawPair]:
        if not self._pictures:
            yield from pairs
            return
        path, last = str(self.folder / f"pictures-{number:04d}-{self.unit:04d}"), (b"", FileSlice("", 0, 0))
        with open(path, "ab") as file:
            for pair in pairs:
                data = self._pictures.get(id(pair))
                if data is None:
                    yield pair
                    continue
                if data != last[0]:  # rows with one picture often follow each other
                    last = data, FileSlice(path, file.tell(), len(data), pair.identity)
                    file.write(data)
                yield pair.with_image(last[1])

    def read(self, number: int) -> list[RawPair]:
        """Return the rows of a partition, those of the first unit first; equal texts are in memory once."""
        found: list[RawPair] = []
        texts: dict[str, str] = {}
        for path in sorted(self.folder.glob(f"rows-{number:04d}-*.jsonl")):
            with open_regular(path) as file:
                found += (_sharing(decode(line), texts) for line in file)
        return found

    def remove(self, number: int) -> None:
        """Remove the rows of a partition that was merged; pictures stay."""
        for path in self.folder.glob(f"rows-{number:04d}-*.jsonl"):
            path.unlink()


def _sharing(pair: RawPair, texts: dict[str, str]) -> RawPair:
    """Return a row whose texts are those of `texts` that are equal; others are put in."""
    if not isinstance(pair.texts, tuple):
        return pair
    return replace(pair, texts=tuple(texts.setdefault(text, text) for text in pair.texts))


# ---------------------------------------------------------------------------------------------- a row as a line


def encode(pair: RawPair) -> str:
    """Return a row as a line of JSON, without its end."""
    image, texts = _part(pair.image), _part(pair.texts)
    return json.dumps([pair.key, pair.split, image, texts, pair.labels, pair.where, pair.identity])


def decode(line: str | bytes) -> RawPair:
    """Return the row that `encode` made a line of."""
    key, split, image, texts, labels, where, identity = json.loads(line)
    return RawPair(key, split, _whole(image), _whole(texts), tuple(labels), where, identity)


def _part(part: Any) -> Any:
    """Return texts, an array or bytes to be read as JSON holds them."""
    if isinstance(part, tuple):
        return list(part)
    if isinstance(part, np.ndarray):
        return {"array": base64.b64encode(part.tobytes()).decode(), "dtype": part.dtype.str, "shape": part.shape}
    kind = type(part)
    return {"kind": f"{kind.__module__}:{kind.__qualname__}", "values": [*vars(part).values()]}


def _whole(part: Any) -> Any:
    if isinstance(part, list):
        return tuple(part)
    if "array" in part:
        data = np.frombuffer(base64.b64decode(part["array"]), dtype=part["dtype"])
        return data.reshape(part["shape"])
    return _kind(part["kind"])(*part["values"])


@functools.cache
def _kind(name: str) -> type[Readable]:
    """Return a class of bytes to be read, of this package."""
    module, _, kind = name.partition(":")
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    found = getattr(importlib.import_module(module), kind, None) if ours else None
    if not (isinstance(found, type) and hasattr(found, "size") and hasattr(found, "read")):
        raise ValueError(f"{name} is no kind of bytes to be read")
    return found
