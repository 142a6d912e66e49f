"""What `test_damaged_files` asks of other files that commands are given: texts, a query's picture, an index of cells,
configurations of launchers, copies of a model, words, a search, locks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.distributed.join import take_zero_config
from cmgan_dist.distributed.launch_config import launch_config
from cmgan_dist.files import sealed_json
from cmgan_dist.jobs import lock
from cmgan_dist.models.saved import read_model
from cmgan_dist.retrieval.hub import save_pretrained
from cmgan_dist.retrieval.index import Index
from launchers import embed, evaluate, index, search
from tests.launchers.damage_cases import DAMAGES, Damage, damaged
from tests.retrieval.embed_cases import raw_run, whole
from tests.toy import ROOT, call, make_features, picture
from tests.tune.search_cases import RATES, arguments
from tune.search import make_plan

Read = Callable[[Path], tuple[int, str]]


def zero(place: Path) -> tuple[int, str]:
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(place / "zero.json")}
    try:
        return call(lambda: bool(take_zero_config()) and 0)
    finally:
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            os.environ.pop(name, None)


def planned(place: Path) -> tuple[int, str]:
    data = Path((place / "data.txt").read_text())  # of another place than this copy: a search knows its data
    given = arguments(place, data, "", RATES, output=str(place / "search"), resume=True)
    return call(lambda: bool(make_plan(given)) and 0)


def embedded(place: Path, *words: str) -> tuple[int, str]:
    return call(embed.main, str(place / "run"), *words, "--output", str(place / "new"), "--processes=1")


READERS: dict[str, Read] = {
    "texts": lambda place: embedded(place, "--texts", str(place / "texts.jsonl")),
    "pictures": lambda place: embedded(place, "--pictures", str(place / "pictures")),
    "data": lambda place: embedded(place, "--data", str(place / "raw"), "--splits", "test"),
    "picture": lambda place: call(
        search.main, str(place / "index"), "--image", str(place / "query.png"), "--run", str(place / "run")
    ),
    "cells": lambda place: call(search.main, str(place / "index"), "a dog", "--run", str(place / "run")),
    "change": lambda place: call(index.main, str(place / "index"), "--remove", "test0"),
    "zero": zero,
    "accelerate": lambda place: call(lambda: bool(launch_config(str(place / "accelerate.yaml"))) and 0),
    "copy": lambda place: call(lambda: bool(save_pretrained(read_model(place / "copy"), place / "again")) and 0),
    "evaluate": lambda place: call(evaluate.main, str(place / "run"), "--data", str(place / "raw"), "--no-baselines"),
    "plan": planned,
}
FILES = [
    ("texts.jsonl", "texts"),
    ("pictures/a.png", "pictures"),
    ("query.png", "picture"),
    ("index/vectors.faiss", "cells"),
    ("index/vectors.faiss", "change"),
    ("zero.json", "zero"),
    ("accelerate.yaml", "accelerate"),
    ("copy/model.json", "copy"),
    ("copy/evaluation.json", "copy"),
    ("run/best/vocabulary.json", "data"),
    ("run/best/vocabulary.json", "copy"),
    ("search/search.json", "plan"),
    ("run/.evaluate.lock", "evaluate"),
    ("index/.index.lock", "change"),
]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    run, data = raw_run(place)
    whole(run, place / "embeddings", data=data, splits="test")
    Index.build(place / "embeddings", place / "index", kind="ivf_sq8")
    save_pretrained(read_model(run), place / "copy")
    (place / "texts.jsonl").write_text('{"key": "a", "text": "a dog"}\n{"key": "b", "text": "a boat"}\n')
    for name in ("query.png", "pictures/a.png"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(picture(1))
    (place / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    shutil.copy(ROOT / "launchers" / "configs" / "zero2.yaml", place / "accelerate.yaml")
    (place / "copy" / "evaluation.json").write_text(sealed_json({"version": 1, "metrics": {}}))
    data = make_features(tmp_path_factory.mktemp("data") / "data")
    (place / "data.txt").write_text(str(data))
    plan = make_plan(arguments(place, data, "", RATES))
    plan.output.write("search.json", json.dumps(plan.identity))
    for name in ("run/.evaluate.lock", "index/.index.lock"):
        (place / name).write_text(json.dumps({"host": "h", "pid": 1 << 22, "machine": "", "count": 1}))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
@pytest.mark.parametrize(("name", "reader"), FILES)
def test_a_file_that_is_not_as_it_was(
    name: str, reader: str, damage: Damage, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another byte in what a user writes makes another text, and so is no damage."""
    monkeypatch.setattr(lock, "STILL_S", 0.2)
    damaged(everything, tmp_path / "place", name, damage, READERS[reader])


@pytest.mark.parametrize("reader", sorted({reader for _, reader in FILES}))
def test_all_is_read_where_nothing_is_damaged(
    reader: str, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STILL_S", 0.2)
    shutil.copytree(everything, tmp_path / "place")
    assert READERS[reader](tmp_path / "place") == (0, "")
