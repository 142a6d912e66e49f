"""Tars as others write them are read; where one is damaged or cut is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.data.tar import header_checksum, iter_samples, split_member_name
from cmgan_dist.errors import BadSample
from tests.toy import tar_of


def test_keys_end_at_the_first_dot_of_the_base_name() -> None:
    assert split_member_name("a.b/c.image.npy") == ("a.b/c", "image.npy")
    assert split_member_name("./x.JPG") == ("./x", "jpg")


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


MEMBERS = [("a.jpg", b"x" * 700), ("README", b"no extension"), ("a.txt", b"text"), ("LICENSE", b""), ("b.txt", b"b")]


def test_members_without_an_extension_belong_to_no_sample() -> None:
    """Neither do they cut the sample that they stand in."""
    data = tar_of([("FIRST", b"1"), *MEMBERS])
    found = list(iter_samples(io.BytesIO(data), "a.tar"))
    assert [(key, sorted(members)) for key, _, members in found] == [("a", ["jpg", "txt"]), ("b", ["txt"])]
    assert found[0][1] == 1024


def test_a_member_s_checksum_is_the_sum_of_its_header_s_bytes() -> None:
    rng = np.random.default_rng(0)
    for low in (0, 200, 255):
        header = rng.integers(low, 256, 512, dtype=np.uint8).tobytes()
        assert header_checksum(header) == sum(header[:148] + b" " * 8 + header[156:])


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


@pytest.mark.parametrize("members", [MEMBERS, [(f"{i}.txt", f"{i**9}".encode()) for i in range(300)]])
def test_a_compressed_tar_is_said_to_be_one(members: list[tuple[str, bytes]]) -> None:
    """Shorter than a header, or longer. A name that begins as such a file does is none."""
    data = tar_of(members)
    for tool, compress in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
        unpack = rf"'{tool} -dc < d/a\.tar > NEW && mv NEW d/a\.tar'"
        with pytest.raises(
            BadSample, match=rf"^d/a\.tar is compressed by {tool}, no plain tar \({unpack} makes it one\)$"
        ):
            list(iter_samples(io.BytesIO(compress(data)), "d/a.tar"))
    assert [key for key, _, _ in iter_samples(io.BytesIO(tar_of([("BZh.txt", b"a")])), "a.tar")] == ["BZh"]
