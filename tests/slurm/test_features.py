"""Features as a SLURM array: tasks share the shards, one of them is queued again, and the bytes are those of one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from shards.feature_job import write_features
from shards.features import FeaturesCommand
from tests.services.slurm import Cluster, wait_for
from tests.toy import make_raw

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nodes_are_back")]

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_an_array_makes_the_features_that_one_process_does(cluster: Cluster, tmp_path: Path) -> None:
    data = make_raw(tmp_path / "data", counts=dict.fromkeys(("train", "val", "test", "more", "other", "last"), 8))
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    options = ["--image-backbone", "test_efficientnet", "--image-weights", str(weights), "--image-size", "48"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    chosen = {"image_backbone": "test_efficientnet", "image_weights": str(weights), "image_size": 48}
    write_features(FeaturesCommand(str(data), str(alone), processes=1, **chosen))  # type: ignore[arg-type]
    script = str(ROOT / "launchers" / "slurm" / "features.sbatch")
    command = ["--array=1-3", script, str(data), "--output", str(shared), "--processes", "1", *options]
    python = {"CMGAN_ROOT": str(ROOT), "CMGAN_PYTHON": sys.executable}
    job = cluster.submit_array(*command, output=tmp_path, **python)
    wait_for("a task that runs", lambda: cluster.job(f"{job}_2").get("JobState") == "RUNNING", 100)
    time.sleep(1.0)
    cluster.run("scontrol", "requeue", f"{job}_2")
    said = cluster.check_array(job, range(1, 4), 2, tmp_path, 300)
    assert "left to other tasks" in "".join(said.values()), said
    assert files(shared) == files(alone)
