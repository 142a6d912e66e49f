"""What encoding costs: `Model` beside sentence-transformers' encode and a plain timm loop with the same backbones.

    python -m bench.encode --run runs/openmoji --data data/openmoji [--items 256] [--rounds 5]

Each contestant is a process of its own with one thread; in every round they take turns, and a figure is the median of
processor time per item over the rounds. `Model` goes all the way to vectors, the others stop
at the backbone's features; those are projected by the model once, to see that all encode the same. Contestants:

    Model                    encode_images, encode_texts as they are called without options
    Model, batch 64          the same with 64 items through the backbone together
    timm, batch 64           PIL decodes, timm's own transform, model(batch): as timm's documentation has it
    timm, batch 8            the same with as many as Model takes
    sentence-transformers    SentenceTransformer.encode as it is called without options (batch 32)

Peak memory is that of further processes that encode many items, the data set over and over, read as they go.
The run must name its backbones as packages, as that of `make train` does. Writes bench/results/encode.json.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.common import Worker, spread, write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count, ImageBackboneConfig
from cmgan_dist.config.markers import Range
from cmgan_dist.data.reader import ShardReader
from cmgan_dist.errors import BadInput, run_main

if TYPE_CHECKING:  # torch takes seconds to import, and --help waits
    from cmgan_dist.models.saved import Saved

BATCH = 64
ALIKE = 0.99
"""The least cosine between what a model makes of its own features and of a rival's: resizing differs."""
COMPARED = 32
Encode = Callable[[Iterable[Any]], np.ndarray]


@dataclass
class Arguments:
    """Time the encoding of pictures and texts."""

    run: Path
    """Run whose best model encodes."""
    data: str
    """Folder of raw shards; its train split is encoded."""
    items: Count = 256
    """Pictures, and texts, a round."""
    rounds: Count = 5
    """Rounds."""
    memory_pictures: Annotated[int, Range(0, 1e9)] = 10_000
    """Pictures of the processes whose peak memory is measured; 0 leaves them out."""
    memory_texts: Annotated[int, Range(0, 1e9)] = 10_000
    """The same for texts."""
    name: str = "encode"
    """Of the results file in bench/results/."""


# ---------------------------------------------------------------------------------------------- contestants


def lots(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while lot := list(itertools.islice(iterator, size)):
        yield lot


def timm_loop(saved: Saved, batch: int) -> Encode:
    """A loop over batches as timm's documentation has it, with the weights of the run's backbone."""
    import timm
    import torch

    from cmgan_dist.models.backbones import TimmBackbone

    spec = saved.spec.image
    # our backbone only lends its weights, which come in another library's layout
    source = TimmBackbone(ImageBackboneConfig(spec.name, spec.weights, image_size=spec.image_size or 224)).model
    model = timm.create_model(spec.name, num_classes=0).eval()
    model.load_state_dict(source.state_dict())
    config = timm.data.resolve_model_data_config(model)
    config |= {"mean": spec.mean, "std": spec.std, "crop_pct": 1.0}
    transform = timm.data.create_transform(**config, is_training=False)

    @torch.inference_mode()
    def encode(pictures: Iterable[bytes]) -> np.ndarray:
        made = []
        for lot in lots(pictures, batch):
            images = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in lot]
            made.append(model(torch.stack(images)))
        return torch.cat(made).numpy()

    return encode


def sentence_encode(saved: Saved) -> Encode:
    """sentence-transformers' own encode, of the run's text backbone."""
    from sentence_transformers import SentenceTransformer

    from cmgan_dist.models.weights import in_package

    folder = in_package(saved.spec.text.weights, ("modules.json",), "model.text.weights").parent
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


def model_encode(what: str, batch: int = 64) -> Callable[[Saved], Encode]:
    """`Model` with `batch` items at a time."""

    def build(saved: Saved) -> Encode:
        from cmgan_dist.retrieval.model import Model

        model = Model(saved, "cpu")
        return partial(model.encode_images if what == "images" else model.encode_texts, batch=batch)

    return build


CONTESTANTS: dict[str, dict[str, Callable[[Saved], Encode]]] = {
    "images": {
        "Model": model_encode("images"),
        "Model, batch 64": model_encode("images", batch=BATCH),
        "timm, batch 64": partial(timm_loop, batch=BATCH),
        "timm, batch 8": partial(timm_loop, batch=8),
    },
    "texts": {
        "Model": model_encode("texts"),
        "Model, batch 64": model_encode("texts", batch=BATCH),
        "sentence-transformers": sentence_encode,
    },
}
OURS = "Model"
RIVALS = {"images": ("timm, batch 64", "timm, batch 8"), "texts": ("sentence-transformers",)}


def read_items(data: str, what: str) -> list[Any]:
    """Return the encoded pictures or the texts of the train split."""
    samples = list(ShardReader(data, "train"))
    found: list[Any] = []
    for sample in samples:
        found += [sample.image] if what == "images" else list(sample.texts)
    return found


def work(run: str, data: str, what: str, name: str) -> None:
    """A contestant: answers each number of items by processor time, wall time and peak memory, 0 by a few vectors."""
    import torch

    from cmgan_dist.models.saved import read_model

    torch.set_num_threads(1)
    items, encode = read_items(data, what), CONTESTANTS[what][name](read_model(run))
    encode(items[:BATCH])

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    answer({"peak_mib": peak()})
    for line in sys.stdin:
        if not int(line):
            answer(encode(items[:COMPARED]).tolist())
            continue
        cpu, wall, before = time.process_time(), time.perf_counter(), peak()
        encode(itertools.islice(itertools.cycle(items), int(line)))
        took = {
            "cpu_ms": (time.process_time() - cpu) / int(line) * 1e3,
            "wall_ms": (time.perf_counter() - wall) / int(line) * 1e3,
        }
        answer(took | {"peak_mib": peak(), "more_mib": peak() - before})


def answer(value: Any) -> None:
    print("answer", json.dumps(value), flush=True)


# ---------------------------------------------------------------------------------------------- measuring


def start(arguments: Arguments, what: str, name: str) -> Worker:
    command = [sys.executable, "-m", "bench.encode", "worker", str(arguments.run), arguments.data, what, name]
    worker = Worker(command, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    worker.answer()
    return worker


def compare(arguments: Arguments, what: str, workers: dict[str, Worker]) -> dict[str, float]:
    """Return the least cosine between the model's vectors and those of each contestant. Raises BadInput when one
    encodes something else."""
    from cmgan_dist.models.saved import read_model
    from cmgan_dist.retrieval.model import Model

    model, found = Model(read_model(arguments.run), "cpu"), {}
    project = model.encode_images if what == "images" else model.encode_texts
    vectors = {name: np.asarray(worker.ask(0), np.float32) for name, worker in workers.items()}
    vectors |= {name: project(vectors[name]) for name in RIVALS[what]}
    for name, made in vectors.items():
        found[name] = float((made * vectors[OURS]).sum(1).min())
        if found[name] < ALIKE:
            raise BadInput(f"{name} encodes other {what} than Model (cosine {found[name]:.3f}): not comparable")
    return found


def measure(arguments: Arguments, what: str) -> dict[str, Any]:
    """One modality: that all encode the same, the rounds, then the memory."""
    names = list(CONTESTANTS[what])
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            workers[name] = start(arguments, what, name)
        alike = compare(arguments, what, workers)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for i in track(range(arguments.rounds), what, console=Console(stderr=True)):
            for name in names if i % 2 == 0 else reversed(names):
                times[name].append(workers[name].ask(arguments.items))
    finally:
        for worker in workers.values():
            worker.close()
    record: dict[str, Any] = {
        name: {clock: spread([t[clock] for t in times[name]]) for clock in ("cpu_ms", "wall_ms")} for name in names
    }
    many = arguments.memory_pictures if what == "images" else arguments.memory_texts
    for name in names:
        record[name]["cosine"] = alike[name]
        if many and name in (OURS, RIVALS[what][0]):
            worker = start(arguments, what, name)
            took = worker.ask(many)
            worker.close()
            record[name] |= {key: took[key] for key in ("peak_mib", "more_mib")}
    record["fastest_rival"] = best = min(RIVALS[what], key=lambda name: record[name]["cpu_ms"]["median"])
    pairs = zip(times[OURS], times[best], strict=True)
    record["ratio"] = spread([rival["cpu_ms"] / ours["cpu_ms"] for ours, rival in pairs])
    return record


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="one core, an item", title_justify="left")
    for column in ("", "", "processor ms", "wall ms", "peak MiB", "more MiB"):
        table.add_column(column, justify="right" if column else "left")
    for what, record in results.items():
        for name in CONTESTANTS[what]:
            row, memory = record[name], ("peak_mib", "more_mib")
            clocks = [f"{row[clock]['median']:.2f}" for clock in ("cpu_ms", "wall_ms")]
            table.add_row(what, name, *clocks, *(f"{row[key]:.0f}" if key in row else "–" for key in memory))
        ratio, name = record["ratio"], f"{record['fastest_rival']} / {OURS}"
        shown = f"x{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
        table.add_row(what, name, shown, "", "", "", end_section=True)
    Console(width=110).print(table)


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        work(*sys.argv[2:])
        return
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.encode")
    results = {what: measure(arguments, what) for what in CONTESTANTS}
    show(results)
    asked = {name: getattr(arguments, name) for name in ("items", "rounds", "memory_pictures", "memory_texts")}
    print(write_results(arguments.name, {**asked, **results}))


if __name__ == "__main__":
    run_main(main)
