"""Every file that the program reads, missing, damaged, older or out of reach: it is done without, or one sentence says
what is wrong and the exit code is 2. Never a traceback, and what cannot be read is not written over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launchers import embed, evaluate, index, search, train
from tests.launchers.damage_cases import DAMAGES, Damage, damaged, flipped
from tests.toy import SMALL, call, make_features

MODEL = ["model.hidden_dim=8", "model.common_dim=8", "model.discriminator_dim=8"]


# ---------------------------------------------------------------------------------------------- what is read


def train_words(place: Path, *extra: str) -> list[str]:
    return [*SMALL, *MODEL, "--data", str(place / "data"), "--output", str(place / "run"), "train.epochs=1", *extra]


def make_everything(place: Path) -> None:
    """A run, its evaluation, embeddings and index, each file of which is then damaged in turn."""
    make_features(place / "data", splits={"train": [40], "val": [16], "test": [16]})
    (place / "config.yaml").write_text("preset: smoke\n")
    assert call(train.main, *train_words(place)) == (0, "")
    assert call(evaluate.main, *EVALUATE(place)) == (0, "")
    assert call(embed.main, *EMBED(place)) == (0, "")
    assert call(index.main, str(place / "embeddings"), "--output", str(place / "index")) == (0, "")


def EVALUATE(place: Path) -> list[str]:
    return [str(place / "run"), "--data", str(place / "data"), "--no-baselines"]


def EMBED(place: Path) -> list[str]:
    return [str(place / "run"), "--data", str(place / "data"), "--output", str(place / "embeddings"), "--processes=1"]


READERS: dict[str, Callable[[Path], tuple[int, str]]] = {
    "train": lambda place: call(train.main, *train_words(place, "train.epochs=2")),
    "config": lambda place: call(train.main, "--config", str(place / "config.yaml"), "--dry-run"),
    "again": lambda place: call(evaluate.main, *EVALUATE(place), "--again"),
    "report": lambda place: call(train.main, *train_words(place, "train.report=true", "train.epochs=2")),
    "evaluate": lambda place: call(evaluate.main, *EVALUATE(place)),
    "embed": lambda place: call(embed.main, *EMBED(place)),
    "index": lambda place: call(index.main, str(place / "embeddings"), "--output", str(place / "again")),
    "change": lambda place: call(index.main, str(place / "index"), "--remove", "test0-0000"),
    "search": lambda place: call(search.main, str(place / "index"), "a dog", "--run", str(place / "run")),
}
FILES = [
    ("config.yaml", ["config"]),
    ("run/config.yaml", ["train"]),
    ("run/checkpoints/samples-*/state.json", ["train"]),
    ("run/checkpoints/samples-*/rank-00000.safetensors", ["train"]),
    ("run/metrics.jsonl", ["train", "report"]),
    ("run/best/model.json", ["train", "evaluate", "embed"]),
    ("run/best/model.safetensors", ["train", "evaluate", "embed"]),
    ("run/best/config.yaml", ["evaluate"]),
    ("run/evaluation.json", ["evaluate", "again", "report"]),
    ("run/embeddings.npz", ["report"]),
    ("data/manifest.json", ["train", "evaluate"]),
    ("data/train-000000.index.npz", ["train"]),
    ("data/train-000000.tar", ["train"]),
    ("data/test-000000.tar", ["embed"]),
    ("embeddings/embeddings.json", ["index", "embed"]),
    ("embeddings/test*.record.json", ["index", "embed"]),
    ("embeddings/test*.image.npy", ["index"]),
    ("embeddings/test*.parquet", ["index"]),
    ("index/index.json", ["search", "change"]),
    ("index/items.parquet", ["search", "change"]),
    ("index/vectors.npy", ["search", "change"]),
]


# ---------------------------------------------------------------------------------------------- each, damaged

MADE_ANEW = {"config.yaml", "run/metrics.jsonl", "run/evaluation.json", "run/checkpoints/samples-*/state.json"}
MADE_ANEW |= {"run/checkpoints/samples-*/rank-00000.safetensors", "run/embeddings.npz", "embeddings/embeddings.json"}
MADE_ANEW |= {"run/best/model.json train", "run/best/model.safetensors train", "embeddings/test*.record.json embed"}
MADE_ANEW |= {"data/train-000000.tar", "data/test-000000.tar"}  # `shards verify` reads them whole
"""What a start does without, makes anew, or may be read as before with another byte."""
QUICK = {"run/evaluation.json", "run/best/model.json", "run/checkpoints/samples-*/state.json"}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    make_everything(place)
    return place


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
@pytest.mark.parametrize(
    ("name", "reader"),
    [
        pytest.param(name, reader, marks=() if name in QUICK else pytest.mark.slow)
        for name, readers in FILES
        for reader in readers
    ],
)
def test_a_file_that_is_not_as_it_was(name: str, reader: str, damage: Damage, everything: Path, tmp_path: Path) -> None:
    code, error = damaged(everything, tmp_path / "place", name, damage, READERS[reader])
    if damage is flipped and not (name in MADE_ANEW or f"{name} {reader}" in MADE_ANEW):
        assert code == 2, error
