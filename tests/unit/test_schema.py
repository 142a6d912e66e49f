"""Samples, arrays, tars and sidecars: what others write is read, what is damaged is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.schema import (
    Manifest,
    ShardIndex,
    _byte_sum,
    first_sample,
    iter_samples,
    load_manifest,
    parse_array,
    parse_sample,
    split_member_name,
)
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


def test_keys_end_at_the_first_dot_of_the_base_name() -> None:
    assert split_member_name("a.b/c.image.npy") == ("a.b/c", "image.npy")
    assert split_member_name("./x.JPG") == ("./x", "jpg")


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


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_with_long_and_foreign_names(form: int, tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "k" * 60 if form == tarfile.USTAR_FORMAT else "d" * 120 + "/" + "ключ" * 30
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in ((f"{long}.txt", b"text"), (f"{long}.png", b"p" * 700), ("short.txt", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with open(path, "rb") as file:
        found = list(iter_samples(file, "a.tar"))
    assert [(key, sorted(members)) for key, _, members in found] == [(long, ["png", "txt"]), ("short", ["txt"])]
    assert found[0][2]["png"] == b"p" * 700
    data = path.read_bytes()
    for _, start, members in found:  # an offset is enough to read a sample
        assert next(iter_samples(io.BytesIO(data[start:]), "a.tar"))[2] == members


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


MEMBERS = [("a.jpg", b"x" * 700), ("README", b"no extension"), ("a.txt", b"text"), ("LICENSE", b""), ("b.txt", b"b")]


def test_members_without_an_extension_belong_to_no_sample() -> None:
    """Neither do they cut the sample that they stand in."""
    data = tar_of([("FIRST", b"1"), *MEMBERS])
    found = list(iter_samples(io.BytesIO(data), "a.tar"))
    assert [(key, sorted(members)) for key, _, members in found] == [("a", ["jpg", "txt"]), ("b", ["txt"])]
    assert found[0][1] == 1024
    assert first_sample(data, "a.tar") == (found[0][0], found[0][2])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_first_sample_of_a_piece_is_that_of_the_walk(form: int) -> None:
    """However the piece is cut or damaged: the same sample, or the same sentence."""

    def walked(piece: bytes) -> object:
        try:
            found = next(iter_samples(io.BytesIO(piece), "a.tar"), None)
            return found and (found[0], found[2])
        except BadSample as error:
            return str(error)

    def quick(piece: bytes) -> object:
        try:
            return first_sample(piece, "a.tar")
        except BadSample as error:
            return str(error)

    rng, outcomes = np.random.default_rng(0), set()
    for long in ("a", "d" * 60 + "/" + "a" * 60, "ä"):
        whole = tar_of([(name.replace("a.", f"{long}."), data) for name, data in MEMBERS], form)
        assert quick(whole) == walked(whole) == (long, {"jpg": b"x" * 700, "txt": b"text"})
        for cut in (*range(0, 4096, 61), 512, 1024, 1536, 2048, 2560):
            assert quick(whole[:cut]) == walked(whole[:cut]), cut
        for _ in range(1500):
            piece = bytearray(whole)
            at = 512 * int(rng.integers(6))
            field = int(rng.choice([0, 1, 2, 99, 124, 133, 134, 135, 148, 153, 154, 155, 156, 157, 257, 263, 345, 511]))
            piece[at + field] = int(rng.choice(list(b"\0 012789xgL.\x80\xff")))
            if rng.random() < 0.7:  # a right checksum, so that the rest is looked at
                piece[at + 148 : at + 156] = b" " * 8
                piece[at + 148 : at + 156] = b"%06o\0 " % sum(piece[at : at + 512])
            assert quick(bytes(piece)) == walked(bytes(piece))
            outcomes.add(type(quick(bytes(piece))))
    assert outcomes >= {tuple, str}


def test_no_byte_of_a_header_changes_unnoticed() -> None:
    whole = tar_of(MEMBERS)
    for at in (*range(148), *range(156, 512)):
        for value in (whole[at] ^ 1, 255 - whole[at]):
            piece = whole[:at] + bytes([value]) + whole[at + 1 :]
            with pytest.raises(BadSample, match="damaged tar header at byte 0"):
                first_sample(piece, "a.tar")


def test_a_member_s_checksum_is_the_sum_of_its_header_s_bytes() -> None:
    rng = np.random.default_rng(0)
    for low in (0, 200, 255):
        header = rng.integers(low, 256, 512, dtype=np.uint8).tobytes()
        assert _byte_sum(header) == sum(header[:148] + b" " * 8 + header[156:])


def test_a_tar_cut_anywhere_is_named_or_shorter(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 600
            tar.addfile(info, io.BytesIO(b"x" * 600))
    data = path.read_bytes()
    for cut in range(1, 3 * 1536, 97):
        found = []
        try:
            found += list(iter_samples(io.BytesIO(data[:cut]), "a.tar"))
            assert cut % 1536 == 0
        except BadSample as error:
            assert "a.tar is truncated at byte" in str(error)  # noqa: PT017 - either outcome is right
    broken = data[:1536] + b"\xff" * 512 + data[2048:]
    with pytest.raises(BadSample, match="damaged tar header at byte 1536"):
        list(iter_samples(io.BytesIO(broken), "a.tar"))


def test_index_there_and_back() -> None:
    index = ShardIndex.build([0, 1024, 4096], 8192, [(1,), (), (0, 2)])
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert [again.labels(i) for i in range(len(again))] == [(1,), (), (0, 2)]
    assert again.offsets.tolist() == [0, 1024, 4096, 8192]
    assert index.to_bytes() == again.to_bytes()
    with pytest.raises(BadInput, match="x is not a shard index"):
        ShardIndex.from_bytes(index.to_bytes()[:50], "x")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 9, "name": "x"}'])
def test_bad_manifests_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        load_manifest(tmp_path)
    with pytest.raises(BadInput, match="has no split 'dev': its manifest has train"):
        Manifest("toy", "none", [], {"train": []}).shards("dev")
