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
from tests.toy import picture, run_shards


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
