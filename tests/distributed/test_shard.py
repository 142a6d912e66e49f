"""Sharded backbones train what DDP trains, in runs that can be resumed with and without."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import validate
from cmgan_dist.distributed.launch_config import launch_environment
from cmgan_dist.errors import BadInput
from tests.distributed.shard_worker import CASES
from tests.models.clip_cases import stored_clip
from tests.services import forked
from tests.toy import ROOT, environment, final_state, lines, run_workers

SLOW = pytest.mark.slow
FAST = ("options", "towers", "fp16")
SHORT = (*FAST, "transformers", "features")
"""Equality is tried over few steps in these, over 40 in the others."""


@pytest.mark.process
@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else SLOW) for case in CASES])
def test_sharded_equals_ddp_step_by_step_and_takes_over_its_checkpoints(case: str, tmp_path: Path) -> None:
    """Each process holds half, what is not finite is left out, and unequal numbers of evaluation batches end."""
    stored_clip(tmp_path)
    out = run_workers("shard_worker.py", 2, case, "4" if case in SHORT else "40", str(tmp_path))
    found = re.search(rf"{case}: sharded equals DDP on 2, (\d+) of (\d+) elements", out)
    assert found is not None
    assert int(found[1]) < 0.6 * int(found[2])


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("case", "processes", "steps"), [("options", 2, 40), ("towers", 2, 40), ("options", 4, 8)])
def test_sharded_equals_ddp_over_many_steps(case: str, processes: int, steps: int, tmp_path: Path) -> None:
    stored_clip(tmp_path)
    assert f"{case}: sharded equals DDP" in run_workers("shard_worker.py", processes, case, str(steps), str(tmp_path))


def sharded_words(data: Path, run: Path, *extra: str) -> list[str]:
    """launchers/train.py with preset raw, made small, whose image backbone and sentence CNN are trained."""
    sizes = ["model.hidden_dim=16", "model.common_dim=8", "model.discriminator_dim=12", "stream.global_batch=16"]
    sizes += ["train.save_every=1", "train.val_every=1", "train.tracker=none", "train.threads=1", "train.report=false"]
    sizes += ["model.image.name=test_efficientnet", "model.image.weights=", "model.image.image_size=32"]
    sizes += ["model.text.name=cnn", "model.text.weights=", "model.image.trainable=true", "train.keep=9"]
    words = [str(ROOT / "launchers" / "train.py"), "--preset", "raw", *sizes, "model.text.pools=sentence"]
    return [*words, "--data", str(data), "--output", str(run), *extra]


@pytest.mark.process
def test_a_run_goes_on_with_and_without_sharding_and_is_evaluated(
    raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    """On two processes sharded, on one and on two whole, sharded again: all as one that was never sharded."""
    data, run, plain = raw_data(), tmp_path / "run", tmp_path / "plain"
    turns = [(1, "true", 2), (2, "false", 1), (3, "true", 2), (4, "false", 2), (5, "true", 2)]
    for epochs, sharded, processes in turns:
        words = sharded_words(data, run, f"train.epochs={epochs}", f"train.shard_backbones={sharded}", "train.ema=.9")
        done = forked.run(words, environment(), processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("backbones sharded by FSDP2" in done.stderr) == (sharded == "true")
        assert ("resuming" in done.stderr) == (epochs > 1)
    evaluated = forked.run([str(ROOT / "launchers" / "evaluate.py"), str(run), "--split", "test"], environment(), 1)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    for epochs in range(1, 6):
        words = sharded_words(data, plain, f"train.epochs={epochs}", "train.ema=.9")
        done = forked.run(words, environment(), 1 if epochs == 2 else 2)
        assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(lines(run, "train"), lines(plain, "train"), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-3 * max(1, abs(a[k])) for k in a if k.startswith("loss/")), (a, b)
    expected, found = final_state(plain), final_state(run)
    assert {k: v.shape for k, v in expected.items()} == {k: v.shape for k, v in found.items()}
    assert all(torch.isfinite(v.float()).all() for v in found.values())


@pytest.mark.process
def test_sharding_under_deepspeed_is_refused(raw_data: Callable[..., Path], tmp_path: Path) -> None:
    zero = launch_environment(str(ROOT / "launchers" / "configs" / "zero2.yaml"))
    words = sharded_words(raw_data(), tmp_path / "run", "train.epochs=1", "train.shard_backbones=true")
    done = forked.run(words, {**environment(), **zero}, 2)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: train.shard_backbones is on, and DeepSpeed trains: leave DeepSpeed out" in done.stderr
    assert "Traceback" not in done.stderr


def test_sharding_needs_a_trained_backbone() -> None:
    config = Config()
    config.train.shard_backbones = True
    with pytest.raises(BadInput, match=r"no backbone is trained: set model\.image\.trainable or "):
        validate(config)
    config.model.image.trainable = True  # of features, which no backbone makes
    with pytest.raises(BadInput, match="no backbone is trained"):
        validate(config)
    config.model.image.name = "test_vit"
    validate(config)
    config.train.compile = True
    with pytest.raises(BadInput, match=r"train\.compile is on with train\.shard_backbones"):
        validate(config)
