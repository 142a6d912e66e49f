"""What is read from the members of a sample; what is damaged is named."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest

from cmgan_dist.data.sample import parse_array, parse_sample
from cmgan_dist.errors import BadSample
from tests.toy import npy


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.uint16, ">f4"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 1, 2)])
def test_arrays_equal_numpy_s_own_reader(dtype: object, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape)) - 2).astype(dtype).reshape(shape)  # type: ignore[arg-type]
    for order in (array, np.asfortranarray(array)):
        data = npy(order)
        found = parse_array(data, "x")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.load(io.BytesIO(data)).astype(np.float32))


def test_arrays_of_the_second_format_version() -> None:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.arange(4.0), version=(2, 0))
    np.testing.assert_array_equal(parse_array(out.getvalue(), "x"), np.arange(4.0))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(np.arange(9.0))[:-1],
        npy(np.array(["a"])),
        npy(np.array([1.0, np.nan])),
        npy(np.array([[1.0, 2.0], [3.0, -np.inf]], np.float32)),
        npy(np.r_[np.zeros(30_000, np.float32), np.nan]),
        npy(np.array([3e38, np.nan], np.float32)),
        npy(np.array([1e300])),
        npy(np.empty((0, 3))),
        npy(np.arange(3))[:20],
        b"not an array at all, but long enough to hold one" * 4,
    ],
)
def test_damaged_arrays_are_bad_samples(data: bytes) -> None:
    with pytest.raises(BadSample, match="x"):
        parse_array(data, "x")


def test_large_numbers_are_finite_though_their_squares_are_not() -> None:
    array = np.array([3e38, -3e38, 1e30], np.float32)
    np.testing.assert_array_equal(parse_array(npy(array), "x"), array)
    np.testing.assert_array_equal(parse_array(npy(np.tile(array, 9000)), "x"), np.tile(array, 9000))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a"}, "has no image"),
        ({"jpg": b"x"}, "has no text"),
        ({"jpg": b"x", "txt": b"\xff\xfe"}, "is not UTF-8"),
        ({"jpg": b"x", "txt": b"  "}, "is empty"),
        ({"jpg": b"x", "json": b'{"texts": []}'}, "non-empty list"),
        ({"jpg": b"x", "txt": b"a", "json": b"{"}, "is not JSON"),
        ({"jpg": b"x", "txt": b"a", "json": b'{"label": "cat"}'}, "is not an integer"),
        ({"jpg": b"x", "txt": b"a", "json": b'{"label": true}'}, "is not an integer"),
        ({"jpg": b"x", "txt": b"a", "json": b'{"label": 2147483648}'}, "label 2147483648 is out of range"),
        ({"jpg": b"x", "txt": b"a", "json": b'{"labels": [1, -2147483649]}'}, "is out of range"),
        ({"image.npy": npy(np.ones((2, 2))), "txt": b"a"}, "expected one dimension"),
    ],
)
def test_bad_samples_say_why(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        parse_sample("k", members)


def test_good_samples() -> None:
    sample = parse_sample("k", {"jpg": b"x", "json": json.dumps({"texts": ["a", "b"], "labels": [3, 1, 3]}).encode()})
    assert (sample.texts, sample.labels) == (["a", "b"], (1, 3))
    assert parse_sample("k", {"png": b"x", "txt": "  Grüße 你好 ".encode(), "exif": b"?"}).texts == ["Grüße 你好"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"png": b"y"}, r"has 2 images, \.jpg and \.png: keep one"),
        ({"cls": b"2"}, r"a\.cls holds 2, its JSON has the labels \[1\]: keep one"),
        ({"txt": b"other"}, r'a\.txt is none of "texts" in a\.json'),
        ({"image.npy": npy(np.ones(3))}, r"has 2 images, \.image\.npy and \.jpg: keep one"),
        ({"txt": b" one \n", "cls": b"1"}, ""),
    ],
)
def test_of_two_that_disagree_none_is_taken_in_silence(more: dict[str, bytes], said: str) -> None:
    members = {"jpg": b"x", "json": json.dumps({"texts": ["one", "two"], "label": 1}).encode()} | more
    with pytest.raises(BadSample, match=said) if said else contextlib.nullcontext():
        assert parse_sample("a", members).texts == ["one", "two"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("array", [np.array([1e300]), np.array([3e38, 3e38], np.float32), np.array([np.inf, -np.inf])])
def test_numbers_out_of_range_give_no_warning(array: np.ndarray) -> None:
    with contextlib.suppress(BadSample):
        parse_array(npy(array), "x")


def test_a_byte_order_mark_is_no_part_of_a_text_or_a_label() -> None:
    mark = b"\xef\xbb\xbf"
    members = {"png": b"x", "txt": mark + b"a dog", "cls": mark + b"3\n"}
    sample = parse_sample("k", members)
    assert (sample.texts, sample.labels) == (["a dog"], (3,))
    assert parse_sample("k", members | {"json": mark + b'{"texts": ["a dog", "b"]}'}).texts == ["a dog", "b"]
    with pytest.raises(BadSample, match=r"k\.txt is empty"):
        parse_sample("k", members | {"txt": mark})
