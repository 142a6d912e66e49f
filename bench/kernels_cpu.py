"""The CPU's part of bench/kernels.py: processor time of contestants that take turns, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels_rivals import WIDTH, Run, by_hand, discriminator_runs, eager, step_of
from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.kernels.dropout import dropout
from cmgan_dist.models.discriminators import InterDiscriminator
from cmgan_dist.models.generator import SharedLayers


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
            times = _turns({n: step_of(f, x, groups, 0.0) for n, f in made.items()}, rounds, seconds)
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
    record["dropout"] = [
        {"batch": batch, "ms": _turns(_dropout_runs(batch, share=0.5), rounds, seconds)} for batch in (64, 1024)
    ]
    record["discriminator step"] = []
    for batch in (64, 256):
        record["discriminator step"].append({"batch": batch, "ms": _turns(_loss_share(batch), rounds, seconds)})
    return record


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


def _dropout_runs(batch: int, share: float) -> dict[str, Run]:
    """Dropout of a hidden layer: torch's, a comparison of uniform numbers, and ours."""
    x, gradient = torch.randn(batch, WIDTH, requires_grad=True), torch.randn(batch, WIDTH)

    def step(function: Callable[[Tensor], Tensor]) -> Run:
        return lambda: torch.autograd.grad(function(x), x, gradient)

    return {
        "torch": step(lambda x: F.dropout(x, share)),
        "uniform numbers": step(lambda x: x * (torch.rand(x.shape) >= share) / (1 - share)),
        "ours": step(lambda x: dropout(x, share)),
    }


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
