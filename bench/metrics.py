"""What MAP of a large gallery costs: ours beside other libraries and the loop of published evaluations.

    python -m bench.metrics [--queries 200] [--gallery 100000] [--rounds 5] [--whole 10000]

One thread; in every round the contestants take turns, and a figure is the median of processor time a query over the
rounds, preparation included. Each says what MAP it measures, since not all measure the same. Contestants:

    ours                       retrieval.metrics.rank_classes: exact, with AP@50 and the precision-recall curve
    ours, all sorted           the same from a stable sort of all similarities, as it was before
    loop over ranks            1 / R * sum over ranks r of precision(r) * relevant(r) (DSCMR, Zhen et al., CVPR 2019)
    pytorch-metric-learning    AccuracyCalculator, mean_average_precision, exact nearest neighbours by torch
    torchmetrics               RetrievalMAP on float32 cosines, which leaves out those below 0

`--whole`: queries of one more run of ours and of ours before. The two libraries are measured where they are installed
(pip install pytorch-metric-learning torchmetrics). Writes bench/results/metrics.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.common import spread, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import run_main

if TYPE_CHECKING:  # torch takes seconds to import, and --help waits
    from torch import Tensor

DIM, CLASSES = 256, 10
ROWS = 20
"""Queries that a contestant ranks at a time where it holds all their similarities."""


@dataclass
class Arguments:
    """Time the mean average precision of a gallery."""

    queries: Count = 200
    """Queries a round."""
    gallery: Annotated[int, Range(CLASSES, 1e9)] = 100_000
    """Items of the gallery, at least one of each class."""
    rounds: Count = 5
    """Rounds."""
    whole: Annotated[int, Range(0, 1e9)] = 0
    """Queries of one more run of ours and of ours before; 0 leaves it out."""
    name: str = "metrics"
    """Of the results file in bench/results/."""


@dataclass
class Case:
    """Unit vectors with one class each, those of a class nearer to each other than to the others."""

    query: Tensor
    gallery: Tensor
    query_class: Tensor
    gallery_class: Tensor

    def parts(self) -> list[Case]:
        """Return the case with some queries at a time."""
        pairs = zip(self.query.split(ROWS), self.query_class.split(ROWS), strict=True)
        return [Case(query, self.gallery, classes, self.gallery_class) for query, classes in pairs]


def made(queries: int, gallery: int) -> Case:
    import torch

    g = torch.Generator().manual_seed(0)
    centre = torch.randn(CLASSES, DIM, generator=g) / 4
    classes = [torch.arange(n) % CLASSES for n in (queries, gallery)]
    query, items = (centre[c] + torch.randn(len(c), DIM, generator=g) for c in classes)
    unit = torch.nn.functional.normalize
    return Case(unit(query, dim=1), unit(items, dim=1), *classes)


# ---------------------------------------------------------------------------------------------- contestants


def ours(case: Case) -> float:
    from torch.nn.functional import one_hot

    from cmgan_dist.retrieval.metrics import rank_classes

    query, gallery = (one_hot(c, CLASSES).bool() for c in (case.query_class, case.gallery_class))
    return float(np.mean(rank_classes(case.query, case.gallery, query, gallery).ap))


def all_sorted(case: Case) -> float:
    """AP, AP@50 and curve from all ranks."""
    import torch

    from cmgan_dist.retrieval.metrics import similarities

    found, curve = [], torch.zeros(101, dtype=torch.float64)
    rank = torch.arange(1, len(case.gallery) + 1, dtype=torch.float64)
    for rows, similarity in similarities(case.query, case.gallery, ROWS):
        shared = case.query_class[rows, None] == case.gallery_class
        hit = shared.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
        hits = hit.cumsum(1)
        at_rank = hits / rank
        gained, total = torch.where(hit, at_rank, 0.0).cumsum(1), hits[:, -1]
        found.append(gained[:, -1] / total)
        best_from = at_rank.flip(1).cummax(1).values.flip(1)
        needed = (torch.arange(101) * total[:, None] + 99) // 100
        for of_query in best_from.gather(1, torch.searchsorted(hits, needed)):
            curve += of_query
    return float(np.mean(torch.cat(found).numpy()))


def loop_over_ranks(case: Case) -> float:
    found = []
    classes = case.gallery_class.tolist()
    for part in case.parts():
        order = np.argsort(1 - (part.query @ part.gallery.T).numpy(), axis=1)
        for own, of_query in zip(part.query_class.tolist(), order.tolist(), strict=True):
            relevant, gained = 0, 0.0
            for rank, item in enumerate(of_query, 1):
                if classes[item] == own:
                    relevant += 1
                    gained += relevant / rank
            found.append(gained / relevant)
    return float(np.mean(found))


def metric_learning(case: Case) -> float:
    import torch

    library = PACKAGES["pytorch-metric-learning"]
    distances, accuracy, inference = (
        importlib.import_module(f"{library}.{name}")
        for name in ("distances", "utils.accuracy_calculator", "utils.inference")
    )
    calculator = accuracy.AccuracyCalculator(
        include=("mean_average_precision",),
        k=len(case.gallery),
        device=torch.device("cpu"),
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
    )
    found = [
        calculator.get_accuracy(part.query, part.query_class, part.gallery, part.gallery_class) for part in case.parts()
    ]
    return float(np.mean([each["mean_average_precision"] for each in found]))


def torch_metrics(case: Case) -> float:
    import torch

    metric = importlib.import_module("torchmetrics.retrieval").RetrievalMAP()
    found = []
    for part in case.parts():
        relevant = part.query_class[:, None] == part.gallery_class
        index = torch.arange(len(part.query))[:, None].expand_as(relevant)
        found.append(float(metric((part.query @ part.gallery.T).flatten(), relevant.flatten(), index.flatten())))
        metric.reset()
    return float(np.mean(found))


OURS, BEFORE = "ours", "ours, all sorted"
CONTESTANTS: dict[str, Callable[[Case], float]] = {
    OURS: ours,
    BEFORE: all_sorted,
    "loop over ranks": loop_over_ranks,
    "pytorch-metric-learning": metric_learning,
    "torchmetrics": torch_metrics,
}
PACKAGES = {"pytorch-metric-learning": "pytorch_metric_learning", "torchmetrics": "torchmetrics"}

# ---------------------------------------------------------------------------------------------- measuring


def timed(name: str, case: Case) -> tuple[float, float]:
    """Return processor milliseconds a query, and MAP."""
    start = time.process_time()
    found = CONTESTANTS[name](case)
    return (time.process_time() - start) / len(case.query) * 1e3, found


def measure(arguments: Arguments, names: list[str]) -> dict[str, Any]:
    case = made(arguments.queries, arguments.gallery)
    times: dict[str, list[float]] = {name: [] for name in names}
    maps: dict[str, float] = {}
    for name in names:  # what it imports and sets up once
        timed(name, made(2, CLASSES))
    for i in track(range(arguments.rounds), "MAP", console=Console(stderr=True)):
        for name in names if i % 2 == 0 else reversed(names):
            took, maps[name] = timed(name, case)
            times[name].append(took)
    record: dict[str, Any] = {}
    for name in names:
        ratio = spread([theirs / mine for theirs, mine in zip(times[name], times[OURS], strict=True)])
        record[name] = {"cpu_ms": spread(times[name]), "map": maps[name], "times_ours": ratio}
    return record


def show(arguments: Arguments, record: dict[str, Any]) -> None:
    title = f"MAP of {arguments.queries} queries in {arguments.gallery} items, one core"
    table = Table("", "ms a query", "times ours", "MAP", title=title, title_justify="left")
    for name, row in record.items():
        ratio = row["times_ours"]
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
        table.add_row(name, f"{row['cpu_ms']['median']:.2f}", shown, f"{row['map']:.6f}")
    Console(width=110).print(table)


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.metrics")
    import torch

    torch.set_num_threads(1)
    missing = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None]
    if missing:
        print(f"not measured, not installed: {', '.join(missing)}")
    record = measure(arguments, [name for name in CONTESTANTS if name not in missing])
    show(arguments, record)
    whole: dict[str, Any] = {}
    if arguments.whole:
        case = made(arguments.whole, arguments.gallery)
        for name in (OURS, BEFORE):
            took, found = timed(name, case)
            whole[name] = {"cpu_s": took * len(case.query) / 1e3, "map": found}
            print(f"{arguments.whole} queries, {name}: {whole[name]['cpu_s']:.1f} s")
    asked = {name: getattr(arguments, name) for name in ("queries", "gallery", "rounds")}
    print(write_results(arguments.name, {**asked, "missing": missing, "contestants": record, "whole": whole}))


if __name__ == "__main__":
    run_main(main)
