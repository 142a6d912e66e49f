"""W processes of batch B give the gradients of one process with W * B rows, in every phase of the adversarial step."""

from __future__ import annotations

import pytest

from tests.distributed.gradients_worker import CASES
from tests.toy import run_workers

pytestmark = pytest.mark.process

SLOW = pytest.mark.slow
FAST = ("reference", "wgan-gp", "modality", "gathered negatives", "accumulated", "trained backbone", "reduced in bf16")


@pytest.mark.parametrize(
    ("case", "processes"),
    [pytest.param(case, 2, marks=() if case in FAST else SLOW) for case in CASES]
    + [pytest.param("reference", 4, marks=SLOW), pytest.param("accumulated", 4, marks=SLOW)],
)
def test_gradients_of_many_processes_equal_those_of_one(case: str, processes: int) -> None:
    assert f"{case}: equal on {processes}" in run_workers("gradients_worker.py", processes, case)


@pytest.mark.parametrize("path", ["triton", pytest.param("torch", marks=SLOW)])
def test_synchronised_statistics_leave_the_compiled_graph_whole(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and running statistics of the compiled module equal those of eager torch operations."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if path == "triton" else "0")
    assert f"{path}: one graph on 2" in run_workers("compile_worker.py", 2, path, fresh=True)
