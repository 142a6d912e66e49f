"""What a JPEG's headers say of the memory and the time that decoding it takes (ITU-T T.81, annex B)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cmgan_dist.errors import BadSample

MOST_BYTES = 480 << 20
"""Most bytes of coefficients and pixels, less than 512 MiB: a JPEG of several scans is kept whole while they come."""
MOST_SCANNED = 600_000_000
"""Most pixels times scans. Each takes up to 5 ns, whatever is in the scan: 3 s on one core."""
ARITHMETIC = 4
"""Times as long as by Huffman codes, that arithmetic coding takes."""
MOST_SEGMENTS, MOST_HEADER_BYTES = 1 << 16, 16 << 20
"""Segments, and bytes, before the pixels: Pillow looks at each in Python, fill bytes too, and into some of them."""
MOST_APP1 = 256
"""Segments with EXIF or XMP, 16 MiB: Pillow joins those of EXIF one by one, in a time that grows with their square."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the markers of a frame (table B.1)."""
_BASELINE, _EXTENDED, _FIRST_ARITHMETIC = 0xC0, 0xC1, 0xC9
_SCAN, _APP1 = 0xDA, 0xE1


class Frame(NamedTuple):
    """What a JPEG's frame header says."""

    kind: int
    """Second byte of its marker."""
    samples: float
    """Samples a pixel, 3 without subsampling."""
    at: int
    """Where in the file it is, in bytes."""


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (second byte of its marker, where it is) of each segment of a JPEG up to its first scan; of a byte that
    belongs to none, such as a fill byte, (0, where it is).

    Raises BadSample when to look at them would take too long."""
    at = 2
    for _ in range(MOST_SEGMENTS):
        if not 0 <= at < min(len(data) - 3, MOST_HEADER_BYTES):
            break
        kind = data[at + 1]
        if data[at] != 0xFF or kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8:
            yield 0, at
            at = data.find(b"\xff", at + (1 if kind == 0xFF or data[at] != 0xFF else 2))
            continue
        yield kind, at
        if kind == _SCAN:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    else:
        raise BadSample(f"the image has more than {MOST_SEGMENTS} segments before its pixels: save it anew")
    if MOST_HEADER_BYTES <= at < len(data):
        raise BadSample(f"the image has more than {MOST_HEADER_BYTES >> 20} MiB before its pixels: save it anew")


def check_segments(data: bytes) -> None:
    """Raise BadSample when Pillow would take too long to look at the segments of a JPEG."""
    if sum(kind == _APP1 for kind, _ in segments(data)) > MOST_APP1:
        raise BadSample(f"the image has more than {MOST_APP1} segments of EXIF and XMP: save it anew")


def read_frame(data: bytes) -> Frame | None:
    """Return what the first frame header of a JPEG says, None when there is no whole one. Raises BadSample as
    `segments` does."""
    for kind, at in segments(data):
        if kind in _FRAMES and at < len(data) - 10:
            return _parse_frame(data, at)
    return None


def _parse_frame(data: bytes, at: int) -> Frame | None:
    """Return what the frame header at a byte says (T.81, B.2.2), None when it is not whole."""
    count = data[at + 9]
    factors = data[at + 11 : at + 10 + 3 * count : 3]
    sides = [(each >> 4, each & 15) for each in factors]
    if len(sides) < count or not sides or not all(across and down for across, down in sides):
        return None
    most = max(across for across, _ in sides) * max(down for _, down in sides)
    samples = sum(across * down for across, down in sides) / most
    return Frame(data[at + 1], samples, at)


def count_scans(data: bytes, at: int) -> int:
    """Return the scans behind a byte; those of a thumbnail or of further pictures count.

    `bytes.count` takes five times as long."""
    rest = np.frombuffer(data, np.uint8, offset=at)
    return int(np.count_nonzero((rest[:-1] == 0xFF) & (rest[1:] == _SCAN)))


def check_jpeg(data: bytes, shape: tuple[int, int]) -> None:
    """Raise BadSample when decoding a JPEG of `shape` (width, height) would take too much memory or time."""
    frame = read_frame(data)
    if frame is None:
        raise BadSample("the image does not decode (no whole frame header)")
    pixels, slowness = shape[0] * shape[1], ARITHMETIC if frame.kind >= _FIRST_ARITHMETIC else 1
    kept = pixels * (4 + 2 * frame.samples)
    if kept <= MOST_BYTES and pixels * slowness * ((len(data) - frame.at) // 2) <= MOST_SCANNED:
        return  # however many scans: a marker has two bytes
    scans = count_scans(data, frame.at)
    if pixels * slowness * scans > MOST_SCANNED:
        raise BadSample(f"the image has {scans} scans of {pixels} pixels, which take too long: save it anew")
    buffered = scans > 1 or frame.kind not in (_BASELINE, _EXTENDED)
    if buffered and kept > MOST_BYTES:
        raise BadSample(f"the image has {pixels} pixels in several scans, which take too much memory: save it as one")
