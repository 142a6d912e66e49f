"""Names of classes in tables of Hugging Face's datasets, columns of JSON, and columns that are declined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from shards.sources.class_names import check_classes
from tests.toy import picture, run_shards, write_members


def parquet(path: Path, first: int, labels: Any, names: list[str] | None = None) -> Path:
    """A Parquet file of pictures, texts and labels, with `names` as ``datasets`` writes those of a ClassLabel."""
    path.parent.mkdir(exist_ok=True)
    numbers = range(first, first + len(labels))
    table = pyarrow.table({"image": list(map(picture, numbers)), "text": list(map(str, numbers)), "label": labels})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)
    return path


def build(data: Path, output: Path, *words: str) -> list[list[str]]:
    """Return the names of each sample's classes, in the order of their texts."""
    run_shards("build", "table", data, "--output", output, "--processes", 1, "--val", 0, "--test", 0, *words)
    manifest = load_manifest(output)
    found = sorted((sample.texts[0], sample.labels) for sample in ShardReader(str(output), "train"))
    return [[manifest.classes[i] for i in labels] for _, labels in found]


def test_a_named_class_is_taken_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["cat|dog", '["a", "b"]', "[0 2]"]
    table = parquet(tmp_path / "in" / "0.parquet", 0, [0, 1, 2], names)
    assert build(table, tmp_path / "out") == [[name] for name in names]
    assert load_manifest(tmp_path / "out").label_kind == "single"
    assert '3 classes: ["a", "b"], [0 2], cat|dog' in " ".join(capsys.readouterr().out.split())


def test_names_in_one_table_and_numbers_in_another_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "a.parquet", 0, [0, 1], ["cat", "dog"])
    parquet(tmp_path / "in" / "b.parquet", 2, [1, 0])
    with pytest.raises(BadInput, match=r"names of classes in .*a\.parquet and numbers alone in .*b\.parquet: write"):
        build(tmp_path / "in", tmp_path / "out")
    assert build(tmp_path / "in", tmp_path / "out", "--label-column", "") == [[], [], [], []]
    parquet(tmp_path / "in" / "b.parquet", 2, [1, 0], ["dog", "cat"])
    assert build(tmp_path / "in", tmp_path / "new") == [["cat"], ["dog"], ["cat"], ["dog"]]


def test_columns_of_json_are_decoded(tmp_path: Path) -> None:
    labels = pyarrow.array(['"x"', '["x", "y"]'], pyarrow.json_())
    assert build(parquet(tmp_path / "in" / "0.parquet", 0, labels), tmp_path / "out") == [["x"], ["x", "y"]]
    labels = pyarrow.array(['"x"', '["x", '], pyarrow.json_())
    with pytest.raises(BadInput, match=r"row 2 of 0\.parquet: has a value that is not JSON"):
        build(parquet(tmp_path / "in" / "0.parquet", 0, labels), tmp_path / "new")


def test_a_column_is_declined(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "t.csv").write_text("image,text,label,split\n0.png,a,,\n")
    words: list[str] = []
    for role in ("label", "split"):
        with pytest.raises(BadInput, match=rf"column '{role}', or --{role}-column '' to do without"):
            build(tmp_path / "t.csv", tmp_path / "out", *words)
        words += [f"--{role}-column", ""]
    assert build(tmp_path / "t.csv", tmp_path / "out", *words) == [[]]


def test_words_for_what_is_missing_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{i}.png", "text": text} for i, text in enumerate(("nan", "None", "N/A", "a nan bread", "NULL"))]
    for i in range(len(rows)):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(tmp_path / "t.jsonl", tmp_path / "out")
    said = "texts that are nan, null or the like: 4; take such rows out if values are missing"
    assert said in " ".join(capsys.readouterr().out.split())
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(5)]
    notes = [{"image_id": i, "caption": row["text"]} for i, row in enumerate(rows)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    words = ("--images", tmp_path, "--val", 0, "--test", 0, "--processes", 1)
    run_shards("build", "coco", tmp_path / "c.json", *words, "--output", tmp_path / "coco")
    assert said in " ".join(capsys.readouterr().out.split())
    (tmp_path / "f" / "nan").mkdir(parents=True)
    (tmp_path / "f" / "nan" / "a.png").write_bytes(picture(9))
    (tmp_path / "f" / "nan" / "a.txt").write_text("a")
    run_shards("build", "folder", tmp_path / "f", "--output", tmp_path / "folder", *words[2:])
    assert "classes nan: a missing value is often written so" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("mark", ["\ufe0f", "\u034f", "\u180b", "\u2800", "\u3164", "\u200b", "\u202e", "\U000e0101"])
def test_names_that_differ_by_what_nobody_sees_are_refused(mark: str) -> None:
    for other in (f"red{mark} cat", f"{mark}red cat"):
        with pytest.raises(BadInput, match="differ by characters that nobody sees: make them one") as said:
            check_classes("class", ["red cat", "dog", other])
        assert ascii(mark)[1:-1] in str(said.value)
    with pytest.raises(BadInput, match="has nothing that one sees: rename it"):
        check_classes("class", ["red cat", mark])


def test_names_that_differ_by_their_spaces_are_refused_and_joiners_and_flags_are_seen() -> None:
    for other in ("red\xa0cat", "red  cat"):
        with pytest.raises(BadInput, match="differ by characters that nobody sees"):
            check_classes("class", ["red cat", other])
    england, scotland = ("\U0001f3f4" + "".join(chr(0xE0000 + ord(c)) for c in each) for each in ("gbeng", "gbsct"))
    check_classes("class", [england, scotland, "\U0001f468\u200d\U0001f467", "\U0001f468\U0001f467", "dog", "DOG"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["1", "01"], "labels '01' and '1' are the same number: write it in one way"),
        (["b'cat'", "dog"], r"in sample 0 of .* the label b'cat' looks like bytes: write the name of the class alone"),
        (["dog", "np.str_('cat')"], r"in sample 1 of .* the label np.str_\('cat'\) looks like a Python value"),
        (["[1, 2]", "dog"], r"in sample 0 of .* the label \[1, 2\] is a list in a text"),
        (["{1, 2}", "dog"], r"in sample 0 of .* the label \{1, 2\} looks like a list"),
    ],
)
def test_names_in_tars_are_those_that_tables_take(labels: list[str], said: str, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.png": picture(i), f"{i}.txt": b"a", f"{i}.json": json.dumps({"label": label}).encode()}
    write_members(tmp_path / "train.tar", members)
    with pytest.raises(BadInput, match=said):
        run_shards("index", tmp_path, "--processes", 1)
    for i, label in enumerate(("1.0", "0")):
        members |= {f"{i}.json": json.dumps({"label": label}).encode()}
    write_members(tmp_path / "train.tar", members)
    run_shards("index", tmp_path, "--processes", 1)
    assert load_manifest(tmp_path).classes == ["0", "1"]
    assert [sample.labels for sample in ShardReader(str(tmp_path), "train")] == [(1,), (0,)]
