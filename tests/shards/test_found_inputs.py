"""Inputs that are ambiguous, or that no file system takes: each is one sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmgan_dist.config.safe_yaml import parse_yaml
from cmgan_dist.errors import BadInput, BadSample
from shards.pairs import FileBytes
from tests.toy import build_folder, fill_folder, run_shards

SPLITS = [f"{split}/{name}{i}" for split in ("train", "val", "test") for name in ("a", "b") for i in range(3)]

WHOLE = ("--val", "0", "--test", "0")


def test_a_folder_beside_those_of_splits_is_named(tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", [name.replace("/a", "/a/x").replace("/b", "/b/x") for name in SPLITS])
    (raw / "__MACOSX").mkdir()
    manifest = build_folder(raw, tmp_path / "out")
    assert (manifest.classes, manifest.samples("train"), manifest.samples("test")) == (["a", "b"], 6, 6)
    (raw / "unused").mkdir()
    with pytest.raises(BadInput, match=r"unused stands beside the split folders test, train, val: move it away"):
        build_folder(raw, tmp_path / "other")


def test_a_key_that_stands_twice_is_named() -> None:
    with pytest.raises(BadInput, match=r"^c.yaml has 'lr' twice in one place: keep one of them$"):
        parse_yaml("optim:\n  lr: 1\n  b: [1, {x: 2}]\n  lr: 2\n", "c.yaml")
    assert parse_yaml("a: {lr: 1}\nb: {lr: 2}\n", "c.yaml") == {"a": {"lr": 1}, "b": {"lr": 2}}


@pytest.mark.parametrize("name", ["a\0b.png", ".", "\ud800.png"])
def test_a_name_that_no_file_has_is_a_sentence(name: str, tmp_path: Path) -> None:
    record = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    (tmp_path / "captions.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=r"image 0 has the file_name .* which no file has"):
        run_shards("build", "coco", tmp_path / "captions.json", "--images", tmp_path, "--output", tmp_path / "out")
    if name != ".":
        with pytest.raises(BadSample, match="no file has such a name"):
            FileBytes(name).size()


@pytest.mark.parametrize(
    "folders", [("train", "eval"), ("train2017", "test2017"), ("train", "test_images"), ("my-train", "my-test")]
)
def test_folders_with_words_for_splits_are_splits(folders: tuple[str, str], tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", [f"{folder}/{c}/0" for folder in folders for c in ("cat", "dog")])
    manifest = build_folder(raw, tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 2, "test": 2}
    assert manifest.classes == ["cat", "dog"]


def test_a_folder_without_such_a_word_beside_one_is_refused_or_all_are_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = fill_folder(tmp_path / "raw", ["Training/0", "holdout/0", "test tube/0"])
    with pytest.raises(BadInput, match=r"holdout stands beside the split folders .*: move .* or pass --no-split-fold"):
        build_folder(raw, tmp_path / "out")
    assert build_folder(raw, tmp_path / "out", "--no-split-folders", *WHOLE).classes == [
        "Training",
        "holdout",
        "test tube",
    ]
    assert "are the labels, 3 classes: Training, holdout, test tube" in " ".join(capsys.readouterr().out.split())
    alone = fill_folder(tmp_path / "alone", ["test tube/0", "beaker/0"])
    assert build_folder(alone, tmp_path / "glass", *WHOLE).classes == ["beaker", "test tube"]


def test_class_folders_without_a_picture_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*names: str, empty: tuple[str, ...] = (), other: tuple[str, ...] = ()) -> str:
        raw = fill_folder(tmp_path / f"raw{len(list(tmp_path.iterdir()))}", list(names))
        for name in [*empty, *(str(Path(name).parent) for name in other)]:
            (raw / name).mkdir(parents=True, exist_ok=True)
        for name in other:
            (raw / name).write_bytes(b"")
        capsys.readouterr()
        build_folder(raw, raw / "out", *(WHOLE if not names[0].startswith("train") else ()))
        return capsys.readouterr().out

    assert "class folders without a picture: dog, owl\n" in said("cat/0", empty=("owl",), other=("dog/0.heic",))
    lost = tuple(f"dog{i}" for i in range(9))
    assert "picture: dog0, dog1, dog2, dog3, dog4, dog5, dog6, dog7 and 1 more\n" in said("cat/0", empty=lost)
    everywhere = said(
        "train/cat/0", "train/dog/0", "val/cat/0", empty=("val/dog", "val/owl"), other=("train/owl/0.heic",)
    )
    assert "class folders without a picture: owl\n" in everywhere
    assert "\nfolders without a picture: dog\n" in said("0", other=("dog/0.heic",))
    assert "without a picture" not in said("train/cat/0", "val/dog/0", empty=("val/cat", "train/.git", "__MACOSX"))


def test_numbered_parts_of_img2dataset_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{part}/{part}000{i}" for part in ("00000", "00001") for i in range(2)]
    raw = fill_folder(tmp_path / "raw", names)
    assert build_folder(raw, tmp_path / "out", *WHOLE).classes == ["00000", "00001"]
    for name in names:
        (raw / f"{name}.json").write_text("{}")
    assert build_folder(raw, tmp_path / "new", *WHOLE).label_kind == "none"
    assert "numbered parts that img2dataset wrote, no classes: no labels" in " ".join(capsys.readouterr().out.split())
