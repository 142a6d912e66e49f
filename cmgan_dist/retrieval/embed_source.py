"""What is embedded: the shards of a data set, a folder of pictures without texts, or a file of texts without pictures.

Each source is cut into parts, which processes embed one at a time: its shards, or so many pictures or texts. A part
gives batches (`EvalBatch`) that begin anew in it, so that its vectors do not depend on who embeds what else.

Shapes: n images and m texts of a batch."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data.batch import EvalBatch, eval_batches
from cmgan_dist.data.folder import is_plain, is_unicode, read_file, say_hidden, walk_files
from cmgan_dist.data.image import decode_image
from cmgan_dist.data.manifest import DataSpec, natural_splits
from cmgan_dist.data.origin import sha256_of_data
from cmgan_dist.data.reader import ShardReader, open_data_set
from cmgan_dist.data.sample import IMAGE_EXTENSIONS, Sample
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import LocalStore
from cmgan_dist.errors import BadInput, BadSample, refuse_url, shards_command
from cmgan_dist.files import open_regular, parse_json_once, sha256_of
from cmgan_dist.models.generator import Modality
from cmgan_dist.retrieval.embeddings import SourceIdentity

log = logging.getLogger(__name__)

PICTURES, TEXTS = 1000, 10_000
"""Pictures and texts of a part."""
FLAGS = {"shards": "--data", "pictures": "--pictures", "texts": "--texts"}


@dataclass(frozen=True)
class Part:
    """A part of a source; it travels to the process that embeds it."""

    name: str
    """Name of its files without their endings."""
    split: str
    """"" where the source has no splits."""
    origin: str
    """Name of the tar, or of the cut of pictures or texts."""
    items: int
    """Samples, pictures or texts."""
    place: tuple[Any, ...]
    """Where its source finds it."""


@dataclass(frozen=True)
class Reading:
    """How batches are read."""

    batch: int
    """Samples, pictures or texts at a time."""
    image_size: int
    """Side of decoded images in pixels."""
    threads: int
    """Threads that decode images."""


class Source(ABC):
    """What is embedded, in parts that have an order."""

    modalities: tuple[Modality, ...]
    """What it has, of "image" and "text"."""
    classes: Sequence[str] = ()
    attribution = ""
    details: Mapping[str, Any] = MappingProxyType({})
    """Those of a data set's manifest."""

    def __init__(self, kind: str, location: str) -> None:
        """`kind`: a key of FLAGS. `location`: URL, or absolute path."""
        self.address = location
        """What it is opened by; a URL may hold a password or a signature."""
        self.identity = SourceIdentity(kind, public_url(location))

    @property
    def location(self) -> str:
        """URL without what is secret in it, or absolute path."""
        return self.identity.location

    @property
    def spec(self) -> DataSpec:
        """Return what kind of images and texts it has."""
        return DataSpec(list(self.classes), "none", None, None)

    @abstractmethod
    def parts(self, splits: Sequence[str]) -> list[Part]:
        """Return the parts in canonical order, of the named splits only where `splits` names some.

        Raises BadInput when there is nothing to embed."""

    @abstractmethod
    def checksum(self, part: Part) -> str:
        """Return a SHA-256 that differs when anything in the part does. Raises BadInput when it cannot be read."""

    @abstractmethod
    def batches(self, part: Part, reading: Reading, left_out: list[str]) -> Iterator[EvalBatch]:
        """Yield the part's batches; bad samples are left out, and a line for each is added to `left_out`.

        `numbers` of a batch are those in the part. Raises BadInput when the part cannot be read."""


def open_source(kind: str, location: str, stream: StreamConfig) -> Source:
    """Return the source at a folder, file or URL; `stream` says how a URL is read.

    Raises BadInput when it cannot be read."""
    sources: dict[str, Callable[[str, str, StreamConfig], Source]]
    sources = {"shards": ShardSource, "pictures": PictureSource, "texts": TextSource}
    if "://" not in location:
        location = os.path.abspath(location)
    return sources[kind](kind, location, stream)


class ShardSource(Source):
    """A data set in a folder or at a URL; its parts are its shards."""

    modalities = ("image", "text")

    def __init__(self, kind: str, location: str, stream: StreamConfig) -> None:
        super().__init__(kind, location)
        self.store, self.manifest = open_data_set(location, stream)
        self.identity = dataclasses.replace(self.identity, sha256=sha256_of_data(self.manifest))
        self.classes, self.attribution = self.manifest.classes, self.manifest.attribution
        self.details = self.manifest.details
        self._reader = lru_cache(lambda split: ShardReader(location, split, opened=(self.store, self.manifest)))

    @property
    def spec(self) -> DataSpec:
        return DataSpec.of(self.manifest)

    def parts(self, splits: Sequence[str]) -> list[Part]:
        chosen = [s for s in self.manifest.splits if s in splits] if splits else list(self.manifest.splits)
        for split in splits:
            self.manifest.shards(split)
        found = []
        for split in chosen:
            shards = self._reader(split).shards if self.manifest.samples(split) else []
            for number, shard in enumerate(shards):
                name = shard.name.removesuffix(".tar")
                found.append(Part(name, split, shard.name, shard.samples, (number, shard.sha256)))
        if not found:
            raise BadInput(f"{self.location} has no samples in {', '.join(natural_splits(chosen))}: pack some")
        return found

    def checksum(self, part: Part) -> str:
        return str(part.place[1])

    def batches(self, part: Part, reading: Reading, left_out: list[str]) -> Iterator[EvalBatch]:
        number, sha256 = part.place
        if isinstance(self.store, LocalStore) and sha256_of(self.store.folder / part.origin) != sha256:
            raise BadInput(
                f"{self.store.location(part.origin)} is not what its manifest says: "
                f"see {shards_command('verify', self.location)}"
            )
        reader = self._reader(part.split)
        first = int(reader.counts[:number].sum())
        for batch in eval_batches(
            reader,
            image_size=reading.image_size,
            batch=reading.batch,
            first=first,
            stop=first + part.items,
            threads=reading.threads,
            left_out=left_out,
        ):
            yield dataclasses.replace(batch, numbers=[number - first for number in batch.numbers])
        reader.close()


class PictureSource(Source):
    """A folder of pictures and the folders in it; its parts are 1000 pictures each, in the order of their paths."""

    modalities = ("image",)

    def __init__(self, kind: str, location: str, stream: StreamConfig) -> None:
        super().__init__(kind, location)
        refuse_url(location, "--pictures")
        self.folder = Path(location)
        if not self.folder.is_dir():
            raise BadInput(f"--pictures {location} is no folder: name one with .jpg, .png or .webp files")

    def parts(self, splits: Sequence[str]) -> list[Part]:
        hidden: list[str] = []
        found = walk_files(self.folder, IMAGE_EXTENSIONS, hidden=hidden)
        for line in say_hidden([name for name in hidden if name.lower().endswith(("/", *IMAGE_EXTENSIONS))]):
            log.warning("--pictures %s: %s", self.folder, line)
        if not found:
            raise BadInput(f"--pictures {self.folder} has no .jpg, .png or .webp files: name another folder")
        cuts = [found[first : first + PICTURES] for first in range(0, len(found), PICTURES)]
        names = [f"pictures-{number:06d}" for number in range(len(cuts))]
        return [Part(name, "", name, len(cut), tuple(cut)) for name, cut in zip(names, cuts, strict=True)]

    def checksum(self, part: Part) -> str:
        made = hashlib.sha256()
        for key in part.place:
            try:
                found = hashlib.sha256(read_file(self.folder / key)).hexdigest()
            except BadSample as error:  # `batches` leaves it out
                found = str(error)
            made.update(f"{key}\0{found}\n".encode("utf-8", "surrogateescape"))
        return made.hexdigest()

    def batches(self, part: Part, reading: Reading, left_out: list[str]) -> Iterator[EvalBatch]:
        def load(key: str, out: np.ndarray) -> str | None:
            try:
                decode_image(read_file(self.folder / key), reading.image_size, out=out)
            except BadSample as error:
                return f"{key}: {error}"
            except MemoryError:
                return f"{key}: takes more memory than there is"
            return None

        with ThreadPoolExecutor(reading.threads) as pool:
            for first in range(0, part.items, reading.batch):
                keys = part.place[first : first + reading.batch]
                images = np.empty((len(keys), reading.image_size, reading.image_size, 4), np.uint8)
                wrong = list(pool.map(load, keys, images))
                left_out += [line for line in wrong if line is not None]
                good = [row for row, line in enumerate(wrong) if line is None]
                if good:
                    yield _one_modality(
                        torch.from_numpy(images[good]),
                        [Sample(keys[row], b"", [], ()) for row in good],
                        [first + row for row in good],
                    )


class TextSource(Source):
    """A UTF-8 file of one text a line, or ``.jsonl`` of ``{"key": ..., "text": ...}``; its parts are 10,000 lines each.

    A key is a text of one line or a whole number.
    Lines end as on any system; blank ones at the end are no texts. The key of a text without one is the number of its
    line, from 1."""

    modalities = ("text",)

    def __init__(self, kind: str, location: str, stream: StreamConfig) -> None:
        super().__init__(kind, location)
        refuse_url(location, "--texts")
        self.file = Path(location)
        self.is_jsonl = self.file.suffix.lower() == ".jsonl"
        if not self.file.is_file():
            raise BadInput(f"--texts {location} is no file: name one with a text a line")

    def parts(self, splits: Sequence[str]) -> list[Part]:
        starts, lines, place, end = list[int](), 0, 0, 0
        try:
            with io.TextIOWrapper(open_regular(self.file), "latin-1", newline="") as opened:  # a character is a byte
                version = _version(opened.fileno())
                for number, line in enumerate(opened):
                    if number % TEXTS == 0:
                        starts.append(place)
                    place += len(line)
                    if line.strip(" \t\r\n"):
                        lines, end = number + 1, place
        except OSError as error:
            raise self._unreadable(error) from None
        if not lines:
            raise BadInput(f"--texts {self.file} is empty: name a file with a text a line")
        found = []
        for first, start, stop in zip(range(0, lines, TEXTS), starts, [*starts[1:], end], strict=False):
            name = f"texts-{first // TEXTS:06d}"
            found.append(Part(name, "", name, min(TEXTS, lines - first), (start, min(stop, end), first, version)))
        if self.is_jsonl:
            self._check_keys(found)
        return found

    def _keys(self, parts: Sequence[Part]) -> Iterator[tuple[int, str]]:
        """Yield the number and the key of each line that is a text."""
        for part in parts:
            for number, line in enumerate(self._bytes(part).splitlines(), part.place[2] + 1):
                with suppress(BadSample):
                    yield number, self._parse(line, str(number))[0]

    def _check_keys(self, parts: Sequence[Part]) -> None:
        """Raise BadInput, naming both lines, where two texts have one key. Hashes take less memory than all keys."""
        hashes, counts = np.unique(
            np.fromiter((_hash(key) for _, key in self._keys(parts)), np.uint64), return_counts=True
        )
        twice, lines = set(hashes[counts > 1].tolist()), dict[str, int]()
        for number, key in self._keys(parts) if twice else ():
            if _hash(key) in twice and lines.setdefault(key, number) != number:
                raise BadInput(
                    f"--texts {self.file} has the key {key!a} in lines {lines[key]} and {number}: give each text its "
                    "own (a text without one has the number of its line)"
                )

    def _unreadable(self, error: OSError) -> BadInput:
        return BadInput(f"--texts {self.file} cannot be read ({error.strerror}): restore it")

    def _bytes(self, part: Part) -> bytes:
        start, stop, _, version = part.place
        try:
            with open_regular(self.file) as opened:
                opened.seek(start)
                data = opened.read(stop - start)
                same = _version(opened.fileno()) == version
        except OSError as error:
            raise self._unreadable(error) from None
        if not same:
            raise BadInput(f"--texts {self.file} was changed while it was embedded: start again")
        return data

    def checksum(self, part: Part) -> str:
        return hashlib.sha256(self._bytes(part)).hexdigest()

    def batches(self, part: Part, reading: Reading, left_out: list[str]) -> Iterator[EvalBatch]:
        lines = self._bytes(part).splitlines()
        for first in range(0, len(lines), reading.batch):
            samples, numbers = [], []
            for row, line in enumerate(lines[first : first + reading.batch], first):
                number = part.place[2] + row + 1
                try:
                    key, text = self._parse(line, str(number))
                except BadSample as error:
                    left_out.append(f"line {number}: {error}")
                    continue
                samples.append(Sample(key, b"", [text], ()))
                numbers.append(row)
            if samples:
                yield _one_modality(torch.empty(0), samples, numbers)

    def _parse(self, line: bytes, number: str) -> tuple[str, str]:
        """Return key and text of a line. Raises BadSample."""
        try:
            text: Any = line.decode("utf-8").removeprefix("\ufeff")
            key: Any = number
            if self.is_jsonl:
                record = parse_json_once(text)
                key, text = record.get("key", number), record.get("text")
        except (ValueError, RecursionError, AttributeError) as error:
            expected = "a JSON object" if self.is_jsonl else "UTF-8"
            raise BadSample(f"is not {expected} ({error})") from None
        if isinstance(key, int) and not isinstance(key, bool):
            key = str(key)
        # half a character is stored as its escape, as in the names of files
        if not isinstance(key, str) or not key or not is_plain(key.encode("utf-8", "backslashreplace").decode()):
            raise BadSample(f"has the key {key!a}: write a text of one line, a whole number or none")
        if not isinstance(text, str) or not text.strip():
            raise BadSample("has no text")
        if not is_unicode(text):
            raise BadSample("has half a character, a lone surrogate, in its text")
        return key, text.strip()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _version(descriptor: int) -> tuple[int, int]:
    """Return what differs when an open file is changed: its size and the time of its last change."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _one_modality(images: torch.Tensor, samples: list[Sample], numbers: list[int]) -> EvalBatch:
    texts = [text for sample in samples for text in sample.texts]
    return EvalBatch(images, texts, torch.arange(len(texts)), None, numbers, samples)
