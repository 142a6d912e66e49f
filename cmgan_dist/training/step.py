"""What the losses of one batch see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import Batch
from cmgan_dist.data.order import generator_for
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.models.backbones import TextInput
from cmgan_dist.models.generator import ModalityOutput
from cmgan_dist.training.state import Networks


@dataclass
class Mismatched:
    """A mismatched sample per row: of another class, or any other pair where there are no classes."""

    image_common: Tensor
    text_common: Tensor
    image_feature: Tensor
    text_feature: Tensor
    mask: Tensor | None
    """bool [B]: rows that have one; None when all have."""


@dataclass
class StepInputs:
    """What the losses of one batch see. B rows are trained on; the first B of R rows when sampling is balanced."""

    config: Config
    generator: dict[str, nn.Module]
    """Called in training, by the side that trains ("" for both): under DDP where there are several processes."""
    discriminators: dict[str, nn.Module]
    """Likewise, by name."""
    unwrapped: dict[str, nn.Module]
    """The discriminators without a wrapper."""
    gather: Callable[[Tensor], Tensor]
    """Differentiable gather of rows over the processes."""
    first_row: int
    """Row of the global batch that this process's batch starts at."""
    total: int
    """Rows of the global batch."""
    multi: bool
    """Multi-label classes."""
    image: Tensor
    """[B, ...] what the generator takes: features, or raw images when the backbone is trained."""
    text: TextInput
    labels: Tensor | None
    """bool [B, C]."""
    all_labels: Tensor | None
    """bool [G, C] of all processes; None where no loss reads them."""
    fake_image: ModalityOutput
    """Image side of the no-grad forward, B rows."""
    fake_text: ModalityOutput
    wrong: Mismatched | None
    """None when no loss needs it."""
    position: int
    """Samples seen before this batch."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Filled by the losses: accuracies and margins, for the log."""
    conditions: dict[str, Tensor | None] = field(default_factory=dict)
    """Filled by the generator's first step: the features' part of each inter-modality discriminator's hidden layer."""


def draw_mismatched(
    labels: Tensor | None, all_labels: Tensor | None, first: int, rows: int, total: int, seed: int, position: int
) -> tuple[Tensor, Tensor | None]:
    """For each of this process's rows a row of the global batch that shares no class with it, uniformly.

    labels bool [B, C], all_labels bool [G, C]; without labels any other row. Returns (indices [B] into the global
    batch, mask [B] of rows that have a candidate, or None when all have). The draw belongs to (seed, position, row):
    it does not depend on the number of processes."""
    draws = generator_for(seed, position, 7).random(total)[first : first + rows]
    u = torch.from_numpy(draws)
    if labels is None or all_labels is None:
        own = torch.arange(first, first + rows)
        return (own + 1 + (u * (total - 1)).long()) % total, None
    allowed = (labels.float() @ all_labels.float().T < 0.5).cpu()  # [B, G]
    count = allowed.sum(1)
    nth = (u * count).long().clamp(max=total)
    index = (allowed.long().cumsum(1) <= nth[:, None]).sum(1).clamp(max=total - 1)
    mask = count > 0
    return index, None if bool(mask.all()) else mask


def _rows(x: TextInput, first: int, stop: int) -> TextInput:
    if isinstance(x, Mapping):
        return {k: v[first:stop] for k, v in x.items()}
    return x[first:stop]


def build_step_inputs(
    batch: Batch, networks: Networks, config: Config, parallel: Parallel, position: int, multi: bool
) -> StepInputs:
    """Run the no-grad forward that serves all discriminator phases, and choose the mismatched samples."""
    size, generator, engines = batch.size, networks.generator, networks.engines
    image_raw = batch.image.to(parallel.device, non_blocking=True)
    text_raw = generator.text_backbone.tokenise(batch.text, parallel.device)
    with torch.no_grad(), parallel.autocast():
        image, text = generator.extract(image_raw, text_raw)
        image_side, text_side = generator(image, text, classify=False, decode=config.loss.intra > 0)
    fake_image, fake_text = image_side.rows(0, size), text_side.rows(0, size)
    labels = batch.labels.to(parallel.device) if batch.labels is not None else None
    first, total = parallel.rank * size, parallel.world * size
    all_labels = None
    if labels is not None:
        labels = labels[:size]
        if config.loss.class_contrastive or (config.loss.inter and not batch.has_mismatched):
            all_labels = parallel.gather(labels.to(torch.uint8)).bool()
    return StepInputs(
        config=config,
        generator=engines["generator"].wrapped,
        discriminators={name: engines[name].wrapped[""] for name in networks.unwrapped},
        unwrapped=networks.unwrapped,
        gather=parallel.gather_differentiable,
        first_row=first,
        total=total,
        multi=multi,
        image=image[:size],
        text=_rows(text, 0, size),
        labels=labels,
        all_labels=all_labels,
        fake_image=fake_image,
        fake_text=fake_text,
        wrong=_wrong(batch, image_side, text_side, labels, all_labels, first, total, config, parallel, position),
        position=position,
    )


def _wrong(
    batch: Batch,
    image: ModalityOutput,
    text: ModalityOutput,
    labels: Tensor | None,
    all_labels: Tensor | None,
    first: int,
    total: int,
    config: Config,
    parallel: Parallel,
    position: int,
) -> Mismatched | None:
    """The mismatched rows: drawn by the stream when sampling is balanced, else picked from the global batch."""
    if not config.loss.inter:
        return None
    size = batch.size
    if batch.has_mismatched:
        rows = [side.rows(size, 2 * size) for side in (image, text)]
        return Mismatched(rows[0].common, rows[1].common, rows[0].feature, rows[1].feature, None)
    index, mask = draw_mismatched(labels, all_labels, first, size, total, config.train.seed, position)
    columns = [image.common, text.common]
    if config.loss.mismatch == "reference":
        columns += [image.feature, text.feature]
    joined = parallel.rows(torch.cat([c.float() for c in columns], 1), index)
    image_common, text_common, *features = joined.split([c.shape[1] for c in columns], 1)
    image_feature, text_feature = features or (image.feature, text.feature)
    if mask is not None:
        mask = mask.to(parallel.device)
    return Mismatched(image_common, text_common, image_feature, text_feature, mask)
