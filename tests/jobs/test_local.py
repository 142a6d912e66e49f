"""One function over many tasks: a line every minute where there is no terminal."""

from __future__ import annotations

import time

import pytest

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
    assert 50 in seen or 80 in seen
    assert seen == sorted(seen)
    assert max(seen) <= 160


def test_units_outside_of_a_task_are_nobodys() -> None:
    units_done(3)
