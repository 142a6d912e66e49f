"""A second run of a build: what is kept, what is made anew, and that old and new never mix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput
from shards import pack
from shards.make import Made, Making, make_shard, record_name
from shards.plan import PlannedShard
from tests.toy import build_folder, files_of, picture, run_shards, samples_of

SHARD = "train-000002.tar"


def flip(path: Path, at: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace(path: Path, data: bytes) -> None:
    """Other bytes of the same number, and the old times."""
    assert len(data) == path.stat().st_size
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=times)


def change_text(raw: Path) -> None:
    replace(raw / "train/cat/train00.txt", b"a Train00")


def change_picture(raw: Path) -> None:
    path = raw / "train/cat/train00.png"
    replace(path, path.read_bytes()[:-1] + b"?")  # behind what is decoded


@pytest.mark.parametrize("change", [change_text, change_picture])
def test_a_file_that_changes_at_equal_size_makes_another_data_set(raw: Path, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    build_folder(raw, out)
    before = files_of(out)
    change(raw)
    with pytest.raises(BadInput, match=r"another data set.*--overwrite"):
        build_folder(raw, out)
    assert files_of(out) == before
    build_folder(raw, out, "--overwrite")
    build_folder(raw, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh") != before


def test_a_table_whose_text_changes_at_equal_length_makes_another_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    table, out = tmp_path / "t.csv", tmp_path / "out"
    command = ("build", "table", table, "--output", out, "--val", 0, "--test", 0, "--processes", 1)
    table.write_text("image,text\na.png,a dog\n")
    run_shards(*command)
    table.write_text("image,text\na.png,a cat\n")
    with pytest.raises(BadInput, match="another data set"):
        run_shards(*command)
    run_shards(*command, "--overwrite")
    assert samples_of(out)["a"][0] == ["a cat"]


def test_an_interrupted_build_whose_inputs_changed_does_not_mix(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted(output: str, plan: Path, shard: PlannedShard, how: Making) -> Made:
        if len(list(out.glob("*.tar"))) == 4:
            raise KeyboardInterrupt
        return make_shard(output, plan, shard, how)

    monkeypatch.setattr(pack, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_folder(raw, out)
    monkeypatch.undo()
    assert len(list(out.glob("*.tar"))) == 4
    for path in raw.rglob("*.txt"):
        replace(path, path.read_bytes().upper())
    build_folder(raw, out)
    build_folder(raw, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("name", [SHARD, "train-000002.index.npz", record_name(SHARD)])
def test_a_flipped_byte_of_a_finished_shard_is_made_anew(
    raw: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    build_folder(raw, out)
    before = files_of(out)
    flip(out / name, at=100)
    if name.endswith(".json"):  # nobody knows what the tar is
        with pytest.raises(BadInput, match="another data set"):
            build_folder(raw, out)
        build_folder(raw, out, "--overwrite")
    else:
        build_folder(raw, out)
        assert "is not what its record says: it is made anew" in capsys.readouterr().out
    assert files_of(out) == before


def test_times_of_files_do_not_matter(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_folder(raw, tmp_path / "out")
    for path in raw.rglob("*.*"):
        os.utime(path, (1, 1))
    build_folder(raw, tmp_path / "out")
    assert "already packed" in capsys.readouterr().out


def test_a_pair_that_was_left_out_and_is_mended_makes_another_data_set(raw: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", raw / "train/cat/train00.png"
    good = bad.read_bytes()
    bad.write_bytes(bytes(len(good)))
    build_folder(raw, out, "--skip-bad")
    replace(bad, good)
    with pytest.raises(BadInput, match="another data set"):
        build_folder(raw, out, "--skip-bad")
    assert build_folder(raw, out, "--skip-bad", "--overwrite").samples("train") == 40
