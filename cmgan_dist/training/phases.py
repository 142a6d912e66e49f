"""The phase table: who trains, on what loss, how often. One generic loop runs it; no branch knows a phase by name.

A batch is: one no-grad generator forward that serves all discriminator phases; D_T, D_I, D_CT, D_CI once each; then
`generator_steps` times the generator, image side and text side in turn or both at once (recipe: Updates per batch).
Losses of the generator go through the discriminators' bare modules, frozen, so that no gradient and no collective
leaks into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from cmgan_dist.config.fields import Config
from cmgan_dist.data.order import generator_for
from cmgan_dist.distributed.engine import Engine
from cmgan_dist.models.discriminators import InterDiscriminator
from cmgan_dist.models.generator import ModalityOutput
from cmgan_dist.training import losses
from cmgan_dist.training.step import StepInputs

Terms = dict[str, Tensor]
"""Weighted loss terms by name; their sum is minimised."""


# ---------------------------------------------------------------------------------------------- losses of the phases


def _record(inputs: StepInputs, name: str, groups: dict[str, Tensor]) -> None:
    """Accuracy of each group of logits (real wants > 0, others < 0) and the margin real - fake."""
    with torch.no_grad():
        for group, logits in groups.items():
            right = logits > 0 if group == "real" else logits < 0
            inputs.stats[f"accuracy/{name}/{group}"] = right.float().mean()
        inputs.stats[f"margin/{name}"] = groups["real"].mean() - groups["fake"].mean()


def _penalties(inputs: StepInputs, name: str, real: list[Tensor], fake: list[Callable[[], Tensor]]) -> Terms:
    """R1 on real input, lazily, and WGAN-GP's penalty between real and fake, which only that builds."""
    config, module, terms = inputs.config.loss, inputs.discriminators[name], Terms()

    def call(inputs: list[Tensor]) -> Tensor:
        return module(*inputs, [len(inputs[0])]) if len(inputs) == 2 else module(*inputs)

    batch = inputs.position // inputs.config.stream.global_batch
    with torch.autocast(real[0].device.type, enabled=False):  # gradients of the input would underflow in fp16
        if config.r1 and batch % config.r1_every == 0:
            at = [x.detach().float().requires_grad_() for x in real]
            terms["r1"] = config.r1 * config.r1_every / 2 * losses.squared_gradient_norm(call(at), at)
        if config.adversarial == "wgan-gp":
            rows = slice(inputs.first_row, inputs.first_row + len(real[0]))  # the same whatever the number of processes
            draws = generator_for(inputs.config.train.seed, inputs.position, 9).random(inputs.total)[rows]
            share = torch.from_numpy(draws).float()[:, None].to(real[0].device)
            ends = [(f().detach().float(), r.detach().float()) for r, f in zip(real, fake, strict=True)]
            at = [torch.lerp(f, r, share).requires_grad_() for f, r in ends]
            terms["gradient_penalty"] = config.gradient_penalty * losses.gradient_penalty(call(at), at)
    return terms


def _discriminator_loss(inputs: StepInputs, real: Tensor, fakes: list[tuple[Tensor, float, Tensor | None]]) -> Tensor:
    return losses.fused_discriminator_loss(inputs.config.loss.adversarial, real, fakes, inputs.config.model.kernels)


def intra(name: str, side: Callable[[StepInputs], ModalityOutput]) -> Callable[[StepInputs], Terms]:
    """D_I, D_T: original feature -> 1, reconstruction -> 0."""

    def loss(inputs: StepInputs) -> Terms:
        made = side(inputs)
        assert made.reconstruction is not None
        real, fake = inputs.discriminators[name](made.feature, made.reconstruction).chunk(2)
        _record(inputs, name, {"real": real, "fake": fake})
        adversarial = _discriminator_loss(inputs, real, [(fake, 1.0, None)])
        return {"adversarial": adversarial, **_penalties(inputs, name, [made.feature], [made.reconstruction.dense])}

    return loss


def inter(
    name: str, own: Callable[[StepInputs], ModalityOutput], other: Callable[[StepInputs], ModalityOutput], modality: str
) -> Callable[[StepInputs], Terms]:
    """D_CI, D_CT: (own common, feature) -> 1; (other's common, feature) -> 0 and mismatched -> 0, half weight each."""

    def loss(inputs: StepInputs) -> Terms:
        mine, theirs, wrong = own(inputs), other(inputs), inputs.wrong
        assert wrong is not None
        feature = mine.feature
        wrong_common: Tensor = getattr(wrong, f"{modality}_common")
        conditional = inputs.config.loss.mismatch == "conditional"
        wrong_feature: Tensor = feature if conditional else getattr(wrong, f"{modality}_feature")
        commons = torch.cat([mine.common, theirs.common, wrong_common.to(mine.common.dtype)])
        rows = [len(feature)] * 3
        logits = inputs.discriminators[name](commons, [feature, feature, wrong_feature], rows)
        real, fake, mismatched = logits.chunk(3)
        _record(inputs, name, {"real": real, "fake": fake, "wrong": mismatched})
        adversarial = _discriminator_loss(inputs, real, [(fake, 0.5, None), (mismatched, 0.5, wrong.mask)])
        between = ([mine.common.float(), feature], [lambda: theirs.common, lambda: feature])
        return {"adversarial": adversarial, **_penalties(inputs, name, *between)}

    return loss


def _generator_terms(
    inputs: StepInputs, made: ModalityOutput, classes: bool, intra_name: str, inter_name: str, condition: Tensor
) -> Terms:
    """One side's generator terms: fool the other modality's inter discriminator and its own intra one, classify."""
    config, terms = inputs.config.loss, Terms()
    if config.inter:
        judge = inputs.unwrapped[inter_name]
        assert isinstance(judge, InterDiscriminator)
        if inter_name not in inputs.conditions:  # neither weights nor features change over the generator's steps
            inputs.conditions[inter_name] = judge.condition(condition)
        logits = judge(made.common, condition, [len(condition)], inputs.conditions[inter_name])
        terms["inter"] = config.inter * losses.generator_loss(config.adversarial, logits)
    if config.intra:
        assert made.reconstruction is not None
        logits = inputs.unwrapped[intra_name](made.reconstruction)
        terms["intra"] = config.intra * losses.generator_loss(config.adversarial, logits)
    if classes and config.classification:
        assert made.logits is not None
        assert inputs.labels is not None
        term = losses.classification(made.logits, inputs.labels, inputs.multi, config.label_smoothing)
        terms["classification"] = config.classification * term
        with torch.no_grad():
            best = made.logits.argmax(1, keepdim=True)
            inputs.stats[f"accuracy/class/{intra_name[2:]}"] = inputs.labels.gather(1, best).float().mean()
    return terms


def _contrastive_terms(inputs: StepInputs, image: Tensor, text: Tensor) -> Terms:
    """Pair-level and class-level contrastive terms between commons [B, E]; a detached side is given by one phase."""
    config, terms = inputs.config.loss, Terms()
    if not (config.contrastive or config.class_contrastive):
        return terms
    every_image, every_text = inputs.gather(image), inputs.gather(text)
    if config.contrastive:
        term = losses.info_nce(image, text, every_image, every_text, inputs.first_row, config.temperature)
        terms["contrastive"] = config.contrastive * term
    if config.class_contrastive and inputs.labels is not None and inputs.all_labels is not None:
        positive = inputs.labels.float() @ inputs.all_labels.float().T > 0.5
        to_text = losses.class_contrastive(image, every_text, positive, config.class_temperature)
        to_image = losses.class_contrastive(text, every_image, positive, config.class_temperature)
        terms["class_contrastive"] = config.class_contrastive * (to_text + to_image) / 2
    return terms


def generator(sides: tuple[str, ...]) -> Callable[[StepInputs], Terms]:
    """The generator on the given sides ("image", "text" or both)."""

    def loss(inputs: StepInputs) -> Terms:
        config = inputs.config.loss
        classes = inputs.labels is not None
        image, text = inputs.generator[sides[0] if len(sides) == 1 else ""](
            inputs.image if "image" in sides else None,
            inputs.text if "text" in sides else None,
            classify=classes and config.classification > 0,
            decode=config.intra > 0,
        )
        terms = Terms()
        if image is not None:
            made = _generator_terms(inputs, image, classes, "d_image", "d_text_inter", inputs.fake_text.feature)
            terms |= {f"image_{k}": v for k, v in made.items()}
        if text is not None:
            made = _generator_terms(inputs, text, classes, "d_text", "d_image_inter", inputs.fake_image.feature)
            terms |= {f"text_{k}": v for k, v in made.items()}
        image_common = image.common if image is not None else inputs.fake_image.common
        text_common = text.common if text is not None else inputs.fake_text.common
        return terms | _contrastive_terms(inputs, image_common, text_common)

    return loss


# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Phase:
    """One row of the table."""

    name: str
    module: str
    """The module that trains and whose optimiser steps; every other module is frozen."""
    loss: Callable[[StepInputs], Terms]


def phase_table(config: Config) -> list[Phase]:
    """The phases of one batch in order."""
    weights = config.loss

    def image(inputs: StepInputs) -> ModalityOutput:
        return inputs.fake_image

    def text(inputs: StepInputs) -> ModalityOutput:
        return inputs.fake_text

    table = []
    if weights.intra:
        table += [Phase("D_T", "d_text", intra("d_text", text)), Phase("D_I", "d_image", intra("d_image", image))]
    if weights.inter:
        table += [
            Phase("D_CT", "d_text_inter", inter("d_text_inter", text, image, "text")),
            Phase("D_CI", "d_image_inter", inter("d_image_inter", image, text, "image")),
        ]
    if config.optim.update == "joint":
        turn = [Phase("G", "generator", generator(("image", "text")))]
    else:
        turn = [
            Phase("G_I", "generator", generator(("image",))),
            Phase("G_T", "generator", generator(("text",))),
        ]
    return table + turn * config.optim.generator_steps


def run_phase(
    phase: Phase,
    all_inputs: list[StepInputs],
    engines: dict[str, Engine],
    autocast: Callable[[], AbstractContextManager[object]],
    measure: bool = False,
) -> dict[str, Tensor]:
    """One update of the phase's module from one or more micro-batches; returns loss terms (means over these) and what
    the engine measured, detached. `measure`: the gradient norm also where nothing is clipped.

    A loss that is not finite leaves the parameters as they are; see `not_finite`."""
    for name, module in all_inputs[0].unwrapped.items():  # the generator is only reached through its own phases
        module.requires_grad_(name == phase.module)
    engine, share = engines[phase.module], 1 / len(all_inputs)
    engine.zero_grad()
    total, out = torch.zeros(()), dict[str, Tensor]()
    for inputs in all_inputs:
        with engine.accumulate(last=inputs is all_inputs[-1]):
            with autocast():
                terms = phase.loss(inputs)
            loss = torch.stack([t.float() for t in terms.values()]).sum()
            loss = loss * share if len(all_inputs) > 1 else loss
            engine.backward(loss)
        total = total.to(loss.device) + loss.detach()
        for key, value in terms.items():
            name = f"loss/{phase.name}/{key}"
            out[name] = out.get(name, 0) + value.detach() * share
    return out | {f"{key}/{phase.name}": value for key, value in engine.step(total, measure).items()}


def not_finite(losses: Iterable[Tensor]) -> Tensor:
    """bool [losses]: which losses are NaN or Inf; no wait for the device."""
    return ~torch.isfinite(torch.stack([loss.float() for loss in losses]))
