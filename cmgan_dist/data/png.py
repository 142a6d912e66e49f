"""How many chunks a PNG has (ISO/IEC 15948, clause 5): Pillow looks at each, in Python."""

from __future__ import annotations

from cmgan_dist.errors import BadSample

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS = 1 << 16
"""Chunks of a PNG, which take Pillow half a second."""


def check_chunks(data: bytes) -> None:
    """Raise BadSample when a PNG has so many chunks that to look at them would take too long."""
    at = len(SIGNATURE)
    for _ in range(MOST_CHUNKS):
        if at >= len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise BadSample(f"the image has more than {MOST_CHUNKS} chunks: save it anew")
