"""What the SLURM tests share; the cluster is of tests/conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.slurm import Cluster, wait_for
from tests.toy import make_features


@pytest.fixture
def nodes_are_back(cluster: Cluster) -> Iterator[None]:
    """Each test leaves an empty queue, two idle nodes and no process behind."""
    yield
    cluster.run("scancel", "--user", "root")
    for node in ("node1", "node2"):
        if cluster.pid(f"slurmd-{node}") is None:
            cluster.start_node(node)
    cluster.wait_idle()
    wait_for("end of the jobs' processes", lambda: not cluster.training())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(tmp_path_factory.mktemp("toy") / "data", splits={"train": [70, 26], "val": [24]}, captions=3)
