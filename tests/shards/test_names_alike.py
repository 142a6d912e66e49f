"""Names and paths that are written in two ways and mean one thing are one thing: classes, keys and pictures."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from cmgan_dist.data.differences import other_class
from cmgan_dist.data.folder import composed
from cmgan_dist.data.manifest import Manifest, load_manifest
from cmgan_dist.errors import BadInput
from shards.sources.files import plain_path
from tests.toy import fill_folder, picture, run_shards, samples_of, write_table

ALL_TRAIN = ["--val", "0", "--test", "0", "--processes", "1"]
COMPOSED = "K\u00e4fer"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def built(folder: Path, rows: list[dict[str, str]]) -> dict[str, tuple[object, tuple[int, ...]]]:
    table = write_table(folder / "t.jsonl", rows)
    run_shards("build", "table", table, *ALL_TRAIN, "--output", folder / "o")
    return samples_of(folder / "o")


def test_a_class_in_two_unicode_forms_is_one(tmp_path: Path) -> None:
    fill_folder(tmp_path, ["0", "1"])
    names = (COMPOSED, DECOMPOSED)
    built(tmp_path, [{"image": f"{i}.png", "text": f"t {i}", "label": name} for i, name in enumerate(names)])
    assert load_manifest(tmp_path / "o").classes == [COMPOSED]


def test_class_folders_in_two_unicode_forms_are_one(tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", [f"train/{DECOMPOSED}/0", f"val/{COMPOSED}/1"])
    run_shards("build", "folder", raw, "--processes", "1", "--output", tmp_path / "o")
    assert load_manifest(tmp_path / "o").classes == [COMPOSED]
    assert list(samples_of(tmp_path / "o")) == [f"train/{COMPOSED}/0"]


@pytest.mark.parametrize("other", ["c\u202eat", "\ufeffcat", "cat\u200b"])
def test_classes_that_differ_by_what_nobody_sees_are_refused(tmp_path: Path, other: str) -> None:
    fill_folder(tmp_path, ["0", "1"])
    rows = [{"image": f"{i}.png", "text": f"t {i}", "label": name} for i, name in enumerate(("cat", other))]
    with pytest.raises(BadInput, match=r"\\u.* differ by characters that nobody sees: make them one"):
        built(tmp_path, rows)
    raw = fill_folder(tmp_path / "raw", ["cat/0", f"{other}/1"])
    with pytest.raises(BadInput, match="differ by characters that nobody sees"):
        run_shards("build", "folder", raw, *ALL_TRAIN, "--output", tmp_path / "p")
    (tmp_path / "raw" / other).rename(tmp_path / "raw" / "dog \u200d\u2764")
    run_shards("build", "folder", raw, *ALL_TRAIN, "--output", tmp_path / "q")


def test_keys_in_two_unicode_forms_are_refused(tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", [COMPOSED, DECOMPOSED])
    with pytest.raises(BadInput, match=r"has the same key .*: rename one of them"):
        run_shards("build", "folder", raw, *ALL_TRAIN, "--output", tmp_path / "o")
    next(raw.glob(f"{DECOMPOSED}.png")).rename(raw / "other.png")
    (raw / f"{DECOMPOSED}.txt").rename(raw / "other.txt")
    run_shards("build", "folder", raw, *ALL_TRAIN, "--output", tmp_path / "o")


def test_a_manifest_of_decomposed_names_reads_composed() -> None:
    record = json.loads(Manifest("m", "single", [DECOMPOSED, "b"], {}).to_json())
    assert Manifest.from_json(json.dumps(record), "m").classes == [COMPOSED, "b"]
    record["classes"] = [DECOMPOSED, COMPOSED]
    with pytest.raises(BadInput, match=f"it has class '{COMPOSED}' twice"):
        Manifest.from_json(json.dumps(record), "m")
    assert other_class([COMPOSED], [DECOMPOSED]) == ""
    assert composed(DECOMPOSED) == COMPOSED


@pytest.mark.parametrize("path", ["./2.png", "sub/../2.png", "sub//../2.png", "sub/./../2.png", "{top}/2.png"])
def test_a_picture_by_two_paths_is_one_sample(tmp_path: Path, path: str) -> None:
    fill_folder(tmp_path, ["2", "sub/1"])
    found = built(
        tmp_path,
        [{"image": "2.png", "text": "first"}, {"image": path.format(top=tmp_path), "text": "second"}],
    )
    assert {key: texts for key, (texts, _) in found.items()} == {"2": ["first", "second"]}


def test_a_link_is_another_place(tmp_path: Path) -> None:
    fill_folder(tmp_path, ["far/sub/1", "t/2"])
    (tmp_path / "t" / "sub").symlink_to("../far/sub")
    (tmp_path / "far" / "2.png").write_bytes(picture(9))
    assert plain_path(str(tmp_path / "t"), "sub/../2.png") == "sub/../2.png"
    assert plain_path(str(tmp_path / "t"), "../far/2.png") == "../far/2.png"


@pytest.mark.parametrize("number", [2.0**53, -(2.0**60), 1e300])
def test_a_label_that_a_float_cannot_tell_is_refused(tmp_path: Path, number: float) -> None:
    fill_folder(tmp_path, ["0"])
    with pytest.raises(BadInput, match=r"a float of 2 \*\* 53 or more.*write labels as whole numbers or texts"):
        built(tmp_path, [{"image": "0.png", "text": "t", "label": number}])  # type: ignore[dict-item]
    built(tmp_path, [{"image": "0.png", "text": "t", "label": 2**53 + 1}])  # type: ignore[dict-item]
    assert load_manifest(tmp_path / "o").classes == ["9007199254740993"]
