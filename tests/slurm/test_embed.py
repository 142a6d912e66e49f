"""Embedding as a SLURM array: tasks share the shards, one of them is queued again, and the bytes are those of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.retrieval.embed_cases import files, whole
from tests.services.slurm import Cluster, wait_for
from tests.toy import make_features, save_untrained, small_config

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nodes_are_back")]

ROOT = Path(__file__).resolve().parents[2]
JOB = """#!/bin/bash
if [ "$SLURM_ARRAY_TASK_ID" = 4 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_4"
    sleep 60
fi
exec "$@"
"""


def test_an_array_embeds_what_one_process_does(cluster: Cluster, tmp_path: Path) -> None:
    data = make_features(tmp_path / "data", splits={"train": [20] * 7, "val": [9]}, captions=2)
    save_untrained(tmp_path / "run", data, small_config(8, eval__batch=7))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    whole(tmp_path / "run", alone, data=data)
    script = tmp_path / "embed.sh"
    script.write_text(JOB)
    command = [sys.executable, str(ROOT / "launchers" / "embed.py"), str(tmp_path / "run"), "--data", str(data)]
    done = subprocess.run(
        ["sbatch", "--requeue", "--array=2-4", f"--output={tmp_path}/%a.out", str(script), *command]
        + ["--output", str(shared), "--processes", "1"],
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    job = done.stdout.split()[-1]
    wait_for("end of the array", lambda: cluster.run("squeue", "-h") == "", 200)
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.out")}
    states = {task: cluster.job(f"{job}_{task}") for task in (2, 3, 4)}
    assert {state["JobState"] for state in states.values()} == {"COMPLETED"}, said
    assert states[4]["Restarts"] == "1"
    assert sum(f"wrote {shared}: 149 images and 298 texts in 8 shards" in text for text in said.values()) == 1, said
    assert sum("are left to other tasks" in text for text in said.values()) == 2, said
    assert files(shared) == files(alone)
