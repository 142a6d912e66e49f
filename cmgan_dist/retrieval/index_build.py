"""What goes into an index, shard by shard, and what is measured on the way: recall and the distribution of chance.

Shapes: n vectors of a block, Q queries, E dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from cmgan_dist.errors import BadInput
from cmgan_dist.retrieval.embeddings import EmbeddedShard, EmbeddingSet
from cmgan_dist.retrieval.index_files import IndexManifest
from cmgan_dist.retrieval.index_items import Items, items_of_shard
from cmgan_dist.retrieval.nearest import Found, Nearest

if TYPE_CHECKING:
    from cmgan_dist.models.generator import Modality

BLOCK = 1 << 15
"""Vectors that are in memory at a time."""
K, TARGET = 10, 0.97
"""Recall@K against exact search that the number of visited cells is chosen for."""
QUERIES = 500
"""Stored vectors that are queries when recall is measured."""
NEAR, NEAR_QUERIES, OWN = 0.1, 250, 16
"""Quantile of the best scores of so many items of each modality; hits looked at, of which the first may be its own."""
CHANCE = 1000
"""Items of each modality that the distribution of chance is measured on."""
TRAINED = 64
"""Vectors a cell that centroids are trained on; faiss asks for 39 at least."""
STORED = 0.98
"""Inner product of a vector with what is stored of it, by its squared length, below which it does not fit an index."""
SEED = 0

Search = Callable[[int, np.ndarray, int, "np.ndarray | None"], list[Found]]
"""(cells to visit, queries, k, ids that may be found) -> the nearest of each query."""


@dataclass(frozen=True)
class Block:
    """Vectors of one modality that follow each other."""

    vectors: np.ndarray
    """float32 [n, E], no longer than 1."""
    ids: np.ndarray
    """int64 [n], ascending."""
    modality: str


@dataclass(frozen=True)
class Added:
    """Embeddings on their way into an index: their items have the ids from `first_id` on."""

    embeddings: EmbeddingSet
    first_id: int = 0
    progress: bool = False
    """Draw a bar on stderr while vectors are read."""

    @classmethod
    def open(cls, location: str | Path, *, first_id: int = 0, progress: bool = False) -> Added:
        """Open embeddings. Raises BadInput when they are not whole."""
        return cls(EmbeddingSet.open(location), first_id, progress)

    @property
    def count(self) -> int:
        """Number of items."""
        return sum(shard.images + shard.texts for shard in self.embeddings)

    def _shards(self) -> Iterator[tuple[EmbeddedShard, int]]:
        """Give each shard with the id of its first item."""
        first = self.first_id
        for shard in self.embeddings:
            yield shard, first
            first += shard.images + shard.texts

    def blocks(self) -> Iterator[Block]:
        """Give all vectors in the order of their ids. Raises BadInput when one is not finite, zero or longer than 1."""
        console = Console(stderr=True)
        with Progress(console=console, disable=not (self.progress and console.is_terminal), transient=True) as bar:
            task = bar.add_task("vectors", total=self.count)
            for shard, start in self._shards():
                parts: list[tuple[Modality, int, int]] = [("image", start, shard.images)]
                parts.append(("text", start + shard.images, shard.texts))
                for modality, first, count in parts:
                    rows = self.embeddings.vectors(modality, shard) if count else ()
                    for at in range(0, count, BLOCK):
                        part = self._checked(np.asarray(rows[at : at + BLOCK]), shard, modality)
                        yield Block(part, np.arange(first + at, first + at + len(part)), modality)
                        bar.advance(task, len(part))

    def _checked(self, rows: np.ndarray, shard: EmbeddedShard, modality: str) -> np.ndarray:
        """float32 [n, E]; one that is longer than 1, as after rounding to float16, gets unit length."""
        length = np.linalg.norm(rows.astype(np.float32), axis=1)
        good = (length > 0) & (length < 1.01)  # neither NaN nor Inf
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise BadInput(
                f"{self.embeddings.location}: {modality} vector {row} of {shard.name} has length {length[row]:.3g}, "
                "expected 1 or less, but not 0: embed again"
            )
        if rows.dtype == np.float32:
            return rows
        return (rows / np.maximum(length, 1)[:, None]).astype(np.float32)

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return random vectors, float32 [n, E], their ids, ascending, and whether they are of images, bool [n]."""
        count = min(count, self.count)
        ids = self.first_id + np.sort(np.random.default_rng(seed).choice(self.count, count, replace=False))
        out, image = np.empty((count, self.embeddings.dim), np.float32), np.empty(count, bool)
        for block in self.blocks():
            first, last = np.searchsorted(ids, (block.ids[0], block.ids[-1] + 1))
            out[first:last] = block.vectors[ids[first:last] - block.ids[0]]
            image[first:last] = block.modality == "image"
        return out, ids, image

    def check_stored(self, take: Callable[[np.ndarray], np.ndarray]) -> None:
        """Raises BadInput when bytes, whose ranges come from the vectors an index was built on, do not fit these.

        `take`: ids -> vectors as they are stored."""
        vectors, ids, _ = self.sample(QUERIES, SEED)
        far = np.einsum("ne,ne->n", take(ids), vectors) < STORED * np.einsum("ne,ne->n", vectors, vectors)
        if far.mean() > 0.01:
            raise BadInput(
                f"{self.embeddings.location}: {far.mean():.0%} of its vectors lie outside of what the index was built "
                "on and cannot be added: index all embeddings anew"
            )

    def tables(self, classes: Sequence[str]) -> Iterator[pa.Table]:
        """Give the rows of items.parquet, shard by shard; labels are numbers in `classes`."""
        lookup = np.asarray([classes.index(name) for name in self.embeddings.manifest.classes], np.int32)
        for shard, first in self._shards():
            yield items_of_shard(self.embeddings, shard, first, lookup)


def described(added: Added, kind: str, before: IndexManifest | None = None) -> IndexManifest:
    """Return what index.json says of an index with these embeddings, beside those it had `before`.

    Raises BadInput when there is nothing in them, they are of another model, or they are in the index already."""
    embeddings, manifest = added.embeddings, added.embeddings.manifest
    if not added.count:
        raise BadInput(f"{embeddings.location} holds no vectors: embed a data set that has samples")
    entry = {
        "location": str(Path(embeddings.location).resolve())
        if "://" not in embeddings.location
        else embeddings.location,
        "sha256": embeddings.sha256,
        "source": asdict(manifest.source),
        "first_id": added.first_id,
    }
    if before is None:
        return IndexManifest(
            kind=kind,
            dim=embeddings.dim,
            count=added.count,
            model=asdict(manifest.model),
            source=asdict(manifest.source),
            classes=list(manifest.classes),
            attribution=manifest.attribution,
            embeddings=[entry],
            next_id=added.count,
        )
    if manifest.model.sha256 != before.model["sha256"] or embeddings.dim != before.dim:
        raise BadInput(
            f"{embeddings.location} was made with another model ({manifest.model.run}) than the index "
            f"({before.model['run']}): embed it with the index's model"
        )
    if any(e["sha256"] == entry["sha256"] for e in before.embeddings):
        raise BadInput(f"{embeddings.location} is in the index already: add others")
    return replace(
        before,
        count=before.count + added.count,
        classes=[*before.classes, *(name for name in manifest.classes if name not in before.classes)],
        attribution="\n".join(dict.fromkeys(text for text in (before.attribution, manifest.attribution) if text)),
        embeddings=[*before.embeddings, entry],
        next_id=added.first_id + added.count,
    )


# ---------------------------------------------------------------------------------------------- recall


@dataclass
class _Case:
    """Queries of one kind with their true neighbours: `among` all items (None) or those of one modality."""

    queries: np.ndarray
    ids: np.ndarray
    among: str | None
    truth: Nearest

    def recall(self, found: list[Found]) -> float:
        """Return the share of the K true neighbours that were found; a query is not its own neighbour."""
        shares = []
        for own, (_, true), (_, ids) in zip(self.ids, self.truth.found(), found, strict=True):
            expected = true[true != own][:K]
            if len(expected):
                shares.append(np.isin(expected, ids[ids != own][:K]).mean())
        return float(np.mean(shares)) if shares else 1.0


class Recall:
    """Recall@K of approximate against exact search, on stored vectors as queries.

    There are three kinds of query: among all items, images among texts and texts among images. The lowest counts."""

    def __init__(self, added: Added) -> None:
        """Draw the queries."""
        vectors, ids, image = added.sample(QUERIES, SEED)
        kinds: list[tuple[str | None, np.ndarray]] = [(None, image | ~image), ("text", image), ("image", ~image)]
        self._cases = [
            _Case(vectors[kept], ids[kept], among, Nearest(vectors[kept], K + 1)) for among, kept in kinds if kept.any()
        ]
        self._ids: dict[str, list[np.ndarray]] = {"image": [], "text": []}

    def push(self, block: Block) -> None:
        """Take in vectors that may be found."""
        self._ids[block.modality].append(block.ids)
        for case in self._cases:
            if case.among in (None, block.modality):
                case.truth.push(block.vectors, block.ids)

    def measure(self, search: Search, nprobe: int) -> float:
        """Return the lowest recall of the three kinds when a query visits `nprobe` cells."""
        found = []
        for case in self._cases:
            ids = self._ids[case.among] if case.among else []
            if case.among and not ids:
                continue
            hits = search(nprobe, case.queries, K + 1, np.concatenate(ids) if ids else None)
            found.append(case.recall(hits))
        return min(found)

    def choose(self, search: Search, cells: int) -> tuple[int, float]:
        """Return the fewest visited cells (a power of two) that reach TARGET, and the recall.

        Where more cells no longer help, vectors of one byte a dimension are what limits it: then the fewest that come
        within .002 of the best."""
        tried: list[tuple[int, float]] = []
        nprobe = 1
        while True:
            tried.append((nprobe, self.measure(search, nprobe)))
            stalled = nprobe >= 16 and tried[-1][1] - tried[-2][1] < 0.001
            if tried[-1][1] >= TARGET or nprobe == cells or stalled:
                break
            nprobe = min(2 * nprobe, cells)
        best = max(recall for _, recall in tried)
        return next(pair for pair in tried if pair[1] >= min(TARGET, best - 0.002))


class Cells(Protocol):
    """An approximate index that is being built."""

    nprobe: int

    def add(self, blocks: Iterable[Block]) -> None:
        """Take in vectors."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, nprobe: int | None = None) -> list[Found]:
        """Return the nearest of each query, visiting `nprobe` cells."""


Made = TypeVar("Made", bound=Cells)


class Stored(Protocol):
    """Vectors of an index."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> list[Found]:
        """Return the nearest of each query; `allowed`: ids that may be found."""

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors with some ids, float32 [n, E]."""


def build_ivf(added: Added, train: Callable[[np.ndarray, int], Made]) -> tuple[Made, float]:
    """Return an index of the embeddings, with the number of cells to visit chosen, and its recall.

    `train`: (sample float32 [n, E], number of cells) -> an index without vectors."""
    cells = max(1, min(round(2 * added.count**0.5), added.count // 39))
    made = train(added.sample(max(TRAINED * cells, 10_000), SEED + 1)[0], cells)
    recall = Recall(added)
    for block in added.blocks():
        made.add([block])
        recall.push(block)
    made.nprobe, measured = recall.choose(lambda n, q, k, ids: made.search(q, k, ids, n), cells)
    return made, measured


# ---------------------------------------------------------------------------------------------- chance


def measure_chance(items: Items, take: Callable[[np.ndarray], np.ndarray], dim: int) -> tuple[float, float]:
    """Return mean and standard deviation of scores between random images and texts that do not belong together.

    `take`: ids -> vectors [n, E]. Of an index with one modality: between different items. Where there is no such pair,
    what random directions have: 0 and E**-.5."""
    rng = np.random.default_rng(SEED)
    drawn = []
    for modality in ("image", "text"):
        ids = items.allowed(modality, None)
        drawn.append(np.sort(rng.choice(ids, min(CHANCE, len(ids)), replace=False)))
    first, second = drawn if all(map(len, drawn)) else (max(drawn, key=len),) * 2
    owners = [items.owners(items.positions(ids)) for ids in (first, second)]
    apart = (owners[0][:, None] != owners[1]) | (owners[0] < 0)[:, None]
    apart &= first[:, None] != second
    scores = (take(first) @ take(second).T)[apart].astype(np.float64)
    return (float(scores.mean()), float(scores.std())) if len(scores) > 1 else (0.0, dim**-0.5)


def measure_near(items: Items, vectors: Stored) -> float:
    """Return the score that the best hit of 9 in 10 stored items reaches: images among texts, texts among images.

    An item's own sample does not count. Of an index with one modality: among its other items. 1 where nothing else is
    there."""
    rng = np.random.default_rng(SEED)
    ids = {modality: items.allowed(modality, None) for modality in ("image", "text")}
    pairs = (
        [("image", "text"), ("text", "image")] if all(map(len, ids.values())) else [(m, m) for m in ids if len(ids[m])]
    )
    best: list[float] = []
    for asking, among in pairs:
        drawn = np.sort(rng.choice(ids[asking], min(NEAR_QUERIES, len(ids[asking])), replace=False))
        owners = items.owners(items.positions(drawn))
        found = vectors.search(vectors.take(drawn), OWN, ids[among])
        for own, owner, (scores, hits) in zip(drawn, owners, found, strict=True):
            other = (hits != own) & ((items.owners(items.positions(hits)) != owner) | (owner < 0))
            best += scores[other][:1].tolist()
    return float(np.quantile(best, NEAR)) if best else 1.0
