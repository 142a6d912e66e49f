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
        npy(np.empty((0, 3))),
        npy(np.arange(3))[:20],
        b"not an array at all, but long enough to hold one" * 4,
    ],
)
def test_damaged_arrays_are_bad_samples(data: bytes) -> None:
    with pytest.raises(BadSample, match="x"):
        parse_array(data, "x")


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
