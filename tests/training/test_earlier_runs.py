"""A start where a run has been: it goes on with its own data, says what changes, and never takes what it cannot read
for nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmgan_dist.config.load import LOSS_TERMS
from cmgan_dist.config.paths import settings
from cmgan_dist.files import sha256_of
from cmgan_dist.training.checkpoint import latest
from launchers import train
from tests.services import forked
from tests.toy import (
    SMALL,
    call,
    environment,
    final_state,
    index_tar,
    lines,
    make_features,
    npy,
    run_to_end,
    train_words,
    wait_for,
    write_manifest,
    write_tar,
)

pytestmark = pytest.mark.process
COSINE = ["optim.schedule=cosine", "train.val_every=1", "train.save_every=1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_features(tmp_path / "data")


def start(data: Path, run: Path, *extra: str) -> tuple[int, str]:
    return call(train.main, *SMALL, "--data", str(data), "--output", str(run), *extra)


def test_checkpoints_that_cannot_be_used_end_the_start_and_the_advice_leads_out(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(data, run)[0] == 0
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"new_field": 1}))
    best, metrics = (sha256_of(run / name) for name in ("best/model.safetensors", "metrics.jsonl"))
    code, error = start(data, run, "train.epochs=3")
    assert code == 2
    assert "none of the 2 checkpoints" in error
    assert (best, metrics) == tuple(sha256_of(run / name) for name in ("best/model.safetensors", "metrics.jsonl"))
    assert start(data, run, "--resume", "never") == (0, "")
    assert (run / "earlier-1" / "checkpoints").is_dir()
    assert sha256_of(run / "earlier-1" / "best" / "model.safetensors") == best


def test_other_data_of_the_same_size_is_refused_and_data_that_moved_is_not(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(data, run)[0] == 0
    code, error = start(make_features(tmp_path / "other", seed=1), run, "train.epochs=3")
    assert code == 2
    assert "was trained on other data (shards with other checksums): use the same data" in error
    assert start(data.rename(tmp_path / "moved"), run, "train.epochs=3") == (0, "")


def test_other_classes_and_another_validation_split_are_refused(data: Path, tmp_path: Path) -> None:
    run, manifest = tmp_path / "run", data / "manifest.json"
    assert start(data, run)[0] == 0
    whole = manifest.read_text()
    splits = json.loads(whole)["splits"]
    for change, said in (
        ({"classes": ["class 0", "class 2", "class 1"]}, "class 1 is 'class 1', not 'class 2'"),
        ({"label_kind": "multi"}, "label_kind single, not multi"),
        ({"splits": {"train": splits["train"], "val": splits["test"]}}, "a validation split with other checksums"),
    ):
        manifest.write_text(json.dumps(json.loads(whole) | change))
        code, error = start(data, run, "train.epochs=3")
        assert (code, f"was trained on other data ({said}" in error) == (2, True), error
    manifest.write_text(whole)
    assert start(data, run, "train.epochs=3") == (0, "")


def test_checkpoints_without_their_config_are_not_gone_on_from(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(data, run)[0] == 0
    (run / "config.yaml").unlink()
    code, error = start(data, run, "train.epochs=3")
    assert code == 2
    assert "has checkpoints and no config.yaml: restore it (best/config.yaml is a copy)" in error
    shutil.copy(run / "best" / "config.yaml", run)
    assert start(data, run, "train.epochs=3") == (0, "")


def test_a_model_whose_checkpoints_are_gone_is_set_aside(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(data, run)[0] == 0
    kept = {name: sha256_of(run / name) for name in ("best/model.safetensors", "metrics.jsonl")}
    shutil.rmtree(run / "checkpoints")
    assert start(data, run) == (0, "")
    assert {name: sha256_of(run / "earlier-1" / name) for name in kept} == kept
    assert start(data, run) == (0, "")
    assert not (run / "earlier-2").exists()


def test_a_finished_cosine_run_that_is_lengthened_says_that_its_rate_jumps(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "cmgan_dist"):
        assert start(data, run, *COSINE)[0] == 0
        assert start(data, run, *COSINE)[0] == 0
        assert "jumps" not in caplog.text
        assert start(data, run, *COSINE, "train.epochs=8")[0] == 0
    assert "by the cosine schedule the learning rate jumps from 0 to" in caplog.text


def test_an_output_that_holds_other_things_is_left_alone(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("dear")
    before = {path.name for path in data.iterdir()}
    for resume in ("auto", "never"):
        code, error = start(data, data, "--resume", resume)
        assert (code, "is a data set: name another folder" in error) == (2, True)
    code, error = start(data, other, "--resume", "never")
    assert (code, "holds what is no run (thesis.txt)" in error) == (2, True)
    assert start(data, other / "thesis.txt") == (
        2,
        f"error: --output {other / 'thesis.txt'} is a file: name another folder, which is made",
    )
    assert {path.name for path in data.iterdir()} == before
    assert (other / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("asked", ["eval.score=posterior", "eval.objective=class"])
def test_a_scoring_that_needs_labels_is_refused_before_the_work(asked: str, tmp_path: Path) -> None:
    pairs = make_features(tmp_path / "pairs", label_kind="none")
    code, error = start(pairs, tmp_path / "run", asked)
    assert (code, "but the data has no labels: set it to auto" in error) == (2, True)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("left", ["classification", "class_contrastive"])
def test_losses_that_all_need_labels_are_refused_before_the_work(left: str, tmp_path: Path) -> None:
    pairs = make_features(tmp_path / "pairs", label_kind="none")
    off = [f"loss.{name}=0" for name in LOSS_TERMS if name != left]
    code, error = start(pairs, tmp_path / "run", *off, f"loss.{left}=1")
    said = f"only loss.{left} trains the generator, but the data has no labels: set one of loss.intra, loss.inter, "
    assert (code, said in error) == (2, True), error
    assert start(pairs, tmp_path / "run", *off, f"loss.{left}=1", "loss.inter=1") == (0, "")


def test_of_two_runs_on_one_output_the_second_is_refused_and_the_first_goes_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = forked.Forked(
        train_words(data, run, "train.epochs=30", "train.val_every=0", "train.save_every=50"), environment()
    )
    wait_for((run / "metrics.jsonl").exists, 60)
    os.kill(first.pid, signal.SIGSTOP)  # it shall not end before the others have tried
    for resume in ("auto", "never"):
        code, error = start(data, run, "train.epochs=30", "--resume", resume)
        assert code == 2
        assert f"run is in use by process {first.pid} on {os.uname().nodename}" in error
    os.kill(first.pid, signal.SIGCONT)
    done = first.wait(200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(lines(run, "train")) == 30 * 96 // 16
    assert not list(run.glob(".*.lock"))


def test_features_too_large_for_fp16_are_named_and_the_advice_leads_out(tmp_path: Path) -> None:
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    infos = {}
    for split in ("train", "val"):
        members = []
        for i in range(32):
            for kind, dim in (("image", 12), ("text", 7)):
                members.append((f"{split}{i}.{kind}.npy", npy((1e5 * rng.normal(size=dim)).astype(np.float32))))
            members.append((f"{split}{i}.json", json.dumps({"label": i % 3}).encode()))
        write_tar(data / f"{split}-000000.tar", members)
        infos[split] = [index_tar(data / f"{split}-000000.tar")]
    kinds = {"image": "features", "image_dim": 12, "text": "features", "text_dim": 7}
    write_manifest(data, infos, label_kind="single", classes=["a", "b", "c"], **kinds)
    code, error = start(data, tmp_path / "run", "train.precision=fp16")
    assert code == 2
    assert "leave the range of fp16: go on with train.precision=bf16 or fp32" in error
    assert start(data, tmp_path / "run", "train.precision=fp32") == (0, "")
    found = latest(tmp_path / "run")
    assert found is not None
    assert found.name == "samples-000000000064"


def test_an_average_may_begin_and_end_where_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    run, last = tmp_path / "run", ["train.save_every=1", "train.select=last"]
    assert start(data, run, "train.epochs=1", *last) == (0, "")
    live = {k: v for k, v in final_state(run).items() if k.startswith("generator/")}
    assert start(data, run, "train.epochs=2", "train.ema=0.999999", *last) == (0, "")
    state = final_state(run)
    for name, before in live.items():  # the average has hardly left the generator that it began with
        torch.testing.assert_close(state[name.replace("generator/", "ema/", 1)], before, atol=1e-4, rtol=1e-4)
    assert not all(torch.equal(state[name], before) for name, before in live.items())
    assert start(data, run, "train.epochs=3", *last) == (0, "")
    state = final_state(run)
    assert not [name for name in state if name.startswith("ema/")]
    best = load_file(run / "best" / "model.safetensors")
    own = {name for name in best if not name.startswith("scoring/")}
    assert all(torch.equal(best[name], state[f"generator/{name}"]) for name in own)


OTHERS = {
    "stream.workers": 2, "stream.max_bad_share": 0.5, "stream.cache_gib": 1, "stream.retries": 1, "stream.timeout_s": 9,
    "optim.generator_lr": 1e-4, "optim.discriminator_lr": 1e-4, "optim.clip": 0.5, "train.precision": "bf16",
    "train.reduce_precision": "bf16", "train.ema": 0.9, "train.val_every": 1, "train.select": "last",
    "train.save_every": 1, "train.keep": 1, "train.log_every": 1, "train.timeout_s": 60, "train.trace": 1,
    "train.threads": 1, "train.report": "true", "train.tracker": "tensorboard", "eval.objective": "pair",
    "eval.score": "cosine", "eval.pair_head": "false", "eval.class_head": "false", "eval.bank": 0, "eval.batch": 7,
    "train.epochs": 3, "model.kernels": "torch",
}  # fmt: skip
ELSEWHERE = {"stream.cache", "train.shard_backbones", "train.compile", "preset", "data", "output"}
"""Settings that need another kind of data, a compiler or another place; each has a test where it is at home."""


def test_every_setting_that_may_change_may(data: Path, tmp_path: Path) -> None:
    may = {name for name, setting in settings().items() if setting.resumable}
    assert may - OTHERS.keys() - ELSEWHERE == set(), "which other value may it have?"
    assert start(data, tmp_path / "run", "train.epochs=2") == (0, "")
    changed = [f"{name}={value}" for name, value in OTHERS.items() if name in may]
    assert start(data, tmp_path / "run", *changed) == (0, "")
    assert lines(tmp_path / "run", "train")[-1]["epoch"] == 3


def test_steps_left_out_in_fp16_are_counted_over_all_starts(data: Path, tmp_path: Path) -> None:
    extra = [
        "train.precision=fp16",
        "train.save_every=1",
        "train.log_every=1",
        "train.epochs=4",
        "loss.classification=1000",
    ]
    run_to_end(data, tmp_path / "whole", *extra)
    run_to_end(data, tmp_path / "parts", *extra, "train.epochs=1")
    run_to_end(data, tmp_path / "parts", *extra)
    whole, parts = lines(tmp_path / "whole", "train"), lines(tmp_path / "parts", "train")
    assert whole == parts
    assert any(value for name, value in whole[-1].items() if name.startswith("skipped/")), "no step was left out"
