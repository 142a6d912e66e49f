"""`shards build` as several tasks on one output: the bytes of one process, whatever is killed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.lock import owning
from shards.plan import PlannedShard
from shards.plan_files import PLAN_NAME
from tests.launchers.damage_cases import cut, empty, flipped, missing
from tests.toy import ROOT, environment, files_of, picture, run_shards, wait_for, write_table


def make_table(folder: Path, rows: int, side: int = 24, kind: str = "PNG") -> Path:
    """Pictures in a Parquet file, of which some are equal."""
    folder.mkdir()
    data = [picture(i, side, kind) for i in range(8)]
    told = [{"image": {"bytes": data[i % 8] + bytes([i % 90]), "path": None}, "text": f"t {i}"} for i in range(rows)]
    return write_table(folder / "t.parquet", told)


def words(table: Path, output: Path, *more: object) -> list[str]:
    options = ("--shard-samples", 8, "--processes", 1, "--val", 0.2, "--test", 0)
    return [str(word) for word in ("build", "table", table, "--output", output, *options, *more)]


def test_tasks_one_after_the_other_make_what_one_process_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, shared, whole = make_table(tmp_path / "in", 80), tmp_path / "shared", tmp_path / "whole"
    run_shards(*words(table, whole))
    run_shards(*words(table, shared, "--task", "1/3"))
    assert "shards are left to other tasks" in capsys.readouterr().out
    plans = list(shared.glob(f".plan-*/{PLAN_NAME}"))
    assert len(plans) == 1
    made = plans[0].stat().st_mtime_ns
    run_shards(*words(table, shared, "--task", "0/3"))
    assert plans[0].stat().st_mtime_ns == made  # the plan is made once
    assert not (shared / "manifest.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    run_shards(*words(table, shared))
    assert files_of(shared) == files_of(whole)
    run_shards(*words(table, shared))
    assert "already packed" in capsys.readouterr().out
    assert not list(shared.glob(".*"))
    with owning(shared, "build-1-of-3"):  # a task that still reads the plan
        run_shards(*words(table, shared))
    assert list(shared.glob(f".plan-*/{PLAN_NAME}"))
    run_shards(*words(table, shared))
    assert not list(shared.glob(".*"))


def test_a_plan_of_a_table_that_changed_is_not_used(tmp_path: Path) -> None:
    table, shared = make_table(tmp_path / "in", 60), tmp_path / "shared"
    run_shards(*words(table, shared, "--task", "0/2"))
    table.unlink()
    (tmp_path / "in").rmdir()
    make_table(tmp_path / "in", 64)
    run_shards(*words(table, shared, "--task", "1/2"))  # makes none of the shards that the first has made
    assert not (shared / "manifest.json").exists()
    run_shards(*words(table, shared, "--task", "0/2"))
    run_shards(*words(table, tmp_path / "whole"))
    assert files_of(shared) == files_of(tmp_path / "whole")
    with pytest.raises(BadInput, match="was removed, as another process has finished"):
        PlannedShard("a", "train", 0, "", [], "").read(tmp_path / "gone")


def test_a_plan_of_pictures_that_changed_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [{"image": f"{i}.png", "text": f"t {i}"} for i in range(40)]
    table, shared = write_table(tmp_path / "t.jsonl", told), tmp_path / "shared"
    for i in range(39):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    run_shards(*words(table, shared, "--task", "0/2", "--skip-bad"))
    (tmp_path / "39.png").write_bytes(picture(39))  # it was missing
    for i in range(0, 40, 2):  # equal pictures belong to one split
        (tmp_path / f"{i}.png").write_bytes(picture(i + 1))
    run_shards(*words(table, shared, "--task", "1/2", "--skip-bad"))
    assert not (shared / "manifest.json").exists()  # what the first task made is of other pictures
    run_shards(*words(table, shared, "--task", "0/2", "--skip-bad"))
    assert "left out" not in capsys.readouterr().err
    run_shards(*words(table, tmp_path / "whole", "--skip-bad"))
    assert files_of(shared) == files_of(tmp_path / "whole")


def test_what_a_task_made_of_a_picture_that_changed_in_its_place_is_made_anew(tmp_path: Path) -> None:
    told = [{"image": f"{i}.png", "text": f"t {i}"} for i in range(40)]
    table, shared = write_table(tmp_path / "t.jsonl", told), tmp_path / "shared"
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    run_shards(*words(table, shared, "--task", "0/2"))
    for i in range(40):  # behind what is decoded: no size and no split changes
        data = (tmp_path / f"{i}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes(data[:-1] + b"?")
    run_shards(*words(table, shared, "--task", "1/2"))
    assert not (shared / "manifest.json").exists()
    run_shards(*words(table, shared, "--task", "0/2"))
    run_shards(*words(table, tmp_path / "whole"))
    assert files_of(shared) == files_of(tmp_path / "whole")


def test_tasks_of_another_data_set_do_not_destroy_what_is_being_made(tmp_path: Path) -> None:
    table, shared = make_table(tmp_path / "in", 60), tmp_path / "shared"
    other = make_table(tmp_path / "other", 40)
    run_shards(*words(table, shared, "--task", "0/2"))
    before = {p.name: p.stat().st_mtime_ns for p in shared.iterdir()}
    with owning(shared, "build-1-of-2"), pytest.raises(BadInput, match="shared is in use by process"):
        run_shards(*words(other, shared, "--task", "0/2"))
    left = {p.name: p.stat().st_mtime_ns for p in shared.iterdir() if not p.name.startswith(".")}
    assert left == {name: time for name, time in before.items() if not name.startswith(".")}


def test_a_plan_that_is_not_whole_is_made_anew_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    table, shared = make_table(tmp_path / "in", 60), tmp_path / "shared"
    run_shards(*words(table, shared, "--task", "0/2"))
    (plan,) = shared.glob(".plan-*")
    rows = next(path for path in plan.glob("pairs-*") if path.stat().st_size)
    for damage in (
        lambda data: data.replace(b"t 1", b"t 2"),
        lambda data: data.replace(b'"', b"'"),
        lambda data: data[:99],
    ):
        whole = rows.read_bytes()
        rows.write_bytes(damage(whole))
        with pytest.raises(BadInput, match=r"the plan in \S+ was damaged: remove that folder"):
            run_shards(*words(table, shared, "--task", "1/2"))
        rows.write_bytes(whole)
    (plan / PLAN_NAME).write_bytes((plan / PLAN_NAME).read_bytes()[:-9])
    rows.unlink()
    run_shards(*words(table, shared, "--task", "1/2"))
    run_shards(*words(table, tmp_path / "whole"))
    assert files_of(shared) == files_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def half_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table, and what one of two tasks left of it: shards and a plan."""
    place = tmp_path_factory.mktemp("half")
    table = make_table(place / "in", 40)
    run_shards(*words(table, place / "shared", "--task", "0/2"))
    run_shards(*words(table, place / "whole"))
    return place


@pytest.mark.parametrize("damage", [missing, empty, cut, flipped], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["starts-0000.npy", "splits-0000.npy", "splits.json", "pairs-0000.jsonl", PLAN_NAME])
def test_a_damaged_file_of_a_plan_changes_no_shard(
    name: str, damage: Callable[[Path], None], half_built: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(half_built / "shared", shared)
    (plan,) = shared.glob(".plan-*")
    damage(plan / name)
    second = words(half_built / "in" / "t.parquet", shared, "--task", "1/2")
    try:
        run_shards(*second)
    except BadInput as error:
        assert re.search("the plan in .*: remove that folder and start again$", str(error))  # noqa: PT017
        shutil.rmtree(plan)
        run_shards(*second)
    assert files_of(shared) == files_of(half_built / "whole")


@pytest.mark.parametrize("bad", ["2/2", "a", "-1/2"])
def test_a_task_that_makes_no_sense_is_named(tmp_path: Path, bad: str) -> None:
    with pytest.raises(BadInput, match="--task"):
        run_shards(*words(make_table(tmp_path / "in", 8), tmp_path / "out", f"--task={bad}"))


@pytest.mark.process
def test_two_processes_of_which_one_is_killed_and_started_again(tmp_path: Path) -> None:
    table, shared = make_table(tmp_path / "in", 200, 800, "JPEG"), tmp_path / "shared"

    def start(number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shards", *words(table, shared, "--task", f"{number}/2")]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)

    first, second = start(0), start(1)
    deadline = time.monotonic() + 120
    while len(list(shared.glob("*.build.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start(0)
    assert (second.wait(180), third.wait(180)) == (0, 0)
    run_shards(*words(table, tmp_path / "whole"))
    assert files_of(shared) == files_of(tmp_path / "whole")


@pytest.mark.process
@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_makes_what_one_process_makes(tmp_path: Path) -> None:
    from tests.services.ray_nodes import add_node, lose_node, running_nodes

    table, shared = make_table(tmp_path / "in", 200, 800, "JPEG"), tmp_path / "shared"
    with running_nodes(1) as cluster, ThreadPoolExecutor(1) as pool:
        second = add_node(cluster)
        made = pool.submit(run_shards, *words(table, shared, "--processes", 2, "--ray", cluster.address))
        wait_for(lambda: len(list(shared.glob("*.build.json"))) > 2, 240)
        lose_node(cluster, second)
        made.result()
    run_shards(*words(table, tmp_path / "whole"))
    left = {path.name: path.read_bytes() for path in shared.iterdir() if not path.name.startswith(".")}
    assert left == files_of(tmp_path / "whole")  # a worker of the lost node may live on for a moment
