"""What the losses of one batch see: the no-grad forward that all discriminators share, and the mismatched rows.

Without discriminators nothing reads that forward, and it is left out.

Shapes: B rows of this process that are trained on, R rows of its batch (B, or 2B where mismatched rows follow), G rows
of the global batch, F feature dimensions of a modality, E common, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.order import generator_for
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.models.backbone import TextInput
from cmgan_dist.models.generator import Modality, ModalityOutput
from cmgan_dist.training.state import Networks


@dataclass(frozen=True)
class RowRange:
    """Which rows of the global batch are this process's: `count` of `total`, from `first` on."""

    first: int
    count: int
    total: int

    @property
    def own(self) -> slice:
        """This process's rows as a slice of the global batch."""
        return slice(self.first, self.first + self.count)


@dataclass
class Mismatched:
    """A mismatched sample for each row: of another class, or any other pair where there are no classes."""

    common: dict[Modality, Tensor]
    """[B, E] of each modality: the common representations of the mismatched samples."""
    feature: dict[Modality, Tensor]
    """[B, F] of each modality: their features."""
    mask: Tensor | None
    """bool [B]: the rows that have a mismatched sample; None when all have."""


@dataclass
class StepInputs:
    """What the losses of one batch see, on this process."""

    config: Config
    generator: dict[str, nn.Module]
    """What a generator phase calls, by the modality that it trains ("" for both): under DDP among several processes."""
    discriminators: dict[str, nn.Module]
    """What a discriminator's own phase calls, by name: under DDP among several processes."""
    unwrapped: dict[str, nn.Module]
    """The same discriminators without DDP, by name: what the generator's phases call."""
    gather: Callable[[Tensor], Tensor]
    """Gathers [B, ...] of every process into [G, ...], with the gradient of all."""
    rows: RowRange
    """Which rows of the global batch these are."""
    multi_label: bool
    """Whether a sample may have several classes."""
    image: Tensor
    """[B, ...]: the images that the generator takes: features, or raw ones when the backbone is trained."""
    text: TextInput
    """[B, ...]: the texts that the generator takes, likewise features or tokens."""
    labels: Tensor | None
    """bool [B, C], or None without labels."""
    all_labels: Tensor | None
    """bool [G, C]: labels of the global batch; None where no loss reads them."""
    outputs: dict[Modality, ModalityOutput]
    """What the no-grad forward made of the B rows of each modality; empty where no loss reads it."""
    position: int
    """Samples of the run that came before this batch."""
    mismatched: Mismatched | None = None
    """The mismatched samples; None where no loss reads them."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Accuracies and margins by name, for the log; the losses fill it."""
    conditions: dict[str, Tensor | None] = field(default_factory=dict)
    """The features' part of each inter-modality discriminator's hidden layer, by name; the first generator step fills
    it (`InterDiscriminator.condition`)."""


def draw_mismatched(
    labels: Tensor | None, all_labels: Tensor | None, rows: RowRange, seed: int, position: int
) -> tuple[Tensor, Tensor | None]:
    """Draw for each of this process's rows a row of the global batch that shares no class with it, uniformly.

    `labels`: bool [B, C]; `all_labels`: bool [G, C]; without them any other row may come. Return (indices int64 [B]
    into the global batch, mask bool [B] of the rows that have a candidate, or None when all have). The draw belongs to
    (seed, position, row): it does not depend on the number of processes."""
    u = torch.from_numpy(generator_for(seed, position, 7).random(rows.total)[rows.own])
    if labels is None or all_labels is None:
        own = torch.arange(rows.total)[rows.own]
        return (own + 1 + (u * (rows.total - 1)).long()) % rows.total, None
    allowed = (labels.float() @ all_labels.float().T < 0.5).cpu()  # [B, G]
    count = allowed.sum(1)
    nth = (u * count).long().clamp(max=rows.total)
    index = (allowed.long().cumsum(1) <= nth[:, None]).sum(1).clamp(max=rows.total - 1)
    mask = count > 0
    return index, None if bool(mask.all()) else mask


def reads_outputs(config: Config) -> bool:
    """Return whether a loss reads what the no-grad forward makes: a discriminator's, or the generator's where its
    modalities train in turn."""
    return config.optim.update != "joint" or bool(config.loss.intra or config.loss.inter or config.loss.modality)


def build_step_inputs(
    batch: Batch, networks: Networks, config: Config, parallel: Parallel, position: int
) -> StepInputs:
    """Run the no-grad forward where a loss reads what it makes, and choose the mismatched samples.

    `position`: samples of the run that came before `batch`. Every process calls it, each with its part of the global
    batch."""
    size, generator, engines = batch.size, networks.generator, networks.engines
    image_raw = batch.image.to(parallel.device, non_blocking=True)
    text_raw = generator.text_backbone.tokenise(batch.text, parallel.device)
    with torch.no_grad(), parallel.autocast():
        image, text = generator.extract(image_raw, text_raw)
        made: dict[Modality, ModalityOutput] = {}
        if reads_outputs(config):
            made["image"], made["text"] = generator(image, text, classify=False, decode=config.loss.intra > 0)
    labels = None if batch.labels is None else batch.labels.to(parallel.device)[:size]
    all_labels = None
    if labels is not None and (config.loss.class_contrastive or (config.loss.inter and not batch.has_mismatched)):
        all_labels = parallel.gather(labels.to(torch.uint8)).bool()
    inputs = StepInputs(
        config=config,
        generator=engines["generator"].wrapped,
        discriminators={name: engines[name].wrapped[""] for name in networks.unwrapped},
        unwrapped=networks.unwrapped,
        gather=parallel.gather_differentiable,
        rows=RowRange(parallel.rank * size, size, parallel.world * size),
        multi_label=networks.multi_label,
        image=image[:size],
        text=_first_rows(text, size),
        labels=labels,
        all_labels=all_labels,
        outputs={modality: output.rows(0, size) for modality, output in made.items()},
        position=position,
    )
    if config.loss.inter and batch.has_mismatched:
        inputs.mismatched = _following_rows(made["image"], made["text"], size)
    elif config.loss.inter:
        inputs.mismatched = _fetched_rows(inputs, parallel)
    return inputs


def _first_rows(x: TextInput, size: int) -> TextInput:
    if isinstance(x, Mapping):
        return {k: v[:size] for k, v in x.items()}
    return x[:size]


def _following_rows(image: ModalityOutput, text: ModalityOutput, size: int) -> Mismatched:
    """Return the mismatched rows that the stream drew: with balanced sampling they follow the batch's own B rows."""
    image, text = image.rows(size, 2 * size), text.rows(size, 2 * size)
    return Mismatched(
        {"image": image.common, "text": text.common}, {"image": image.feature, "text": text.feature}, mask=None
    )


def _fetched_rows(inputs: StepInputs, parallel: Parallel) -> Mismatched:
    """Draw the mismatched rows from the global batch, and fetch them from the processes that have them."""
    config, image, text = inputs.config, inputs.outputs["image"], inputs.outputs["text"]
    index, mask = draw_mismatched(inputs.labels, inputs.all_labels, inputs.rows, config.train.seed, inputs.position)
    columns = [image.common, text.common]
    if config.loss.mismatch == "reference":  # else no loss reads their features
        columns += [image.feature, text.feature]
    joined = parallel.rows(torch.cat([c.float() for c in columns], 1), index)
    image_common, text_common, *features = joined.split([c.shape[1] for c in columns], 1)
    image_feature, text_feature = features or (image.feature, text.feature)
    return Mismatched(
        {"image": image_common, "text": text_common},
        {"image": image_feature, "text": text_feature},
        None if mask is None else mask.to(parallel.device),
    )
