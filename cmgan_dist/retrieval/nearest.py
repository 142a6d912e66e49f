"""Exact nearest neighbours by inner product, in blocks of rows, so that vectors need not fit into memory.

A block's scores are first computed in float32. Whatever could be among the best by them is scored again exactly:
vectors, no longer than 1, are rounded to multiples of 2**-26, as in `metrics`, so that a float64 sum of products has no
rounding error and does not depend on how rows were cut into blocks. Equal scores rank by id.

Shapes: Q queries, N vectors, n of them in a block, E dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from cmgan_dist.errors import BadInput

GRID = 2.0**26
BLOCK_ROWS = 1 << 14
BLOCK_SCORES = 1 << 22
"""Scores held at a time, 16 MiB."""
FEW = 4
"""Queries that are faster one by one than together."""
RESCORED = 1 << 12
"""Pairs scored again at a time."""

Found = tuple[np.ndarray, np.ndarray]
"""Scores float32 and ids int64 of one query, best first."""


def fitting_queries(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Return queries, [Q, E] or [E], as float32 [Q, E]; one that is longer than 1 gets unit length.

    Raises BadInput when they are no numbers, have not `dim` of them, or one is not finite."""
    try:
        given = np.asarray(vectors)
        if given.dtype.kind not in "fiub":
            raise ValueError(f"they are of type {given.dtype}")
    except ValueError as error:
        raise BadInput(f"the query is no array of numbers ({error}): encode it first, by the index's model") from None
    queries = np.atleast_2d(given.astype(np.float32))
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise BadInput(
            f"the query has shape {list(given.shape)}, the index vectors of {dim} numbers: encode it by the "
            "index's model"
        )
    if not np.isfinite(queries).all():
        raise BadInput("the query holds NaN or Inf: give finite numbers")
    length = np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(queries / np.maximum(length, 1), np.float32)


def _products(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the inner products float32 [Q, n]; BLAS takes more than twice as long for one query."""
    if len(queries) > FEW:
        return np.asarray(queries @ vectors.T)
    return np.stack([np.vecdot(vectors, query) for query in queries])


class Nearest:
    """The k nearest, to each of Q queries, of the vectors that were pushed."""

    def __init__(self, queries: np.ndarray, k: int) -> None:
        """`queries`: float32 [Q, E], no longer than 1."""
        self.queries, self.k = queries, k
        self._grid = np.rint(queries.astype(np.float64) * GRID) / GRID
        self._slack = np.float32(2 * (queries.shape[1] + 8) * 2.0**-24)  # twice what a float32 dot product may err
        self._bound = np.full(len(queries), -np.inf, np.float32)
        """[Q]: score of the k-th best so far."""
        self._query = np.zeros(0, np.int64)
        self._score = np.zeros(0, np.float64)
        self._id = np.zeros(0, np.int64)

    def push(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """Take in vectors float32 [n, E], no longer than 1, with their ids int64 [n]."""
        rows = max(1, min(BLOCK_ROWS, BLOCK_SCORES // max(len(self.queries), 1)))
        for first in range(0, len(vectors), rows):
            self._push_block(np.asarray(vectors[first : first + rows]), ids[first : first + rows])

    def _push_block(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        rough = _products(self.queries, vectors)
        bound = self._bound
        if len(vectors) > self.k:
            bound = np.maximum(bound, np.partition(rough, len(vectors) - self.k, axis=1)[:, len(vectors) - self.k])
        query, row = np.nonzero(rough >= (bound - self._slack)[:, None])
        score = np.empty(len(query))
        for first in range(0, len(query), RESCORED):
            part = slice(first, first + RESCORED)
            grid = np.rint(vectors[row[part]].astype(np.float64) * GRID) / GRID
            score[part] = np.einsum("ne,ne->n", self._grid[query[part]], grid)
        self._merge(query, score, ids[row])

    def _merge(self, query: np.ndarray, score: np.ndarray, ids: np.ndarray) -> None:
        query, score = np.concatenate([self._query, query]), np.concatenate([self._score, score])
        ids = np.concatenate([self._id, ids])
        order = np.lexsort((ids, -score, query))
        starts = np.searchsorted(query[order], np.arange(len(self.queries)))
        order = order[np.arange(len(order)) - starts[query[order]] < self.k]
        self._query, self._score, self._id = query[order], score[order], ids[order]
        ends = np.searchsorted(self._query, np.arange(len(self.queries)), side="right")
        full = np.flatnonzero(np.diff(ends, prepend=0) == self.k)
        self._bound[full] = self._score[ends[full] - 1]

    def found(self) -> list[Found]:
        """Return the nearest of each query, at most k, best first."""
        starts = np.searchsorted(self._query, np.arange(len(self.queries) + 1))
        score = self._score.astype(np.float32)
        return [(score[a:b], self._id[a:b]) for a, b in pairwise(starts)]


class ExactVectors:
    """Vectors in a .npy file that is mapped, searched one by one."""

    def __init__(self, path: Path, ids: np.ndarray, dim: int) -> None:
        """`ids` int64 [N], ascending. Raises BadInput when the file is not float32 [N, E]."""
        try:
            self.array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadInput(f"{path} cannot be read ({error}): restore it or index again") from None
        if self.array.dtype != np.float32 or self.array.shape != (len(ids), dim):
            raise BadInput(
                f"{path} holds {self.array.dtype} {list(self.array.shape)}, expected float32 {[len(ids), dim]}: "
                "restore it or index again"
            )
        self.ids = ids

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> list[Found]:
        """Return the nearest of each query; `allowed`: ids that may be found, ascending, None for all."""
        nearest = Nearest(queries, k)
        if allowed is None:
            nearest.push(self.array, self.ids)
        else:
            for first in range(0, len(allowed), BLOCK_ROWS):
                part = allowed[first : first + BLOCK_ROWS]
                nearest.push(self.take(part), part)
        return nearest.found()

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with some ids, which must be there, float32 [n, E]."""
        return np.asarray(self.array[np.searchsorted(self.ids, ids)])

    def blocks(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Give the vectors where `kept`, bool [N], is true, in order."""
        for first in range(0, len(kept), BLOCK_ROWS):
            part = slice(first, first + BLOCK_ROWS)
            yield self.array[part][kept[part]]


def write_exact(path: Path, blocks: Iterable[np.ndarray], count: int, dim: int) -> None:
    """Write vectors, float32 [n, E] a block, as one .npy file of `count` rows. Raises OSError."""
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)
