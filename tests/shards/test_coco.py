"""Annotation files in COCO's format: every caption arrives in its split, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from shards.__main__ import main
from shards.verify import verify
from tests.toy import picture


def coco(folder: Path, split: str, pictures: int, first: int = 0) -> Path:
    """Pictures and ``captions_SPLIT2017.json``, with 1 to 3 captions each, as the published files are."""
    (folder / f"{split}2017").mkdir(parents=True)
    images, annotations = [], []
    for i in range(first, first + pictures):
        name = f"{i:012d}.jpg"
        (folder / f"{split}2017" / name).write_bytes(picture(i))
        images.append({"id": 7 * i, "file_name": name, "license": 3, "height": 32, "width": 32})
        for j in range(1 + i % 3):
            annotations.append({"id": 10 * i + j, "image_id": 7 * i, "caption": f"caption {j} of {i}\n"})
    record = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations[::-1]}
    path = folder / f"captions_{split}2017.json"
    path.write_text(json.dumps(record))
    return path


def build(output: Path, *words: object) -> None:
    main(["build", "coco", *map(str, words), "--output", str(output), "--processes", "1"])


def test_published_splits_with_all_captions(tmp_path: Path) -> None:
    files = coco(tmp_path, "train", 20), coco(tmp_path, "val", 5, first=20)
    build(tmp_path / "out", *files, "--images", tmp_path)
    manifest = load_manifest(tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 20, "val": 5}
    assert manifest.label_kind == "none"
    for split in manifest.splits:
        for sample in ShardReader(str(tmp_path / "out"), split):
            number = int(sample.key.rpartition("/")[2])
            assert sorted(sample.texts) == [f"caption {j} of {number}" for j in range(1 + number % 3)]
            assert sample.image == picture(number)
    assert not verify(tmp_path / "out", processes=1).problems


def test_splits_are_words_of_the_names_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"retrieval_test": "test", "captions_dev": "val", "my-val": "val", "latest": "train", "interval": "train"}
    files = [
        coco(tmp_path / name, "x", 2, first=10 * i).rename(tmp_path / f"{name}.json") for i, name in enumerate(names)
    ]
    for i in range(len(names)):
        for path in (tmp_path / list(names)[i] / "x2017").iterdir():
            path.rename(tmp_path / path.name)
    build(tmp_path / "out", *files, "--images", tmp_path)
    manifest = load_manifest(tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 4, "val": 4, "test": 2}
    assert "the source names the splits train, val, test" in " ".join(capsys.readouterr().out.split())
    build(tmp_path / "val", *files[1:3], "--images", tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "captions_dev.json and 1 more" in said
    assert "there are val" in said
    assert "val, val" not in said


def test_a_file_of_no_split_is_split_by_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = coco(tmp_path, "train", 60).rename(tmp_path / "all.json")
    record = json.loads(path.read_text())
    record["images"].append({"id": 1, "file_name": "bare.jpg"})
    path.write_text(json.dumps(record))
    build(tmp_path / "out", path, "--images", tmp_path / "train2017", "--val", "0.2", "--test", "0.2")
    manifest = load_manifest(tmp_path / "out")
    assert set(manifest.splits) == {"train", "val", "test"}
    assert sum(manifest.samples(split) for split in manifest.splits) == 60
    assert "1 pictures have no caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("images"), "no list 'images'"),
        (lambda r: r["annotations"][0].pop("caption"), "has no caption"),
        (
            lambda r: r["annotations"][0].update(image_id=5),
            "is of image 5, which is not in it: add that image, or remove",
        ),
        (lambda r: r["images"][1].update(file_name=r["images"][0]["file_name"]), "stands twice"),
        (lambda r: r["images"][1].pop("id"), "has no id"),
        (lambda r: r["images"][1].update(id=[1]), r"image 1 has the id \[1\]: write ids"),
        (lambda r: r["images"][1].update(id=7.0), r"image 1 has the id 7\.0: write ids .* as whole numbers or texts"),
        (lambda r: r["images"][1].update(id=True), "image 1 has the id true: write ids"),
        (lambda r: r["annotations"][0].update(image_id={}), "annotation 0 has the image_id {}: write ids"),
        (lambda r: r["annotations"][0].update(image_id=0.0), r"annotation 0 has the image_id 0\.0: write ids"),
        (lambda r: r["annotations"][0].update(image_id=False), "annotation 0 has the image_id false: write ids"),
        (lambda r: r["annotations"][0].pop("image_id"), "annotation 0 has no image_id: mend or remove it"),
        (lambda r: r.update(annotations=[]), "no captioned picture"),
        (lambda r: [image.update(file_name="gone/" + image["file_name"]) for image in r["images"]], "is not in"),
    ],
)
def test_what_is_wrong_is_named(change: Any, said: str, tmp_path: Path) -> None:
    path = coco(tmp_path, "train", 4)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(BadInput, match=said):
        build(tmp_path / "out", path, "--images", tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_what_is_no_annotation_file_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "captions_train.json").write_text(text)
    with pytest.raises(BadInput, match=r"captions_train\.json"):
        build(tmp_path / "out", tmp_path / "captions_train.json", "--images", tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        build(tmp_path / "out", tmp_path / "none.json", "--images", tmp_path)


def test_a_file_of_no_split_beside_one_of_val_is_train(tmp_path: Path) -> None:
    files = coco(tmp_path, "val", 5), coco(tmp_path, "extra", 40, first=5)
    build(tmp_path / "out", *files, "--images", tmp_path, "--test", "0.3")
    assert {"train", "val", "test"} == set(load_manifest(tmp_path / "out").splits)
    with pytest.raises(BadInput, match=r"of the split 'train', and there is none, only val: name the one"):
        build(tmp_path / "other", files[0], "--images", tmp_path, "--test", "0.3")
