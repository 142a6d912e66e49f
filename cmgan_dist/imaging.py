"""One image: encoded bytes -> uint8 [3, size, size]. Normalisation is the backbone's, on its device.

The way of a picture: header (format, pixels, orientation) -> crop in upright coordinates -> decode, a JPEG by
libjpeg-turbo already scaled down to just above what the crop needs -> upright, on white, RGB -> crop and resize."""

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
            turned = orientation >= 5
            width, height = (image.height, image.width) if turned else image.size
            box = _centre_box(width, height) if augment is None else _random_box(width, height, augment)
            flip = augment is not None and augment.random() < 0.5
            # What the decoded picture must have at least, so that the crop is not smaller than the target.
            least_width = math.ceil(width * size / (box[2] - box[0]))
            least_height = math.ceil(height * size / (box[3] - box[1]))
            pixels = _decode(data, image, *((least_height, least_width) if turned else (least_width, least_height)))
    except Image.DecompressionBombError:
        raise BadSample(f"the image has more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadSample("the image does not decode (unknown format: expected JPEG, PNG or WebP)") from None
    except _UNREADABLE as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"the image does not decode ({error})") from None
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    across, down = pixels.width / width, pixels.height / height
    scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    pixels = pixels.resize((size, size), Image.Resampling.BICUBIC, box=scaled, reducing_gap=3.0)
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


def _decode(data: bytes, image: Image.Image, least_width: int, least_height: int) -> Image.Image:
    """All pixels as RGB; a JPEG may come scaled down, but not below `least_width` and `least_height`."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", min_width=least_width, min_height=least_height))
        except ValueError:
            pass  # odd but perhaps readable, such as bytes behind the end: Pillow decides
    if image.mode.startswith("I"):  # 16 bits of grey; convert() would clip them to 8
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")
