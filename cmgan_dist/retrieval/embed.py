"""Samples -> common representations, with a model in training or one loaded from a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cmgan_dist.config.fields import Config
from cmgan_dist.data.batch import eval_batches
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.models.generator import Generator
from cmgan_dist.retrieval.metrics import Embeddings

if TYPE_CHECKING:  # at run time only where a gallery is made: it takes seconds to import
    pass


@dataclass
class Embedded:
    """A split in the common space."""

    common: Embeddings
    features: Embeddings
    """The backbones' features of the same items, for baselines."""
    keys: list[str]


@torch.no_grad()
def embed_split(generator: Generator, reader: ShardReader, config: Config, parallel: Parallel) -> Embedded:
    """Every sample of the reader's split with all its texts, in canonical order, in eval mode; the same on every
    process, each of which embeds a part. Raises BadInput at a bad sample."""
    total = int(reader.counts.sum())
    first, stop = total * parallel.rank // parallel.world, total * (parallel.rank + 1) // parallel.world
    generator.eval()
    parts: list[tuple[torch.Tensor, ...]] = []
    keys: list[str] = []
    done = first
    for batch in eval_batches(
        reader, image_size=config.model.image.image_size, batch=config.eval.batch, first=first, stop=stop
    ):
        image = generator.image_backbone(batch.image.to(parallel.device))
        text = generator.text_backbone(generator.text_backbone.tokenise(batch.text, parallel.device))
        with parallel.autocast():
            common_image, common_text = generator.common(image, text)
        labels = batch.labels if batch.labels is not None else torch.zeros(len(image), 0, dtype=torch.bool)
        made = (common_image, common_text, image, text)
        parts.append((*(t.float().cpu() for t in made), batch.owner + done, labels))
        keys += batch.keys
        done += len(batch.keys)
    generator.train()
    gathered = parallel.gather_objects(([torch.cat(column) for column in zip(*parts, strict=True)], keys))
    columns = zip(*(tensors for tensors, _ in gathered if tensors), strict=True)
    common_image, common_text, image, text, owner, labels = (torch.cat(column) for column in columns)
    known = labels if labels.shape[1] else None
    return Embedded(
        common=Embeddings(common_image, common_text, owner, known),
        features=Embeddings(image, text, owner, known),
        keys=[key for _, part in gathered for key in part],
    )
