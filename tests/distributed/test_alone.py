"""The others wait for what the first process does alone as long as it is at it, and no longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.services import forked
from tests.toy import ROOT, SMALL, environment, make_features, run_workers

pytestmark = pytest.mark.process

SLOWED = """
import sys, time
sys.path.insert(0, {root!r})
from cmgan_dist.errors import run_main
from cmgan_dist.training import loop
from launchers import train

choose = loop.choose_scoring

def slowly(*given):
    time.sleep(16)
    return choose(*given)

loop.choose_scoring = slowly
run_main(train.main)
"""


def test_work_that_takes_longer_than_a_collective_waits() -> None:
    said = run_workers("alone_worker.py", 2, "slow")
    assert "process 0: done" in said
    assert "process 1: done" in said


def test_a_process_that_stands_still_is_given_up() -> None:
    assert "process 1: lost the other" in run_workers("alone_worker.py", 2, "silent")


def test_a_run_ends_whose_scoring_takes_longer_than_timeout_s(tmp_path: Path) -> None:
    (tmp_path / "slowed.py").write_text(SLOWED.format(root=str(ROOT)))
    data, run = make_features(tmp_path / "data"), tmp_path / "run"
    words = [*SMALL, "--data", str(data), "--output", str(run), "train.epochs=1", "train.timeout_s=8"]
    done = forked.run([str(tmp_path / "slowed.py"), *words], environment(), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done: " in done.stderr
    assert "2 processes on cpu" in done.stderr
