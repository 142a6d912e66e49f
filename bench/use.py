"""Searching an index of embeddings against plain faiss: processor time of a query, recall, size and time to build.

    python -m bench.use [--counts 100000 1000000] [--dim 256] [--rounds 7] [--work DIR]

Vectors are of unit length around random centres, one for each 200, half of them images and half texts; queries come
from the same centres and are searched one at a time. Contestants take turns in one process on one thread:

    ours exact       Index of kind exact, up to 100,000 vectors by itself
    ours ivf_sq8     Index of kind ivf_sq8, with the number of cells that it chose itself
    faiss Flat       exact
    faiss IVF        IVF,Flat with as many cells as ours
    faiss HNSW       HNSW32

Ours give whole hits: key, caption and classes from the table of items. The number of cells, or efSearch, of faiss' own
is doubled until recall@10 against Flat is .97 or no longer grows. Times are processor time (on a machine that others
use too it is the figure to trust), a median over the rounds. Memory of a build is that of the process at its peak, less
what it had before; pages of mapped files count, which the system can take back. Figures of other counts that were
measured before stay in the file.

Writes bench/results/use.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from bench.common import RESULTS, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.data.store import FileStore
from cmgan_dist.errors import run_main
from cmgan_dist.jobs import ledger
from cmgan_dist.retrieval.embeddings import (
    ITEMS,
    MANIFEST_NAME,
    EmbeddedShard,
    EmbeddingManifest,
    ModelIdentity,
    SourceIdentity,
    write_shard,
)
from cmgan_dist.retrieval.index import Index

SHARD, CLUSTER, SPREAD, K, TARGET, LEAST = 50_000, 200, 0.7, 10, 0.97, 1000
CLASSES = [f"class {i}" for i in range(100)]
QUERIES, TURN = 200, 10
"""Queries that recall is measured on, and those of one turn."""

Search = Callable[[np.ndarray], np.ndarray]
"""Queries float32 [Q, E] -> ids [Q, K]."""


@dataclass
class Arguments:
    """Time searching and write bench/results/use.json."""

    counts: tuple[Annotated[int, Range(LEAST, 1e9)], ...] = (100_000, 1_000_000)
    """Numbers of vectors."""
    dim: Annotated[int, Range(1, 1e6)] = 256
    """E."""
    rounds: Count = 7
    """Rounds in which all contestants take turns."""
    work: Path | None = None
    """Folder for the files; a temporary one when left out."""
    name: str = "use"
    """Of the results file in bench/results/."""


# ---------------------------------------------------------------------------------------------- data


def draw(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """Unit vectors float32 [count, E] around the centres."""
    noise = rng.normal(size=(count, centres.shape[1])).astype(np.float32)
    rows = centres[rng.integers(len(centres), size=count)] + SPREAD * noise
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def vectors_of(count: int, dim: int) -> Iterator[np.ndarray]:
    """Give the vectors, SHARD at a time, then the queries."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(count // CLUSTER, dim)).astype(np.float32)
    for first in range(0, count, SHARD):
        yield draw(rng, centres, min(SHARD, count - first))
    yield draw(rng, centres, QUERIES)


def write_embeddings(folder: Path, count: int, dim: int) -> np.ndarray:
    """Write the vectors as launchers/embed.py does, half images and half texts; return the queries."""
    *parts, queries = list(vectors_of(count, dim))
    store, shards = FileStore(str(folder), "folder"), []
    for number, part in enumerate(parts):
        name, half = f"train-{number:06d}", len(part) // 2
        rows = np.concatenate([np.arange(half), np.arange(len(part) - half) % half]).astype(np.int32)
        columns = {
            "modality": ["image"] * half + ["text"] * (len(part) - half),
            "key": [f"{number}-{row}" for row in rows],
            "caption": [None] * half + [f"the caption of sample {row} of shard {number}" for row in rows[half:]],
            "owner": rows,
            "labels": [[row % len(CLASSES)] for row in rows],
            "shard": [name] * len(part),
            "row": rows,
        }
        record = ledger.Record("0" * 64, {"model": "0" * 64})
        write_shard(store, name, {"image": part[:half], "text": part[half:]}, pa.table(columns, ITEMS), record)
        shards.append(EmbeddedShard(name, "train", half, len(part) - half))
    model, source = ModelIdentity("0" * 64, "", "bench"), SourceIdentity("shards", "bench")
    manifest = EmbeddingManifest(model, dim, "float32", source, CLASSES, shards=shards)
    store.write(MANIFEST_NAME, manifest.to_json())
    return queries


# ---------------------------------------------------------------------------------------------- contestants


@dataclass
class Contestant:
    """What is timed, and what its build took."""

    search: Search
    figures: dict[str, float]


def built(make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what `make` returns, with processor seconds and MiB of memory at the peak that it took."""
    process = psutil.Process()
    before, peak, done = process.memory_full_info().uss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, process.memory_full_info().uss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    try:
        made = make()
        seconds = time.process_time() - start
    finally:
        done.set()
        watcher.join()
    return made, {"build_s": round(seconds, 1), "build_mib": round((max(peak, before) - before) / 2**20)}


def ours(embeddings: Path, folder: Path, kind: str) -> Contestant:
    """An index of ours, opened anew after it was built."""
    index, figures = built(lambda: Index.build(embeddings, folder, kind=kind))
    start = time.process_time()
    index = Index.open(folder)
    figures["open_ms"] = round(1e3 * (time.process_time() - start), 1)
    figures["mib"] = round(sum(path.stat().st_size for path in folder.glob("vectors.*")) / 2**20)
    figures |= {"nprobe": index.manifest.nprobe, "recall_at_build": round(index.manifest.recall, 4)}
    return Contestant(lambda q: np.asarray([[hit.id for hit in hits] for hits in index.search(q, K)]), figures)


def faiss_contestant(factory: str, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> Contestant:
    """An index of faiss by its factory string, tuned for recall."""
    import faiss

    def make() -> Any:
        index: Any = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            count = min(64 * index.nlist, len(vectors))
            index.train(vectors[np.random.default_rng(1).choice(len(vectors), count, replace=False)])
        index.add(vectors)
        return index

    index, figures = built(make)
    setting = next((name for name in ("nprobe", "hnsw") if hasattr(index, name)), "")
    best, value = -1.0, 16 if setting == "hnsw" else 1
    while setting:
        if setting == "hnsw":
            index.hnsw.efSearch = value
        else:
            index.nprobe = value
        reached = recall(index.search(queries, K)[1], truth)
        if reached >= TARGET or (value >= 64 and reached - best < 0.001):
            figures["efSearch" if setting == "hnsw" else "nprobe"] = value
            break
        best, value = reached, 2 * value
    figures["mib"] = round(len(faiss.serialize_index(index)) / 2**20)
    return Contestant(lambda q: np.asarray(index.search(q, K)[1]), figures)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the true neighbours that were found."""
    return float(np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)]))


# ---------------------------------------------------------------------------------------------- measuring


def time_turns(contestants: dict[str, Contestant], queries: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Return processor milliseconds a query, one figure a round; a first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            start = time.process_time()
            for i in range(TURN):
                at = (turn * TURN + i) % len(queries)
                contestant.search(queries[at : at + 1])
            if turn:
                times[name].append(1e3 * (time.process_time() - start) / TURN)
    return times


def filters(folder: Path, queries: np.ndarray) -> dict[str, float]:
    """Return processor milliseconds of a filtered query of ours, by the filter, and whether it always gave K."""
    index, found = Index.open(folder), {}
    for name, options in (("images", {"modality": "image"}), ("1 % by class", {"classes": [CLASSES[7]]})):
        index.search(queries[:1], K, **options)  # the filter is kept
        spent = []
        for query in queries[: 5 * TURN]:
            start = time.process_time()
            (hits,) = index.search(query, K, **options)
            spent.append(1e3 * (time.process_time() - start))
            assert len(hits) == K
        found[name] = round(statistics.median(spent), 2)
    return found


def measure(count: int, dim: int, rounds: int, work: Path) -> dict[str, Any]:
    """Return all figures for a number of vectors."""
    queries = write_embeddings(work / "emb", count, dim)
    vectors = np.concatenate(list(vectors_of(count, dim))[:-1])  # in shards of images, then texts: order of ids
    flat = faiss_contestant("Flat", vectors, queries, np.zeros(0))
    truth = flat.search(queries)
    cells = round(2 * count**0.5)
    contestants = {
        "ours exact": ours(work / "emb", work / "exact", "exact"),
        "ours ivf_sq8": ours(work / "emb", work / "ivf", "ivf_sq8"),
        "faiss Flat": flat,
        "faiss IVF": faiss_contestant(f"IVF{cells},Flat", vectors, queries, truth),
        "faiss HNSW": faiss_contestant("HNSW32,Flat", vectors, queries, truth),
    }
    times = time_turns(contestants, queries, rounds)
    record: dict[str, Any] = {}
    for name, contestant in contestants.items():
        reached = recall(contestant.search(queries), truth)
        query = {"ms": round(statistics.median(times[name]), 3), "recall": round(reached, 4)}
        record[name] = {**query, **contestant.figures}
    record["filtered ms"] = {name: filters(work / name, queries) for name in ("exact", "ivf")}
    return record


def show(count: int, record: dict[str, Any]) -> None:
    """Print a table of the figures."""
    table = Table(title=f"{count} vectors", title_justify="left")
    columns = ("ms", "recall", "mib", "build_s", "build_mib", "nprobe", "efSearch", "open_ms")
    for name in ("", *columns):
        table.add_column(name, justify="left" if not name else "right")
    for name, figures in record.items():
        if "ms" in figures:
            table.add_row(name, *(str(figures.get(column, "")) for column in columns))
    console = Console(width=140)
    console.print(table)
    console.print(f"filtered, ms: {record['filtered ms']}", markup=False)


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.use")
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    import faiss  # with much else, and --help waits

    faiss.omp_set_num_threads(1)
    path = RESULTS / f"{arguments.name}.json"
    known = json.loads(path.read_text()).get("counts", {}) if path.is_file() else {}
    for count in arguments.counts:
        with TemporaryDirectory(dir=arguments.work) as work:
            known[str(count)] = measure(count, arguments.dim, arguments.rounds, Path(work))
        show(count, known[str(count)])
        record = {"dim": arguments.dim, "rounds": arguments.rounds, "queries": QUERIES, "k": K, "counts": known}
        print(f"written to {write_results(arguments.name, record)}")


if __name__ == "__main__":
    run_main(main)
