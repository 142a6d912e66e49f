"""Index sidecars: they find what a walk through the tar finds, and are not believed when they cannot be right."""

from __future__ import annotations

import io
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmgan_dist.data.index import INDEX_VERSION, Layout, ShardIndex
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.errors import BadInput
from tests.toy import npy, tar_of


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
    walked = list(iter_groups(io.BytesIO(data), "a.tar"))
    assert len(index) == len(walked)
    for i, group in enumerate(walked):
        key, start = group[0].key, group[0].start
        members = {member.extension: member.data for member in group}
        if len(members) < len(group):
            assert not index.layouts[i, 0], "only the walk sees a member that stands twice"
            continue
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
        with pytest.raises(BadInput, match="x is of another version: run 'python -m shards index --overwrite DIR'"):
            ShardIndex.from_bytes(out.getvalue(), "x")


def test_the_advice_names_the_place() -> None:
    for place, advice in (("/a", "--overwrite /a'"), ("s3://b/c", "where the files of s3://b/c are kept")):
        with pytest.raises(BadInput, match=f"x is not a shard index .*{advice}"):
            ShardIndex.from_bytes(b"", "x", place)
