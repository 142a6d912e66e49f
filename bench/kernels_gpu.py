"""The GPU's part of bench/kernels.py: correctness, then times by CUDA events."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.kernels_rivals import WIDTH, Run, apex_style, cudnn, discriminator_runs, eager, ours, step_of
from cmgan_dist.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (64, 256, 1024, 4096)


def gpu(console: Console) -> dict[str, Any]:
    """Test the kernels, then time every contestant and every tile. Raises BadInput where a test fails."""
    record: dict[str, Any] = {"tests": run_tests(console), "clocks before": _clocks(), "epilogue": []}
    for dtype in (torch.bfloat16, torch.float32):
        for batch in BATCHES:
            for dropout in (0.0, 0.5):
                row = time_epilogue(dtype, batch, dropout)
                record["epilogue"].append(row)
                medians = {
                    name: "/".join(f"{found[how]['median']:.4f}" for how in ("events", "graph") if how in found)
                    for name, found in row["ms"].items()
                }
                console.print(row["dtype"], batch, dropout, medians)
    record["tiles"] = [row for batch in BATCHES for row in time_tiles(batch)]
    record["discriminator"] = []
    for batch in BATCHES:
        times = {name: _event_ms(run) for name, run in discriminator_runs(batch, 4096, "cuda", torch.bfloat16).items()}
        record["discriminator"].append({"batch": batch, "ms": times})
    record["clocks after"] = _clocks()
    return record


def run_tests(console: Console) -> str:
    """Run tests/gpu and return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    console.print(tests.stdout[-2000:], markup=False)
    if tests.returncode:
        raise BadInput("tests/gpu fails, so no time is taken: mend the kernels first")
    return tests.stdout.strip().splitlines()[-1]


def time_epilogue(dtype: torch.dtype, batch: int, dropout: float) -> dict[str, Any]:
    """Time every contestant on one shape."""
    x, groups = torch.randn(2 * batch, WIDTH, device="cuda", dtype=dtype), [batch, batch]
    contestants = {
        "ours": ours, "eager": eager, "cuDNN": cudnn, "torch.compile": torch.compile(eager, dynamic=False),
        "apex-style": apex_style,
    }  # fmt: skip
    row: dict[str, Any] = {"dtype": str(dtype)[6:], "batch": batch, "dropout": dropout, "ms": {}}
    torch._dynamo.reset()  # else it stops compiling new shapes after eight
    torch.manual_seed(0)
    expected = None if dropout else step_of(eager, x, groups, 0.0)()
    for name, function in contestants.items():
        torch.manual_seed(0)  # the same incoming gradient
        with torch.backends.cudnn.flags(enabled=name == "cuDNN"):
            row["ms"][name] = _measured(step_of(function, x, groups, dropout), expected)
    return row


def time_tiles(batch: int) -> Iterator[dict[str, Any]]:
    """Time our kernels with every tile, each forced in turn."""
    from cmgan_dist.kernels import norm_triton

    chosen = norm_triton.choose_tile
    x = torch.randn(2 * batch, WIDTH, device="cuda", dtype=torch.bfloat16)
    for tile in norm_triton.TILES:
        norm_triton.choose_tile = functools.partial(_forced, tile)
        try:
            found = _event_ms(step_of(ours, x, [batch, batch], 0.0))
        finally:
            norm_triton.choose_tile = chosen
        yield {"batch": batch, "tile": str(tile), "chosen": chosen(batch, WIDTH) == tile, "ms": found}


def _clocks() -> dict[str, str]:
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return {"unknown": str(error)}
    return dict(zip(fields.split(","), (part.strip() for part in line.split(",")), strict=True))


def _event_ms(run: Run) -> dict[str, float]:
    """Median and quartiles in ms, L2 flushed before each run."""
    import triton.testing  # type: ignore[import-untyped]

    low, middle, high = triton.testing.do_bench(run, warmup=50, rep=300, quantiles=[0.25, 0.5, 0.75])
    return {"median": middle, "q1": low, "q3": high}


def _graph_ms(run: Run) -> dict[str, float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _event_ms(graph.replay)


def _launches(run: Run) -> int:
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.profiler.DeviceType.CUDA)


def _measured(run: Run, expected: Sequence[Tensor] | None) -> dict[str, Any]:
    """Times and launches, or why this build of torch cannot run it (cuDNN does not take every dtype).

    `expected`: gradients that it must find; None where dropout draws others."""
    try:
        for found, right in zip(run(), expected or (), strict=False):
            # a norm: near the activation's kink rounding decides single elements
            assert (found - right).norm() <= 0.02 * right.norm(), "a contestant computes something else"
        return {"events": _event_ms(run), "graph": _graph_ms(run), "launches": _launches(run)}
    except RuntimeError as error:
        return {"cannot run": str(error).splitlines()[0]}


def _forced(tile: Any, rows: int, channels: int) -> Any:
    return tile
