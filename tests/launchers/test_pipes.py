"""A named pipe in the place of a file that a user names: refused in one sentence, not waited for. A configuration that
is read once may come by a pipe that the program was handed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.data.store import FileStore
from cmgan_dist.distributed.join import take_zero_config
from cmgan_dist.distributed.launch_config import launch_config
from cmgan_dist.errors import BadInput
from cmgan_dist.models.vocabulary import Vocabulary
from launchers import train
from shards import __main__ as shards
from tests.launchers.damage_cases import not_waited_for
from tests.toy import ROOT, call, environment, fill_folder, make_features, make_raw, picture, write_table
from tune.space import load_space

BUILD = ["--val", "0", "--test", "0", "--processes", "1"]


def run_shards(*words: object) -> tuple[int, str]:
    return call(lambda: shards.main([str(word) for word in words]))


def build(source: str, path: Path, *words: object) -> tuple[int, str]:
    own = [] if source == "flickr8k" else BUILD[:4]
    return run_shards("build", source, *words, "--output", path.parent / "out", "--processes", 1, *own)


def trained(path: Path, *words: str) -> tuple[int, str]:
    data = make_raw(path.parent / "data")
    given = ["--preset", "smoke", "--data", str(data), "--output", str(path.parent / "run"), "train.tracker=none"]
    return call(train.main, *given, "stream.global_batch=8", *words)


def flickr(path: Path) -> tuple[int, str]:
    for name in ("captions.tsv", "split_train.txt", "split_dev.txt", "split_test.txt"):
        if name != path.name:
            (path.parent / name).write_text("")
    return build("flickr8k", path, "--input", path.parent)


def features(path: Path, *words: str) -> tuple[int, str]:
    data = make_raw(path.parent / "data")
    return run_shards("features", data, "--output", path.parent / "out", "--processes", 1, *words)


def sentence(path: Path) -> tuple[int, str]:
    for name in ("modules.json", "config_sentence_transformers.json"):
        (path.parent / name).write_text("[]")
    return features(path, "--text-backbone", "sentence", "--text-weights", str(path.parent))


def raised(work: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(BadInput) as caught:
        work()
    return 2, f"error: {caught.value}"


def text_backbone(path: Path) -> list[str]:
    return ["model.image.name=test_efficientnet", "model.text.name=cnn", f"model.text.weights={path}"]


NAMED: dict[str, Callable[[Path], tuple[int, str]]] = {
    "table.jsonl": lambda path: build("table", path, path),
    "table.csv": lambda path: build("table", path, path),
    "table.parquet": lambda path: build("table", path, path),
    "table.arrow": lambda path: build("table", path, path),
    "captions_train.json": lambda path: build("coco", path, path, "--images", path.parent),
    "captions.tsv": flickr,
    "split_dev.txt": flickr,
    "images.tar": flickr,
    "classes.txt": lambda path: run_shards(
        "index", make_raw(path.parent / "data"), "--overwrite", "--processes", 1, "--classes", path
    ),
    "config.yaml": lambda path: call(train.main, "--config", str(path), "--dry-run"),
    "launch.yaml": lambda path: raised(lambda: launch_config(str(path))),
    "space.yaml": lambda path: raised(lambda: load_space(str(path))),
    "words.txt": lambda path: trained(path, *text_backbone(path)),
    "words.bin.gz": lambda path: trained(path, *text_backbone(path)),
    "vocabulary.json": lambda path: raised(lambda: Vocabulary.load(path)),
    "weights.pth": lambda path: features(path, "--image-backbone", "test_efficientnet", "--image-weights", str(path)),
    "tokenizer.json": sentence,
    "trial.json": lambda path: raised(lambda: FileStore(str(path.parent), "--output").read(path.name)),
    "trial.bin": lambda path: raised(lambda: FileStore(str(path.parent), "--output").sha256(path.name)),
    "trial.tar": lambda path: raised(lambda: FileStore(str(path.parent), "--output").fetch(path.name, path / "to")),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with not_waited_for(tmp_path / name, 30):
        code, said = NAMED[name](tmp_path / name)
    print(said)
    assert code == 2
    assert said.count("error: ") == 1
    assert str(tmp_path) in said


def test_a_pipe_for_deepspeed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "zero.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    with not_waited_for(tmp_path / "zero.json", 30), pytest.raises(BadInput, match=r"zero\.json cannot be used"):
        take_zero_config()


@pytest.mark.parametrize("name", ["starts-0000.npy", "splits-0000.npy", "pairs-0000.jsonl", "splits.json", "plan.json"])
def test_a_pipe_in_a_plan_is_not_waited_for(name: str, tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "text": f"text {i}"} for i in range(20)]
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    table, out = write_table(tmp_path / "t.jsonl", rows), tmp_path / "out"
    words = ["build", "table", table, "--output", out, *BUILD, "--shard-samples", 5, "--task"]
    assert run_shards(*words, "0/2") == (0, "")
    path = next(out.glob(f".plan-*/{name}"))
    path.unlink()
    os.mkfifo(path)
    with not_waited_for(path, 30):
        code, said = run_shards(*words, "1/2")
    if name == "plan.json":  # it is planned anew
        assert (code, said) == (0, "")
        return
    assert code == 2
    assert "remove that folder and start again" in said
    shutil.rmtree(path.parent)
    assert run_shards(*words, "1/2") == (0, "")


@pytest.mark.process
@pytest.mark.parametrize("way", ["/dev/stdin", "<(cat config.yaml)"])
def test_a_configuration_by_a_pipe_that_the_program_was_handed(way: str, tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    (tmp_path / "config.yaml").write_text(f"preset: smoke\ndata: {data}\noutput: {tmp_path / 'run'}\n")
    command = f"cat config.yaml | {sys.executable} {ROOT}/launchers/train.py --config {way} --dry-run"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "preset: smoke" in done.stdout


@pytest.mark.process
def test_names_of_classes_by_a_pipe_that_the_program_was_handed(tmp_path: Path) -> None:
    fill_folder(tmp_path / "raw", [f"{c}/{i}" for c in "ab" for i in range(4)])
    assert run_shards("build", "folder", tmp_path / "raw", "--output", tmp_path / "data", *BUILD) == (0, "")
    command = (
        f"{sys.executable} -m shards index {tmp_path / 'data'} --overwrite --processes 1 --classes <(printf 'x\\ny\\n')"
    )
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"x"' in (tmp_path / "data" / "manifest.json").read_text()
