"""What users hand in to be encoded: a text, or a picture of any kind. Importing it imports nothing heavy."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from cmgan_dist.data.folder import is_unicode, read_file
from cmgan_dist.errors import BadInput, BadSample, shown


def text_of(text: object, position: int = 0) -> str:
    """Return a text without space around it. Raises BadInput naming it by its position where it is none, empty, or no
    Unicode text."""
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"text {position} is {text!r}: give a text that is not empty")
    if not is_unicode(text):
        raise BadInput(f"text {position} is {text!r}, which has half a character, a lone surrogate: mend it")
    return text.strip()


def is_one(images: object) -> bool:
    """Return whether this is one picture, or a text or bytes, and not several."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4 and images.dtype != object
    return isinstance(images, str | Path | bytes | bytearray | memoryview) or any(
        hasattr(images, name) for name in ("tobytes", "read")
    )


def pixels_of(item: object, size: int, position: int = 0) -> np.ndarray:
    """Return a picture of any kind as uint8 [size, size, 4], as a backbone takes it.

    Raises BadInput naming the item by its `position`."""
    from cmgan_dist.data.image import decode_image  # torch resizes, and takes a second to import

    named = f" ({item})" if isinstance(item, str | Path) else ""
    try:
        if isinstance(item, str | Path):
            data = _read_picture(item, position)
        elif isinstance(item, bytes | bytearray | memoryview):
            data = bytes(item)
        elif hasattr(item, "read"):
            data = item.read()
        else:
            data = _encoded(item)
        return decode_image(data, size)
    except OSError as error:
        raise BadInput(f"image {position}{named} cannot be read ({error.strerror or error}): name a picture") from None
    except BadSample as error:
        raise BadInput(f"image {position}{named}: {error}; give another picture") from None


def _read_picture(path: str | Path, position: int) -> bytes:
    """Raises BadInput naming the item by its position where the file cannot be read."""
    try:
        return read_file(path)
    except BadSample as error:
        raise BadInput(f"image {position} ({shown(str(path))}) {error}: name a picture") from None


def _encoded(item: object) -> bytes:
    """An array or a PIL image as PNG without loss, so that every picture takes one way. Raises BadSample."""
    from PIL import Image, ImageOps

    from cmgan_dist.data.image import to_rgb

    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or not item.size:
            raise BadSample(f"it is an array of {item.dtype} and shape {item.shape}, expected uint8 [H, W, 3]")
        try:
            item = Image.fromarray(item)
        except TypeError as error:
            raise BadSample(f"it is no picture ({error})") from None
    if isinstance(item, Image.Image) and item.mode == "F":
        raise BadSample("its pixels are floats, expected 8 or 16 bits")
    if not isinstance(item, Image.Image):
        raise BadSample(f"it is of type {type(item).__name__}, expected a file, bytes, an array or a PIL image")
    try:
        item = ImageOps.exif_transpose(item)
        out = io.BytesIO()
        plain = item if item.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else to_rgb(item)
        plain.save(out, "PNG", compress_level=1)
    except (OSError, ValueError, SystemError) as error:  # closed, empty, or of a mode that has no colours
        raise BadSample(f"it is no picture ({error})") from None
    return out.getvalue()
