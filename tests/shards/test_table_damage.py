"""Tables whose texts, values or class names cannot be read end as one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cmgan_dist.errors import BadInput
from tests.toy import run_shards


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
