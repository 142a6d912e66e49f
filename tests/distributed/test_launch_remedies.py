"""What sentences on configurations of accelerate and DeepSpeed say to do leads out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmgan_dist.distributed.join import say_unused, take_zero_config
from cmgan_dist.distributed.launch import main
from cmgan_dist.distributed.launch_config import launch_config
from cmgan_dist.errors import BadInput

LAUNCH = [
    ("mixed_precision: 'no'", "has no distributed_type", ["distributed_type: MULTI_GPU"]),
    ("distributed_type: FSDP", "asks for FSDP: train without it", ["distributed_type: MULTI_GPU"]),
    (
        "distributed_type: XLA",
        "set it to DEEPSPEED or MULTI_GPU",
        ["distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU"],
    ),
    (
        "{distributed_type: DEEPSPEED, deepspeed_config: 3}",
        "a deepspeed_config that is no mapping",
        ["{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 2}}"],
    ),
    (
        "{distributed_type: MULTI_GPU, deepspeed_config: {zero_stage: 2}}",
        "set that to DEEPSPEED, or drop it",
        ["{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 2}}", "distributed_type: MULTI_GPU"],
    ),
    (
        "{distributed_type: MULTI_GPU, fsdp_config: {a: 1}}",
        "has fsdp_config, which is not used: drop it",
        ["distributed_type: MULTI_GPU"],
    ),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), LAUNCH)
def test_a_configuration_of_accelerate(wrong: str, sentence: str, right: list[str], tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(wrong)
    with pytest.raises(BadInput, match=sentence):
        launch_config(str(path))
    for text in right:
        path.write_text(text)
        launch_config(str(path))


def zero(stage: int, **more: object) -> dict[str, object]:
    return {"zero_optimization": {"stage": stage, **more}}


ZERO = [
    (zero(0), "set it to 1 or 2", [zero(1), zero(2)]),
    (zero(3), "set it to 1 or 2", [zero(1), zero(2)]),
    ({}, r"give a JSON file with zero_optimization\.stage", [zero(1)]),
    (zero(2) | {"amp": {"enabled": True}}, "has 'amp', which is not used here: drop it", [zero(2)]),
    (
        zero(2, offload_optimizer={"device": "nvme"}),
        "set offload_optimizer.s device to cpu or none",
        [zero(2, offload_optimizer={"device": "cpu"}), zero(2, offload_optimizer={"device": "none"})],
    ),
    (zero(2) | {"fp16": 3}, "has a 'fp16' that is no mapping: drop it", [zero(2)]),
    (zero(2, offload_param={"device": "cpu"}), "offload_param, which stages 1 and 2 do not heed: drop it", [zero(2)]),
    (zero(2, zero_quantized_weights=True), "zero_quantized_weights, which .*: drop it", [zero(2)]),
    (zero(1, round_robin_gradients=True), "round_robin_gradients, with which .*: drop it", [zero(1)]),
    (zero(1, legacy_stage1=True), "legacy_stage1, which DeepSpeed no longer has: drop it", [zero(1)]),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), ZERO)
def test_a_configuration_of_deepspeed(
    wrong: dict[str, object],
    sentence: str,
    right: list[dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "zero.json"

    def taken(config: dict[str, object]) -> object:
        path.write_text(json.dumps(config))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        return take_zero_config()

    with pytest.raises(BadInput, match=sentence):
        taken(wrong)
    for config in right:
        assert taken(config) == config


def test_a_stage_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(stage: str) -> object:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        return take_zero_config()

    with pytest.raises(BadInput, match="zero_stage is 'two': set it to 1 or 2"):
        taken("two")
    assert [taken(stage) for stage in ("1", "2")] == [zero(1), zero(2)]


@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM"])
def test_another_way_to_divide_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(BadInput, match=f"accelerate asks for {name}, which is not used: train without, by"):
        say_unused("no")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    say_unused("no")


def test_a_flag_without_its_value_and_a_count_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="Unsupported nproc_per_node value: many: see torchrun --help"):
        main(["--nproc_per_node", "many", "train.py"])
    started: list[str] = []
    monkeypatch.setattr("torch.distributed.run.run", lambda options: started.append(options.nproc_per_node))
    path = tmp_path / "launch.yaml"
    path.write_text("{distributed_type: MULTI_GPU, num_processes: 3}")
    flag, train = "--config_file", "train.py"
    with pytest.raises(BadInput, match=f"{flag} has no value: write {flag} VALUE"):
        main([flag])
    with pytest.raises(BadInput, match="has num_processes 3: say it as --nproc_per_node, a machine's share"):
        main([flag, str(path), train])
    assert main([flag, str(path), "--nproc_per_node", "3", train]) == 0
    assert started == ["3"]
