"""The index sidecar of a shard: where its samples and their members lie, and their labels."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import numpy as np

from cmgan_dist.data.sample import UNREADABLE_ARRAY, npy_view
from cmgan_dist.data.tar import BLOCK, Member
from cmgan_dist.errors import BadInput, shards_command

INDEX_VERSION = 2
MOST_MEMBERS, MOST_PATTERNS = 8, 256
"""Members of a sample, and kinds of samples, that the sidecar keeps; what goes beyond is read by a walk."""
Data = TypeVar("Data", bytes, memoryview)


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
        """Return the layout of a sample's members; an empty one where only a walk finds them again."""
        extensions = " ".join(member.extension for member in group)
        plain = extensions.isprintable() and extensions.count(" ") == len(group) - 1
        plain = plain and len({member.extension for member in group}) == len(group)
        sizes = tuple(len(member.data) for member in group)
        if not plain or not all(member.header for member in group) or len(group) > MOST_MEMBERS or max(sizes) >> 32:
            return cls()
        check = zlib.crc32(b"".join(member.header for member in group))
        return cls(f"{len(group[0].key.encode('utf-8', 'surrogateescape'))} {extensions}", check, sizes)

    def span(self) -> int:
        """Return the bytes that the members take with their headers and padding."""
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
    """str [patterns]: the patterns of the samples' layouts, each once, the first one ''."""
    layouts: np.ndarray
    """uint32 [n, 2 + most members]: the number of its pattern, the checksum and the sizes of each sample's layout."""

    def __post_init__(self) -> None:
        """Check the arrays. Raises ValueError on what no tar gives."""
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
        if any(len(set(extensions)) < len(extensions) for extensions in self._extensions):
            raise ValueError("a sample has a member twice")
        members = np.asarray([len(extensions) for extensions in self._extensions])
        number, sizes = self.layouts[:, 0], self.layouts[:, 2:].astype(np.int64)
        if number.max(initial=0) >= len(members) or members.max() > columns - 2:
            raise ValueError("a sample has no pattern")
        spans = ((BLOCK + sizes + -sizes % BLOCK) * (np.arange(columns - 2) < members[number, None])).sum(1)
        if (spans != np.diff(self.offsets))[number > 0].any():
            raise ValueError("the members of a sample do not fill it")

    @classmethod
    def build(cls, offsets: list[int], end: int, labels: list[tuple[int, ...]], layouts: list[Layout]) -> ShardIndex:
        """Return the index of a shard of n samples: per sample its first byte, classes and layout; `end` is where the
        last one ends. A sample whose layout does not fill it, or has a pattern too many, is left to the walk."""
        patterns = {"": 0}
        widest = max((len(layout.sizes) for layout in layouts), default=0)
        table = np.zeros((len(layouts), 2 + widest), np.uint32)
        for i, (layout, start, stop) in enumerate(zip(layouts, offsets, [*offsets, end][1:], strict=True)):
            if layout.span() == stop - start and (layout.pattern in patterns or len(patterns) < MOST_PATTERNS):
                number = patterns.setdefault(layout.pattern, len(patterns))
                table[i, : 2 + len(layout.sizes)] = number, layout.check, *layout.sizes
        return cls(np.asarray([*offsets, end], dtype=np.int64), *_flat(labels), np.asarray(list(patterns)), table)

    def labelled(self, labels: list[tuple[int, ...]]) -> ShardIndex:
        """Return the index with other classes of its samples."""
        starts, values = _flat(labels)
        return replace(self, label_starts=starts, label_values=values)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.offsets) - 1

    def labels(self, i: int) -> tuple[int, ...]:
        """Return the classes of sample i."""
        return tuple(int(v) for v in self.label_values[self.label_starts[i] : self.label_starts[i + 1]])

    def slice_members(
        self, row: list[int], data: bytes, bodies: Data, at: int = 0
    ) -> tuple[str, dict[str, Data]] | None:
        """Return (key, members by extension) of the sample with the row `row` in `layouts`, whose first header is
        data[at]; None when only a walk finds the members, or the headers are not those that were indexed.

        `bodies`: `data`, or a view of it of which the members shall be views."""
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
        """Return the ``.npz`` file; the same index gives the same bytes."""
        out = io.BytesIO()
        np.savez(out, version=np.int64(INDEX_VERSION), **{each.name: getattr(self, each.name) for each in fields(self)})
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str, place: str = "DIR") -> ShardIndex:
        """Return the index in the bytes of a sidecar; `name` says where that lies, `place` where its data set does.

        Raises BadInput when they are not an index of this version."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                    raise ValueError("it is compressed")
                arrays = {entry.filename.removesuffix(".npy"): npy_view(file.read(entry)) for entry in file.infolist()}
            if arrays.pop("version", np.zeros(0)).tolist() != INDEX_VERSION:
                raise BadInput(f"{name} is of another version: {write_anew(place)}")
            return cls(**arrays)
        except BadInput:
            raise
        except (*UNREADABLE_ARRAY, OSError, KeyError, IndexError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise BadInput(f"{name} is not a shard index ({error}): {write_anew(place)}") from None


def _flat(labels: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Return where the classes of each sample begin, int64 [n + 1], and all of them, int32."""
    starts = np.concatenate([[0], np.cumsum([len(one) for one in labels])]).astype(np.int64)
    return starts, np.asarray([v for one in labels for v in one], dtype=np.int32)


def write_anew(place: str) -> str:
    """Return what to do when the sidecars of the data set at `place`, a folder or URL, are wrong."""
    if "://" in place:
        return f"run 'python -m shards index --overwrite DIR' where the files of {place} are kept, and upload them anew"
    return f"run {shards_command('index', '--overwrite', place)}"


def index_name(shard: str) -> str:
    """Return the sidecar's name of a shard: ``train-000000.tar`` -> ``train-000000.index.npz``."""
    return shard.removesuffix(".tar") + ".index.npz"
