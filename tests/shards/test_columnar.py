"""Parquet and Arrow files: what of them is in memory, and pictures that lie inside."""

from __future__ import annotations

import base64
import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from PIL import Image

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.errors import BadInput
from shards.sources.columnar import columnar_rows
from tests.toy import ROOT, fill_folder, picture, run_shards, samples_of, write_table

MIB = 1 << 20
TEXT = "x" * (2 * MIB)


def build(table: Path, *options: object) -> None:
    whole = ("--val", 0, "--test", 0) if "--val" not in options else ()
    run_shards("build", "table", table, "--output", table.parent / "out", "--processes", 1, *whole, *options)


@contextlib.contextmanager
def counted_memory() -> Iterator[pyarrow.MemoryPool]:
    """What Arrow takes memory from within, which knows the most that it ever gave."""
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pyarrow.set_memory_pool(before)


@pytest.mark.parametrize(("kind", "bits"), [("halffloat", 11), ("float", 24), ("double", 53)])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("form", ["one", "list", "dictionary"])
def test_labels_that_a_column_of_floats_cannot_tell_apart_are_refused(
    kind: str, bits: int, ending: str, form: str, tmp_path: Path
) -> None:
    fill_folder(tmp_path, ["0", "1"])
    table = tmp_path / f"t.{ending}"

    def write(*labels: int) -> None:
        values = pyarrow.array([float(label) for label in labels]).cast(kind)
        if form == "list":
            values = pyarrow.array([[each] for each in values], pyarrow.list_(values.type))
        elif form == "dictionary":
            values = pyarrow.DictionaryArray.from_arrays(pyarrow.array(range(len(labels)), pyarrow.int8()), values)
        found = pyarrow.table({"image": ["0.png", "1.png"], "text": ["a", "b"], "label": values})
        if ending == "parquet":
            pyarrow.parquet.write_table(found, table)
        else:
            pyarrow.feather.write_feather(found, table)

    write(0, 2**bits)
    with pytest.raises(BadInput, match=rf"a float of 2 \*\* {bits} or more.*write labels as whole numbers or texts"):
        build(table)
    write(0, 2**bits - 1)
    build(table)
    assert load_manifest(tmp_path / "out").classes == ["0", str(2**bits - 1)]


@pytest.mark.parametrize("form", ["text", "list", "record", "delta"])
def test_rows_that_share_a_long_text_are_not_in_memory_together(form: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shards.sources.columnar.BATCH_BYTES", 4 * MIB)
    monkeypatch.setattr("shards.sources.columnar.CHUNK_BYTES", MIB)
    value: Any = {"list": ["a", TEXT], "record": {"bytes": TEXT.encode(), "path": None}}.get(form, TEXT)
    options: dict[str, Any] = {}
    if form == "delta":
        options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    columns = {"image": [f"{i}.png" for i in range(40)], "text": [value] * 40}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet", **options)
    with counted_memory() as pool:
        for number, row in columnar_rows(tmp_path / "t.parquet", list(columns)):
            assert row == {"image": f"{number - 1}.png", "text": value}
    assert number == 40
    assert pool.max_memory() < 20 * MIB, "sixteen rows have 32"


MEASURE = """
import re, sys
from pathlib import Path
from shards.sources.columnar import columnar_head, columnar_rows
path = Path(sys.argv[1])
def most_kib():
    return int(re.search("VmHWM:\\\\s+([0-9]+)", Path("/proc/self/status").read_text())[1])
columnar_head(path)
before = most_kib()
assert sum(len(row["image"]) for _, row in columnar_rows(path, ["image"])) == 200 << 20
print(most_kib() - before)
"""


def test_a_row_group_of_many_pictures_is_read_in_parts(tmp_path: Path) -> None:
    options = {"write_batch_size": 1, "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(pyarrow.table({"image": [bytes(MIB)] * 200}), tmp_path / "t.parquet", **options)
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "t.parquet")]
    grown_kib = int(subprocess.run(words, capture_output=True, check=True, cwd=ROOT).stdout)
    assert grown_kib < 150 << 10


def test_the_row_and_the_column_of_a_text_that_is_too_long_are_named(tmp_path: Path) -> None:
    names = ["0.png", "1.png"]
    pyarrow.parquet.write_table(pyarrow.table({"image": names, "caption": ["a", TEXT]}), tmp_path / "t.parquet")
    (tmp_path / "0.png").write_bytes(picture(0))
    with pytest.raises(BadInput, match=r"row 2 of t\.parquet: has a text of more than 1 MiB.*\(column 'caption'\)"):
        build(tmp_path / "t.parquet")
    build(tmp_path / "t.parquet", "--skip-bad")
    assert set(samples_of(tmp_path / "out")) == {"0"}


def test_where_no_row_can_be_used_the_first_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "text": [TEXT]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"no rows that can be used, the first: row 1 of t\.parquet: has a text of more"):
        build(tmp_path / "t.parquet", "--skip-bad")


@pytest.mark.parametrize("name", ["jpg", "png", "webp", "image"])
def test_pictures_in_a_column_named_by_their_format_are_taken(name: str, tmp_path: Path, capsys) -> None:
    columns: dict[str, Any] = {"url": ["http://host/a.jpg"] * 3, "caption": list("abc"), "key": ["0", "1", "2"]}
    columns[name] = [picture(i) for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    build(tmp_path / "00000.parquet")
    assert sorted(texts[0] for texts, _ in samples_of(tmp_path / "out").values()) == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert f"image is column '{name}'" in said
    assert "not taken: url" in said


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
def test_a_picture_of_another_format_is_no_path(kind: str, tmp_path: Path, capsys) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, kind)
    table = pyarrow.table({"image": [picture(0), data.getvalue()], "text": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"row 2 of t\.parquet: .*expected JPEG, PNG or WebP"):
        build(tmp_path / "t.parquet")
    build(tmp_path / "t.parquet", "--skip-bad")
    assert load_manifest(tmp_path / "out").samples("train") == 1


def test_messages_show_the_beginning_of_a_long_cell_only(tmp_path: Path) -> None:
    coded = base64.b64encode(bytes(range(256)) * 40).decode()
    rows = [{"image": "0.png", "text": "a", "label": "x", "split": "train"}]
    (tmp_path / "0.png").write_bytes(picture(0))
    for wrong in (
        {"image": coded},
        {"image": "9/" * 500 + "x"},
        {"image": {"bytes": coded}},
        {"text": f"['{coded}']"},
        {"label": f"['{coded}']"},
        {"label": f"{coded}\n{coded}"},
        {"image": f"ftp://{coded}"},
        {"split": f"a{coded}"},
    ):
        with pytest.raises(BadInput, match=r"row 1 of t\.jsonl|9/9/9/") as error:
            build(write_table(tmp_path / "t.jsonl", [rows[0] | wrong]))
        assert len(str(error.value)) < 400, str(error.value)


def test_one_picture_in_two_splits_goes_into_the_first_with_skip_bad(tmp_path: Path, capsys) -> None:
    (tmp_path / "raw").mkdir()
    for split, numbers in (("test", [5, 10, 11]), ("train", range(6))):
        columns = {"image": [picture(i) for i in numbers], "caption": [f"text {i}" for i in numbers]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "raw" / f"{split}.parquet")
    with pytest.raises(BadInput, match=r"row 6 of train\.parquet: has another label or split .* pass --skip-bad"):
        build(tmp_path / "raw")
    build(tmp_path / "raw", "--skip-bad")
    manifest = load_manifest(tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 5, "test": 3}
    assert "row 6 of train.parquet: has another label or split than row 1 of test.parquet" in capsys.readouterr().err
