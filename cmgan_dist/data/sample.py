"""What a sample is: its members in a tar, and what is read from them. No torch here.

Members of the sample KEY (everything else is ignored):

    KEY.jpg | KEY.png | KEY.webp     the image, encoded        or  KEY.image.npy  [F_i] image features
    KEY.txt                          one text, UTF-8           or  KEY.text.npy   [F_t] or [captions, F_t] features
    KEY.json                         "texts": [...] for several texts; "label": int or "labels": [int, ...]
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from tokenize import TokenError
from typing import Any

import numpy as np

from cmgan_dist.data.folder import is_unicode
from cmgan_dist.errors import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members that are an encoded image; of several, the first in this order is taken."""
FEW = 10_000
"""Numbers of which OpenBLAS takes a dot product in the calling thread."""
LABELS = range(-(1 << 31), 1 << 31)
"""What the index sidecar can hold."""


@dataclass
class Sample:
    """One image with its texts, as stored: nothing is decoded but JSON and arrays."""

    key: str
    image: bytes | np.ndarray
    """Encoded image, or features [F_i]."""
    texts: list[str] | np.ndarray
    """Texts in their stored order, or features [captions, F_t]."""
    labels: tuple[int, ...]
    """Class indices; empty where the pair has none."""


def parse_labels(record: dict[str, Any]) -> tuple[int, ...]:
    """Return the class indices of a sample's JSON record, each once and rising: those of ``label`` (an int) or
    ``labels`` (a list of ints); () if it has neither.

    Raises BadSample when a label is no integer of 32 bits."""
    value = record["labels"] if "labels" in record else record.get("label")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise BadSample(f"label {value!r} is not an integer or a list of integers")
    if not all(v in LABELS for v in values):
        raise BadSample(f"label {value!r} is out of range: a class index is below 2 ** 31")
    return tuple(sorted(set(values)))


UNREADABLE_ARRAY = (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError, TokenError)
"""What reading a damaged array raises."""


@dataclass(frozen=True)
class _Layout:
    """What the header of a ``.npy`` file says."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    numbers: int
    """How many there are, 0 for what is no array of numbers."""


@lru_cache(maxsize=256)  # the arrays of a shard have one header, and parsing it is most of the work
def _npy_layout(header: bytes) -> _Layout:
    """Return what a header says. It can be anything: raises what UNREADABLE_ARRAY lists."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    good = dtype.kind in "fiu" and all(type(side) is int and side >= 1 for side in shape)  # True is an int, no side
    return _Layout(dtype, shape, fortran, math.prod(shape) if good else 0)


def _npy_start(data: bytes) -> int:
    """Return the byte at which the numbers of a ``.npy`` file begin."""
    width = 2 if data[6:7] == b"\x01" else 4  # of the header's length, by the format's version
    return 8 + width + int.from_bytes(data[8 : 8 + width], "little")


def npy_view(data: bytes) -> np.ndarray:
    """Return the array of a ``.npy`` file, read-only, in the file's own bytes. Raises what UNREADABLE_ARRAY lists."""
    start = _npy_start(data)
    layout = _npy_layout(data[:start])
    return np.frombuffer(data, layout.dtype, math.prod(layout.shape), start).reshape(layout.shape)


def parse_array(data: bytes, what: str) -> np.ndarray:
    """Return a ``.npy`` member as float32, read-only; `what` is its name, for messages.

    Raises BadSample when it is not a finite numeric array."""
    start = _npy_start(data)
    try:
        layout = _npy_layout(data[:start])
        if not layout.numbers:
            raise BadSample(f"{what} holds {layout.dtype} of shape {layout.shape}, not numbers")
        flat = np.frombuffer(data, layout.dtype, layout.numbers, start).astype(np.float32, copy=False)
    except BadSample:
        raise
    except UNREADABLE_ARRAY as error:
        raise BadSample(f"{what} is not a readable .npy array ({error})") from None
    # A finite sum of squares has finite terms and is found ten times faster; one that is not may have overflowed.
    if not (flat.size < FEW and math.isfinite(flat.dot(flat))) and not np.isfinite(flat).all():
        raise BadSample(f"{what} holds NaN or Inf")
    if layout.fortran:
        return flat.reshape(layout.shape, order="F")
    return flat if len(layout.shape) == 1 else flat.reshape(layout.shape)


def parse_sample(key: str, members: dict[str, bytes]) -> Sample:
    """Return the Sample of the members (extension -> bytes). Raises BadSample, naming what is missing or wrong."""
    record: dict[str, Any] = {}
    if "json" in members:
        try:
            record = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{key}.json is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise BadSample(f"{key}.json is not a JSON object")

    image: bytes | np.ndarray
    if "image.npy" in members:
        image = parse_array(members["image.npy"], f"{key}.image.npy")
        if image.ndim != 1:
            raise BadSample(f"{key}.image.npy has shape {image.shape}, expected one dimension")
    else:
        found = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if found is None:
            raise BadSample("has no image: expected a .jpg, .png, .webp or .image.npy member")
        image = members[found]

    texts: list[str] | np.ndarray
    if "text.npy" in members:
        texts = parse_array(members["text.npy"], f"{key}.text.npy")
        texts = texts if texts.ndim > 1 else texts.reshape(1, -1)
        if texts.ndim != 2:
            raise BadSample(f"{key}.text.npy has shape {texts.shape}, expected [F] or [captions, F]")
    elif "texts" in record:
        listed = record["texts"]
        if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t.strip() for t in listed):
            raise BadSample(f'{key}.json: "texts" must be a non-empty list of non-empty strings')
        if not all(map(is_unicode, listed)):
            raise BadSample(f'{key}.json: "texts" has half a character, a lone surrogate')
        texts = listed
    elif "txt" in members:
        try:
            text = members["txt"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSample(f"{key}.txt is not UTF-8 ({error})") from None
        if not text:
            raise BadSample(f"{key}.txt is empty")
        texts = [text]
    else:
        raise BadSample('has no text: expected a .txt or .text.npy member, or "texts" in .json')
    return Sample(key, image, texts, parse_labels(record))
