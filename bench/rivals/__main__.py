"""Ours beside published methods of cross-modal retrieval, all on the same features.

    python -m bench.rivals --data DIR [--data DIR2 ...] [--seeds 3] [--tries 12] [--ours PRESET]

Each rival (DSCMR, ACMR, CLIP4CMR's prototype loss, a CLIP projection, VSE++) is written from its paper and has the same
budget: `--tries` settings drawn at random, trained for at most `--epochs` and stopped early. Validation chooses the
settings, the epoch and the way to compare, by MAP for what learns classes, by the mean R@10 for what learns pairs. Then
it is trained anew from `--seeds` seeds, and the test split is read once a seed. Ours takes its preset as it is: one
setting in this run, found on the validation splits of such data before, and a scoring that validation chooses.
CCA, ridge, logistic regression and kernel ridge (our class head without the network) search their own grids. Methods
that need labels are left out where there are none.
Writes bench/results/NAME-DATA.json for each data set.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from bench.common import write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.fields import Count
from cmgan_dist.config.markers import Range
from cmgan_dist.config.presets import PRESETS, preset
from cmgan_dist.errors import BadInput, run_main

if TYPE_CHECKING:  # torch takes seconds to import, and --help waits
    from bench.rivals.training import Data

WAYS = ("image_to_text", "text_to_image")
RECALLS = tuple(f"recall/{way}@{k}" for way in WAYS for k in (1, 5, 10))
MAPS = ("map/image_to_text", "map/text_to_image", "map/mean")
Metrics = dict[str, Any]


@dataclass
class Arguments:
    """Train ours and its rivals on the same features and print mean and deviation over seeds of the test measures."""

    data: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Folder of shards of features; may be given again."""
    seeds: Count = 3
    """Trainings of each method, from seeds 0, 1, ..."""
    tries: Count = 12
    """Settings tried for each rival."""
    epochs: Count = 100
    """Most epochs of a rival."""
    ours: str = ""
    """Preset of ours; when left out, the one of the data set's name, else features, or pairs without labels."""
    threads: Annotated[int, Range(1, 4096)] = 1
    """Threads of every training."""
    work: Path = Path("runs/rivals")
    """Where our runs are kept."""
    name: str = "rivals"
    """First part of the results file's name; the data set's name is the other."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and sample deviation, the latter 0 for one value."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def row(runs: list[Metrics], seconds: list[float], **more: Any) -> dict[str, Any]:
    """Return a row of the table: each measure that the runs have over the seeds, and the time of a training."""
    kept = [m for m in (*MAPS, *RECALLS) if runs[0].get(m) is not None]
    measures = {m: spread([run[m] for run in runs]) for m in kept}
    return {"measures": measures, **({"processor_seconds": spread(seconds)} if seconds else {}), **more}


def preset_of(arguments: Arguments, data: Data) -> str:
    """Return the preset by which ours is trained on a data set."""
    if arguments.ours:
        return arguments.ours
    if data.name in PRESETS:
        return data.name
    return "features" if data.classes else "pairs"


def ours(folder: Path, data: Data, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Train ours as a user does; return a row for its vectors, and one for each other end that they can be made for."""
    from bench.rivals.training import processor_seconds
    from cmgan_dist.retrieval.evaluate import open_task, run_task
    from cmgan_dist.training.loop import train

    name = preset_of(arguments, data)
    found: dict[str, list[Metrics]] = {}
    seconds, objective = [], ""
    for seed in range(arguments.seeds):
        config = preset(name)
        config.data, config.output = str(folder), str(arguments.work / data.name / f"{name}-seed{seed}")
        config.train.seed, config.train.threads = seed, arguments.threads
        config.train.tracker, config.train.report = "none", False
        began = processor_seconds()
        if train(config, "never"):
            raise BadInput(f"the training in {config.output} was ended by a signal: start again")
        seconds.append(processor_seconds() - began)
        record = run_task(open_task(config.output), baselines=False).record
        objective = record["scoring"]["objective"]
        for end, metrics in {"": record["metrics"], **record["ends"]}.items():
            found.setdefault(end, []).append(metrics)
        say(f"ours, seed {seed}: {seconds[-1]:.1f} s")
    titles = {end: f"ours, made for {end}" if end else f"ours ({objective})" for end in found}
    return {titles[end]: row(runs, seconds, preset=name) for end, runs in found.items()}


def rival(name: str, data: Data, arguments: Arguments) -> dict[str, Any]:
    """Search, then train from every seed, and read the test split once a seed; return the row."""
    from bench.rivals.methods import METHODS
    from bench.rivals.training import embed, fit, measure, search

    method = METHODS[name]
    say(f"{data.name}: {name}")
    settings, score = search(method, data, arguments.tries, arguments.epochs, say)
    runs, seconds, ways = [], [], []
    for seed in range(arguments.seeds):
        fitted = fit(method, settings, data, seed, arguments.epochs)
        runs.append(measure(embed(fitted.model, data.scaled["test"]), fitted.way))
        seconds.append(fitted.seconds)
        ways.append(fitted.way)
    return row(runs, seconds, settings=settings, validation=score, ways=ways)


def class_head(data: Data) -> dict[str, dict[str, Any]]:
    """Return a row for the kernel classifiers that ours mixes with its network, by themselves; none without labels."""
    from cmgan_dist.models.scoring import posterior_of
    from cmgan_dist.retrieval.metrics import Embeddings, evaluate
    from cmgan_dist.training.class_head import fit_class_head

    train, val, test = (data.raw[split] for split in ("train", "val", "test"))
    if train.labels is None:
        return {}
    multi = bool((train.labels.sum(1) > 1).any())
    heads = fit_class_head(train, val, multi, 0, say)
    if heads is None:
        return {}
    image, text = posterior_of(heads["image"](test.image), multi), posterior_of(heads["text"](test.text), multi)
    metrics = evaluate(Embeddings(image, text, test.text_owner, test.labels), "inner")
    return {"kernel ridge (our class head alone)": row([metrics], [])}


def table_of(data: Data, rows: dict[str, dict[str, Any]], seeds: int) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(title=f"{data.name}: test split, mean ± deviation over {seeds} seeds", title_justify="left")
    table.add_column("")
    measures = [*(MAPS if data.classes else ()), *RECALLS]
    for measure_name in measures:
        short = measure_name.replace("image_to_text", "I→T").replace("text_to_image", "T→I")
        table.add_column(short.replace("/", "\n"), justify="right")
    table.add_column("processor\nseconds", justify="right")
    for name, values in rows.items():
        cells = [values["measures"].get(m) for m in measures]
        numbers = [f"{c['mean']:.3f}\n±{c['std']:.3f}" if c else "–" for c in cells]
        took = values.get("processor_seconds")
        table.add_row(name, *numbers, f"{took['mean']:.1f}\n±{took['std']:.1f}" if took else "–")
    return table


def compare(folder: Path, arguments: Arguments) -> None:
    """Do one data set: train, print the table, write the results."""
    from bench.rivals.methods import METHODS
    from bench.rivals.training import processor_seconds, read_data
    from cmgan_dist.retrieval.baselines import baseline_table, best_baselines

    data = read_data(folder)
    rows = ours(folder, data, arguments)
    for name, method in METHODS.items():
        if data.classes or not method.labelled:
            rows[name] = rival(name, data, arguments)
    say(f"{data.name}: baselines")
    began = processor_seconds()
    baselines = baseline_table(best_baselines(data.raw["train"], data.raw["val"]), data.raw["test"])
    say(f"  {processor_seconds() - began:.1f} s together, with their search")
    rows |= {name: row([metrics], [], settings=metrics.get("settings")) for name, metrics in baselines.items()}
    rows |= class_head(data)
    Console(width=160).print(table_of(data, rows, arguments.seeds))
    asked = {"seeds": arguments.seeds, "tries": arguments.tries, "epochs": arguments.epochs}
    path = write_results(f"{arguments.name}-{data.name}", {"data": data.name, **asked, "rows": rows})
    print(f"written to {path}", flush=True)


def main() -> None:
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.rivals")
    import torch

    torch.set_num_threads(arguments.threads)
    for folder in arguments.data:
        compare(folder, arguments)


if __name__ == "__main__":
    run_main(main)
