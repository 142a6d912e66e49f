"""Folders that Hugging Face's datasets write, picture folders with metadata, and text tables of other forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput
from shards.__main__ import main
from tests.toy import picture

WRITE = """
import io, sys
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

def part(first, count):
    pictures = [Pillow.new("RGB", (24, 24), (i * 9 % 255, i * 5 % 255, i)) for i in range(first, first + count)]
    columns = {"image": pictures, "caption": [f"text {i}" for i in range(first, first + count)]}
    columns["label"] = [i % 2 for i in range(first, first + count)]
    names = ClassLabel(names=["cat", "dog"])
    return Dataset.from_dict(columns, features=Features({"image": Image(), "caption": Value("string"), "label": names}))

made = DatasetDict({"train": part(0, 20), "validation": part(20, 5)})
made.save_to_disk(sys.argv[1] + "/disk")
for split, rows in made.items():
    rows.to_parquet(f"{sys.argv[1]}/hub/data/{split}-00000-of-00001.parquet")
"""


def build(data: Path, output: Path, *words: str) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Split -> key -> first text and labels."""
    main(["build", "table", str(data), "--output", str(output), "--processes", "1", *words])
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for split in load_manifest(output).splits:
        found[split] = {s.key: (s.texts[0], tuple(s.labels)) for s in ShardReader(str(output), split)}
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the library itself writes; in a process of its own, which it takes seconds to import into."""
    folder = tmp_path_factory.mktemp("hugging face")
    (folder / "hub" / "data").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("form", ["disk", "hub"])
def test_data_sets_of_hugging_face_with_their_splits_and_class_names(form: str, written: Path, tmp_path: Path) -> None:
    found = build(written / form, tmp_path / "out")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 20, "val": 5}
    assert load_manifest(tmp_path / "out").classes == ["cat", "dog"]
    rows = sorted(found["train"].values(), key=lambda row: int(row[0].split()[1]))
    assert rows == [(f"text {i}", (i % 2,)) for i in range(20)]


def test_a_damaged_arrow_file_is_named(written: Path, tmp_path: Path) -> None:
    whole = next((written / "disk" / "train").glob("*.arrow")).read_bytes()
    for name, data in (("cut", whole[:2000]), ("none", b""), ("text", b"not arrow" * 20)):
        (tmp_path / f"{name}.arrow").write_bytes(data)
        with pytest.raises(BadInput, match=rf"{name}\.arrow is not a whole Arrow file"):
            build(tmp_path / f"{name}.arrow", tmp_path / "out")


def test_a_picture_folder_with_metadata(tmp_path: Path) -> None:
    """The same file names in two splits, as the library's imagefolder allows."""
    for split, count in (("train", 12), ("test", 3)):
        (tmp_path / "in" / split).mkdir(parents=True)
        rows = [{"file_name": f"{i}.png", "text": f"{split} {i}"} for i in range(count)]
        for i in range(count):
            (tmp_path / "in" / split / f"{i}.png").write_bytes(picture(100 * count + i))
        (tmp_path / "in" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = build(tmp_path / "in", tmp_path / "out", "--val", "0.5")
    assert {split: len(rows) for split, rows in found.items()}.keys() == {"train", "val", "test"}
    assert {text for rows in found.values() for text, _ in rows.values()} == (
        {f"train {i}" for i in range(12)} | {f"test {i}" for i in range(3)}
    )


def test_delimiter_and_encoding_by_flag(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    lines = ["image;text", *(f"{i}.png;größe, {i}" for i in range(30))]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(BadInput, match="--encoding"):
        build(tmp_path / "t.csv", tmp_path / "out", "--delimiter", ";")
    found = build(tmp_path / "t.csv", tmp_path / "out", "--delimiter", ";", "--encoding", "latin-1")
    assert {text for rows in found.values() for text, _ in rows.values()} == {f"größe, {i}" for i in range(30)}
    for flag, value in (("--delimiter", "::"), ("--encoding", "klingon")):
        with pytest.raises(BadInput, match=flag):
            build(tmp_path / "t.csv", tmp_path / "other", flag, value)


def test_a_folder_without_tables_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no table"):
        build(tmp_path, tmp_path / "out")


def parquet(path: Path, first: int, count: int, **columns: list[str]) -> None:
    numbers = range(first, first + count)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"image": [picture(i) for i in numbers], "text": [f"text {i}" for i in numbers], **columns}
    pyarrow.parquet.write_table(pyarrow.table(whole), path)


def test_partitions_are_columns(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    columns = {"image": [f"{i}.png" for i in range(8)], "caption": [f"text {i}" for i in range(8)]}
    columns |= {"split": ["train"] * 5 + ["validation"] * 3, "label": ["a cat/é", "dog"] * 4}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_to_dataset(table, tmp_path, partition_cols=["split", "label"])
    found = build(tmp_path, tmp_path / "out")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "val": 3}
    assert load_manifest(tmp_path / "out").classes == ["a cat/é", "dog"]
    assert found["val"]["6"] == ("text 6", (0,))


def test_a_partition_without_a_value_and_one_that_the_table_has_itself_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "label=__HIVE_DEFAULT_PARTITION__" / "0.parquet", 0, 2)
    with pytest.raises(BadInput, match=r"row 1 of label=.*0\.parquet: has no label"):
        build(tmp_path / "in", tmp_path / "out")
    parquet(tmp_path / "other" / "label=a" / "0.parquet", 0, 2, label=["a", "b"])
    with pytest.raises(BadInput, match="has a column 'label', for which a folder above it names a value: rename one"):
        build(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["pets-{}.parquet", "my_{}-00000-of-00001.parquet", "00000.{}.parquet", "{}set/0.parquet", "{}/pets.parquet"],
)
def test_a_split_may_stand_anywhere_in_a_name(name: str, tmp_path: Path, capsys) -> None:
    parquet(tmp_path / "in" / name.format("train"), 0, 4)
    parquet(tmp_path / "in" / name.format("Test"), 4, 2)
    parquet(tmp_path / "in" / name.format("latest"), 6, 2)
    found = build(tmp_path / "in", tmp_path / "out")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "test": 2}
    said = capsys.readouterr().out
    assert f"split test by the name of {name.format('Test')}" in said.replace("in/", "")
    assert f"no split in the name of {name.format('latest')}" in said.replace("in/", "")


@pytest.mark.parametrize("name", ["t.arrow", "t.feather"])
def test_the_file_format_of_arrow_is_read_too(name: str, tmp_path: Path) -> None:
    columns = {"image": [picture(i) for i in range(70)], "text": [f"text {i}" for i in range(70)]}
    pyarrow.feather.write_feather(pyarrow.table(columns), tmp_path / name)
    found = build(tmp_path / name, tmp_path / "out", "--val", "0", "--test", "0")
    assert {text for text, _ in found["train"].values()} == set(columns["text"])


@pytest.mark.parametrize("form", ["list", "sequence"])
def test_the_names_of_classes_in_lists_are_kept(form: str, tmp_path: Path) -> None:
    names = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    feature = [names] if form == "list" else {"feature": [names], "_type": "Sequence"}
    table = pyarrow.table({"image": [picture(0), picture(1)], "text": ["a", "b"], "label": [[0, 1], [1]]})
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    build(tmp_path / "t.parquet", tmp_path / "out", "--val", "0", "--test", "0")
    assert load_manifest(tmp_path / "out").classes == ["cat", "dog"]


def test_links_are_followed_and_hidden_folders_and_other_tables_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "in"
    parquet(top / "a.parquet", 0, 2)
    parquet(tmp_path / "far" / "b.parquet", 2, 3)
    (top / "more").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(top)
    parquet(top / ".git" / "annex" / "a.parquet", 5, 1)
    parquet(top / ".Trash" / "old.parquet", 6, 1)
    for name in ("test.csv", "x.pq", "y.parquet.gz", "cache-1.arrow", "_SUCCESS", ".part-0.parquet", "._x.csv"):
        (top / name).write_text("")
    assert len(build(top, tmp_path / "out", "--val", "0", "--test", "0")["train"]) == 5
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "passed over: hidden folders (2): .Trash, .git; hidden files (2): ._x.csv, .part-0.parquet; "
        "other files (5): cache-1.arrow, test.csv, x.pq, y.parquet.gz, _SUCCESS"
    ) in said
    for name in ("c.parquet", "gone"):
        (top / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(BadInput, match=rf"in/{name} is a link that leads nowhere: mount what it leads to"):
            build(top, tmp_path / "new")
        (top / name).unlink()


def test_one_table_in_two_formats_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "in" / "train.parquet"
    parquet(table, 0, 2)
    pyarrow.feather.write_feather(pyarrow.parquet.read_table(table), table.with_suffix(".arrow"))
    with pytest.raises(BadInput, match=r"train.arrow and train.parquet beside it may be one table in two formats"):
        build(tmp_path / "in", tmp_path / "out")
    for ending in ("jsonl", "csv"):
        (tmp_path / f"metadata.{ending}").write_text("")
    (tmp_path / "in" / "train.arrow").unlink()
    table.unlink()
    with pytest.raises(BadInput, match=r"metadata.csv and metadata.jsonl beside it"):
        build(tmp_path, tmp_path / "out")


def test_of_a_saved_data_set_what_its_records_list_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = tmp_path / "in"
    state = {"_data_files": [{"filename": "data-0.parquet"}]}
    for first, split in ((0, "train"), (4, "test"), (8, "old")):
        parquet(top / split / "data-0.parquet", first, 2)
        (top / split / "state.json").write_text(json.dumps(state))
    parquet(top / "train" / "data-of-before.parquet", 2, 2)
    (top / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    found = build(top, tmp_path / "out")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "test": 2}
    assert "passed over: other files (2): old/data-0.parquet, train/data-of-before.parquet" in " ".join(
        capsys.readouterr().out.split()
    )
    (top / "test" / "data-0.parquet").unlink()
    with pytest.raises(BadInput, match=r"test/state.json lists data-0.parquet, which is not there"):
        build(top, tmp_path / "new")
    (top / "test" / "state.json").write_text("{")
    with pytest.raises(BadInput, match=r"test/state.json cannot be read as JSON: save the data set anew"):
        build(top, tmp_path / "new")


def test_hidden_files_alone_are_named_where_there_is_no_table(tmp_path: Path) -> None:
    for i in range(7):
        parquet(tmp_path / "in" / f".part-{i}.parquet", i, 1)
    with pytest.raises(
        BadInput, match=r"has no table: .* hidden files \(7\): \.part-0\.parquet, .* and 2 more: name one"
    ):
        build(tmp_path / "in", tmp_path / "out")


def test_a_folder_of_tables_is_walked_once_and_each_file_opened_once_to_plan_and_once_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, walked, opened = tmp_path / "in", list[str](), list[str]()
    for split in ("train", "val"):
        parquet(top / split / "0.parquet", len(split), 2)
    scandir, whole = os.scandir, pyarrow.parquet.ParquetFile

    def scanned(path: Any = ".") -> Any:
        walked.append(str(path))
        return scandir(path)

    class Counted(whole):  # type: ignore[misc, valid-type]
        def __init__(self, path: object, *rest: Any, **options: Any) -> None:
            opened.append(str(path))
            super().__init__(path, *rest, **options)

    monkeypatch.setattr("os.scandir", scanned)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", Counted)
    monkeypatch.setattr("pyarrow.parquet.core.ParquetFile", Counted)
    build(top, tmp_path / "out")
    assert [place for place in walked if place.startswith(str(top))] == [str(top), f"{top}/train", f"{top}/val"]
    assert sorted(place for place in opened if place.startswith(str(top))) == sorted(
        [f"{top}/train/0.parquet", f"{top}/val/0.parquet"] * 2
    )
