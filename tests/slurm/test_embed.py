"""Embedding as a SLURM array: tasks share the shards, one of them is queued again, and the bytes are those of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.retrieval.embed_cases import files, whole
from tests.services.slurm import Cluster
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
    words = ["--requeue", "--array=2-4", str(script), *command, "--output", str(shared), "--processes", "1"]
    job = cluster.submit_array(*words, output=tmp_path, PYTHONPATH=str(ROOT))
    said = cluster.check_array(job, range(2, 5), 4, tmp_path, 200)
    assert sum(f"wrote {shared}: 149 images and 298 texts in 8 shards" in text for text in said.values()) == 1, said
    assert sum("are left to other tasks" in text for text in said.values()) == 2, said
    assert files(shared) == files(alone)
