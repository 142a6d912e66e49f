"""Compare each phase's gradients on W processes with those of one process with all rows; see test_gradients.py.

torchrun --nproc_per_node W tests/distributed/gradients_worker.py CASE
"""

from __future__ import annotations

import copy
import sys

import torch

from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.training.phases import phase_table, run_phase
from cmgan_dist.training.state import build_networks
from cmgan_dist.training.step import build_step_inputs
from tests.toy import global_batch, part_of, small_config

ROWS = 24
CASES: dict[str, dict[str, object]] = {
    "reference": {},
    "conditional hinge": {"loss__mismatch": "conditional", "loss__adversarial": "hinge"},
    "wgan-gp": {"loss__adversarial": "wgan-gp"},
    "r1": {"loss__r1": 1.0, "loss__r1_every": 1},
    "modality": {"loss__modality": 1.0, "loss__r1": 1.0, "loss__r1_every": 1},
    "gathered negatives": {"loss__contrastive": 1.0, "loss__class_contrastive": 0.5, "optim__update": "joint"},
    "accumulated": {"optim__accumulate": 3, "loss__contrastive": 1.0},
    "accumulated joint": {"optim__accumulate": 2, "optim__update": "joint", "model__share_layers": False},
    "trained backbone": {"optim__update": "joint"},
    "reduced in bf16": {"train__reduce_precision": "bf16", "loss__contrastive": 1.0},
}


def check_rows(parallel: Parallel) -> None:
    """Rows fetched from the global batch, of any owner: uneven, repeated, all of one process, each from the next."""
    rng = torch.Generator().manual_seed(1)
    world, each = parallel.world, 3
    whole = torch.randn(world * each, 2, 5, generator=rng)
    draws = torch.randint(world * each, (world * each,), generator=rng)
    for index in (draws, torch.zeros_like(draws), torch.arange(world * each).roll(each), torch.arange(world * each)):
        own = slice(parallel.rank * each, (parallel.rank + 1) * each)
        assert torch.equal(parallel.rows(whole[own].requires_grad_(), index[own]), whole[index[own]]), index


def main() -> None:
    case = sys.argv[1]
    config = small_config(ROWS, **CASES[case])
    tolerance = {"trained backbone": 2e-4, "reduced in bf16": 1e-2}.get(case, 2e-5)  # deep, and few rows; 8 bits
    config.optim.generator_lr = config.optim.discriminator_lr = 0.0  # the same parameters in every phase
    parts, pictures = config.optim.accumulate, case == "trained backbone"
    spec = DataSpec([str(c) for c in range(5)], "single", None if pictures else 6, 5)
    if pictures:
        config.model.image.name, config.model.image.image_size, config.model.image.trainable = (
            "test_efficientnet",
            32,
            True,
        )
    parallel = Parallel(reduce_precision=config.train.reduce_precision)
    check_rows(parallel)
    alone = copy.copy(parallel)
    alone.world, alone.rank = 1, 0
    many, one = build_networks(config, spec, None, parallel), build_networks(config, spec, None, alone)
    size = ROWS // parts
    batches = [global_batch(size, seed) for seed in range(parts)]
    if pictures:
        for batch in batches:
            rng = torch.Generator().manual_seed(9)
            batch.image = torch.randint(256, (size, 32, 32, 4), generator=rng, dtype=torch.uint8)

    def micro_batches(networks, using):  # type: ignore[no-untyped-def]
        own = [part_of(batch, using.rank, using.world) for batch in batches]
        return [build_step_inputs(b, networks, config, using, i * size) for i, b in enumerate(own)]

    mine, theirs = micro_batches(many, parallel), micro_batches(one, alone)
    for phase in phase_table(config):
        terms = run_phase(phase, mine, many.engines, parallel.autocast)
        expected = run_phase(phase, theirs, one.engines, alone.autocast)
        for name, value in parallel.mean({k: float(v) for k, v in terms.items()}).items():
            assert abs(value - float(expected[name])) < 1e-5 * max(1, abs(value)), (name, value, expected[name])
        compared = 0
        found = many.engines[phase.module].named_parameters
        for name, parameter in one.engines[phase.module].named_parameters.items():
            if parameter.grad is None:
                other = found[name].grad
                assert other is None or not other.any(), f"{phase.name} {name} has a gradient on many processes only"
                continue
            scale = float(parameter.grad.abs().max())
            grad = found[name].grad
            if case == "reduced in bf16":
                assert torch.equal(grad, grad.bfloat16().float()), f"{phase.name} {name}: not from bf16"
            difference = float((grad - parameter.grad).abs().max())
            assert difference <= tolerance * scale + 1e-7, f"{phase.name} {name}: {difference} of {scale}"
            compared += 1
        assert compared, phase.name
    for (name, a), (_, b) in zip(many.generator.named_buffers(), one.generator.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if parallel.main:
        print(f"{case}: equal on {parallel.world}")
    many.release()
    parallel.close()


if __name__ == "__main__":
    main()
