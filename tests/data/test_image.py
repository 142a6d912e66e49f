"""Decoding one image: every kind of file, upright, on white, cropped; damage is a BadSample, never anything else."""

from __future__ import annotations

import io
import math
import random
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cmgan_dist.data import image as image_module
from cmgan_dist.data.image import (
    CROP_AREA,
    CROP_RATIO,
    KEPT,
    MAX_PIXELS,
    centre_box,
    decode_image,
    eighths_for,
    random_box,
)
from cmgan_dist.errors import BadSample


def inputs(width: int, height: int) -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 127 + 120 * np.sin(x / 17 + y / 29)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def decode(data: bytes, size: int, rng: random.Random | None = None) -> np.ndarray:
    """Planes of what `decode_image` makes, [3, size, size]."""
    made = decode_image(data, size, rng)
    assert made.flags["C_CONTIGUOUS"]
    return made[..., :3].transpose(2, 0, 1)


def naive(image: Image.Image, size: int) -> np.ndarray:
    """The centred square, resized without any short cut."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (301, 733), (64, 64), (20, 31), (1500, 1100)])
def test_the_centre_is_that_of_a_plain_resize(kind: str, width: int, height: int) -> None:
    data = encode(inputs(width, height), kind, **({} if kind == "PNG" else {"quality": 95}))
    made = decode(data, 64)
    with Image.open(io.BytesIO(data)) as image:
        expected = naive(image, 64)
    assert made.dtype == np.uint8
    assert made.shape == (3, 64, 64)
    assert difference(made, expected) < 1


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (3000, 2), (7, 5)])
def test_tiny_and_thin_pictures(width: int, height: int) -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decode(encode(inputs(width, height), kind), 24).shape == (3, 24, 24)
        assert decode(encode(inputs(width, height), kind), 24, random.Random(0)).shape == (3, 24, 24)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the JPEGs that are decoded in the test."""
    found = []
    original = simplejpeg.decode_jpeg

    def spy(*args: object, **options: object) -> np.ndarray:
        found.append(original(*args, **options).shape)
        return original(*args, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    return found


@pytest.mark.parametrize("box", [(0, 0, 800, 500), (0, 0, 500, 800)])
def test_both_sides_of_a_crop_are_looked_at(
    shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, box: tuple[int, int, int, int]
) -> None:
    monkeypatch.setattr(image_module, "random_box", lambda *_: box)
    decode(encode(inputs(1000, 1000), "JPEG"), 224, random.Random(0))
    assert shapes[0][0] == 500
    shapes.clear()
    decode(encode(inputs(1000, 1000), "JPEG"), 400, random.Random(0))  # 316 of 400 pixels would be left
    assert shapes[0][0] == 1000


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([8, 64, 224]), st.integers(0, 2**32))
def test_the_scale_of_a_jpeg(width: int, height: int, size: int, seed: int) -> None:
    """One that libjpeg has vector code for, no larger than it needs to be, and the centre's edges as good as exact."""
    drawn = random_box(width, height, random.Random(seed))
    for box, exact in ((centre_box(width, height), True), (drawn, False)):
        w, h = box[2] - box[0], box[3] - box[1]
        side, least = (min(w, h), size) if exact else (math.sqrt(w * h), KEPT * size)
        eighths = eighths_for(box, size, exact)
        assert eighths in (1, 2, 4, 8)
        assert eighths == 8 or side * eighths >= 8 * least
        assert eighths <= (2 if exact else 1) or side <= 2 * least or side * eighths / 8 < (4 if exact else 2) * least
        if exact:
            shift = max(abs(edge * eighths / 8 - round(edge * eighths / 8)) for edge in box[:2])
            assert shift * size / (side * eighths / 8) <= 0.25


def test_a_plain_jpeg_is_not_opened_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    opened: list[bytes] = []
    open_image = image_module.open_image
    monkeypatch.setattr(image_module, "open_image", lambda data: opened.append(data) or open_image(data))
    decode(encode(inputs(90, 70), "JPEG"), 32)
    decode(encode(inputs(90, 70).convert("L"), "JPEG", progressive=True), 32)
    assert not opened
    for data in (encode(inputs(90, 70), "JPEG", exif=exif), encode(inputs(90, 70).convert("CMYK"), "JPEG")):
        decode(data, 32)
        assert opened.pop() == data


def test_a_jpeg_that_says_it_is_huge_is_refused() -> None:
    data = bytearray(encode(inputs(40, 40), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadSample, match=str(MAX_PIXELS)):
        decode(bytes(data), 32)


def test_a_jpeg_is_decoded_scaled_but_not_below_the_target(shapes: list[tuple[int, ...]]) -> None:
    decode(encode(inputs(2000, 1600), "JPEG"), 224)
    assert 224 <= shapes[0][0] <= 448
    exif = Image.Exif()
    exif[0x0112] = 6
    decode(encode(inputs(2000, 500), "JPEG", exif=exif), 224)
    assert 224 <= shapes[1][0] <= 448
    decode(encode(inputs(100, 90), "JPEG"), 224)
    assert shapes[2][:2] == (90, 100)
    decode(encode(inputs(800, 2000), "JPEG"), 224)
    assert 224 <= shapes[3][1] <= 448


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(inputs(300, 200), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    assert difference(decode(data, 48), naive(upright, 48)) < 1


def test_a_damaged_exif_block_does_not_matter() -> None:
    data = encode(inputs(40, 40), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert difference(decode(data, 40), naive(inputs(40, 40), 40)) < 3


def test_transparency_is_on_white() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    grey = Image.new("LA", (32, 32), (0, 0))
    palette = Image.new("P", (32, 32), 3)
    palette.putpalette([9, 9, 9] * 256)
    for data in (
        encode(clear),
        encode(clear, "WEBP", lossless=True, exact=True),
        encode(grey),
        encode(palette, transparency=3),
    ):
        assert (decode(data, 16) == 255).all()
    assert (np.abs(decode(encode(half), 16).astype(int) - 127) <= 1).all()


def test_every_colour_kind() -> None:
    base = inputs(60, 50)
    expected = naive(base, 32)
    assert difference(decode(encode(base.convert("CMYK"), "JPEG", quality=95), 32), expected) < 4
    assert difference(decode(encode(base, "JPEG", quality=95, progressive=True), 32), expected) < 2
    assert difference(decode(encode(base.quantize(256)), 32), expected) < 12
    grey = naive(base.convert("L"), 32)
    assert difference(decode(encode(base.convert("L"), "JPEG", quality=95), 32), grey) < 2
    sixteen = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 256 + 99)
    assert difference(decode(encode(sixteen), 32), grey) < 1
    black_and_white = base.convert("1")
    assert difference(decode(encode(black_and_white), 32), naive(black_and_white, 32)) < 1


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("blue", "red", "red")]
    for kind in ("WEBP", "PNG", "MPO"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        made = decode(data, 8).astype(int)
        assert (np.abs(made - np.array([0, 0, 255])[:, None, None]) < 6).all(), kind


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [MAX_PIXELS + 10_000, 4 * MAX_PIXELS])
def test_a_decompression_bomb_is_refused_by_its_header(pixels: int) -> None:
    with pytest.raises(BadSample, match=str(MAX_PIXELS)):
        decode(bomb(10_000, pixels // 10_000 + 1), 32)


def test_damage_is_a_bad_sample_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    files = [
        encode(inputs(90, 70), kind, **options)
        for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}))
    ]
    files.append(encode(inputs(90, 70).convert("CMYK"), "JPEG"))
    bad = 0
    for data in files:
        for _ in range(120):
            broken = bytearray(data)
            for at in rng.integers(len(data), size=rng.integers(1, 8)):
                broken[at] = rng.integers(256)
            cut = bytes(broken[: rng.integers(len(data))]) if rng.random() < 0.5 else bytes(broken)
            try:
                assert decode(cut, 16, random.Random(bad)).shape == (3, 16, 16)
            except BadSample:
                bad += 1
    assert bad > 100


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(BadSample, match="does not decode"):
        decode(data, 16)


@pytest.mark.parametrize("exif", [False, True])
def test_a_damaged_png_is_refused_wherever_its_pixels_are_hit(exif: bool) -> None:
    """Pillow looks for EXIF behind the pixels, and would lose their error on the way."""
    rng = np.random.default_rng(0)
    packed, tags = io.BytesIO(), Image.Exif()
    if exif:
        tags[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(packed, "PNG", exif=tags)
    data = packed.getvalue()
    first, last = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for at in rng.integers(first + 2, last, 40):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        with pytest.raises(BadSample, match="does not decode"):
            decode_image(bytes(damaged), 32)


def test_a_row_of_millions_of_pixels_is_a_bad_sample() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 49_000_000, 1, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    wide = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    with pytest.raises(BadSample, match="does not decode"):
        decode_image(wide, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_bad(kind: str) -> None:
    data = encode(inputs(300, 300), kind)
    with pytest.raises(BadSample):
        decode(data[: len(data) // 2], 32)


def test_bytes_behind_a_jpeg_do_not_matter() -> None:
    data = encode(inputs(50, 50), "JPEG")
    assert np.array_equal(decode(data + b"tail" * 50, 32), decode(data, 32))


def test_augmentation_is_drawn_from_the_generator() -> None:
    data = encode(inputs(200, 150), "JPEG")

    def draw(seed: int) -> np.ndarray:
        return decode(data, 32, random.Random(seed))

    assert np.array_equal(draw(1), draw(1))
    # The red channel grows to the right: a flip turns it round, a crop takes a part of its range.
    slopes = [float(d[0, :, -1].mean()) - float(d[0, :, 0].mean()) for d in map(draw, range(60))]
    assert 15 < sum(slope < 0 for slope in slopes) < 45
    assert len({round(abs(slope)) for slope in slopes}) > 20
    assert np.array_equal(decode(data, 32), decode(data, 32))


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(("kind", "exif"), [("JPEG", 1), ("JPEG", 6), ("PNG", 1)])
def test_a_row_of_a_batch_is_filled_in_its_place(kind: str, exif: int, seed: int | None) -> None:
    tag = Image.Exif()
    tag[0x0112] = exif
    data = encode(inputs(200, 150), kind, exif=tag)
    batch = np.full((3, 32, 32, 4), 7, np.uint8)
    rngs = [None if seed is None else random.Random(seed) for _ in range(2)]
    made = decode_image(data, 32, rngs[0], batch[1])
    assert made.base is batch
    assert np.array_equal(batch[1, ..., :3].transpose(2, 0, 1), decode(data, 32, rngs[1]))
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize("exif", [1, 6])
@pytest.mark.parametrize("side", [32, 64])
def test_a_jpeg_that_needs_no_resize_is_what_libjpeg_gives(side: int, exif: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = exif
    data = encode(inputs(side, side), "JPEG", exif=tag)
    batch = np.full((3, 32, 32, 4), 7, np.uint8)
    decode_image(data, 32, None, batch[1])
    plain = simplejpeg.decode_jpeg(data, "RGB", min_width=32, min_height=32)
    assert plain.shape == (32, 32, 3)
    assert np.array_equal(batch[1, ..., :3], plain if exif == 1 else np.rot90(plain, -1))
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_crop_of_a_jpeg_of_the_squares_size_is_resized_from_its_pixels(seed: int) -> None:
    data = encode(inputs(32, 32), "JPEG")
    pixels, rng, made = simplejpeg.decode_jpeg(data, "RGBX"), random.Random(seed), np.zeros((32, 32, 4), np.uint8)
    left, top, right, bottom = random_box(32, 32, rng)
    expected = cv2.resize(pixels[top:bottom, left:right], (32, 32), interpolation=cv2.INTER_CUBIC)
    expected = expected[:, ::-1] if rng.random() < 0.5 else expected
    assert np.array_equal(decode_image(data, 32, random.Random(seed), made)[..., :3], expected[..., :3])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2**32))
def test_a_random_box_lies_in_the_picture(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = random_box(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_random_box_has_the_area_and_the_ratio() -> None:
    rng = random.Random(0)
    boxes = np.array([random_box(640, 480, rng) for _ in range(500)], float)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = w * h / (640 * 480), w / h
    assert CROP_AREA[0] - 0.01 < share.min() < 0.55
    assert 0.9 < share.max() < CROP_AREA[1] + 0.01
    assert CROP_RATIO[0] - 0.01 < ratio.min()
    assert ratio.max() < CROP_RATIO[1] + 0.01
    assert boxes[:, 0].min() < 5
    assert boxes[:, 2].max() > 635


def test_a_jpeg_that_was_cut_and_ended_is_refused() -> None:
    """Such files look whole to a header check: half of the pixels would be grey."""
    out = io.BytesIO()
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (16, 16, 3)), np.ones((20, 20, 1)))
    Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG", quality=90)
    data = out.getvalue()
    for tail in (b"", b"\xff\xd9"):
        with pytest.raises(BadSample, match="does not decode"):
            decode(data[: len(data) // 2] + tail, 32)
