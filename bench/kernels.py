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

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common import RESULTS, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.errors import BadInput, run_main
from cmgan_dist.kernels.norm_torch import group_batch_norm
from cmgan_dist.kernels.pair_linear import pair_linear
from cmgan_dist.models.discriminators import InterDiscriminator
from cmgan_dist.models.generator import SharedLayers

ROOT = Path(__file__).resolve().parents[1]
SLOPE, EPS = 0.2, 1e-5
WIDTH = 1024
"""Hidden and common dimension of the reference recipe."""
BATCHES = (64, 256, 1024, 4096)

Run = Callable[[], Any]


@dataclass
class Part:
    """One half of the benchmark."""

    skip: bool = False
    """Leave it out; figures of an earlier run stay in the file."""


@dataclass
class Arguments:
    """Time the fused kernels and the CPU paths and write bench/results/kernels.json."""

    rounds: int = 5
    """CPU: rounds in which all contestants take turns."""
    seconds: float = 0.2
    """CPU: processor time of one contestant in one round."""
    cpu: Part = field(default_factory=Part)
    gpu: Part = field(default_factory=Part)


# ---------------------------------------------------------------------------------------------- the epilogue's rivals


def eager(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """What the torch path does."""
    out = F.leaky_relu(group_batch_norm(x, groups, weight, bias, None, training=True, eps=EPS), SLOPE)
    return F.dropout(out, dropout) if dropout else out


def cudnn(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    parts = [
        torch.cudnn_batch_norm(part[:, :, None, None], weight, bias, None, None, True, 0.1, EPS)[0].flatten(1)
        for part in x.split(list(groups))
    ]
    out = F.leaky_relu(torch.cat(parts), SLOPE)
    return F.dropout(out, dropout) if dropout else out


class _ApexNorm(torch.autograd.Function):
    """apex's SyncBatchNorm on one process, by the copies of its kernels in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, rstd = torch.batch_norm_stats(x, EPS)
        count = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        return torch.batch_norm_elemt(x, weight, bias, mean, rstd, EPS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd, count = ctx.saved_tensors
        dy = grads[0].contiguous()
        sum_dy, sum_dy_xmu, dw, db = torch.batch_norm_backward_reduce(dy, x, mean, rstd, weight, True, True, True)
        dx = torch.batch_norm_backward_elemt(dy, x, mean, rstd, weight, sum_dy, sum_dy_xmu, count)
        return dx, dw, db


def apex_style(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    parts = [_ApexNorm.apply(part.contiguous(), weight, bias) for part in x.split(list(groups))]
    out = F.leaky_relu(torch.cat(parts), SLOPE)
    return F.dropout(out, dropout) if dropout else out


def ours(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    from cmgan_dist.kernels.norm_triton import fused_group_batch_norm

    return fused_group_batch_norm(
        x, groups, weight, bias, None, training=True, momentum=0.1, eps=EPS, slope=SLOPE, dropout=dropout,
        synchronised=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- GPU


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


def _step(function: Callable[..., Tensor], x: Tensor, groups: Sequence[int], dropout: float) -> Run:
    """Forward and backward of one contestant."""
    weight = torch.ones(x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    x, gradient = x.detach().requires_grad_(), torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x, groups, weight, bias, dropout), (x, weight, bias), gradient)


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


def gpu(console: Console) -> dict[str, Any]:
    """Correctness, then times of every contestant, then of every tile."""
    from cmgan_dist.kernels import norm_triton

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    console.print(tests.stdout[-2000:], markup=False)
    if tests.returncode:
        raise BadInput("tests/gpu fails, so no time is taken: mend the kernels first")
    record: dict[str, Any] = {
        "tests": tests.stdout.strip().splitlines()[-1],
        "clocks before": _clocks(),
        "epilogue": [],
    }
    for dtype in (torch.bfloat16, torch.float32):
        for batch in BATCHES:
            for dropout in (0.0, 0.5):
                x, groups = torch.randn(2 * batch, WIDTH, device="cuda", dtype=dtype), [batch, batch]
                contestants = {
                    "ours": ours, "eager": eager, "cuDNN": cudnn, "torch.compile": torch.compile(eager, dynamic=False),
                    "apex-style": apex_style,
                }  # fmt: skip
                row: dict[str, Any] = {"dtype": str(dtype)[6:], "batch": batch, "dropout": dropout, "ms": {}}
                torch._dynamo.reset()  # else it stops compiling new shapes after eight
                torch.manual_seed(0)
                expected = None if dropout else _step(eager, x, groups, 0.0)()
                for name, function in contestants.items():
                    torch.manual_seed(0)  # the same incoming gradient
                    with torch.backends.cudnn.flags(enabled=name == "cuDNN"):
                        row["ms"][name] = _measured(_step(function, x, groups, dropout), expected)
                record["epilogue"].append(row)
                medians = {
                    name: "/".join(f"{found[how]['median']:.4f}" for how in ("events", "graph") if how in found)
                    for name, found in row["ms"].items()
                }
                console.print(row["dtype"], batch, dropout, medians)
    chosen, record["tiles"] = norm_triton.choose_tile, []
    for batch in BATCHES:
        x = torch.randn(2 * batch, WIDTH, device="cuda", dtype=torch.bfloat16)
        for tile in norm_triton.TILES:
            norm_triton.choose_tile = functools.partial(_forced, tile)
            try:
                found = _event_ms(_step(ours, x, [batch, batch], 0.0))
            finally:
                norm_triton.choose_tile = chosen
            record["tiles"].append(
                {"batch": batch, "tile": str(tile), "chosen": chosen(batch, WIDTH) == tile, "ms": found}
            )
    record["discriminator"] = []
    for batch in BATCHES:
        times = {name: _event_ms(run) for name, run in discriminator_runs(batch, 4096, "cuda", torch.bfloat16).items()}
        record["discriminator"].append({"batch": batch, "ms": times})
    record["clocks after"] = _clocks()
    return record


# ---------------------------------------------------------------------------------------------- both


def discriminator_runs(batch: int, features: int, device: str, dtype: torch.dtype) -> dict[str, Run]:
    """An inter-modality discriminator's hidden layer, forward and backward: its own phase (weight gradient; `wrong` has
    another feature, or with model.mismatch=conditional the same) and the generator's (gradient of common)."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    weight = draw(512, WIDTH + features).requires_grad_()
    frozen = weight.detach()
    common, first, second = draw(3 * batch, WIDTH), draw(batch, features), draw(batch, features)
    own, gradient = draw(batch, WIDTH).requires_grad_(), draw(3 * batch, 512)
    groups = [batch] * 3

    def joined(common: Tensor, parts: list[Tensor], weight: Tensor) -> Tensor:
        return F.linear(torch.cat([common, torch.cat(parts)], 1), weight)

    def split(common: Tensor, parts: list[Tensor], weight: Tensor) -> Tensor:
        return pair_linear(common, parts, groups[: len(parts)], weight)

    def phase(run: Callable[..., Tensor], parts: list[Tensor]) -> Run:
        return lambda: torch.autograd.grad(run(common, parts, weight), weight, gradient)

    def turn(run: Callable[..., Tensor]) -> Run:
        return lambda: torch.autograd.grad(run(own, [first], frozen), own, gradient[:batch])

    runs: dict[str, Run] = {}
    for name, run in (("concat", joined), ("split", split)):
        runs[f"D {name}"] = phase(run, [first, first, second])
        runs[f"D conditional {name}"] = phase(run, [first] * 3)
        runs[f"G {name}"] = turn(run)
    return runs


# ---------------------------------------------------------------------------------------------- CPU


def _turns(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Processor milliseconds of each contestant: median, least and largest over the rounds."""
    repeats = {}
    for name, run in runs.items():
        run()
        start = time.process_time()
        run()
        repeats[name] = max(1, int(seconds / max(time.process_time() - start, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                run()
            found[name].append((time.process_time() - start) / repeats[name] * 1e3)
    return {n: {"median": statistics.median(v), "min": min(v), "max": max(v)} for n, v in found.items()}


class _BackwardByHand(torch.autograd.Function):
    """A fused epilogue as far as torch's own CPU operations go: activation in place, one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, EPS)
        F.leaky_relu_(y, SLOPE)
        ctx.save_for_backward(x, weight, mean, rstd, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd, y = ctx.saved_tensors
        g = torch.ops.aten.leaky_relu_backward(grads[0], y, SLOPE, True)
        mask = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(g, x, weight, None, None, mean, rstd, True, EPS, mask)


def by_hand(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    parts = [_BackwardByHand.apply(part, weight, bias) for part in x.split(list(groups))]
    return torch.cat(parts)


def cpu(rounds: int, seconds: float) -> dict[str, Any]:
    """Epilogue, one or two GEMMs over the modalities, split weights, loss of a discriminator."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"threads": 1, "rounds": rounds, "unit": "ms of processor time, forward and backward"}
    compiled = torch.compile(eager, dynamic=False)
    record["epilogue"], record["two modalities"], record["discriminator"] = [], [], []
    for batch in (64, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            x, groups = torch.randn(2 * batch, WIDTH, dtype=dtype), [batch, batch]
            torch._dynamo.reset()
            made = {"eager": eager, "by hand": by_hand, "torch.compile": compiled}
            reference = eager(x, groups, torch.ones(WIDTH), torch.zeros(WIDTH), 0.0)
            for name, function in made.items():
                found = function(x, groups, torch.ones(WIDTH), torch.zeros(WIDTH), 0.0)
                worst = float((found - reference).detach().abs().max())
                assert worst <= (1e-4 if dtype == torch.float32 else 0.05), f"{name} is off by {worst}"
            times = _turns({n: _step(f, x, groups, 0.0) for n, f in made.items()}, rounds, seconds)
            record["epilogue"].append({"batch": batch, "dtype": str(dtype)[6:], "ms": times})
    for batch in (16, 64, 256, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            times = _turns(_modality_runs(batch, dtype), rounds, seconds)
            record["two modalities"].append({"batch": batch, "dtype": str(dtype)[6:], "ms": times})
    for batch in (64, 256):
        for features in (4096, 300):
            for dtype in (torch.float32, torch.bfloat16):
                times = _turns(discriminator_runs(batch, features, "cpu", dtype), rounds, seconds)
                row = {"batch": batch, "features": features, "dtype": str(dtype)[6:], "ms": times}
                record["discriminator"].append(row)
    record["discriminator step"] = []
    for batch in (64, 256):
        record["discriminator step"].append({"batch": batch, "ms": _turns(_loss_share(batch), rounds, seconds)})
    return record


def _modality_runs(batch: int, dtype: torch.dtype) -> dict[str, Run]:
    """The shared layer on image and text rows: one GEMM or two."""
    layer = SharedLayers(ModelConfig(hidden_dim=WIDTH, common_dim=WIDTH, kernels="torch"))
    layer.joins = lambda image, text: True  # type: ignore[method-assign]
    image, text = (torch.randn(batch, WIDTH).requires_grad_() for _ in range(2))
    wanted = (image, text, *layer.parameters())

    def step(outputs: Callable[[], Sequence[Tensor]]) -> Run:
        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                made = outputs()
            return torch.autograd.grad([t.float().sum() for t in made], wanted)

        return run

    def joined() -> Sequence[Tensor]:
        out: Sequence[Tensor] = layer(image, text)
        return out

    return {"one GEMM": step(joined), "two GEMMs": step(lambda: (layer(image, None)[0], layer(None, text)[1]))}


def _loss_share(batch: int) -> dict[str, Run]:
    """A discriminator's loss alone, as it is and with value and gradient in one node, beside its whole step."""
    from cmgan_dist.training import losses

    logits = torch.randn(3 * batch, requires_grad=True)
    config = ModelConfig(common_dim=WIDTH, kernels="torch")
    module = InterDiscriminator(4096, config)
    common, feature = torch.randn(3 * batch, WIDTH), torch.randn(batch, 4096)

    def loss(logits: Tensor) -> Tensor:
        real, fake, wrong = logits.chunk(3)
        return losses.discriminator_loss("bce", real, [(fake, 0.5, None), (wrong, 0.5, None)])

    def whole() -> object:
        made = loss(module(common, [feature, feature, feature], [batch] * 3))
        return torch.autograd.grad(made, list(module.parameters()))

    return {
        "loss": lambda: torch.autograd.grad(loss(logits), logits),
        "loss in one node": lambda: torch.autograd.grad(_OneNode.apply(logits), logits),
        "whole step": whole,
    }


class _OneNode(torch.autograd.Function):
    """The weighted cross-entropy of logits [3B] with its gradient made in forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        rows = len(logits) // 3
        weight = torch.full_like(logits, 0.5 / rows)
        weight[:rows] = 1.0 / rows
        z = logits.clone()
        z[:rows].neg_()
        slope = torch.sigmoid(z).mul_(weight)
        slope[:rows].neg_()
        ctx.save_for_backward(slope)
        return F.softplus(z).dot(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0]


# ---------------------------------------------------------------------------------------------- the model

BANDWIDTH, PEAK, LAUNCH_US = 3.35e12 * 0.9, 989e12 * 0.7, 2.5
"""Assumed of an H100: 90 % of 3.35 TB/s, 70 % of dense bfloat16, and what a kernel costs at least."""


def modelled(batch: int, width: int = WIDTH, size: int = 2, groups: int = 2) -> dict[str, Any]:
    """Bytes, launches and time of the shared layer's GEMM and epilogue, forward and backward, of both modalities.

    Sweeps over the [R, C] activations. Eager: batch_norm reads x twice and writes, cat reads and writes, leaky_relu
    reads and writes; back, leaky_relu reads two and writes, batch_norm reads two for its sums, reads two and writes,
    split's backward reads and writes. Fused: statistics read x, apply reads and writes; back, sums read two, the
    gradient reads two and writes."""
    rows = groups * batch
    tensor = rows * width * size
    gemm = max(3 * 2 * rows * width * width / PEAK * 1e6, 3 * LAUNCH_US)
    paths = {
        # launches: norm (2 each), cat, activation | activation, norm (2 each), cat, sums of parameter gradients
        "eager": {"sweeps": 7 + 10, "launches": 2 * groups + 2 + 1 + 2 * groups + 1 + 2 * (groups - 1)},
        "fused": {"sweeps": 3 + 5, "launches": 3 + 2},
    }
    out: dict[str, Any] = {"batch": batch, "gemm_us": gemm}
    for name, path in paths.items():
        moved = path["sweeps"] * tensor
        memory = moved / BANDWIDTH * 1e6
        out[name] = {
            **path,
            "MB": moved / 1e6,
            "epilogue_us": max(memory, path["launches"] * LAUNCH_US),
            "layer_us": gemm + max(memory, path["launches"] * LAUNCH_US),
            "saved_MB": (2 if name == "eager" else 1) * tensor / 1e6,
        }
    out["layer_ratio"] = out["eager"]["layer_us"] / out["fused"]["layer_us"]
    return out


# ---------------------------------------------------------------------------------------------- command line


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
    console = Console(width=140)
    path = RESULTS / "kernels.json"
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
    console.print(f"written to {write_results('kernels', record)}")


if __name__ == "__main__":
    run_main(main)
