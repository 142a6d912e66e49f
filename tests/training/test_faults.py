"""What clusters do to a run: killed, paused and unreachable processes, losses that are not finite.

Stated times: a process that is gone is noticed at once, one that does not answer after train.timeout_s; torchrun then
takes up to 30 s to end what does not end by itself. Nothing here may take longer than LIMIT."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.services import forked, netns
from tests.toy import ROOT, SMALL, environment, final_state, lines, npy, run_to_end, train_words, write_tar

pytestmark = pytest.mark.process

LIMIT = 240
TRAIN = str(ROOT / "launchers" / "train.py")
PAUSED = pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)
LONG = ["train.epochs=30", "train.save_every=2", "train.val_every=20", "train.keep=50", "optim.update=joint"]
LONG += ["optim.generator_lr=1e-4", "optim.discriminator_lr=1e-4", "optim.generator_steps=1", "train.timeout_s=15"]


def elastic(restarts: int, *where: str) -> list[str]:
    options = where or ("--standalone", "--nproc_per_node", "2")
    return [sys.executable, "-m", "torch.distributed.run", "--max-restarts", str(restarts), *options, TRAIN]


def arguments(data: Path, run: Path, *extra: str) -> list[str]:
    return [*SMALL, "--data", str(data), "--output", str(run), *LONG, *extra]


def until(done: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def checkpoints(run: Path) -> int:
    return len(list((run / "checkpoints").glob("samples-*")))


def newest(run: Path) -> str:
    return max((p.name for p in (run / "checkpoints").glob("samples-*")), default="")


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Training processes below a launcher, the first rank first."""
    below = psutil.Process(process.pid).children(recursive=True)
    found = [p for p in below if TRAIN in p.cmdline() and "torch.distributed.run" not in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ().get("RANK", "0")))


@contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command, with stderr in `log`; whatever is left of it at the end is killed."""
    with open(log, "w") as file:
        env = environment() | variables
        process = subprocess.Popen(command, env=env, stderr=file, start_new_session=True, text=True)
        try:
            yield process
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[str]) -> None:
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    for one in [*below, process]:
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.wait()


def same_result(found: Path, expected: Path) -> None:
    a, b = final_state(found), final_state(expected)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert lines(found, "train") == lines(expected, "train")


def near_result(found: Path, expected: Path) -> None:
    """The same but for sums in another order: a part of the run had another number of processes."""
    a, b = lines(found, "train"), lines(expected, "train")
    assert [x["samples"] for x in a] == [x["samples"] for x in b]
    for x, y in zip(a, b, strict=True):
        for name in x:
            if name.startswith("loss/"):
                assert abs(x[name] - y[name]) < 1e-2 * max(1, abs(y[name])), (name, x, y)


@pytest.fixture
def undisturbed(feature_data: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """(data, a run on two processes that nothing happened to)."""
    data = feature_data(splits={"train": [70, 26], "val": [24]}, captions=3)
    run_to_end(data, tmp_path / "whole", *LONG, processes=2)
    return data, tmp_path / "whole"


@pytest.mark.parametrize("number", [signal.SIGKILL, PAUSED])
def test_a_rank_killed_or_paused_under_elastic_ends_like_the_undisturbed_run(
    number: int, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    data, whole = undisturbed
    run = tmp_path / "run"
    with started([*elastic(3), *arguments(data, run)], tmp_path / "log") as process:
        until(lambda: checkpoints(run) >= 2, process, "two checkpoints")
        ranks(process)[1].send_signal(number)
        assert process.wait(LIMIT) == 0, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert "resuming" in log
    same_result(run, whole)


@pytest.mark.slow
def test_killed_at_random_times_again_and_again_ends_like_the_undisturbed_run(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every batch is followed by a checkpoint, so that most kills fall into the writing of one."""
    data, whole = undisturbed
    run, draw = tmp_path / "run", random.Random(0)
    command = [*elastic(0), *arguments(data, run, "train.save_every=0.2")]
    for attempt in range(5):
        before = newest(run)
        with started(command, tmp_path / f"log{attempt}") as process:
            until(lambda before=before: newest(run) > before, process, "a checkpoint")  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.5))
    with started(command, tmp_path / "last") as process:
        assert process.wait(LIMIT) == 0, (tmp_path / "last").read_text()[-3000:]
    assert "resuming" in (tmp_path / "last").read_text()
    same_result(run, whole)


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
"""What `accelerate launch --config_file launchers/configs/zero2.yaml` sets."""


@pytest.mark.parametrize("variables", [{}, pytest.param(ZERO, marks=pytest.mark.slow)], ids=["ddp", "zero"])
@pytest.mark.parametrize("number", [signal.SIGKILL, PAUSED])
def test_without_elastic_the_others_end_with_one_clear_error(
    number: int, variables: dict[str, str], feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, run = feature_data(), tmp_path / "run"
    with started([*elastic(0), *arguments(data, run, "train.epochs=100000")], tmp_path / "log", **variables) as process:
        until(lambda: checkpoints(run) >= 1, process, "a checkpoint")
        ranks(process)[1].send_signal(number)
        assert process.wait(LIMIT) != 0
    log = (tmp_path / "log").read_text()
    assert "error: process 0 lost another process at sample" in log, log[-3000:]
    assert "start again to go on from the last checkpoint" in log


@pytest.mark.skipif(bool(netns.why_not()), reason=str(netns.why_not()))
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_a_node_that_is_lost_leaves_the_other_to_finish(
    fault: str, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two network namespaces, torchrun with 1 to 2 nodes: the second is killed, or its cable is pulled."""
    data, whole = undisturbed
    run = tmp_path / "run"
    with netns.two_nodes() as nodes, ExitStack() as stack:
        processes = []
        for node in (0, 1):
            where = ["--nnodes", "1:2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
            where += ["--rdzv-endpoint", f"{nodes.addresses[0]}:29400", "--local-addr", nodes.addresses[node]]
            where += ["--rdzv-conf", f"is_host={int(node == 0)},last_call_timeout=8,join_timeout=60"]
            log = stack.enter_context(open(tmp_path / f"log{node}", "w"))
            process = nodes.start(node, [*elastic(3, *where), *arguments(data, run)], env=environment(), stderr=log)
            stack.callback(_kill_group, process)
            processes.append(process)
        until(lambda: checkpoints(run) >= 2, processes[0], "two checkpoints")
        if fault == "killed":
            _kill_group(processes[1])
        else:
            nodes.cut()
        assert processes[0].wait(LIMIT) == 0, (tmp_path / "log0").read_text()[-3000:]
        if fault == "cut":
            assert processes[1].wait(LIMIT) != 0, "a node without its peer went on"
    text = (tmp_path / "log0").read_text()
    assert "resuming" in text
    assert "1 process on cpu" in text
    near_result(run, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(
    processes: int, feature_data: Callable[..., Path], tmp_path: Path
) -> None:
    """One sample with features near the largest float: its batch's statistics overflow."""
    data = feature_data(splits={"train": [96], "val": [24]}, label_kind="none")
    members: list[tuple[str, bytes]] = []
    path = data / "train-000000.tar"
    with tarfile.open(path) as tar:
        for info in tar.getmembers():
            file = tar.extractfile(info)
            assert file is not None
            members.append((info.name, file.read()))
    spoiled = next(i for i, (name, _) in enumerate(members) if name == "train0-0050.image.npy")
    members[spoiled] = ("train0-0050.image.npy", npy(torch.full((12,), 3e38).numpy()))
    write_tar(path, members)
    run = tmp_path / "run"
    done = run_bad(data, run, processes)
    error = next(line for line in done.splitlines() if line.startswith("error: "))
    assert done.count("error: loss/") == 1
    assert "is not finite in phase D_" in error
    assert "features of those samples are as large as 3e+38: mend them and begin anew by --resume never" in error
    record = json.loads((run / "failure.json").read_text())
    assert "train0-0050" in record["keys"]
    state = final_state(run)
    assert all(bool(torch.isfinite(v).all()) for v in state.values() if v.is_floating_point())
    assert f"samples-{record['samples']:012d}" in error


def run_bad(data: Path, run: Path, processes: int) -> str:
    extra: list[Any] = ["train.epochs=3", "optim.update=joint", "loss.classification=0", "loss.contrastive=1"]
    done = forked.run(train_words(data, run, *extra), environment(), processes, LIMIT)
    assert done.returncode != 0
    return done.stderr


def test_a_trace_and_where_the_time_went(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_to_end(feature_data(), run, "train.epochs=4", "train.trace=2")
    assert "time: " in done.stderr
    assert "no-grad forward" in done.stderr
    trace = json.loads((run / "trace" / "rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::linear" in names
    assert {f"ProfilerStep#{n}" for n in (10, 11)} <= names
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    line = next(x for x in found if x["kind"] == "train")
    assert {"time/data", "time/D_CI", "time/G_I", "memory_gib", "gradient_norm/G_I", "samples_per_s"} <= line.keys()
