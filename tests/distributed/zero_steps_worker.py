"""Steps that must be left out or begin anew under DeepSpeed ZeRO, as under DDP; see test_zero.py.

torchrun --nproc_per_node W tests/distributed/zero_steps_worker.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmgan_dist.config.fields import Config
from cmgan_dist.distributed.engine import FIRST_SCALE
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.distributed.zero import ZeroEngine
from cmgan_dist.training.phases import Phase, phase_table, run_phase
from cmgan_dist.training.state import Networks, build_networks
from cmgan_dist.training.step import StepInputs, build_step_inputs
from tests.distributed.zero_worker import ROWS, SPEC, STAGES, batch_of, compare_tensors, copies, train
from tests.toy import small_config


def inputs_of(config: Config, networks: Networks, parallel: Parallel) -> list[StepInputs]:
    return [build_step_inputs(batch_of(config, 1, parallel), networks, config, parallel, 0)]


def changed(before: dict[str, Tensor], networks: Networks) -> set[str]:
    """Names of parameters and optimiser states that are not as before."""
    return {name for name, value in copies(networks).items() if name in before and not torch.equal(before[name], value)}


def an_overflow_on_one_process_leaves_out_one_step(parallel: Parallel) -> None:
    """Of one discriminator, and of one side of the generator: the shared layers are left out with that side."""
    config = small_config(ROWS, train__precision="fp16")
    networks = build_networks(config, SPEC, None, parallel)
    train(config, parallel, networks, 0, 1)
    inputs = inputs_of(config, networks, parallel)
    spoilt = {"d_image_inter": "out.weight", "generator": "image_encoder.linear.weight"}
    if parallel.rank == parallel.world - 1:
        for module, name in spoilt.items():
            parameter = networks.engines[module].named_parameters[name]
            parameter.requires_grad_().register_hook(lambda g: torch.full_like(g, math.inf))
    for phase in phase_table(config):
        before = copies(networks)
        terms = run_phase(phase, inputs, networks.engines, parallel.autocast)
        skipped = phase.name in ("D_CI", "G_I")
        assert terms[f"skipped/{phase.name}"] == float(skipped), phase.name
        assert terms[f"scale/{phase.name}"] == FIRST_SCALE * (0.5 if skipped or phase.name == "G_T" else 1)
        moved = {name for name in changed(before, networks) if "/scaler/" not in name and "running_" not in name}
        assert bool(moved) != skipped, (phase.name, moved)
    networks.release()


def a_loss_that_is_not_finite_on_one_process_changes_nothing(parallel: Parallel) -> None:
    """`inf`: its gradients are finite."""
    config = small_config(ROWS)
    networks = build_networks(config, SPEC, None, parallel)
    train(config, parallel, networks, 0, 1)
    for bad in (math.nan, math.inf):
        for phase in phase_table(config):
            before = copies(networks)
            spoilt = Phase(phase.name, phase.module, _spoilt(phase, bad, parallel.rank == 0))
            run_phase(spoilt, inputs_of(config, networks, parallel), networks.engines, parallel.autocast)
            moved = {name for name in changed(before, networks) if "running_" not in name}
            assert not moved, (phase.name, bad, moved)
    train(config, parallel, networks, 1, 2)
    networks.release()


def _spoilt(phase: Phase, bad: float, here: bool) -> Callable[[StepInputs], dict[str, Tensor]]:
    def terms(inputs: StepInputs) -> dict[str, Tensor]:
        found = phase.loss(inputs)
        name = next(iter(found))
        return {**found, name: found[name] + bad} if here else found

    return terms


def parameters_that_join_later_begin_anew(parallel: Parallel) -> None:
    """A run that goes on with one loss term more, as under DDP: the decoders' step counts are behind the others'."""
    zero, ends = parallel.zero_config, []
    for first in (zero, None):
        config = small_config(ROWS, loss__intra=0.0, optim__clip=0.1)
        parallel.zero_config = first
        networks = build_networks(config, SPEC, None, parallel)
        train(config, parallel, networks, 0, 3)
        saved = copies(networks)
        networks.release()
        config.loss.intra = 1.0
        for second in (zero, None):
            parallel.zero_config = second
            networks = build_networks(config, SPEC, None, parallel)
            networks.load(saved, "checkpoint")
            train(config, parallel, networks, 3, 6)
            ends.append(copies(networks))
            networks.release()
    parallel.zero_config = zero
    steps = {float(v) for k, v in ends[0].items() if k.startswith("optimizer/generator/") and k.endswith("/step")}
    assert steps == {3.0, 6.0, 12.0}
    for end in ends[:3]:
        compare_tensors(ends[3], end, "with one term more", 1e-6)


def each_process_keeps_its_share(parallel: Parallel) -> None:
    """Of the optimiser's state, over all engines, but for a few elements by which partitions are made even; what it
    updates is the parameters' own memory."""
    config = small_config(ROWS, loss__modality=1.0)
    networks = build_networks(config, SPEC, None, parallel)
    train(config, parallel, networks, 0, 1)
    for engine in networks.engines.values():
        assert isinstance(engine, ZeroEngine)
        for group in engine.groups:
            (updated,) = group.optimizer.param_groups[0]["params"]
            parameter = next(iter(group.named.values()))
            assert updated.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        kept = [v for g in engine.groups for state in g.optimizer.state.values() for v in state.values() if v.ndim]
        elements, whole = sum(v.numel() for v in kept), 2 * sum(p.numel() for p in engine.named_parameters.values())
        assert 0 <= elements * parallel.world - whole <= 4 * parallel.world * len(engine.groups), (elements, whole)
    networks.release()


def main() -> None:
    parallel = Parallel()
    for name, zero in STAGES.items():
        parallel.zero_config = {"zero_optimization": zero}
        for precision, check in (
            ("fp16", an_overflow_on_one_process_leaves_out_one_step),
            ("fp32", a_loss_that_is_not_finite_on_one_process_changes_nothing),
            ("fp32", parameters_that_join_later_begin_anew),
            ("fp32", each_process_keeps_its_share),
        ):
            parallel.precision = precision
            check(parallel)
            if parallel.main:
                print(f"{name}: {check.__name__} on {parallel.world}")
    parallel.close()


if __name__ == "__main__":
    main()
