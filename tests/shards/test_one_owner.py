"""A data set has one process that writes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.lock import owning
from shards.output import LOCK, leave_work
from tests.toy import ROOT, build_folder, files_of, img2dataset, run_shards

OWNER = """
import sys, pathlib
from cmgan_dist.jobs.lock import owning
with owning(pathlib.Path(sys.argv[1]), sys.argv[2]):
    print("owns", flush=True)
    sys.stdin.read()
"""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Have another process own a folder."""
    command = [sys.executable, "-c", OWNER, str(folder), LOCK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"owns\n"
        yield
        process.communicate()


@pytest.mark.process
def test_a_second_writer_is_told_who_is_the_first(tmp_path: Path) -> None:
    data, new = img2dataset(tmp_path / "data"), tmp_path / "new"
    run_shards("index", data, "--processes", 1)
    before = files_of(data)
    for command, folder in (
        (("split", data, "--output", new, "--val", 0.5), new),
        (("index", data, "--overwrite"), data),
    ):
        with owned(folder), pytest.raises(BadInput, match=f"{folder} is in use by process"):
            run_shards(*command, "--processes", 1)
    assert files_of(data) == before


@pytest.mark.process
def test_a_second_build_waits_for_the_first(raw: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    build_folder(raw, tmp_path / "packed")
    command = [sys.executable, "-m", "shards", "build", "folder", str(raw), "--output", str(new)]
    command += ["--shard-samples", "8", "--processes", "1"]
    with owned(new):
        second = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert second.stderr is not None
        assert f"{new} is in use by process" in second.stderr.readline()
    with second:
        assert second.wait(120) == 0
    assert files_of(new) == files_of(tmp_path / "packed")


def test_the_lock_of_a_task_that_was_killed_keeps_no_plan(tmp_path: Path) -> None:
    lock, plan = tmp_path / ".build-1-of-2.lock", tmp_path / ".plan-0123"
    plan.mkdir()
    lock.touch()
    store = FileStore(str(tmp_path), "--output")
    with owning(tmp_path, "build-0-of-2"):
        leave_work(store, tmp_path, keep=False, is_new=False)
        assert (lock.exists(), plan.exists()) == (False, True)
    leave_work(store, tmp_path, keep=False, is_new=False)
    assert not plan.exists()
