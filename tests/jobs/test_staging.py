"""Files that are not whole yet: who writes them, and when they may go."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cmgan_dist.jobs.staging import is_running, remove_leftovers, staging


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_no_two_stages_share_a_name_and_none_stays(tmp_path: Path) -> None:
    with staging(tmp_path) as one, staging(tmp_path) as two:
        assert one != two
        for folder in (one, two):
            assert folder.name.startswith(f".{socket.gethostname()}-{os.getpid()}-")

    def fail() -> None:
        with staging(tmp_path) as folder:
            (folder / "half").write_bytes(b"half")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert not list(tmp_path.iterdir())


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = ended_process()
    parent = os.getppid()
    names = [f".{host}-{dead}-abc_1.tmp", f".{host}-{parent}-abc_1.tmp", f".other-{host}-{dead}-abc_1.tmp", "mine.tmp"]
    for name in names:
        (tmp_path / "part" / name).mkdir(parents=True)
        (tmp_path / "part" / name / "tar").write_bytes(b"half")
        (tmp_path / "part" / name / f".{host}-{dead}-1f.tmp").write_bytes(b"half, in what is half")
    (tmp_path / "part" / f".{host}-{dead}-0f.tmp").write_bytes(b"half of a small file")
    with staging(tmp_path) as own:
        remove_leftovers(tmp_path)
        assert own.exists()
    assert {path.name for path in (tmp_path / "part").iterdir()} == set(names[1:])
    old = tmp_path / "part" / names[2]
    for path in (*old.iterdir(), old):
        os.utime(path, (0, 0))
    (old / "tar").write_bytes(b"half of what is still written")
    remove_leftovers(tmp_path)
    assert old.exists()
    for path in (*old.iterdir(), old):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in (tmp_path / "part").iterdir()} == {names[1], names[3]}, "a day is over"


def test_a_number_that_another_process_has_by_now_says_nothing(tmp_path: Path) -> None:
    """As in a container that is started again: what was left has this process's own number."""
    begun = psutil.Process().create_time()
    assert is_running(os.getpid(), time.time())
    assert is_running(os.getpid(), begun)
    assert not is_running(os.getpid(), begun - 3600)
    assert not is_running(ended_process(), time.time())
    left = [tmp_path / f".{socket.gethostname()}-{pid}-a.tmp" for pid in (os.getpid(), os.getppid())]
    for path in left:
        path.write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert all(path.exists() for path in left)
    for path in left:
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
