"""Training under a real SLURM with two virtual nodes: start, save and queue again, cancel, lose a node, seeds.

The runs that are disturbed would last for ever: once they have been, their config file gets a near end, so that nothing
depends on how fast this machine is. An undisturbed run with that same end is what they must equal.
"""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmgan_dist.config.load import to_yaml
from cmgan_dist.config.presets import preset
from tests.services.slurm import Cluster, wait_for
from tests.toy import make_raw, torchrun

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("nodes_are_back")]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launchers" / "slurm" / "train.sbatch"
BATCH, EPOCH = 16, 96
"""Samples."""
MEASURED = ("samples_per_s", "time/", "memory")
"""Of a line of metrics: what depends on the machine."""
END = 40
"""Epochs of a run that was disturbed, unless it is farther by then."""


@dataclass
class Run:
    """A run that jobs train."""

    cluster: Cluster
    folder: Path
    data: Path

    def __post_init__(self) -> None:
        self.output = self.folder / "run"
        self.config = self.folder / "run.yaml"
        self.set_epochs(1_000_000)

    def set_epochs(self, epochs: int, save_every: int = 20) -> None:
        config = preset("smoke")
        config.data, config.output = str(self.data), str(self.output)
        config.stream.global_batch = BATCH
        config.train.tracker, config.train.threads, config.train.log_every = "none", 1, 1
        config.train.epochs, config.train.val_every, config.train.save_every = epochs, 0, save_every
        config.model.dropout, config.train.ema = 0.3, 0.9
        self.config.write_text(to_yaml(config))

    def end_soon(self) -> None:
        """A usual end, or, where a checkpoint is beyond it already, two epochs later."""
        self.set_epochs(max(END, self.position() // EPOCH + 3))

    def environment(self) -> dict[str, str]:
        return {
            **self.cluster.environment,
            "CMGAN_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def submit(self, *options: str, words: list[str] | None = None, by_hand: bool = False) -> str:
        """Job id, or "" with what was said in self.said when it was refused."""
        words = words if words is not None else ["--config", str(self.config)]
        slurm = [f"--output={self.folder}/%x-%j.out", *options]
        command = ["bash", str(SCRIPT), *slurm, "--", *words] if by_hand else ["sbatch", *slurm, str(SCRIPT), *words]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=300, check=False
        )
        self.said, self.code = done.stderr, done.returncode
        return done.stdout.split()[-1] if done.returncode == 0 else ""

    def limit(self, job: str, minutes: int) -> None:
        self.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")

    def out(self) -> str:
        """What the job itself wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def log(self, rank: int = 0) -> str:
        path = self.output / "logs" / f"rank-{rank:05d}.log"
        return path.read_text() if path.exists() else ""

    def lines(self, kind: str = "train") -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [line for line in found if line["kind"] == kind]
        return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in kept]

    def position(self) -> int:
        """Of the newest checkpoint."""
        return max((int(p.name.split("-")[1]) for p in (self.output / "checkpoints").glob("samples-*")), default=0)

    def wait(self, job: str, what: str = "COMPLETED") -> None:
        """Until the job is in state `what`."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def there() -> bool:
            state = self.cluster.state(job)
            assert state == what or state not in ended, f"{state}:\n{self.out()}\n{self.log()}"
            return state == what

        wait_for(f"job in state {what}", there)

    def wait_training(self, starts: int = 1, samples: int = 1) -> None:
        """Until this many starts of the job train, and metrics reach `samples`."""

        def there() -> bool:
            if self.log().count("samples a batch each") < starts:
                return False
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
            return f'"samples": {samples}' in lines[-2] or len(lines) * BATCH >= samples if len(lines) > 1 else False

        wait_for(f"training, start {starts}", there)

    def assert_equals_undisturbed(self, processes: int) -> None:
        """Bitwise, with a run of `processes` processes on one machine, outside SLURM, to the same end."""
        epochs = round(self.lines()[-1]["epoch"])
        whole = undisturbed(self.cluster, self.data, processes, epochs)
        assert len(self.lines()) == epochs * EPOCH // BATCH
        assert self.lines() == whole.lines()
        assert self.lines("val") == whole.lines("val") != []
        ours, theirs = (load_file(r.output / "best" / "model.safetensors") for r in (self, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def undisturbed(cluster: Cluster, data: Path, processes: int, epochs: int) -> Run:
    """Trained once for all tests that need it."""
    folder = cluster.base / f"whole-{processes}-{epochs}"
    first = not folder.exists()
    folder.mkdir(exist_ok=True)
    whole = Run(cluster, folder, data)
    if first:
        whole.set_epochs(epochs)
        done = subprocess.run(
            [*torchrun(processes), str(ROOT / "launchers" / "train.py"), "--config", str(whole.config)],
            env={**whole.environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return whole


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, data: Path) -> Run:
    return Run(cluster, tmp_path, data)


# ---------------------------------------------------------------------------------------------- start


@contextmanager
def held_ports(cluster: Cluster) -> Iterator[set[int]]:
    """Another program on the first node listens where this cluster's next jobs would meet."""
    line = cluster.run("scontrol", "show", "config")
    number = re.search(r"NEXT_JOB_ID\s*=\s*(\d+)", line)
    assert number
    first = 10_000 + int(number[1])
    with ExitStack() as held:
        for port in range(first, first + 3):
            held.enter_context(socket.create_server(("", port)))
        yield set(range(first, first + 3))


def test_two_nodes_and_one_train_like_two_processes_without_slurm(run: Run) -> None:
    run.set_epochs(3)
    with held_ports(run.cluster) as held:
        run.wait(run.submit("--nodes=2"))
    met = re.search(r"job (\d+), .* meeting at 127.0.0.1:(\d+)", run.out())
    assert met
    assert 10_000 + int(met[1]) in held
    assert int(met[2]) == max(held) + 1
    assert "start 1, on node[1-2]" in run.out()
    assert "2 processes on cpu" in run.log(0)
    assert f"node1: report: {run.output}/report.html" in run.out()
    assert sorted(p.name for p in (run.output / "logs").iterdir()) == ["rank-00000.log", "rank-00001.log"]
    run.assert_equals_undisturbed(2)
    whole = run.lines()
    run.output = run.folder / "one-node"
    run.set_epochs(3)
    job = run.submit("--nodes=1", words=["--config", str(run.config), "--processes-per-node", "2"], by_hand=True)
    assert job, run.said
    run.wait(job)
    assert run.lines() == whole


@pytest.mark.slow
def test_zero_under_slurm(run: Run) -> None:
    run.set_epochs(3)
    words = ["--config", str(run.config), "--accelerate-config", str(ROOT / "launchers" / "configs" / "zero2.yaml")]
    run.wait(run.submit("--nodes=2", words=[*words, "optim.update=joint"]))
    assert "DeepSpeed ZeRO-2" in run.log()
    zero = run.lines()
    run.output = run.folder / "ddp"
    run.set_epochs(3)
    run.wait(run.submit("--nodes=2", words=[*words[:2], "optim.update=joint"]))
    assert "ZeRO" not in run.log()
    for a, b in zip(zero, run.lines(), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-3 * max(1, abs(b[k])) for k in b if k.startswith("loss/")), (a, b)


BAD = {
    "no data": (["--preset", "smoke", "--output", "OUT"], "--data is missing"),
    "data not there": (["--preset", "smoke", "--output", "OUT", "--data", "nowhere"], "nowhere"),
    "output is no folder": (["--config", "CONFIG", "--output", "CONFIG/run"], "cannot be written to"),
    "unknown option": (["--config", "CONFIG", "--train.epoch", "3"], "train.epoch"),
    "processes": (["--config", "CONFIG", "--processes-per-node", "0"], "--processes-per-node is 0"),
    "streams": (["--config", "CONFIG", "--processes-per-node", "5"], "5"),
}


@pytest.mark.parametrize("part", BAD)
def test_bad_input_is_refused_before_a_job_is_queued(part: str, run: Run) -> None:
    words, sentence = BAD[part]
    words = [w.replace("CONFIG", str(run.config)).replace("OUT", str(run.output)) for w in words]
    assert run.submit(words=words, by_hand=True) == ""
    assert run.code == 2
    assert sentence in run.said.splitlines()[-1]
    assert run.said.splitlines()[-1].startswith("error: ")
    assert run.cluster.run("squeue", "-h") == ""


def test_bad_input_and_environment_end_a_job_before_its_nodes_start_anything(run: Run) -> None:
    job = run.submit("--nodes=2", words=["--preset", "smoke", "--output", str(run.output), "--data", "nowhere"])
    other = run.submit("--nodes=2", "--export=ALL,CMGAN_PYTHON=/nowhere/python")
    for each in (job, other):
        run.wait(each, "FAILED")
        assert run.cluster.job(each)["ExitCode"] == "2:0"
    assert "nowhere" in run.out()
    assert "/nowhere/python is not a python with torch" in run.out()
    assert not (run.output / "logs").exists()


# ---------------------------------------------------------------------------------------------- save and go on


def test_before_the_time_limit_the_run_is_saved_and_queued_again(run: Run) -> None:
    """SLURM looks every 30 s whose limit is at most the warning time and 30 s away. The limit, in whole minutes, is
    set when the run trains, one or two minutes ahead."""
    job = run.submit("--nodes=2", "--time=10", "--signal=B:USR1@90")
    started = time.monotonic()
    run.wait_training()
    run.limit(job, minutes=math.ceil((time.monotonic() - started) / 60) + 1)
    wait_for("requeue", lambda: run.cluster.job(job)["Restarts"] == "1")
    assert "the job is queued again" in run.out()
    assert "after a signal: start again to go on" in run.log()
    assert run.position() % (20 * EPOCH) != 0, "the checkpoint is one that was due anyway"
    run.end_soon()
    run.limit(job, minutes=10)
    run.wait(job)
    assert "start 2, on node[1-2]" in run.out()
    assert f"resuming {run.output} at sample" in run.log()
    run.assert_equals_undisturbed(2)


def test_requeue_by_hand_goes_on_even_with_resume_never(run: Run) -> None:
    (run.output / "checkpoints").mkdir(parents=True)
    (run.output / "checkpoints" / "old").touch()
    job = run.submit("--nodes=2", words=["--config", str(run.config), "--resume", "never"])
    run.wait_training(samples=4 * EPOCH)
    run.cluster.run("scontrol", "requeue", job)
    wait_for("requeue", lambda: run.cluster.state(job) == "PENDING")
    assert run.position() > 0, "SIGTERM did not save"
    run.end_soon()
    run.wait(job)
    assert (run.output / "earlier-1" / "checkpoints" / "old").exists()
    assert not (run.output / "earlier-2").exists()
    run.assert_equals_undisturbed(2)


def test_a_preempted_job_saves_gives_way_and_goes_on(run: Run) -> None:
    """A job of a partition with priority needs both nodes."""
    job = run.submit("--nodes=2")
    run.wait_training(samples=4 * EPOCH)
    command = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 5", f"--chdir={run.folder}"]
    urgent = run.cluster.run(*command).split()[-1]
    wait_for("the urgent job", lambda: run.cluster.state(urgent) in ("RUNNING", "COMPLETED"))
    assert run.position() % (20 * EPOCH) != 0, "nothing was saved when the job had to give way"
    run.end_soon()
    run.wait(job)
    assert run.cluster.job(job)["Restarts"] == "1"
    run.assert_equals_undisturbed(2)


def test_scancel_saves_ends_every_process_and_the_job_stays_away(run: Run) -> None:
    job = run.submit("--nodes=2")
    run.wait_training(samples=4 * EPOCH)
    assert len(run.cluster.training()) >= 5  # the script, two launchers and two ranks
    run.cluster.run("scancel", job)
    run.wait(job, "CANCELLED")
    wait_for("end of the job's processes", lambda: not run.cluster.training())
    assert run.position() > 0
    assert "after a signal: start again to go on" in run.log()
    time.sleep(3)
    assert run.cluster.run("squeue", "-h") == ""


@pytest.mark.slow
def test_decoding_processes_outlive_the_signal(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM signals the processes that decode pictures too, and without them the batch in hand cannot end."""
    run = Run(cluster, tmp_path, make_raw(tmp_path / "raw"))
    words = ["--config", str(run.config), "model.image.name=resnet18", "model.image.image_size=32"]
    words += ["model.text.name=cnn", "stream.workers=2"]
    job = run.submit(words=words)
    run.wait_training()
    run.cluster.run("scancel", "--signal=TERM", f"{job}.0")
    run.wait(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == "85:0", run.log()
    assert run.position() > 0


# ---------------------------------------------------------------------------------------------- faults


def test_a_killed_rank_ends_the_job_with_its_name(run: Run) -> None:
    """Before the first checkpoint: another start would come no farther."""
    run.set_epochs(1_000_000, save_every=900_000)
    job = run.submit("--nodes=2")
    run.wait_training()
    victim = next(p for p in run.cluster.training() if p.environ().get("RANK") == "1")
    victim.kill()
    run.wait(job, "FAILED")
    assert run.cluster.job(job)["ExitCode"] == "1:0"
    assert "node2: error: rank 1 was killed by SIGKILL" in run.out()
    assert "before a new checkpoint: the job ends" in run.out()


def test_a_rank_killed_after_a_checkpoint_costs_one_more_start(run: Run) -> None:
    job = run.submit("--nodes=2")
    wait_for("checkpoint", lambda: run.position() > 0)
    next(p for p in run.cluster.training() if p.environ().get("RANK") == "1").kill()
    wait_for("requeue", lambda: run.cluster.job(job)["Restarts"] == "1")
    assert "failed with exit code 1 after checkpoint samples-" in run.out()
    run.end_soon()
    run.wait(job)
    run.assert_equals_undisturbed(2)


def test_a_lost_node_leaves_the_job_to_the_other(run: Run) -> None:
    """All processes of a node die at once; with --nodes=1-2 the run goes on with what is left."""
    job = run.submit("--nodes=1-2")
    wait_for("checkpoint", lambda: run.position() > 0)
    assert "on node[1-2]" in run.out()
    run.cluster.kill_node("node2")
    wait_for("requeue", lambda: run.cluster.job(job)["Restarts"] == "1")
    run.end_soon()
    run.wait(job)
    assert "start 2, on node1," in run.out()
    assert "1 process on cpu" in run.log()
    assert len(run.lines()) == round(run.lines()[-1]["epoch"]) * EPOCH // BATCH


@pytest.mark.slow
def test_the_node_of_the_batch_script_is_lost_and_comes_back(run: Run) -> None:
    job = run.submit("--nodes=2")
    wait_for("checkpoint", lambda: run.position() > 0)
    run.cluster.kill_node("node1")
    wait_for("requeue", lambda: run.cluster.job(job)["Restarts"] == "1")
    run.end_soon()
    run.cluster.start_node("node1")
    run.wait(job)
    run.assert_equals_undisturbed(2)


@pytest.mark.slow
def test_a_node_set_down_ends_a_job_that_may_not_be_queued_again(run: Run) -> None:
    job = run.submit("--nodes=2", "--no-requeue")
    run.wait_training()
    run.cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    run.wait(job, "NODE_FAIL")
    wait_for("end of the job's processes", lambda: not run.cluster.training())


# ---------------------------------------------------------------------------------------------- seeds


def test_an_array_trains_one_seed_a_task(run: Run) -> None:
    run.set_epochs(2)
    job = run.submit("--array=3-4")
    wait_for("end of the array", lambda: run.cluster.run("squeue", "-h") == "")
    for task in (3, 4):
        assert run.cluster.state(f"{job}_{task}") == "COMPLETED", run.out()
    folder = run.output
    losses = []
    for seed in (3, 4):
        run.output = folder / f"seed-{seed}"
        assert f"seed: {seed}\n" in (run.output / "config.yaml").read_text()
        losses.append(run.lines())
    assert losses[0] != losses[1]
    run.output = run.folder / "alone"
    words = ["--config", str(run.config), "--train.seed", "4", "--output", str(run.output)]
    run.wait(run.submit(words=words))
    assert run.lines() == losses[1]
