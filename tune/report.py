"""OUTPUT/report.html of a search: best trials, confirmation, importance, parallel coordinates, learning curves."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap

from cmgan_dist.report.page import COLOURS, INK, STYLE, Section, grid, render_page, svg
from cmgan_dist.report.table import html_table
from tune.results import (
    FAILED,
    STOPPED,
    Confirmed,
    Importance,
    TrialResult,
    front,
    position,
    ranked,
    show_mean,
    show_value,
)
from tune.space import Space

SHOWN = 15
"""Trials in the table."""
RAMP = LinearSegmentedColormap.from_list("ramp", ["#9aa4b0", COLOURS[0], COLOURS[1]])
"""Colours of the trials' lines, from the worst to the best."""


def search_report(
    title: str,
    facts: dict[str, Any],
    trials: list[TrialResult],
    space: Space,
    confirmed: list[Confirmed],
    importance: Importance | None,
    test: dict[str, Any],
) -> str:
    """Return the page of a search; `facts` are the chips below its title.

    `test` is {"name", "seeds", "scores" {metric: [mean, standard deviation]}} of the best setting, or empty."""
    with mpl.rc_context(STYLE):
        sections = [
            trial_section(trials, space),
            confirmed_section(confirmed, test),
            importance_section(importance),
            parallel_section(trials, space),
            curve_section(trials),
            failed_section(trials),
        ]
    return render_page(
        title=title,
        lead="A search over loss weights and learning rates: what was tried and what it found.",
        facts=facts,
        sections=sections,
        when_empty="No trial has reached its first validation.",
    )


def trial_section(trials: list[TrialResult], space: Space) -> Section | None:
    """Return the table of the best trials, or None when none has validated."""
    best = ranked(trials)
    if not best:
        return None
    unbeaten = front(trials)
    head = ["trial", "validation", "I→T", "T→I", "epochs", *(p.rpartition(".")[2] for p in space)]
    rows = [
        [
            r.name + " ●" * (r.name in unbeaten),
            f"{r.best:.4f}",
            f"{r.image_to_text:.4f}",
            f"{r.text_to_image:.4f}",
            f"{r.epochs:.0f}",
        ]
        + [show_value(r.values[p]) for p in space]
        for r in best[:SHOWN]
    ]
    stopped = sum(r.status == STOPPED for r in trials)
    read = (
        f"The best {len(rows)} of {len(trials)} trials by their best validation score (one seed, so the first places "
        f"are flattered by luck); {stopped} were stopped early. The trial named preset has the preset's own values. "
        "● is on the Pareto front of both directions: no other trial is better in one and not worse in the other."
    )
    return Section("Best trials", read, [html_table(head, rows, marked=0)])


def confirmed_section(confirmed: list[Confirmed], test: dict[str, Any]) -> Section | None:
    """Return the scores of the confirmed settings and of the test split, or None when there are neither."""
    if not confirmed and not test:
        return None
    order = sorted(confirmed, key=lambda c: -c.mean)
    rows = [[c.name, show_mean(c.mean, c.std, len(c.scores)), " ".join(f"{s:.4f}" for s in c.scores)] for c in order]
    parts: list[Markup] = [html_table(["trial", "validation", "by seed"], rows, marked=0)] if rows else []
    if test:
        lines = [[k, show_mean(mean, std, test["seeds"])] for k, (mean, std) in test["scores"].items()]
        parts.append(Markup("<h3>Test split, trial {}</h3>").format(test["name"]))
        parts.append(html_table(["", "mean"], lines))
    read = (
        "The best trials, and the preset, trained again from seeds that the search did not use: mean (± standard "
        "deviation of several seeds). The first row became best.yaml. The test split was read once, after that choice, "
        "for it alone."
        if rows
        else "The test split was read once, at the end, for the best trial alone: one run, which nothing confirmed."
    )
    return Section("Confirmation" if rows else "Test", read, parts)


def importance_section(importance: Importance | None) -> Section | None:
    """Return the importance of each value as bars, or None when it is not known."""
    if importance is None:
        return None
    figure, (axis,) = grid(1, 1, 0.9 + 0.3 * len(importance.shares))
    names, shares = list(importance.shares), list(importance.shares.values())
    bars = axis.barh(names, shares, height=0.62)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.margins(x=0.12)
    axis.set_xlabel("growth of the prediction's squared error when shuffled, as a share of the variance of the scores")
    read = (
        f"A random forest predicts the score at epoch {importance.epoch:.3g}, which all {importance.trials} trials "
        "reached; shown is how much worse it predicts trials that it was not fitted on when one value is shuffled. "
        "Around 0: no effect to be seen. "
        f"It explains {100 * max(importance.r2, 0):.0f} % of the variance of unseen trials"
        + (": too little to trust the order." if importance.r2 < 0.2 else ".")
    )
    return Section("Importance", read, [svg(figure, "Importance of each value, most important first.")])


def parallel_section(trials: list[TrialResult], space: Space) -> Section | None:
    """Return the values of all trials as lines over parallel axes (Inselberg, 1985), or None for fewer than two."""
    best = ranked(trials)
    if len(best) < 2:
        return None
    low, high = best[-1].best, best[0].best
    figure, (axis,) = grid(1, 1, 5.0)
    columns = [*space, "score"]
    for r in reversed(best):
        share = (r.best - low) / (high - low or 1)
        places = [position(space[p], r.values[p]) for p in space] + [share]
        top = r is best[0]
        axis.plot(
            range(len(columns)),
            places,
            color=RAMP(share),
            linewidth=3 if top else 1.0,
            alpha=1.0 if top else 0.35 + 0.5 * share,
        )
    for at, path in enumerate(columns):
        spec = space.get(path)
        axis.axvline(at, color=INK, linewidth=0.6)
        if isinstance(spec, list):
            for value in spec:
                axis.text(at + 0.04, position(spec, value), str(value), fontsize=7.5, va="center")
            continue
        ends = next(iter(spec.values())) if isinstance(spec, dict) else (low, high)
        for y, value in zip((-0.04, 1.04), ends, strict=True):
            axis.text(at, y, f"{value:.3g}", fontsize=7.5, ha="center", va="center")
    names = [p.rpartition(".")[2] for p in columns]
    axis.set_xticks(range(len(columns)), names, rotation=35, ha="right", fontsize=8.5)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    read = (
        "Each line is a trial: where its values lie in their ranges (logarithmic where the search was) and, at the "
        "right, its best validation score. Orange is best; the thick line is the best trial."
    )
    return Section("All trials", read, [svg(figure, "Values of all trials as lines over parallel axes.")])


def curve_section(trials: list[TrialResult]) -> Section | None:
    """Return the validation scores of all trials over epochs, or None when none has validated."""
    best = ranked(trials)
    if not best:
        return None
    low, high = best[-1].best, best[0].best
    figure, (axis,) = grid(1, 1, 4.2)
    for r in reversed(best):
        share = (r.best - low) / (high - low or 1)
        style: dict[str, Any] = {"color": RAMP(share), "linewidth": 0.9, "alpha": 0.6}
        if r is best[0]:
            style |= {"linewidth": 2.6, "alpha": 1.0, "label": f"best, trial {r.name}"}
        if r.name == "preset":
            style |= {"linewidth": 2.0, "alpha": 1.0, "linestyle": "--", "label": "preset", "color": COLOURS[2]}
        axis.plot(*zip(*r.curve, strict=True), marker="o", markersize=2.5, **style)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation score")
    axis.legend(loc="lower right")
    read = "Validation score of each trial; a line that ends early was stopped because others did better by then."
    return Section("Learning curves", read, [svg(figure, "Validation score over epochs, one line per trial.")])


def failed_section(trials: list[TrialResult]) -> Section | None:
    """Return the table of the failed trials with their reasons, or None when none has failed."""
    failed = [[r.name, r.failed] for r in trials if r.status == FAILED]
    if not failed:
        return None
    return Section("Failed trials", "Recorded, not fatal.", [html_table(["trial", "why"], failed)])
