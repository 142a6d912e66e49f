"""Memory and time of a batch under DeepSpeed ZeRO-1 and ZeRO-2 and with sharded backbones (FSDP2), beside DDP, for each
of several processes.

    python -m bench.zero [--processes 2 4] [--batches 3] [--models reference backbone] [--kinds DDP FSDP2]

`reference`: preset `reference` on features at full widths, alternate update. `backbone`: convnext_base (88 million
parameters) trained on pictures of 64 x 64 with the layers of preset `features`, joint update. Both with 16 rows in all.

Parameters (this process's share of them), what the optimiser holds (Adam's moments), and the highest that all tensors
together come to in a batch, activations included; seconds of a batch, at best. Memory does not depend on who else uses
the machine; seconds do. Rows that are not asked for stay as they were measured.
Writes bench/results/zero.json.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from bench.common import RESULTS, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Config, Count
from cmgan_dist.config.markers import Range
from cmgan_dist.config.presets import preset
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.errors import BadInput, run_main

if TYPE_CHECKING:  # torch takes seconds to import, and --help waits
    from torch.profiler import profile

    from cmgan_dist.data.batch import Batch
    from cmgan_dist.distributed.engine import Engine

ROWS, CLASSES = 16, 10
MODELS = ("reference", "backbone")
STAGES: dict[str, dict[str, object]] = {"ZeRO-1": {"stage": 1}, "ZeRO-2": {"stage": 2}}
KINDS = ("DDP", *STAGES, "FSDP2")
MIB = 2**20


@dataclass
class Arguments:
    """Measure memory and time of a batch under DDP, ZeRO-1, ZeRO-2 and FSDP2."""

    processes: tuple[Annotated[int, Range(2, ROWS)], ...] = (2, 4)
    """Numbers of processes on this machine."""
    batches: Count = 3
    """Batches that are timed, after two that are not."""
    models: tuple[str, ...] = MODELS
    """What is trained: reference, backbone."""
    kinds: tuple[str, ...] = KINDS
    """How: DDP, ZeRO-1, ZeRO-2, or FSDP2 where a backbone is trained. What was measured before of the others stays."""
    name: str = "zero"
    """Of the results file in bench/results/."""


def setting(model: str) -> tuple[Config, DataSpec]:
    """Return the config of a model and the kind of its data."""
    if model == "reference":
        config, image_dim = preset("reference"), 4096
    else:
        config, image_dim = preset("features"), None
        image = config.model.image
        image.name, image.image_size, image.trainable = "convnext_base", 64, True
    config.stream.global_batch = ROWS
    return config, DataSpec([str(c) for c in range(CLASSES)], "single", image_dim, 300)


def batch_of(spec: DataSpec, rows: int, seed: int) -> Batch:
    """Return random rows of a kind of data."""
    import torch

    from cmgan_dist.data.batch import Batch

    rng = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (rows, 64, 64, 4), generator=rng, dtype=torch.uint8)
    image = pictures if spec.image_dim is None else torch.randn(rows, spec.image_dim, generator=rng)
    labels = torch.nn.functional.one_hot(torch.arange(rows) % CLASSES, CLASSES).bool()
    return Batch(image, torch.randn(rows, 300, generator=rng), labels, [str(i) for i in range(rows)], size=rows)


def optimiser_bytes(engine: Engine) -> int:
    """Return what this process holds of an engine's optimiser beside the module's own parameters."""
    from cmgan_dist.distributed.zero import ZeroEngine

    optimizers = [group.optimizer for group in engine.groups] if isinstance(engine, ZeroEngine) else [engine.optimizer]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(value.nbytes for state in states for value in state.values())


def traced() -> profile:
    """Return a trace of what is allocated for tensors on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def allocated(trace: profile) -> list[int]:
    """Return the bytes that a trace had allocated after each of its events, which may be negative."""
    assert trace.profiler is not None
    events: list[Any] = list(trace.profiler.kineto_results.events())  # type: ignore[union-attr]
    found = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return list(itertools.accumulate(e.nbytes() for e in found))


def worker(model: str, kind: str, batches: int) -> None:
    """Train as one of several processes; the first one prints what it has measured."""
    import torch

    from cmgan_dist.distributed.processes import Parallel
    from cmgan_dist.training.phases import phase_table, run_phase
    from cmgan_dist.training.state import build_networks
    from cmgan_dist.training.step import build_step_inputs

    torch.set_num_threads(1)
    config, spec = setting(model)
    parallel = Parallel()
    parallel.zero_config = {"zero_optimization": STAGES[kind]} if kind in STAGES else None
    config.train.shard_backbones = kind == "FSDP2"
    data, positions = batch_of(spec, ROWS // parallel.world, parallel.rank), itertools.count(step=ROWS)

    def step() -> float:
        """Train on one batch and return the seconds that it took."""
        parallel.barrier()
        start = time.perf_counter()
        inputs = build_step_inputs(data, networks, config, parallel, next(positions))
        for phase in phase_table(config):
            run_phase(phase, [inputs], networks.engines, parallel.autocast)
        return time.perf_counter() - start

    with traced() as building:
        networks = build_networks(config, spec, None, parallel)
        step()
    with traced() as training:
        step()
    held = [p for engine in networks.engines.values() for p in engine.updated.values()]
    record = {
        "parameters": sum(p.nbytes for p in held),
        "optimiser": sum(optimiser_bytes(engine) for engine in networks.engines.values()),
        "highest": allocated(building)[-1] + max(allocated(training)),
        "seconds": min(step() for _ in range(batches)),
    }
    if parallel.main:
        print("answer", json.dumps(record), flush=True)
    networks.release()
    parallel.close()


def measure(model: str, kind: str, processes: int, batches: int) -> dict[str, float]:
    """Return what `worker` measured on the first of so many processes."""
    launcher = [sys.executable, "-m", "cmgan_dist.distributed.launch", "--standalone", "--nproc_per_node"]
    words = [*launcher, str(processes), "-m", "bench.zero", "worker", model, kind, str(batches)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    answers = [line.removeprefix("answer ") for line in done.stdout.splitlines() if line.startswith("answer ")]
    if not answers:
        raise BadInput(f"{model} under {kind} on {processes} processes ended without an answer: see above")
    record: dict[str, float] = json.loads(answers[0])
    return record


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="MiB of each process, seconds of a batch", title_justify="left")
    for column in ("", "parameters", "optimiser", "highest", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in record.items():
        table.add_row(
            name, *[f"{row[k] / MIB:.0f}" for k in ("parameters", "optimiser", "highest")], f"{row['seconds']:.2f}"
        )
    Console(width=100).print(table)


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.zero")
    for flag, names, known in (("models", arguments.models, MODELS), ("kinds", arguments.kinds, KINDS)):
        for name in names:
            if name not in known:
                raise BadInput(f"--{flag} names '{name}': choose from {', '.join(known)}")
    for processes in arguments.processes:
        if ROWS % processes:
            raise BadInput(f"--processes has {processes}: give 2, 4, 8 or 16, among which {ROWS} rows fall equally")
    path = RESULTS / f"{arguments.name}.json"
    before = json.loads(path.read_text())["each_process"] if path.is_file() else {}
    record = before | {
        f"{model}, {processes} processes, {kind}": measure(model, kind, processes, arguments.batches)
        for model in arguments.models
        for processes in arguments.processes
        for kind in arguments.kinds
        if kind != "FSDP2" or model == "backbone"
    }
    show(record)
    print(write_results(arguments.name, {"rows": ROWS, "each_process": record}))


if __name__ == "__main__":
    run_main(main)
