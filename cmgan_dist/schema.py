"""What a sample is: member names in the tar, labels, the manifest and its sidecars. No torch here.

A data set is a folder (or URL) that holds ``manifest.json``, WebDataset tars and, beside each tar, an index sidecar:

    DIR/manifest.json
    DIR/train-000000.tar          plain WebDataset shard: the members of a sample stand together
    DIR/train-000000.index.npz    where its samples and their members lie, and their labels

Members of the sample KEY (everything else is ignored):

    KEY.jpg | KEY.png | KEY.webp     the image, encoded        or  KEY.image.npy  [F_i] image features
    KEY.txt                          one text, UTF-8           or  KEY.text.npy   [F_t] or [captions, F_t] features
    KEY.json                         "texts": [...] for several texts; "label": int or "labels": [int, ...]
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np

from cmgan_dist.errors import BadInput, BadSample

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
INDEX_VERSION = 2
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LabelKind = Literal["single", "multi", "none"]
BLOCK = 512
PIECE = 1 << 24
"""Most bytes read at a time: what a header claims is not allocated before it is there."""
FEW = 10_000
"""Numbers of which OpenBLAS takes a dot product in the calling thread."""
LABELS = range(-(1 << 31), 1 << 31)
"""What the index sidecar can hold."""
MOST_MEMBERS, MOST_PATTERNS = 8, 256
"""Members of a sample, and kinds of samples, that the sidecar keeps; what goes beyond is read by a walk."""
Data = TypeVar("Data", bytes, memoryview)


# ---------------------------------------------------------------------------------------------- sample


@dataclass
class Sample:
    """One image with its texts, as stored: nothing is decoded but JSON and arrays."""

    key: str
    image: bytes | np.ndarray
    """Encoded image, or features [F_i]."""
    texts: list[str] | np.ndarray
    """Texts in their stored order, or features [captions, F_t]."""
    labels: tuple[int, ...]
    """Class indices; empty where the pair has none."""


def split_member_name(name: str) -> tuple[str, str]:
    """``dir/a.image.npy`` -> (``dir/a``, ``image.npy``): the key ends at the base name's first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def parse_labels(record: dict[str, Any]) -> tuple[int, ...]:
    """Class indices of a sample's JSON record: ``label`` (int) or ``labels`` (list of int); () if it has neither.

    Raises BadSample when a label is no integer of 32 bits."""
    value = record["labels"] if "labels" in record else record.get("label")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise BadSample(f"label {value!r} is not an integer or a list of integers")
    if not all(v in LABELS for v in values):
        raise BadSample(f"label {value!r} is out of range: a class index is below 2 ** 31")
    return tuple(sorted(set(values)))


_DAMAGED = (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError, TokenError)
"""What reading a damaged array raises."""


@dataclass(frozen=True)
class _Layout:
    """What the header of a ``.npy`` file says."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    numbers: int
    """How many there are, 0 for what is no array of numbers."""


@lru_cache(maxsize=256)  # the arrays of a shard have one header, and parsing it is most of the work
def _npy_layout(header: bytes) -> _Layout:
    """Raises ValueError and more: `header` can be anything."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    good = dtype.kind in "fiu" and all(type(side) is int and side >= 1 for side in shape)  # True is an int, no side
    return _Layout(dtype, shape, fortran, math.prod(shape) if good else 0)


def _npy_start(data: bytes) -> int:
    """Where the numbers of a ``.npy`` file begin."""
    width = 2 if data[6:7] == b"\x01" else 4  # of the header's length, by the format's version
    return 8 + width + int.from_bytes(data[8 : 8 + width], "little")


def _npy_view(data: bytes) -> np.ndarray:
    """The array of a ``.npy`` file, read-only, in the file's own bytes. Raises ValueError and more."""
    start = _npy_start(data)
    layout = _npy_layout(data[:start])
    return np.frombuffer(data, layout.dtype, math.prod(layout.shape), start).reshape(layout.shape)


def parse_array(data: bytes, what: str) -> np.ndarray:
    """A ``.npy`` member as float32, read-only. Raises BadSample when it is not a finite numeric array."""
    start = _npy_start(data)
    try:
        layout = _npy_layout(data[:start])
        if not layout.numbers:
            raise BadSample(f"{what} holds {layout.dtype} of shape {layout.shape}, not numbers")
        flat = np.frombuffer(data, layout.dtype, layout.numbers, start).astype(np.float32, copy=False)
    except BadSample:
        raise
    except _DAMAGED as error:
        raise BadSample(f"{what} is not a readable .npy array ({error})") from None
    # A finite sum of squares has finite terms and is found ten times faster; one that is not may have overflowed.
    if not (flat.size < FEW and math.isfinite(flat.dot(flat))) and not np.isfinite(flat).all():
        raise BadSample(f"{what} holds NaN or Inf")
    if layout.fortran:
        return flat.reshape(layout.shape, order="F")
    return flat if len(layout.shape) == 1 else flat.reshape(layout.shape)


def parse_sample(key: str, members: dict[str, bytes]) -> Sample:
    """Build a Sample from its members (extension -> bytes).

    Raises BadSample, naming what is missing or wrong."""
    record: dict[str, Any] = {}
    if "json" in members:
        try:
            record = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{key}.json is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise BadSample(f"{key}.json is not a JSON object")

    image: bytes | np.ndarray
    if "image.npy" in members:
        image = parse_array(members["image.npy"], f"{key}.image.npy")
        if image.ndim != 1:
            raise BadSample(f"{key}.image.npy has shape {image.shape}, expected one dimension")
    else:
        found = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if found is None:
            raise BadSample("has no image: expected a .jpg, .png, .webp or .image.npy member")
        image = members[found]

    texts: list[str] | np.ndarray
    if "text.npy" in members:
        texts = parse_array(members["text.npy"], f"{key}.text.npy")
        texts = texts if texts.ndim > 1 else texts.reshape(1, -1)
        if texts.ndim != 2:
            raise BadSample(f"{key}.text.npy has shape {texts.shape}, expected [F] or [captions, F]")
    elif "texts" in record:
        listed = record["texts"]
        if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t.strip() for t in listed):
            raise BadSample(f'{key}.json: "texts" must be a non-empty list of non-empty strings')
        texts = listed
    elif "txt" in members:
        try:
            text = members["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSample(f"{key}.txt is not UTF-8 ({error})") from None
        if not text:
            raise BadSample(f"{key}.txt is empty")
        texts = [text]
    else:
        raise BadSample('has no text: expected a .txt or .text.npy member, or "texts" in .json')
    return Sample(key, image, texts, parse_labels(record))


# ---------------------------------------------------------------------------------------------- tar


def _octal(field_bytes: bytes) -> int:
    """A tar header's number: octal text, or base-256 when the top bit is set (GNU). Raises ValueError."""
    if field_bytes[0] & 0x80:
        if field_bytes[0] & 0x40:
            raise ValueError("negative number")
        return int.from_bytes(field_bytes, "big") & ((1 << (8 * len(field_bytes) - 1)) - 1)
    text = field_bytes.rstrip(b"\0 ").lstrip()
    if text and not text.isdigit():  # int() would take a sign, a prefix and underscores
        raise ValueError("not a number")
    return int(text, 8) if text else 0


def _read(file: BinaryIO, size: int) -> bytes:
    """`size` bytes, or fewer where the file ends."""
    if size <= PIECE:
        return file.read(size)
    pieces = []
    while size and (piece := file.read(min(size, PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _pax_records(data: bytes) -> dict[str, str]:
    records, at = {}, 0
    while at < len(data):
        space = data.index(b" ", at)
        length = int(data[at:space])
        if not space - at + 1 < length <= len(data) - at:
            raise ValueError("a record of a length that it cannot have")
        name, _, value = data[space + 1 : at + length - 1].partition(b"=")
        records[name.decode()] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


_PLAIN = struct.Struct("100s24x11sc12x6s2sc188xB166x")
"""A ustar header: name, size, its last byte, checksum, its last bytes, kind, first byte of the name's prefix."""


def _byte_sum(header: bytes) -> int:
    """The checksum of a tar header: its bytes, those of the checksum itself counted as spaces.

    The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: more than those of 256 bytes come to."""
    halves = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    return halves + 8 * 32 - sum(header[148:156])


def _plain(header: bytes) -> tuple[str, int] | None:
    """(name, size) of a regular file whose header is as most tools write it and whole; None: look closer."""
    name, size, after, checksum, end, kind, prefix = _PLAIN.unpack(header)
    if prefix or kind not in b"0\0" or not size.isdigit() or after not in b"\0 " or end != b"\0 ":
        return None
    try:
        if not checksum.isdigit() or int(checksum, 8) != _byte_sum(header):
            return None
        return name.rstrip(b"\0").decode("utf-8", "surrogateescape"), int(size, 8)
    except ValueError:
        return None


@dataclass
class Member:
    key: str
    extension: str
    start: int
    """Offset of the member's first header block, extension headers included."""
    header: bytes
    """The header block, where it is plain and says all; else b''."""
    data: bytes


def iter_members(file: BinaryIO, name: str) -> Iterator[Member]:
    """The regular files of an uncompressed tar (ustar, GNU and pax names), in order, reading forward only.

    Raises BadSample at the first damaged or cut place; `name` is the shard's, for the message."""
    offset = start = 0
    longname: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = file.read(BLOCK)
        if not header or header == b"\0" * BLOCK:
            return
        if len(header) < BLOCK:
            raise BadSample(f"{name} is truncated at byte {offset + len(header)}")
        kind = header[156:157]
        plain = None if pax else _plain(header)
        size = plain[1] if plain else _size(header, kind, pax, f"{name} has a damaged tar header at byte {offset}")
        data = _read(file, size)
        padding = file.read(-size % BLOCK)
        if len(data) < size or len(padding) < -size % BLOCK:
            raise BadSample(f"{name} is truncated at byte {offset + BLOCK + len(data) + len(padding)}")
        offset += BLOCK + size + len(padding)
        try:
            if kind == b"L":
                longname = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            if kind == b"x":
                pax = _pax_records(data)
                continue
            if kind in (b"0", b"\0"):
                key, extension = split_member_name(pax.get("path", longname or (plain[0] if plain else _name(header))))
                yield Member(key, extension, start, header if plain and longname is None else b"", data)
        except (ValueError, struct.error):
            raise BadSample(f"{name} has a damaged extended header before byte {offset}") from None
        longname, pax, start = None, {}, offset


def _size(header: bytes, kind: bytes, pax: dict[str, str], damage: str) -> int:
    """Bytes of data behind a header. Raises BadSample(damage) when the header is not whole."""
    try:
        checksum = _octal(header[148:156])
        size = _octal(header[124:136])
        if "size" in pax and kind not in (b"x", b"g"):
            size = int(pax["size"])
        if size < 0 or checksum != _byte_sum(header):
            raise ValueError
    except ValueError:
        raise BadSample(damage) from None
    links = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: no data, whatever the size says
    return 0 if kind in links else size


def _name(header: bytes) -> str:
    base = header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
    if header[257:262] == b"ustar" and header[345] and header[257:265] != b"ustar  \0":
        return header[345:500].rstrip(b"\0").decode("utf-8", "surrogateescape") + "/" + base
    return base


def iter_groups(file: BinaryIO, name: str) -> Iterator[list[Member]]:
    """The members of each sample: consecutive ones with the same key. Raises BadSample as `iter_members` does.

    Members without an extension belong to no sample."""
    group: list[Member] = []
    for member in iter_members(file, name):
        if not member.extension:
            continue
        if group and member.key != group[0].key:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def iter_samples(file: BinaryIO, name: str) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """(key, offset of its first header, members by extension) of each sample. Raises as `iter_members` does."""
    for group in iter_groups(file, name):
        yield group[0].key, group[0].start, {member.extension: member.data for member in group}


# ---------------------------------------------------------------------------------------------- index sidecar


class Layout(NamedTuple):
    """Where the members of a sample lie: one behind the other, each behind its header block."""

    pattern: str = ""
    """Bytes of the key, then the extensions, as in ``12 jpg json``. '' where only a walk through headers finds them."""
    check: int = 0
    """CRC-32 of the header blocks."""
    sizes: tuple[int, ...] = ()
    """Bytes of each member."""

    @classmethod
    def of(cls, group: list[Member]) -> Layout:
        extensions = " ".join(member.extension for member in group)
        plain = extensions.isprintable() and extensions.count(" ") == len(group) - 1
        sizes = tuple(len(member.data) for member in group)
        if not plain or not all(member.header for member in group) or len(group) > MOST_MEMBERS or max(sizes) >> 32:
            return cls()
        check = zlib.crc32(b"".join(member.header for member in group))
        return cls(f"{len(group[0].key.encode('utf-8', 'surrogateescape'))} {extensions}", check, sizes)

    def span(self) -> int:
        return sum(BLOCK + size + -size % BLOCK for size in self.sizes)


@dataclass
class ShardIndex:
    """Where the samples of a shard and their members lie, and what classes they have."""

    offsets: np.ndarray
    """int64 [n + 1]: byte of each sample's first header; the last entry is where the last sample ends."""
    label_starts: np.ndarray
    """int64 [n + 1]: sample i has the classes label_values[label_starts[i]:label_starts[i + 1]]."""
    label_values: np.ndarray
    """int32 [total labels]."""
    patterns: np.ndarray
    """str [patterns]: those of the samples' layouts, the first one ''."""
    layouts: np.ndarray
    """uint32 [n, 2 + most members]: the number of its pattern, the checksum and the sizes of each sample's layout."""

    def __post_init__(self) -> None:
        """Raises ValueError on what no tar gives."""
        n, columns = len(self.offsets) - 1, max(2, *self.layouts.shape[1:])
        for array, kind, shape in (
            (self.offsets, "<i8", (n + 1,)),
            (self.label_starts, "<i8", (n + 1,)),
            (self.label_values, "<i4", (len(self.label_values),)),
            (self.patterns, "<U", (len(self.patterns),)),
            (self.layouts, "<u4", (n, columns)),
        ):
            if not array.dtype.str.startswith(kind) or array.shape != shape:
                raise ValueError(f"an array is {array.dtype} of shape {array.shape}")
        for rising, last in ((self.label_starts, len(self.label_values)), (self.offsets, self.offsets[-1])):
            if rising[0] < 0 or rising[-1] != last or (rising[1:] < rising[:-1]).any():
                raise ValueError("its offsets do not rise")
        words = [str(pattern).split(" ") for pattern in self.patterns]
        self._key_bytes = [int(first or 0) for first, *_ in words]
        self._extensions = [extensions for _, *extensions in words]
        if words[:1] != [[""]] or not 0 <= min(self._key_bytes) <= max(self._key_bytes) <= BLOCK:
            raise ValueError("its patterns are none")
        members = np.asarray([len(extensions) for extensions in self._extensions])
        number, sizes = self.layouts[:, 0], self.layouts[:, 2:].astype(np.int64)
        if number.max(initial=0) >= len(members) or members.max() > columns - 2:
            raise ValueError("a sample has no pattern")
        spans = ((BLOCK + sizes + -sizes % BLOCK) * (np.arange(columns - 2) < members[number, None])).sum(1)
        if (spans != np.diff(self.offsets))[number > 0].any():
            raise ValueError("the members of a sample do not fill it")

    @classmethod
    def build(cls, offsets: list[int], end: int, labels: list[tuple[int, ...]], layouts: list[Layout]) -> ShardIndex:
        starts = np.concatenate([[0], np.cumsum([len(one) for one in labels])]).astype(np.int64)
        values = np.asarray([v for one in labels for v in one], dtype=np.int32)
        patterns = {"": 0}
        widest = max((len(layout.sizes) for layout in layouts), default=0)
        table = np.zeros((len(layouts), 2 + widest), np.uint32)
        for i, (layout, start, stop) in enumerate(zip(layouts, offsets, [*offsets, end][1:], strict=True)):
            if layout.span() == stop - start and (layout.pattern in patterns or len(patterns) < MOST_PATTERNS):
                number = patterns.setdefault(layout.pattern, len(patterns))
                table[i, : 2 + len(layout.sizes)] = number, layout.check, *layout.sizes
        return cls(np.asarray([*offsets, end], dtype=np.int64), starts, values, np.asarray(list(patterns)), table)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def labels(self, i: int) -> tuple[int, ...]:
        return tuple(int(v) for v in self.label_values[self.label_starts[i] : self.label_starts[i + 1]])

    def cut(self, row: list[int], data: bytes, bodies: Data, at: int = 0) -> tuple[str, dict[str, Data]] | None:
        """(key, members by extension) of the sample with the row `row` in `layouts`, whose first header is data[at].

        `bodies`: `data`, or a view of it of which the members shall be views. None: only a walk finds the members, or
        the headers are not those that were indexed."""
        number, check, *sizes = row
        if not number:
            return None
        key = data[at : at + self._key_bytes[number]].decode("utf-8", "surrogateescape")
        found, members = 0, {}
        for extension, size in zip(self._extensions[number], sizes, strict=False):
            body = at + BLOCK
            found = zlib.crc32(data[at:body], found)
            members[extension] = bodies[body : body + size]
            at = body + size + -size % BLOCK
        return (key, members) if found == check else None

    def to_bytes(self) -> bytes:
        """The ``.npz`` file; the same index gives the same bytes."""
        out = io.BytesIO()
        np.savez(out, version=np.int64(INDEX_VERSION), **{each.name: getattr(self, each.name) for each in fields(self)})
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Raises BadInput when `data` is not an index of this version."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                    raise ValueError("it is compressed")
                arrays = {entry.filename.removesuffix(".npy"): _npy_view(file.read(entry)) for entry in file.infolist()}
            if arrays.pop("version", np.zeros(0)).tolist() != INDEX_VERSION:
                raise BadInput(f"{name} is of another version: run 'python -m shards index --overwrite'")
            return cls(**arrays)
        except BadInput:
            raise
        except (*_DAMAGED, OSError, KeyError, IndexError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise BadInput(f"{name} is not a shard index ({error}); run 'python -m shards index' again") from None


def index_name(shard: str) -> str:
    """``train-000000.tar`` -> ``train-000000.index.npz``."""
    return shard.removesuffix(".tar") + ".index.npz"


# ---------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class ShardInfo:
    name: str
    """File name relative to the manifest."""
    samples: int
    bytes: int
    sha256: str
    """Of the whole tar."""


@dataclass
class Manifest:
    """``manifest.json``: what a data set holds. Class i is ``classes[i]``; empty for pairs without labels."""

    name: str
    label_kind: LabelKind
    classes: list[str]
    splits: dict[str, list[ShardInfo]]
    """Split name -> shards in their canonical order."""
    image: str = "encoded"
    """``encoded`` or ``features``."""
    image_dim: int | None = None
    """F_i when `image` is ``features``."""
    text: str = "utf8"
    """``utf8`` or ``features``."""
    text_dim: int | None = None
    attribution: str = ""
    """Source and licence of the data, one paragraph."""
    details: dict[str, Any] = field(default_factory=dict)
    """How it was made: source, options, backbones. Informative."""

    def shards(self, split: str) -> list[ShardInfo]:
        """Raises BadInput when the split is missing or has no samples."""
        if split not in self.splits:
            raise BadInput(f"{self.name} has no split '{split}': its manifest has {', '.join(self.splits) or 'none'}")
        shards = self.splits[split]
        if not sum(s.samples for s in shards):
            raise BadInput(f"split '{split}' of {self.name} has no samples: pack some or name another split")
        return shards

    def samples(self, split: str) -> int:
        return sum(s.samples for s in self.splits.get(split, []))

    def to_json(self) -> str:
        record = {"version": MANIFEST_VERSION, **asdict(self)}
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Raises BadInput when the text is not a manifest of this version; `where` is its file for the message."""
        try:
            record = json.loads(text)
            version = record.pop("version")
            splits = {k: [ShardInfo(**s) for s in v] for k, v in record.pop("splits").items()}
            manifest = cls(splits=splits, **record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{where} is not a manifest ({error}); write it with 'python -m shards index'") from None
        if version != MANIFEST_VERSION:
            raise BadInput(f"{where} has version {version}, this program reads {MANIFEST_VERSION}: pack the data again")
        if manifest.label_kind not in ("single", "multi", "none"):
            raise BadInput(f"{where}: label_kind is {manifest.label_kind!r}, expected single, multi or none")
        return manifest


def load_manifest(data: str | os.PathLike[str]) -> Manifest:
    """Read DIR/manifest.json. Raises BadInput when the folder or the manifest is missing or wrong."""
    folder = Path(data)
    if not folder.is_dir():
        raise BadInput(f"data folder {folder} does not exist: pack one with 'python -m shards build'")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BadInput(f"{folder} has no {MANIFEST_NAME}: write it with 'python -m shards index {folder}'")
    return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))


# ---------------------------------------------------------------------------------------------- files


def natural_splits(names: Iterable[str]) -> list[str]:
    """Split names in the order a reader expects: train, val, test, then the rest by name."""
    first = ["train", "val", "test"]
    found = set(names)
    return [n for n in first if n in found] + sorted(found - set(first))
