"""Fused kernels and CPU paths against their rivals; what the roofline model says where no GPU is at hand.

    python -m bench.kernels [--rounds 5] [--gpu.skip] [--cpu.skip]

On a GPU: first correctness (tests/gpu by pytest), then BatchNorm per group + LeakyReLU (+ dropout) of a shared layer's
two modalities, forward and backward. Contestants take the same input:

    ours             the Triton kernels
    eager            F.batch_norm per group without cuDNN, leaky_relu, dropout
    cuDNN            the same with cudnn_batch_norm
    torch.compile    eager, compiled by inductor (max-autotune off)
    apex-style       Welford statistics, element-wise transform and reductions of torch's SyncBatchNorm, which come
                     from apex, then leaky_relu, dropout

Times are CUDA events around one forward and backward, L2 flushed before each (triton.testing.do_bench); `graph` is the
same replayed from a CUDA graph, without the launches' cost on the host. Launches are counted by the profiler. The
clocks, power limit and driver are noted beside them. On a CPU: contestants take turns, one thread, processor time (on a
machine that others use too it is the figure to trust); a figure is the median over the rounds.

Writes bench/results/kernels.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from bench.common import RESULTS, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import run_main


@dataclass
class Part:
    """One half of the benchmark."""

    skip: bool = False
    """Leave it out; figures of an earlier run stay in the file."""


@dataclass
class Arguments:
    """Time the fused kernels and the CPU paths and write bench/results/kernels.json."""

    rounds: Count = 5
    """CPU: rounds in which all contestants take turns."""
    seconds: Annotated[float, Range(0, 1e5)] = 0.2
    """CPU: processor time of one contestant in one round."""
    cpu: Part = field(default_factory=Part)
    gpu: Part = field(default_factory=Part)
    name: str = "kernels"
    """Of the results file in bench/results/."""


def _show(console: Console, record: dict[str, Any]) -> None:
    for title, rows in record.items():
        if not isinstance(rows, list):
            continue
        names = list(rows[0]["ms"])
        table = Table(title=f"{title}, ms")
        for column in [k for k in rows[0] if k != "ms"] + names:
            table.add_column(column)
        for row in rows:
            table.add_row(
                *(str(v) for k, v in row.items() if k != "ms"), *(f"{row['ms'][n]['median']:.3f}" for n in names)
            )
        console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the machine has and write the results."""
    args = parse(Arguments, sys.argv[1:] if argv is None else argv, prog="python -m bench.kernels")
    # after the command line: torch takes seconds to import
    import torch

    from bench.kernels_cpu import cpu
    from bench.kernels_gpu import BATCHES, gpu
    from bench.kernels_model import modelled

    console = Console(width=140)
    path = RESULTS / f"{args.name}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    record.pop("machine", None)
    record["modelled on an H100, not measured"] = [modelled(batch) for batch in BATCHES]
    if not args.cpu.skip:
        record["cpu"] = cpu(args.rounds, args.seconds)
        _show(console, record["cpu"])
    record.setdefault("gpu", None)
    if torch.cuda.is_available() and not args.gpu.skip:
        record["gpu"] = gpu(console)
    else:
        console.print("GPU left out: its times are modelled only")
    console.print(f"written to {write_results(args.name, record)}")


if __name__ == "__main__":
    run_main(main)
