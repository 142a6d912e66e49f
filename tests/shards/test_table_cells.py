"""Tables hold anything: what a cell stands for is taken right, or refused by the name of its row."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.errors import BadInput, BadSample
from shards.sources.cells import as_labels, as_picture, as_split, as_texts
from tests.toy import picture, run_shards, samples_of

NAMES = [f"{i}.png" for i in range(4)]


def build(table: Path, *options: str) -> None:
    whole = ("--val", 0, "--test", 0) if "--val" not in options else ()
    run_shards("build", "table", table, "--output", table.parent / "out", "--processes", 1, *whole, *options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(picture(i))
    return tmp_path


def csv_of(folder: Path, *lines: str, name: str = "t.csv") -> Path:
    (folder / name).write_text("\n".join(lines))
    return folder / name


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize(("wrong", "said"), [("2.png,a dog, running,dog", "has 4 fields"), ("2.png,a dog", "has 2")])
def test_a_row_of_another_length_is_named(folder: Path, kind: str, place: int, wrong: str, said: str, capsys) -> None:
    lines = ["image,caption,label", "0.png,a cat,cat", "1.png,a dog,dog"]
    lines.insert(place, wrong)
    if kind == "tsv":
        lines = [line.replace(",", "\t") for line in lines]
    table = csv_of(folder, *lines, name=f"t.{kind}")
    with pytest.raises(BadInput, match=rf"row {place + 1} of t\.{kind}: {said}.*--skip-bad"):
        build(table)
    build(table, "--skip-bad")
    assert load_manifest(folder / "out").samples("train") == 2
    assert f"row {place + 1} of t.{kind}: {said}" in capsys.readouterr().err


def test_a_column_or_a_field_that_stands_twice_is_named(folder: Path) -> None:
    with pytest.raises(BadInput, match="two columns 'caption'"):
        build(csv_of(folder, "image,caption,caption", "0.png,a,b"))
    with pytest.raises(BadInput, match=r"t\.csv has no name for its columns 2, 4 and 5: give each its own, or remove"):
        build(csv_of(folder, "image,,text,,", "0.png,x,a,,"))
    (folder / "t.jsonl").write_text('{"image": "0.png", "text": "a", "text": "b"}\n')
    with pytest.raises(BadInput, match=r"row 1 of t\.jsonl: is not JSON \(it has 'text' twice\)"):
        build(folder / "t.jsonl")


def test_a_field_that_the_first_row_lacks_is_seen(folder: Path) -> None:
    (folder / "t.jsonl").write_text('{"image": "0.png", "text": "a"}\n{"image": "1.png", "text": "b", "label": "x"}\n')
    with pytest.raises(BadInput, match=r"row 1 of t\.jsonl: has no label"):
        build(folder / "t.jsonl")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"text": math.nan}, "has no text"),
        ({"text": None}, "has no text"),
        ({"text": 5}, "its text is the number 5"),
        ({"text": True}, "its text is true"),
        ({"text": {"raw": "a dog"}}, "its text is a record"),
        ({"text": [["a", "b"]]}, "its text is a list"),
        ({"text": ["a", None]}, "a list of texts of which one is empty"),
        ({"text": []}, "has no text"),
        ({"label": math.nan}, "has no label"),
        ({"label": True}, "its label is true"),
        ({"label": 1.5}, "its label is the number 1.5"),
        ({"image": ".."}, "'..' is not the name of an image"),
        ({"label": math.inf}, "its label is the number inf"),
        ({"label": [1, [2]]}, "its label is a list"),
        ({"label": []}, "has no label"),
        ({"label": ["a", None]}, "a list of labels of which one is empty"),
        ({"label": "a\nb"}, r"its label a\nb holds control characters"),
        ({"image": 7}, "its image path is the number 7"),
        ({"image": {"bytes": "x"}}, "its picture is a text, expected bytes"),
        ({"image": {"a": 1}}, "its image path is a record"),
        ({"image": ["a.png", "b.png"]}, "has a list of 2 images: give each a row of its own"),
        ({"image": []}, "has no image path"),
    ],
)
def test_a_cell_of_another_kind_is_refused_by_name(folder: Path, cells: dict[str, Any], said: str) -> None:
    rows = [{"image": "0.png", "text": "x", "label": "a"}, {"image": "1.png", "text": "x", "label": "a"} | cells]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput) as error:
        build(folder / "t.jsonl")
    assert said in str(error.value)
    assert "row 2 of t.jsonl" in str(error.value)


def test_classes_that_may_be_missing_values_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["nan", "cat", "None", "dog"]
    rows = (f"{name},text {name},{label}" for name, label in zip(NAMES, labels, strict=True))
    build(csv_of(folder, "image,caption,label", *rows))
    assert "classes None, nan: a missing value is often written so" in capsys.readouterr().out


def test_whole_numbers_are_one_class_however_they_are_written(folder: Path) -> None:
    assert as_labels(1) == as_labels(1.0) == as_labels("1") == as_labels("1.0") == (("1",), False)
    assert as_labels("-2.00|2.5") == (("-2", "2.5"), True)
    assert as_labels([2.0, "a"]) == (("2", "a"), True)
    assert (as_texts(b"caf\xc3\xa9"), as_split(b"dev")) == (("café",), "val")
    assert as_labels(10**400)[0] == (str(10**400),)
    with pytest.raises(BadInput, match=r"labels '01' and '1' are the same number"):
        build(csv_of(folder, "image,text,label", "0.png,x,01", "1.png,x,1.0"))


@pytest.mark.parametrize("value", ["['a', 'b']", "[\"it's\", 'b']", "['a' 'b']", "[ 'a', ]"])
def test_a_list_of_python_is_refused_as_text_and_as_label(value: str) -> None:
    for parse in (as_texts, as_labels):
        with pytest.raises(BadSample, match=r"looks like a list: write it as JSON \(double quotes\)"):
            parse(value)


def test_a_list_in_json_is_one_and_a_text_in_brackets_a_text() -> None:
    assert as_texts(' ["a dog", "a cat"]') == ("a dog", "a cat")
    assert as_texts("[1] a dog") == ("[1] a dog",)
    assert as_texts("[1]") == ("[1]",)
    assert as_labels('["b", "a"]') == (("a", "b"), True)


def test_without_a_split_train_it_is_that_which_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{name},text {i},{'fold2' if i else 'train_1'}" for i, name in enumerate(NAMES)]
    build(csv_of(folder, "image,text,split", *lines))
    said = capsys.readouterr().out
    assert "there is no split 'train', which training reads: name one so; there are fold2, train_1" in said
    assert "--val" not in said


def test_the_url_of_a_file_is_its_path(folder: Path) -> None:
    (folder / "a b%.png").write_bytes(picture(7))
    images = [(folder / "0.png").as_uri(), (folder / "a b%.png").as_uri(), f"FILE://localhost{folder}/2.png", "3.png"]
    build(csv_of(folder, "image,text", *(f"{image},text {i}" for i, image in enumerate(images))))
    assert len(samples_of(folder / "out")) == 4
    with pytest.raises(BadInput, match=r"row 2 of t\.csv: file://a/b\.png names a file of another machine"):
        build(csv_of(folder, "image,text", "file://a/b.png,text"), "--overwrite")


@pytest.mark.parametrize("name", ["ftp://host/b.png", "FTP://b.png"])
def test_a_url_by_another_protocol_is_named(name: str) -> None:
    with pytest.raises(BadSample, match="is a URL by none of file, http, https, s3, gs: name one, or a path"):
        as_picture(name)
    assert as_picture({"path": name, "bytes": b"x"}).path == name


def test_a_url_is_one_in_any_case_of_its_protocol() -> None:
    assert as_picture("HTTPS://Host/A.png") == as_picture("https://Host/A.png") == ("https://Host/A.png", None)


def test_bytes_that_are_no_text_are_refused() -> None:
    for parse in (as_texts, as_labels, as_split):
        with pytest.raises(BadSample, match="bytes that are not UTF-8"):
            parse(b"\xff\xfe")


def test_binary_columns_of_parquet_are_texts_and_class_names(folder: Path) -> None:
    columns = {"image": NAMES, "caption": [b"a dog %d" % i for i in range(4)], "label": [b"cat", b"dog"] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    build(folder / "t.parquet")
    assert load_manifest(folder / "out").classes == ["cat", "dog"]
    assert samples_of(folder / "out")["3"] == (["a dog 3"], (1,))


@pytest.mark.parametrize("form", ["record", "bytes"])
def test_pictures_inside_parquet_are_packed(tmp_path: Path, form: str) -> None:
    data = [picture(i) for i in (0, 1, 2, 2)]
    images: list[Any] = data if form == "bytes" else [{"bytes": each, "path": None} for each in data]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": list("abcd")}), tmp_path / "t.parquet")
    build(tmp_path / "t.parquet")
    found = samples_of(tmp_path / "out")
    assert sorted(texts for texts, _ in found.values()) == [["a"], ["b"], ["c", "d"]]
    assert not list((tmp_path / "out").glob(".*")), "the pictures that were kept aside are gone"


def test_a_cell_says_where_its_picture_is() -> None:
    for value in ({"bytes": None, "path": "a.png"}, {"path": "a.png", "width": 3}, ["a.png"], [{"path": "a.png"}]):
        assert as_picture(value) == as_picture("a.png") == ("a.png", None)
    assert as_picture({"bytes": picture(1), "path": "a.png"}) == ("a.png", picture(1))
    with pytest.raises(BadSample, match="has no image path"):
        as_picture({"bytes": None, "path": None})


def test_build_says_which_columns_it_took(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["file_name,caption,label,category", *(f"{name},a dog,{i},dog" for i, name in enumerate(NAMES))]
    build(csv_of(folder, *lines))
    said = capsys.readouterr().out
    assert "image is column 'file_name'; text is column 'caption'; label is column 'label'" in said
    assert "not taken: category" in said


def test_a_table_without_val_gets_one_as_build_advises(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{i}.png,text {i},{'test' if i < 8 else 'train'}" for i in range(40)]
    for i in range(40):
        (folder / f"{i}.png").write_bytes(picture(i))
    table = csv_of(folder, "image,text,split", *lines)
    build(table, "--test", "0", "--val", "0")
    assert "there is no split 'val'" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"no split 'val'.*draw one by 'python -m shards split DIR --val 0\.1"):
        load_manifest(folder / "out").shards("val")
    build(table, "--val", "0.3", "--overwrite")
    manifest = load_manifest(folder / "out")
    assert manifest.samples("test") == 8
    assert 0 < manifest.samples("val") < 20
    with pytest.raises(BadInput, match="there is a split 'test' already"):
        build(table, "--val", "0.3", "--test", "0.1")


@pytest.mark.parametrize(("flag", "splits"), [("--val", ["test"]), ("--val", ["a", "b_2"]), ("--test", ["a", "b_2"])])
def test_there_must_be_a_train_to_draw_from(folder: Path, splits: list[str], flag: str, capsys) -> None:
    lines = [f"{name},text {i},{splits[i % len(splits)]}" for i, name in enumerate(NAMES)]
    table = csv_of(folder, "image,text,split", *lines)
    options = {"--val": "0", "--test": "0"}
    said = rf"{flag} is 0\.1, of the split 'train', and there is none, only {', '.join(splits)}: name the one"
    with pytest.raises(BadInput, match=said):
        build(table, *itertools.chain(*(options | {flag: "0.1"}).items()))
    build(table, *itertools.chain(*options.items()))
    assert "there is no split 'train', which training reads: name one so" in capsys.readouterr().out


def test_rows_without_a_split_are_train(tmp_path: Path) -> None:
    for name, count in (("pairs", 30), ("pairs-test", 4)):
        columns = {"image": [picture(i + 99 * len(name)) for i in range(count)]}
        columns |= {"text": [f"{name} {i}" for i in range(count)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    run_shards("build", "table", tmp_path, "--output", tmp_path / "out", "--val", "0.2")
    assert load_manifest(tmp_path / "out").samples("test") == 4
    assert 0 < load_manifest(tmp_path / "out").samples("val") < 15


def test_a_row_or_text_that_is_too_long_is_named_and_the_rest_read(folder: Path, monkeypatch, capsys) -> None:
    texts = ["x" * 4_000_000, "a", "\u00e9" * 600_000, "b"]
    monkeypatch.setattr("shards.sources.rows.MOST_LINE_CHARS", 4_000_000)
    lines = [json.dumps({"image": name, "text": text}) for name, text in zip(NAMES, texts, strict=True)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadInput, match=r"row 1 of t\.jsonl: has 4000000 characters or more: shorten its texts"):
        build(folder / "t.jsonl")
    build(folder / "t.jsonl", "--skip-bad")
    assert sorted(samples_of(folder / "out")) == ["1", "3"]
    assert "row 3 of t.jsonl: has a text of more than 1 MiB: shorten it" in capsys.readouterr().err


def test_a_large_batch_is_read_by_the_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.sources.columnar.CHUNK_BYTES", 10)
    pyarrow.parquet.write_table(pyarrow.table({"image": NAMES, "text": ["a", "b", "c", "d"]}), folder / "t.parquet")
    build(folder / "t.parquet")
    assert load_manifest(folder / "out").samples("train") == 4


def test_a_tab_is_advised_as_it_can_be_typed(folder: Path) -> None:
    table = csv_of(folder, "image\ttext", *(f"{name}\ttext" for name in NAMES))
    with pytest.raises(BadInput, match=r"a single column: if '\\t' is between its fields, pass --delimiter '\\t'"):
        build(table)
    build(table, "--delimiter", "\\t")
    assert load_manifest(folder / "out").samples("train") == 4


def test_names_of_columns_with_spaces_around_them_are_recognised(folder: Path) -> None:
    rows = [f"{name}| {j}| text {i} {j}" for i, name in enumerate(NAMES) for j in (0, 1)]
    build(csv_of(folder, "image_name| comment_number| comment", *rows), "--delimiter", "|")
    assert samples_of(folder / "out")["3"] == (["text 3 0", "text 3 1"], ())


def test_a_header_of_another_delimiter_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Bild;Beschreibung;Klasse\na.jpg;ein Hund;Tier\n")
    with pytest.raises(BadInput, match=r"it has Bild;Beschreibung;Klasse, a single column: .* pass --delimiter ';'"):
        run_shards("build", "table", tmp_path / "t.csv", "--output", tmp_path / "out")


AS_PYTHON = "[0 2]", "[0. 1.]", "{'a', 'b'}", "('a', 'b')", "['a', None]", "['a' None]", "(1, 2)", "[nan 1.]"
AS_PYTHON += (
    "array(['a'], dtype=object)",
    "[np.str_('a'), np.str_('b')]",
    "tensor([0, 2])",
    "[0 1 ... 9]",
    "[['a'], []]",
    "[Timestamp('2020-01-01 00:00:00')]",
    "[datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)]",
    "[Decimal('1.5')]",
    "[PosixPath('a.jpg'), PosixPath('b.jpg')]",
    "[tensor(1), tensor(2)]",
    "[array(['a'], dtype=object), array(['b'], dtype=object)]",
    "[np.True_, np.False_]",
    "['a', np.nan]",
    "['dog', <NA>]",
    "{np.str_('a'): 1}",
)


@pytest.mark.parametrize("written", ["(2019, 2020)", "[1] [2]", "b'day bash'", "tensor(2, 3)", "UUID(1)", "['a', 'b']"])
def test_a_text_that_looks_like_a_value_is_taken_from_a_list(written: str) -> None:
    with pytest.raises(BadSample, match=r"looks like .* in a JSON list|looks like a list: write it as JSON"):
        as_texts(written)
    assert as_texts([written]) == as_texts(json.dumps([written])) == (written,)


@pytest.mark.parametrize("written", AS_PYTHON)
def test_lists_as_python_prints_them_are_no_labels_and_no_texts(written: str) -> None:
    for parse in (as_labels, as_texts):
        with pytest.raises(BadSample, match=re.escape(f"{written} looks like a list: write it as JSON")):
            parse(written)


RECORDS = "{'raw': 'a dog'}", "{'raw': \"it's\"}", "{1: array([0, 2]), 'a': <object>}"
RECORDS += "[{'raw': 'a dog', 'id': 3}, {'raw': 'a cat', 'id': 4}]", "{'bytes': b'\\x89PNG\\n', 'path': None}"
RECORDS += "OrderedDict([('raw', 'a dog')])", "defaultdict(<class 'list'>, {'a': [1]})", "Row(raw='a dog')"
AS_BYTES = "b'a dog'", 'b"it\'s a dog"', "bytearray(b'\\xff\\xd8')"
SCALARS = "np.str_('a dog')", "np.int64(3)", "tensor(3)", "tensor(1., device='cuda:0')", "Decimal('3')"
SCALARS += "Timestamp('2020-01-01 00:00:00')", "datetime.date(2020, 1, 1)", "PosixPath('a.png')", "UUID('0f')"
SCALARS += "np.True_", "array('dog', dtype='<U3')", "array(3)", "NaT", "Interval(0, 1, closed='right')"
SCALARS += "tensor(1.5, grad_fn=<AddBackward0>)", "<pyarrow.StringScalar: 'dog'>", "<Label.DOG: 1>", "dict_keys(['a'])"
SCALARS += "Index(['a', 'b'], dtype='object')", "memoryview(b'dog')", "NamedSplit('train')"


@pytest.mark.parametrize("written", [*RECORDS, *AS_BYTES, *SCALARS])
def test_values_as_python_prints_them_are_no_labels_no_texts_and_no_pictures(written: str) -> None:
    kind = "bytes" if written in AS_BYTES else "a Python value" if written in SCALARS else "a record"
    said = re.escape(f"{written} looks like {kind}: ")
    with pytest.raises(BadSample, match=said + "write its text alone, or as it is in a JSON list"):
        as_texts(written)
    with pytest.raises(BadSample, match=said + "write the name of the class alone"):
        as_labels(written)
    with pytest.raises(BadSample, match=said + "write its name alone"):
        as_split(written)
    with pytest.raises(BadSample, match=said + "name a file, or put the picture's bytes into a column of Parquet"):
        as_picture(written)


def test_a_record_in_json_is_none_of_a_text_a_label_and_a_split() -> None:
    for parse, written in itertools.product(
        (as_texts, as_labels, as_split), ('{"raw": "a dog"}', '[{"raw": "a dog"}]')
    ):
        with pytest.raises(BadSample, match=r"is a (record|list), expected"):
            parse(written)
    with pytest.raises(BadSample, match="a list of texts of which one is empty"):
        as_texts('["a dog", null]')
    with pytest.raises(BadSample, match="its text is a record"):
        as_texts(["a dog", '{"raw": "a dog"}'])


def test_a_record_in_json_says_where_its_picture_is(folder: Path) -> None:
    assert as_picture('{"path": "a.png", "bytes": null}') == as_picture('["a.png"]') == ("a.png", None)
    for written, said in (('{"a": 1}', "its image path is a record"), ('{"bytes": "iVBO"}', "its picture is a text")):
        with pytest.raises(BadSample, match=said):
            as_picture(written)
    for name in ("[1]", "{a}.png", "(1, 2).png", "b'.png", "img(1).png"):
        assert as_picture(name).path == name


def test_a_column_of_records_that_pandas_wrote_as_csv_is_refused_by_its_row(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for column in ("image", "caption", "label"):
        columns: dict[str, list[Any]] = {"image": NAMES, "caption": ["a dog"] * 4, "label": ["dog"] * 4}
        columns[column] = [{"raw": each, "n": {1.5: [None]}} for each in columns[column]]
        pandas.DataFrame(columns).to_csv(folder / "t.csv", index=False)
        with pytest.raises(BadInput, match=rf"row 2 of t\.csv: .* looks like a record: .*column '{column}'"):
            build(folder / "t.csv")


@pytest.mark.parametrize(
    "name",
    [
        "[unk]",
        "(2)",
        "(a, b)",
        "{a}",
        "[1st place]",
        "array (1)",
        "{a: b}",
        "b's dog",
        "{':)'} a dog",
        "Row(2)",
        "Path(to glory)",
        "a tensor(3)",
        "Period()",
        "np.(3)",
        "np. Nice",
        "< 3 cats",
        "<b>bold</b>",
        "<Joe: hi>",
        "Index of things",
        "Set(s)",
        "((((" * 20000,
    ],
)
def test_names_in_brackets_stay(name: str) -> None:
    assert as_labels(name) == ((name,), False)
    assert as_texts(name) == (name,)
