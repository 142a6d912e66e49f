"""Compare DeepSpeed ZeRO with DDP, step by step, in the same processes; see test_zero.py.

torchrun --nproc_per_node W tests/distributed/zero_worker.py CASE
"""

from __future__ import annotations

import sys

import torch

from cmgan_dist.config.fields import Config
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.training.phases import phase_table, run_phase
from cmgan_dist.training.state import Networks, build_networks
from cmgan_dist.training.step import build_step_inputs
from tests.toy import global_batch, part_of, small_config

ROWS, STEPS, HALF = 24, 16, 8
CASES: dict[str, dict[str, object]] = {
    "all options": {
        "optim__accumulate": 2,
        "optim__clip": 0.5,
        "optim__weight_decay": 0.01,
        "optim__generator_steps": 2,
        "loss__contrastive": 1.0,
    },
    "bf16": {"train__precision": "bf16", "train__reduce_precision": "bf16"},
}
STAGES: dict[str, dict[str, object]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2 with the optimiser on the CPU": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def train(config: Config, parallel: Parallel, networks: Networks, first: int, stop: int) -> list[dict[str, float]]:
    """Train the steps from `first` up to `stop`; return their losses, means over the processes."""
    out = []
    parts = config.optim.accumulate
    for step in range(first, stop):
        batches = [
            part_of(global_batch(ROWS // parts, 100 * step + i), parallel.rank, parallel.world) for i in range(parts)
        ]
        position = step * ROWS
        micro_batches = [build_step_inputs(b, networks, config, parallel, position + i) for i, b in enumerate(batches)]
        terms: dict[str, torch.Tensor] = {}
        for phase in phase_table(config):
            terms |= run_phase(phase, micro_batches, networks.engines, parallel.autocast)
            if phase.module == "generator":  # its losses went through the discriminators
                left = [
                    n
                    for n, d in networks.unwrapped.items()
                    for p in d.parameters()
                    if p.grad is not None and p.grad.any()
                ]
                assert not left or parallel.zero_config is None, f"the generator left gradients in {left}"
        out.append(parallel.mean({k: float(v) for k, v in terms.items() if k.startswith("loss/")}))
    return out


def compare(a: list[dict[str, float]], b: list[dict[str, float]], what: str, tolerance: float) -> float:
    """Check that the losses of each step are equal within `tolerance`; return the largest relative difference."""
    worst = 0.0
    for step, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.keys() == right.keys()
        for name, value in left.items():
            difference = abs(value - right[name]) / max(1, abs(value))
            assert difference < tolerance, f"{what} step {step} {name}: {value} {right[name]}"
            worst = max(worst, difference)
    return worst


def main() -> None:
    case = sys.argv[1]
    config = small_config(ROWS, optim__update="joint", **CASES[case])
    spec = DataSpec([str(c) for c in range(5)], "single", 6, 5)
    parallel = Parallel(config.train.precision, reduce_precision=config.train.reduce_precision)
    plain = build_networks(config, spec, None, parallel)
    expected = train(config, parallel, plain, 0, HALF)
    halfway = {k: v.clone() for k, v in plain.tensors().items()}
    expected += train(config, parallel, plain, HALF, STEPS)
    tolerance = 2e-2 if case == "bf16" else 1e-4
    for name, zero in STAGES.items():
        parallel.zero_config = {"zero_optimization": zero}
        networks = build_networks(config, spec, None, parallel)
        found = train(config, parallel, networks, 0, HALF)
        worst = compare(expected[:HALF], found, name, tolerance)
        # its checkpoint under DDP, and DDP's under ZeRO
        saved = {k: v.clone() for k, v in networks.tensors().items()}
        assert saved.keys() == halfway.keys()
        for key, value in halfway.items():
            close = torch.allclose(saved[key], value, rtol=10 * tolerance, atol=tolerance / 10)
            assert close, f"{name} {key}: {saved[key]} {value}"
        back = build_networks(config, spec, None, parallel)
        back.load(halfway, "DDP's")
        parallel.zero_config = None
        there = build_networks(config, spec, None, parallel)
        there.load(saved, "ZeRO's")
        following = expected[HALF : HALF + 4]
        compare(following, train(config, parallel, there, HALF, HALF + 4), "ZeRO to DDP", 3 * tolerance)
        parallel.zero_config = {"zero_optimization": zero}
        compare(following, train(config, parallel, back, HALF, HALF + 4), "DDP to ZeRO", 3 * tolerance)
        more = train(config, parallel, networks, HALF, STEPS)
        worst = max(worst, compare(expected[HALF:], more, name, 3 * tolerance))
        for each in (networks, back, there):
            each.release()
        parallel.zero_config = None
        if parallel.main:
            print(f"{case}: {name} equals DDP on {parallel.world}, largest relative difference {worst:.1e}")
    plain.release()
    parallel.close()


if __name__ == "__main__":
    main()
