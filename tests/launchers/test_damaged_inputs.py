"""What `test_damaged_files` asks of runs, of the files of shards, of searches and of indexes that carry an encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cmgan_dist.retrieval.index import Index
from cmgan_dist.retrieval.model import load_model
from launchers import search
from shards.__main__ import main as shards
from tests.launchers.damage_cases import DAMAGES, Damage, damaged
from tests.retrieval.embed_cases import raw_run, whole
from tests.toy import call, fill_folder, make_features
from tests.tune.search_cases import RATES, arguments
from tune.search import make_plan

ONE = ["--processes", "1"]
BUILT = ["--output", "built", "--processes", "1", "--shard-samples", "8", "--val", "0.2", "--test", "0"]
FEATURES = ["--image-backbone", "test_efficientnet", "--image-weights", "weights.safetensors", "--processes", "1"]


def run(place: Path, command: str, *words: str) -> tuple[int, str]:
    """A command of `shards` with the paths of its words in `place`."""
    names = ("raw", "built", "again", "features", "weights.safetensors", "classes.txt")
    return call(lambda: shards([command, *(str(place / word) if word in names else word for word in words)]))


def verified(place: Path) -> tuple[int, str]:
    code, error = run(place, "verify", "built", *ONE)
    return (0, error) if code == 1 else (code, error)  # it has listed what is wrong


def planned(place: Path) -> tuple[int, str]:
    given = arguments(place / "search", place / "data", "", output=str(place / "out"))
    given.space = str(place / "space.yaml")
    return call(lambda: bool(make_plan(given)) and 0)


READERS: dict[str, Callable[[Path], tuple[int, str]]] = {
    "build": lambda place: run(place, "build", "folder", "raw", *BUILT),
    "features": lambda place: run(place, "features", "built", "--output", "features", *FEATURES),
    "verify": verified,
    "stats": lambda place: run(place, "stats", "built", *ONE),
    "split": lambda place: run(
        place, "split", "built", "--output", "again", "--val", "0", "--test", "0.2", "--together", "images", *ONE
    ),
    "index": lambda place: run(place, "index", "built", "--overwrite", "--classes", "classes.txt", *ONE),
    "plan": planned,
}
FILES = [
    ("raw/a/0.png", ["build"]),
    ("built/manifest.json", ["build", "features", "verify", "stats", "split", "index"]),
    ("built/train-*.build.json", ["build", "features", "verify", "stats", "split", "index"]),
    ("built/train-*.index.npz", ["build", "features", "verify", "stats", "split", "index"]),
    ("built/train-*.tar", ["build", "features", "verify", "stats", "split", "index"]),
    ("features/manifest.json", ["features"]),
    ("features/train-*.features.json", ["features"]),
    ("features/train-*.index.npz", ["features"]),
    ("features/train-*.tar", ["features"]),
    ("weights.safetensors", ["features"]),
    ("classes.txt", ["index"]),
    ("space.yaml", ["plan"]),
]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, their shards and features, names of classes and a space."""
    place = tmp_path_factory.mktemp("whole")
    fill_folder(place / "raw", [f"{c}/{i}" for c in "abc" for i in range(12)])
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), place / "weights.safetensors")
    (place / "classes.txt").write_text("a\nb\nc\n")
    (place / "space.yaml").write_text(RATES)
    (place / "search").mkdir()
    make_features(place / "data")
    assert READERS["build"](place) == (0, "")
    assert READERS["features"](place) == (0, "")
    assert READERS["stats"](place) == (0, "")  # what it imports may lie where only root reads
    return place


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
@pytest.mark.parametrize(("name", "reader"), [(name, reader) for name, readers in FILES for reader in readers])
def test_a_file_that_is_not_as_it_was(name: str, reader: str, damage: Damage, everything: Path, tmp_path: Path) -> None:
    """Another byte in a list of names, in a space or in weights makes another one, and so is no damage."""
    damaged(everything, tmp_path / "place", name, damage, READERS[reader])


@pytest.fixture(scope="module")
def carrying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that carries the model for queries."""
    place = tmp_path_factory.mktemp("carrying")
    run, data = raw_run(place)
    whole(run, place / "embeddings", data=data, splits="test")
    Index.build(place / "embeddings", place / "index").add_query_encoders(load_model(run))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_an_encoder_that_is_not_as_it_was(damage: Damage, carrying: Path, tmp_path: Path) -> None:
    code, error = damaged(
        carrying, tmp_path / "place", "index/query.text.onnx", damage,
        lambda place: call(search.main, str(place / "index"), "a dog"),
    )  # fmt: skip
    assert code == 2 or not error
