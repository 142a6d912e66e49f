"""Samples of a data set -> common representations, with a model in training or one loaded from a run.

Shapes: n samples, m texts, E dimensions of the common space, F_i and F_t feature dimensions, C classes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import batch_ranges, eval_batches
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.models.backbones import image_features, text_features
from cmgan_dist.models.generator import Generator, Modality
from cmgan_dist.models.scoring import Blocks, Scoring, class_logits
from cmgan_dist.retrieval.metrics import Embeddings

if TYPE_CHECKING:
    from cmgan_dist.distributed.processes import Parallel

SAMPLE_BLOCKS = 64
"""Blocks, lying evenly in a split, from which `embed_sample` takes its samples."""


@dataclass
class Made:
    """What a generator makes of n items of one modality, float32, on the CPU."""

    feature: Tensor
    """[n, F]: the backbone's features."""
    common: Tensor
    """[n, E]: common representations."""
    logits: Tensor | None
    """[n, C]: class logits; None of a model without classes."""

    def blocks(self, scoring: Scoring, modality: Modality, rows: Tensor) -> Blocks:
        """Return the blocks of some of the items."""
        logits = None if self.logits is None else self.logits[rows]
        return scoring.blocks(modality, self.feature[rows], self.common[rows], logits)

    def vectors(self, scoring: Scoring, modality: Modality) -> Tensor:
        """Return the items' vectors, float32 [n, D], no longer than 1."""
        return scoring.to(self.common.device)(modality, self.feature, self.common, self.logits)


@dataclass
class Embedded:
    """What a generator makes of samples of a data set; M texts belong to N images."""

    image: Made
    text: Made
    owner: Tensor
    """int64 [M]: row of the image to which each text belongs."""
    labels: Tensor | None
    """bool [N, C]; None without classes."""
    keys: list[str]

    def vectors(self, scoring: Scoring) -> Embeddings:
        """Return the vectors of all items by a scoring."""
        image, text = self.image.vectors(scoring, "image"), self.text.vectors(scoring, "text")
        return Embeddings(image, text, self.owner, self.labels)

    @property
    def features(self) -> Embeddings:
        """The backbones' features of all items, for baselines."""
        return Embeddings(self.image.feature, self.text.feature, self.owner, self.labels)


class Place(Protocol):
    """Where forward passes run, and in which precision: a `Parallel`, or a `Model`."""

    @property
    def device(self) -> torch.device:
        """Return the device on which the generator is."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which projections run."""


@contextlib.contextmanager
def evaluating(generator: Generator) -> Iterator[None]:
    """Put the generator into eval mode and make no gradients; at the end the mode that it was in comes back."""
    training = generator.training
    generator.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        generator.train(training)


@torch.no_grad()
def projected(generator: Generator, modality: Modality, feature: Tensor) -> Made:
    """Return what the generator, which must be in eval mode, makes of features [n, F] on its device."""
    common = generator.project_images(feature) if modality == "image" else generator.project_texts(feature)
    logits = class_logits(generator, modality, common)
    return Made(feature.float().cpu(), common.float().cpu(), None if logits is None else logits.cpu())


@torch.no_grad()
def embed_items(generator: Generator, modality: Modality, items: Tensor | list[str], place: Place) -> Made:
    """Return what the generator, which must be in eval mode, makes of n images or texts, or of features [n, F].

    `items`: as the generator's backbone of that modality takes them."""
    if modality == "image":
        assert isinstance(items, Tensor)
        feature = image_features(generator.image_backbone, items.to(place.device))
    else:
        feature = text_features(generator.text_backbone, items, place.device)
    with place.autocast():
        return projected(generator, modality, feature)


Range = tuple[ShardReader, int, int]
"""Samples of a reader's split, from the first up to the second number."""


def _embed_ranges(
    generator: Generator, ranges: Sequence[Range], config: Config, parallel: Parallel, left_out: list[str] | None
) -> Embedded:
    """Embed ranges of samples with all their texts, in order. Each process embeds some of them, and every process gets
    the whole; any number of processes gives the same bits.

    `left_out`: gets a line for each bad sample; None raises BadInput at one."""
    mine = [len(ranges) * rank // parallel.world for rank in (parallel.rank, parallel.rank + 1)]
    parts: list[tuple[Tensor | None, ...]] = []
    keys: list[str] = []
    options: dict[str, Any] = {"image_size": config.model.image.image_size, "batch": config.eval.batch}
    with evaluating(generator):
        for reader, first, stop in ranges[mine[0] : mine[1]]:
            for batch in eval_batches(reader, **options, first=first, stop=stop, left_out=left_out):
                image = embed_items(generator, "image", batch.image, parallel)
                text = embed_items(generator, "text", batch.text, parallel)
                columns = (image.feature, image.common, image.logits, text.feature, text.common, text.logits)
                parts.append((*columns, batch.owner + len(keys), batch.labels))
                keys += batch.keys
        parallel.finish_forwards()
    gathered = parallel.gather_objects((parts, keys))
    before = list(itertools.accumulate((len(part_keys) for _, part_keys in gathered), initial=0))
    rows = [
        (*columns, owner + offset, labels)
        for (part, _), offset in zip(gathered, before, strict=False)
        for *columns, owner, labels in part
    ]

    def joined(column: tuple[Tensor | None, ...]) -> Tensor | None:
        return None if any(x is None for x in column) else torch.cat([x for x in column if x is not None])

    made: list[Any] = [joined(column) for column in zip(*rows, strict=True)]
    owner, labels = made[6:]
    return Embedded(Made(*made[:3]), Made(*made[3:6]), owner, labels, [key for _, part in gathered for key in part])


def embed_split(generator: Generator, reader: ShardReader, config: Config, parallel: Parallel) -> Embedded:
    """Embed every sample of the reader's split with all its texts, in canonical order (see `_embed_ranges`).

    Raises BadInput at a bad sample."""
    ranges = batch_ranges(reader.counts, config.eval.batch)
    return _embed_ranges(generator, [(reader, *each) for each in ranges], config, parallel, None)


def embed_sample(
    generator: Generator, readers: Sequence[ShardReader], samples: int, config: Config, parallel: Parallel
) -> Embedded:
    """Embed at most about `samples` samples of a training split (of a mixture: of all its data sets), in blocks that
    lie evenly in it. Bad samples are left out, as training replaces them."""
    ranges = [(reader, *block) for reader in readers for block in _blocks(reader, samples // len(readers))]
    return _embed_ranges(generator, ranges, config, parallel, [])


def _blocks(reader: ShardReader, samples: int) -> list[tuple[int, int]]:
    """Ranges of samples that lie evenly in the reader's split and have about `samples` samples together."""
    total = int(reader.counts.sum())
    starts = [total * k // SAMPLE_BLOCKS for k in range(SAMPLE_BLOCKS + 1)]
    most = -(-samples // SAMPLE_BLOCKS)
    return [(a, min(b, a + most)) for a, b in itertools.pairwise(starts) if b > a]
