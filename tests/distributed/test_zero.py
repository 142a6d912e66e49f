"""DeepSpeed ZeRO-1 and ZeRO-2 train what DDP trains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.slurm.node import zero_environment
from tests.distributed.zero_worker import CASES, STAGES
from tests.services import forked
from tests.toy import ROOT, environment, final_state, lines, run_workers, train_words

pytestmark = pytest.mark.process

SLOW = pytest.mark.slow


def launch(
    data: Path, run: Path, config: str, *extra: str, processes: int = 2, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """launchers/train.py with launchers/configs/CONFIG; `fresh`: by `accelerate launch --config_file`, as a user would.

    Forked it has the environment that `accelerate launch` gives (tests/slurm/test_node.py compares the two)."""
    file, words = str(ROOT / "launchers" / "configs" / config), train_words(data, run, *extra)
    if not fresh:
        return forked.run(words, {**environment(), **zero_environment(file)}, processes, timeout=400)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    command += ["--num_processes", str(processes), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize(
    ("case", "processes"),
    [("all options", 2), pytest.param("all options", 1, marks=SLOW), pytest.param("bf16", 2, marks=SLOW)],
)
def test_zero_equals_ddp_step_by_step_and_takes_over_its_checkpoints(case: str, processes: int) -> None:
    assert case in CASES
    out = run_workers("zero_worker.py", processes, case)
    for stage in STAGES:
        assert f"{case}: {stage} equals DDP on {processes}" in out


def test_the_shipped_configurations_and_a_checkpoint_from_one_to_another(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    """ZeRO-2 with the optimiser on the CPU, killed halfway by its length; DDP on one process goes on."""
    data, run = feature_data(), tmp_path / "run"
    extra = ["optim.update=joint", "train.epochs=4", "train.save_every=1", "train.keep=10"]
    done = launch(data, run, "zero2_offload.yaml", *extra, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DeepSpeed ZeRO-2" in done.stderr
    plain = tmp_path / "plain"
    done = launch(data, plain, "ddp.yaml", *extra)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(lines(run, "train"), lines(plain, "train"), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-3 * max(1, abs(a[k])) for k in a if k.startswith("loss/")), (a, b)
    for folder in sorted((run / "checkpoints").iterdir())[2:]:  # back to half of the run, and on with DDP
        subprocess.run(["rm", "-r", str(folder)], check=True)
    done = launch(data, run, "ddp.yaml", *extra, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stderr
    expected, found = final_state(plain), final_state(run)
    assert expected.keys() == found.keys()
    for a, b in zip(lines(run, "train"), lines(plain, "train"), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-2 * max(1, abs(a[k])) for k in a if k.startswith("loss/"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("optim.update=alternate", "set optim.update=joint"),
        ("train.precision=fp16", "set train.precision to bf16"),
        ("loss.r1=1", "set loss.r1=0"),
    ],
)
def test_what_zero_would_train_wrong_is_refused(
    field: str, message: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    done = launch(feature_data(), tmp_path / "run", "zero1.yaml", "optim.update=joint", field, processes=1)
    assert done.returncode != 0
    assert message in done.stderr


def test_stage_3_is_refused(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    text = (ROOT / "launchers" / "configs" / "zero1.yaml").read_text().split("deepspeed_config:")[0]
    config = tmp_path / "zero3.yaml"
    config.write_text(f"{text}deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'zero3.json'}\n")
    done = launch(feature_data(), tmp_path / "run", str(config), "optim.update=joint", processes=1)
    assert done.returncode != 0
    assert "stage 3 is not supported" in done.stderr
