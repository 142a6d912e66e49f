"""A data set has one process that writes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput
from shards.pack import LOCK
from tests.toy import build_folder, files_of, img2dataset, run_shards

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
def test_a_second_writer_is_told_who_is_the_first(raw: Path, tmp_path: Path) -> None:
    data, packed, new = img2dataset(tmp_path / "data"), tmp_path / "packed", tmp_path / "new"
    run_shards("index", data, "--processes", 1)
    build_folder(raw, packed)
    before = files_of(data)
    for command, folder in (
        (("build", "folder", raw, "--output", new), new),
        (("split", data, "--output", new, "--val", 0.5), new),
        (("index", data, "--overwrite"), data),
    ):
        with owned(folder), pytest.raises(BadInput, match=f"{folder} is in use by process"):
            run_shards(*command, "--processes", 1)
    assert files_of(data) == before
    build_folder(raw, new)
    assert files_of(new) == files_of(packed)
