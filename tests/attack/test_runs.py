"""Runs under attack: killed again and again, their files damaged, their disk full. docs/reliability.md has the figures.

pytest -m slow -rP tests/attack/test_runs.py     prints what was tried and what survived"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cmgan_dist.errors import BadInput
from cmgan_dist.models.saved import read_model
from cmgan_dist.training.checkpoint import latest, read_checkpoint
from tests.services import forked
from tests.toy import (
    environment,
    fill_folder,
    final_state,
    lines,
    make_features,
    run_to_end,
    save_untrained,
    small_config,
    train_words,
)

pytestmark = [pytest.mark.slow, pytest.mark.process]
TRAIN = ["train.epochs=30", "train.save_every=0.5", "train.val_every=5", "model.dropout=0.3", "train.keep=3"]
PLACES = 100


# ---------------------------------------------------------------------------------------------- kill -9


def files_below(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not path.name.endswith(".lock")}


def state_of_run(folder: Path) -> list[Any]:
    state = {name: tensor.numpy().tobytes() for name, tensor in final_state(folder).items()}
    return [state, lines(folder, "train"), lines(folder, "val"), (folder / "best/model.safetensors").read_bytes()]


def training(place: Path) -> Callable[[Path], list[str]]:
    data = make_features(place / "data", splits={"train": [70, 26], "val": [24]}, captions=3)
    return lambda output: train_words(data, output, *TRAIN)


def build(place: Path) -> Callable[[Path], list[str]]:
    raw = fill_folder(place / "raw", [f"{c}/{i}" for c in "abc" for i in range(100)])
    options = ["--processes", "1", "--shard-samples", "8", "--output"]
    return lambda output: ["-m", "shards", "build", "folder", str(raw), *options, str(output)]


def features(place: Path) -> Callable[[Path], list[str]]:
    data = build_to_end(place)
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), place / "weights.safetensors")
    options = ["--image-backbone", "test_efficientnet", "--image-weights", str(place / "weights.safetensors")]
    options += ["--processes", "1", "--output"]
    return lambda output: ["-m", "shards", "features", str(data), *options, str(output)]


def build_to_end(place: Path) -> Path:
    assert forked.run(build(place)(place / "built"), environment()).returncode == 0
    return place / "built"


def embed(place: Path) -> Callable[[Path], list[str]]:
    data = make_features(place / "data", splits={"train": [40] * 60})
    save_untrained(place / "run", data, small_config(8))
    options = ["--data", str(data), "--processes", "1", "--output"]
    return lambda output: ["launchers/embed.py", str(place / "run"), *options, str(output)]


def index(place: Path) -> Callable[[Path], list[str]]:
    assert forked.run(embed(place)(place / "embeddings"), environment()).returncode == 0
    return lambda output: [
        "launchers/index.py",
        str(place / "embeddings"),
        "--kind",
        "ivf_sq8",
        "--output",
        str(output),
    ]


def search(place: Path) -> Callable[[Path], list[str]]:
    data = make_features(place / "data")
    (place / "space.yaml").write_text("optim.generator_lr: {log: [5e-4, 5e-3]}\nloss.inter: {log: [0.1, 1.0]}\n")
    options = ["--preset", "smoke", "--data", str(data), "--space", str(place / "space.yaml"), "--trials", "3"]
    options += ["--algorithm", "random", "--epochs", "60", "--val-every", "3", "--resume", "--output"]
    return lambda output: ["tune/search.py", *options, str(output)]


def state_of_search(folder: Path) -> list[Any]:
    found = json.loads((folder / "trials.json").read_text())
    trials = [[trial[name] for name in ("name", "values", "status", "best", "curve")] for trial in found["trials"]]
    return [trials, found["best"], found["test"], (folder / "best/best/model.safetensors").read_bytes()]


JOBS = [(training, 30, state_of_run), (build, 20, files_below), (features, 15, files_below), (embed, 20, files_below)]
JOBS += [(index, 15, files_below), (search, 10, state_of_search)]


@pytest.mark.parametrize(("job", "kills", "end"), JOBS, ids=[job.__name__ for job, _, _ in JOBS])
def test_killed_again_and_again_it_ends_like_the_undisturbed_one(
    job: Callable[[Path], Callable[[Path], list[str]]], kills: int, end: Callable[[Path], Any], tmp_path: Path
) -> None:
    """At times drawn over the first part of a start; where the work ended before a kill it begins anew elsewhere."""
    words, draw = job(tmp_path), random.Random(0)
    assert forked.run(words(tmp_path / "whole"), environment()).returncode == 0
    begun = time.monotonic()
    assert forked.run(words(tmp_path / "again"), environment()).returncode == 0
    takes = time.monotonic() - begun
    expected, tried, ends = end(tmp_path / "whole"), 0, 0
    output = tmp_path / "killed0"
    while tried < kills:
        process = forked.Forked(words(output), environment())
        time.sleep(draw.uniform(0, 0.6 * takes))
        if process.poll() is None:
            tried += 1
            process.kill()
            continue
        assert process.wait().returncode == 0
        assert end(output) == expected
        ends += 1
        output = tmp_path / f"killed{ends}"
    done = forked.run(words(output), environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert end(output) == expected
    assert not list(output.rglob("*.tmp"))
    print(f"{job.__name__}: killed {tried} times, {ends + 1} of {ends + 1} ends equal")


# ---------------------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    run_to_end(make_features(place / "data"), place / "run", "train.epochs=2")
    return place / "run"


def damaged(content: bytes, how: str, place: int, draw: random.Random) -> bytes:
    """Cut at, or with one bit flipped at, the `place`-th of PLACES places that lie evenly over all of it."""
    at = min(len(content.rstrip()) - 1, (place * len(content) + draw.randrange(len(content))) // PLACES)
    if how == "cut":
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("name", ["state.json", "rank-00000.safetensors"])
def test_a_checkpoint_damaged_at_any_place_is_never_gone_on_from(name: str, how: str, trained: Path) -> None:
    """The one before is taken, which is whole; or, where a flipped bit makes another version, a sentence says so."""
    newest = latest(trained)
    assert newest is not None
    content, draw, passed, said = (newest / name).read_bytes(), random.Random(how), 0, 0
    for place in range(PLACES):
        (newest / name).write_bytes(damaged(content, how, place, draw))
        try:
            found = latest(trained)
            assert found is not None
            assert found < newest
            read_checkpoint(found)
            passed += 1
        except BadInput:
            said += 1
    (newest / name).write_bytes(content)
    assert latest(trained) == newest
    assert said <= 2
    print(f"{name} {how}: {PLACES} tried, {passed} passed over, {said} said")


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "config.yaml"])
def test_a_model_damaged_at_any_place_is_never_read(name: str, how: str, trained: Path) -> None:
    path, draw = trained / "best" / name, random.Random(how)
    content = path.read_bytes()
    for place in range(PLACES):
        path.write_bytes(damaged(content, how, place, draw))
        with pytest.raises(BadInput):
            read_model(trained)
    path.write_bytes(content)
    read_model(trained)
    print(f"best/{name} {how}: {PLACES} tried, {PLACES} refused")


# ---------------------------------------------------------------------------------------------- a full disk

SIZES = 20
needs_root = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="mounting a tmpfs needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    while os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, size: int, *options: str) -> None:
    where = ["-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
    subprocess.run(["mount", "-t", "tmpfs", *where], check=True)


@needs_root
@pytest.mark.parametrize("job", [training, build, embed], ids=["training", "build", "embed"])
def test_a_disk_that_is_full_at_any_time_is_said_and_loses_nothing(
    job: Callable[[Path], Callable[[Path], list[str]]], disk: Path, tmp_path: Path
) -> None:
    """With room for 1/20, 2/20, ... of the whole; with more room the same command then ends like the undisturbed."""
    words = job(tmp_path)
    assert forked.run(words(tmp_path / "whole"), environment()).returncode == 0
    end = state_of_run if job is training else files_below
    expected, tried, refused = end(tmp_path / "whole"), 0, 0
    whole = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "whole").rglob("*"))
    for part in range(1, SIZES + 1):
        mount(disk, max(whole * part // SIZES, 8192))
        done = forked.run(words(disk / "output"), environment())
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 * len(errors), done.stderr[-3000:]
        assert len(errors) <= 1
        assert "Traceback" not in done.stderr
        assert not list(disk.rglob("*.tmp"))
        mount(disk, 4 * whole + (1 << 24), "remount")
        done = forked.run(words(disk / "output"), environment())
        assert done.returncode == 0, done.stderr[-3000:]
        assert end(disk / "output") == expected
        subprocess.run(["umount", str(disk)], check=True)
        tried, refused = tried + 1, refused + len(errors)
    print(f"{job.__name__}: {tried} sizes, {refused} said in one sentence, {tried} ends equal")
