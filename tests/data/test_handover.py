"""A batch comes out of a worker whole, with room in /dev/shm or without, or the wait for it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil
import pytest
import torch

from cmgan_dist.config.fields import StreamConfig
from cmgan_dist.data import handover
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.handover import is_lost_worker, pack
from cmgan_dist.data.stream import Stream
from cmgan_dist.errors import BadInput
from tests.toy import ROOT, environment, make_batch, make_features, make_raw, train_words, wait_for

pytestmark = pytest.mark.process

WITHOUT_ROOM = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


WORKER = StreamConfig(global_batch=16, workers=1, timeout_s=0.01, retries=0)


def no_room(value: object) -> bytes:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("room", [True, False])
def test_a_batch_is_what_was_packed(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    if not room:
        monkeypatch.setattr(ForkingPickler, "dumps", no_room)
    packed = pack(batch)
    assert packed.shared == room
    found = packed.unpack()
    assert torch.equal(found.image, batch.image)
    assert isinstance(found.text, torch.Tensor)
    assert isinstance(batch.text, torch.Tensor)
    assert torch.equal(found.text, batch.text)
    assert found.labels is not None
    assert batch.labels is not None
    assert torch.equal(found.labels, batch.labels)
    assert (found.keys, found.size, found.bad) == (batch.keys, batch.size, batch.bad)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="mounting a small /dev/shm needs root")
def test_a_run_goes_on_where_shared_memory_is_full_and_says_so(tmp_path: Path) -> None:
    data = make_raw(tmp_path / "data", counts={"train": 64, "val": 16})
    words = train_words(data, tmp_path / "run", "stream.workers=2", "model.image.name=test_efficientnet")
    words += ["stream.global_batch=16", "model.text.name=cnn", "train.epochs=1", "model.image.image_size=224"]
    mount = ["unshare", "-m", "bash", "-c", WITHOUT_ROOM, "-"]
    command = [*mount, sys.executable, *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("/dev/shm has no room for batches") == 1


def take(batches: Iterator[Batch], count: int) -> None:
    for _ in range(count):
        next(batches)


def test_a_worker_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    batches = Stream(str(make_features(tmp_path / "data")), WORKER, seed=0).batches(0)
    take(batches, 1)
    wait_for(lambda: bool(psutil.Process().children()))
    psutil.Process().children()[-1].kill()
    with pytest.raises((RuntimeError, BadInput)) as caught:  # by the signal, or of the batch that it had
        take(batches, 100)
    assert isinstance(caught.value, BadInput) or is_lost_worker(caught.value)


def test_a_worker_that_gives_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmgan_dist.data.stream.STALLED_S", 1.0)
    monkeypatch.setattr("cmgan_dist.data.stream.LOOK_S", 1)
    monkeypatch.setattr(Stream, "read_step", lambda self, step, streams: time.sleep(60))
    batches = Stream(str(make_features(tmp_path / "data")), WORKER, seed=0).batches(0)
    with pytest.raises(RuntimeError) as caught:
        take(batches, 1)
    assert is_lost_worker(caught.value)


def test_a_batch_whose_worker_is_gone_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(payload: bytes) -> object:
        raise ConnectionRefusedError(111, "Connection refused")

    packed = pack(make_batch())
    monkeypatch.setattr(handover.pickle, "loads", gone)
    with pytest.raises(BadInput, match=r"a process that decodes samples is gone .*lower stream.workers"):
        packed.unpack()


def test_a_killed_worker_ends_a_run_with_one_sentence(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    words = train_words(data, tmp_path / "run", "stream.workers=1", "train.epochs=100000", "train.val_every=0")
    process = subprocess.Popen([sys.executable, *words], env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    own = psutil.Process(process.pid)
    while not own.children():
        assert process.poll() is None
        time.sleep(0.01)
    own.children()[0].kill()
    _, error = process.communicate(timeout=100)
    assert process.returncode == 2, error[-3000:]
    assert "Traceback" not in error
    assert "error: a process that decodes samples is gone" in error
