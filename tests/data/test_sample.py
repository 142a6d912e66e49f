"""Samples, arrays, tars and sidecars: what others write is read, what is damaged is named."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmgan_dist.data.index import INDEX_VERSION, Layout, ShardIndex
from cmgan_dist.data.manifest import Manifest, load_manifest
from cmgan_dist.data.sample import parse_array, parse_sample
from cmgan_dist.data.tar import _byte_sum, iter_groups, iter_samples, split_member_name
from cmgan_dist.errors import BadInput, BadSample
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


def index_of(data: bytes) -> ShardIndex:
    groups = list(iter_groups(io.BytesIO(data), "a.tar"))
    last = groups[-1][-1] if groups else None
    end = data.index(b"\0" * 512, last.start + 512 + len(last.data)) if last else 0
    end += -end % 512
    layouts = [Layout.of(group) for group in groups]
    return ShardIndex.build([group[0].start for group in groups], end, [()] * len(groups), layouts)


EXTENSIONS = ["jpg", "JPG", "json", "txt", "image.npy", "é", "İ", "\u212a", "a b", "x" * 30, ""]
KEYS = st.text(st.sampled_from("ab0/ -é中\udc80\u212a"), min_size=1, max_size=12) | st.just("d" * 60 + "/" + "k" * 60)
SAMPLES = st.lists(
    st.tuples(
        KEYS,
        st.lists(st.tuples(st.sampled_from(EXTENSIONS), st.sampled_from([0, 1, 511, 512, 513, 1500])), max_size=10),
    ),
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(SAMPLES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_the_index_finds_the_members_that_the_walk_finds(
    samples: list[tuple[str, list[tuple[str, int]]]], form: int
) -> None:
    """Or leaves the sample to the walk; not where its headers are plain."""
    names = [f"{key}.{extension}" if extension else key for key, members in samples for extension, _ in members]
    sizes = [size for _, members in samples for _, size in members]
    data = tar_of(
        [(name, bytes([65 + i]) * size) for i, (name, size) in enumerate(zip(names, sizes, strict=True))], form
    )
    built = index_of(data)
    index = ShardIndex.from_bytes(built.to_bytes(), "x")
    assert index.to_bytes() == built.to_bytes()
    walked = list(iter_samples(io.BytesIO(data), "a.tar"))
    assert len(index) == len(walked)
    for i, (key, start, members) in enumerate(walked):
        piece = data[index.offsets[i] : index.offsets[i + 1]]
        row = index.layouts[i].tolist()
        found, views = index.slice_members(row, piece, piece), index.slice_members(row, data, memoryview(data), start)
        assert found is None or found == (key, members)
        assert views == found
        plain = len(key) < 60 and len(members) <= 3 and all(" " not in e for e in members)
        if plain and len(samples) == 1 and "" not in dict(samples[0][1]) and form == tarfile.GNU_FORMAT:
            assert found or len(samples[0][1]) > 8


def test_no_byte_of_a_header_changes_unnoticed() -> None:
    whole = tar_of([("a.jpg", b"x" * 700), ("a.txt", b"text")])
    index = index_of(whole)
    row = index.layouts[0].tolist()
    assert index.slice_members(row, whole, whole) == ("a", {"jpg": b"x" * 700, "txt": b"text"})
    for at in (*range(512), *range(1536, 2048)):
        for value in (whole[at] ^ 1, 255 - whole[at]):
            piece = whole[:at] + bytes([value]) + whole[at + 1 :]
            assert index.slice_members(row, piece, piece) is None


def test_a_sidecar_keeps_a_few_bytes_a_member() -> None:
    """A billion samples have 32 GB of sidecars, and a rank holds those of the windows that it is in."""
    names = [f"{i:06d}.{extension}" for i in range(1000) for extension in ("jpg", "json")]
    index = index_of(tar_of([(name, b"") for name in names]))
    assert (index.layouts[:, 0] == 1).all()
    assert len(index.to_bytes()) < 33 * 1000 + 3000


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
    layouts = [Layout("3 jpg json", 7, (100, 0)), Layout(), Layout("4 png txt", 9, (3000, 1))]
    index = ShardIndex.build([0, 1536, 4096], 8704, [(1,), (), (0, 2)], layouts)
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert [again.labels(i) for i in range(len(again))] == [(1,), (), (0, 2)]
    assert again.offsets.tolist() == [0, 1536, 4096, 8704]
    assert again.patterns.tolist() == ["", "3 jpg json", "4 png txt"]
    assert again.layouts.tolist() == [[1, 7, 100, 0], [0, 0, 0, 0], [2, 9, 3000, 1]]
    assert index.to_bytes() == again.to_bytes()
    with pytest.raises(BadInput, match="x is not a shard index"):
        ShardIndex.from_bytes(index.to_bytes()[:50], "x")


SOUND: dict[str, object] = {
    "version": INDEX_VERSION,
    "offsets": np.array([0, 1536, 4096]),
    "label_starts": np.array([0, 1, 1]),
    "label_values": np.array([5], np.int32),
    "patterns": np.array(["", "3 jpg json"]),
    "layouts": np.array([[1, 7, 100, 0], [0, 0, 0, 0]], np.uint32),
}
HUGE = npy(np.zeros(1)).replace(b"(1,), ", b"(1152921504606846976,), ")
UNSOUND: list[dict[str, object]] = [
    {"offsets": np.array([0, 1537, 4096])},
    {"offsets": np.array([0, 1536, 4096.0])},
    {"offsets": np.array([-512, 1024, 4096])},
    {"offsets": np.array([0, 1536, 4096], ">i8")},
    {"offsets": np.array([1 << 62, -(1 << 63) + 1536, 4096])},
    {"offsets": np.array([0, 1536])},
    {"offsets": np.array(3)},
    {"offsets": np.zeros(0, np.int64)},
    {"label_starts": np.array([0, 2, 1])},
    {"label_starts": np.array([0, -1, 1])},
    {"label_starts": np.array([0, 1, 9])},
    {"label_values": np.array([[5]], np.int32)},
    {"label_values": np.array([5], object)},
    {"patterns": np.array(["", "three jpg json"])},
    {"patterns": np.array(["", "9999 jpg json"])},
    {"patterns": np.array(["", "-3 jpg json"])},
    {"patterns": np.array(["", "3 jpg json txt"])},
    {"patterns": np.array([""])},
    {"patterns": np.zeros(0, "<U9")},
    {"patterns": np.array([[""], [""]])},
    {"patterns": np.array([b"", b"3 jpg json"])},
    {"layouts": np.array([[2, 7, 100, 0], [0, 0, 0, 0]], np.uint32)},
    {"layouts": np.array([[1, 7, 100, 600], [0, 0, 0, 0]], np.uint32)},
    {"layouts": np.array([[1, 7, (1 << 32) - 1, 513], [0, 0, 0, 0]], np.uint32)},
    {"layouts": np.array([[1, 7, 100, 0], [0, 0, 0, 0]], np.int64)},
    {"layouts": np.array([[0], [0]], np.uint32), "patterns": np.array([""])},
    {"layouts": np.zeros((2, 0), np.uint32), "patterns": np.array([""])},
    {"layouts": np.zeros(2, np.uint32), "patterns": np.array([""])},
    {"extra": np.zeros(2)},
]


@pytest.mark.parametrize("changes", UNSOUND, ids=range(len(UNSOUND)))
def test_an_unsound_sidecar_is_one_sentence(changes: dict[str, object]) -> None:
    for arrays in (SOUND, {**SOUND, **changes}):
        out = io.BytesIO()
        np.savez(out, **arrays)  # type: ignore[arg-type]
        if arrays is SOUND:
            assert len(ShardIndex.from_bytes(out.getvalue(), "x")) == 2
        else:
            with pytest.raises(BadInput, match=r"x is not a shard index .*shards index") as error:
                ShardIndex.from_bytes(out.getvalue(), "x")
            assert "\n" not in str(error.value)


def test_a_sidecar_is_not_believed_about_its_size() -> None:
    small, packed = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(small, "w") as file:
        file.writestr("offsets.npy", HUGE)
    np.savez_compressed(packed, **SOUND)  # type: ignore[arg-type]
    for data in (small.getvalue(), packed.getvalue()):
        with pytest.raises(BadInput, match="x is not a shard index"):
            ShardIndex.from_bytes(data, "x")


def test_a_sidecar_of_another_version_says_what_to_do() -> None:
    """That of version 1 had no number."""
    for version in ({}, {"version": INDEX_VERSION + 1}):
        out = io.BytesIO()
        np.savez(out, **{**{k: v for k, v in SOUND.items() if k != "version"}, **version})  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="x is of another version: run 'python -m shards index --overwrite'"):
            ShardIndex.from_bytes(out.getvalue(), "x")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 9, "name": "x"}'])
def test_bad_manifests_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        load_manifest(tmp_path)
    with pytest.raises(BadInput, match="has no split 'dev': its manifest has train"):
        Manifest("toy", "none", [], {"train": []}).shards("dev")
