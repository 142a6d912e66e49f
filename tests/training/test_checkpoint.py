"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmgan_dist.distributed.join import is_lost_process, reason_of
from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json, sealed_json, sha256_of
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
    for name in ("rank-00000.safetensors", "state.json"):
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
                if b'"version": 1,' not in data and name == "state.json":  # said, and nothing is passed over
                    continue
                path.write_bytes(data)
            else:
                path.write_bytes(data[: at if damage == "cut" else 0])
            assert position_of(run) == 64, (name, at)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("samples-*"))[-1]


def reseal(path: Path, **fields: object) -> None:
    """state.json with other fields and the right checksum."""
    record = parse_json(path.read_bytes())
    del record["sha256"]
    path.write_text(sealed_json(record | fields))


@pytest.mark.parametrize("digit", range(9))
def test_a_changed_number_of_the_state_is_found(digit: int, tmp_path: Path) -> None:
    write(tmp_path, 64, 128)
    path = newest(tmp_path) / "state.json"
    text = path.read_text()
    at = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1] not in "0123456789"][1:10][digit]
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    assert position_of(tmp_path) == 64


def test_checkpoints_of_which_none_can_be_used_are_not_taken_for_none(tmp_path: Path) -> None:
    write(tmp_path, 64, 128)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    with pytest.raises(BadInput, match=r"none of the 2 checkpoints .*samples-000000000128: .*--resume never"):
        latest(tmp_path)


def test_a_checkpoint_that_may_be_whole_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a later version, or one that the system does not give: following the advice leads to the one before."""
    write(tmp_path, 64, 128)
    reseal(newest(tmp_path) / "state.json", version=2)
    with pytest.raises(BadInput, match=r"has version 2, this program reads 1: .*move it away"):
        latest(tmp_path)
    reseal(newest(tmp_path) / "state.json", version=1)

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("cmgan_dist.training.checkpoint.sha256_of", denied)
        with pytest.raises(BadInput, match=r"cannot be read .Permission denied.: .*move it away"):
            latest(tmp_path)
    newest(tmp_path).rename(tmp_path / "away")
    assert position_of(tmp_path) == 64


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(BadInput, match=r"checkpoints cannot be read .Not a directory.: make it a readable folder"):
        latest(tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(BadInput, match="is a link that leads nowhere: mount what it leads to"):
        latest(tmp_path)


def test_only_names_of_digits_are_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 64, 128, keep=2)
    first = tmp_path / "checkpoints" / "samples-000000000064"
    for name in ("samples-best", "samples-", "samples-000000000064.old", "samples-000000000999"):
        shutil.copytree(first, first.with_name(name))  # the last is of sample 64, whatever its name says
    assert position_of(tmp_path) == 128
    write(tmp_path, 192, keep=1)
    assert {"samples-best", "samples-000000000064.old"} <= set(os.listdir(tmp_path / "checkpoints"))
    assert position_of(tmp_path) == 192


def test_one_that_was_just_written_stays_whatever_lies_behind_it(tmp_path: Path) -> None:
    write(tmp_path, 64, 256, 512)
    for behind in (256, 512):
        (tmp_path / "checkpoints" / f"samples-{behind:012d}" / "state.json").unlink()
    write(tmp_path, 128, keep=1)
    assert position_of(tmp_path) == 128


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [".metadata", "state.json", "rank-00000.safetensors", "__0_0.distcp", "data.pkl"])
def test_no_pickle_of_a_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    write(tmp_path, 64, 128)
    path, trap = newest(tmp_path) / name, tmp_path / "code has run"
    path.write_bytes(pickle.dumps(Trap(trap)))
    if name.startswith("rank"):
        reseal(path.with_name("state.json"), files={name: sha256_of(path)})
        found = latest(tmp_path)
        assert found is not None
        with pytest.raises(BadInput, match="cannot be read"):
            read_checkpoint(found)
    else:
        assert position_of(tmp_path) == (64 if name == "state.json" else 128)
    assert not trap.exists()


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
        "tensors": "cmgan_dist.training.checkpoint.save_file",
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


def test_a_process_that_is_lost_while_a_checkpoint_is_written_is_no_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[/gloo/pair.cc:1] Connection closed by peer. This is typically caused by a crash")

    monkeypatch.setattr("torch.distributed.all_gather_object", gone)
    checkpointer = Checkpointer(tmp_path, 3, world=2)
    checkpointer.save(Progress(64), tensors(64))
    with pytest.raises(RuntimeError) as lost:
        checkpointer.wait()
    assert is_lost_process(lost.value)
    assert reason_of(lost.value) == "Connection closed by peer"
    assert latest(tmp_path) is None


def test_processes_share_the_tensors_evenly() -> None:
    sizes = {f"t{i}": torch.zeros(n) for i, n in enumerate([100, 90, 50, 40, 10, 10, 1])}
    parts = [share_of(sizes, rank, 3) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name].numel() for name in part) for part in parts]
    assert max(loads) - min(loads) <= 11
