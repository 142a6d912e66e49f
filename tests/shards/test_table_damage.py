"""Tables whose texts, values or class names cannot be read end as one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cmgan_dist.errors import BadInput
from tests.toy import picture, run_shards, samples_of, write_table


def build(table: Path, *args: object) -> None:
    run_shards("build", "table", table, "--output", table.parent / "out", "--processes", 1, *args)


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-16", "is not of its --encoding"), ("rot13", "is no encoding of texts")]
)
def test_encodings_that_do_not_fit(encoding: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("image,text\na.png,red\n".encode("utf-16-le"))
    with pytest.raises(BadInput, match=said):
        build(tmp_path / "t.csv", "--encoding", encoding)


def test_values_and_class_names_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    latin = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"caf\xe9")]
    )
    late = pyarrow.array([1 << 45], pyarrow.timestamp("s"))
    numbers = pyarrow.array([0])
    good = {"image": ["a.png"], "text": ["red"]}
    for columns, said in (
        (good | {"text": latin}, "row 1 of t.parquet: has a text that is not UTF-8"),
        (good | {"label": late}, "row 1 of t.parquet: has a value that cannot be read"),
        (good | {"label": numbers}, "has no list of class names for column 'label'"),
    ):
        features = {"label": {"_type": "ClassLabel", "names": 5}} if columns.get("label") is numbers else {}
        record = {"huggingface": json.dumps({"info": {"features": features}})}
        pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(record), path)
        with pytest.raises(BadInput, match=said):
            build(path)


def test_texts_that_no_sample_may_have_are_named_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    long, many = [{"image": "a.png", "text": "word " * 320_000}], [{"image": "b.png", "text": "w" * 1000}] * 9000
    too_long = "row 1 of t.jsonl: has a text of more than 1 MiB: shorten it \\(column 'text'\\)"
    for bad, said in ((long, too_long), (many, "b.json has more than 8 MiB")):
        table = write_table(tmp_path / "t.jsonl", [*bad, {"image": "c.png", "text": "red"}])
        with pytest.raises(BadInput, match=f"{said}; mend or remove it, or pass --skip-bad"):
            build(table, "--val", 0, "--test", 0, "--overwrite")
        build(table, "--val", 0, "--test", 0, "--skip-bad", "--overwrite")
        assert set(samples_of(tmp_path / "out")) == {"c"}
        assert said.replace("\\", "") in capsys.readouterr().err


def test_long_texts_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    rows = [{"image": "a.png", "text": "x" * 200_000}, {"image": "b.png", "text": "x" * 1_200_000}]
    table = write_table(tmp_path / "t.csv", [*rows, {"image": "c.png", "text": "red"}])
    build(table, "--val", 0, "--test", 0, "--skip-bad")
    assert set(samples_of(tmp_path / "out")) == {"a", "c"}
    assert "row 3 of t.csv: has a text of more than 1 MiB: shorten it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('b.png,"blue\nc.png,green\n', r"row 4 of \S+t.csv, from line 5 on.*close the quote"),
        ('b.png,"blue" or "green"\n', r"row 4 of \S+t.csv, from line 5 on.*write a quote inside a text twice"),
        ("b.png," + "x" * (8 << 20) + "y\n", r"row 4 of \S+t.csv, from line 5 on.*more than 8388608.*shorten it"),
    ],
)
def test_a_csv_that_is_not_whole_names_the_row_and_the_way(row: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f'image,text\na.png,"red\nand blue"\na.png,red\n{row}')
    with pytest.raises(BadInput, match=said):
        build(tmp_path / "t.csv", "--skip-bad")


def test_quotes_in_a_tsv_swallow_no_rows(tmp_path: Path) -> None:
    rows = {"0": '"Big dog', "1": "a cat", "2": '12 inch"', "3": '"a" "b"'}
    for name in rows:
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    table = tmp_path / "t.tsv"
    table.write_text("text\timage\n" + "".join(f"{text}\t{name}.png\n" for name, text in rows.items()))
    with pytest.raises(BadInput, match=r"row 2 of .*t\.tsv.*from line 2.*pass --quoting none where quotes are part"):
        build(table)
    build(table, "--quoting", "none", "--val", 0, "--test", 0)
    assert {key: texts for key, (texts, _) in samples_of(tmp_path / "out").items()} == {
        name: [text] for name, text in rows.items()
    }
    table.write_text('text\timage\n"Big dog\t0.png\n12 inch"\t2.png\n')
    with pytest.raises(
        BadInput, match=r"row 2 of .*t\.tsv goes from line 2 to 3 between two quotes, .*: pass --quoting none"
    ):
        build(table)
    table.write_text("text\timage\na\tb\t0.png\n")
    with pytest.raises(BadInput, match=r"has 3 fields, .* in quotes, and leave --quoting none away"):
        build(table, "--quoting", "none")


@pytest.mark.parametrize("closed", [2, 4])
@pytest.mark.parametrize("mark", [",", ";"])
def test_quotes_in_a_csv_swallow_no_rows(mark: str, closed: int, tmp_path: Path) -> None:
    texts = ["a cat", '"a 5 inch dog', "a dog", "a fox", "an owl"]
    texts[closed] += '"'
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    table = tmp_path / "t.csv"
    table.write_text(
        "".join(
            f"{mark.join(row)}\n"
            for row in [("image", "text", "label"), *((f"{i}.png", text, "x") for i, text in enumerate(texts))]
        )
    )
    options = ["--delimiter", mark, "--val", 0, "--test", 0]
    with pytest.raises(BadInput, match=r"row 3 of .*t\.csv goes from line 3 to . between two quotes.*--quoting none"):
        build(table, *options)
    build(table, *options, "--quoting", "none")
    found = samples_of(tmp_path / "out")
    assert [found[str(i)][0] for i in range(len(texts))] == [[text] for text in texts]


def test_texts_of_several_lines_stay(tmp_path: Path) -> None:
    texts = ["a dog, black\nruns, fast, far\nand, well, on", "red\n\na, b\nblue", "one,\ntwo, three,\nfour"]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    table = write_table(tmp_path / "t.csv", [{"image": f"{i}.png", "text": text} for i, text in enumerate(texts)])
    build(table, "--val", 0, "--test", 0)
    found = samples_of(tmp_path / "out")
    assert [found[str(i)][0] for i in range(len(texts))] == [[text] for text in texts]
