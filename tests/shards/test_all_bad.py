"""Where every pair of a split is bad and is left out, the sentence says why: the first, and how many of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput, reasons_of
from tests.toy import fill_folder, run_shards, write_table

ALL_TRAIN = ["--val", "0", "--test", "0", "--processes", "1", "--skip-bad"]


def test_reasons_are_counted_by_kind() -> None:
    lines = [f"row {i} of t.csv: /p/{i}.png cannot be read (No such file or directory)" for i in range(3)]
    lines.insert(0, "row 9 of t.csv: has no text (column 'text')")
    said = reasons_of(lines)
    assert said.startswith(f"the first: {lines[0]}; in all 3 x … cannot be read (No such file or directory); 1 x has")
    assert reasons_of([]) == ""
    assert reasons_of(lines[:1]) == f"the first: {lines[0]}"


def test_kinds_without_number_are_bounded() -> None:
    lines = [f"x: reason {word}" for word in "abcdefgh"]
    assert reasons_of(lines).endswith("; and 3 other reasons")


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([{"image": f"{i}.png", "text": ""} for i in range(3)], ["row 2 of t.csv: has no text", "3 x has no text"]),
        (
            [{"image": f"{i}.png", "text": f"text {i}"} for i in range(3)],
            ["0.png cannot be read", "3 x … cannot be read (No such file or directory)"],
        ),
    ],
)
def test_a_table_of_bad_rows_alone(tmp_path: Path, rows: list[dict[str, str]], kinds: list[str]) -> None:
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(BadInput) as caught:
        run_shards("build", "table", table, *ALL_TRAIN, "--output", tmp_path / "o")
    assert all(kind in str(caught.value) for kind in kinds), str(caught.value)
    assert "mend some" in str(caught.value)


def test_a_folder_of_bad_pictures_alone(tmp_path: Path) -> None:
    raw = fill_folder(tmp_path / "raw", ["a", "b"])
    for each in raw.glob("*.*g"):
        each.write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"every pair of it was bad \(the first: .*; in all 2 x .*: mend some"):
        run_shards("build", "folder", raw, *ALL_TRAIN, "--output", tmp_path / "o")
