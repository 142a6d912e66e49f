"""The values of a table's cells, as what they stand for: texts, class names, a split, a picture.

A value of another kind is refused, not written out: a text of ``{'raw': 'a dog'}`` or a class ``nan`` helps nobody."""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from cmgan_dist.data.folder import composed, is_plain, is_unicode
from cmgan_dist.data.sample import MOST_TEXT_BYTES
from cmgan_dist.data.source import lower_protocol
from cmgan_dist.errors import BadSample
from cmgan_dist.files import parse_json_once
from shards.pairs import brief
from shards.sources.columnar import ClassName, ShortFloat
from shards.split_words import SPLIT_ALIASES
from shards.urls import check_protocol, is_file_url, is_url

AS_ITEM = "write its text alone, or as it is in a JSON list"
"""What to do where a text may be a value that a program wrote."""
NAME_OR_BYTES = "name a file, or put the picture's bytes into a column of Parquet"
"""What to do where a cell is no image."""
MOST_PATH, MOST_NAME = 4096, 255
"""Bytes of the longest path, and of the name of a file or folder in it."""
WHOLE = re.compile(r"(-?[0-9]+)\.0+")
"""A whole number as pandas writes it among others that are missing."""
PYTHON_LIST = re.compile(r"""\[\s*(['"]).*['"]\s*,?\s*\]""", re.DOTALL)
"""A list of texts as Python, pandas and numpy write it."""
PYTHON_STRING = r"""(?:[bru]?'(?:[^'\\]|\\.)*+'|[bru]?"(?:[^"\\]|\\.)*+")"""
PYTHON_NUMBER = r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:e[-+]?\d++)?(?![\w.])"
PYTHON_ITEM = rf"(?:{PYTHON_STRING}|{PYTHON_NUMBER}|None\b|nan\b|True\b|False\b|\.\.\.)"
"""A text, a number or another value as Python, pandas and numpy write it."""
PYTHON_CALL = (
    r"(?:(?:np|numpy|datetime|pd|pandas|torch|tf|jnp|decimal|uuid|pathlib)\.\w++|[tT]ensor|[aA]rray|Timestamp|Timedelta|"
    r"Period|Interval|Decimal|Fraction|UUID|(?:Pure)?(?:Posix|Windows)?Path|ObjectId|NamedSplit|Index|Categorical|"
    r"dict_(?:keys|values|items)|memoryview|frozenset|set|deque)(?=\()"
)
"""How what numpy, torch, pandas and Python write of other values begins, such as ``np.str_('dog')``."""
PYTHON_NAME = r"(?:<NA>|NaT\b|(?:np|numpy)\.(?:True_|False_|nan|inf)\b)"
PYTHON_ITEMS = re.compile(
    rf"(?:[\s,\[\](){{}}:]|{PYTHON_CALL}|\w++=(?:{PYTHON_ITEM}|[\w.]++)|{PYTHON_ITEM}|{PYTHON_NAME})++",
    re.DOTALL | re.IGNORECASE,
)
"""What stands in a list, set or tuple of such."""
PYTHON_RECORD = re.compile(
    r"\s*+(?:(?:OrderedDict|Counter|mappingproxy)\([\[{]|defaultdict\(<|Row\(\w++=|"
    rf"(?:[\s\[(]|array\()*+\{{\s*+{PYTHON_ITEM}\s*+:).*[\])}}]\s*",
    re.DOTALL | re.IGNORECASE,
)
"""A record, or a list of some, as Python, pandas and Spark write it."""
PYTHON_BYTES = re.compile(rf"\s*+(?:b{PYTHON_STRING}|bytearray\(b{PYTHON_STRING}\))\s*", re.DOTALL)
PYTHON_SCALAR = re.compile(
    rf"\s*+(?:{PYTHON_CALL}\((?=[^)])|<[\w.]+: (?=.*>$)|{PYTHON_NAME}(?=\s*$))"
    rf"(?:[\s,\[\](){{}}>]|{PYTHON_CALL}|\w++=(?:{PYTHON_ITEM}|[\w.]++|<\w++>)|{PYTHON_ITEM})*+",
    re.DOTALL,
)
"""One value as such a program writes it: ``Timestamp('2020')``, ``<Label.DOG: 1>``, ``np.True_``."""
LIKE_A_VALUE = re.compile(r"""\s*(?:[\[({<]|(?:\w+\.)?\w+\(|np\.|NaT|b['"])""")
"""How a text begins that may be one of these."""
WRAPPED = re.compile(r"(?:np\.)?(?:array|tensor|frozenset|set|deque)\(\s*(?=[\[({])")
"""How the names of other kinds stand around a list."""

EXACT_BITS = 53
"""From 2 to the power of this on, a float of Python stands for several whole numbers."""


class Picture(NamedTuple):
    """What a cell says of an image."""

    path: str
    """Its path; '' for a picture in the table that has none."""
    data: bytes | None = None
    """The encoded image, where it is in the table."""


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: null, NaN, or a text of spaces."""
    if isinstance(value, str | bytes):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    """Return what a value is, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {brief(str(value))}"
    kinds = {"dict": "a record", "list": "a list", "bytes": "bytes", "str": "a text"}
    name = type(value).__name__
    return kinds.get(name, f"a {name}")


def _as_string(value: Any, what: str) -> str:
    """Return a text, or bytes that hold one, without spaces around it. Raises BadSample."""
    if isinstance(value, bytes):
        try:
            return value.decode().strip()
        except UnicodeDecodeError:
            raise BadSample(f"its {what} is bytes that are not UTF-8") from None
    if not isinstance(value, str):
        raise BadSample(f"its {what} is {_kind(value)}, expected a text")
    return value.strip()


def as_texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a cell, which may be a list, also one in JSON. Raises BadSample when one is missing or no
    text."""
    value = _read(value, "text", AS_ITEM)
    values = value if isinstance(value, list) else [value]
    if not values or any(map(is_missing, values)):
        raise BadSample("has no text" if len(values) < 2 else "has a list of texts of which one is empty")
    in_list = isinstance(value, list)  # whose texts are what they are
    texts = tuple(_as_string(_read(each, "text", AS_ITEM, is_item=in_list), "text") for each in values)
    if not all(map(is_unicode, texts)):
        raise BadSample("the text has half a character, a lone surrogate")
    if any(len(text) > MOST_TEXT_BYTES or len(text.encode()) > MOST_TEXT_BYTES for text in texts):
        raise BadSample(f"has a text of more than {MOST_TEXT_BYTES >> 20} MiB: shorten it")
    return texts


def _read(
    value: Any, what: str, alone: str, of_list: str = "write it as JSON (double quotes)", *, is_item: bool = False
) -> Any:
    """Return the list or record that a text, or bytes that hold one, is in JSON; any other value as it is, a list of
    numbers too.

    Raises BadSample where a text is a list, a record or bytes in Python's form, but for an item of a list (`is_item`);
    `alone` and `of_list` say what to do."""
    found = _listed(_as_string(value, what) if isinstance(value, bytes) else value, alone, of_list, is_item=is_item)
    numbers = isinstance(found, list) and found and all(isinstance(each, int | float) for each in found)
    return value if numbers else found


def _listed(value: Any, alone: str, of_list: str, *, is_item: bool = False) -> Any:
    """Return what `_read` does; a list of numbers too."""
    if not isinstance(value, str) or not LIKE_A_VALUE.match(value):
        return value
    try:
        found = parse_json_once(value)
    except ValueError:
        if not is_item and (kind := _python_kind(value)):
            way = of_list if kind == "a list" else alone
            raise BadSample(f"{brief(value)} looks like {kind}: {way}") from None
        return value
    return found if isinstance(found, list | dict) else value


def _python_kind(text: str) -> str:
    """Return which value a text is as Python, pandas, numpy or Spark write it: "a list" (or set, tuple, array),
    "a record", "bytes", "a Python value"; "" for none."""
    if PYTHON_BYTES.fullmatch(text):
        return "bytes"
    if PYTHON_RECORD.fullmatch(text):
        return "a record"
    if _is_python_list(text):
        return "a list"
    return "a Python value" if PYTHON_SCALAR.fullmatch(text) else ""


def _is_python_list(text: str) -> bool:
    """Return whether a text is a list, set, tuple or array as Python, pandas and numpy write it: ``[0 2]``,
    ``{'a', 'b'}``, ``('a', 'b')``, ``array([0., 1.])``."""
    inner = text.strip()
    if (name := WRAPPED.match(inner)) and inner.endswith(")"):
        inner = inner[name.end() : max(map(inner[:-1].rfind, "])}")) + 1]  # without what follows, as dtype=object
    if inner[:1] + inner[-1:] not in ("[]", "{}", "()") or (inner[0] == "(" and "," not in inner):
        return False
    found = PYTHON_ITEMS.fullmatch(inner[1:-1]) if inner[1:-1].strip() else name
    return bool(found or PYTHON_LIST.fullmatch(inner))


def as_labels(value: Any) -> tuple[tuple[str, ...], bool]:
    """Return the class names of a cell, sorted, and whether it is a list: ``a|b`` and ``["a", "b"]`` are.

    Raises BadSample when there is none, or one is no name."""
    if isinstance(value, bytes):
        value = _as_string(value, "label")
    if isinstance(value, ClassName):
        return (_as_class(value),), False
    value = _listed(value, "write the name of the class alone", "write it as JSON (double quotes) or with |")
    if isinstance(value, str) and "|" in value:
        value = [part for part in value.split("|") if part.strip()]
    listed = isinstance(value, list)
    values = value if listed else [value]
    if not values or any(map(is_missing, values)):
        raise BadSample("has no label" if len(values) < 2 else "has a list of labels of which one is empty")
    return tuple(sorted({_as_class(each) for each in values})), listed


def _as_class(value: Any) -> str:
    """Return the name of a class: a text, or a whole number, 1.0 as 1. Raises BadSample."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            raise BadSample(f"its label is {_kind(value)}, expected a name or a whole number")
        bits = value.exact_bits if isinstance(value, ShortFloat) else EXACT_BITS
        if abs(value) >= 2**bits:
            raise BadSample(
                f"its label is {_kind(value)}, a float of 2 ** {bits} or more, which may have been another whole "
                "number: write labels as whole numbers or texts"
            )
        return str(int(value))
    if not isinstance(value, str | bytes):
        raise BadSample(f"its label is {_kind(value)}, expected a name or a whole number")
    name = _as_string(value, "label")
    whole = WHOLE.fullmatch(name)
    name = whole[1] if whole else name
    if not is_unicode(name):
        raise BadSample(f"image path or label {brief(name)} is not UTF-8: rename it")
    if not is_plain(name):
        raise BadSample(f"its label {brief(name)} holds control characters: rename it")
    return composed(name)


def as_split(value: Any) -> str:
    """Return the name of a split, val for what means the same. Raises BadSample when there is none."""
    if is_missing(value):
        raise BadSample("has no split")
    name = composed(_as_string(_read(value, "split", "write its name alone", "write its name alone"), "split"))
    return SPLIT_ALIASES.get(name.lower(), name)


def _is_path(data: bytes) -> bool:
    """Return whether bytes are the text of a path, which those of no picture are, of whatever format."""
    try:
        return len(data) <= MOST_PATH and is_plain(data.decode())
    except UnicodeDecodeError:
        return False


def _check_path(name: str) -> None:
    """Raise BadSample when a cell is no path, nor a URL that is read."""
    if is_url(name):
        return
    if len(name) > MOST_PATH or max(map(len, name.split("/"))) > MOST_NAME:
        raise BadSample(f"'{brief(name)}' of {len(name)} characters is no path of an image: {NAME_OR_BYTES}")
    if not is_file_url(name):
        check_protocol(name)


def as_picture(value: Any) -> Picture:
    """Return the image of a cell: a path, or the picture itself, alone or as ``{"bytes": ..., "path": ...}``, as
    Hugging Face writes it; or a list of one of these. Raises BadSample when it is neither."""
    if isinstance(value, str):
        value = _read(value, "image path", NAME_OR_BYTES, "name each image in a row of its own")
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    path, data = value, None
    if isinstance(value, list) and value:
        raise BadSample(f"has a list of {len(value)} images: give each a row of its own")
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        path, data = value.get("path"), value.get("bytes")
    elif isinstance(value, bytes) and not _is_path(value):
        path, data = None, value
    if data is not None and not isinstance(data, bytes):
        raise BadSample(f"its picture is {_kind(data)}, expected bytes")
    if data is None and (is_missing(path) or path == []):
        raise BadSample("has no image path")
    name = "" if is_missing(path) else _as_string(path, "image path")
    if data is None:
        _check_path(name)
    if name and PurePosixPath(name).name in ("", ".."):
        raise BadSample(f"'{brief(name)}' is not the name of an image")
    if not is_unicode(name):
        raise BadSample(f"image path or label {brief(name)} is not UTF-8: rename it")
    return Picture(lower_protocol(name) if data is None else name, data)
