"""Whole runs in real processes: launch, resume after kill -9, signals, two processes against one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmgan_dist.models.saved import read_model
from tests.services import forked
from tests.toy import ROOT, command, environment, final_state, lines, run_to_end, train_words

pytestmark = pytest.mark.process

SLOW = pytest.mark.slow


def test_kill_9_and_resume_ends_bitwise_like_an_undisturbed_run(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = feature_data(splits={"train": [70, 26], "val": [24]}, captions=3)
    epochs = 18
    extra = [f"train.epochs={epochs}", "train.save_every=1", "train.val_every=3", "model.dropout=0.3", "train.ema=0.9"]
    run_to_end(data, tmp_path / "whole", *extra)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(data, killed, *extra), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((killed / "checkpoints").glob("samples-*"))) < 2:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = max(int(p.name.split("-")[1]) for p in (killed / "checkpoints").glob("samples-*"))
    assert before < epochs * 96
    run_to_end(data, killed, *extra)
    a, b = final_state(tmp_path / "whole"), final_state(killed)
    assert a.keys() == b.keys()
    assert any(k.startswith("optimizer/d_text/") for k in a)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert lines(tmp_path / "whole", "train") == lines(killed, "train")
    assert lines(tmp_path / "whole", "val") == lines(killed, "val")
    best = [load_file(r / "best" / "model.safetensors") for r in (tmp_path / "whole", killed)]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])
    files = [(r / "best" / "model.safetensors").read_bytes() for r in (tmp_path / "whole", killed)]
    assert files[0] == files[1]


def test_a_finished_run_says_so_and_another_config_is_refused(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, run = feature_data(), tmp_path / "run"
    run_to_end(data, run, "train.epochs=1")
    assert not (run / "report.html").exists()
    stamp = (run / "best" / "model.safetensors").stat().st_mtime_ns
    assert "is done" in run_to_end(data, run, "train.epochs=1").stderr
    assert (run / "best" / "model.safetensors").stat().st_mtime_ns == stamp
    refused = run_to_end(data, run, "train.epochs=1", "model.common_dim=32", expect=2)
    assert "was trained with model.common_dim 64, not 32" in refused.stderr
    run_to_end(data, run, "--resume", "never", "model.common_dim=32", "train.report=true")
    assert (run / "earlier-1" / "best" / "model.safetensors").exists()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints", "best", "report.html"):
        assert (run / name).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_exits_with_85(number: int, feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data, run = feature_data(), tmp_path / "run"
    extra = ["train.epochs=5000", "train.val_every=0", "train.save_every=5000"]
    process = forked.Forked(train_words(data, run, *extra), environment())
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    done = process.wait(60)
    assert done.returncode == 85, done.stderr
    assert "saved at sample" in done.stderr
    assert len(list((run / "checkpoints").glob("samples-*"))) == 1


PARTS = {
    "reference sampling": ["stream.sampling=balanced"],
    "streamed, all terms": ["loss.contrastive=1.0", "loss.class_contrastive=0.5", "loss.mismatch=conditional"],
    "joint, workers": ["optim.update=joint", "stream.workers=2", "loss.contrastive=1.0"],
}


@pytest.mark.parametrize("part", [pytest.param(p, marks=SLOW if p == "streamed, all terms" else ()) for p in PARTS])
def test_two_processes_equal_one(part: str, feature_data: Callable[..., Path], tmp_path: Path) -> None:
    """The same global batches, gradients and statistics; fp32 sums in another order."""
    data = feature_data(label_kind="single")
    extra = [*PARTS[part], "train.epochs=1", "train.val_every=1", "optim.generator_steps=2"]
    run_to_end(data, tmp_path / "one", *extra)
    run_to_end(data, tmp_path / "two", *extra, processes=2)
    one, two = lines(tmp_path / "one", "train"), lines(tmp_path / "two", "train")
    assert [x["samples"] for x in one] == [x["samples"] for x in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if name.startswith("loss/"):
                assert abs(a[name] - b[name]) <= 2e-3 * max(1, abs(a[name])), (name, a[name], b[name])
    first = [k for k in one[0] if k.startswith("loss/D")]
    assert max(abs(one[0][k] - two[0][k]) for k in first) < 1e-5


def test_two_processes_without_labels_and_with_multi_labels(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    for kind in ("none", "multi"):
        data = feature_data(name=kind, label_kind=kind, captions=2)
        run_to_end(data, tmp_path / f"run-{kind}", "loss.contrastive=1.0", "train.epochs=1", processes=2)
        score = lines(tmp_path / f"run-{kind}", "val")[-1]
        assert ("map/mean" in score) == (kind == "multi")


def test_two_processes_get_one_sentence(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    words = command(feature_data(), tmp_path / "run", "stream.train_split=nope", processes=2, accelerate=True)
    done = forked.run(words[1:], environment(), timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("has no split 'nope'") == 1


def test_what_one_process_alone_finds_is_said(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    """Bad samples lie in the windows of some process only: the others' broken connections must not be all one sees."""
    data = feature_data(splits={"train": [60, 60], "val": [24]})
    path = data / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])
    done = forked.run(train_words(data, tmp_path / "run", "train.epochs=40"), environment(), processes=2)
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "the shard is truncated at byte" in done.stderr


def test_bf16_trains(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    run_to_end(feature_data(), tmp_path / "run", "train.precision=bf16", "train.epochs=4")
    assert lines(tmp_path / "run", "val")[-1]["map/mean"] > 0.4


@pytest.mark.parametrize(
    ("trainable", "processes"),
    [(False, 1), (True, 2), pytest.param(True, 1, marks=SLOW), pytest.param(False, 2, marks=SLOW)],
)
def test_pictures_and_texts_end_to_end(
    trainable: bool, processes: int, raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    """Text CNN from its own vocabulary, a timm model frozen or trained, decoding workers; then evaluated."""
    data, run = raw_data(), tmp_path / "run"
    extra = ["model.image.name=resnet18", "model.image.image_size=32", "model.text.name=cnn", "stream.workers=2"]
    run_to_end(data, run, *extra, f"model.image.trainable={trainable}", processes=processes)
    done = forked.run([str(ROOT / "launchers" / "evaluate.py"), str(run), "--json"], environment())
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["metrics"]["texts"] > record["metrics"]["images"] == 16
    assert {"map/image_to_text", "map/text_to_all", "recall/image_to_text@5"} <= record["metrics"].keys()
    assert {"CCA", "chance"} <= record["baselines"].keys()
    assert "<img" in (run / "report.html").read_text()
    keys = load_file(run / "best" / "model.safetensors").keys()
    assert any(k.startswith("image_backbone.") for k in keys)  # frozen, its random weights come from nowhere else
    assert any(k.startswith("text_backbone.") for k in keys)


def test_a_mixture_trains_alike_on_one_and_two_processes(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    data = feature_data(name="a,with a comma")
    extra = ["--data", str(feature_data(name="b", seed=1)), "stream.weights=0.8,0.2", "train.epochs=1"]
    for processes in (1, 2):
        run_to_end(data, tmp_path / str(processes), *extra, processes=processes)
    one, two = lines(tmp_path / "1", "train"), lines(tmp_path / "2", "train")
    for a, b in zip(one[:4], two[:4], strict=True):
        assert all(abs(a[k] - b[k]) < 1e-3 for k in a if k.startswith("loss/"))
    other = feature_data(name="c", classes=4)
    refused = run_to_end(data, tmp_path / "3", "--data", str(other), expect=2)
    assert "cannot be mixed, as their classes are" in refused.stderr


@SLOW
def test_compiled_networks_train_what_eager_ones_do(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    """On one process and on two, where DDP wraps what is compiled."""
    data = feature_data()
    extra = ["train.epochs=2", "optim.generator_lr=1e-4", "optim.discriminator_lr=1e-4"]
    run_to_end(data, tmp_path / "eager", *extra)
    eager = lines(tmp_path / "eager", "train")
    for processes in (1, 2):
        run = tmp_path / f"compiled-{processes}"
        run_to_end(data, run, *extra, "train.compile=true", processes=processes)
        for a, b in zip(lines(run, "train"), eager, strict=True):
            assert all(abs(a[k] - b[k]) < 1e-3 * max(1, abs(b[k])) for k in b if k.startswith("loss/")), (a, b)


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_best_model_that_is_gone_is_made_again_by_the_next_start(
    damage: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, run = feature_data(), tmp_path / "run"
    run_to_end(data, run, "train.epochs=2")
    model = run / "best" / "model.safetensors"
    if damage == "gone":
        shutil.rmtree(run / "best")
    else:
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    done = run_to_end(data, run, "train.epochs=2")
    assert "is kept there again" in " ".join(done.stderr.split())
    assert read_model(run).scoring.spec.asked
