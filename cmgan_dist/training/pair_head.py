"""The pair head: a linear map a side from backbone features into a space where an image and its own text are near.

It starts from CCA, in closed form, and is refined by InfoNCE with all captions of a picture as positives. Validation
chooses the ridges, how many dimensions count and by how much, and where refining stops: at its start, if it brings
nothing.

Shapes: N images of F_i features, M texts of F_t, P dimensions, B images of a batch with T texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmgan_dist.distributed.engine import AdamW
from cmgan_dist.kernels.dropout import dropout
from cmgan_dist.retrieval.cca import PairedRows
from cmgan_dist.retrieval.metrics import Embeddings, pair_recall

IMAGE_RIDGES, TEXT_RIDGES = (0.1, 1.0, 3.0), (0.1, 1.0, 3.0)
"""Of CCA, in units of the mean feature variance."""
DIMS, POWERS = (50, 100, 200, 384), (0.5, 1.0)
"""Canonical dimensions, and powers of its correlation by which each is weighted."""
EPOCHS, BATCH, CAPTIONS = 8, 512, 5
"""Of the refinement: passes, images a batch, and captions of an image that are drawn each time."""
RATES = ((5e-4, 0.2, 0.05), (2e-4, 0.7, 0.1))
"""Refinements: (learning rate, share of input dropout, temperature); the second, for few pairs, is tried where the
first brings nothing."""
DECAY = 1e-2


@dataclass
class PairHead:
    """Maps of both modalities: features x -> x @ weight + bias."""

    weights: tuple[Tensor, Tensor]
    """float32 ([F_i, P], [F_t, P])."""
    biases: tuple[Tensor, Tensor]
    """float32 ([P], [P])."""

    def __call__(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors [n, P] and [m, P] of features [n, F_i] and [m, F_t]."""
        made = [F.normalize(x @ w + b, dim=1) for x, w, b in zip((image, text), self.weights, self.biases, strict=True)]
        return made[0], made[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and biases by the names that `scoring.Scoring` has for them."""
        out: dict[str, Tensor] = {}
        for name, weight, bias in zip(("image", "text"), self.weights, self.biases, strict=True):
            out |= {f"{name}_pair_weight": weight.detach(), f"{name}_pair_bias": bias.detach()}
        return out


def multi_positive_nce(image: Tensor, text: Tensor, owner: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE where each caption of an image is a positive against the other images' captions, mean of both
    directions (as UniCL, Yang et al., CVPR 2022, but one positive at a time).

    `image`: unit vectors [B, P]. `text`: [T, P]. `owner`: int64 [T], the image of each text."""
    scores = image @ text.T / temperature
    to_image = F.cross_entropy(scores.T, owner)
    own = torch.arange(len(image), device=image.device)[:, None] == owner
    others = scores.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    return (to_image + F.softplus(others - scores)[own].mean()) / 2


def _scaled(features: Embeddings) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Return the mean [F] of both modalities' features and the root mean square of what is left."""
    centres = features.image.mean(0), features.text.mean(0)
    sizes = [
        float((x - c).square().mean().sqrt()) for x, c in zip((features.image, features.text), centres, strict=True)
    ]
    return centres, (sizes[0] or 1.0, sizes[1] or 1.0)


def _canonical_heads(train: Embeddings) -> Iterator[tuple[tuple[float, float], Callable[[int, float], PairHead]]]:
    """Give for each pair of ridges a CCA that makes heads of so many dimensions and such a power; images and texts are
    to have been centred."""
    owner = train.text_owner
    rows = PairedRows(train.image[owner].double().numpy(), train.text.double().numpy())
    for ridges in itertools.product(IMAGE_RIDGES, TEXT_RIDGES):
        found = rows.solve(ridges, max(DIMS))

        def head(dims: int, power: float, found=found) -> PairHead:  # type: ignore[no-untyped-def]
            scale = found.correlation[:dims] ** power
            image, text = (torch.from_numpy(w[:, :dims] * scale).float() for w in (found.image, found.text))
            centres = (torch.from_numpy(side.centre).float() for side in (rows.image, rows.text))
            biases = [-centre @ weight for centre, weight in zip(centres, (image, text), strict=True)]
            return PairHead((image, text), (biases[0], biases[1]))

        if len(found.correlation):
            yield ridges, head


def fit_pair_head(train: Embeddings, val: Embeddings, seed: int, say: Callable[[str], None]) -> PairHead | None:
    """Fit a pair head on features of a training split by the recall that it has on features of the validation split.

    `say` gets a line for each step. Return None where features have no variance."""
    centres, sizes = _scaled(train)

    def scaled(data: Embeddings) -> Embeddings:
        image, text = ((x - c) / s for x, c, s in zip((data.image, data.text), centres, sizes, strict=True))
        return Embeddings(image, text, data.text_owner)

    train, val = scaled(train), scaled(val)

    def reached(head: PairHead) -> float:
        return pair_recall(Embeddings(*head(val.image, val.text), val.text_owner))

    best: tuple[float, PairHead] | None = None
    widest = max(DIMS)
    solved = [(reached(make(widest, 1.0)), ridges, make) for ridges, make in _canonical_heads(train)]
    if not solved:
        return None
    _, ridges, make = max(solved, key=lambda each: each[0])
    for dims, power in itertools.product(DIMS, POWERS):
        head = make(dims, power)
        score = reached(head)
        if best is None or score > best[0]:
            best = score, head
    assert best is not None
    say(f"pair head: CCA with ridges {ridges[0]:g} and {ridges[1]:g}: validation R@10 {best[0]:.4f}")
    start = make(widest, 0.5)
    unrefined = best[0]
    for rate, share, temperature in RATES:
        if best[0] > unrefined:
            break
        for epoch, head in enumerate(_refined(start, train, seed, rate, share, temperature), 1):
            score = reached(head)
            if score > best[0]:
                best = score, head
                say(f"pair head: refined, rate {rate:g}, epoch {epoch}: validation R@10 {score:.4f}")
    head = best[1]
    weights = tuple(w / s for w, s in zip(head.weights, sizes, strict=True))
    biases = tuple(b - c @ w for b, c, w in zip(head.biases, centres, weights, strict=True))
    return PairHead((weights[0], weights[1]), (biases[0], biases[1]))


def _refined(
    start: PairHead, train: Embeddings, seed: int, rate: float, share: float, temperature: float
) -> Iterator[PairHead]:
    """Train a copy of a head by `multi_positive_nce`, with a cosine schedule, and give it after every epoch."""
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    parameters = [p.clone().requires_grad_() for p in (*start.weights, *start.biases)]
    optimiser = AdamW(parameters, lr=rate, weight_decay=DECAY)
    counts = torch.bincount(train.text_owner, minlength=len(train.image)).numpy()
    first, order = np.cumsum(counts) - counts, train.text_owner.argsort(stable=True).numpy()
    with_text = np.flatnonzero(counts)
    batch = min(BATCH, len(with_text))
    steps = max(1, len(with_text) // batch)

    def dropped(x: Tensor) -> Tensor:
        return dropout(x, share, generator=random)

    for epoch in range(EPOCHS):
        shuffled = rng.permutation(with_text)
        for step in range(steps):
            images = shuffled[step * batch : (step + 1) * batch]
            texts = [order[first[i] + rng.permutation(counts[i])[:CAPTIONS]] for i in images]
            owner = torch.from_numpy(np.repeat(np.arange(len(images)), [len(t) for t in texts]))
            head = PairHead((parameters[0], parameters[1]), (parameters[2], parameters[3]))
            made = head(dropped(train.image[images]), dropped(train.text[np.concatenate(texts)]))
            loss = multi_positive_nce(*made, owner, temperature)
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (EPOCHS * steps)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        copies = [p.detach().clone() for p in parameters]
        yield PairHead((copies[0], copies[1]), (copies[2], copies[3]))
