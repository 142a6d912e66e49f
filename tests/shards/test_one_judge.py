"""Index, verify and training find the same samples bad, and what their sentences advise leads out."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmgan_dist.data.batch import SampleDecoder
from cmgan_dist.data.index import ShardIndex
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import Manifest, ShardInfo, load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.errors import BadInput, BadSample, run_main
from shards.extract import Options, _load
from shards.shard_file import try_sample, write_shard
from shards.stats import describe_missing
from shards.verify import verify
from tests.toy import run_shards, write_tar


def photo(seed: int, size: tuple[int, int] = (96, 64), kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def pairs(split: str, count: int = 6, **record: Any) -> list[tuple[str, bytes]]:
    members = []
    for i in range(count):
        seed = 100 * len(split) + i
        fields = record or {"label": i % 2}
        members += [(f"{split}{i}.jpg", photo(seed)), (f"{split}{i}.txt", b"a dog")]
        members.append((f"{split}{i}.json", json.dumps(fields).encode()))
    return members


def bad_in_training(folder: Path) -> list[str]:
    """Why samples of the training split are replaced."""
    reader = ShardReader(str(folder), "train")
    decoder, bad = SampleDecoder.of(reader.manifest, 32, augment=True), []
    image, labels = decoder.empty(1)
    for shard, info in enumerate(reader.shards):
        for i in range(info.samples):
            try:
                decoder(reader.read(shard, i), info.name, 7, image[0], labels[0])
            except BadSample as error:
                bad.append(str(error))
    return bad


def bad_in_features(folder: Path) -> list[str]:
    """Why samples of the training split get no features."""
    options, judge, bad = (
        Options(("x", "", 32), None, 1, "float32", "cpu", 1, True),
        Judge.of(load_manifest(folder)),
        [],
    )
    for shard in load_manifest(folder).splits["train"]:
        with open(folder / shard.name, "rb") as file:
            for group in iter_groups(file, shard.name):
                try_sample(partial(_load, options, judge, group), f"{shard.name} sample {group[0].key}", True, bad)
    return bad


SPOILED = {
    "half": photo(1, (300, 200))[:9000] + b"\xff\xd9",
    "png": photo(2, kind="PNG")[:300] + bytes(100) + photo(2, kind="PNG")[400:],
    "webp": photo(3, kind="WEBP")[:-40],
    "gif": photo(4, kind="GIF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "empty": b"",
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_bad_picture_is_found_by_all(tmp_path: Path, spoiled: str, capsys: pytest.CaptureFixture[str]) -> None:
    members = pairs("train")
    members[9] = ("train3.jpg", SPOILED[spoiled])
    write_tar(tmp_path / "train-0.tar", members)
    run_shards("index", tmp_path, "--processes", 1)
    assert "1 of 6 samples cannot be used (the first: train3, the image does not decode" in capsys.readouterr().out
    problems = verify(tmp_path, processes=1).problems
    assert len(problems) == 1
    assert "train3.jpg" in problems[0]
    bad = bad_in_training(tmp_path)
    assert len(bad) == 1
    assert bad[0].startswith("train-0.tar sample train3: the image does not decode")
    assert bad_in_features(tmp_path) == bad


LABELS: dict[str, Any] = {"none": {}, "empty": {"labels": []}, "several": {"labels": [0, 1]}, "word": {"label": "dog"}}


@pytest.mark.parametrize("odd", LABELS)
@pytest.mark.parametrize("kind", [None, "single", "multi"])
def test_what_index_advises_about_labels_leads_out(tmp_path: Path, odd: str, kind: str | None) -> None:
    members = pairs("train")
    members[5] = ("train1.json", json.dumps(LABELS[odd]).encode())
    write_tar(tmp_path / "train-0.tar", members)
    words = ["index", tmp_path, "--processes", 1, "--overwrite", *(["--label-kind", kind] if kind else [])]
    refused = ""
    try:
        run_shards(*words)
    except BadInput as error:
        refused = str(error)
    if refused:
        advice = "multi" if "--label-kind multi" in refused else "none"
        assert f"--label-kind {advice}" in refused
        run_shards("index", tmp_path, "--processes", 1, "--label-kind", advice)
    bad = bad_in_training(tmp_path)
    assert len(bad) == len(verify(tmp_path, processes=1).problems) == (odd == "word")
    assert all("train1" in line for line in bad)


def test_labels_that_are_words_are_classes_and_left_out_when_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", pairs("train", label="dog"))
    run_shards("index", tmp_path, "--processes", 1)
    assert load_manifest(tmp_path).classes == ["dog"]
    run_shards("index", tmp_path, "--processes", 1, "--label-kind", "none", "--overwrite")
    assert bad_in_training(tmp_path) == verify(tmp_path, processes=1).problems == []


def test_a_label_beyond_all_classes_does_not_make_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", pairs("train", label=2**31 - 1))
    with pytest.raises(BadInput, match="label 2147483647 is out of range"):
        run_shards("index", tmp_path, "--processes", 1)


def test_foreign_files_and_repeated_members_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [each for name, data in pairs("train") for each in ((f"._{name}", b"?"), (name, data))]
    members.insert(4, ("train0.jpg", photo(77)))
    write_tar(tmp_path / "train-0.tar", members)
    run_shards("index", tmp_path, "--processes", 1)
    said = capsys.readouterr().out
    assert "18 files in train-0.tar belong to no sample, the first is ._train0.jpg" in said
    assert "1 of 6 samples cannot be used (the first: train0, has train0.jpg twice" in said
    report = verify(tmp_path, processes=1)
    assert [("train0.jpg twice" in line) for line in report.problems] == [True]
    assert report.warnings == ["18 files in train-0.tar belong to no sample, the first is ._train0.jpg"]


def test_control_characters_of_keys_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "x: 72 samples in 3 shards, 0 problems, 0 warnings\n\x1b[2J"
    odd = os.fsdecode(b"k\xff")
    write_tar(tmp_path / "train-0.tar", [*pairs("train"), (f"{forged}.jpg", b"?"), (f"{forged}.txt", b"a")])
    write_tar(tmp_path / "val-0.tar", [*pairs("val"), (f"{odd}.jpg", b"!"), (f"{odd}.txt", b"a")])
    run_shards("index", tmp_path, "--processes", 1, "--label-kind", "none")
    assert run_shards("verify", tmp_path, "--processes", 1) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[-1].endswith("2 problems, 1 warnings")  # an equal text
    assert r"k\udcff" in out
    assert all(line.isprintable() for line in bad_in_training(tmp_path))
    with pytest.raises(SystemExit):
        run_main(lambda: _raise(BadInput(f"{forged} is wrong")))
    assert capsys.readouterr().err.count("\n") == 1


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", ["a\nb.tar", os.fsdecode(b"a\xff.tar")])
def test_tars_whose_names_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / name, pairs("train"))
    with pytest.raises(BadInput, match="is not UTF-8 or holds control characters: rename it"):
        run_shards("index", tmp_path, "--processes", 1)


def test_class_names_that_cannot_be_shown_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", pairs("train"))
    (tmp_path / "names").write_bytes(b"cat\n\x1b[31mdog\n")
    with pytest.raises(BadInput, match="control characters"):
        run_shards("index", tmp_path, "--processes", 1, "--classes", tmp_path / "names")


def test_verify_finds_strays_where_index_finds_shards(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "train-0.tar", pairs("train"))
    run_shards("index", data, "--processes", 1)
    for folder in (data / ".hidden", tmp_path / "elsewhere"):
        folder.mkdir()
        write_tar(folder / "val-0.tar", pairs("val"))
    assert verify(data, processes=1).problems == []
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    assert verify(data, processes=1).problems == ["linked/val-0.tar is in the folder but not in the manifest"]


def test_a_sidecar_that_changed_is_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", pairs("train"))
    run_shards("index", tmp_path, "--processes", 1)
    path = tmp_path / "train-0.index.npz"
    index = ShardIndex.from_bytes(path.read_bytes(), "x")
    path.write_bytes(replace(index, label_values=index.label_values[::-1].copy()).to_bytes())
    assert any("train-0.index.npz" in line for line in verify(tmp_path, processes=1).problems)
    with pytest.raises(BadInput, match=r"train-0\.index\.npz has another checksum .*index --overwrite"):
        ShardReader(str(tmp_path), "train").read(0, 0)
    run_shards("index", tmp_path, "--processes", 1, "--overwrite")
    assert verify(tmp_path, processes=1).problems == []


@pytest.mark.parametrize("name", ["../a.tar", "/tmp/a.tar", "a/../../b.tar", "", "a\nb.tar", "\ud800.tar"])
def test_no_shard_lies_outside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no name for a shard"):
        ShardInfo(name, 1, 1, "0" * 64)
    with pytest.raises(BadInput, match="no name for a shard"):
        write_shard(tmp_path, name, [("a", [("txt", b"x")])])
    good = Manifest("toy", "none", [], {"train": [ShardInfo("a.tar", 1, 1, "0" * 64)]}).to_json()
    (tmp_path / "manifest.json").write_text(good.replace('"a.tar"', json.dumps(name)))
    with pytest.raises(BadInput, match=r"manifest\.json is not a manifest .*no name for a shard"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a\x1b[2J"]},
        {"classes": ["\ud800"]},
        {"classes": [1]},
        {"classes": "ab"},
        {"name": "a\nb"},
        {"image_dim": 3},
        {"image": "features"},
        {"label_kind": "many"},
        {"splits": {"train\n": []}},
        {"splits": {"train": [["a.tar", 1, 1, "0"]]}},
        {"splits": {"train": [{"name": "a.tar", "samples": -1, "bytes": 1, "sha256": "0"}]}},
        {"splits": {"train": [{"name": "a.tar", "samples": 1, "bytes": 1, "sha256": "0"}] * 2}},
    ],
)
def test_a_manifest_of_foreign_hands_is_checked(tmp_path: Path, change: dict[str, Any]) -> None:
    record = json.loads(Manifest("toy", "none", [], {"train": []}).to_json()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=r"manifest\.json is not a manifest") as error:
        load_manifest(tmp_path)
    assert str(error.value).isprintable()


def test_a_manifest_without_bound_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(800 << 20)
    with pytest.raises(BadInput, match=r"manifest\.json has more than 64 MiB: restore it, or remove it"):
        load_manifest(tmp_path)


def test_the_font_that_is_missing_is_named() -> None:
    line = describe_missing(list("漢字") + [chr(0x4E00 + i) for i in range(400)])
    assert "402 characters" in line
    assert "install Noto Sans CJK" in line
    assert len(line) < 150
