"""A cache's neighbours that hang: how long they are waited for, and what is said then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cmgan_dist.data import shared_file
from cmgan_dist.data.cache import CachedStore
from cmgan_dist.errors import BadInput
from tests.services.faulty_server import FaultyServer
from tests.toy import SHARD_BYTES, body_of, content_of, shard_of, wait_for


@pytest.fixture
def hold() -> Iterator[Callable[[Path], int]]:
    """hold(path): a stopped process, of which the number is returned, that keeps the lock on a file."""
    stopped = []

    def hold(path: Path) -> int:
        path.parent.mkdir(exist_ok=True)
        script = "import fcntl,os,signal,sys; f=open(sys.argv[1],'ab'); fcntl.flock(f,2); os.kill(os.getpid(),19)"
        process = subprocess.Popen([sys.executable, "-c", script, path])
        stopped.append(process)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        return process.pid

    yield hold
    for process in stopped:
        process.kill()
        process.wait()


def test_a_shard_that_a_stopped_process_keeps_ends_in_a_sentence_that_names_it(
    make: Callable[..., CachedStore], cache: Path, hold: Callable[[Path], int], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shared_file, "TOLD_AFTER_S", 0.05)
    store = make()
    store.patience_s = 0.3
    pid = hold(cache / f".part-{shard_of(1).sha256}")
    with pytest.raises(BadInput, match=rf"\.part-\S+ is kept by process {pid}, .*: end that process$"):
        store.open(shard_of(1))
    assert f"waiting for process {pid}, which keeps " in caplog.text
    assert content_of(store, shard_of(2)) == body_of(2)
    os.kill(pid, signal.SIGKILL)
    assert content_of(store, shard_of(1)) == body_of(1)


def test_whoever_writes_is_waited_for_beyond_any_bound(
    server: FaultyServer, make: Callable[..., CachedStore], cache: Path
) -> None:
    store = make()
    store.patience_s = 0.3
    part, body = cache / f".part-{shard_of(1).sha256}", body_of(1)
    with shared_file.locked(part, None) as file:
        waiter = threading.Thread(target=store.prefetch, args=[[shard_of(1)]])
        waiter.start()
        for at in range(10):
            os.pwrite(file, body[at * SHARD_BYTES // 10 : (at + 1) * SHARD_BYTES // 10], at * SHARD_BYTES // 10)
            time.sleep(0.1)
        part.rename(cache / f"{shard_of(1).sha256}.tar")
    assert content_of(store, shard_of(1)) == body
    waiter.join()
    wait_for(lambda: not store.background.pending)
    assert not server.requests


def test_a_manifest_that_a_stopped_process_keeps_is_fetched_without_the_copy(
    make: Callable[..., CachedStore], cache: Path, hold: Callable[[Path], int], caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.read("manifest.json")
    (copy,) = cache.glob(".manifest-*")
    os.utime(copy, (0, 0))
    pid = hold(copy)
    store.patience_s = 0.3
    assert store.read("manifest.json") == b'{"a": 1}'
    assert f"fetching without the copy: {copy} is kept by process {pid}" in caplog.text


@pytest.mark.parametrize("kept", [".lock", ".part-other"])
def test_room_that_a_stopped_process_keeps_ends_in_a_sentence_that_names_it(
    make: Callable[..., CachedStore], cache: Path, hold: Callable[[Path], int], kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("cmgan_dist.data.cache.COPY_FRESH_S", 0.1)
    store = make(cache_bytes=SHARD_BYTES + 1)
    store.patience_s = 0.3
    (cache / kept).write_bytes(b"x" * 2)
    pid = hold(cache / kept)
    with pytest.raises(BadInput, match=rf"{cache / kept} is kept by process {pid}, "):
        store.open(shard_of(1))
    assert not list(cache.glob(f".part-{shard_of(1).sha256}"))


def test_files_of_others_that_leave_no_room_are_told_of(make: Callable[..., CachedStore], cache: Path) -> None:
    store = make(cache_bytes=SHARD_BYTES + 10)
    (cache / "thesis.doc").write_bytes(b"x" * 11)
    with pytest.raises(BadInput, match=r"has 11 bytes in files that are no shards.* set stream\.cache_gib to 0\.\d+"):
        store.open(shard_of(1))
    (cache / "thesis.doc").unlink()
    assert content_of(store, shard_of(1)) == body_of(1)
