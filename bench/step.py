"""Seconds of one batch, all fourteen updates of the reference recipe: this library beside a plain PyTorch port.

    python -m bench.step [--batches 64 256 1024] [--rounds 7] [--threads 1]

Preset `reference` on features (image 4096, text 300, H = E = 1024): one no-grad forward, the four discriminators once
each, then five times the generator's image side and text side. Same initial weights, batches and mismatched rows for
all. Contestants, each in a process of its own, which take turns in every round:

    ours                    build_step_inputs and run_phase, as the training loop calls them
    ours, compiled          the same with train.compile
    reference               bench/reference_step.py: the algorithm written straight, torch's default Adam
    reference, fused Adam   the same with Adam(fused=True): what that switch alone brings
    reference, kept memory  with glibc told to reuse freed memory, as ours tells it
    reference, apart        discriminator phases on the rows they need only: less work, but not our losses
    reference, compiled     losses and optimiser steps by torch.compile

Then two processes: collectives and bytes of each phase, and one against two with as many rows each.

Before anything is timed, ours and the reference train side by side at the full widths, and every loss of every batch
must agree (see `agreement` in step_worker.py). A figure is the median over the rounds. On a machine that others use
too, processor time with one thread is the figure to trust: threads that wait for each other count as busy. Writes
bench/results/step.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.common import Worker, spread, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import BadInput, run_main

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
"""Of a loss, relative to max(1, loss)."""


@dataclass
class Arguments:
    """Time one batch of all updates against a plain PyTorch port and write bench/results/step.json."""

    batches: tuple[Annotated[int, Range(2, 1e6)], ...] = (64, 256, 1024)
    """Batch sizes; BatchNorm needs two rows."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 (autocast)."""
    rounds: Count = 7
    """Rounds; in each all contestants take turns."""
    seconds: Annotated[float, Range(0, 1e5)] = 1.5
    """Least time of one turn."""
    threads: Annotated[int, Range(0, 4096)] = 0
    """torch.set_num_threads of every contestant; 0 takes all cores."""
    check: Annotated[int, Range(0, 1e6)] = 50
    """Batches over which losses are compared first; 0 leaves it out."""
    compiled: bool = True
    """Take the contestants that torch.compile makes."""
    scale: Annotated[int, Range(0, 1e6)] = 64
    """Rows a process when collectives are counted and one and two processes are timed; 0 leaves it out."""
    name: str = "step"
    """Name of the results file."""


# ---------------------------------------------------------------------------------------------- timing


def start(threads: int, *words: object) -> Worker:
    return Worker([sys.executable, "-m", "bench.step", "worker", str(threads), *map(str, words)], cwd=ROOT)


def measure(arguments: Arguments, size: int, names: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """One batch size, all precisions: seconds a batch by contestant."""
    workers: dict[str, Worker] = {}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    firsts: dict[str, float] = {}
    try:
        for name, (contestant, precision) in names.items():  # one after another, so that first batches are alone
            workers[name] = start(arguments.threads, "serve", contestant, size, precision)
            firsts[name] = workers[name].answer()["first"]
        for i in track(range(arguments.rounds), f"batch {size}", console=Console(stderr=True)):
            for name in names if i % 2 == 0 else reversed(names):
                times[name].append(workers[name].ask(arguments.seconds))
    finally:
        for worker in workers.values():
            worker.close()
    return {
        name: {
            "first_batch_seconds": firsts[name],
            **{clock: spread([t[clock] for t in times[name]]) for clock in ("wall", "cpu")},
        }
        for name in names
    }


def print_table(size: int, record: dict[str, Any]) -> None:
    table = Table(title=f"batch {size}: milliseconds, and how many times as long as ours", title_justify="left")
    for column in ("", "processor", "wall", "/ ours fp32", "/ ours bf16", "first batch s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in record.items():
        ratios = [
            f"{row['cpu']['median'] / record[f'ours {p}']['cpu']['median']:.2f}" if f"ours {p}" in record else "–"
            for p in ("fp32", "bf16")
        ]
        cells = [f"{1000 * row[clock]['median']:.0f}" for clock in ("cpu", "wall")]
        table.add_row(name, *cells, *ratios, f"{row['first_batch_seconds']:.1f}")
    Console(width=120).print(table)


# ---------------------------------------------------------------------------------------------- processes


def scale(arguments: Arguments) -> dict[str, Any]:
    """One and two processes with as many rows each, one thread each; two with gradients in bf16, too."""
    out = {}
    for name, world, reduced in (("1", 1, "fp32"), ("2", 2, "fp32"), ("2, gradients in bf16", 2, "bf16")):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [*launch, "-m", "bench.step", "worker", "1", "communicate", str(arguments.scale), reduced]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # accelerate gives a process that is alone all cores
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        answers = [x.removeprefix("answer ") for x in done.stdout.splitlines() if x.startswith("answer ")]
        if not answers:
            raise RuntimeError(f"{world} processes ended with {done.returncode}: {done.stderr[-2000:]}")
        out[name] = json.loads(answers[0])
    return out


def print_scale(found: dict[str, Any]) -> None:
    least = found["1"]["gradient_bytes"]
    for name, row in found.items():
        if "collectives" in row:
            print_collectives(f"{name}: what one process sends in a batch", row["collectives"], least)
    for name, row in found.items():
        seconds = row["seconds"]
        print(f"{name}: {seconds['wall']['median']:.2f} s wall, {seconds['cpu']['median']:.2f} s processor a batch")


def print_collectives(title: str, calls: dict[str, dict[str, float]], least: dict[str, float]) -> None:
    """`least`: bytes of fp32 gradients, by part."""
    table = Table(title=title, title_justify="left")
    for column in ("", "calls", "MB", "least, fp32 gradients MB"):
        table.add_column(column, justify="left" if not column else "right")
    for part in [*dict.fromkeys(key.rpartition(" ")[0] for key in calls), ""]:  # "": all
        rows = {k: v for k, v in calls.items() if part in ("", k.rpartition(" ")[0])}
        both = [sum(v[what] for v in rows.values()) for what in ("calls", "bytes")]
        few = least.get(part, 0) if part else sum(least.values())
        cells = [f"{both[0]:.0f}", f"{both[1] / 1e6:.2f}", f"{few / 1e6:.2f}"]
        table.add_row(part or "all", *cells)
    Console(width=120).print(table)


# ---------------------------------------------------------------------------------------------- command line


def check_arguments(arguments: Arguments) -> None:
    """Raises BadInput naming the flag."""
    for precision in arguments.precisions:
        if precision not in ("fp32", "bf16"):
            raise BadInput(f"--precisions has '{precision}': fp32 and bf16 are there")
    if arguments.scale == 1:
        raise BadInput("--scale is 1: give 0 or at least 2, since BatchNorm needs two rows")


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        from bench.step_worker import work  # with torch, for which --help does not wait

        work(sys.argv[2:])
        return
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.step")
    check_arguments(arguments)
    record: dict[str, Any] = {"rounds": arguments.rounds, "threads": arguments.threads or os.cpu_count()}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    record["bf16_instructions"] = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    if arguments.check:
        checker = start(arguments.threads, "agree", arguments.check)
        record["agreement"] = found = checker.answer()
        checker.close()
        print(f"losses agree: {found}" if found["relative"] <= TOLERANCE else f"losses differ: {found}")
        if found["relative"] > TOLERANCE:
            raise RuntimeError(f"ours and the reference differ by {found['relative']:.2e}: not the same computation")
    from bench.step_worker import CONTESTANTS

    contestants = [n for n in CONTESTANTS if arguments.compiled or "compiled" not in n]
    names = {f"{n} {p}": (n, p) for p in arguments.precisions for n in contestants}
    record["seconds"] = {}
    for size in arguments.batches:
        record["seconds"][str(size)] = measured = measure(arguments, size, names)
        print_table(size, measured)
    if arguments.scale:
        record["processes"] = found = scale(arguments)
        print_scale(found)
    print(f"written to {write_results(arguments.name, record)}")


if __name__ == "__main__":
    run_main(main)
