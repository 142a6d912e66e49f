"""Processes that share the queries of an evaluation get what one process gets, to the bit; see test_metrics_shared.py.

torchrun --nproc_per_node W tests/distributed/metrics_worker.py
"""

from __future__ import annotations

import json
from typing import Any

import torch

from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.retrieval import metrics
from cmgan_dist.retrieval.metrics import Embeddings, evaluate

IMAGES, TEXTS = 31, 50


def made(labelled: bool) -> Embeddings:
    """Images and texts, some of which are equal."""
    g = torch.Generator().manual_seed(1)
    image, text = torch.randn(IMAGES, 6, generator=g), torch.randn(TEXTS, 6, generator=g)
    text[20:40] = text[:20]
    labels = torch.rand(IMAGES, 9, generator=g) < 0.2
    owner = torch.randint(IMAGES, (TEXTS,), generator=g)
    return Embeddings(image, text, owner, labels if labelled else None)


def main() -> None:
    parallel = Parallel()
    ranked: list[int] = []
    similarities = metrics.similarities

    def counted(query: torch.Tensor, *rest: Any) -> Any:
        ranked.append(len(query))
        return similarities(query, *rest)

    for labelled in (True, False):
        alone = evaluate(made(labelled), "cosine")
        metrics.similarities = counted
        assert json.dumps(evaluate(made(labelled), "cosine", parallel=parallel)) == json.dumps(alone)
        metrics.similarities = similarities
    total = sum(parallel.gather_objects(sum(ranked)))
    # by pairs of both data sets, and by classes of one in three galleries
    assert total == 5 * (IMAGES + TEXTS), "a query was ranked twice or never"
    assert sum(ranked) < total
    if parallel.main:
        print(f"{parallel.world} processes share the queries")
    parallel.close()


if __name__ == "__main__":
    main()
