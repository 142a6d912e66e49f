"""Packing folders and tables into shards."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from cmgan_dist.data.index import ShardIndex
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.output import read_record
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import parse_sample
from cmgan_dist.data.store import FileStore
from cmgan_dist.data.tar import Member, iter_samples
from cmgan_dist.errors import BadInput
from shards.make import record_name
from shards.pairs import make_key
from shards.scan import scan_shard
from shards.verify import verify
from tests.toy import (
    ROOT,
    TEXTS,
    build_folder,
    files_of,
    fill_folder,
    picture,
    run_shards,
    samples_of,
    shard_samples,
    table_rows,
    write_table,
)

# ---------------------------------------------------------------------------------------------- packing


def test_one_and_two_processes_write_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    build_folder(raw, tmp_path / "one")
    run_shards("build", "folder", raw, "--output", tmp_path / "two", "--processes", 2, "--shard-samples", 8)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert list(one) == list(two)
    assert len([name for name in one if name.endswith(".tar")]) == 5 + 1 + 1
    for name, data in one.items():
        assert data == two[name], name


def test_copied_input_with_other_times_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "raw"
    shutil.copytree(raw, copy)
    for path in copy.rglob("*.png"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    build_folder(raw, tmp_path / "one")
    build_folder(copy, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_tar_headers_carry_no_time_and_no_owner(raw: Path, tmp_path: Path) -> None:
    build_folder(raw, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")


def test_shards_are_random_samples_of_their_split(raw: Path, tmp_path: Path) -> None:
    manifest = build_folder(raw, tmp_path / "out")
    assert [s.samples for s in manifest.splits["train"]] == [8] * 5
    per_shard = [
        {label for _, (_, labels) in shard_samples(tmp_path / "out", shard.name).items() for label in labels}
        for shard in manifest.splits["train"]
    ]
    assert per_shard == [{0, 1}] * 5  # the folder lists all cats before all dogs
    keys = [key for shard in manifest.splits["train"] for key in shard_samples(tmp_path / "out", shard.name)]
    assert keys != sorted(keys)
    assert len(set(keys)) == 40


def test_a_shard_closes_before_its_byte_limit(raw: Path, tmp_path: Path) -> None:
    limit = 1000
    run_shards("build", "folder", raw, "--output", tmp_path / "out", "--processes", 1, "--shard-mib", limit / 2**20)
    shards = load_manifest(tmp_path / "out").splits["train"]
    assert len(shards) > 5
    for shard in shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            sizes = [m.size for m in tar if not m.name.endswith(".json")]
        assert sum(sizes) <= limit or shard.samples == 1


def test_plain_webdataset_reads_the_shards(raw: Path, tmp_path: Path) -> None:
    manifest = build_folder(raw, tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.splits["train"]]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(read) == 40
    for sample in read:
        assert sample["png"].size == (24, 24)
        assert sample["txt"] == f"a {sample['__key__'].split('/')[-1]}"
        assert manifest.classes[sample["json"]["label"]] == sample["__key__"].split("/")[1]


def test_sidecar_offsets_cut_out_each_sample(raw: Path, tmp_path: Path) -> None:
    build_folder(raw, tmp_path / "out")
    data = (tmp_path / "out/train-000000.tar").read_bytes()
    index = ShardIndex.from_bytes((tmp_path / "out/train-000000.index.npz").read_bytes(), "index")
    expected = shard_samples(tmp_path / "out", "train-000000.tar")
    assert len(index) == len(expected) == 8
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        last = tar.getmembers()[-1]
    assert index.offsets[-1] == last.offset_data + -(-last.size // 512) * 512
    for i, (key, (texts, labels)) in enumerate(expected.items()):
        piece = io.BytesIO(data[index.offsets[i] : index.offsets[i + 1]])
        ((found, start, members),) = iter_samples(piece, "piece")
        assert (found, start, parse_sample(key, members).texts, index.labels(i)) == (key, 0, texts, labels)


def test_sidecars_of_another_version_are_written_anew(raw: Path, tmp_path: Path) -> None:
    """By the command that made the data as by the one that the sentence names; the manifest stays as it was."""
    out = tmp_path / "out"
    details = build_folder(raw, out).details
    path = out / "train-000000.index.npz"
    good = files_of(out)
    with np.load(path) as arrays:  # version 1 had no number and no layouts
        first = {name: arrays[name] for name in ("offsets", "label_starts", "label_values")}
    np.savez(path, **first)
    with pytest.raises(BadInput, match=r"index\.npz is of another version: run 'python -m shards index --overwrite "):
        ShardReader(str(out), "train").read(0, 0)
    build_folder(raw, out)
    assert files_of(out) == good
    np.savez(path, **first)
    run_shards("index", out, "--overwrite", "--processes", 1)
    assert path.read_bytes() == good[path.name]
    assert load_manifest(out).details == details


def finished(output: Path) -> list[str]:
    """The tars whose records say that they are whole."""
    names = [path.name for path in output.glob("*.tar")]
    records = {name: read_record(FileStore(str(output), "--output"), record_name(name)) for name in names}
    return [name for name, record in records.items() if record is not None and record.finished]


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for workers in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_build_leaves_no_half_shard_and_a_second_run_completes(tmp_path: Path, processes: int) -> None:
    slow = picture(1, 1600, "JPEG")  # small to write, slow to decode
    for i in range(64):
        path = tmp_path / f"raw/c/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(slow + str(i).encode())  # behind the picture's end
        path.with_suffix(".txt").write_text(f"number {i}")
    options = ["--shard-samples", "8", "--processes", str(processes)]
    command = [sys.executable, "-m", "shards", "build", "folder", str(tmp_path / "raw"), *options, "--output"]
    output = tmp_path / "out"
    build = subprocess.Popen([*command, str(output)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(finished(output)) < 2:
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
    build.send_signal(signal.SIGKILL)
    build.wait()
    while any(map(is_running, workers)):  # a killed parent takes its workers along
        assert time.monotonic() < deadline
        time.sleep(0.01)

    left = {name: (output / name).stat().st_mtime_ns for name in finished(output)}
    assert 2 <= len(left) < 8
    assert not (output / "manifest.json").exists()
    for name in left:
        scan = scan_shard(output / name, name)
        assert (scan.damage, len(scan.samples)) == ("", 8)

    run_shards(*command[3:], output)
    assert verify(output).problems == []
    assert {name: (output / name).stat().st_mtime_ns for name in left} == left  # whole shards are kept
    run_shards(*command[3:], tmp_path / "whole")
    assert files_of(output) == files_of(tmp_path / "whole")


def test_same_arguments_are_not_packed_again_and_others_need_overwrite(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    build_folder(raw, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    build_folder(raw, output)
    assert "already packed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    with pytest.raises(BadInput, match="--overwrite"):
        run_shards("build", "folder", raw, "--output", output, "--shard-samples", 20, "--processes", 1)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    run_shards("build", "folder", raw, "--output", output, "--shard-samples", 20, "--processes", 1, "--overwrite")
    assert len(load_manifest(output).splits["train"]) == 2
    assert verify(output).problems == []  # no shard of the first packing is left

    (raw / "train/cat/train00.txt").write_text("another text, longer")
    with pytest.raises(BadInput, match="--overwrite"):
        run_shards("build", "folder", raw, "--output", output, "--shard-samples", 20, "--processes", 1)


def test_a_lost_shard_is_packed_again(raw: Path, tmp_path: Path) -> None:
    build_folder(raw, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out/train-000002.tar").unlink()
    build_folder(raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_foreign_tars_are_not_replaced(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.tar").write_bytes(b"mine")
    with pytest.raises(BadInput, match="another data set"):
        build_folder(raw, tmp_path / "out")


def test_skip_bad_counts_and_lists(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "train/cat/train00.png").write_bytes(picture(0)[:60])
    (raw / "train/cat/train01.txt").unlink()
    (raw / "train/dog/train02.txt").write_text(" \n")
    (raw / "train/dog/train03.txt").write_bytes(b"caf\xe9")
    manifest = build_folder(raw, tmp_path / "out", "--skip-bad")
    assert manifest.samples("train") == 36
    assert manifest.details["left_out"] == 4
    error = capsys.readouterr().err
    assert "left out 4 bad pairs" in error
    for name in ("train00.png", "train01.txt", "train02.png", "train03.png"):
        assert name in error
    assert verify(tmp_path / "out").problems == []


def test_a_class_that_lost_its_pairs_is_named(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "train" / "zebra").mkdir()
    (raw / "train" / "zebra" / "z.png").write_bytes(picture(0)[:60])
    (raw / "train" / "zebra" / "z.txt").write_text("a zebra")
    manifest = build_folder(raw, tmp_path / "out", "--skip-bad")
    assert manifest.classes == ["cat", "dog", "zebra"]
    assert "classes without a sample, since pairs were left out: zebra" in capsys.readouterr().out
    (raw / "train" / "zebra" / "z.png").write_bytes(picture(0))
    (raw / "train" / "cat" / "train00.png").write_bytes(b"")
    build_folder(raw, tmp_path / "all", "--skip-bad")
    assert "without a sample" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "key"), [("a/b.c.d", "a/b_c_d"), ("/x/../y", "x/y"), ("été/小.猫", "été/小_猫"), ("a.b/c", "a.b/c")]
)
def test_a_key_has_no_dot_in_its_base_name(name: str, key: str) -> None:
    assert make_key(name) == key


HIDDEN = ["a", ".a", "_.a", "__.a", "..a", "...", "a/.b", "__MACOSX", "___MACOSX", "_MACOSX", ".a.", "__MACOSX2", "."]


def test_no_reader_passes_over_a_key_and_keys_stay_distinct() -> None:
    keys = [make_key(f"/data/{folder}/{base}") for folder in HIDDEN for base in ("x", ".x", "__MACOSX", "...")]
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if Member(key, "png", 0, b"", b"").is_foreign()]


def test_pictures_in_hidden_folders_are_packed(tmp_path: Path) -> None:
    """As the paths in a Parquet file say that was made in a cache."""
    names = [".cache/me/0.png", "__MACOSX/1.png", "_.cache/me/0.png", "x/.hidden.png"]
    rows = [{"image": {"bytes": picture(i), "path": name}, "caption": f"text {i}"} for i, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    run_shards("build", "table", tmp_path / "t.parquet", "--output", tmp_path / "out", "--val", 0, "--test", 0)
    assert sorted(sample.texts[0] for sample in ShardReader(str(tmp_path / "out"), "train")) == [
        f"text {i}" for i in range(4)
    ]
    assert not verify(tmp_path / "out", processes=1).problems


# ---------------------------------------------------------------------------------------------- folder


def test_folder_keeps_all_texts_in_any_script(tmp_path: Path) -> None:
    names = [f"train/{c}/{i}" for c in ("猫", "chien d'été") for i in range(3)]
    fill_folder(tmp_path / "raw", names)
    (tmp_path / "raw/train/猫/0.txt").write_text("\n".join(TEXTS), encoding="utf-8-sig")
    manifest = build_folder(tmp_path / "raw", tmp_path / "out")
    assert manifest.classes == ["chien d'été", "猫"]
    found = samples_of(tmp_path / "out")
    assert found["train/猫/0"] == (TEXTS, (1,))
    assert found["train/猫/1"] == (["a 1"], (1,))
    assert verify(tmp_path / "out").problems == []


def test_flat_folder_is_split_by_hash_without_labels(tmp_path: Path) -> None:
    fill_folder(tmp_path / "raw", [f"n{i}" for i in range(60)])
    manifest = build_folder(tmp_path / "raw", tmp_path / "a", "--val", 0.2, "--test", 0.3)
    assert (manifest.label_kind, manifest.classes, list(manifest.splits)) == ("none", [], ["train", "val", "test"])
    before = {split: set(samples_of(tmp_path / "a", split)) for split in manifest.splits}
    fill_folder(tmp_path / "raw", [f"more{i}" for i in range(20)])
    build_folder(tmp_path / "raw", tmp_path / "b", "--val", 0.2, "--test", 0.3)
    for split, keys in before.items():
        assert keys <= set(samples_of(tmp_path / "b", split))  # more pairs move none to another split
    everything = build_folder(tmp_path / "raw", tmp_path / "c", "--val", 0, "--test", 0)
    assert list(everything.splits) == ["train"]


def test_the_extension_in_the_tar_is_that_of_the_bytes(raw: Path, tmp_path: Path) -> None:
    (raw / "train/cat/train00.png").write_bytes(picture(5, kind="WEBP"))
    build_folder(raw, tmp_path / "out")
    data = b"".join(shard.read_bytes() for shard in (tmp_path / "out").glob("train-*.tar"))
    assert b"train/cat/train00.webp" in data
    assert b"train/cat/train00.png" not in data


# ---------------------------------------------------------------------------------------------- table


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_table_of_each_kind_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    table = write_table(tmp_path / f"pairs.{kind}", table_rows(tmp_path))
    run_shards("build", "table", table, "--output", tmp_path / "out", "--processes", 1)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.label_kind, manifest.classes) == ("multi", ["a", "b"])
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 8, "val": 1, "test": 1}
    found = samples_of(tmp_path / "out")
    assert found["img/0"] == ([TEXTS[0], 'a second, "quoted"\ncaption'], (1,))
    assert found["img/3"] == ([TEXTS[3]], (0, 1))
    assert verify(tmp_path / "out").problems == []


def test_table_columns_by_name_and_json_labels(tmp_path: Path) -> None:
    rows = [
        {"where": row["filepath"], "what": row["caption"], "kinds": '["x", "y"]' if i % 2 else '["y"]'}
        for i, row in enumerate(table_rows(tmp_path)[:10])
    ]
    table = write_table(tmp_path / "t.csv", rows)
    names = ["--image-column", "where", "--text-column", "what", "--label-column", "kinds"]
    run_shards("build", "table", table, "--output", tmp_path / "out", *names, "--processes", 1, "--val", 0, "--test", 0)
    found = samples_of(tmp_path / "out")
    assert (found["img/0"][1], found["img/1"][1]) == ((1,), (0, 1))
    assert load_manifest(tmp_path / "out").label_kind == "multi"


def test_table_with_numbers_for_classes_orders_them_by_value(tmp_path: Path) -> None:
    rows = [{**row, "label": str(i)} for i, row in enumerate(table_rows(tmp_path)[:10])]
    for i in (2, 3):
        rows[i]["label"] = str(i * 10)
    run_shards("build", "table", write_table(tmp_path / "t.csv", rows), "--output", tmp_path / "out", "--processes", 1)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.label_kind, manifest.classes[-2:]) == ("single", ["20", "30"])


def test_each_sample_of_a_shard_is_counted_as_it_is_packed(raw: Path, tmp_path: Path, monkeypatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr("shards.make.units_done", counted.append)
    build_folder(raw, tmp_path / "out", "--processes", 1)
    assert counted == [1] * 52
