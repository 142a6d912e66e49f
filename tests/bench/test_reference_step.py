"""bench/reference_step.py computes what preset `reference` computes: every loss of 50 batches."""

from __future__ import annotations

import pytest
import torch

from bench.reference_step import DISCRIMINATORS, Dims, ReferenceStep
from bench.step_worker import Ours, agreement, make_batches

SMALL = Dims(image=24, text=12, hidden=16, common=16, discriminator=16, classes=4)


def test_fifty_batches_of_training_agree_with_the_library() -> None:
    found = agreement(16, SMALL, 50, again=False)
    assert found["relative"] < 1e-5, found


def test_weights_agree_after_a_batch() -> None:
    ours, reference = Ours(16, SMALL), ReferenceStep(SMALL)
    ours.hand_over(reference)
    batch, rows = make_batches(16, SMALL)[0]
    ours.update(batch)
    reference.update(rows)
    modules = {"generator": ours.networks.generator, **ours.networks.unwrapped}
    theirs = {f"{m}/{k}": p for m, module in modules.items() for k, p in module.named_parameters()}
    for name, parameter in reference.named().items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_optimiser_states_are_handed_over() -> None:
    """Without them the next update of Adam would be its first."""
    ours = Ours(16, SMALL)
    data = make_batches(16, SMALL)
    for batch, _ in data[:3]:
        ours.update(batch)
    with_state, without = ReferenceStep(SMALL), ReferenceStep(SMALL)
    ours.hand_over(with_state)
    without.copy_from({"generator": ours.networks.generator, **ours.networks.unwrapped})
    mine = torch.stack([loss for _, loss in ours.update(data[3][0])])
    theirs = torch.stack([loss for _, loss in with_state.update(data[3][1])])
    others = torch.stack([loss for _, loss in without.update(data[3][1])])
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (mine - others).abs().max() > 1e-3


def test_each_parameter_is_owned_once_and_each_phase_moves_its_own() -> None:
    reference = ReferenceStep(SMALL)
    owned = [p for o in reference.optimizers.values() for group in o.param_groups for p in group["params"]]
    assert len(reference.optimizers) == 6
    assert len(owned) == len(set(owned)) == len(set(reference.parameters()))
    rows = make_batches(16, SMALL)[0][1]
    before = {k: v.detach().clone() for k, v in reference.named().items()}
    reference.generator_steps = 0
    reference.update(rows)
    moved = {k.partition("/")[0] for k, v in reference.named().items() if not torch.equal(v, before[k])}
    assert moved == set(DISCRIMINATORS)


@pytest.mark.parametrize("options", [{"fused": True}, {"precision": "bf16"}])
def test_variants_train_alike(options: dict[str, object]) -> None:
    plain, variant = ReferenceStep(SMALL), ReferenceStep(SMALL, **options)  # type: ignore[arg-type]
    variant.load_state_dict(plain.state_dict())
    rows = make_batches(16, SMALL)[0][1]
    mine = torch.stack([loss for _, loss in plain.update(rows)])
    theirs = torch.stack([loss for _, loss in variant.update(rows)])
    tolerance = 0.05 if "precision" in options else 1e-5
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_apart_has_other_statistics() -> None:
    """Rows apart are another model in discriminator phases: it is timed, but not said to be equal."""
    joined, apart = ReferenceStep(SMALL), ReferenceStep(SMALL, joined=False)
    apart.load_state_dict(joined.state_dict())
    rows = make_batches(16, SMALL)[0][1]
    mine, theirs = dict(joined.update(rows)[:4]), dict(apart.update(rows)[:4])
    assert all((mine[k] - theirs[k]).abs() > 1e-5 for k in mine)
    assert all((mine[k] - theirs[k]).abs() < 0.5 for k in mine)


def test_foreign_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"d_image_inter/out\.bias"):
        ReferenceStep(SMALL).copy_from({"generator": Ours(16, SMALL).networks.generator})
