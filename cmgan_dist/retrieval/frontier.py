"""Between two ends: what is reached when one score goes over into another, as points (MAP, Recall@10).

Items of the same class first and a query's own partner first pull against each other, so a method that mixes two scores
has a curve, and the one whose curve lies further out is better whatever is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cmgan_dist.models.scoring import Scoring, Shares
from cmgan_dist.retrieval.baselines import CLASSIFIER, PAIRS, Projection
from cmgan_dist.retrieval.embed import Embedded
from cmgan_dist.retrieval.metrics import Embeddings, common_space, evaluate, recall_of

IMAGES = 1000
"""Images that are looked at, at most, each with its first text; of a larger split so many that lie evenly in it."""
STEPS = 6
"""Points from one end of a model to the next."""
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 2.0)
"""t of log(chance of one class) + cosine / t, by which classifier and CCA are mixed."""

Point = tuple[float, float]
"""MAP and Recall@10, each the mean of both directions."""


def measured(similarity: Tensor, labels: Tensor) -> Point:
    """Return what a matrix of similarities [n, n] reaches, whose row i and column i are an image and its own text."""
    n = len(similarity)
    scaled = similarity.double() - similarity.min()
    scaled = scaled / scaled.norm(dim=1).max().clamp_min(1e-12)
    # as vectors: row i meets the j-th unit vector in the similarity of i and j
    data = Embeddings(scaled, torch.eye(n, dtype=torch.float64), torch.arange(n), labels)
    metrics = evaluate(data, all_modal=False, map_ks=(), recall_ks=(10,))
    return metrics["map/mean"] or 0.0, recall_of(metrics)


def _pairs(owner: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return the rows of at most IMAGES images with a text, and those of their first texts."""
    with_text, first = np.unique(owner.numpy(), return_index=True)
    chosen = np.unique(np.linspace(0, len(with_text) - 1, min(images, len(with_text))).round().astype(int))
    return torch.from_numpy(with_text[chosen]), torch.from_numpy(first[chosen])


def _ways(shares: dict[str, Shares]) -> Iterator[tuple[float, float, float]]:
    """Give shares of the blocks from the class end by the middle to the pair end."""
    ends = [(s.posterior, s.common, s.pair) for s in (shares["class"], shares["both"], shares["pair"])]
    for a, b in itertools.pairwise(ends):
        for k in range(STEPS):
            yield tuple(x + (y - x) * k / STEPS for x, y in zip(a, b, strict=True))  # type: ignore[misc]
    yield ends[-1]


def model_frontier(scoring: Scoring, embedded: Embedded) -> list[Point]:
    """Return the points of a model from its class end to its pair end, by its blocks alone (without a query bank); none
    where it has not both ends."""
    shares = {str(name): each for name, each in scoring.spec.shares.items()}
    if embedded.labels is None or not {"class", "both", "pair"} <= shares.keys():
        return []
    images, texts = _pairs(embedded.owner, IMAGES)
    image, text = embedded.image.blocks(scoring, "image", images), embedded.text.blocks(scoring, "text", texts)
    products = [None if a is None or b is None else a @ b.T for a, b in zip(image, text, strict=True)]
    points = []
    for way in _ways(shares):
        parts = [share * product for share, product in zip(way, products, strict=True) if product is not None and share]
        points.append(measured(torch.stack(parts).sum(0), embedded.labels[images]))
    return points


def baseline_frontier(best: dict[str, Projection], test: Embeddings) -> list[Point]:
    """Return the points of logistic regression and CCA mixed, log(p_image . p_text) + cosine / t; none without both."""
    if CLASSIFIER not in best or PAIRS not in best or test.labels is None:
        return []
    images, texts = _pairs(test.text_owner, IMAGES)
    some = Embeddings(test.image[images], test.text[texts], torch.arange(len(images)), test.labels[images])
    chance, near = best[CLASSIFIER](some), best[PAIRS](some)
    log_chance = (chance.image @ chance.text.T).clamp_min(1e-12).log()
    image, text = common_space(near, best[PAIRS].score)
    mixed = [measured(log_chance + image @ text.T / t, test.labels[images]) for t in TEMPERATURES]
    return [measured(log_chance, test.labels[images]), *mixed[::-1], measured(image @ text.T, test.labels[images])]
