"""Compare DeepSpeed ZeRO with DDP, step by step, in the same processes; see test_zero.py.

torchrun --nproc_per_node W tests/distributed/zero_worker.py CASE STEPS
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.distributed import engine
from cmgan_dist.distributed.engine import AdamSettings
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.training.phases import phase_table, run_phase
from cmgan_dist.training.state import Networks, build_networks, update_average
from cmgan_dist.training.step import StepInputs, build_step_inputs
from tests.toy import global_batch, part_of, small_config

ROWS = 24
JOINT = {"optim__update": "joint"}
CASES: dict[str, dict[str, object]] = {
    "reference": {},
    "all options": {
        "optim__accumulate": 2,
        "optim__clip": 0.5,
        "optim__weight_decay": 0.01,
        "optim__generator_steps": 2,
        "loss__contrastive": 1.0,
        "loss__modality": 0.5,
        "loss__r1": 1.0,
        "loss__r1_every": 3,
        "train__ema": 0.9,
    },
    "wgan-gp": {"loss__adversarial": "wgan-gp", "model__share_layers": False},
    "hinge": {"loss__adversarial": "hinge", "loss__mismatch": "conditional", "model__spectral_norm": True},
    "joint": {**JOINT, "optim__accumulate": 2, "optim__clip": 0.5, "loss__contrastive": 1.0},
    "no adversary": {**JOINT, "loss__intra": 0.0, "loss__inter": 0.0, "loss__class_contrastive": 1.0},
    "trained backbone": {"model__share_classifier": True, "loss__contrastive": 1.0},
    "bf16": {"train__precision": "bf16", "train__reduce_precision": "bf16"},
    "fp16": {"train__precision": "fp16", "optim__clip": 0.5},
}
TOLERANCES = {"bf16": 5e-2, "fp16": 5e-2}
"""Relative, of a loss; 1e-6 elsewhere. In few bits a difference of rounding grows from step to step."""
STAGES: dict[str, dict[str, object]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2 with the optimiser on the CPU": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
SPEC = DataSpec([str(c) for c in range(5)], "single", 6, 5)
"""Features, as those of `tests.toy.global_batch`."""
Losses = list[dict[str, float]]
"""Losses by name of each step, means over the processes."""


def batch_of(config: Config, seed: int, parallel: Parallel) -> Batch:
    """This process's part of a batch, with small pictures where a backbone is trained."""
    batch = global_batch(ROWS // config.optim.accumulate, seed)
    if config.model.image.trainable:
        rng = torch.Generator().manual_seed(seed)
        batch.image = torch.randint(256, (batch.size, 32, 32, 4), generator=rng, dtype=torch.uint8)
    return part_of(batch, parallel.rank, parallel.world)


def step(config: Config, parallel: Parallel, networks: Networks, micro_batches: list[StepInputs]) -> dict[str, float]:
    """Train one step; return what was measured, means over the processes."""
    terms: dict[str, Tensor] = {}
    for phase in phase_table(config):
        terms |= run_phase(phase, micro_batches, networks.engines, parallel.autocast, measure=True)
    if networks.average is not None:
        update_average(networks.average, networks.generator, config.train.ema)
    measured = ("loss/", "scale/", "skipped/", "gradient_norm/")
    return parallel.mean({k: float(v) for k, v in terms.items() if k.startswith(measured)})


def train(config: Config, parallel: Parallel, networks: Networks, first: int, stop: int) -> Losses:
    """Train the steps from `first` up to `stop`; return their losses."""
    out = []
    for number in range(first, stop):
        batches = [batch_of(config, 100 * number + i, parallel) for i in range(config.optim.accumulate)]
        position = number * ROWS
        micro_batches = [build_step_inputs(b, networks, config, parallel, position + i) for i, b in enumerate(batches)]
        out.append(step(config, parallel, networks, micro_batches))
    return out


def compare(expected: Losses, found: Losses, what: str, tolerance: float) -> float:
    """Check that the losses of each step are equal within `tolerance`, and gradient norms within ten times that; return
    the largest relative difference of a loss."""
    worst = 0.0
    for step, (left, right) in enumerate(zip(expected, found, strict=True)):
        assert left.keys() == right.keys()
        for name, value in left.items():
            same = value == right[name] or (math.isnan(value) and math.isnan(right[name]))
            difference = 0.0 if same else abs(value - right[name]) / max(1, abs(value))
            loss = name.startswith("loss/")
            assert difference <= tolerance * (1 if loss else 10), f"{what} step {step} {name}: {value} {right[name]}"
            worst = max(worst, difference) if loss else worst
    return worst


SMALL = 0.01
"""A tensor of the networks whose elements are all smaller is compared as if its largest were this."""


def compare_tensors(
    expected: dict[str, Tensor], found: dict[str, Tensor], what: str, tolerance: float
) -> tuple[float, float]:
    """Check that parameters and buffers are equal within `tolerance`, and optimiser states within ten times that;
    return the largest difference of either relative to the largest element of a tensor.

    In few bits, and of a backbone, whose gradients before a BatchNorm are zero but for rounding, these are only the
    step counts and the loss scalers."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = {False: 0.0, True: 0.0}
    for name, value in expected.items():
        counted = name.endswith("/step") or "/scaler/" in name
        if counted or (value.is_floating_point() and tolerance <= 1e-5 and "_backbone." not in name):
            moment = name.startswith("optimizer/")
            scale = float(value.abs().max()) or 1.0
            difference = float((found[name] - value).abs().max()) / (scale if moment else max(scale, SMALL))
            assert difference <= tolerance * (10 if moment else 1), f"{what} {name}: {difference}"
            worst[moment] = max(worst[moment], difference)
        elif not value.is_floating_point():
            assert torch.equal(found[name], value), (what, name)
    return worst[False], worst[True]


def copies(networks: Networks) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as it would keep them."""
    return {name: value.detach().clone() for name, value in networks.tensors().items()}


class UnfusedAdamW(torch.optim.AdamW):
    """Torch's other implementation of the same update, which rounds in other places; it has no way to leave out a
    step."""

    def step(self, closure: Any = None) -> Any:
        """Update the parameters."""
        del self.found_inf
        return super().step(closure)


def unfused(parameters: Sequence[nn.Parameter], settings: AdamSettings) -> torch.optim.AdamW:
    """What `engine.adamw` returns, in the other implementation: how far apart rounding alone leads."""
    betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
    return UnfusedAdamW(parameters, lr=settings.lr, betas=betas, weight_decay=decay, foreach=False)


def apart_by(loss: float, parameter: float, moment: float) -> str:
    """The end of a line that says how far two trainings are apart."""
    return f", largest relative difference of a loss {loss:.1e}, a parameter {parameter:.1e}, a moment {moment:.1e}"


def main() -> None:
    case, steps = sys.argv[1], int(sys.argv[2])
    half = steps // 2
    config = small_config(ROWS, **CASES[case])
    if case == "trained backbone":
        image = config.model.image
        image.name, image.image_size, image.trainable, image.checkpoint = "test_efficientnet", 32, True, True
        config.optim.generator_lr = config.optim.discriminator_lr = 1e-5  # else rounding grows from step to step
    spec = dataclasses.replace(SPEC, image_dim=None) if case == "trained backbone" else SPEC
    parallel = Parallel(config.train.precision, reduce_precision=config.train.reduce_precision)
    plain = build_networks(config, spec, None, parallel)
    expected = train(config, parallel, plain, 0, half)
    halfway = copies(plain)
    expected += train(config, parallel, plain, half, steps)
    end = copies(plain)
    tolerance = TOLERANCES.get(case, 1e-6)
    for name, zero in STAGES.items():
        parallel.zero_config = {"zero_optimization": zero}
        networks = build_networks(config, spec, None, parallel)
        found = train(config, parallel, networks, 0, half)
        saved = copies(networks)
        compare_tensors(halfway, saved, name, tolerance)
        found += train(config, parallel, networks, half, steps)
        worst = compare(expected, found, name, tolerance)
        apart = compare_tensors(end, copies(networks), name, tolerance)
        # DDP's checkpoint under ZeRO, and ZeRO's under DDP
        back = build_networks(config, spec, None, parallel)
        back.load(halfway, "DDP's")
        compare(expected[half:], train(config, parallel, back, half, steps), "DDP to ZeRO", tolerance)
        compare_tensors(end, copies(back), "DDP to ZeRO", tolerance)
        parallel.zero_config = None
        there = build_networks(config, spec, None, parallel)
        there.load(saved, "ZeRO's")
        compare(expected[half:], train(config, parallel, there, half, steps), "ZeRO to DDP", tolerance)
        compare_tensors(end, copies(there), "ZeRO to DDP", tolerance)
        for each in (networks, back, there):
            each.release()
        if parallel.main:
            print(f"{case}: {name} equals DDP on {parallel.world}{apart_by(worst, *apart)}")
    if case not in TOLERANCES:
        engine.adamw = unfused
        rounded = build_networks(config, spec, None, parallel)
        worst = compare(expected, train(config, parallel, rounded, 0, steps), "AdamW that is not fused", 1e-5)
        apart = compare_tensors(end, copies(rounded), "AdamW that is not fused", 1e-5)
        rounded.release()
        if parallel.main:
            print(
                f"{case}: for comparison, torch's AdamW that is not fused on {parallel.world}{apart_by(worst, *apart)}"
            )
    plain.release()
    parallel.close()


if __name__ == "__main__":
    main()
