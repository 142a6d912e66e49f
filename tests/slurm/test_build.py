"""A data set built by a SLURM array: tasks share the shards, one of them is queued again, and the bytes are those of
one process."""

from __future__ import annotations

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
    script = str(ROOT / "launchers" / "slurm" / "build.sbatch")
    command = ["--array=1-3", script, *words, "--output", str(shared)]
    python = {"CMGAN_ROOT": str(ROOT), "CMGAN_PYTHON": sys.executable}
    job = cluster.submit_array(*command, output=tmp_path, **python)
    wait_for("a shard", lambda: any(shared.glob("*.build.json")), 200)
    cluster.run("scontrol", "requeue", f"{job}_2")
    said = cluster.check_array(job, range(1, 4), 2, tmp_path, 300)
    assert "left to other tasks" in "".join(said.values()), said
    left = {name: data for name, data in files_of(shared).items() if not name.endswith(".lock")}
    assert left == files_of(tmp_path / "alone")
