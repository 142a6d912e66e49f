"""The best settings trained again from new seeds, and the setting that is kept."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from cmgan_dist.config.fields import Config
from cmgan_dist.config.paths import with_values
from cmgan_dist.data.store import FileStore
from tune.options import Arguments
from tune.record import Record, read_records
from tune.results import Confirmed
from tune.space import Space
from tune.tuner import INTERRUPT, make_trainable, run_tuner


def confirm(
    arguments: Arguments, config: Config, space: Space, output: FileStore, settings: list[tuple[str, dict[str, Any]]]
) -> tuple[list[Confirmed], dict[str, list[Record]], bool]:
    """Train each (name, values) of `settings` from --confirm new seeds.

    Returns the settings with their scores, best mean first, the records of the runs that ended by the name of the
    setting, and whether it was interrupted; then there are neither settings nor records."""
    from ray.tune import grid_search

    seeds = [config.train.seed + 1 + k for k in range(arguments.confirm)]
    runs = [(name, values | {"train.seed": seed}) for name, values in settings for seed in seeds]
    known = {number: record for number, record in read_records(output, "confirm").items() if number < len(runs)}
    for number, record in list(known.items()):
        if record.values != runs[number][1]:  # others were the best when it was trained
            del known[number]
    left = [number for number in range(len(runs)) if number not in known or not known[number].finished]
    concurrent = {"max_concurrent_trials": arguments.concurrent} if arguments.concurrent else {}
    trainable = make_trainable(config, arguments, space, output, known)
    param_space = {"values": grid_search([runs[number][1] for number in left])}
    run_tuner("confirm", output, trainable, concurrent, param_space, left, known, arguments.checkpoint_every)
    if INTERRUPT.seen:
        return [], {}, True
    records: dict[str, list[Record]] = {name: [] for name, _ in settings}
    scores: dict[str, list[float]] = {name: [] for name, _ in settings}
    for number, (name, _) in enumerate(runs):
        ended = number in known and known[number].finished and not known[number].failed
        scores[name].append(known[number].last["best"] if ended else 0.0)
        records[name] += [known[number]] if ended else []
    places = {name: [f"{output.path}/{record.checkpoint}" for record in found] for name, found in records.items()}
    confirmed = [Confirmed(name, values, scores[name], places[name]) for name, values in settings]
    return sorted(confirmed, key=lambda c: -c.mean), records, False


def test_scores(runs: list[Path], split: str) -> dict[str, list[float]]:
    """Return {metric: [mean, standard deviation]} of the runs' best generators on `split`."""
    from cmgan_dist.retrieval.evaluate import evaluate

    found: dict[str, list[float]] = {}
    for run in runs:
        for key, value in evaluate(run, split=split).items():
            if isinstance(value, float):
                found.setdefault(key, []).append(value)
    return {k: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for k, v in found.items()}


def best_config(config: Config, values: dict[str, Any], preset_config: Config) -> Config:
    """Return `config` with the values of a setting, for launchers/train.py.

    Checkpoints, tracker, report and threads are those of the preset again."""
    best = with_values(config, {k: v for k, v in values.items() if k != "train.seed"})
    best.train.keep, best.train.tracker = preset_config.train.keep, preset_config.train.tracker
    best.train.report, best.train.threads = preset_config.train.report, preset_config.train.threads
    return best
