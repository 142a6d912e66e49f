"""The queries of an evaluation are shared out to all processes, and every process gets the bits of one."""

from __future__ import annotations

import pytest

from tests.toy import run_workers


@pytest.mark.process
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_measures_the_same_bits(processes: int) -> None:
    assert f"{processes} processes share" in run_workers("metrics_worker.py", processes)
