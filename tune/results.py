"""What a search found: the result of each trial, the importance of each value, the confirmed settings, the table."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tune.space import Space

ENDED, STOPPED, FAILED, UNFINISHED = "ended", "stopped early", "failed", "unfinished"
"""Status of a trial: trained to its end, stopped by the scheduler, failed, or cut by an interruption."""


@dataclass
class TrialResult:
    """What is kept of one trial: its values, how it ended, its scores and its cost."""

    name: str
    values: dict[str, Any]
    """Values by config path."""
    status: str
    """One of ENDED, STOPPED, FAILED and UNFINISHED."""
    best: float = 0.0
    """Best validation score."""
    image_to_text: float = 0.0
    """MAP of this direction at the best validation score."""
    text_to_image: float = 0.0
    """MAP of this direction at the best validation score."""
    epochs: float = 0.0
    """Position of the last validation in epochs."""
    seconds: float = 0.0
    """Time in the trial's process, set-up and waiting for its turn to go on included."""
    step_seconds: float = 0.0
    """The part of `seconds` in which the trial trained and validated."""
    node: str = ""
    """First letters of the id of the node that it ran on."""
    failed: str = ""
    """The sentence that says why it failed; "" when it did not."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(epoch, validation score) of each validation."""


def ranked(trials: list[TrialResult]) -> list[TrialResult]:
    """Return the trials that have validated and not failed, best first."""
    return sorted((r for r in trials if r.status != FAILED and r.curve), key=lambda r: -r.best)


def front(trials: list[TrialResult]) -> set[str]:
    """Return the names of the trials that no other beats in both directions at once: the Pareto front."""
    usable = ranked(trials)
    return {
        r.name
        for r in usable
        if not any(
            o.image_to_text >= r.image_to_text
            and o.text_to_image >= r.text_to_image
            and (o.image_to_text, o.text_to_image) != (r.image_to_text, r.text_to_image)
            for o in usable
        )
    }


def best_so_far(curve: list[tuple[float, float]], epoch: float) -> float | None:
    """Return the best score up to `epoch`, or None when the trial did not get that far."""
    if not curve or curve[-1][0] < epoch - 1e-6:
        return None
    scores = [score for at, score in curve if at <= epoch + 1e-6]
    return max(scores) if scores else None


# ---------------------------------------------------------------------------------------------- importance


def position(spec: Any, value: Any) -> float:
    """Return the place of a value in its range, 0 to 1, logarithmic where the range is.

    It is beyond these ends for a preset's value that lies outside of the range."""
    if isinstance(spec, list):
        return spec.index(value) / max(1, len(spec) - 1) if value in spec else -0.1
    ((name, (low, high)),) = spec.items()
    if not low <= value <= high:
        return -0.1 if value < low else 1.1
    if name == "log":
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


@dataclass
class Importance:
    """How much worse a forest predicts the scores of unseen trials when one value is shuffled among them."""

    shares: dict[str, float]
    """Loss of R2 by shuffling a value, by config path, mean over folds; about 0, or below, for what does not matter."""
    r2: float
    """R2 of the prediction for unseen trials; near 0 or below, the shares say nothing."""
    trials: int
    """Number of trials that the forest was fitted on."""
    epoch: float
    """The trials are compared at this epoch, which all of them reached."""


def importance(trials: list[TrialResult], space: Space) -> Importance | None:
    """Return the importance of each value, or None with fewer than 10 trials or when all of them score the same.

    A random forest predicts the scores from the places of the values in their ranges; importance by permutation is
    measured on folds that it was not fitted on (Breiman, 2001)."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    usable = [r for r in trials if r.curve and r.status != FAILED]
    if len(usable) < 10:
        return None
    epoch = min(r.curve[-1][0] for r in usable)
    paths = list(space)
    x = np.array([[position(space[p], r.values[p]) for p in paths] for r in usable])
    y = np.array([best_so_far(r.curve, epoch) for r in usable], dtype=np.float64)
    if np.ptp(y) == 0:
        return None
    predicted, drops = np.empty_like(y), []
    for train, test in KFold(5, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(200, min_samples_leaf=2, random_state=0).fit(x[train], y[train])
        predicted[test] = forest.predict(x[test])
        permuted = permutation_importance(
            forest, x[test], y[test], scoring="neg_mean_squared_error", n_repeats=10, random_state=0
        )
        drops.append(permuted.importances_mean / y.var())
    r2 = 1 - float(((y - predicted) ** 2).mean() / y.var())
    shares = dict(zip(paths, np.mean(drops, 0).tolist(), strict=True))
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), r2, len(usable), epoch)


# ---------------------------------------------------------------------------------------------- confirmation


@dataclass
class Confirmed:
    """One setting, trained again once per seed."""

    name: str
    """Name of the trial that found it."""
    values: dict[str, Any]
    """Values by config path."""
    scores: list[float]
    """Best validation score by seed; those of failed runs are 0."""
    checkpoints: list[str] = field(default_factory=list)
    """Folders of the runs, in the file system of the output."""

    @property
    def mean(self) -> float:
        """Return the mean of the scores over the seeds."""
        return statistics.mean(self.scores)

    @property
    def std(self) -> float:
        """Return the sample standard deviation of the scores over the seeds, 0 for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


# ---------------------------------------------------------------------------------------------- table


def show_value(value: Any) -> str:
    """Return a value as text, numbers with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_mean(mean: float, std: float, seeds: int) -> str:
    """Return the mean over so many seeds as text, with its standard deviation where several seeds give one."""
    return f"{mean:.4f} ± {std:.4f}" if seeds > 1 else f"{mean:.4f}"


def show_table(trials: list[TrialResult], confirmed: list[Confirmed], console: Console, most: int = 10) -> None:
    """Print the `most` best trials and how they were confirmed, the values of the first three, and what failed."""
    best = ranked(trials)[:most]
    table = Table(title=f"The best of {len(trials)} trials", title_justify="left", title_style="bold")
    for name in ("trial", "validation", "I→T", "T→I", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    if confirmed:
        table.add_column("over seeds", justify="right", no_wrap=True)
    means = {c.name: show_mean(c.mean, c.std, len(c.scores)) for c in confirmed}
    for r in best:
        cells = [r.name, f"{r.best:.4f}", f"{r.image_to_text:.4f}", f"{r.text_to_image:.4f}", f"{r.epochs:.0f}"]
        table.add_row(*cells, *([means.get(r.name, "")] if confirmed else []))
    console.print(table)
    for r in best[:3]:
        values = "  ".join(f"{path.rpartition('.')[2]} {show_value(v)}" for path, v in r.values.items())
        console.print(f"trial {r.name}: {values}", highlight=False, soft_wrap=True)
    for r in trials:
        if r.failed:
            console.print(f"trial {r.name} failed: {r.failed}", highlight=False, soft_wrap=True)


def trials_json(
    trials: list[TrialResult], confirmed: list[Confirmed], found: Importance | None, extra: dict[str, Any]
) -> str:
    """Return everything that the report shows as JSON for other programs, after the entries of `extra`."""
    content = {
        **extra,
        "trials": [dataclasses.asdict(r) for r in trials],
        "confirmed": [dataclasses.asdict(c) | {"mean": c.mean, "std": c.std} for c in confirmed],
        "importance": dataclasses.asdict(found) if found else None,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
