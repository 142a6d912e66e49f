"""One image: encoded bytes -> uint8 [3, size, size]. Normalisation is the backbone's, on its device.

The way of a picture: header (format, pixels, orientation) -> choice of a crop -> decode to RGB on white, a JPEG by
libjpeg-turbo already scaled down to just above what the crop needs -> crop and resize -> upright."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image

from cmgan_dist.errors import BadSample

MAX_PIXELS = 89_478_485
"""A picture with more is refused before it is decoded (256 MiB of RGB, Pillow's own limit)."""
FORMATS = ("JPEG", "PNG", "WEBP")
"""What is opened; JPEG takes in MPO, a JPEG with more pictures behind the first."""
CROP_AREA = (0.5, 1.0)
"""Share of the picture that a random crop keeps: its texts describe the whole picture."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width / height of a random crop, before it becomes square."""
CROP_TRIES = 10

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright (EXIF 2.3, tag 274)."""
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
"""What Pillow raises on damaged files."""


def decode_image(data: bytes, size: int, augment: np.random.Generator | None = None) -> np.ndarray:
    """Encoded image -> uint8 [3, size, size], RGB, upright, transparency on white, the first frame of an animation.

    Without `augment` the centred square is taken; with it, a random crop (Szegedy et al., CVPR 2015) and, half the
    time, a horizontal flip. Equal draws give equal pixels. Raises BadSample with the reason."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"the image has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            orientation = _orientation(image)
            # In stored coordinates: turned upright, a box in the centre or drawn evenly is one again.
            box = _centre_box(*image.size) if augment is None else _random_box(*image.size, augment)
            flip = augment is not None and augment.random() < 0.5
            pixels, scale = _decode(data, image, size / (box[2] - box[0]), size / (box[3] - box[1]))
    except Image.DecompressionBombError:
        raise BadSample(f"the image has more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadSample("the image does not decode (unknown format: expected JPEG, PNG or WebP)") from None
    except _UNREADABLE as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"the image does not decode ({error})") from None
    left, top, right, bottom = (edge * scale for edge in box)
    pixels = pixels.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=3.0)
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    array = np.asarray(pixels)
    if flip:
        array = array[:, ::-1]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or the EXIF block is damaged: the pixels are still good."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (*_UNREADABLE, KeyError, TypeError):
        return 1
    return value if value in _UPRIGHT else 1


def _centre_box(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A box with a share of the area in CROP_AREA and a ratio in CROP_RATIO; the centred square if none fits."""
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _centre_box(width, height)


def _decode(data: bytes, image: Image.Image, across: float, down: float) -> tuple[Image.Image, float]:
    """(all pixels as RGB, scale): a JPEG may come scaled down, but not below the factors `across` and `down`.

    Pixel x of the picture lies at x * scale. The size says that only nearly: its last row and column may be cut."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        width, height = image.size
        try:
            least = {"min_width": math.ceil(width * across), "min_height": math.ceil(height * down)}
            array = simplejpeg.decode_jpeg(data, "RGB", **least)
        except ValueError as error:
            if "premature" in str(error).lower():  # Pillow would fill up a picture whose cut end bears an end marker
                raise BadSample(f"the image does not decode ({error})") from None
            # odd but perhaps readable, such as bytes behind the end: Pillow decides
        else:
            # libjpeg scales by eighths and rounds the size up (jpeg_calc_output_dimensions).
            shapes = {(-(-height * n // 8), -(-width * n // 8)): n / 8 for n in range(1, 9)}
            return Image.fromarray(array), shapes[array.shape[:2]]
    return _to_rgb(image), 1.0


def _to_rgb(image: Image.Image) -> Image.Image:
    """Pixels of any mode as RGB, transparency on white."""
    if image.mode.startswith("I"):  # 16 bits of grey; convert() would clip them to 8
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")
