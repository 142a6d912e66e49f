"""What stats prints and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmgan_dist.errors import BadInput
from shards.stats import describe_missing, fonts_for
from tests.toy import TEXTS, build_folder, picture, run_shards, write_members


def test_stats_prints_the_counts_and_draws_a_grid(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "train/cat/train00.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    build_folder(raw, tmp_path / "out", "--attribution", "by us, CC0")
    capsys.readouterr()
    run_shards("stats", tmp_path / "out", "--processes", 1, "--rows", 2, "--columns", 3)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["train", "40", "5", "0.2"] in rows
    assert ["cat", "20", "3", "3", "26"] in rows
    assert ["captions an image", "1 / 1 / 5", "1 / 1 / 1", "1 / 1 / 1"] in rows
    assert ["image width", "24 / 24 / 24", "24 / 24 / 24", "24 / 24 / 24"] in rows
    with Image.open(tmp_path / "out/stats.png") as image:
        assert image.size[0] > image.size[1] > 300
        assert np.asarray(image.convert("L")).std() > 10


def test_grid_fonts_cover_what_they_can_and_name_the_rest() -> None:
    families, missing = fonts_for("Käfer дом 𒀀")
    assert families[0] == "DejaVu Sans"
    assert missing == ["𒀀"] or len(families) > 1
    assert not {"ä", "д"} & set(missing)


def test_stats_says_how_many_samples_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_members(tmp_path / "train-0.tar", {"a.png": picture(0), "a.txt": b"x", "b.png": picture(1), "b.txt": b" "})
    run_shards("index", tmp_path, "--processes", 1)
    capsys.readouterr()
    run_shards("stats", tmp_path, "--processes", 1, "--rows", 1, "--columns", 1)
    assert "1 of 2 samples cannot be used and are left out (the first: b, b.txt is empty)" in capsys.readouterr().out


def test_the_grid_is_bounded_and_no_larger_than_its_pictures(tmp_path: Path) -> None:
    write_members(tmp_path / "train-0.tar", {"a.png": picture(0), "a.txt": b"x", "b.png": picture(1), "b.txt": b"y"})
    run_shards("index", tmp_path, "--processes", 1)
    with pytest.raises(BadInput, match="are more than 400 pictures"):
        run_shards("stats", tmp_path, "--columns", 1000)
    run_shards("stats", tmp_path, "--processes", 1, "--columns", 40, "--rows", 10)
    with Image.open(tmp_path / "stats.png") as image:
        assert image.width < 600


def test_a_font_is_named_for_each_script_that_is_missing() -> None:
    said = describe_missing(list("木あ한अسไ😀➤ߊཀ"))
    for font, characters in (
        ("Noto Sans CJK", "木あ한"),
        ("Noto Sans Devanagari", "अ"),
        ("Noto Sans Arabic", "س"),
        ("Noto Sans Thai", "ไ"),
        ("Noto Sans NKo", "ߊ"),
        ("Noto Serif Tibetan", "ཀ"),
        ("Noto Emoji", "😀"),
        ("Noto Sans Symbols 2", "➤"),
    ):
        assert f"{font} for {characters}" in said
    assert describe_missing(list("木")).endswith("has 1 characters, drawn as boxes: install Noto Sans CJK for 木")
