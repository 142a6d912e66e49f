"""What a search brings: its best setting against the preset over new seeds, ASHA against random settings at the same
number of epochs, and what the search itself costs.

    python -m bench.search --preset openmoji --data data/openmoji-features [--trials 40] [--confirm 5]

Runs `tune/search.py` as a user calls it, in --work; what is finished there is not done again. The random search gets as
many whole trials as ASHA trained epochs. The test split is read for the best setting and, to compare, for the preset,
after validation alone has chosen. Writes bench/results/search-PRESET.json.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from bench.common import write_results
from cmgan_dist.config.cli import parse
from cmgan_dist.config.markers import Range
from cmgan_dist.errors import EXIT_DONE, BadInput, run_main
from tune.confirm import test_scores

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("name", "values", "scores", "mean", "std")
"""What is published of a confirmed setting."""
MEASURES = ("map/image_to_text", "map/text_to_image", "map/mean")
"""Metrics of the test split that are published."""


@dataclass
class Arguments:
    """Search from a preset with ASHA and with random settings, and compare."""

    data: Path
    """Folder of shards with classes."""
    preset: str = "openmoji"
    """Preset to start from."""
    trials: Annotated[int, Range(1, 1e6)] = 40
    """Settings that ASHA tries."""
    reduction: Annotated[int, Range(2, 1e6)] = 3
    """One in this many goes on at each rung."""
    confirm: Annotated[int, Range(1, 1e6)] = 5
    """Seeds of the best settings and the preset."""
    confirm_top: Annotated[int, Range(1, 1e6)] = 2
    """Settings that are confirmed beside the preset."""
    work: Path = Path("runs/search")
    """Where the searches are kept."""
    name: str = ""
    """Of the results file in bench/results/ (when left out: search-PRESET)."""


def search(arguments: Arguments, name: str, *extra: str) -> dict[str, Any]:
    """Return trials.json of the search WORK/PRESET/`name`, which is run, or gone on with, unless it has ended.

    `extra` are words of its command line. Raises BadInput when it does not end well."""
    folder = arguments.work / arguments.preset / name
    file = folder / "trials.json"
    if not file.is_file() or json.loads(file.read_text())["interrupted"]:
        command = [sys.executable, str(ROOT / "tune" / "search.py"), "--preset", arguments.preset]
        command += ["--data", str(arguments.data), "--output", str(folder), "--resume", *extra]
        code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        if code != EXIT_DONE:
            raise BadInput(f"the search in {folder} ended with {code}: see above, then start again")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def spread(values: list[float]) -> list[float]:
    """Return [mean, sample standard deviation], the latter 0 for one value."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the budget, the cost and the best trial of a search from its trials.json."""
    timing, trials = found["timing"], found["trials"]
    best = max(trials, key=lambda t: t["best"])
    return {
        "trials": len(trials),
        "failed": sum(t["status"] == "failed" for t in trials),
        "epochs": sum(t["epochs"] for t in trials),
        "best_validation_one_seed": best["best"],
        "best_values": best["values"],
        "search_s": None if timing["resumed"] else timing["search_s"],
        "sum_of_trials_s": timing["trial_s"],
        "trials_at_a_time": timing["slots"],
        # of a search that was interrupted, only the last start's time is known
        "overhead": None if timing["resumed"] else timing["search_s"] * timing["slots"] / timing["trial_s"] - 1,
    }


def show(figures: dict[str, Any], confirmed: list[tuple[str, dict[str, Any], dict[str, Any]]], seeds: int) -> None:
    """Print (title, confirmed setting, its test scores) as a table, and what each search cost."""
    table = Table(title=f"{figures['preset']}: {seeds} new seeds", title_justify="left")
    for name in ("", "validation", *(f"test {m}" for m in MEASURES)):
        table.add_column(name)
    for title, entry, scores in confirmed:
        cells = [f"{scores[m][0]:.4f} ± {scores[m][1]:.4f}" for m in MEASURES]
        table.add_row(title, f"{entry['mean']:.4f} ± {entry['std']:.4f}", *cells)
    console = Console(width=140)
    console.print(table)
    for name in ("asha", "random"):
        found = figures[name]
        console.print(
            f"{name}: {found['trials']} trials, {found['epochs']:.0f} epochs, best on one seed "
            f"{found['best_validation_one_seed']:.4f}, search {found['search_s'] or math.nan:.0f} s, "
            f"overhead {100 * (found['overhead'] or math.nan):.1f} %"
        )


def main() -> None:
    """Run both searches, compare them, and write and print the figures."""
    arguments = parse(Arguments, sys.argv[1:], prog="python -m bench.search")
    many = [f"--trials={arguments.trials}", f"--reduction={arguments.reduction}"]
    confirm = [f"--confirm={arguments.confirm}", f"--confirm-top={arguments.confirm_top}"]
    asha = search(arguments, "asha", *many, *confirm)
    whole = max(t["epochs"] for t in asha["trials"])
    count = max(1, round(sum(t["epochs"] for t in asha["trials"]) / whole))
    random = search(arguments, "random", f"--trials={count}", "--algorithm=random", "--no-test", *confirm)

    confirmed = {c["name"]: c for c in asha["confirmed"]}
    best, preset = confirmed[asha["best"]], confirmed["preset"]
    differences = [a - b for a, b in zip(best["scores"], preset["scores"], strict=True)]
    test = {"best": asha["test"]["scores"]}
    if best is not preset:
        test["preset"] = test_scores([Path(p) for p in preset["checkpoints"]], "test")
    figures = {
        "preset": arguments.preset,
        "asha": summary(asha),
        "random": summary(random) | {"confirmed": [{k: c[k] for k in KEYS} for c in random["confirmed"]]},
        "confirmed": [{k: c[k] for k in KEYS} for c in asha["confirmed"]],
        "best": asha["best"],
        "gain_on_validation": spread(differences),
        "test": {name: {m: scores[m] for m in MEASURES} for name, scores in test.items()},
        "importance": asha["importance"],
    }
    preset_scores = test.get("preset", test["best"])
    rows = [(f"trial {asha['best']}", best, test["best"]), ("preset", preset, preset_scores)]
    show(figures, rows, arguments.confirm)
    print(f"written to {write_results(arguments.name or f'search-{arguments.preset}', figures)}")


if __name__ == "__main__":
    run_main(main)
