"""What a JPEG's headers say of the memory and the time that decoding it takes (ITU-T T.81, annex B)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmgan_dist.errors import BadSample

MOST_BYTES = 480 << 20
"""Most bytes of coefficients and pixels, less than 512 MiB: a JPEG of several scans is kept whole while they come."""
MOST_SCANNED = 600_000_000
"""Most pixels times scans. Each takes up to 5 ns, whatever is in the scan: 3 s on one core."""
ARITHMETIC = 4
"""Times as long as by Huffman codes, that arithmetic coding takes."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the markers of a frame (table B.1)."""
_BASELINE, _EXTENDED, _FIRST_ARITHMETIC = 0xC0, 0xC1, 0xC9
_SCAN = 0xDA


class Frame(NamedTuple):
    """What a JPEG's frame header says."""

    kind: int
    """Second byte of its marker."""
    samples: float
    """Samples a pixel, 3 without subsampling."""
    at: int
    """Where in the file it is, in bytes."""


def read_frame(data: bytes) -> Frame | None:
    """Return what the first frame header of a JPEG says, None when there is no whole one."""
    at = 2
    while 0 <= at < len(data) - 10:
        kind = data[at + 1]
        if data[at] != 0xFF or kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8:
            at = data.find(b"\xff", at + (1 if kind == 0xFF or data[at] != 0xFF else 2))
            continue
        if kind == _SCAN:
            return None
        if kind in _FRAMES:
            return _parse_frame(data, at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
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
