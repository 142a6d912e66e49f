"""Folders and tables of raw pairs that hold anything: links, pipes, names and texts that are not UTF-8."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.errors import BadInput
from tests.toy import build_folder, fill_folder, picture, run_shards, samples_of

WHOLE = ("--val", 0, "--test", 0)


def test_linked_folders_are_packed_once(tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", ["cat/1", "dog/2"])
    (fill_folder(tmp_path / "elsewhere", ["3"])).rename(tmp_path / "birds")
    for name, target in {"cat/to_dog": "../dog", "dog/to_cat": "../cat", "bird": tmp_path / "birds"}.items():
        (raw / name).symlink_to(target)
    manifest = build_folder(raw, tmp_path / "out", *WHOLE)
    assert manifest.classes == ["bird", "cat", "dog"]
    assert set(samples_of(tmp_path / "out")) == {"bird/3", "cat/1", "dog/2"}


def test_a_picture_that_cannot_be_read_is_a_bad_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = fill_folder(tmp_path / "raw", ["1"])
    os.mkfifo(raw / "pipe.png")
    (raw / "dangling.png").symlink_to("nowhere")
    for name in ("pipe", "dangling"):
        (raw / f"{name}.txt").write_text("a text")
    with pytest.raises(BadInput, match=r"dangling\.png cannot be read .*--skip-bad"):
        build_folder(raw, tmp_path / "out", *WHOLE)
    build_folder(raw, tmp_path / "out", *WHOLE, "--skip-bad")
    assert set(samples_of(tmp_path / "out")) == {"1"}
    said = capsys.readouterr().err
    assert "left out 2 bad pairs" in said
    assert "pipe.png is no regular file" in said


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"n\xff")
    raw = fill_folder(tmp_path / "raw", ["cat/0", "cat/1"])
    for ending in (".png", ".txt"):
        (raw / "cat" / f"0{ending}").rename(raw / "cat" / f"{odd}{ending}")
    build_folder(raw, tmp_path / "out", *WHOLE)
    assert set(samples_of(tmp_path / "out")) == {"cat/1", r"cat/n\udcff"}
    (raw / "cat").rename(raw / odd)
    with pytest.raises(BadInput, match=r"class folder n\\udcff is not UTF-8: rename it"):
        build_folder(raw, tmp_path / "other", *WHOLE)
    raw.rename(tmp_path / odd)
    with pytest.raises(BadInput, match=r"--name n\\udcff is not UTF-8"):
        build_folder(tmp_path / odd, tmp_path / "other", *WHOLE)
    assert not (tmp_path / "other").exists()


def test_a_picture_beside_split_folders_is_not_left_out_in_silence(tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", ["train/1", "stray"])
    with pytest.raises(BadInput, match=r"stray\.png stands beside the split folders"):
        build_folder(raw, tmp_path / "out")


def test_files_of_other_kinds_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = fill_folder(tmp_path / "raw", ["cat/1", "cat/2"])
    (raw / "dog").mkdir()
    (raw / "dog" / "1.gif").write_bytes(picture(1, kind="GIF"))
    (raw / "cat" / "._1.png").write_bytes(b"Mac OS X")
    (raw / ".old").mkdir()
    build_folder(raw, raw / "out", *WHOLE)
    said = capsys.readouterr().out
    assert "1 files are no pictures and texts of a known kind and were left out, the first is dog/1.gif" in said
    assert "2 hidden files and folders are passed over, the first is .old/" in said
    (raw / "cat" / "1.txt").rename(raw / "cat" / "1.Txt")
    with pytest.raises(BadInput, match=r"1\.Txt is taken for texts where its name ends in \.txt: rename it so"):
        build_folder(raw, tmp_path / "out2", *WHOLE)
    (raw / "cat" / "1.Txt").rename(raw / "cat" / "1.txt")
    (raw / "cat" / "3.TXT").write_text("a text")
    with pytest.raises(BadInput, match=r"3\.TXT has no image of the same name"):
        build_folder(raw, tmp_path / "other", *WHOLE)


def table(folder: Path, *rows: dict[str, str]) -> Path:
    for number in (1, 2):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "table.jsonl"


def build_table(path: Path, *options: str) -> None:
    run_shards("build", "table", path, "--output", path.parent / "out", "--processes", 1, *WHOLE, *options)


def test_half_a_character_in_a_table_is_a_bad_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, {"image": "1.png", "text": "a dog"}, {"image": "2.png", "text": "\ud800 cat"})
    with pytest.raises(BadInput, match=r"row 2 of table\.jsonl: the text has half a character.*--skip-bad"):
        build_table(path)
    build_table(path, "--skip-bad")
    assert load_manifest(tmp_path / "out").samples("train") == 1
    assert "row 2 of table.jsonl: the text has half a character" in capsys.readouterr().err
    for row in ({"image": "\ud800.png", "text": "x"}, {"image": "1.png", "text": "x", "label": "\ud800"}):
        with pytest.raises(BadInput, match=r"row 1 of .*image path or label \\ud800.* is not UTF-8"):
            build_table(table(tmp_path, row))


def test_a_pipe_in_a_table_is_a_bad_pair(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    path = table(tmp_path, {"image": "1.png", "text": "a dog"}, {"image": "pipe.png", "text": "a cat"})
    with pytest.raises(BadInput, match=r"pipe\.png is no regular file"):
        build_table(path)


def test_json_without_bound_in_a_table_is_said(tmp_path: Path) -> None:
    path = table(tmp_path)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(BadInput, match=r"row 1 of .*table\.jsonl: is not JSON \(it is nested too deeply\)"):
        build_table(path)


def test_linked_folders_of_tars_are_indexed_once(tmp_path: Path) -> None:
    build_folder(fill_folder(tmp_path / "raw", ["1", "2"]), tmp_path / "all" / "a", *WHOLE)
    for path in (tmp_path / "all" / "a").glob("*.json"):  # as tars from elsewhere have none
        path.unlink()
    (tmp_path / "all" / "a" / "up").symlink_to("..")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "all")
    run_shards("index", tmp_path / "data", "--processes", 1)
    shards = load_manifest(tmp_path / "data").splits["train"]
    assert [shard.name for shard in shards] == ["linked/a/train-000000.tar"]
