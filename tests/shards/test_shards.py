"""Packing, checking and indexing shards, on small folders and tables made here."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from cmgan_dist.data.index import ShardIndex, index_name
from cmgan_dist.data.manifest import Manifest, load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import parse_sample
from cmgan_dist.data.tar import iter_samples
from cmgan_dist.errors import BadInput, run_main
from cmgan_dist.files import write_atomic
from shards.__main__ import COMMANDS, SOURCES, main
from shards.pairs import make_key
from shards.scan import scan_shard
from shards.stats import fonts_for
from shards.verify import verify

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["ein Käfer", "红色的花", "قطة صغيرة", "жёлтый дом", "tail 🐕 wag"]


def picture(number: int, size: int = 24, kind: str = "PNG") -> bytes:
    """Encoded image that differs with its number."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size, size)).save(out, kind)
    return out.getvalue()


def fill(folder: Path, names: list[str], text: str = "a {}") -> Path:
    """Write NAME.png and NAME.txt for each name; the pictures are distinct."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(picture(zlib.crc32(name.encode())))
        path.with_suffix(".txt").write_text(text.format(path.name), encoding="utf-8")
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two classes in three split folders: 40, 6 and 6 pairs."""
    sizes = {"train": 20, "dev": 3, "test": 3}
    names = [f"{s}/{c}/{s}{i:02d}" for s, count in sizes.items() for c in ("cat", "dog") for i in range(count)]
    return fill(tmp_path / "raw", names)


def run(*args: object) -> int | None:
    return main([str(arg) for arg in args])


def built(raw: Path, output: Path, *args: object) -> Manifest:
    run("build", "folder", raw, "--output", output, "--processes", 1, "--shard-samples", 8, *args)
    return load_manifest(output)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder: Path, split: str = "train") -> dict[str, tuple[object, tuple[int, ...]]]:
    """Key -> (texts, labels) of a split, by the schema's own reader."""
    found = {}
    for shard in load_manifest(folder).shards(split):
        with open(folder / shard.name, "rb") as file:
            for key, _, members in iter_samples(file, shard.name):
                sample = parse_sample(key, members)
                found[key] = sample.texts, sample.labels
    return found


def rewrite(path: Path, change: dict[str, bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """Rewrite a tar with changed (None: removed) and extra members."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    members |= change | (extra or {})  # type: ignore[operator]
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def re_sum(folder: Path) -> None:
    """Make manifest and sidecars agree with the tars, so that only a sample's own fault is left to find."""
    manifest = load_manifest(folder)
    for split, shards in manifest.splits.items():
        scans = [scan_shard(folder / shard.name, shard.name) for shard in shards]
        manifest.splits[split] = [scan.info for scan in scans]
        for scan in scans:
            write_atomic(folder / index_name(scan.info.name), scan.index.to_bytes())
    write_atomic(folder / "manifest.json", manifest.to_json())


# ---------------------------------------------------------------------------------------------- packing


def test_one_and_two_processes_write_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    built(raw, tmp_path / "one")
    run("build", "folder", raw, "--output", tmp_path / "two", "--processes", 2, "--shard-samples", 8)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
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
    built(raw, tmp_path / "one")
    built(copy, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_tar_headers_carry_no_time_and_no_owner(raw: Path, tmp_path: Path) -> None:
    built(raw, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")


def test_shards_are_random_samples_of_their_split(raw: Path, tmp_path: Path) -> None:
    manifest = built(raw, tmp_path / "out")
    assert [s.samples for s in manifest.splits["train"]] == [8] * 5
    per_shard = [
        {label for _, (_, labels) in _shard_samples(tmp_path / "out", shard.name).items() for label in labels}
        for shard in manifest.splits["train"]
    ]
    assert per_shard == [{0, 1}] * 5  # the folder lists all cats before all dogs
    keys = [key for shard in manifest.splits["train"] for key in _shard_samples(tmp_path / "out", shard.name)]
    assert keys != sorted(keys)
    assert len(set(keys)) == 40


def _shard_samples(folder: Path, name: str) -> dict[str, tuple[object, tuple[int, ...]]]:
    with open(folder / name, "rb") as file:
        parsed = {key: parse_sample(key, members) for key, _, members in iter_samples(file, name)}
    return {key: (sample.texts, sample.labels) for key, sample in parsed.items()}


def test_a_shard_closes_before_its_byte_limit(raw: Path, tmp_path: Path) -> None:
    limit = 1000
    run("build", "folder", raw, "--output", tmp_path / "out", "--processes", 1, "--shard-mib", limit / 2**20)
    shards = load_manifest(tmp_path / "out").splits["train"]
    assert len(shards) > 5
    for shard in shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            sizes = [m.size for m in tar if not m.name.endswith(".json")]
        assert sum(sizes) <= limit or shard.samples == 1


def test_plain_webdataset_reads_the_shards(raw: Path, tmp_path: Path) -> None:
    manifest = built(raw, tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.splits["train"]]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(read) == 40
    for sample in read:
        assert sample["png"].size == (24, 24)
        assert sample["txt"] == f"a {sample['__key__'].split('/')[-1]}"
        assert manifest.classes[sample["json"]["label"]] == sample["__key__"].split("/")[1]


def test_sidecar_offsets_cut_out_each_sample(raw: Path, tmp_path: Path) -> None:
    built(raw, tmp_path / "out")
    data = (tmp_path / "out/train-000000.tar").read_bytes()
    index = ShardIndex.from_bytes((tmp_path / "out/train-000000.index.npz").read_bytes(), "index")
    expected = _shard_samples(tmp_path / "out", "train-000000.tar")
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
    details = built(raw, out).details
    path = out / "train-000000.index.npz"
    good = files(out)
    with np.load(path) as arrays:  # version 1 had no number and no layouts
        first = {name: arrays[name] for name in ("offsets", "label_starts", "label_values")}
    np.savez(path, **first)
    with pytest.raises(BadInput, match=r"index\.npz is of another version: run 'python -m shards index --overwrite'"):
        ShardReader(str(out), "train").read(0, 0)
    built(raw, out)
    assert files(out) == good
    np.savez(path, **first)
    run("index", out, "--overwrite", "--processes", 1)
    assert path.read_bytes() == good[path.name]
    assert load_manifest(out).details == details


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
    build = subprocess.Popen([*command, str(output)], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(output.glob("*.tar"))) < 2:
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
    build.send_signal(signal.SIGKILL)
    build.wait()
    while any(map(is_running, workers)):  # a killed parent takes its workers along
        assert time.monotonic() < deadline
        time.sleep(0.01)

    left = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert 2 <= len(left) < 8
    assert not (output / "manifest.json").exists()
    for name in left:
        scan = scan_shard(output / name, name)
        assert (scan.damage, len(scan.samples)) == ("", 8)

    run(*command[3:], output)
    assert verify(output).problems == []
    assert {name: (output / name).stat().st_mtime_ns for name in left} == left  # whole shards are kept
    run(*command[3:], tmp_path / "whole")
    assert files(output) == files(tmp_path / "whole")


def test_same_arguments_are_not_packed_again_and_others_need_overwrite(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    built(raw, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    built(raw, output)
    assert "already packed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    with pytest.raises(BadInput, match="--overwrite"):
        run("build", "folder", raw, "--output", output, "--shard-samples", 20, "--processes", 1)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    run("build", "folder", raw, "--output", output, "--shard-samples", 20, "--processes", 1, "--overwrite")
    assert len(load_manifest(output).splits["train"]) == 2
    assert verify(output).problems == []  # no shard of the first packing is left

    (raw / "train/cat/train00.txt").write_text("another text, longer")
    with pytest.raises(BadInput, match="--overwrite"):
        run("build", "folder", raw, "--output", output, "--shard-samples", 20, "--processes", 1)


def test_a_lost_shard_is_packed_again(raw: Path, tmp_path: Path) -> None:
    built(raw, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out/train-000002.tar").unlink()
    built(raw, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_foreign_tars_are_not_replaced(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.tar").write_bytes(b"mine")
    with pytest.raises(BadInput, match="another data set"):
        built(raw, tmp_path / "out")


def test_skip_bad_counts_and_lists(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "train/cat/train00.png").write_bytes(picture(0)[:60])
    (raw / "train/cat/train01.txt").unlink()
    (raw / "train/dog/train02.txt").write_text(" \n")
    (raw / "train/dog/train03.txt").write_bytes(b"caf\xe9")
    manifest = built(raw, tmp_path / "out", "--skip-bad")
    assert manifest.samples("train") == 36
    assert manifest.details["left_out"] == 4
    error = capsys.readouterr().err
    assert "left out 4 bad pairs" in error
    for name in ("train00.png", "train01.txt", "train02.png", "train03.png"):
        assert name in error
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("name", "key"), [("a/b.c.d", "a/b_c_d"), ("/x/../y", "x/y"), ("été/小.猫", "été/小_猫"), ("a.b/c", "a.b/c")]
)
def test_a_key_has_no_dot_in_its_base_name(name: str, key: str) -> None:
    assert make_key(name) == key


# ---------------------------------------------------------------------------------------------- folder


def test_folder_keeps_all_texts_in_any_script(tmp_path: Path) -> None:
    names = [f"train/{c}/{i}" for c in ("猫", "chien d'été") for i in range(3)]
    fill(tmp_path / "raw", names)
    (tmp_path / "raw/train/猫/0.txt").write_text("\n".join(TEXTS), encoding="utf-8-sig")
    manifest = built(tmp_path / "raw", tmp_path / "out")
    assert manifest.classes == ["chien d'été", "猫"]
    found = samples(tmp_path / "out")
    assert found["train/猫/0"] == (TEXTS, (1,))
    assert found["train/猫/1"] == (["a 1"], (1,))
    assert verify(tmp_path / "out").problems == []


def test_flat_folder_is_split_by_hash_without_labels(tmp_path: Path) -> None:
    fill(tmp_path / "raw", [f"n{i}" for i in range(60)])
    manifest = built(tmp_path / "raw", tmp_path / "a", "--val", 0.2, "--test", 0.3)
    assert (manifest.label_kind, manifest.classes, list(manifest.splits)) == ("none", [], ["train", "val", "test"])
    before = {split: set(samples(tmp_path / "a", split)) for split in manifest.splits}
    fill(tmp_path / "raw", [f"more{i}" for i in range(20)])
    built(tmp_path / "raw", tmp_path / "b", "--val", 0.2, "--test", 0.3)
    for split, keys in before.items():
        assert keys <= set(samples(tmp_path / "b", split))  # more pairs move none to another split
    everything = built(tmp_path / "raw", tmp_path / "c", "--val", 0, "--test", 0)
    assert list(everything.splits) == ["train"]


def test_the_extension_in_the_tar_is_that_of_the_bytes(raw: Path, tmp_path: Path) -> None:
    (raw / "train/cat/train00.png").write_bytes(picture(5, kind="WEBP"))
    built(raw, tmp_path / "out")
    data = b"".join(shard.read_bytes() for shard in (tmp_path / "out").glob("train-*.tar"))
    assert b"train/cat/train00.webp" in data
    assert b"train/cat/train00.png" not in data


# ---------------------------------------------------------------------------------------------- table


def table_rows(folder: Path) -> list[dict[str, str]]:
    """Ten images, the first with two captions; every other one has both labels."""
    fill(folder, [f"img/{i}" for i in range(10)])
    rows = [
        {"filepath": f"img/{i}.png", "caption": TEXTS[i % 5], "label": "a|b" if i % 2 else "b", "split": "train"}
        for i in range(10)
    ]
    rows[8]["split"], rows[9]["split"] = "validation", "test"
    return [*rows, {**rows[0], "caption": 'a second, "quoted"\ncaption'}]


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_table_of_each_kind_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    table = write_table(tmp_path / f"pairs.{kind}", table_rows(tmp_path))
    run("build", "table", table, "--output", tmp_path / "out", "--processes", 1)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.label_kind, manifest.classes) == ("multi", ["a", "b"])
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 8, "val": 1, "test": 1}
    found = samples(tmp_path / "out")
    assert found["img/0"] == ([TEXTS[0], 'a second, "quoted"\ncaption'], (1,))
    assert found["img/3"] == ([TEXTS[3]], (0, 1))
    assert verify(tmp_path / "out").problems == []


def test_table_columns_by_name_and_json_labels(tmp_path: Path) -> None:
    rows = [
        {"where": row["filepath"], "what": row["caption"], "kinds": '["x", "y"]' if i % 2 else "[]"}
        for i, row in enumerate(table_rows(tmp_path)[:10])
    ]
    table = write_table(tmp_path / "t.csv", rows)
    names = ["--image-column", "where", "--text-column", "what", "--label-column", "kinds"]
    run("build", "table", table, "--output", tmp_path / "out", *names, "--processes", 1, "--val", 0, "--test", 0)
    found = samples(tmp_path / "out")
    assert (found["img/0"][1], found["img/1"][1]) == ((), (0, 1))
    assert load_manifest(tmp_path / "out").label_kind == "multi"


def test_table_with_numbers_for_classes_orders_them_by_value(tmp_path: Path) -> None:
    rows = [{**row, "label": str(i)} for i, row in enumerate(table_rows(tmp_path)[:10])]
    for i in (2, 3):
        rows[i]["label"] = str(i * 10)
    run("build", "table", write_table(tmp_path / "t.csv", rows), "--output", tmp_path / "out", "--processes", 1)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.label_kind, manifest.classes[-2:]) == ("single", ["20", "30"])


# ---------------------------------------------------------------------------------------------- verify


def test_verify_is_clean_after_build(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(raw, tmp_path / "out")
    capsys.readouterr()
    assert run("verify", tmp_path / "out", "--processes", 1) == 0
    assert capsys.readouterr().out.endswith("52 samples in 7 shards, 0 problems, 0 warnings\n")


def cut(folder: Path) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def flip(folder: Path) -> None:
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"a train")] ^= 1
    path.write_bytes(data)


def orphan(folder: Path) -> None:
    rewrite(folder / "train-000001.tar", {}, {"lonely.txt": b"a text"})
    re_sum(folder)


def no_text(folder: Path) -> None:
    name = next(iter(_shard_samples(folder, "train-000001.tar")))
    rewrite(folder / "train-000001.tar", {f"{name}.txt": None})
    re_sum(folder)


def corrupt_image(folder: Path) -> None:
    name = next(iter(_shard_samples(folder, "train-000001.tar")))
    rewrite(folder / "train-000001.tar", {f"{name}.png": picture(1)[:60]})
    re_sum(folder)


def label_out_of_range(folder: Path) -> None:
    name = next(iter(_shard_samples(folder, "train-000001.tar")))
    rewrite(folder / "train-000001.tar", {f"{name}.json": b'{"label": 7}'})
    re_sum(folder)


def label_missing(folder: Path) -> None:
    name = next(iter(_shard_samples(folder, "train-000001.tar")))
    rewrite(folder / "train-000001.tar", {f"{name}.json": None})
    re_sum(folder)


def _first_image(folder: Path) -> bytes:
    with open(folder / "test-000000.tar", "rb") as file:
        return next(iter_samples(file, "test"))[2]["png"]


def same_image(folder: Path) -> None:
    extra = {"copy.png": _first_image(folder), "copy.txt": b"a copy", "copy.json": b'{"label": 0}'}
    rewrite(folder / "train-000001.tar", {}, extra)
    re_sum(folder)


def same_key(folder: Path) -> None:
    key = next(iter(_shard_samples(folder, "test-000000.tar")))
    rewrite(
        folder / "train-000001.tar", {}, {f"{key}.png": picture(9), f"{key}.txt": b"x", f"{key}.json": b'{"label": 0}'}
    )
    re_sum(folder)


def features_among_images(folder: Path) -> None:
    out = io.BytesIO()
    np.save(out, np.ones(5, np.float32))
    rewrite(folder / "train-000001.tar", {}, {"f.image.npy": out.getvalue(), "f.txt": b"x", "f.json": b'{"label": 0}'})
    re_sum(folder)


def wrong_count(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 8', '"samples": 9', 1))


def old_sidecar(folder: Path) -> None:
    shutil.copy(folder / "train-000000.index.npz", folder / "train-000001.index.npz")


def broken_sidecar(folder: Path) -> None:
    (folder / "train-000001.index.npz").write_bytes(b"PK nonsense")


def lost_sidecar(folder: Path) -> None:
    (folder / "train-000001.index.npz").unlink()


def lost_shard(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def stray_shard(folder: Path) -> None:
    shutil.copy(folder / "train-000001.tar", folder / "train-000009.tar")


def unfinished(folder: Path) -> None:
    (folder / ".train-000001.tar.1.tmp").write_bytes(b"half")


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (cut, "train-000001.tar is truncated at byte 3000"),
        (flip, "train-000001.tar has another checksum"),
        (orphan, "orphan member lonely.txt: has no image"),
        (no_text, "has no text"),
        (corrupt_image, "the image does not decode"),
        (label_out_of_range, "label 7 is out of range, there are 2 classes"),
        (label_missing, "has 0 labels, expected one"),
        (same_image, "the same image across splits"),
        (same_key, "the same key across splits"),
        (features_among_images, "its image is features of size 5, the manifest says not features"),
        (wrong_count, "train-000000.tar has 8 samples, the manifest says 9"),
        (old_sidecar, "train-000001.index.npz does not agree"),
        (broken_sidecar, "train-000001.index.npz is not a shard index"),
        (lost_sidecar, "train-000001.index.npz is missing"),
        (lost_shard, "train-000001.tar is in the manifest but not in the folder"),
        (stray_shard, "train-000009.tar is in the folder but not in the manifest"),
        (unfinished, "is left from a run that did not end"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_finds_each_planted_fault(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], plant, expected: str
) -> None:
    built(raw, tmp_path / "out")
    plant(tmp_path / "out")
    capsys.readouterr()
    assert run("verify", tmp_path / "out", "--processes", 1) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert any(expected in line for line in problems), problems


def test_a_duplicate_within_a_split_is_a_warning(raw: Path, tmp_path: Path) -> None:
    shutil.copy(raw / "train/cat/train00.png", raw / "train/cat/train01.png")
    built(raw, tmp_path / "out")
    report = verify(tmp_path / "out", processes=1)
    assert report.problems == []
    assert len(report.warnings) == 1
    assert "the same image within a split: train/cat/train0" in report.warnings[0]


# ---------------------------------------------------------------------------------------------- index


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tarfile.open(path, "w").close()
    rewrite(path, {}, members)


def img2dataset(folder: Path, shards: int = 2, count: int = 4) -> Path:
    """What img2dataset leaves: numbered tars, and a parquet file and statistics beside each."""
    for s in range(shards):
        members = {}
        for i in range(count):
            key = f"{s:05d}{i:04d}"
            record = {"caption": TEXTS[i], "url": f"http://x/{key}", "key": key, "status": "success", "width": 24}
            members[f"{key}.jpg"] = picture(s * count + i, kind="JPEG")
            members[f"{key}.txt"] = TEXTS[i].encode()
            members[f"{key}.json"] = json.dumps(record, indent=4).encode()
        write_tar(folder / f"{s:05d}.tar", members)
        (folder / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{s:05d}_stats.json").write_text("{}")
    return folder


def test_index_reads_img2dataset_output(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion")
    run("index", folder, "--processes", 1)
    manifest = load_manifest(folder)
    assert (manifest.name, manifest.label_kind, manifest.classes) == ("laion", "none", [])
    assert [(s.name, s.samples) for s in manifest.splits["train"]] == [("00000.tar", 4), ("00001.tar", 4)]
    assert verify(folder, processes=1).problems == []
    assert samples(folder)["000010002"] == ([TEXTS[2]], ())


def test_index_takes_splits_from_names_and_folders(tmp_path: Path) -> None:
    def shard(name: str, number: int, label: int) -> None:
        record = json.dumps({"label": label}).encode()
        write_tar(tmp_path / name, {f"{number}.png": picture(number), f"{number}.txt": b"x", f"{number}.json": record})

    for number, name in enumerate(["train-0.tar", "part/b.tar", "validation_00.tar", "test/0.tar", "testament.tar"]):
        shard(name, number, number % 3)
    run("index", tmp_path, "--processes", 1)
    manifest = load_manifest(tmp_path)
    assert {split: [s.name for s in shards] for split, shards in manifest.splits.items()} == {
        "train": ["part/b.tar", "testament.tar", "train-0.tar"],
        "val": ["validation_00.tar"],
        "test": ["test/0.tar"],
    }
    assert (manifest.label_kind, manifest.classes) == ("single", ["0", "1", "2"])
    assert (tmp_path / "test/0.index.npz").exists()
    assert verify(tmp_path, processes=1).problems == []

    (tmp_path / "names.txt").write_text("Katze\nHund\nMaus\n")
    run("index", tmp_path, "--classes", tmp_path / "names.txt", "--overwrite", "--processes", 1)
    assert load_manifest(tmp_path).classes == ["Katze", "Hund", "Maus"]
    run("index", tmp_path, "--overwrite", "--processes", 1)
    assert load_manifest(tmp_path).classes == ["Katze", "Hund", "Maus"]  # kept, not counted anew
    (tmp_path / "names.txt").write_text("Katze\nHund\n")
    with pytest.raises(BadInput, match="label 2 is out of range: there are 2 classes"):
        run("index", tmp_path, "--classes", tmp_path / "names.txt", "--overwrite", "--processes", 1)


def test_index_sees_several_labels_and_refuses_some_without(tmp_path: Path) -> None:
    def members(labels: list[dict[str, object]]) -> dict[str, bytes]:
        found = {}
        for i, record in enumerate(labels):
            found |= {f"{i}.png": picture(i), f"{i}.txt": b"x", f"{i}.json": json.dumps(record).encode()}
        return found

    write_tar(tmp_path / "multi/0.tar", members([{"labels": [2, 0]}, {"labels": [1]}, {"labels": []}]))
    run("index", tmp_path / "multi", "--processes", 1)
    manifest = load_manifest(tmp_path / "multi")
    assert (manifest.label_kind, len(manifest.classes)) == ("multi", 3)
    index = ShardIndex.from_bytes((tmp_path / "multi/0.index.npz").read_bytes(), "0")
    assert [index.labels(i) for i in range(3)] == [(0, 2), (1,), ()]

    write_tar(tmp_path / "some/0.tar", members([{"label": 0}, {}]))
    with pytest.raises(BadInput, match="1 of 2 samples have no label"):
        run("index", tmp_path / "some", "--processes", 1)


def test_index_leaves_damaged_shards_out_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = img2dataset(tmp_path / "d", shards=3)
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[:2000])
    with pytest.raises(BadInput, match=r"00001\.tar is truncated at byte 2000"):
        run("index", folder, "--processes", 1)
    assert not (folder / "manifest.json").exists()
    run("index", folder, "--skip-bad", "--processes", 1)
    assert [s.name for s in load_manifest(folder).splits["train"]] == ["00000.tar", "00002.tar"]
    assert "left out 00001.tar" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- stats


def test_stats_prints_the_counts_and_draws_a_grid(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "train/cat/train00.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    built(raw, tmp_path / "out", "--attribution", "by us, CC0")
    capsys.readouterr()
    run("stats", tmp_path / "out", "--processes", 1, "--rows", 2, "--columns", 3)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["train", "40", "5", "0.2"] in rows
    assert ["cat", "20", "3", "3", "26"] in rows
    assert ["captions an image", "1 / 1 / 5", "1 / 1 / 1", "1 / 1 / 1"] in rows
    assert ["image width", "24 / 24 / 24", "24 / 24 / 24", "24 / 24 / 24"] in rows
    with Image.open(tmp_path / "out/stats.png") as image:
        assert image.size[0] > image.size[1] > 300
        assert np.asarray(image.convert("L")).std() > 10


def test_grid_fonts_cover_what_they_can_and_name_the_rest() -> None:
    families, missing = fonts_for("Käfer дом 𒀀")
    assert families[0] == "DejaVu Sans"
    assert missing == ["𒀀"] or len(families) > 1
    assert not {"ä", "д"} & set(missing)


# ---------------------------------------------------------------------------------------------- command line


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence with which a command ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(*args))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "name a command: build, verify, stats, index, features"),
        (["pack"], "unknown command 'pack'"),
        (["build"], "name a source: openmoji"),
        (["build", "imagenet"], "unknown source 'imagenet'"),
        (["build", "openmoji"], "--output"),
        (["build", "folder", "nowhere", "--output", "o", "--shuffle"], "--shuffle"),
        (["build", "folder", "nowhere", "--output", "o", "--shard-samples", "many"], "--shard-samples"),
        (["build", "folder", "nowhere", "--output", "o"], "nowhere does not exist"),
        (["build", "folder", "nowhere", "--output", "o", "--shard-samples", "0"], "must be positive"),
        (["build", "flickr8k", "--input", "nowhere", "--output", "o"], "captions.tsv does not exist"),
        (["build", "wikipedia", "--input", "nowhere", "--output", "o"], "categories.list does not exist"),
        (["build", "table", "nowhere.csv", "--output", "o"], "table nowhere.csv does not exist"),
        (["build", "table", "nowhere.xlsx", "--output", "o"], "not a table that can be read"),
        (["verify", "nowhere"], "data folder nowhere does not exist"),
        (["stats", "nowhere"], "data folder nowhere does not exist"),
        (["index", "nowhere"], "folder nowhere does not exist"),
        (["verify"], "required"),
    ],
)
def test_wrong_arguments_end_as_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_end_as_one_sentence(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error() -> str:
        return error_of(capsys, "build", "folder", raw, "--output", tmp_path / "out", "--processes", 1)

    image, text = raw / "train/cat/train05.png", raw / "train/cat/train05.txt"
    good = image.read_bytes()
    image.write_bytes(good[:-30])
    assert "train05.png: the image does not decode" in error()
    image.write_bytes(b"")
    assert "train05.png: the image does not decode" in error()
    image.write_bytes(picture(1, kind="GIF"))
    assert "train05.png: the image is GIF: expected JPEG, PNG or WebP" in error()
    image.unlink()
    assert "train05.txt has no image of the same name" in error()
    image.write_bytes(good)
    text.write_text("")
    assert "train05.png: the text is empty" in error()
    text.unlink()
    assert "train05.txt cannot be read (No such file or directory)" in error()
    text.write_bytes(b"caf\xe9")
    assert "train05.png: the text is not UTF-8" in error()
    text.write_text("fine")
    shutil.copy(image, raw / "train/cat/train05.jpg")
    assert "has the same key 'train/cat/train05' as" in error()
    (raw / "train/cat/train05.jpg").unlink()
    shutil.rmtree(raw / "test/cat")
    shutil.rmtree(raw / "test/dog")
    assert not (tmp_path / "out/manifest.json").exists()
    assert list((tmp_path / "out").glob("*.tmp")) == []


def test_splits_without_samples_end_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "raw", ["only"])
    build = ("build", "folder", tmp_path / "raw", "--output", tmp_path / "out", "--processes", 1)
    assert "has no samples" in error_of(capsys, *build)
    assert "must be shares" in error_of(capsys, *build, "--val", 0.6, "--test", 0.6)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in error_of(capsys, "build", "folder", tmp_path / "empty", "--output", tmp_path / "out")
    (tmp_path / "raw/class").mkdir()
    shutil.copy(tmp_path / "raw/only.png", tmp_path / "raw/class/b.png")
    assert "stands beside the class folder 'class'" in error_of(capsys, *build)
    (tmp_path / "file").write_text("")
    build = ("build", "folder", fill(tmp_path / "good", list("abcdef")), "--output", tmp_path / "file", "--val", 0)
    assert "cannot write into the output folder" in error_of(capsys, *build, "--test", 0, "--processes", 1)


def test_wrong_tables_end_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table_rows(tmp_path)
    table = tmp_path / "t.csv"

    def error(change: int, **cells: str) -> str:
        changed = [{**row, **cells} if i == change else row for i, row in enumerate(rows)]
        write_table(table, changed)
        return error_of(capsys, "build", "table", table, "--output", tmp_path / "out", "--processes", 1)

    assert "row 4 of t.csv: " in (message := error(2, filepath="img/lost.png"))
    assert "img/lost.png cannot be read (No such file" in message
    assert "row 4 of" in (message := error(2, caption="  "))
    assert "has no text in column 'caption'" in message
    assert "row 4 of" in (message := error(2, label=""))
    assert "has no label" in message
    assert "has no split in column 'split'" in error(2, split="")
    assert "may hold only letters" in error(2, split="../up")
    assert "has no image path" in error(2, filepath="")
    assert "row 12 of" in (message := error(10, label="a"))
    assert "has another label or split than row 2" in message
    table.write_bytes("filepath,caption\nimg/0.png,caf\xe9\n".encode("latin-1"))
    build = ("build", "table", table, "--output", tmp_path / "out")
    assert "t.csv is not UTF-8" in error_of(capsys, *build)
    table.write_text("filepath,words\nimg/0.png,x\n")
    assert "name it with --text-column" in error_of(capsys, *build)
    assert "has no column 'nope'" in error_of(capsys, *build, "--text-column", "nope")
    table.write_text("filepath,caption\n")
    assert "has no rows" in error_of(capsys, *build)
    (tmp_path / "t.jsonl").write_text('{"image": "img/0.png", "text": "x"}\n{"image": ')
    assert "row 2 of" in error_of(capsys, "build", "table", tmp_path / "t.jsonl", "--output", tmp_path / "out")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert "Parquet" in error_of(capsys, "build", "table", tmp_path / "t.parquet", "--output", tmp_path / "out")


def test_wrong_tars_and_manifests_end_as_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    assert "holds no .tar files" in error_of(capsys, "index", tmp_path / "none")
    assert "has no manifest.json" in error_of(capsys, "verify", tmp_path / "none")
    write_tar(tmp_path / "empty/0.tar", {})
    assert "0.tar has no samples" in error_of(capsys, "index", tmp_path / "empty", "--processes", 1)
    write_tar(tmp_path / "bad/0.tar", {"a.txt": b"x"})
    assert "no sample in" in error_of(capsys, "index", tmp_path / "bad", "--processes", 1)
    folder = img2dataset(tmp_path / "good")
    run("index", folder, "--processes", 1)
    assert "exists already" in error_of(capsys, "index", folder, "--processes", 1)
    assert "--processes is 0" in error_of(capsys, "verify", folder, "--processes", 0)
    cut_tar = folder / "00001.tar"
    cut_tar.write_bytes(cut_tar.read_bytes()[:1000])
    assert "00001.tar is truncated" in error_of(capsys, "stats", folder, "--processes", 1)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json is not a manifest" in error_of(capsys, "stats", folder)


@pytest.mark.process
def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shards", *args], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )

    wrong = command("verify", str(tmp_path / "nowhere"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: data folder")
    assert wrong.stderr.count("\n") == 1
    usage = command("--help")
    assert usage.returncode == 0
    for name in [*SOURCES, *COMMANDS]:
        assert name in usage.stdout


@pytest.mark.parametrize(
    "args", [["build", name] for name in SOURCES] + [[name] for name in COMMANDS if name != "features"]
)
def test_every_command_explains_its_flags(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--help"])
    assert not stop.value.code
    assert "--processes" in capsys.readouterr().out
