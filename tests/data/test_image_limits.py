"""Pictures that would take too much are refused before they are decoded, whoever asks."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmgan_dist.data.image import check_image, decode_image
from cmgan_dist.data.jpeg import count_scans, read_frame
from cmgan_dist.errors import BadSample
from tests.toy import ROOT, environment


def png_of_zeros(width: int, height: int, depth: int = 8, kind: int = 6) -> bytes:
    """A PNG of zeros, RGBA where `kind` is 6, packed a thousand times and made without its pixels in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = {0: 1, 2: 3, 6: 4}[kind]
    packer, row = zlib.compressobj(9), bytes(1 + width * channels * depth // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg(width: int, height: int, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG", **options)
    return out.getvalue()


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan stands `count` times more."""
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + data[-2:]


def refused(data: bytes, said: str) -> None:
    for judge in (check_image, lambda d: decode_image(d, 32), lambda d: decode_image(d, 32, random.Random(0))):
        with pytest.raises(BadSample, match=said):
            judge(data)


def segment(kind: int, data: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(data) + 2) + data


def test_files_of_many_pieces_are_refused_before_each_is_looked_at() -> None:
    """Pillow takes Python's time for each: minutes for 50 MB, of a picture of 64 pixels."""
    good, png = jpeg(64, 64), png_of_zeros(8, 8)
    start, scan = good[:2], good.index(b"\xff\xda")
    exif = segment(0xE1, b"Exif\0\0" + bytes(100))
    for pieces in (segment(0xFE, b"") * 70_000, b"\xff" * 70_000, b"\xff\0" * 70_000):
        refused(start + pieces + good[2:], "has more than 65536 segments before its pixels: save it anew")
        refused(start + exif + pieces + good[2:], "has more than 65536 segments before its pixels: save it anew")
        refused(good[:scan] + exif + pieces + good[scan:], "has more than 65536 segments before its pixels")
    refused(start + exif * 300 + good[2:], "has more than 256 segments of EXIF and XMP: save it anew")
    large = segment(0xED, bytes(65_000)) * 260
    refused(start + exif + large + good[2:], "has more than 16 MiB before its pixels: save it anew")
    for kind, at in ((b"teXt", 33), (b"IDAT", 33), (b"teXt", len(png) - 12)):
        pieces = (struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))) * 70_000
        refused(png[:at] + pieces + png[at:], "has more than 65536 chunks: save it anew")
    for whole in (start + exif * 200 + segment(0xFE, b"a") * 1000 + b"\xff" * 1000 + good[2:], good, png):
        assert check_image(whole)[0] in ("jpg", "png")


def header_of(data: bytes, width: int, height: int) -> bytes:
    """A JPEG that says it has another size."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2) and data[i + 2] == 0)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def test_large_pictures_are_refused_by_their_headers() -> None:
    refused(png_of_zeros(9400, 9400), "9400 x 9400 pixels, more than the 50000000 of PNG")
    refused(png_of_zeros(6000, 6000, depth=16), "6000 x 6000 pixels, more than the 25000000 of PNG")
    refused(header_of(jpeg(64, 64), 10_000, 10_000), "10000 x 10000 pixels")
    refused(header_of(jpeg(64, 64, progressive=True, subsampling=0), 7700, 7700), "several scans")
    canvas = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(canvas, "WEBP", quality=1, method=0)
    refused(canvas.getvalue(), "more than the 30000000 of WEBP")


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = with_scans(jpeg(1600, 1600, progressive=True), 1000)
    assert (frame := read_frame(data)) is not None
    assert count_scans(data, frame.at) == 1010
    refused(data, "1010 scans of 2560000 pixels, which take too long")
    small = jpeg(160, 160, progressive=True)
    assert check_image(small) == ("jpg", 160, 160)


@pytest.mark.parametrize("name", ["rgba.png", "deep.png", "progressive.jpg"])
def test_the_largest_pictures_take_less_than_512_mib_and_5_s(tmp_path: Path, name: str) -> None:
    made = {
        "rgba.png": lambda: png_of_zeros(7000, 7000),
        "deep.png": lambda: png_of_zeros(4900, 4900, depth=16),
        "progressive.jpg": lambda: jpeg(4800, 4800, progressive=True, subsampling=0),
    }
    (tmp_path / name).write_bytes(made[name]())
    code = """
import resource, sys, torch
from cmgan_dist.data.image import decode_image
from cmgan_dist.errors import BadSample
before = resource.getrusage(resource.RUSAGE_SELF)
decode_image(open(sys.argv[1], "rb").read(), 224)
after = resource.getrusage(resource.RUSAGE_SELF)
print((after.ru_maxrss - before.ru_maxrss) // 1024, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""
    words = [sys.executable, "-c", code, str(tmp_path / name)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    mib, seconds = map(float, done.stdout.split())
    assert mib < 512
    assert seconds < 5


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_cut_jpeg_with_an_end_marker_is_judged_alike(cut: float) -> None:
    whole = jpeg(320, 240)
    refused(whole[: int(len(whole) * cut)] + b"\xff\xd9", "does not decode")


def test_only_three_formats_are_opened() -> None:
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown format")
    for kind in ("GIF", "BMP", "TIFF", "PPM"):
        out = io.BytesIO()
        Image.new("RGB", (9, 9)).save(out, kind)
        refused(out.getvalue(), "unknown format")
