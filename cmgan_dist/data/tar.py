"""Tars, read forward only: members, and the groups of members that are samples."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from cmgan_dist.data.folder import MOST_FILE_BYTES
from cmgan_dist.data.sample import IMAGE_MEMBERS, MEMBERS
from cmgan_dist.errors import BadSample, shown

BLOCK = 512
"""Bytes of a tar's block: headers are one, data fills whole ones."""
PIECE = 1 << 24
"""Most bytes read at a time: what a header claims is not allocated before it is there."""
NOTES = ("readme", "license", "licence", "copying", "notice", "changelog")
"""Names of texts that say something of a tar, not of a picture."""

COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How files begin that a tool compressed."""
NO_FILES = (b"5", b"g", b"K", b"V", b"D", b"M")
"""Kinds of headers that are no file: folders, records for all that follows, names of links, labels, further volumes."""
NOT_REGULAR = " (a link, a device or a sparse file: write the tar by 'tar --dereference --hard-dereference')"
"""What is said of other files whose data a tar does not hold as they are."""


def split_member_name(name: str) -> tuple[str, str]:
    """Return key and extension of a member: ``dir/a.image.npy`` -> (``dir/a``, ``image.npy``).

    The key ends at the base name's first dot; the extension is in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _octal(field_bytes: bytes) -> int:
    """Return a tar header's number: octal text, or base-256 when the top bit is set (GNU). Raises ValueError."""
    if field_bytes[0] & 0x80:
        if field_bytes[0] & 0x40:
            raise ValueError("negative number")
        return int.from_bytes(field_bytes, "big") & ((1 << (8 * len(field_bytes) - 1)) - 1)
    text = field_bytes.rstrip(b"\0 ").lstrip()
    if text and not text.isdigit():  # int() would take a sign, a prefix and underscores
        raise ValueError("not a number")
    return int(text, 8) if text else 0


def _read(file: BinaryIO, size: int) -> bytes:
    """Return `size` bytes, or fewer where the file ends."""
    if size <= PIECE:
        return file.read(size)
    pieces = []
    while size and (piece := file.read(min(size, PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _pass_over(file: BinaryIO, size: int) -> int:
    """Read `size` bytes, or fewer where the file ends, keep none of them, and return their number."""
    passed = 0
    while passed < size and (piece := file.read(min(size - passed, PIECE))):
        passed += len(piece)
    return passed


def _pax_records(data: bytes) -> dict[str, str]:
    """Return the records of an extended header (POSIX.1-2001, pax). Raises ValueError when they are damaged."""
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


def header_checksum(header: bytes) -> int:
    """Return the checksum of a tar header of 512 bytes: their sum, with the checksum's own field counted as spaces.

    The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: more than those of 256 bytes come to."""
    halves = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    return halves + 8 * 32 - sum(header[148:156])


def _plain(header: bytes) -> tuple[str, int] | None:
    """Return (name, size) of a regular file whose header is as most tools write it and whole; None: look closer."""
    name, size, after, checksum, end, kind, prefix = _PLAIN.unpack(header)
    if prefix or kind not in b"0\0" or not size.isdigit() or after not in b"\0 " or end != b"\0 ":
        return None
    try:
        if not checksum.isdigit() or int(checksum, 8) != header_checksum(header):
            return None
        return name.rstrip(b"\0").decode("utf-8", "surrogateescape"), int(size, 8)
    except ValueError:
        return None


@dataclass
class Member:
    """A file in a tar."""

    key: str
    """Its name up to the first dot of the base name: the sample that it belongs to."""
    extension: str
    """What follows that dot, in lower case; '' where there is none."""
    start: int
    """Offset of the member's first header block, extension headers included."""
    header: bytes
    """The header block, where it is plain and says all; else b''."""
    data: bytes
    too_large: bool = False
    """Whether it has more than MOST_FILE_BYTES, of which `data` holds none."""
    regular: bool = True
    """False for a link, a sparse file or a device, whose data the tar does not hold as they are."""

    @property
    def name(self) -> str:
        """Its name in the tar, the extension in lower case; of what is not regular, with what to do about it."""
        name = f"{self.key}.{self.extension}" if self.extension else self.key
        return name if self.regular else name + NOT_REGULAR

    def is_foreign(self) -> bool:
        """Return whether no sample is made of such files: hidden ones (``._a.jpg``, ``.DS_Store``), macOS's own, and
        what is not regular."""
        if not self.regular:
            return True
        folder, _, stem = self.key.rpartition("/")
        parts = folder.split("/") if folder else []
        return not stem or any(part == "__MACOSX" or (part[:1] == "." and part.strip(".")) for part in parts)


def iter_members(file: BinaryIO, name: str) -> Iterator[Member]:
    """Yield the files of an uncompressed tar (ustar, GNU and pax names), in order, reading forward only, up to its end:
    a zero block, or the end of the file.

    Raises BadSample at the first damaged or cut place; `name` is the shard's, for the message."""
    offset = start = 0
    longname: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = file.read(BLOCK)
        if not header or header == b"\0" * BLOCK:
            return
        if len(header) < BLOCK:
            raise BadSample(_fault(header, name, offset, f"{name} is truncated at byte {offset + len(header)}"))
        kind = header[156:157]
        plain = None if pax else _plain(header)
        damage = "" if plain else _fault(header, name, offset, f"{name} has a damaged tar header at byte {offset}")
        size = plain[1] if plain else _size(header, kind, pax, damage)
        too_large = size > MOST_FILE_BYTES
        data = b"" if too_large else _read(file, size)
        there = _pass_over(file, size) if too_large else len(data)
        padding = file.read(-size % BLOCK)
        if there < size or len(padding) < -size % BLOCK:
            raise BadSample(f"{name} is truncated at byte {offset + BLOCK + there + len(padding)}")
        offset += BLOCK + size + len(padding)
        try:
            if kind == b"L":
                longname = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            if kind == b"x":
                pax = _pax_records(data)
                continue
            if kind not in NO_FILES:
                key, extension = split_member_name(pax.get("path", longname or (plain[0] if plain else _name(header))))
                regular = kind in (b"0", b"\0", b"7") and not any(field.startswith("GNU.sparse") for field in pax)
                whole = header if plain and longname is None else b""
                yield Member(key, extension, start, whole, data, too_large, regular)
        except (ValueError, struct.error):
            raise BadSample(f"{name} has a damaged extended header before byte {offset}") from None
        longname, pax, start = None, {}, offset


def _fault(header: bytes, name: str, offset: int, otherwise: str) -> str:
    """Return what is wrong with a tar at `offset`, where `header` is none: it is compressed, or as `otherwise` says."""
    tool = "" if offset else next((tool for start, tool in COMPRESSED.items() if header.startswith(start)), "")
    if not tool:
        return otherwise
    return f"{name} is compressed by {tool}, no plain tar ('{tool} -dc < {name} > NEW && mv NEW {name}' makes it one)"


def _size(header: bytes, kind: bytes, pax: dict[str, str], damage: str) -> int:
    """Return the bytes of data behind a header. Raises BadSample(damage) when the header is not whole."""
    try:
        checksum = _octal(header[148:156])
        size = _octal(header[124:136])
        if "size" in pax and kind not in (b"x", b"g"):
            size = int(pax["size"])
        if size < 0 or checksum != header_checksum(header):
            raise ValueError
    except ValueError:
        raise BadSample(damage) from None
    links = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: no data, whatever the size says
    return 0 if kind in links else size


def _name(header: bytes) -> str:
    """Return the name in a header, with the prefix where it is of the ustar format."""
    base = header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
    if header[257:262] == b"ustar" and header[345] and header[257:265] != b"ustar  \0":
        return header[345:500].rstrip(b"\0").decode("utf-8", "surrogateescape") + "/" + base
    return base


def iter_groups(file: BinaryIO, name: str, foreign: list[str] | None = None) -> Iterator[list[Member]]:
    """Yield the members of each sample: consecutive ones with the same key, of which one or more are in MEMBERS.

    What belongs to no sample is passed over, where it stands between the members of one too, and its name is added to
    `foreign`. Raises BadSample as `iter_members` does."""
    passed: list[str] = [] if foreign is None else foreign
    group: list[Member] = []
    waiting: list[Member] = []
    """Those of no known kind, behind the group: the first ones of the next, or of none."""
    for member in iter_members(file, name):
        same = bool(group) and member.key == group[0].key
        if member.is_foreign():
            passed.append(member.name)
            continue
        if waiting and member.key != waiting[0].key:
            passed += [one.name for one in waiting]
            waiting = []
        (group if same else waiting).append(member)
        if not same and _begins_sample(member):
            if group:
                yield group
            group, waiting = waiting, []
    passed += [one.name for one in waiting]
    if group:
        yield group


def _begins_sample(member: Member) -> bool:
    """Return whether a sample is made of a member, rather than a README or a licence, unless it has a picture."""
    if member.extension not in MEMBERS:
        return False
    return member.extension in IMAGE_MEMBERS or member.key.rpartition("/")[2].lower() not in NOTES


def members_of(group: list[Member]) -> dict[str, bytes]:
    """Return the data of a sample's members by extension.

    Raises BadSample when one stands twice, or has more than MOST_FILE_BYTES."""
    members: dict[str, bytes] = {}
    for member in group:
        if member.extension in MEMBERS and member.extension in members:
            raise BadSample(f"has {shown(member.name)} twice: keep one of them")
        if member.extension in MEMBERS and member.too_large:
            raise BadSample(f"{shown(member.name)} has more than {MOST_FILE_BYTES >> 20} MiB")
        members[member.extension] = member.data
    return members


def iter_samples(file: BinaryIO, name: str) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """Yield (key, offset of its first header, members by extension) of each sample.

    Raises BadSample as `iter_members` and `members_of` do."""
    for group in iter_groups(file, name):
        yield group[0].key, group[0].start, members_of(group)
