"""launchers/slurm/search.sbatch on a real SLURM of two virtual nodes: Ray on both, the time limit, the queue again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.services.slurm import Cluster, wait_for
from tests.toy import make_features

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launchers" / "slurm" / "search.sbatch"


def submit(cluster: Cluster, folder: Path, options: list[str], *words: str) -> str:
    environment = {**cluster.environment, "CMGAN_PYTHON": sys.executable, "CMGAN_ROOT": str(ROOT), "RAY_CPUS": "1"}
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={folder}/job.out", *options, str(SCRIPT), *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def words(folder: Path, data: Path, epochs: int, trials: int) -> list[str]:
    (folder / "space.yaml").write_text("optim.generator_lr: {log: [5e-4, 5e-3]}\n")
    given = {"preset": "smoke", "data": data, "output": folder / "search", "space": folder / "space.yaml"}
    given |= {"trials": trials, "epochs": epochs, "val-every": epochs / 20, "algorithm": "random"}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def wait(cluster: Cluster, job: str, what: str, check: Callable[[], Any], folder: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        said = (folder / "job.out").read_text() if (folder / "job.out").exists() else ""
        assert time.monotonic() < deadline, f"no {what}: {said[-3000:]}"
        assert cluster.state(job) not in ("FAILED", "NODE_FAIL"), said[-3000:]
        time.sleep(0.2)


def test_a_search_runs_on_both_nodes_and_goes_on_after_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    job = submit(cluster, tmp_path, [], *words(tmp_path, data, 2000, 2))
    files = tmp_path / "search" / "search"

    def validated() -> bool:
        texts = [f.read_text() for f in files.glob("*/result.json")] if files.is_dir() else []
        return len(texts) == 2 and all(text.count("\n") >= 3 for text in texts)

    wait(cluster, job, "three validations of both trials", validated, tmp_path)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what SLURM does before the time limit
    wait(cluster, job, "second start", lambda: cluster.job(job)["Restarts"] == "1", tmp_path)
    wait(cluster, job, "end", lambda: cluster.state(job) == "COMPLETED", tmp_path, 500)
    said = (tmp_path / "job.out").read_text()
    assert "the job is queued again" in said
    found = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert [t["status"] for t in found["trials"]] == ["ended"] * 2
    assert len({t["node"] for t in found["trials"]}) == 2, "both trials ran on one node"
    assert [len(t["curve"]) for t in found["trials"]] == [20, 20]
    assert os.path.exists(tmp_path / "search" / "best.yaml")


def test_bad_input_ends_the_job_with_its_sentence(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, [], *words(tmp_path, tmp_path / "nowhere", 20, 2))
    wait_for("failure", lambda: cluster.state(job) == "FAILED", 200)
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "nowhere" in (tmp_path / "job.out").read_text()
    wait_for("end of Ray", lambda: not cluster.training(), 60)
