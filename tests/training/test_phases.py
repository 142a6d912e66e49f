"""The phase table trains one module a phase, on the published losses; mismatched rows are drawn as they should be."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cmgan_dist.config.fields import Config, ModelConfig
from cmgan_dist.data.manifest import DataSpec
from cmgan_dist.models.generator import build_generator
from cmgan_dist.training.phases import generator_terms, phase_table, run_phase
from cmgan_dist.training.step import RowRange, build_step_inputs, draw_mismatched
from tests.toy import make_batch, set_up, small

CASES = [
    {},
    {"adversarial": "hinge", "mismatch": "conditional"},
    {"adversarial": "wgan-gp"},
    {"r1": 1.0, "r1_every": 1},
    {"contrastive": 1.0, "class_contrastive": 1.0},
    {"intra": 0.0},
    {"inter": 0.0},
    {"modality": 1.0, "r1": 1.0, "r1_every": 1},
    {"modality": 1.0, "adversarial": "wgan-gp"},
]


@pytest.mark.parametrize("update", ["alternate", "joint"])
@pytest.mark.parametrize("loss", CASES, ids=str)
def test_each_phase_changes_its_own_parameters_only(loss: dict[str, object], update: str) -> None:
    config = small(**loss)
    config.optim.update, config.optim.clip = update, 1.0  # type: ignore[assignment]
    networks, parallel = set_up(config)
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    modules = {"generator": networks.generator, **networks.unwrapped}
    for phase in phase_table(config):
        before = {n: {k: p.detach().clone() for k, p in m.named_parameters()} for n, m in modules.items()}
        terms = run_phase(phase, [inputs], networks.engines, parallel.autocast)
        assert all(torch.isfinite(t) for t in terms.values())
        for name, module in modules.items():
            changed = {k for k, p in module.named_parameters() if not torch.equal(p, before[name][k])}
            if name != phase.module:
                assert not changed, f"{phase.name} changed {name}: {changed}"
                assert name == "generator" or all(p.grad is None or not p.requires_grad for p in module.parameters())
            else:
                own = changed
                assert own, f"{phase.name} left its own module as it was"
        if phase.name == "G_I":
            assert not {k for k in own if k.startswith("text_")}
            assert any(k.startswith("shared.") for k in own)
        if phase.name == "G_T":
            assert not {k for k in own if k.startswith("image_")}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loss", CASES, ids=str)
def test_all_losses_are_finite_in_lower_precision(loss: dict[str, object], precision: str) -> None:
    config = small(**loss)
    config.train.precision = precision  # type: ignore[assignment]
    networks, parallel = set_up(config)
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    for phase in phase_table(config):
        terms = run_phase(phase, [inputs], networks.engines, parallel.autocast)
        found = {name: float(term) for name, term in terms.items() if name.startswith("loss/")}
        assert found
        assert all(map(math.isfinite, found.values())), found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("loss", [{}, {"intra": 0.0}, {"classification": 0.0, "contrastive": 1.0}], ids=str)
def test_a_single_modality_generator_holds_the_parameters_that_get_a_gradient(
    loss: dict[str, object], share: bool
) -> None:
    """What DDP is told to send: one too few would stay different among processes, one too many stops the run."""
    config = small(**loss)
    config.optim.update, config.model.share_layers, config.model.share_classifier = "alternate", share, share
    networks, parallel = set_up(config)
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    for phase in phase_table(config)[-2:]:
        run_phase(phase, [inputs], networks.engines, parallel.autocast)
        found = {name for name, p in networks.generator.named_parameters() if p.grad is not None}
        sent = set(inputs.generator[{"G_I": "image", "G_T": "text"}[phase.name]].parameters())
        named = {name for name, p in networks.generator.named_parameters() if p in sent and p.requires_grad}
        assert found == named, phase.name
        assert found


def test_the_reference_table_is_the_published_order() -> None:
    names = [p.name for p in phase_table(Config())]
    assert names == ["D_T", "D_I", "D_CT", "D_CI"] + ["G_I", "G_T"] * 5
    assert [p.name for p in phase_table(small(modality=1.0, intra=0.0, inter=0.0))][:2] == ["D_M", "G_I"]


def test_one_discriminator_step_against_plain_torch() -> None:
    """D_CI of the recipe written out: separate forwards, BCE, weights 1, 1/2, 1/2, Adam."""
    config = small(mismatch="conditional")
    networks, parallel = set_up(config)
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    mine = copy.deepcopy(networks.unwrapped["d_image_inter"])
    optimizer = torch.optim.Adam(mine.parameters(), lr=1e-3, betas=(0.5, 0.999))
    image, text, mismatched = inputs.outputs["image"], inputs.outputs["text"], inputs.mismatched
    assert mismatched is not None
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(10), torch.zeros(10)
    loss = bce(mine(image.common, image.feature, [10]), ones)
    loss = loss + 0.5 * bce(mine(text.common, image.feature, [10]), zeros)
    loss = loss + 0.5 * bce(mine(mismatched.common["image"], image.feature, [10]), zeros)
    loss.backward()
    optimizer.step()
    phase = next(p for p in phase_table(config) if p.name == "D_CI")
    terms = run_phase(phase, [inputs], networks.engines, parallel.autocast)
    torch.testing.assert_close(terms["loss/D_CI/adversarial"], loss.detach())
    for a, b in zip(networks.unwrapped["d_image_inter"].parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_generator_step_against_plain_torch() -> None:
    """G_I of the recipe written out."""
    config = small()
    networks, parallel = set_up(config)
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    mine = copy.deepcopy(networks.generator)
    output, _ = mine(inputs.image, None)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    loss = bce(networks.unwrapped["d_text_inter"](output.common, inputs.text, [10]), torch.ones(10))
    loss = loss + bce(networks.unwrapped["d_image"](output.reconstruction.dense()), torch.ones(10))
    assert inputs.labels is not None
    loss = loss + torch.nn.functional.cross_entropy(output.logits, inputs.labels.float().argmax(1))
    loss.backward()
    torch.optim.Adam(mine.parameters(), lr=1e-3, betas=(0.5, 0.999)).step()
    phase = next(p for p in phase_table(config) if p.name == "G_I")
    terms = run_phase(phase, [inputs], networks.engines, parallel.autocast)
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), loss.detach())
    for (name, a), (_, b) in zip(networks.generator.named_parameters(), mine.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("classes", [3, 0])
def test_the_modality_discriminator_step_against_plain_torch(classes: int) -> None:
    """D_M written out: BCE of both modalities given their classes, R1 on both, Adam."""
    config = small(modality=1.0, intra=0.0, inter=0.0, r1=0.8, r1_every=1, contrastive=1.0)
    networks, parallel = set_up(config, classes)
    inputs = build_step_inputs(make_batch(classes=classes), networks, config, parallel, 0)
    mine = copy.deepcopy(networks.unwrapped["d_modality"])
    optimizer = torch.optim.Adam(mine.parameters(), lr=1e-3, betas=(0.5, 0.999))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    loss, penalty = torch.zeros(()), torch.zeros(())
    for modality, wanted in (("image", torch.ones(10)), ("text", torch.zeros(10))):
        common = inputs.outputs[modality].common.detach().requires_grad_()  # type: ignore[index]
        logits = mine(common, inputs.labels)
        loss = loss + bce(logits, wanted)
        for row in torch.autograd.grad(logits.sum(), common, create_graph=True)[0]:
            penalty = penalty + row.square().sum() / 20
    (loss + 0.8 / 2 * penalty).backward()
    optimizer.step()
    terms = run_phase(phase_table(config)[0], [inputs], networks.engines, parallel.autocast)
    torch.testing.assert_close(terms["loss/D_M/adversarial"], loss.detach())
    torch.testing.assert_close(terms["loss/D_M/r1"], 0.4 * penalty.detach())
    for a, b in zip(networks.unwrapped["d_modality"].parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_generator_hides_its_modality() -> None:
    """Images are to be called texts, and texts images."""
    config = small(modality=0.7, intra=0.0, inter=0.0, classification=0.0)
    networks, parallel = set_up(config)
    inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
    image, text = networks.generator(inputs.image, inputs.text, classify=False, decode=False)
    judge, bce = networks.unwrapped["d_modality"], torch.nn.functional.binary_cross_entropy_with_logits
    expected = {
        "G_I": 0.7 * bce(judge(image.common, inputs.labels), torch.zeros(10)),
        "G_T": 0.7 * bce(judge(text.common, inputs.labels), torch.ones(10)),
    }
    for phase in phase_table(config)[1:3]:
        terms = generator_terms(inputs, ("image",) if phase.name == "G_I" else ("text",))
        torch.testing.assert_close(torch.stack(list(terms.values())).sum(), expected[phase.name])


def test_image_and_text_share_the_same_storage() -> None:
    config, spec = ModelConfig(hidden_dim=8, common_dim=4), DataSpec(["a", "b"], "single", 6, 5)
    model = copy.deepcopy(build_generator(config, spec, None)).float()
    model.load_state_dict(build_generator(config, spec, None).state_dict())
    image, text = torch.randn(3, 6), torch.randn(3, 5)
    gradients = []
    for inputs in ((image, None), (None, text)):
        model.zero_grad()
        outputs = model(*inputs)
        next(output for output in outputs if output is not None).common.square().sum().backward()
        gradients.append(model.shared.linear[0].weight.grad.clone())
    assert len(model.shared.linear) == 1
    assert all(g.abs().sum() > 0 for g in gradients)
    config.share_layers = False
    apart = build_generator(config, spec, None)
    assert len({p.data_ptr() for p in apart.shared.linear.parameters()}) == 2


def test_joined_forward_equals_two_passes() -> None:
    config, spec = ModelConfig(hidden_dim=8, common_dim=4), DataSpec(["a", "b"], "single", 6, 5)
    model = build_generator(config, spec, None)
    image, text = torch.randn(7, 6), torch.randn(7, 5)
    twin = copy.deepcopy(model)
    joined = model(image, text)
    apart = twin(image, None)[0], twin(None, text)[1]
    for a, b in zip(joined, apart, strict=True):
        torch.testing.assert_close(a.common, b.common)
        torch.testing.assert_close(a.reconstruction.dense(), b.reconstruction.dense())
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_mismatched_rows_share_no_class_and_are_uniform() -> None:
    labels = torch.eye(3).bool()[torch.tensor([0, 0, 1, 2, 1, 0])]
    counts = torch.zeros(6, 6)
    for position in range(600):
        index, mask = draw_mismatched(labels, labels, RowRange(0, 6, 6), 1, position)
        assert mask is None
        assert not (labels & labels[index]).any()
        counts[torch.arange(6), index] += 1
    share = counts / 600
    assert share[0, 2:5].sub(1 / 3).abs().max() < 0.08
    assert share[2, [0, 1, 3, 5]].sub(1 / 4).abs().max() < 0.08


def test_mismatched_rows_do_not_depend_on_the_number_of_processes() -> None:
    labels = torch.eye(4).bool()[torch.arange(12) % 4]
    everything, thirds = RowRange(0, 12, 12), [RowRange(first, 4, 12) for first in (0, 4, 8)]
    whole, _ = draw_mismatched(labels, labels, everything, 5, 64)
    parts = [draw_mismatched(labels[rows.own], labels, rows, 5, 64)[0] for rows in thirds]
    assert torch.equal(whole, torch.cat(parts))
    free = [draw_mismatched(None, None, rows, 5, 64)[0] for rows in thirds]
    assert torch.equal(draw_mismatched(None, None, everything, 5, 64)[0], torch.cat(free))
    assert (torch.cat(free) != torch.arange(12)).all()


def test_rows_without_another_class_are_masked() -> None:
    labels = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    index, mask = draw_mismatched(labels, labels, RowRange(0, 3, 3), 0, 0)
    assert mask is not None
    assert mask.tolist() == [False, True, True]
    assert index[1:].tolist() == [2, 1]


def test_label_free_training_has_no_classifier() -> None:
    config = small()
    networks, parallel = set_up(config, classes=0)
    inputs = build_step_inputs(make_batch(classes=0), networks, config, parallel, 0)
    terms = {k for p in phase_table(config) for k in run_phase(p, [inputs], networks.engines, parallel.autocast)}
    assert not any("classification" in k for k in terms)
    assert not len(networks.generator.classifiers)


@pytest.mark.parametrize(
    "loss", [{"contrastive": 1.0}, {"class_contrastive": 1.0}, {"intra": 1.0}, {"modality": 1.0}], ids=str
)
@pytest.mark.parametrize("update", ["joint", "alternate"])
def test_the_no_grad_forward_runs_where_a_loss_reads_it(
    update: str, loss: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without discriminators, and both modalities in one phase, a step is the same to the bit without it."""
    config = small(**({"inter": 0.0, "intra": 0.0} | loss))
    config.optim.update = update  # type: ignore[assignment]
    config.model.dropout = config.model.input_dropout = 0.0
    found, forwards = [], []
    for always in (False, True):
        if always:
            monkeypatch.setattr("cmgan_dist.training.step.reads_outputs", lambda config: True)
        networks, parallel = set_up(config)
        inputs = build_step_inputs(make_batch(), networks, config, parallel, 0)
        forwards.append(len(inputs.outputs))
        terms = {}
        for phase in phase_table(config):
            terms |= run_phase(phase, [inputs], networks.engines, parallel.autocast)
        found.append(terms | dict(networks.generator.named_parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert forwards == [0 if update == "joint" and "contrastive" in next(iter(loss)) else 2, 2]
