"""The benchmark of planning, on a few rows."""

from __future__ import annotations

from pathlib import Path

from bench.plan import measure


def test_a_small_table_is_planned_and_measured(tmp_path: Path) -> None:
    found = measure(tmp_path / "plan", 1500, processes=1)
    assert (found["rows"], found["samples"], found["shards"]) == (1500, 1485, 4)
    assert found["before_mib"] > 0
    assert found["peak_mib"] > 0
