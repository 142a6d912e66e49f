"""One function over many tasks by Ray: what a map in local processes gives, with nodes and workers that are lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs import ray as jobs
from cmgan_dist.jobs.machine import Share, find_share
from cmgan_dist.jobs.ray import ray_map
from tests.services.ray_nodes import add_node, lose_node, running_nodes
from tests.toy import wait_for

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of one node with a CPU."""
    with running_nodes(1) as cluster:
        yield cluster


@pytest.fixture
def joined(nodes: Cluster) -> Iterator[str]:
    """The address of the cluster, which this process stays in: joining takes a second."""
    with jobs.joined(nodes.address):
        yield nodes.address


def square_and_process(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def refuse(number: int, folder: Path) -> None:
    (folder / str(number)).touch()
    if number in (2, 3):
        raise BadInput(f"{number} is refused")


def divide(number: int) -> float:
    return 1 / number


def kill_oneself(times: int, marks: Path) -> str:
    """End this worker as often as `times` says, then return."""
    if len(list(marks.iterdir())) < times:
        (marks / str(time.monotonic_ns())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def wait_for_file(number: int, folder: Path) -> str:
    """Say where this runs and wait until the folder has "go"; return the node."""
    node = str(ray.get_runtime_context().get_node_id())
    (folder / f"{number}-{node}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return node


def test_results_come_in_order_from_workers_that_stay(joined: str) -> None:
    results = ray_map(square_and_process, [(n,) for n in range(5)], title="squares", address=joined)
    assert [square for square, _ in results] == [0, 1, 4, 9, 16]
    assert len({process for _, process in results}) == 1, "a CPU is a worker"
    assert os.getpid() not in {process for _, process in results}
    assert ray_map(square_and_process, [], title="squares", address=joined) == []


def test_the_first_failing_task_raises_and_none_is_begun_behind_it(joined: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        ray_map(refuse, [(n, tmp_path) for n in range(9)], title="refusing", address=joined)
    assert str(refused.value) == "2 is refused"
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}


@pytest.mark.slow
def test_what_is_no_bad_input_arrives_too(joined: str) -> None:
    with pytest.raises(ZeroDivisionError):
        ray_map(divide, [(1,), (0,)], title="dividing", address=joined)


@pytest.mark.slow
def test_the_task_of_a_killed_worker_is_done_by_another(
    joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MOST_LOST", 2)
    tasks = [(1, tmp_path / "once"), (2, tmp_path / "again")]
    for _, marks in tasks:
        marks.mkdir()
    assert ray_map(kill_oneself, tasks[:1], title="killing", address=joined) == ["done"]
    with pytest.raises(BadInput, match="2 workers in turn were lost with one task"):
        ray_map(kill_oneself, tasks, title="killing", address=joined)


def test_a_share_of_a_cluster_is_what_that_has(joined: str) -> None:
    assert find_share("auto", None, joined) == Share("cpu", None, 1, joined)
    with pytest.raises(BadInput, match="--device is cuda but the Ray cluster has no GPU"):
        find_share("cuda", None, joined)


def test_a_cluster_without_room_is_said(joined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WORKERS_WITHIN_S", 0.5)
    monkeypatch.setattr(jobs, "LOOK_S", 0.2)
    with pytest.raises(BadInput, match=r"of 1 CPUs and 0 GPUs, has given no worker for 0 s: end what uses them"):
        ray_map(abs, [(1,)], title="waiting", address=joined, gpus=True)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", r"\[Errno 111\] Connection refused"),
        ("nowhere", "Invalid address format: nowhere"),
        ("127.0.0.1:port", "invalid literal for int"),
    ],
)
def test_an_address_without_a_cluster_is_said_at_once(address: str, reason: str) -> None:
    with pytest.raises(BadInput, match=rf"^--ray {address} is no running Ray cluster \({reason}.*start it by 'ray"):
        ray_map(abs, [(1,)], title="joining", address=address)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_tasks_of_a_lost_node_go_to_another_and_a_node_that_joins_gets_some(
    nodes: Cluster, joined: str, tmp_path: Path
) -> None:
    def runs_on(node: Any) -> bool:
        return any(path.name.endswith(node.node_id) for path in tmp_path.iterdir())

    second = add_node(nodes)
    tasks = [(n, tmp_path) for n in range(4)]
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(ray_map, wait_for_file, tasks, title="waiting", address=joined)
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        assert runs_on(second)
        lose_node(nodes, second)
        third = add_node(nodes)
        wait_for(lambda: runs_on(third), 60)
        (tmp_path / "go").touch()
        results = made.result()
    lose_node(nodes, third)
    assert len(results) == 4
    assert len(set(results) - {second.node_id}) == 2
    assert second.node_id not in results
