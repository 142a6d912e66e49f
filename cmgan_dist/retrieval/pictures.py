"""The pictures of an index, as people see them: read from where they lie, made small, kept in memory up to a bound.

An index holds vectors and captions, no pictures. They come from the raw shards by (shard, row), or from the folder of
pictures that was embedded by their path below it; a key is hostile input and never leads out of that folder."""

from __future__ import annotations

import hashlib
import io
import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from cmgan_dist.data.cache import open_store
from cmgan_dist.data.folder import read_file
from cmgan_dist.data.image import MAX_PIXELS, UNREADABLE, open_image, orientation_of, read_header, to_rgb
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest
from cmgan_dist.data.origin import check_same, find_origin
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import Sample, parse_sample
from cmgan_dist.errors import BadInput, BadSample

log = logging.getLogger(__name__)

SIDE, MOST_SIDE = 224, 512
"""Longer side of a thumbnail in pixels: what is made unless asked, and the most."""
MOST_FILE_BYTES = 64 << 20
"""A larger file of a folder is not opened."""
DATA = "--data"
"""The flag that names raw shards."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation (EXIF 2.3, tag 274) -> what makes the picture upright."""


class Pictures(ABC):
    """Where the raw pictures and texts of an index lie. An item is named by its shard, its row there, and its key."""

    local = True
    """Whether reading one takes milliseconds."""

    def are_there(self) -> bool:
        """Return whether the place where they lie is still there; that of a URL is taken to be."""
        return True

    @abstractmethod
    def read(self, shard: str, row: int, key: str) -> bytes:
        """Return the encoded picture of an item. Raises BadSample, saying why, when there is none."""

    def texts(self, shard: str, row: int, key: str) -> list[str]:
        """Return the texts that belong to an item's picture; none where they are not there."""
        return []


PicturesOf = Callable[[int], Pictures | None]
"""Id of an item of an index -> where its picture lies."""


class ShardPictures(Pictures):
    """The pictures of raw shards: those of all splits of a data set. Threads may share it."""

    def __init__(self, data: str) -> None:
        """`data`: folder or URL of raw shards. Raises BadInput when it cannot be read or holds features."""
        self.local, self.data = "://" not in data, data
        self._told = False
        self._readers: dict[str, tuple[ShardReader, int]] = {}
        manifest: Manifest | None = None
        for split in _splits(data):
            reader = ShardReader(data, split)
            manifest = reader.manifest
            for number, shard in enumerate(reader.shards):
                self._readers[_plain(shard.name)] = reader, number
        if manifest is None or manifest.image != "encoded":
            raise BadInput(f"{data} holds no encoded pictures: name the raw shards")

    def are_there(self) -> bool:
        """Return whether the place where they lie is still there; that of a URL is taken to be."""
        return not self.local or (Path(self.data) / MANIFEST_NAME).is_file()

    def _sample(self, shard: str, row: int, key: str) -> Sample:
        reader, number = self._readers.get(_plain(shard), (None, 0))
        if reader is None:
            raise BadSample(f"the data set has no shard {shard}")
        if not 0 <= row < reader.shards[number].samples:
            raise BadSample(f"{shard} has no sample {row}")
        try:
            found, members = reader.raw(number, row)
        except (BadInput, OSError) as error:  # they name paths of this machine: for the log, once, and not for others
            if not self._told:
                log.warning("raw pictures cannot be read any more: %s", error)
            self._told = True
            raise BadSample("the raw data cannot be read any more") from None
        if found != key:
            raise BadSample(f"sample {row} of {shard} is {found}, not {key}: the data set has changed")
        return parse_sample(key, members, labelled=False)

    def read(self, shard: str, row: int, key: str) -> bytes:
        """Return the encoded picture of an item. Raises BadSample, saying why, when there is none."""
        image = self._sample(shard, row, key).image
        if not isinstance(image, bytes):
            raise BadSample(f"{key} has no encoded picture")
        return image

    def texts(self, shard: str, row: int, key: str) -> list[str]:
        """Return the texts of an item's sample; none where the sample cannot be used."""
        try:
            texts = self._sample(shard, row, key).texts
        except BadSample:
            return []
        return texts if isinstance(texts, list) else []


class FolderPictures(Pictures):
    """The pictures of a folder, by their path below it. No path outside it is reached, by symbolic links neither."""

    def __init__(self, folder: str | Path) -> None:
        """Raises BadInput when there is no such folder."""
        self.root = Path(folder).resolve()
        if not self.root.is_dir():
            raise BadInput(f"folder of pictures {folder} does not exist: name the one that was embedded")

    def are_there(self) -> bool:
        """Return whether the folder is still there."""
        return self.root.is_dir()

    def read(self, shard: str, row: int, key: str) -> bytes:
        """Return the encoded picture of an item. Raises BadSample, saying why, when there is none."""
        missing = BadSample("the picture is not in the folder any more")
        try:
            path = (self.root / key).resolve(strict=True)
            if not path.is_relative_to(self.root) or path.suffix.lower() not in SUFFIXES:
                raise missing
            return read_file(path, MOST_FILE_BYTES, follow=False)
        except (OSError, ValueError, RuntimeError):  # not there, no file, a NUL in its name, links in a circle
            raise missing from None


def open_pictures(kind: str, location: str, data: str = "", sha256: str = "") -> Pictures | None:
    """Return where the pictures of an index lie, None when they are not there any more and `data` is not given.

    `kind`, `location` and `sha256`: the index's source. `data`: raw shards to take in its place. Of feature shards, the
    raw shards that they were made from are taken. Raises BadInput when `data` is given and holds no pictures, or is not
    given and another data set lies where these were."""
    if data:
        return ShardPictures(data)
    if kind == "pictures":
        return FolderPictures(location) if Path(location).is_dir() else None
    if kind != "shards" or not ("://" in location or (Path(location) / MANIFEST_NAME).is_file()):
        return None
    try:
        manifest = _manifest(location)
    except BadInput as error:
        if "://" not in location:
            raise
        raise BadInput(f"{error}; an index keeps no password or signature of a URL: name the data by {DATA}") from None
    if sha256:
        check_same(location, manifest, sha256, "the index", DATA)
    source = location if manifest.image == "encoded" else find_origin(location, manifest.details, DATA)
    return ShardPictures(source) if source else None


def pictures_by_source(index: Any, data: str = "") -> PicturesOf:
    """Return where the pictures of each item of an `Index` lie, which may be of several sources.

    `data`: as of `open_pictures`."""

    def place(source: dict[str, str]) -> tuple[str, str, str]:
        return source["kind"], source["location"], source.get("sha256", "")

    places = {place(each["source"]) for each in index.manifest.embeddings}
    opened = {each: open_pictures(*each[:2], data, each[2]) for each in places}
    return lambda id: opened[place(index.source_of(id))]


def _manifest(data: str) -> Manifest:
    store = open_store(data)
    return Manifest.from_json(store.read(MANIFEST_NAME), store.location(MANIFEST_NAME))


def _splits(data: str) -> list[str]:
    """Return the splits of a data set that have samples."""
    manifest = _manifest(data)
    return [split for split in manifest.splits if manifest.samples(split)]


def _plain(shard: str) -> str:
    return shard.removesuffix(".tar")


# ---------------------------------------------------------------------------------------------- thumbnails


def thumbnail(data: bytes, side: int = SIDE, most_pixels: int = MAX_PIXELS) -> bytes:
    """Return an encoded picture as a small JPEG: upright, transparency on white, at most `side` pixels each way.

    Raises BadSample with the reason when it is no picture, has more than `most_pixels` or does not fit in memory."""
    try:
        read_header(data)
        image = open_image(data)
        if image.width * image.height > most_pixels:
            raise BadSample(f"the picture has {image.width} x {image.height} pixels, more than {most_pixels}")
        image.draft("RGB", (side, side))  # a JPEG is decoded at just above the size
        image.load()
        orientation = orientation_of(image)
        if image.mode == "P":
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        elif image.mode not in ("RGB", "L", "RGBA", "LA") or "transparency" in image.info:
            image = to_rgb(image)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)  # first: what follows costs little then
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        if image.has_transparency_data or image.mode != "L":
            image = to_rgb(image)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=88, subsampling=0)  # full colour: flat drawings stay clean
    except Image.DecompressionBombError:
        raise BadSample(f"the picture has more than {most_pixels} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadSample("it is no JPEG, PNG or WebP picture") from None
    except MemoryError:
        raise BadSample("the picture takes too much memory") from None
    except UNREADABLE as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"the picture does not decode ({error})") from None
    return out.getvalue()


class ByteCache:
    """The byte strings that were used last, up to a number of bytes. Threads may share it."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.held = most_bytes, 0
        self._kept: OrderedDict[object, tuple[bytes, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], bytes]) -> tuple[bytes, str]:
        """Return (bytes, their ETag) of a key, made when they are not kept. Raises what `make` raises."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = make()
        made = data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self.held += len(data)
            while self.held > self.most_bytes:
                self.held -= len(self._kept.popitem(last=False)[1][0])
        return made
