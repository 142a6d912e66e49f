"""What sentences on configurations of accelerate and DeepSpeed say to do leads out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmgan_dist.distributed.join import take_zero_config
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
