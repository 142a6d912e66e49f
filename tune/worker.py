"""A process that imports the library once and forks the processes of one trial after another.

stdin    a line of JSON for a trial: {"config": YAML, "may_change": [...], "processes": N, "port": P, "log": FILE};
         then a line for each validation that was reported: "go" or "stop"
stdout   lines of JSON: what `report` says after each validation; {"failed": SENTENCE} for bad input, such as a run that
         diverged; {"ended": EXIT CODE} when the trial's processes are gone

A trial waits for its answer, so its folder holds still while it is copied. Every process dies with its parent, so that
none is left when a worker of the cluster is killed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from cmgan_dist.config.load import from_yaml
from cmgan_dist.errors import EXIT_BAD_INPUT, BadInput
from cmgan_dist.retrieval.metrics import direction_scores
from cmgan_dist.training.loop import run_training
from cmgan_dist.training.recorder import read_metrics
from cmgan_dist.training.run import Run, prepare

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent ends, however it ends.

    Elsewhere the closed pipe ends this process at its next line."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def read_line() -> str:
    """Return a line of stdin without its end, "" at the end of stdin.

    Nothing is buffered, because parent and child read from the same pipe."""
    line = bytearray()
    while (byte := os.read(0, 1)) and byte != b"\n":
        line += byte
    return line.decode()


def write_line(pipe: int, message: dict[str, Any]) -> None:
    """Write a message as one line of JSON, in one piece: several processes write to the pipe."""
    os.write(pipe, (json.dumps(message) + "\n").encode())


def report(run: Run, pipe: int) -> None:
    """Report the last validation, wait for the answer, and end the process when it is not "go"."""
    lines = [line for line in read_metrics(run.folder) if line["kind"] == "val"]
    best = max(lines, key=lambda line: line["score"])
    values = {k: v for k, v in best.items() if isinstance(v, float)}
    write_line(
        pipe,
        {
            "score": lines[-1]["score"],
            "best": best["score"],
            "validation": len(lines),
            **direction_scores(values),
            "samples": run.progress.position,
            "epoch": run.progress.position / run.progress.epoch_samples,
            "last": run.progress.position >= run.total,
        },
    )
    if read_line() != "go":
        os._exit(0)


def run_rank(job: dict[str, Any], rank: int, pipe: int) -> NoReturn:
    """Run process `rank` of a trial from the fork to its end; reports and failures go to `pipe`."""
    die_with_parent()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if job["processes"] > 1:
            world = str(job["processes"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        run = prepare(from_yaml(job["config"], "the trial's config"), "auto", job["may_change"])
        if rank == 0:
            run.on_validation = lambda run, _: report(run, pipe)
            if run.progress.position >= run.total:  # killed between its last checkpoint and its last report
                report(run, pipe)
        code = run_training(run)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        write_line(pipe, {"failed": str(error)})
        code = EXIT_BAD_INPUT
    except BaseException:  # noqa: BLE001  a forked process must end here and not go on as its parent would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_trial(job: dict[str, Any], pipe: int) -> int:
    """Fork the trial's processes, wait for them, and return the exit code of the first that failed, else 0."""
    ranks: dict[int, int] = {}
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            run_rank(job, rank, pipe)
        ranks[pid] = rank
    ended = 0
    while ranks:
        pid, status = os.wait()
        code, rank = os.waitstatus_to_exitcode(status), ranks.pop(pid)
        if code or rank == 0:  # all is saved by now, or nothing more can be
            ended = ended or code
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return ended
    return ended


def main() -> None:
    """Run the trials that stdin names, one after another, until it ends."""
    die_with_parent()
    pipe = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not come between our lines
    for stale in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(stale, None)
    gc.freeze()  # the forks share what was imported
    while line := read_line():
        job = json.loads(line)
        Path(job["log"]).parent.mkdir(parents=True, exist_ok=True)
        write_line(pipe, {"ended": run_trial(job, pipe)})


if __name__ == "__main__":
    main()
