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
from cmgan_dist.data.batch import EvalBatch, batch_ranges, eval_batches
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.models.backbones import image_features, text_features
from cmgan_dist.models.generator import Generator
from cmgan_dist.models.saved import Statistics
from cmgan_dist.retrieval.metrics import Embeddings

if TYPE_CHECKING:
    from cmgan_dist.distributed.processes import Parallel

STATISTICS_BLOCKS, STATISTICS_SAMPLES = 64, 100_000
"""Statistics are taken over all samples of a split, or over so many in blocks that lie evenly in a larger one."""


@dataclass
class Embedded:
    """A split of a data set in the common space, with the features that it was made from."""

    common: Embeddings
    features: Embeddings
    """The backbones' features of the same items, for baselines."""
    keys: list[str]


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
def embed_images(generator: Generator, images: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Return common representations [n, E] and features [n, F_i], float32, on the CPU.

    `images`: n images or features, as the generator's image backbone takes them. It must be in eval mode."""
    features = image_features(generator.image_backbone, images.to(place.device))
    with place.autocast():
        common = generator.project_images(features)
    return common.float().cpu(), features.float().cpu()


@torch.no_grad()
def embed_texts(generator: Generator, texts: Tensor | list[str], place: Place) -> tuple[Tensor, Tensor]:
    """Return common representations [m, E] and features [m, F_t], float32, on the CPU.

    `texts`: m texts or features, as the generator's text backbone takes them. It must be in eval mode."""
    features = text_features(generator.text_backbone, texts, place.device)
    with place.autocast():
        common = generator.project_texts(features)
    return common.float().cpu(), features.float().cpu()


def embed_batch(generator: Generator, batch: EvalBatch, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return common image [n, E], common text [m, E], image features [n, F_i] and text features [m, F_t], float32, on
    the CPU. The generator must be in eval mode."""
    common_image, image = embed_images(generator, batch.image, place)
    common_text, text = embed_texts(generator, batch.text, place)
    return common_image, common_text, image, text


def embed_split(generator: Generator, reader: ShardReader, config: Config, parallel: Parallel) -> Embedded:
    """Embed every sample of the reader's split with all its texts, in canonical order.

    Each process embeds some of the batches, and every process gets the whole; any number of processes gives the same
    bits. Raises BadInput at a bad sample."""
    ranges = batch_ranges(reader.counts, config.eval.batch)
    mine = [len(ranges) * rank // parallel.world for rank in (parallel.rank, parallel.rank + 1)]
    edges = [first for first, _ in ranges] + [int(reader.counts.sum())]
    first, stop = edges[mine[0]], edges[mine[1]]
    parts: list[tuple[Tensor, ...]] = []
    keys: list[str] = []
    done = first
    size = config.model.image.image_size
    with evaluating(generator):
        for batch in eval_batches(reader, image_size=size, batch=config.eval.batch, first=first, stop=stop):
            labels = batch.labels if batch.labels is not None else torch.zeros(len(batch.keys), 0, dtype=torch.bool)
            parts.append((*embed_batch(generator, batch, parallel), batch.owner + done, labels))
            keys += batch.keys
            done += len(batch.keys)
    gathered = parallel.gather_objects(([torch.cat(column) for column in zip(*parts, strict=True)], keys))
    columns = zip(*(tensors for tensors, _ in gathered if tensors), strict=True)
    common_image, common_text, image, text, owner, labels = (torch.cat(column) for column in columns)
    known = labels if labels.shape[1] else None
    return Embedded(
        common=Embeddings(common_image, common_text, owner, known),
        features=Embeddings(image, text, owner, known),
        keys=[key for _, part in gathered for key in part],
    )


# ---------------------------------------------------------------------------------------------- statistics

Moments = tuple[int, Tensor, Tensor]
"""Rows, their mean [E] and the sum of squared deviations from it [E], float64."""


def _moments(x: Tensor) -> Moments:
    x = x.double()
    return len(x), x.mean(0), (x - x.mean(0)).square().sum(0)


def _merged(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of rows (Chan, Golub & LeVeque, 1979)."""
    (n, mean_a, square_a), (m, mean_b, square_b) = a, b
    delta = mean_b - mean_a
    return n + m, mean_a + delta * m / (n + m), square_a + square_b + delta.square() * n * m / (n + m)


def _blocks(reader: ShardReader, samples: int) -> list[tuple[int, int]]:
    """Ranges of samples that lie evenly in the reader's split and have about `samples` samples together."""
    total = int(reader.counts.sum())
    starts = [total * k // STATISTICS_BLOCKS for k in range(STATISTICS_BLOCKS + 1)]
    most = -(-samples // STATISTICS_BLOCKS)
    return [(a, min(b, a + most)) for a, b in itertools.pairwise(starts) if b > a]


def common_statistics(
    generator: Generator, readers: Sequence[ShardReader], config: Config, parallel: Parallel
) -> Statistics:
    """Return mean and deviation of the common representations of a training split (of a mixture: of all its data sets).

    Each process embeds a part, and any number of processes gives the same bits. Bad samples are left out, as training
    replaces them."""
    work = [(r, block) for r in readers for block in _blocks(r, STATISTICS_SAMPLES // len(readers))]
    mine: list[tuple[int, Moments, Moments]] = []
    with evaluating(generator):
        for number in range(parallel.rank, len(work), parallel.world):
            reader, (first, stop) = work[number]
            batches = eval_batches(
                reader,
                image_size=config.model.image.image_size,
                batch=config.eval.batch,
                first=first,
                stop=stop,
                left_out=[],
            )
            made = [embed_batch(generator, batch, parallel)[:2] for batch in batches]
            if made:
                image, text = (torch.cat(column) for column in zip(*made, strict=True))
                mine.append((number, _moments(image), _moments(text)))
    every = sorted((m for part in parallel.gather_objects(mine) for m in part), key=lambda m: m[0])
    _, image_all, text_all = every[0]
    for _, image_moments, text_moments in every[1:]:
        image_all, text_all = _merged(image_all, image_moments), _merged(text_all, text_moments)

    def deviation(moments: Moments) -> Tensor:
        return (moments[2] / moments[0]).sqrt()

    return Statistics(image_all[1], deviation(image_all), text_all[1], deviation(text_all))
