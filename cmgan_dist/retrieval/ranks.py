"""Ranks of the relevant items in rows of exact similarities, and what average precision makes of them.

A long row is put in order on a CPU by a radix sort of 32 bits of each similarity, ten times as fast as a stable sort of
all 53; the few items that agree in these 32 bits are then put in order by all of them. The order is exact all the same.

Shapes: n queries, G gallery items, R of them relevant to a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MOST = 2.0**52 * 1.001
"""More than any similarity, which is a whole number, a product of vectors no longer than 1 times 2**52."""
LAST = -MOST
"""Similarity of what is left out of a gallery: less than any."""
COARSE = 2.0**22
"""What lies between MOST and a similarity is divided by this to fit 32 bits."""
LONG = 512
"""Items of a gallery from which on a radix sort is faster."""
BLOCK_ELEMENTS = 1 << 18
"""Similarities that are ranked at a time, few enough for a processor's cache."""
RECALL_LEVELS = 101


def relevant_ranks(blocks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[np.ndarray]:
    """Yield int64 [R], ascending from 1, for each row of each block: the ranks of its R relevant items among all G.

    A block is (`similarity` float64 [n, G], whole numbers as `metrics.similarities` gives them, or LAST; `relevant`
    bool [n, G]). Ties rank by position. As many blocks as torch has threads are ranked at a time."""
    parts = list(blocks)
    threads = min(torch.get_num_threads(), len(parts))
    with ThreadPoolExecutor(max(threads, 1)) as pool:  # it starts none before it is asked
        for hits in (pool.map if threads > 1 else map)(lambda part: relevant_in_order(*part), parts):
            yield from (np.flatnonzero(row) + 1 for row in hits)


def relevant_in_order(similarity: Tensor, relevant: Tensor) -> np.ndarray:
    """Return bool [n, G]: whether what takes each rank is relevant, of a block as above."""
    if similarity.device.type == "cpu" and similarity.shape[1] >= LONG:
        rows = zip(similarity.numpy(), relevant.numpy(), strict=True)
        return np.stack([of_row.take(radix_order(row)) for row, of_row in rows])
    return relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True)).cpu().numpy()


def radix_order(similarity: np.ndarray) -> np.ndarray:
    """Return int64 [G]: the positions of the similarities [G], as above, from the largest on; ties by position."""
    keys = ((MOST - similarity) * (1 / COARSE)).astype(np.uint32)
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # numpy sorts 16 bits by radix, the lower ones first
    order = order.take(np.argsort((keys >> 16).astype(np.uint16).take(order), kind="stable"))
    in_order = keys.take(order)
    alike = in_order[1:] == in_order[:-1]
    if alike.any():
        places = np.flatnonzero(np.append(alike, False) | np.append(False, alike))
        items = order[places]  # in runs of equal keys, each of which has the same places in the order by all bits
        order[places] = items[np.argsort(-similarity[items], kind="stable")]
    return order


def average_precision(ranks: np.ndarray, precision: np.ndarray, ks: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Return AP and k -> AP@k of one query, from the ranks [R] of its relevant items, ascending, and the precision [R]
    at each (`metrics.rank_classes`)."""
    gained = np.cumsum(precision)  # a running sum, whose order does not depend on the length
    among = {k: int(np.searchsorted(ranks, k, side="right")) for k in ks}
    return gained[-1] / len(ranks), {k: gained[n - 1] / n if n else 0.0 for k, n in among.items()}


def interpolated_precision(precision: np.ndarray) -> np.ndarray:
    """Return float64 [101]: the largest precision from each recall 0, 0.01 ... 1 on, of one query as above."""
    best_from = np.maximum.accumulate(precision[::-1])[::-1]
    needed = (np.arange(RECALL_LEVELS) * len(precision) + RECALL_LEVELS - 2) // (RECALL_LEVELS - 1)
    return best_from[np.maximum(needed, 1) - 1]
