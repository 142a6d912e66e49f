"""Workers under torch.distributed.run, and what they train on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import Batch

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int) -> list[str]:
    """The start of a command that runs a script on that many processes of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def run_workers(script: str, processes: int, *words: str, timeout: float = 400) -> str:
    """tests/distributed/SCRIPT on that many processes; its stdout. It must end with 0."""
    command = [*torchrun(processes), str(ROOT / "tests" / "distributed" / script), *words]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def small_config(global_batch: int, **fields: object) -> Config:
    """Small networks; `fields` by dotted name with __ for the dot."""
    config = Config()
    config.model.hidden_dim, config.model.common_dim, config.model.discriminator_dim = 16, 8, 12
    config.stream.global_batch = global_batch
    config.optim.generator_steps = 1
    for name, value in fields.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


def global_batch(rows: int, seed: int, classes: int = 5, dims: tuple[int, int] = (6, 5)) -> Batch:
    """Features of a whole global batch; half of the rows are of the first class, which lie together."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (rows,), generator=rng)
    label[: rows // 2] = 0
    labels = torch.nn.functional.one_hot(label, classes).bool()
    image, text = torch.randn(rows, dims[0], generator=rng), torch.randn(rows, dims[1], generator=rng)
    return Batch(image, text, labels, [f"{seed}-{i}" for i in range(rows)], size=rows)


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of one process."""
    each = batch.size // world
    rows = slice(rank * each, (rank + 1) * each)
    assert batch.labels is not None
    return Batch(batch.image[rows], batch.text[rows], batch.labels[rows], batch.keys[rows], size=each)
