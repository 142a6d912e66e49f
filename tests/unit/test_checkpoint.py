"""Checkpoints are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmgan_dist.checkpoint import Checkpoint, Progress, check_shapes, load_best, load_latest, save_best, save_checkpoint
from cmgan_dist.errors import BadInput


def checkpoint(position: int) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.full((4, 3), float(position)))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return Checkpoint(Progress(position, 0.5, position), {"w": parameter.detach()}, {"g": optimizer.state_dict()})


def test_there_and_back_keeping_the_newest(tmp_path: Path) -> None:
    for position in (64, 128, 192):
        save_checkpoint(tmp_path, checkpoint(position), keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "samples-000000000128",
        "samples-000000000192",
    ]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.progress == Progress(192, 0.5, 192)
    assert torch.equal(found.tensors["w"], checkpoint(192).tensors["w"])
    assert torch.equal(found.optimizers["g"]["state"][0]["exp_avg"], torch.full((4, 3), 0.1))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(64), keep=3)
    path = save_checkpoint(tmp_path, checkpoint(128), keep=3) / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(
            data[:middle] if damage == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
    found = load_latest(tmp_path)
    assert found is not None
    assert found.progress.position == 64 or (damage == "flip" and name == "state.json")


def test_a_half_written_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(64), keep=3)
    (tmp_path / "checkpoints" / ".samples-000000000128.tmp").mkdir()
    found = load_latest(tmp_path)
    assert found is not None
    assert found.progress.position == 64
    save_checkpoint(tmp_path, checkpoint(128), keep=3)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_best_there_and_back_and_damaged(tmp_path: Path) -> None:
    save_best(tmp_path, {"w": torch.arange(3.0)}, Progress(640, 0.75, 640))
    tensors, metadata = load_best(tmp_path)
    assert tensors["w"].tolist() == [0, 1, 2]
    assert metadata["best_position"] == "640"
    path = tmp_path / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BadInput, match="cannot be read"):
        load_best(tmp_path)


def test_another_model_is_named() -> None:
    with pytest.raises(BadInput, match=r"another model: w is \[3\], expected \[4\]"):
        check_shapes({"w": torch.zeros(4)}, {"w": torch.zeros(3)}, "RUN")
    with pytest.raises(BadInput, match="another model: it has no v"):
        check_shapes({"v": torch.zeros(4)}, {"w": torch.zeros(3)}, "RUN")
