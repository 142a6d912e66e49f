"""The one writer of a shard file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.data.index import index_name
from cmgan_dist.data.store import FileStore
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput, BadSample
from shards.pairs import FileBytes
from shards.scan import scan_shard
from shards.shard_file import Members, has_index, npy, read_texts, try_sample, write_shard

NAME = "train-000000.tar"


def samples(count: int) -> Iterator[tuple[str, Members]]:
    for i in range(count):
        yield f"part/{i}", [("image.npy", npy(np.full(3, i))), ("txt", b"number %d" % i), ("json", b'{"label": 0}')]


def test_a_shard_is_its_tar_and_its_sidecar(tmp_path: Path) -> None:
    info = write_shard(tmp_path, NAME, samples(4))
    assert info is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [index_name(NAME), NAME]
    scan = scan_shard(tmp_path / NAME, NAME)
    assert (scan.info, scan.damage) == (info, "")
    assert scan.index.to_bytes() == (tmp_path / index_name(NAME)).read_bytes()
    with open(tmp_path / NAME, "rb") as file:
        read = [(key, list(members)) for key, _, members in iter_samples(file, NAME)]
    assert read == [(f"part/{i}", ["image.npy", "txt", "json"]) for i in range(4)]
    assert has_index(FileStore(str(tmp_path), "folder"), info)
    (tmp_path / index_name(NAME)).unlink()
    assert not has_index(FileStore(str(tmp_path), "folder"), info)


def test_a_shard_may_lie_in_a_folder(tmp_path: Path) -> None:
    assert write_shard(tmp_path, f"part/{NAME}", samples(2)) is not None
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == [index_name(NAME), NAME]


def test_two_writers_of_one_shard_leave_it_whole(tmp_path: Path) -> None:
    """The second begins and ends in the middle of the first."""

    def interrupted() -> Iterator[tuple[str, Members]]:
        for i, sample in enumerate(samples(4)):
            if i == 2:
                write_shard(tmp_path / "both", NAME, samples(3))
            yield sample

    for folder in ("both", "alone"):
        (tmp_path / folder).mkdir()
    assert write_shard(tmp_path / "both", NAME, interrupted()) == write_shard(tmp_path / "alone", NAME, samples(4))
    both, alone = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("both", "alone"))
    assert both == alone


def test_what_fails_or_is_empty_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Members]]:
        yield from samples(2)
        raise BadInput("broken")

    with pytest.raises(BadInput, match="broken"):
        write_shard(tmp_path, NAME, broken())
    assert write_shard(tmp_path, NAME, samples(0)) is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match="cannot write"):
        write_shard(tmp_path / "nowhere", NAME, samples(2))


def keyed(*keys: str) -> list[tuple[str, Members]]:
    return [(key, members) for key, (_, members) in zip(keys, samples(len(keys)), strict=True)]


@pytest.mark.parametrize(
    ("key", "what"),
    [(".a/0", r"\.a/0\.image\.npy"), ("b/0", "some were read as one")],
)
def test_what_is_not_found_again_is_not_packed(key: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{NAME}: 3 samples were written and 2 are found in it: {what}; give these"):
        write_shard(tmp_path, NAME, keyed("b/0", key, "a/0"))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_sample_stops_or_is_noted() -> None:
    left_out: list[str] = []

    def bad() -> None:
        raise BadSample("has no image")

    with pytest.raises(BadInput, match=r"row 3: has no image; .*--skip-bad"):
        try_sample(bad, "row 3", False, left_out)
    assert left_out == []
    assert try_sample(bad, "row 3", True, left_out) is None
    assert left_out == ["row 3: has no image"]
    assert try_sample(lambda: 7, "row 4", True, left_out) == 7


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")])
def test_features_are_finite(value: float, dtype: str) -> None:
    with pytest.raises(BadSample, match=rf"NaN or Inf, or numbers too large for {dtype}"):
        npy(np.array([1, value]), dtype)


def test_no_array_is_written_that_is_not_read() -> None:
    with pytest.raises(BadSample, match="more than 16777216"):
        npy(np.broadcast_to(np.float32(0), (1 << 14, (1 << 10) + 1)))


def test_a_text_ends_at_the_end_of_a_line_alone(tmp_path: Path) -> None:
    """Not where ``str.splitlines`` sees an end too, such as U+2028, U+0085 and a form feed."""
    kept = [f"a dog{c}runs" for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    for number, end in enumerate(("\n", "\r\n", "\r", "\n\n")):
        file = tmp_path / f"{number}.txt"
        file.write_bytes((end.join(kept) + end).encode())
        assert read_texts(FileBytes(file)) == tuple(kept)
