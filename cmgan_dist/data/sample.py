"""What a sample is: its members in a tar, and what is read from them. No torch here.

Members of the sample KEY (everything else is ignored; ``KEY.text.npy`` is taken before what it was made from):

    KEY.jpg | KEY.png | KEY.webp     the image, encoded        or  KEY.image.npy  [F_i] image features
    KEY.txt                          one text, UTF-8           or  KEY.text.npy   [F_t] or [captions, F_t] features
    KEY.json                         "texts": [...] for several texts; "label": a class or "labels": [a class, ...]
    KEY.cls                          a class, where the JSON has none

A class is its index, or its name in the manifest.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from tokenize import TokenError
from typing import Any

import numpy as np

from cmgan_dist.data.folder import composed, is_plain, is_unicode
from cmgan_dist.errors import BadSample, shown
from cmgan_dist.files import parse_json_once

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members that are an encoded image."""
IMAGE_MEMBERS = ("image.npy", *IMAGE_EXTENSIONS)
"""Members that are an image; a sample has one of them."""
TEXT_MEMBERS = ("text.npy", "txt")
MEMBERS = frozenset((*IMAGE_MEMBERS, *TEXT_MEMBERS, "json", "cls"))
"""Extensions of what a sample is made of."""
MOST_NUMBERS = 1 << 24
"""Numbers of the largest array of features: 64 MiB as float32."""
MOST_TEXT_BYTES, MOST_JSON_BYTES = 1 << 20, 1 << 23
"""Bytes of the largest text, and of the largest JSON record, which can take thirty times as much in memory."""
FEW = 10_000
"""Numbers of which OpenBLAS takes a dot product in the calling thread."""
CLASSES = range(1 << 20)
"""What a class index can be."""
MOST_NAME_BYTES = 1000
"""Bytes of the longest name of a class."""
OVERHEAD = 1000
"""Bytes of a sample's objects, beside its image and texts."""


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

    @property
    def nbytes(self) -> int:
        """About the bytes of memory that it takes."""
        image = len(self.image) if isinstance(self.image, bytes) else self.image.nbytes
        texts = self.texts.nbytes if isinstance(self.texts, np.ndarray) else sum(map(sys.getsizeof, self.texts))
        return image + texts + OVERHEAD


class BadLabel(BadSample):
    """The labels of a sample are none; image and texts may be good."""


NumberOf = Callable[[str], int]
"""Name of a class -> its index. Raises BadLabel where there is no such class."""


def no_names(name: str) -> int:
    """Raise BadLabel: the classes of a sample have no names that are known."""
    raise BadLabel(f"label {_brief(name)} is not an integer or a list of integers")


def parse_labels(record: dict[str, Any], number_of: NumberOf = no_names) -> tuple[int, ...]:
    """Return the class indices of a sample's JSON record, each once and rising: those of ``label`` (an index, a name or
    several names with | between) or ``labels`` (a list of indices or names); () if it has neither, or null, NaN or "".

    Raises BadLabel when a label is no class, or the two fields do not say the same."""
    given = [record[name] for name in ("label", "labels") if _as_list(record.get(name)) or record.get(name) == []]
    found = [_class_indices(value, number_of) for value in given]
    if len(set(found)) > 1:
        raise BadLabel(f'"label" is {_brief(record["label"])} and "labels" is {_brief(record["labels"])}: keep one')
    return found[0] if found else ()


def _labels_of(
    key: str, members: dict[str, bytes], record: dict[str, Any], number_of: NumberOf = no_names
) -> tuple[int, ...]:
    """Return the class indices of a sample: those of its JSON record, else that of its ``.cls``.

    Raises BadLabel where they are none, or the class in the ``.cls`` is none of the record's, if both are indices or
    both names."""
    found = parse_labels(record, number_of)
    if "cls" not in members:
        return found
    written = _written_in(members["cls"])
    listed = [each for name in ("label", "labels") for each in _as_list(record.get(name))]
    if found and isinstance(listed[0], str) != isinstance(written, str):
        return found
    own = _class_indices(written, number_of)
    if found and not {*own} <= {*found}:
        raise BadLabel(f"{key}.cls holds {_brief(written)}, its JSON has the labels {_brief(listed)}: keep one")
    return found or own


def _written_in(data: bytes) -> int | str:
    """Return the index of a class, or its name, that a ``.cls`` holds. Raises BadLabel."""
    try:
        text = data[: 2 * MOST_NAME_BYTES].decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadLabel("its .cls is not UTF-8") from None
    whole = re.fullmatch(r"([+-]?[0-9]{1,20})(?:\.0+)?", text)
    return int(whole[1]) if whole else text


def sources_of(members: dict[str, bytes]) -> tuple[str, str, str]:
    """Return what image, texts and labels of a good sample are taken from, such as ``.txt`` or ``"texts" in .json``;
    "" for labels where there are none."""
    record = _parse_record("", members["json"]) if "json" in members else {}
    image = next(f".{each}" for each in IMAGE_MEMBERS if each in members)
    texts = ".text.npy" if "text.npy" in members else '"texts" in .json' if "texts" in record else ".txt"
    named = [f'"{name}" in .json' for name in ("label", "labels") if _as_list(record.get(name))]
    return image, texts, named[0] if named else ".cls" * ("cls" in members)


def _as_list(value: Any) -> list[Any]:
    """Return what a field with one value or a list of some holds; a value that is null, NaN or a blank text is none."""
    if isinstance(value, list):
        return value
    blank = isinstance(value, str) and not value.strip()
    return [] if value is None or blank or (isinstance(value, float) and math.isnan(value)) else [value]


def _class_indices(value: Any, number_of: NumberOf) -> tuple[int, ...]:
    """Return the class indices that a label stands for, each once and rising. Raises BadLabel."""
    values = [part for part in value.split("|") if part.strip()] if isinstance(value, str) else _as_list(value)
    if values and all(isinstance(v, str) for v in values):
        names = [_class_name(v) for v in values]
        return tuple(sorted(set(map(number_of, names))))
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise BadLabel(f"label {_brief(value)} is not an integer or a name, or a list of one of these")
    if not all(v in CLASSES for v in values):
        raise BadLabel(f"label {_brief(value)} is out of range: a class index is 0 or more and below 2 ** 20")
    return tuple(sorted(set(values)))


def _class_name(value: str) -> str:
    """Return the name of a class as manifests hold it. Raises BadLabel."""
    name = re.sub(r"^(-?[0-9]+)\.0+$", r"\1", composed(value.strip()))
    if not name:
        raise BadLabel("its label is empty")
    if re.match(r"\[\s*['\"].*\]$", name):
        raise BadLabel(f"label {_brief(value)} is a list in a text: write the list itself")
    if not is_plain(name) or len(name.encode()) > MOST_NAME_BYTES:
        raise BadLabel(
            f"label {_brief(value)} is not the name of a class: such has no control characters, and at most "
            f"{MOST_NAME_BYTES} bytes"
        )
    return name


def _brief(value: object) -> str:
    """Return a JSON value for a message, cut where it is long."""
    text = shown(repr(value))
    return text if len(text) <= 60 else text[:60] + "…"


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


@np.errstate(over="ignore", invalid="ignore")  # what leaves the range is found, and said once
def parse_array(data: bytes, what: str) -> np.ndarray:
    """Return a ``.npy`` member as float32, read-only; `what` is its name, for messages.

    Raises BadSample when it is not a finite numeric array."""
    start = _npy_start(data)
    try:
        layout = _npy_layout(data[:start])
        if layout.numbers > MOST_NUMBERS:
            raise BadSample(f"{what} has {layout.numbers} numbers, more than {MOST_NUMBERS}")
        if not layout.numbers:
            raise BadSample(f"{what} holds {layout.dtype} of shape {layout.shape}, not numbers")
        flat = np.frombuffer(data, layout.dtype, layout.numbers, start).astype(np.float32, copy=False)
    except BadSample:
        raise
    except UNREADABLE_ARRAY as error:
        said = shown(str(error)).partition(" at 0x")[0]  # a place in memory is another each time
        raise BadSample(f"{what} is not a readable .npy array ({said})") from None
    # A finite sum of squares has finite terms and is found ten times faster; one that is not may have overflowed.
    if not (flat.size < FEW and math.isfinite(flat.dot(flat))) and not np.isfinite(flat).all():
        raise BadSample(f"{what} holds NaN or Inf")
    if layout.fortran:
        return flat.reshape(layout.shape, order="F")
    return flat if len(layout.shape) == 1 else flat.reshape(layout.shape)


def _parse_record(key: str, data: bytes) -> dict[str, Any]:
    """Return the JSON record of a sample. Raises BadSample."""
    if len(data) > MOST_JSON_BYTES:
        raise BadSample(f"{key}.json has more than {MOST_JSON_BYTES >> 20} MiB")
    try:
        record = parse_json_once(data)
    except ValueError as error:
        raise BadSample(f"{key}.json is not JSON ({shown(str(error))})") from None
    if not isinstance(record, dict):
        raise BadSample(f"{key}.json is not a JSON object")
    return record


def _parse_image(key: str, members: dict[str, bytes]) -> bytes | np.ndarray:
    """Return the encoded image of a sample, or its features [F_i]. Raises BadSample."""
    found = [extension for extension in IMAGE_MEMBERS if extension in members]
    if not found:
        raise BadSample("has no image: expected a .jpg, .png, .webp or .image.npy member")
    if len(found) > 1:
        raise BadSample(f"has {len(found)} images, .{' and .'.join(found)}: keep one")
    if found[0] != "image.npy":
        return members[found[0]]
    image = parse_array(members["image.npy"], f"{key}.image.npy")
    if image.ndim != 1:
        raise BadSample(f"{key}.image.npy has shape {image.shape}, expected one dimension")
    return image


def _parse_texts(key: str, members: dict[str, bytes], record: dict[str, Any]) -> list[str] | np.ndarray:
    """Return the texts of a sample in their order, or their features [captions, F_t]. Raises BadSample."""
    if "text.npy" in members:
        array = parse_array(members["text.npy"], f"{key}.text.npy")
        array = array if array.ndim > 1 else array.reshape(1, -1)
        if array.ndim != 2:
            raise BadSample(f"{key}.text.npy has shape {array.shape}, expected [F] or [captions, F]")
        return array
    if "texts" in record:
        listed = record["texts"]
        if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t.strip() for t in listed):
            raise BadSample(f'{key}.json: "texts" must be a non-empty list of non-empty strings')
        if not all(map(is_unicode, listed)):
            raise BadSample(f'{key}.json: "texts" has half a character, a lone surrogate')
        if "txt" in members and _parse_text(key, members["txt"]) not in map(str.strip, listed):
            raise BadSample(f'{key}.txt is none of "texts" in {key}.json: write it there, or keep one')
        return list(listed)
    if "txt" not in members:
        raise BadSample('has no text: expected a .txt or .text.npy member, or "texts" in .json')
    return [_parse_text(key, members["txt"])]


def _parse_text(key: str, data: bytes) -> str:
    """Return the text of a ``.txt``, without a byte order mark. Raises BadSample."""
    if len(data) > MOST_TEXT_BYTES:
        raise BadSample(f"{key}.txt has more than {MOST_TEXT_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"{key}.txt is not UTF-8 ({error})") from None
    if not text:
        raise BadSample(f"{key}.txt is empty")
    return text


def parse_sample(
    key: str, members: dict[str, bytes], *, labelled: bool = True, number_of: NumberOf = no_names
) -> Sample:
    """Return the Sample of the members (extension -> bytes); without `labelled`, what it says of labels is ignored.

    `number_of`: for classes that it names.
    Raises BadSample, naming what is missing or wrong: BadLabel where it is the label."""
    named = shown(key)
    record = _parse_record(named, members["json"]) if "json" in members else {}
    image, texts = _parse_image(named, members), _parse_texts(named, members, record)
    return Sample(key, image, texts, _labels_of(named, members, record, number_of) if labelled else ())
