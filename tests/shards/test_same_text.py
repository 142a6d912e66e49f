"""One notion of equal texts: `build` and `split` keep on one side what `verify` finds on two."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shards.same_text import compared
from shards.verify import verify
from tests.toy import picture, run_shards, write_table

FORMS = ("{} dog, {}", "{} DOG {}!", "  {}   dog: {}", "{} \uff44\uff4f\uff47 {}.", "{}-dog\n{}")


def test_texts_are_the_same_whatever_their_case_width_accents_and_punctuation() -> None:
    assert len({compared(form.format("Ein", "7")) for form in FORMS}) == 1
    assert compared("Café, Straße") == compared("cafe\u0301 STRASSE!") == "café strasse"
    assert compared("狗 跑") == compared("狗跑。")
    different = ["a dog", "a dogs", "dog a", "🐶 🐶", "🐶", "!?", "?!", "cafe", "café"]
    assert len({compared(text) for text in different}) == len(different)


@pytest.mark.parametrize("by", ["build", "split"])
def test_what_verify_finds_on_two_sides_is_drawn_onto_one(by: str, tmp_path: Path) -> None:
    told = [{"image": f"{i}.png", "text": FORMS[i % 5].format(i // 5, i // 5)} for i in range(60)]
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    table, options = write_table(tmp_path / "t.jsonl", told), ("--test", 0, "--processes", 1)
    run_shards("build", "table", table, "--output", tmp_path / "a", "--val", 0.3 * (by == "build"), *options)
    if by == "split":
        run_shards("split", tmp_path / "a", "--output", tmp_path / "b", "--val", 0.3, "--processes", 1)
    report = verify(tmp_path / ("a" if by == "build" else "b"), processes=1)
    assert (report.problems, report.warnings) == ([], [])


def test_verify_finds_every_form(tmp_path: Path) -> None:
    told = [
        {"image": f"{i}.png", "text": form.format(1, 1), "split": split}
        for i, (form, split) in enumerate(itertools.product(FORMS, ("train", "val")))
    ]
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    run_shards("build", "table", write_table(tmp_path / "t.jsonl", told), "--output", tmp_path / "a", "--processes", 1)
    (line,) = verify(tmp_path / "a", processes=1).warnings
    assert line.startswith("5 samples of split 'val' have a text that split 'train' has too")
