"""A folder has one owner; whoever comes second is told who that is; an owner that is gone leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import lock
from cmgan_dist.jobs.lock import lock_name, owning
from tests.toy import FORK, wait_for

ELSEWHERE = {"host": "node7", "pid": 123, "machine": "another", "since": 0.0, "count": 3}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GRACE_S", 0.2)
    monkeypatch.setattr(lock, "STILL_S", 0.4)
    monkeypatch.setattr(lock, "BEAT_S", 0.05)


def own(folder: Path, then: Callable[[], Any]) -> Any:
    """A process that owns the folder; it has begun to when this returns."""

    def work() -> None:
        with owning(folder, "train"):
            then()

    process = FORK.Process(target=work, daemon=True)
    process.start()
    path = folder / lock_name("train")
    wait_for(lambda: path.exists() and path.stat().st_size > 0)
    return process


def test_the_second_is_told_who_the_first_is_and_other_work_goes_on(tmp_path: Path) -> None:
    first = own(tmp_path, signal.pause)
    with pytest.raises(BadInput, match=rf"is in use by process {first.pid} on {os.uname().nodename}: wait until"):
        owning(tmp_path, "train").__enter__()
    with owning(tmp_path, "evaluate"):
        pass
    assert first.is_alive()
    first.kill()
    first.join()


def test_the_folder_is_free_when_the_first_has_ended_or_was_killed(tmp_path: Path) -> None:
    first = own(tmp_path, lambda: time.sleep(0.2))
    first.join()
    first = own(tmp_path, signal.pause)
    first.kill()
    with owning(tmp_path, "train"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_child_does_not_keep_the_lock_of_a_parent_that_was_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def fork_and_pause() -> None:
        child = os.fork()
        if not child:
            pid.write_text(str(os.getpid()))
            signal.pause()
        signal.pause()

    parent = own(tmp_path, fork_and_pause)
    wait_for(lambda: pid.exists() and bool(pid.read_text()))
    parent.kill()
    parent.join()
    with owning(tmp_path, "train"):
        os.kill(int(pid.read_text()), 0)  # it lives
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_an_owner_on_another_machine_that_counts_on_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage whose locks do not reach over machines: only the count tells."""
    monkeypatch.setattr(lock, "STILL_S", 30.0)
    path = tmp_path / lock_name("train")

    def count() -> None:
        descriptor = os.open(path, os.O_WRONLY)
        for number in range(10_000):
            os.pwrite(descriptor, json.dumps(ELSEWHERE | {"count": number}).encode().ljust(256), 0)
            time.sleep(0.05)

    path.write_text(json.dumps(ELSEWHERE))

    process = FORK.Process(target=count, daemon=True)
    process.start()
    try:
        with pytest.raises(BadInput, match="is in use by process 123 on node7"):
            owning(tmp_path, "train").__enter__()
    finally:
        process.kill()
        process.join()


def test_an_owner_on_another_machine_whose_count_stands_still_is_taken_over_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / lock_name("train")).write_text(json.dumps(ELSEWHERE))
    with owning(tmp_path, "train"):
        assert json.loads((tmp_path / lock_name("train")).read_text())["pid"] == os.getpid()
    assert "was left by process 123 on node7" in caplog.text


def test_without_flock_the_process_named_in_the_file_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(lock.UNSUPPORTED[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owning(tmp_path, "train"), pytest.raises(BadInput, match=f"in use by process {os.getpid()}"):
        owning(tmp_path, "train").__enter__()
    first = own(tmp_path, signal.pause)
    first.kill()
    first.join()
    with owning(tmp_path, "train"):
        pass


def test_a_place_that_cannot_be_written_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(BadInput, match=r"cannot be written .*: name a folder that is yours"):
            owning(place, "train").__enter__()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_stands_in_the_place_of_a_lock_is_not_written_to(kind: str, tmp_path: Path) -> None:
    target, path = tmp_path / "letter", tmp_path / "run" / lock_name("train")
    target.write_text("dear")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(target), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(BadInput, match="run cannot be written"), owning(path.parent, "train"):
        pass
    assert target.read_text() == "dear"


@pytest.mark.parametrize("text", ['{"pid": "x", "machine": 1}', "[1]", "{", "", "\xff", '{"pid": null}'])
def test_a_record_of_an_owner_that_says_nothing_counts_for_none(text: str, tmp_path: Path) -> None:
    (tmp_path / lock_name("train")).write_text(text, "latin-1")
    with owning(tmp_path, "train"):
        pass
