"""One node of a SLURM job: checks before, a launcher of the node's processes, and what each process runs.

python -m launchers.slurm.node check|run|rank [--processes-per-node N] [--accelerate-config FILE] TRAINING OPTIONS

`check` reads the options, the data and the output folder. `run` is started by srun, once a node: it starts the
processes and writes the output of each to OUTPUT/logs/rank-N.log. Torch's own launcher would do, but it turns every
exit code into 1 and dies of SIGUSR1. Exit codes: 0 done, 1 a process failed, 2 bad input, 85 saved after a signal.
srun returns the greatest of its launchers.

In a job array, task N trains with train.seed N into OUTPUT/seed-N.

Signals: SLURM sends them to every process of a step, those that decode pictures and those that nobody knows of as well.
So all that `run` starts has SIGTERM and SIGUSR1 blocked, and `run` passes what it gets as SIGINT to the ranks alone.
They hold it back until they can act on it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cmgan_dist.config.cli import parse_arguments
from cmgan_dist.config.fields import CONFIG_NAME, Config, micro_batch
from cmgan_dist.config.load import check_places
from cmgan_dist.data.folder import check_output
from cmgan_dist.distributed.launch import take
from cmgan_dist.distributed.launch_config import launch_environment
from cmgan_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_LOST, BadInput, run_main
from cmgan_dist.interrupts import EXIT_SIGNALLED
from launchers.train import train_and_report

FLAG = "--processes-per-node"
STOP = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
PATIENCE = 20.0
"""Seconds that processes have to fail by themselves, with their own message, after one of them failed."""


def integer(name: str, default: int) -> int:
    """Return an environment variable as a number, `default` where it is not set or empty."""
    return int(os.environ.get(name) or default)


@dataclass
class Job:
    """A job is what is trained, with which options, on how many nodes and processes."""

    config: Config
    resume: str
    arguments: list[str]
    """Options of launchers/train.py."""
    environment: dict[str, str]
    """What `accelerate launch` would set for DeepSpeed."""
    nodes: int
    processes: int
    """Processes on each node."""

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output)

    @property
    def world(self) -> int:
        """The number of processes on all nodes."""
        return self.nodes * self.processes

    def log(self, rank: int) -> Path:
        """Return the file that holds what process `rank` says."""
        return self.output / "logs" / f"rank-{rank:05d}.log"


def read_job(words: Sequence[str]) -> Job:
    """Return the job that the command line and SLURM's variables describe. Raises BadInput naming the flag."""
    arguments = list(words)
    processes = integer("SLURM_GPUS_ON_NODE", 1)
    given = take(arguments, FLAG)
    if given is not None:
        if not given.isdecimal() or int(given) < 1:
            raise BadInput(f"{FLAG} is {given}, expected a whole number from 1 on")
        processes = int(given)
    environment = launch_environment(take(arguments, "--accelerate-config"), "--accelerate-config")
    config, chosen = parse_arguments(arguments)
    check_places(config)
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        if any(word.partition("=")[0] in ("--train.seed", "train.seed") for word in arguments):
            raise BadInput("--train.seed is given, and so is a job array, whose numbers are the seeds: drop one")
        arguments += ["--train.seed", task, "--output", str(Path(config.output) / f"seed-{task}")]
        config, chosen = parse_arguments(arguments)
    nodes = integer("SLURM_JOB_NUM_NODES", 1)
    return Job(config, chosen.resume, arguments, environment, nodes, processes)


# ---------------------------------------------------------------------------------------------- check


def check(job: Job) -> int:
    """Raises BadInput for whatever would stop the run before its first update; `--resume never` moves an earlier run
    aside here, see `make_way`."""
    check_output(job.output, CONFIG_NAME)
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        probe = job.output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"--output {job.output} cannot be written to ({error.strerror}): name another folder") from None
    # after the cheap checks: torch and its friends take seconds to import
    from cmgan_dist.data.stream import Stream

    config = job.config
    size = config.model.image.image_size
    micro = dataclasses.replace(config.stream, global_batch=micro_batch(config))
    stream = Stream(config.data, micro, seed=config.train.seed, image_size=size, rank=0, world=job.world)
    stream.readers[0].of(config.stream.val_split)
    make_way(job)
    say(f"{job.nodes} x {job.processes} processes, logs in {job.output / 'logs'}")
    print(job.output)  # for the script
    return EXIT_DONE


def make_way(job: Job) -> None:
    """Raises BadInput where the job cannot go on with the run that is there; `--resume never` moves that aside.

    A job that SLURM starts again goes on from its own checkpoint. Where it has none yet, or an earlier start did not
    come as far as here, `never` begins anew."""
    from cmgan_dist.jobs.lock import owning
    from cmgan_dist.training.checkpoint import checkpoints_of
    from cmgan_dist.training.run import LOCK, LOGS, check_same_run, set_aside

    number = os.environ.get("SLURM_JOB_ID")
    if job.resume == "auto" or number is None:
        check_same_run(job.output, job.config)
        return
    begun = job.output / LOGS / f"begun-{number}"
    if integer("SLURM_RESTART_COUNT", 0) and begun.exists() and checkpoints_of(job.output / "checkpoints"):
        try:
            check_same_run(job.output, job.config)
        except BadInput as error:
            raise BadInput(f"{error}; job {number} has begun already: for --resume never submit a new one") from None
        return
    with owning(job.output, LOCK):
        set_aside(job.output)
        begun.parent.mkdir(exist_ok=True)
        begun.touch()


# ---------------------------------------------------------------------------------------------- one launcher a node


def say(text: str) -> None:
    print(f"{os.environ.get('SLURMD_NODENAME', 'here')}: {text}", file=sys.stderr, flush=True)


def start(job: Job, node: int, local_rank: int, log: IO[bytes], reports: Path) -> subprocess.Popen[bytes]:
    rank = node * job.processes + local_rank
    values = {
        "RANK": rank,
        "WORLD_SIZE": job.world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": job.processes,
        "GROUP_RANK": node,
        "TORCHELASTIC_ERROR_FILE": reports / str(rank),
        "PYTHONUNBUFFERED": 1,
    }
    command = [sys.executable, "-m", "launchers.slurm.node", "rank", *job.arguments]
    environment = {**os.environ, **job.environment, **{k: str(v) for k, v in values.items()}}
    environment.pop("SLURM_ARRAY_TASK_ID", None)  # the arguments have its seed and folder by now
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def note_failures(ranks: Mapping[int, subprocess.Popen[bytes]], ended: dict[int, float]) -> None:
    """Add to `ended` the time at which ranks are first seen to have failed."""
    for rank, process in ranks.items():
        if process.poll() not in (None, EXIT_DONE, EXIT_SIGNALLED):
            ended.setdefault(rank, time.time())


def failed_first(ended: Mapping[int, float], reports: Path) -> int:
    """Return which rank failed first, by when it was seen to have `ended` or, before that, by its own report."""

    def date(rank: int) -> float:
        report = reports / str(rank)
        return float(json.loads(report.read_bytes())["timestamp"]) if report.exists() else ended[rank]

    return min(ended, key=date)


def combined(codes: Sequence[int]) -> int:
    """Return the launcher's exit code. One process that saved means that all did."""
    for code in (EXIT_SIGNALLED, EXIT_BAD_INPUT):
        if code in codes:
            return code
    return EXIT_LOST if any(codes) else EXIT_DONE


def run(job: Job) -> int:
    """Start this node's processes, pass signals on, and see that all end when one fails; say which failed first."""
    with tempfile.TemporaryDirectory() as reports:
        return _run(job, Path(reports))


def _run(job: Job, reports: Path) -> int:
    node = integer("SLURM_NODEID", 0)
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    if gpus is not None and int(gpus) < job.processes:
        raise BadInput(f"{FLAG} is {job.processes} and node {node} has {gpus} GPUs: take fewer processes or more GPUs")
    watched = STOP | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # what is started inherits it
    first = node * job.processes
    job.log(first).parent.mkdir(parents=True, exist_ok=True)
    header = f"--- job {os.environ['SLURM_JOB_ID']}, start {integer('SLURM_RESTART_COUNT', 0) + 1}\n"
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    for local_rank in range(job.processes):
        with open(job.log(first + local_rank), "ab") as log:
            log.write(header.encode())
            log.flush()
            ranks[first + local_rank] = start(job, node, local_rank, log, reports)
    ended: dict[int, float] = {}
    signalled = killed = False
    while any(process.poll() is None for process in ranks.values()):
        info = signal.sigtimedwait(watched, 1.0)
        if info is not None and info.si_signo in STOP and not signalled:
            signalled = True  # once: at a second SIGINT a process would end at once, without saving
            say(f"{signal.Signals(info.si_signo).name}: saving")
            for process in ranks.values():
                process.send_signal(signal.SIGINT)
        note_failures(ranks, ended)
        if ended and not killed and time.time() > min(ended.values()) + PATIENCE:
            killed = True
            for rank, process in ranks.items():
                if process.poll() is None:
                    say(f"rank {rank} did not end after another had failed: killed")
                    process.kill()
    note_failures(ranks, ended)
    if ended:
        first_failed = failed_first(ended, reports)
        why = describe(ranks[first_failed].returncode)
        say(f"error: rank {first_failed} {why}; the end of {job.log(first_failed)}:\n{tail(job.log(first_failed))}")
    code = combined([process.returncode for process in ranks.values()])
    if first == 0 and code in (EXIT_DONE, EXIT_SIGNALLED):
        say(tail(job.log(0), 1))
    return code


def tail(path: Path, count: int = 15) -> str:
    """Return the last lines of a log."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])


# ---------------------------------------------------------------------------------------------- one process


def rank(job: Job) -> int:
    """Train as one process of the job; a signal that came during the start is acted upon after the first batch."""
    from cmgan_dist.training.run import prepare

    run = prepare(job.config, "auto")  # see `check`
    run.parallel.watch_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    code = train_and_report(run)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the interpreter ends, SIGINT would kill again
    return code


def main() -> int:
    modes = {"check": check, "run": run, "rank": rank}
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return EXIT_DONE
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        raise BadInput(f"the first word must be one of {', '.join(modes)}")
    return modes[sys.argv[1]](read_job(sys.argv[2:]))


if __name__ == "__main__":
    run_main(main)
