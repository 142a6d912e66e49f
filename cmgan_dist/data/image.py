"""One image: encoded bytes -> uint8 [size, size, 4], red, green, blue and a byte that nothing uses.

The way of a picture: header (format, pixels, orientation) -> choice of a crop -> decode to RGB on white, a JPEG by
libjpeg-turbo already scaled down to about what the crop needs -> crop and resize (resize.py) -> upright.

Pixels of four bytes are what torch resizes fastest. They stay so up to the backbone, which makes of them on its device
what its convolutions take: planes would cost a tenth of the time of a picture of 224 px, and be joined there again.
Most JPEGs never see Pillow, whose resize takes longer than the decoding; bench/stream.py has the figures."""

from __future__ import annotations

import contextlib
import io
import math
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from cmgan_dist.data.jpeg import MOST_SEGMENTS, check_jpeg, check_segments
from cmgan_dist.data.png import SIGNATURE, check_chunks
from cmgan_dist.data.resize import mirror, resize, resize_quick
from cmgan_dist.errors import BadSample, shown

MAX_PIXELS = 89_478_485
"""A picture with more is refused before it is decoded (256 MiB of RGB, Pillow's own limit)."""
PILLOW_PIXELS = {"PNG": 50_000_000, "WEBP": 30_000_000}
"""Most pixels of formats that are decoded whole, to pixels of four bytes that are then copied: PNG twice, and libwebp
keeps more canvases. Less than 512 MiB and 5 s on one core, as of a JPEG (jpeg.py)."""
DEEP_PNG_PIXELS = 25_000_000
"""Most pixels of a PNG of 16 bits a channel."""
FORMATS = ("JPEG", "PNG", "WEBP")
"""What is opened; JPEG takes in MPO, a JPEG with more pictures behind the first."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of a format -> extension of its member."""
STRIP_PIXELS = 1 << 20
"""Pixels of a large picture that are converted at a time, at least a row."""
CROP_AREA = (0.5, 1.0)
"""Share of the picture that a random crop keeps: its texts describe the whole picture."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width / height of a random crop, before it becomes square."""
CROP_TRIES = 10

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

_LOG_RATIO = (math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))
_EXIF_ORIENTATION = 0x0112
KEPT = 0.8
"""Share of the square's side, on average of both, that a random crop must have left when a JPEG is decoded scaled down:
it is then enlarged by 1.25, less than a random crop of a picture of the square's own size may be."""
_FAST_EIGHTHS = (1, 2, 4)
"""Scales below 1 for which libjpeg-turbo has vector code. 5/8 to 7/8 take up to twice the time of the whole picture."""
_APP1, _START_OF_SCAN = 0xE1, 0xDA
"""Second bytes of JPEG markers (ITU-T T.81, table B.1)."""
_UPRIGHT: dict[int, tuple[bool, int, int]] = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
"""EXIF orientation (EXIF 2.3, tag 274) -> what makes the picture upright: rows for columns, then the steps in which
rows and columns are read."""
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError, struct.error, zlib.error),
)
"""What Pillow raises on damaged files, MemoryError at a row of millions of pixels too."""


def decode_image(
    data: bytes, size: int, augment: random.Random | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Return an encoded image as uint8 [size, size, 4]: RGB, upright, transparency on white, animations' first frame.

    Without `augment` the centred square is taken; with it, a random crop (Szegedy et al., CVPR 2015) and, half the
    time, a horizontal flip. Equal draws give equal pixels. `out`: where to write them, in one block of memory, such as
    a row of a batch.
    Raises BadSample with the reason, for an image that is refused at any size and for any draws."""
    exact, made = augment is None, np.empty((size, size, 4), np.uint8) if out is None else out
    with _refusing():
        picture = read_header(data)
        orientation = 1 if picture.image is None else orientation_of(picture.image)
        # In stored coordinates: turned upright, a box in the centre or drawn evenly is one again.
        box = centre_box(*picture.shape) if augment is None else random_box(*picture.shape, augment)
        flip = augment is not None and augment.random() < 0.5
        pixels, scale = _decode(picture, eighths_for(box, size, exact), made if exact else None)
    left, top, right, bottom = (edge * scale for edge in box)
    if not exact:  # an edge half a pixel off is as random as the crop
        resize_quick(pixels[round(top) : round(bottom), round(left) : round(right)], made)
    elif pixels is not made:
        box_pixels = pixels[round(top) : math.ceil(bottom), round(left) : math.ceil(right)]
        np.copyto(made.view("<u4")[..., 0], resize(box_pixels, size, bottom - top))
    if orientation in _UPRIGHT:
        turn, rows, columns = _UPRIGHT[orientation]
        square = made.view("<u4")[..., 0].copy()
        np.copyto(made.view("<u4")[..., 0], (square.T if turn else square)[::rows, ::columns])
    if flip:
        mirror(made)
    return made


def check_image(data: bytes) -> tuple[str, int, int]:
    """Return (member extension, width, height) of an encoded image.

    Raises BadSample, as `decode_image` would at any size, unless it can be decoded to its end."""
    with _refusing():
        picture = read_header(data)
        kind = "JPEG" if picture.image is None else str(picture.image.format)
        if picture.image is not None:
            orientation_of(picture.image)
        _decode(picture, _FAST_EIGHTHS[0])
    return EXTENSIONS[kind], *picture.shape


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn what is raised at an image that cannot be decoded into BadSample."""
    try:
        yield
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample(f"the image has more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadSample("the image does not decode (unknown format: expected JPEG, PNG or WebP)") from None
    except UNREADABLE as error:
        raise BadSample(f"the image does not decode ({shown(str(error)) or type(error).__name__})") from None


@dataclass
class Picture:
    """An image of which the header was read."""

    data: bytes
    shape: tuple[int, int]
    """Width and height as stored."""
    image: Image.Image | None
    """As Pillow opened it; None for a JPEG that is upright for sure."""


def read_header(data: bytes) -> Picture:
    """Return an image of which the header was read. Raises BadSample when to decode it would take too much."""
    shape, image = _upright_jpeg(data), None
    if shape is None:
        image = open_image(data)
        shape = image.size
    if shape[0] * shape[1] > MAX_PIXELS:
        raise BadSample(f"the image has {shape[0]} x {shape[1]} pixels, more than {MAX_PIXELS}")
    if image is not None and image.format in PILLOW_PIXELS:
        deep = image.format == "PNG" and data[24] == 16
        _check_pixels(shape, DEEP_PNG_PIXELS if deep else PILLOW_PIXELS[image.format], image.format)
    else:
        check_jpeg(data, shape)
    return Picture(data, shape, image)


def _check_pixels(shape: tuple[int, int], most: int, what: str) -> None:
    if shape[0] * shape[1] > most:
        found = f"{shape[0]} x {shape[1]} pixels"
        raise BadSample(f"the image has {found}, more than the {most} of {what} that are decoded")


def _upright_jpeg(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG in colours or grey that has no APP1 block, where EXIF and XMP keep the
    orientation; None for anything else, and whatever is odd about the header; Pillow looks into it."""
    if data[:2] != b"\xff\xd8":
        return None
    at, end = 2, len(data) - 4
    for _ in range(MOST_SEGMENTS):
        if at >= end or data[at] != 0xFF or data[at + 1] == _APP1:
            break
        if data[at + 1] == _START_OF_SCAN:
            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:
                return None
            return (width, height) if colours in ("YCbCr", "RGB", "Gray") else None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def open_image(data: bytes) -> Image.Image:
    """Return an image of FORMATS by Pillow, which has read its header only. Raises what Pillow raises, and BadSample
    when it would take too long to look at the parts of the file."""
    if data.startswith(b"\xff\xd8"):
        check_segments(data)
    elif data.startswith(SIGNATURE):
        check_chunks(data)
    return Image.open(io.BytesIO(data), formats=FORMATS)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or its block is damaged: the pixels are good.

    Raises what Pillow raises at damaged pixels: a PNG's are decoded, since its EXIF may stand behind them."""
    if image.format == "PNG":
        image.load()  # getexif() would do it, and its error, after which half a picture passes for a whole, be lost
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (*UNREADABLE, KeyError, TypeError):
        return 1
    return value if value in _UPRIGHT else 1


def centre_box(width: int, height: int) -> Box:
    """Return the largest square in the centre of a picture."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, rng: random.Random) -> Box:
    """Return a box with a share of the area in CROP_AREA and a ratio in CROP_RATIO; the centred square if none fits."""
    for _ in range(CROP_TRIES):
        area = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * rng.random())
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * rng.random())
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    return centre_box(width, height)


def eighths_for(box: Box, size: int, exact: bool) -> int:
    """Return at how many eighths of its size to decode a JPEG: the fewest that leave the box `size` pixels each way.

    `exact`: twice as many when the box's left or top edge would not lie between pixels. Where it still does not, it is
    off by half a pixel of a picture twice as large as it need be. Else KEPT of `size` pixels do, on average of both
    ways."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    side = min(width, height) if exact else math.sqrt(width * height) / KEPT
    for eighths in _FAST_EIGHTHS:
        if side * eighths >= 8 * size:
            return 2 * eighths if exact and (left | top) * eighths % 8 else eighths
    return 8


def _decode(picture: Picture, eighths: int, out: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Return (all pixels, uint8 [h, w, 4]; scale): pixel x of the picture is found at x * scale.

    A JPEG comes in `eighths` of its size, and is `out` where that has its shape. The image that Pillow opened is of no
    use afterwards."""
    image, shape = picture.image, picture.shape
    if image is None or (image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")):
        width, height = (-(-side * eighths // 8) for side in shape)  # libjpeg rounds up (jpeg_calc_output_dimensions)
        room = out if out is not None and out.shape[:2] == (height, width) else None
        try:
            pixels = simplejpeg.decode_jpeg(picture.data, "RGBX", min_height=height, min_width=width, buffer=room)
            return pixels if room is None else room, eighths / 8
        except ValueError as error:
            if "premature" in str(error).lower():  # Pillow would fill up a picture whose cut end bears an end marker
                raise BadSample(f"the image does not decode ({error})") from None
            # odd but perhaps readable, such as bytes behind the end: Pillow decides
    _check_pixels(shape, PILLOW_PIXELS["PNG"], "an odd JPEG")
    image = image or open_image(picture.data)
    if image.size != shape:
        raise BadSample(f"the image does not decode ({image.width} x {image.height} pixels, not as its header says)")
    pixels = _rgbx(image)
    image.close()  # before the pixels are copied
    return pixels, 1.0


def _rgbx(image: Image.Image) -> np.ndarray:
    """Return all pixels of an image, uint8 [h, w, 4]. Raises what Pillow raises."""
    image.load()
    made = np.empty((image.height, image.width, 4), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        made[top : top + rows] = np.asarray(to_rgb(strip).convert("RGBX"))
    return made


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, transparency on white."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode.startswith("I"):  # 16 bits of grey; convert() would clip them to 8
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")
