"""Who trains on what, in which order: the phase table of one batch, the losses of its phases, and one update.

A batch is one no-grad generator forward that serves all discriminator phases (step.py); D_T, D_I, D_CT, D_CI, D_M
once each, those whose weight is not 0; then `optim.generator_steps` times the generator, image and text in turn or both
at once. That is the training of Peng, Qi & Yuan, "CM-GANs" (ACM TOMM 15(1), 2019; arXiv 1710.05106), with the choices
that docs/reference.md lists, and with D_M beside it. One generic loop runs the table; no branch knows a phase by name.

Where each weight of `config.loss` is used; c is the common representation of a row, f its feature, r its
reconstruction, c' and f' are those of its other modality; -> stands before what D shall say or is made to say:

    phase       term                   weight                      function
    D_I, D_T    D(f) -> real           1                           intra_discriminator_terms
                D(r) -> fake           1
    D_CI, D_CT  D(c, f) -> real        1                           inter_discriminator_terms
                D(c', f) -> fake       1/2
                mismatched -> fake     1/2
    D_M         D(c of image) -> real  1                           modality_discriminator_terms
                D(c of text) -> fake   1
    all D       R1, WGAN-GP's penalty  r1, gradient_penalty        _penalties
    G_I, G_T    D(c, f') -> real       inter, D is D_CT or D_CI    _modality_terms
    (joint: G)  D(r) -> real           intra, D is D_I or D_T      _modality_terms
                D_M(c) -> the other    modality                    _modality_terms
                class of c             classification              _modality_terms
                c near c'              contrastive                 _contrastive_terms
                c near its class       class_contrastive           _contrastive_terms

Losses of the generator go through the unwrapped discriminators, frozen, so that no gradient and no collective leaks
into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cmgan_dist.config.fields import Config
from cmgan_dist.data.order import generator_for
from cmgan_dist.distributed.engine import Engine
from cmgan_dist.models.discriminators import InterDiscriminator
from cmgan_dist.models.generator import Modality, ModalityOutput
from cmgan_dist.training import losses
from cmgan_dist.training.step import StepInputs

Terms = dict[str, Tensor]
"""Weighted loss terms by name, a scalar each; their sum is minimised."""
OTHER: dict[Modality, Modality] = {"image": "text", "text": "image"}
"""The other modality of each."""


# ---------------------------------------------------------------------------------------------- discriminators


def intra_discriminator_terms(inputs: StepInputs, modality: Modality) -> Terms:
    """Return the loss terms of D_I or D_T: original features f -> real, reconstructions r -> fake.

    With BCE, Peng, Qi & Yuan's intra-modality loss: mean[-log D(f)] + mean[-log(1 - D(r))]. It has weight 1, since a
    discriminator trains on nothing else; `loss.intra` weighs the generator's part, and 0 leaves the phase out."""
    name, own = f"d_{modality}", inputs.outputs[modality]
    assert own.reconstruction is not None
    real, fake = inputs.discriminators[name](own.feature, own.reconstruction).chunk(2)
    _record(inputs, name, {"real": real, "fake": fake})
    adversarial = _adversarial(inputs, real, [(fake, 1.0, None)])
    penalties = _penalties(inputs, inputs.discriminators[name], [own.feature], [own.reconstruction.dense])
    return {"adversarial": adversarial, **penalties}


def inter_discriminator_terms(inputs: StepInputs, modality: Modality) -> Terms:
    """Return the loss terms of D_CI or D_CT: whose common representation goes with the feature f of `modality`?

    The own c with f -> real; the other modality's c_m with f -> fake and a mismatched pair -> fake, half weight each.
    With BCE, Peng, Qi & Yuan's inter-modality loss:
    mean[-log D(c, f)] + 1/2 mean[-log(1 - D(c_m, f))] + 1/2 mean[-log(1 - D(mismatched))].
    `loss.mismatch` says which feature is beside the mismatched common representation: its own (reference) or f
    (conditional). The loss has weight 1; `loss.inter` weighs the generator's part, and 0 leaves the phase out."""
    name, own, other = f"d_{modality}_inter", inputs.outputs[modality], inputs.outputs[OTHER[modality]]
    drawn, feature = inputs.mismatched, own.feature
    assert drawn is not None
    conditional = inputs.config.loss.mismatch == "conditional"
    beside = feature if conditional else drawn.feature[modality]
    commons = torch.cat([own.common, other.common, drawn.common[modality].to(own.common.dtype)])
    logits = inputs.discriminators[name](commons, [feature, feature, beside], [len(feature)] * 3)
    real, fake, mismatched = logits.chunk(3)
    _record(inputs, name, {"real": real, "fake": fake, "mismatched": mismatched})
    adversarial = _adversarial(inputs, real, [(fake, 0.5, None), (mismatched, 0.5, drawn.mask)])
    between = ([own.common.float(), feature], [lambda: other.common, lambda: feature])
    judge = partial(inputs.discriminators[name], groups=[len(feature)])
    return {"adversarial": adversarial, **_penalties(inputs, judge, *between)}


def modality_discriminator_terms(inputs: StepInputs) -> Terms:
    """Return the loss terms of D_M: common representations of images -> real, of texts of the same classes -> fake.

    With BCE, the modality classifier of ACMR (Wang et al., ACM MM 2017), given the class: mean[-log D(c_i, y)] +
    mean[-log(1 - D(c_t, y))]. Neither modality is the real one, so R1 is the mean of the penalties on both. The loss
    has weight 1; `loss.modality` weighs the generator's part, and 0 leaves the phase out."""
    name, labels = "d_modality", inputs.labels
    commons = [inputs.outputs[modality].common.float() for modality in ("image", "text")]
    both = None if labels is None else torch.cat([labels, labels])
    image, text = inputs.discriminators[name](torch.cat(commons), both).chunk(2)
    _record(inputs, name, {"real": image, "fake": text})
    adversarial = _adversarial(inputs, image, [(text, 1.0, None)])
    turned = torch.cat(commons[::-1])
    judge = partial(inputs.discriminators[name], labels=both)
    return {"adversarial": adversarial, **_penalties(inputs, judge, [torch.cat(commons)], [lambda: turned])}


def _adversarial(inputs: StepInputs, real: Tensor, fakes: losses.Fakes) -> Tensor:
    """Return the discriminator's loss in the form of `loss.adversarial`."""
    return losses.fused_discriminator_loss(inputs.config.loss.adversarial, real, fakes, inputs.config.model.kernels)


def _record(inputs: StepInputs, name: str, groups: dict[str, Tensor]) -> None:
    """Note the accuracy of each group of logits (real wants > 0, others < 0) and the margin real - fake."""
    with torch.no_grad():
        for group, logits in groups.items():
            right = logits > 0 if group == "real" else logits < 0
            inputs.stats[f"accuracy/{name}/{group}"] = right.float().mean()
        inputs.stats[f"margin/{name}"] = groups["real"].mean() - groups["fake"].mean()


def _penalties(
    inputs: StepInputs, judge: Callable[..., Tensor], real: list[Tensor], fake: list[Callable[[], Tensor]]
) -> Terms:
    """Return R1 on real input, every `loss.r1_every` batches, and WGAN-GP's penalty between real and fake.

    `judge`: the discriminator, from its inputs to logits. `real`: these inputs, [B, ...] each; `fake` makes their
    counterparts, which only WGAN-GP needs."""
    config, terms = inputs.config.loss, Terms()
    batch = inputs.position // inputs.config.stream.global_batch
    with torch.autocast(real[0].device.type, enabled=False):  # gradients of the input would underflow in fp16
        if config.r1 and batch % config.r1_every == 0:
            at = [x.detach().float().requires_grad_() for x in real]
            terms["r1"] = config.r1 * config.r1_every / 2 * losses.squared_gradient_norm(judge(*at), at)
        if config.adversarial == "wgan-gp":
            draws = generator_for(inputs.config.train.seed, inputs.position, 9).random(inputs.rows.total)
            draws = draws[inputs.rows.own]  # the same for a row whatever the number of processes
            share = torch.from_numpy(draws).float()[:, None].to(real[0].device)
            share = share.repeat(len(real[0]) // len(share), 1)  # D_M judges both modalities' rows
            ends = [(f().detach().float(), r.detach().float()) for r, f in zip(real, fake, strict=True)]
            at = [torch.lerp(f, r, share).requires_grad_() for f, r in ends]
            terms["gradient_penalty"] = config.gradient_penalty * losses.gradient_penalty(judge(*at), at)
    return terms


# ---------------------------------------------------------------------------------------------- generator


def generator_terms(inputs: StepInputs, modalities: tuple[Modality, ...]) -> Terms:
    """Return the weighted loss terms of the generator on the given modalities, by MODALITY_TERM and contrastive name.

    The modality that does not train takes part in the contrastive terms by the no-grad forward's representations."""
    config, classes = inputs.config.loss, inputs.labels is not None
    made = inputs.generator[modalities[0] if len(modalities) == 1 else ""](
        inputs.image if "image" in modalities else None,
        inputs.text if "text" in modalities else None,
        classify=classes and config.classification > 0,
        decode=config.intra > 0,
    )
    outputs: dict[Modality, ModalityOutput | None] = {"image": made[0], "text": made[1]}
    terms, commons = Terms(), dict[Modality, Tensor]()
    for modality, output in outputs.items():
        if output is not None:
            found = _modality_terms(inputs, modality, output)
            terms |= {f"{modality}_{name}": value for name, value in found.items()}
        commons[modality] = (inputs.outputs[modality] if output is None else output).common
    return terms | _contrastive_terms(inputs, commons["image"], commons["text"])


def _modality_terms(inputs: StepInputs, modality: Modality, output: ModalityOutput) -> Terms:
    """Return one modality's terms of the generator: fool the discriminators, and classify.

    inter, weight `loss.inter`: the other modality's inter-modality discriminator takes the own common representation
    for the other's; with BCE mean[-log D_CT(c, f_text)] for images and mean[-log D_CI(c, f_image)] for texts.
    intra, weight `loss.intra`: the own intra-modality discriminator takes the reconstruction for a feature.
    modality, weight `loss.modality`: D_M takes an image's common representation for a text's and the other way round.
    classification, weight `loss.classification`: the semantic constraint, cross-entropy of the class logits."""
    config, terms = inputs.config.loss, Terms()
    if config.inter:
        name, condition = f"d_{OTHER[modality]}_inter", inputs.outputs[OTHER[modality]].feature
        discriminator = inputs.unwrapped[name]
        assert isinstance(discriminator, InterDiscriminator)
        if name not in inputs.conditions:  # neither weights nor features change over the generator's steps
            inputs.conditions[name] = discriminator.condition(condition)
        logits = discriminator(output.common, condition, [len(condition)], inputs.conditions[name])
        terms["inter"] = config.inter * losses.generator_loss(config.adversarial, logits)
    if config.intra:
        assert output.reconstruction is not None
        logits = inputs.unwrapped[f"d_{modality}"](output.reconstruction)
        terms["intra"] = config.intra * losses.generator_loss(config.adversarial, logits)
    if config.modality:
        logits = inputs.unwrapped["d_modality"](output.common, inputs.labels)
        logits = -logits if modality == "image" else logits
        terms["modality"] = config.modality * losses.generator_loss(config.adversarial, logits)
    if config.classification and inputs.labels is not None:
        assert output.logits is not None
        term = losses.classification(output.logits, inputs.labels, inputs.multi_label, config.label_smoothing)
        terms["classification"] = config.classification * term
        with torch.no_grad():
            best = output.logits.argmax(1, keepdim=True)
            inputs.stats[f"accuracy/class/{modality}"] = inputs.labels.gather(1, best).float().mean()
    return terms


def _contrastive_terms(inputs: StepInputs, image: Tensor, text: Tensor) -> Terms:
    """Return the pair-level and class-level terms, weights `loss.contrastive` and `loss.class_contrastive`.

    `image`, `text`: common representations [B, E]; a modality that does not train comes without a gradient."""
    config, terms = inputs.config.loss, Terms()
    if not (config.contrastive or config.class_contrastive):
        return terms
    every_image, every_text = inputs.gather(image), inputs.gather(text)
    if config.contrastive:
        term = losses.info_nce(image, text, every_image, every_text, inputs.rows.first, config.temperature)
        terms["contrastive"] = config.contrastive * term
    if config.class_contrastive and inputs.labels is not None and inputs.all_labels is not None:
        positive = inputs.labels.float() @ inputs.all_labels.float().T > 0.5
        to_text = losses.class_contrastive(image, every_text, positive, config.class_temperature)
        to_image = losses.class_contrastive(text, every_image, positive, config.class_temperature)
        terms["class_contrastive"] = config.class_contrastive * (to_text + to_image) / 2
    return terms


# ---------------------------------------------------------------------------------------------- table and update


@dataclass(frozen=True)
class Phase:
    """One row of the phase table: one update of one module."""

    name: str
    """The name in the log: D_T, D_I, D_CT, D_CI, D_M, G_I, G_T, or G for both modalities at once."""
    module: str
    """The module that trains and whose optimiser steps; every other module is frozen."""
    loss: Callable[[StepInputs], Terms]
    """The loss terms whose sum the module minimises."""


def phase_table(config: Config) -> list[Phase]:
    """Return the phases of one batch in order.

    A weight of 0 for `loss.intra`, `loss.inter` or `loss.modality` leaves the discriminators of that kind out."""
    table = []
    if config.loss.intra:
        table += [
            Phase("D_T", "d_text", partial(intra_discriminator_terms, modality="text")),
            Phase("D_I", "d_image", partial(intra_discriminator_terms, modality="image")),
        ]
    if config.loss.inter:
        table += [
            Phase("D_CT", "d_text_inter", partial(inter_discriminator_terms, modality="text")),
            Phase("D_CI", "d_image_inter", partial(inter_discriminator_terms, modality="image")),
        ]
    if config.loss.modality:
        table.append(Phase("D_M", "d_modality", modality_discriminator_terms))
    if config.optim.update == "joint":
        turn = [Phase("G", "generator", partial(generator_terms, modalities=("image", "text")))]
    else:
        turn = [
            Phase("G_I", "generator", partial(generator_terms, modalities=("image",))),
            Phase("G_T", "generator", partial(generator_terms, modalities=("text",))),
        ]
    return table + turn * config.optim.generator_steps


def run_phase(
    phase: Phase,
    micro_batches: list[StepInputs],
    engines: dict[str, Engine],
    autocast: Callable[[], AbstractContextManager[object]],
    measure: bool = False,
) -> dict[str, Tensor]:
    """Update the phase's module once, from the mean loss over one or more micro-batches.

    Return detached scalars: loss/PHASE/TERM, means over the micro-batches, and KEY/PHASE for each KEY that the engine
    measured. `measure`: the gradient norm also where nothing is clipped. A loss that is not finite leaves the
    parameters as they are; see `not_finite`."""
    for name, module in micro_batches[0].unwrapped.items():  # the generator is only reached through its own phases
        module.requires_grad_(name == phase.module)
    engine, share = engines[phase.module], 1 / len(micro_batches)
    engine.zero_grad()
    total, out = torch.zeros(()), dict[str, Tensor]()
    for inputs in micro_batches:
        with engine.accumulate(last=inputs is micro_batches[-1]):
            with autocast():
                terms = phase.loss(inputs)
            loss = torch.stack([t.float() for t in terms.values()]).sum()
            loss = loss * share if len(micro_batches) > 1 else loss
            engine.backward(loss)
        total = total.to(loss.device) + loss.detach()
        for key, value in terms.items():
            name = f"loss/{phase.name}/{key}"
            out[name] = out.get(name, 0) + value.detach() * share
    return out | {f"{key}/{phase.name}": value for key, value in engine.step(total, measure).items()}


def not_finite(losses: Iterable[Tensor]) -> Tensor:
    """Return bool [n]: which of n losses are NaN or Inf, without waiting for the device."""
    return ~torch.isfinite(torch.stack([loss.float() for loss in losses]))
