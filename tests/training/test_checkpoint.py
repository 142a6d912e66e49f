"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmgan_dist.errors import BadInput
from cmgan_dist.training.checkpoint import Checkpointer, Progress, latest, read_checkpoint, share_of


def tensors(position: int) -> dict[str, Tensor]:
    made = {f"generator/layer.{i}": torch.full((i + 1, 3), float(position + i)) for i in range(5)}
    return made | {"optimizer/generator/layer.0/step": torch.tensor(7.0), "d/flag": torch.tensor([True, False])}


def write(run: Path, *positions: int, keep: int = 3) -> None:
    checkpointer = Checkpointer(run, keep)
    for position in positions:
        checkpointer.save(Progress(position, 0.5, position), tensors(position))
    checkpointer.wait()


def position_of(run: Path) -> int:
    found = latest(run)
    assert found is not None
    progress, read = read_checkpoint(found)
    expected = tensors(progress.position)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[k], expected[k]) and read[k].dtype == expected[k].dtype for k in expected)
    return progress.position


def test_there_and_back_keeping_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 64, 128, 192, keep=2)
    found = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert found == ["samples-000000000128", "samples-000000000192"]
    assert position_of(tmp_path) == 192
    assert latest(tmp_path / "none") is None


def test_what_is_saved_may_change_at_once(tmp_path: Path) -> None:
    checkpointer, live = Checkpointer(tmp_path, 3), tensors(64)
    checkpointer.save(Progress(64), live)
    for value in live.values():
        value.zero_()
    checkpointer.wait()
    assert position_of(tmp_path) == 64


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_a_checkpoint_damaged_anywhere_is_passed_over(damage: str, tmp_path: Path) -> None:
    """Each file in turn, at random places."""
    draw = random.Random(damage)
    for name in ("__0_0.distcp", ".metadata", "state.json"):
        for trial in range(4):
            run = tmp_path / f"{name}-{trial}"
            write(run, 64, 128)
            path = run / "checkpoints" / "samples-000000000128" / name
            data = bytearray(path.read_bytes())
            at = draw.randrange(len(data))
            if damage == "remove":
                path.unlink()
            elif damage == "flip":
                data[at] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            else:
                path.write_bytes(data[: at if damage == "cut" else 0])
            if name == "state.json" and damage == "flip":  # it has no checksum: the tensors are whole either way
                continue
            assert position_of(run) == 64, (name, at)


def test_a_half_written_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 64)
    (tmp_path / "checkpoints" / ".samples-000000000128.tmp").mkdir()
    assert position_of(tmp_path) == 64
    write(tmp_path, 192)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("step", ["tensors", "state", "rename"])
def test_a_full_disk_is_said_and_leaves_the_one_before(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 64)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {
        "tensors": "torch.distributed.checkpoint.filesystem._write_item",
        "state": "cmgan_dist.training.checkpoint.write_atomic",
        "rename": "os.rename",
    }
    with monkeypatch.context() as patch:
        patch.setattr(where[step], full)
        checkpointer = Checkpointer(tmp_path, 3)
        checkpointer.save(Progress(128), tensors(128))
        with pytest.raises(BadInput, match=r"could not be written .*No space left.*free space"):
            checkpointer.wait()
    assert position_of(tmp_path) == 64
    assert os.listdir(tmp_path / "checkpoints") == ["samples-000000000064"]
    checkpointer.save(Progress(128), tensors(128))  # there is space again
    checkpointer.wait()
    assert position_of(tmp_path) == 128


def test_processes_share_the_tensors_evenly() -> None:
    sizes = {f"t{i}": torch.zeros(n) for i, n in enumerate([100, 90, 50, 40, 10, 10, 1])}
    parts = [share_of(sizes, rank, 3) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name].numel() for name in part) for part in parts]
    assert max(loads) - min(loads) <= 11
