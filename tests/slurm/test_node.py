"""The launcher of a node, without SLURM: its command line, its exit code, and signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from cmgan_dist.config.cli import parse_arguments
from cmgan_dist.config.load import to_yaml
from cmgan_dist.distributed.launch_config import launch_environment
from cmgan_dist.errors import BadInput, LostProcess, run_main
from launchers.slurm.node import check, combined, failed_first, read_job
from tests.services import forked
from tests.services.slurm import free_port, wait_for
from tests.toy import SMALL, environment

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--preset", "smoke", "--data", "d", "--output", "o"]


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("SLURM")]:
        monkeypatch.delenv(name)


def test_processes_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_job(WORDS).world == 1
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert read_job(WORDS).world == 12
    for words in (["--processes-per-node", "2"], ["--processes-per-node=2"]):
        job = read_job([*WORDS[:2], *words, *WORDS[2:]])
        assert (job.world, job.arguments) == (6, WORDS)
    for value in ("0", "-1", "two"):
        with pytest.raises(BadInput, match=f"--processes-per-node is {value}, expected a whole number"):
            read_job([*WORDS, "--processes-per-node", value])
    with pytest.raises(BadInput, match="--processes-per-node has no value"):
        read_job([*WORDS, "--processes-per-node"])


def test_an_array_task_has_a_seed_and_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    job = read_job(WORDS)
    assert (job.config.train.seed, job.output) == (7, Path("o/seed-7"))
    for words in (["--train.seed", "3"], ["--train.seed=3"], ["train.seed=3"]):
        with pytest.raises(BadInput, match=r"--train\.seed is given, and so is a job array"):
            read_job([*WORDS, *words])


def test_jobs_meet_at_ports_that_nobody_holds() -> None:
    command = [sys.executable, "-m", "launchers.slurm.ports"]
    with socket.socket() as held:
        first = free_port() & ~1  # of a pair
        held.bind(("", first + 1))
        held.listen()
        for count, expected in ((1, first), (2, first + 2)):
            done = subprocess.run(
                [*command, str(first), str(count)], cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert int(done.stdout) == expected
    none = subprocess.run([*command, "65535", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (none.returncode, none.stderr[:16]) == (1, "error: no 2 free")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 85], 85), ([85, -6], 85), ([1, 2], 2), ([-9, 1], 1), ([-9, 0], 1), ([3], 1)],
)
def test_exit_code_of_a_node(codes: list[int], expected: int) -> None:
    assert combined(codes) == expected


def test_the_rank_that_failed_first_is_not_one_that_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 0 was seen first, and says that it lost another; rank 1 had failed before."""
    for rank, error in ((0, LostProcess("lost")), (1, BadInput("no"))):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank)))
        monkeypatch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit):
            run_main(Mock(side_effect=error))
    now = time.time()
    assert failed_first({0: now, 1: now + 3}, tmp_path) == 1
    assert failed_first({0: now, 2: now + 3}, tmp_path) == 2
    assert failed_first({0: now, 2: now + 30}, tmp_path) == 0  # the launcher has ended it


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "launchers" / "configs").glob("*.yaml")))
def test_deepspeed_is_asked_for_as_accelerate_launch_asks(name: str, tmp_path: Path) -> None:
    file = ROOT / "launchers" / "configs" / name
    script = tmp_path / "show.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    launch += ["--num_processes", "1", "--main_process_port", str(free_port()), str(script)]
    done = forked.run(launch, environment())
    theirs = json.loads(done.stdout.splitlines()[-1])
    for key, value in launch_environment(str(file)).items():
        assert theirs[key] == value
    assert theirs.get("ACCELERATE_USE_DEEPSPEED", "false") == launch_environment(str(file)).get(
        "ACCELERATE_USE_DEEPSPEED", "false"
    )


def test_a_file_that_is_no_accelerate_config(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text("a: 1")
    (tmp_path / "d.yaml").write_text("distributed_type: FSDP")
    (tmp_path / "e.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stag: 1}")
    (tmp_path / "f.yaml").write_text("distributed_type: DEEPSPED")
    (tmp_path / "g.yaml").write_text("distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 1}")
    (tmp_path / "h.yaml").write_text("distributed_type: MULTI_GPU\nuse_cpu: false\ngpu_ids: 0,1")
    cases = (("a", "is not YAML"), ("b", "has no distributed_type"), ("c", "does not exist"))
    cases += (("d", "asks for FSDP"), ("e", "has deepspeed_config.zero_stag, which is not used"))
    cases += (("f", "has distributed_type DEEPSPED"), ("g", "has a deepspeed_config, and"), ("h", "has gpu_ids, which"))
    for name, sentence in cases:
        with pytest.raises(BadInput, match=f"{name}.yaml {sentence}"):
            launch_environment(str(tmp_path / f"{name}.yaml"))


@pytest.mark.process
def test_a_signal_to_every_process_saves(feature_data: Callable[..., Path], tmp_path: Path) -> None:
    """As SLURM signals: all at once and more than once, here while they start."""
    run = tmp_path / "run"
    words = [
        "--preset",
        "smoke",
        "stream.global_batch=16",
        "train.tracker=none",
        "train.threads=1",
        "train.log_every=1",
    ]
    words += ["train.epochs=5000", "train.val_every=0", "train.save_every=5000", "--processes-per-node", "2"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launchers.slurm.node",
            "run",
            *words,
            "--data",
            str(feature_data()),
            "--output",
            str(run),
        ],
        env={
            **os.environ,
            "SLURM_JOB_ID": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        },
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        logs = [run / "logs" / f"rank-0000{rank}.log" for rank in (0, 1)]
        wait_for("logs", lambda: all(log.exists() for log in logs))
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(process.pid, number)
            time.sleep(0.1)
        _, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 85, errors
    assert "saved at sample" in errors
    assert len(list((run / "checkpoints").glob("samples-*"))) == 1


@pytest.fixture
def requeued(feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Start the check of job 7 with --resume never, and settings, for the Nth time; return the folder of the run."""

    def start(restarts: int, *words: str) -> Path:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        run = tmp_path / "run"
        check(read_job([*SMALL, "--data", str(data), "--output", str(run), "--resume", "never", *words]))
        return run

    data = feature_data()
    return start


def begin(run: Path, *words: str, checkpoint: bool = False) -> None:
    """Leave what a start has written."""
    config, _ = parse_arguments([*SMALL, "--data", "data", "--output", str(run), *words])
    (run / "config.yaml").write_text(to_yaml(config))
    if checkpoint:
        (run / "checkpoints" / "samples-000000000016").mkdir(parents=True)


def test_never_begins_anew_until_a_job_has_a_checkpoint(requeued: Callable[..., Path]) -> None:
    """Also with another config, which a job may find when it is started again."""
    run = requeued(0)
    begin(run)
    requeued(1, "train.seed=3")
    assert (run / "earlier-1" / "config.yaml").exists()
    begin(run, "train.seed=3", checkpoint=True)
    requeued(2, "train.seed=3")
    assert not (run / "earlier-2").exists()
    with pytest.raises(BadInput, match=r"was trained with train\.seed 3, not 4.*for --resume never submit a new one"):
        requeued(3, "train.seed=4")


def test_never_moves_an_earlier_run_aside_whose_job_was_stopped_before_it_could(requeued: Callable[..., Path]) -> None:
    run = requeued(0)
    begin(run, checkpoint=True)
    (run / "logs" / "begun-7").unlink(missing_ok=True)
    requeued(1)
    assert (run / "earlier-1" / "checkpoints").exists()


def test_never_takes_a_folder_whose_job_ended_before_it_had_a_run(requeued: Callable[..., Path]) -> None:
    run = requeued(0)
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / "rank-00000.log").write_text("error")
    requeued(0)
    assert not (run / "earlier-1").exists()
