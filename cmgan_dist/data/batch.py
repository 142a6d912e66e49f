"""Samples -> batches: what training and evaluation take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.data.image import decode_image
from cmgan_dist.data.manifest import Manifest
from cmgan_dist.data.order import random_for
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.data.sample import Sample
from cmgan_dist.errors import BadInput, BadSample, shards_command, shown


@dataclass
class Batch:
    """Rows of one rank, in the order of the global batch. B rows are trained on."""

    image: Tensor
    """uint8 [R, H, W, 4], red, green, blue and a byte that nothing uses, or float32 [R, F_i] features. R = B, or 2B
    when sampling is balanced: mismatched rows follow."""
    text: Tensor | list[str]
    """R texts, or float32 [R, F_t] features."""
    labels: Tensor | None
    """bool [R, C], or None without labels."""
    keys: list[str]
    """Keys of the R samples."""
    size: int
    """B, the rows that are trained on."""
    bad: list[str] = field(default_factory=list)
    """Why samples were replaced, one line each."""

    @property
    def has_mismatched(self) -> bool:
        """Whether mismatched rows follow, R = 2B."""
        return len(self.image) > self.size

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which it is copied to a GPU while that works.

        A DataLoader calls it by this name."""
        text = self.text.pin_memory() if isinstance(self.text, Tensor) else self.text
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, image=self.image.pin_memory(), text=text, labels=labels)


@dataclass
class SampleDecoder:
    """Turns a stored Sample, judged already, into arrays: decodes and augments its image."""

    image_size: int
    """Side of decoded images in pixels."""
    image_dim: int | None
    """F_i of image features; None for encoded images."""
    classes: int
    """C, 0 without labels."""
    augment: bool
    """Whether images are cropped and flipped at random."""

    @classmethod
    def of(cls, manifest: Manifest, image_size: int, augment: bool) -> SampleDecoder:
        """Return the decoder of a data set's samples."""
        return cls(image_size, manifest.image_dim, len(manifest.classes), augment)

    def empty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return memory for a batch, to be filled by rows: images, uint8 [rows, H, W, 4] or float32 [rows, F_i], and
        labels, bool [rows, C], all False."""
        if self.image_dim is None:
            image = np.empty((rows, self.image_size, self.image_size, 4), np.uint8)
        else:
            image = np.empty((rows, self.image_dim), np.float32)
        return image, np.zeros((rows, self.classes), bool)

    def __call__(
        self, sample: Sample, shard: str, draw: int | None, image: np.ndarray, labels: np.ndarray
    ) -> list[str] | np.ndarray:
        """Fill a row of `image` and of `labels`; return the texts, or float32 [captions, F_t].

        `draw` seeds the augmentation; None does none. Raises BadSample naming shard and key."""
        try:
            self.image(sample, draw, image)
        except BadSample as error:
            raise BadSample(f"{shard} sample {shown(sample.key)}: {error}") from None
        labels[list(sample.labels)] = True
        return sample.texts

    def image(self, sample: Sample, draw: int | None, out: np.ndarray) -> None:
        """Write the sample's image, uint8 [H, W, 4] or float32 [F_i], to `out`; `draw` seeds the augmentation.

        Raises BadSample when it does not decode."""
        if isinstance(sample.image, bytes):
            rng = random_for(draw, 6) if self.augment and draw is not None else None
            decode_image(sample.image, self.image_size, rng, out)
        else:
            out[:] = sample.image


def stack_texts(texts: list[str | np.ndarray]) -> Tensor | list[str]:
    """Return texts as they are, and features, each float32 [F_t] or [captions, F_t], as one tensor: [n, F_t] for n
    single texts."""
    if isinstance(texts[0], str):
        return cast(list[str], texts)
    return torch.from_numpy(np.concatenate(texts).reshape(len(texts), -1))


def join(parts: list[Batch], pinned: bool = False) -> Batch:
    """Return batches of consecutive logical streams as one: their rows, then their mismatched rows.

    `pinned`: in page-locked memory, unless it is one batch."""
    if len(parts) == 1:
        return parts[0]

    def rows(pick: Callable[[Batch], Tensor]) -> Tensor:
        pieces = [pick(p)[: p.size] for p in parts] + [pick(p)[p.size :] for p in parts]
        shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
        return torch.cat(pieces, out=torch.empty(shape, dtype=pieces[0].dtype, pin_memory=pinned))

    def flat(pick: Callable[[Batch], list[str]]) -> list[str]:
        return [x for p in parts for x in pick(p)[: p.size]] + [x for p in parts for x in pick(p)[p.size :]]

    texts: Tensor | list[str]
    if isinstance(parts[0].text, list):
        texts = flat(lambda p: cast(list[str], p.text))
    else:
        texts = rows(lambda p: cast(Tensor, p.text))
    return Batch(
        image=rows(lambda p: p.image),
        text=texts,
        labels=rows(lambda p: cast(Tensor, p.labels)) if parts[0].labels is not None else None,
        keys=flat(lambda p: p.keys),
        size=sum(p.size for p in parts),
        bad=[line for p in parts for line in p.bad],
    )


@dataclass
class EvalBatch:
    """Consecutive samples of a split with all their texts."""

    image: Tensor
    """uint8 [n, H, W, 4] or float32 [n, F_i]."""
    text: Tensor | list[str]
    """All texts of the n samples one after another: m strings, or float32 [m, F_t]."""
    owner: Tensor
    """int64 [m]: row of the sample that each text belongs to."""
    labels: Tensor | None
    """bool [n, C], or None without labels."""
    numbers: list[int]
    """Number of each of the n samples in its split."""
    samples: list[Sample]
    """The n samples as they are stored."""

    @property
    def keys(self) -> list[str]:
        """Keys of the n samples."""
        return [sample.key for sample in self.samples]


def batch_ranges(counts: np.ndarray, batch: int) -> list[tuple[int, int]]:
    """Return the ranges of a split's samples that make its batches, at most `batch` samples each.

    `counts`: int64 [shards], samples of each shard. Batches begin anew in each shard, so that which samples are in one
    does not depend on what else is embedded."""
    ends = np.cumsum(counts).tolist()
    shards = zip([0, *ends], ends, strict=False)
    return [(first, min(first + batch, end)) for start, end in shards for first in range(start, end, batch)]


def eval_batches(
    reader: ShardReader,
    *,
    image_size: int,
    batch: int,
    first: int = 0,
    stop: int | None = None,
    threads: int = 2,
    left_out: list[str] | None = None,
) -> Iterator[EvalBatch]:
    """Yield the samples first..stop of a split, to its end where `stop` is None, in canonical order, not augmented.

    `batch`: samples at a time, which `threads` threads decode; batches begin anew in each shard (`batch_ranges`).
    Raises BadInput that names the first bad sample: a figure over other samples than the split's would not be
    comparable. With `left_out` bad samples are left out, and a line for each is added to it."""
    decoder = SampleDecoder.of(reader.manifest, image_size, augment=False)
    starts = np.concatenate([[0], np.cumsum(reader.counts)])
    stop = int(starts[-1]) if stop is None else stop
    inside = np.clip(starts, first, stop)

    def load(i: int, image: np.ndarray, labels: np.ndarray) -> tuple[int, Sample, list[str] | np.ndarray] | str:
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        try:
            sample = reader.read(shard, i - int(starts[shard]))
            return i, sample, decoder(sample, reader.shards[shard].name, None, image, labels)
        except BadSample as error:
            if left_out is not None:
                return str(error)
            raise BadInput(
                f"split '{reader.split}' of {reader.place} cannot be evaluated: {error}: "
                f"run {shards_command('verify', reader.place)}"
            ) from None

    with ThreadPoolExecutor(threads) as pool:
        for a, b in batch_ranges(np.diff(inside), batch):
            image, labels = decoder.empty(b - a)
            loaded = list(pool.map(load, range(first + a, first + b), image, labels))
            rows = [row for row in loaded if not isinstance(row, str)]
            if left_out is not None and len(rows) < len(loaded):
                left_out += [row for row in loaded if isinstance(row, str)]
                good = [not isinstance(row, str) for row in loaded]
                image, labels = image[good], labels[good]
            if not rows:
                continue
            yield EvalBatch(
                image=torch.from_numpy(image),
                text=stack_texts([t for _, _, texts in rows for t in texts]),
                owner=torch.tensor([i for i, (_, _, texts) in enumerate(rows) for _ in texts]),
                labels=torch.from_numpy(labels) if decoder.classes else None,
                numbers=[number for number, _, _ in rows],
                samples=[sample for _, sample, _ in rows],
            )
