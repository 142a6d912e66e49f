"""DeepSpeed ZeRO-1 and ZeRO-2 train what DDP trains."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cmgan_dist.config.presets import PRESETS
from cmgan_dist.distributed.join import take_zero_config
from cmgan_dist.distributed.launch_config import launch_environment
from cmgan_dist.errors import BadInput
from tests.distributed.zero_worker import CASES, STAGES
from tests.services import forked
from tests.toy import ROOT, environment, final_state, lines, run_workers, train_words

pytestmark = pytest.mark.process

SLOW = pytest.mark.slow
FAST = {("all options", 2), ("trained backbone", 2), ("wgan-gp", 1)}
"""Equality is tried over few steps in these, over 40 in the others."""


def launch(
    data: Path, run: Path, config: str, *extra: str, processes: int = 2, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """launchers/train.py with launchers/configs/CONFIG; `fresh`: by `accelerate launch --config_file`, as a user would.

    Forked it has the environment that `accelerate launch` gives (tests/slurm/test_node.py compares the two)."""
    file, words = str(ROOT / "launchers" / "configs" / config), train_words(data, run, *extra)
    if not fresh:
        return forked.run(words, {**environment(), **launch_environment(file)}, processes, timeout=400)
    command = ["-m", "accelerate.commands.launch", "--config_file", file]
    return forked.run([*command, "--num_processes", str(processes), *words], environment(), timeout=400)


@pytest.mark.parametrize(
    ("case", "processes"),
    [pytest.param(case, n, marks=() if (case, n) in FAST else SLOW) for case in CASES for n in (1, 2)],
)
def test_zero_equals_ddp_step_by_step_and_takes_over_its_checkpoints(case: str, processes: int) -> None:
    out = run_workers("zero_worker.py", processes, case, "6" if (case, processes) in FAST else "40")
    for stage in STAGES:
        assert f"{case}: {stage} equals DDP on {processes}" in out


def test_steps_are_left_out_and_begin_anew_as_under_ddp() -> None:
    out = run_workers("zero_steps_worker.py", 2)
    for stage in STAGES:
        for check in ("overflow", "not_finite", "begin_anew", "its_share"):
            assert re.search(rf"{stage}: \w*{check}\w* on 2", out), (stage, check)


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=() if name in ("reference", "paper") else SLOW) for name in PRESETS],
)
def test_every_preset_trains_under_deepspeed(
    preset: str, feature_data: Callable[..., Path], raw_data: Callable[..., Path], tmp_path: Path
) -> None:
    """A small one of its kind, and it goes on from its checkpoint."""
    sizes = ["model.hidden_dim=16", "model.common_dim=8", "model.discriminator_dim=12", "stream.global_batch=16"]
    sizes += ["train.save_every=1", "train.val_every=1", "train.tracker=none", "train.threads=1", "train.report=false"]
    if preset == "raw":
        sizes += ["model.image.name=test_efficientnet", "model.image.weights=", "model.image.image_size=32"]
    data = raw_data() if preset == "raw" else feature_data(label_kind="none" if preset == "pairs" else "single")
    words = [str(ROOT / "launchers" / "train.py"), "--preset", preset, *sizes]
    words += ["--data", str(data), "--output", str(tmp_path / "run")]
    zero = launch_environment(str(ROOT / "launchers" / "configs" / "zero2.yaml"))
    for epochs in (1, 2):
        done = forked.run([*words, f"train.epochs={epochs}"], {**environment(), **zero})
        assert done.returncode == 0, done.stderr[-3000:]
        assert "DeepSpeed ZeRO-2" in done.stderr
    assert "resuming" in done.stderr


def test_the_shipped_configurations_and_a_checkpoint_from_one_to_another(
    feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    """ZeRO-2 with the optimiser on the CPU, killed halfway by its length; DDP on one process goes on."""
    data, run = feature_data(), tmp_path / "run"
    extra = ["train.epochs=4", "train.save_every=1", "train.keep=10"]
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


def test_settings_that_are_the_run_s_own_are_passed_over_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "d.json"

    def taken(**more: object) -> dict[str, object] | None:
        file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **more}))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        return take_zero_config()

    assert taken(train_batch_size=64, gradient_clipping=1e-6) == {"zero_optimization": {"stage": 1}}
    assert "gradient_clipping, train_batch_size passed over" in caplog.text
    refused: dict[str, object] = {"scheduler": {}, "amp": {}, "prescale_gradients": True, "fp16": True}
    refused |= {"elasticity": {}, "torch_autocast": {"enabled": True}, "zero_optimisation": {}, "data_types": {}}
    for key, value in refused.items():
        with pytest.raises(BadInput, match=f"has (a )?'{key}'"):
            taken(**{key: value})
    for key, value in {"offload_param": {"device": "cpu"}, "zero_quantized_gradients": True}.items():
        with pytest.raises(BadInput, match=f"has zero_optimization.{key}, which stages 1 and 2 do not heed"):
            taken(zero_optimization={"stage": 2, key: value})
    for key in ("round_robin_gradients", "legacy_stage1"):
        with pytest.raises(BadInput, match=f"has zero_optimization.{key}, w.*: drop it"):
            taken(zero_optimization={"stage": 2, key: True})
    with pytest.raises(BadInput, match="zenflow, which trains by another optimiser: drop it"):
        taken(zero_optimization={"stage": 2, "zenflow": {"topk_ratio": 0.1}})
    with pytest.raises(
        BadInput, match="offloads the optimizer to 'nvme': set offload_optimizer's device to cpu or none"
    ):
        taken(zero_optimization={"stage": 2, "offload_optimizer": {"device": "nvme"}})


def test_a_stage_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "two")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    with pytest.raises(BadInput, match="zero_stage is 'two': set it to 1 or 2"):
        take_zero_config()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme")
    with pytest.raises(BadInput, match="deepspeed_config offloads the optimizer to 'nvme'"):
        take_zero_config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": 3}, "asks for ZeRO stage 3: set it to 1 or 2"),
        ({"stage": "auto"}, "cannot be used"),
        ({"stage": 2.7}, "its stage is 2.7, no whole number"),
        ({"stage": 0}, "asks for ZeRO stage 0, which is DDP"),
        ({"stage": 2, "reduce_bucket_size": "large"}, "reduce_bucket_size 'large': "),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "configuration is refused: Assertion"),
        ({"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}}, ""),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_sentence(
    config: dict[str, object], message: str, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": config, "train_batch_size": "auto"}))
    text = (ROOT / "launchers" / "configs" / "zero1.yaml").read_text().split("deepspeed_config:")[0]
    (tmp_path / "zero.yaml").write_text(f"{text}deepspeed_config:\n  deepspeed_config_file: {file}\n")
    done = launch(feature_data(), tmp_path / "run", str(tmp_path / "zero.yaml"), processes=1)
    assert done.returncode == (2 if message else 0), done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr
