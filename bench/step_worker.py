"""What a process of bench/step.py does: serve a contestant, compare the losses, count collectives."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.common import spread
from bench.reference_step import Dims, ReferenceStep, Rows
from cmgan_dist.config.fields import Config
from cmgan_dist.config.presets import preset
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.jobs.memory import keep_freed_memory
from cmgan_dist.training.phases import phase_table, run_phase
from cmgan_dist.training.state import Networks, build_networks
from cmgan_dist.training.step import build_step_inputs

POOL = 8
"""Different batches that are gone through in turn."""
ITEM_BYTES = {"float": 4, "int": 4, "unsigned char": 1, "double": 8, "long int": 8, "c10::BFloat16": 2}
"""Of an element, by the profiler's name of its type."""
CONTESTANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, compiled": {"compiled": True},
    "reference": {},
    "reference, fused Adam": {"fused": True},
    "reference, kept memory": {"kept": True},
    "reference, apart": {"joined": False},
    "reference, compiled": {"compiled": True},
}


def work(words: list[str]) -> None:
    """What a subprocess does."""
    threads, what, *rest = words
    torch.set_num_threads(int(threads) or os.cpu_count() or 1)
    if what == "serve":
        serve(rest[0], int(rest[1]), rest[2])
    elif what == "communicate":
        communicate(int(rest[0]), rest[1])
    else:
        print("answer", json.dumps(agreement(64, Dims(), int(rest[0]), again=True)), flush=True)


# ---------------------------------------------------------------------------------------------- data and contestants


def make_batches(size: int, dims: Dims, seed: int = 0) -> list[tuple[Batch, Rows]]:
    """POOL batches in both forms. Features of a class scatter about its centre, image features are not negative, as
    those of VGG's fc7; the wrong row of each slot is of another class."""
    rng = torch.Generator().manual_seed(seed)
    image_centres = torch.randn(dims.classes, dims.image, generator=rng)
    text_centres = torch.randn(dims.classes, dims.text, generator=rng)
    out = []
    for _ in range(POOL):
        right = torch.randint(dims.classes, (size,), generator=rng)
        wrong = (right + torch.randint(1, dims.classes, (size,), generator=rng)) % dims.classes
        labels = torch.cat([right, wrong])
        image = (image_centres[labels] + torch.randn(2 * size, dims.image, generator=rng)).relu()
        text = text_centres[labels] + torch.randn(2 * size, dims.text, generator=rng)
        one_hot = torch.nn.functional.one_hot(labels, dims.classes).bool()
        batch = Batch(image, text, one_hot, [""] * (2 * size), size)
        out.append((batch, Rows(image[:size], text[:size], image[size:], text[size:], right)))
    return out


def reference_config(size: int, dims: Dims, precision: str = "fp32") -> Config:
    """Preset `reference` at these widths."""
    config = preset("reference")
    config.model.hidden_dim, config.model.common_dim = dims.hidden, dims.common
    config.model.discriminator_dim = dims.discriminator
    config.stream.global_batch = size
    config.train.precision = precision  # type: ignore[assignment]
    return config


class Ours:
    """The library's own step."""

    def __init__(
        self, size: int, dims: Dims, precision: str = "fp32", compiled: bool = False, reduced: str = "fp32"
    ) -> None:
        self.config = reference_config(size, dims, precision)
        self.config.train.compile = compiled
        self.parallel = Parallel(precision, reduce_precision=reduced)
        spec = DataSpec([str(i) for i in range(dims.classes)], "single", dims.image, dims.text)
        self.networks: Networks = build_networks(self.config, spec, None, self.parallel)
        self.table, self.position = phase_table(self.config), 0

    def update(self, batch: Batch) -> list[tuple[str, torch.Tensor]]:
        """One batch; (phase, loss) in order."""
        return list(self.updates(batch))

    def updates(self, batch: Batch, mark: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, one update after another as they are asked for. `mark`: name the parts in a profile."""
        part = torch.profiler.record_function if mark else contextlib.nullcontext
        with part("part no-grad forward"):
            inputs = build_step_inputs(batch, self.networks, self.config, self.parallel, self.position)
        for phase in self.table:
            with part(f"part {phase.name}"):
                terms = run_phase(phase, [inputs], self.networks.engines, self.parallel.autocast)
            losses = [value for name, value in terms.items() if name.startswith("loss/")]
            yield phase.name, torch.stack(losses).sum()
        self.position += batch.size

    def hand_over(self, other: ReferenceStep) -> None:
        """Give weights and optimiser states to the reference step."""
        modules = {"generator": self.networks.generator, **self.networks.unwrapped}
        other.copy_from(modules, {name: engine.optimizer for name, engine in self.networks.engines.items()})


def make_step(name: str, size: int, precision: str, dims: Dims | None = None) -> Callable[[], object]:
    """The contestant's next batch as a function."""
    dims = dims or Dims()
    batches = make_batches(size, dims)
    options, turn = dict(CONTESTANTS[name]), iter(range(1 << 60))
    if name.startswith("ours"):
        ours = Ours(size, dims, precision, bool(options.get("compiled")))
        return lambda: ours.update(batches[next(turn) % POOL][0])
    if options.pop("kept", False):
        keep_freed_memory()
    reference = ReferenceStep(dims, precision=precision, **options)
    return lambda: reference.update(batches[next(turn) % POOL][1])


def agreement(size: int, dims: Dims, batches: int, again: bool) -> dict[str, float]:
    """The largest difference of a loss between ours and the reference, fp32, over all updates of `batches` batches.

    `again`: hand our weights and optimiser states over before every update. At full width GAN training is chaotic: a
    last bit, such as another order of a sum makes, grows by orders of magnitude within few updates of Adam at 1e-3, so
    that free runs of one and the same program part too. Then each update is compared from a common start."""
    ours, reference = Ours(size, dims), ReferenceStep(dims)
    ours.hand_over(reference)
    data = make_batches(size, dims)
    absolute = relative = 0.0
    for i in range(batches):
        batch, rows = data[i % POOL]
        for (phase, mine), (other, theirs) in zip(ours.updates(batch), reference.updates(rows), strict=True):
            if again:
                ours.hand_over(reference)
            assert phase == other, f"{phase} stands where the reference has {other}"
            difference = abs(float(mine) - float(theirs))
            absolute = max(absolute, difference)
            relative = max(relative, difference / max(1.0, abs(float(theirs))))
    return {"batches": batches, "absolute": absolute, "relative": relative}


# ---------------------------------------------------------------------------------------------- timing


def clocked(step: Callable[[], object], seconds: float) -> dict[str, float]:
    """Wall and processor seconds of one batch, over at least `seconds`."""
    wall, processor, done = time.perf_counter(), time.process_time(), 0
    while not done or time.perf_counter() - wall < seconds:
        step()
        done += 1
    return {"wall": (time.perf_counter() - wall) / done, "cpu": (time.process_time() - processor) / done}


def serve(name: str, size: int, precision: str) -> None:
    """Warm up, then time a turn of as many seconds as each line on stdin says."""
    step = make_step(name, size, precision)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    print("answer", json.dumps({"first": first}), flush=True)
    for line in sys.stdin:
        print("answer", json.dumps(clocked(step, float(line))), flush=True)


# ---------------------------------------------------------------------------------------------- processes


def collectives(ours: Ours, batch: Batch) -> dict[str, dict[str, float]]:
    """One batch under torch.profiler: calls of collectives and bytes, by "PART KIND".

    PART is the no-grad forward or a phase's name. Bytes are those that a process sends in a ring: 2 (W - 1) / W of what
    an all-reduce sums, W - 1 times what a process gives to an all-gather."""
    world = ours.parallel.world
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as trace:
        for _ in ours.updates(batch, mark=True):
            pass
    assert trace.profiler is not None
    events = list(trace.profiler.kineto_results.events())
    parts = [(e.start_ns(), e.end_ns(), e.name().removeprefix("part ")) for e in events if e.name().startswith("part ")]
    out: dict[str, dict[str, float]] = {}
    for event in events:
        backend, _, kind = event.name().partition(":")
        if backend not in ("gloo", "nccl") or not event.shapes():
            continue
        part = next((name for start, end, name in parts if start <= event.start_ns() <= end), "outside")
        count = 1
        for extent in event.shapes()[0]:
            count *= extent
        item = ITEM_BYTES[event.dtypes()[0]]
        share = 2 * (world - 1) / world if kind == "all_reduce" else world - 1
        entry = out.setdefault(f"{part} {kind}", {"calls": 0, "bytes": 0})
        entry["calls"] += 1
        entry["bytes"] += share * count * item
    return out


def least_gradients(ours: Ours, batch: Batch) -> dict[str, float]:
    """Bytes that the gradient of each phase's loss has, by phase, summed over its turns; fp32, one process."""
    inputs = build_step_inputs(batch, ours.networks, ours.config, ours.parallel, 0)
    modules = {"generator": ours.networks.generator, **ours.networks.unwrapped}
    out: dict[str, float] = {}
    for phase in ours.table:
        run_phase(phase, [inputs], ours.networks.engines, ours.parallel.autocast)
        count = sum(p.grad.numel() for p in modules[phase.module].parameters() if p.grad is not None)
        out[phase.name] = out.get(phase.name, 0) + 4 * count
    return out


def communicate(size: int, reduced: str) -> None:
    """What each of the processes does: collectives of one batch of `size` rows a process, then the time of some.

    `reduced`: in what gradients travel."""
    dims = Dims()
    ours, data = Ours(size, dims, reduced=reduced), make_batches(size, dims)
    for batch, _ in data[:2]:  # DDP orders its buckets anew after the first
        ours.update(batch)
    record: dict[str, Any] = {"world": ours.parallel.world}
    if ours.parallel.world == 1:
        record["gradient_bytes"] = least_gradients(ours, data[0][0])
    else:
        record["collectives"] = collectives(ours, data[0][0])
    times = []
    for batch, _ in data[:3]:
        ours.parallel.barrier()
        times.append(clocked(lambda batch=batch: ours.update(batch), 0))  # type: ignore[misc]
    record["seconds"] = {clock: spread([t[clock] for t in times]) for clock in ("wall", "cpu")}
    if ours.parallel.main:
        print("answer", json.dumps(record), flush=True)
    ours.networks.release()
    ours.parallel.close()
