"""The best settings trained again from new seeds, and the setting that is kept."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from cmgan_dist.config.fields import Config
from tune.options import Arguments
from tune.results import (
    Confirmed,
)
from tune.space import (
    apply_values,
)
from tune.storage import Output
from tune.tuner import INTERRUPT, run_tuner


def confirm(
    arguments: Arguments, config: Config, output: Output, trainable: Any, settings: list[tuple[str, dict[str, Any]]]
) -> tuple[list[Confirmed], dict[str, list[Any]], bool]:
    """Train each (name, values) from new seeds: (means, Tune's results by name, whether it was interrupted)."""
    from ray.tune import grid_search

    seeds = [config.train.seed + 1 + k for k in range(arguments.confirm)]
    runs = [(name, values | {"train.seed": seed}) for name, values in settings for seed in seeds]
    concurrent = {"max_concurrent_trials": arguments.concurrent} if arguments.concurrent else {}
    space = {"values": grid_search([values for _, values in runs])}
    pairs = run_tuner("confirm", output, trainable, concurrent, space, len(runs), arguments.checkpoint_every)
    if INTERRUPT.seen:
        return [], {}, True
    results: dict[str, list[Any]] = {name: [] for name, _ in settings}
    scores: dict[str, list[float]] = {name: [] for name, _ in settings}
    for (name, expected), (trial, result) in zip(runs, pairs, strict=True):
        assert trial.config["values"] == expected
        fine = trial.status == "TERMINATED"
        scores[name].append(float(trial.last_result["best"]) if fine else 0.0)
        results[name] += [result] if fine else []
    out = [Confirmed(n, values, scores[n], [r.checkpoint.path for r in results[n]]) for n, values in settings]
    return sorted(out, key=lambda c: -c.mean), results, False


def test_scores(runs: list[Path], split: str) -> dict[str, list[float]]:
    """{metric: [mean, standard deviation]} of the runs' best generators on `split`."""
    from cmgan_dist.retrieval.evaluate import evaluate

    found: dict[str, list[float]] = {}
    for run in runs:
        for key, value in evaluate(run, split=split).items():
            if isinstance(value, float):
                found.setdefault(key, []).append(value)
    return {k: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for k, v in found.items()}


def best_config(config: Config, values: dict[str, Any], preset_config: Config) -> Config:
    """The setting as a config for launchers/train.py: the preset's checkpoints, tracker, report and threads again."""
    best = apply_values(config, {k: v for k, v in values.items() if k != "train.seed"})
    best.train.keep, best.train.tracker = preset_config.train.keep, preset_config.train.tracker
    best.train.report, best.train.threads = preset_config.train.report, preset_config.train.threads
    return best
