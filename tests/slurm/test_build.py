"""A data set built by a SLURM array: tasks share the shards, one of them is queued again, and the bytes are those of
one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.slurm import Cluster, wait_for
from tests.toy import ROOT, files_of, picture, run_shards, write_table

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nodes_are_back")]


def test_an_array_builds_what_one_process_does(cluster: Cluster, tmp_path: Path) -> None:
    told = [{"image": f"{i}.jpg", "text": f"a text {i}", "label": "ab"[i % 2]} for i in range(120)]
    for i in range(120):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i, 900, "JPEG"))
    table, shared = write_table(tmp_path / "t.jsonl", told), tmp_path / "shared"  # type: ignore[arg-type]
    words = ["table", str(table), "--shard-samples", "4", "--processes", "1", "--val", "0.2"]
    run_shards("build", *words, "--output", tmp_path / "alone")
    done = subprocess.run(
        ["sbatch", "--array=1-3", f"--output={tmp_path}/%a.out", str(ROOT / "launchers" / "slurm" / "build.sbatch")]
        + [*words, "--output", str(shared)],
        env={
            **cluster.environment,
            **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CMGAN_ROOT": str(ROOT)},
            "CMGAN_PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    job = done.stdout.split()[-1]
    wait_for("a shard", lambda: any(shared.glob("*.build.json")), 200)
    cluster.run("scontrol", "requeue", f"{job}_2")
    wait_for("end of the array", lambda: cluster.run("squeue", "-h") == "", 300)
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.out")}
    states = {task: cluster.job(f"{job}_{task}") for task in (1, 2, 3)}
    assert {state["JobState"] for state in states.values()} == {"COMPLETED"}, said
    assert states[2]["Restarts"] == "1"
    assert "left to other tasks" in "".join(said.values()), said
    left = {name: data for name, data in files_of(shared).items() if not name.endswith(".lock")}
    assert left == files_of(tmp_path / "alone")
