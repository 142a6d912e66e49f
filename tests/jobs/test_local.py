"""One function over many tasks: who takes them, what fails, and a line every minute where there is no terminal."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import active_children, parent_process
from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import local
from cmgan_dist.jobs.local import parallel_map, progress_line, units_done


@pytest.mark.parametrize(
    ("done", "total", "seconds", "line"),
    [
        (0, 90, 60.0, "packing: 0 of 90 after 1 min"),
        (600, 1800, 60.0, "packing: 600 of 1800, 10.0 a second, 2 min left"),
        (60, 36060, 60.0, "packing: 60 of 36060, 1.0 a second, 10.0 h left"),
    ],
)
def test_a_line_tells_rate_and_time_left(done: int, total: int, seconds: float, line: str) -> None:
    assert progress_line("packing", done, total, seconds) == line


def test_without_a_terminal_lines_come_while_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "LINE_EVERY_S", 0.05)
    assert parallel_map(time.sleep, [(0.12,), (0.12,)], title="sleeping", processes=1) == [None, None]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "sleeping: 0 of 2 after 0 min"
    assert said[-1].startswith("sleeping: 1 of 2, ")


def half_and_wait(units: int) -> None:
    units_done(units // 2)
    time.sleep(0.5)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_done_of_a_task_counts_before_it_ends(
    processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "LINE_EVERY_S", 0.05)
    monkeypatch.setattr(local, "LOOK_S", 0.02)
    tasks, counts = [(100,), (60,)], [100, 60]
    parallel_map(half_and_wait, tasks, title="packing", unit_counts=counts, processes=processes)
    said = [line.partition(" of 160")[0] for line in capsys.readouterr().err.splitlines()]
    seen = [int(line.removeprefix("packing: ")) for line in said]
    assert set(seen) - {0, 60, 100, 160}, "halves of tasks"
    assert seen == sorted(seen)
    assert max(seen) <= 160


def test_units_outside_of_a_task_are_nobodys() -> None:
    units_done(3)


def wait_and_tell(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_this_process_is_one_of_the_processes() -> None:
    pids = parallel_map(wait_and_tell, [(0.5,)] * 8, title="waiting", processes=2)
    assert os.getpid() in pids
    assert len(set(pids)) == 2


def fail_from(first: int, number: int, folder: str) -> int:
    Path(folder, str(number)).touch()
    if number >= first:
        raise ValueError(number)
    return number


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_first_failing_task_is_told_and_no_other_begins(processes: int, tmp_path: Path) -> None:
    tasks = [(2, number, str(tmp_path)) for number in range(40)]
    with pytest.raises(ValueError, match=r"^2$"):
        parallel_map(fail_from, tasks, title="failing", processes=processes)
    begun = sorted(int(path.name) for path in tmp_path.iterdir())
    assert begun == list(range(len(begun)))
    assert len(begun) <= 2 + processes


def end_as_worker(number: int) -> int:
    if parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    return number


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_a_worker_that_was_killed_is_told(processes: int) -> None:
    """Also while others are being started, for which the pool of Python 3.11 would wait for ever."""
    with pytest.raises(BadInput, match="a worker process was killed"):
        parallel_map(end_as_worker, [(n,) for n in range(60)], title="ending", processes=processes)
    assert not active_children()
