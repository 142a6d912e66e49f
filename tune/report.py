"""OUTPUT/report.html of a search: best trials, confirmation, importance, parallel coordinates, learning curves."""

from __future__ import annotations

import html
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap

from cmgan_dist.report.page import COLOURS, CSS, INK, STYLE, grid, section, svg
from tune.results import FAILED, STOPPED, Confirmed, Importance, TrialResult, front, position, ranked, show_value
from tune.space import Space

SHOWN = 15
"""Trials in the table."""
RAMP = LinearSegmentedColormap.from_list("ramp", ["#9aa4b0", COLOURS[0], COLOURS[1]])


def search_report(
    title: str,
    facts: dict[str, Any],
    records: list[TrialResult],
    space: Space,
    confirmed: list[Confirmed],
    found: Importance | None,
    test: dict[str, Any],
) -> str:
    """The page. `test`: {"name", "seeds", "scores" {metric: [mean, std]}} of the best setting, or empty."""
    with mpl.rc_context(STYLE):
        sections = [
            _trial_table(records, space),
            _confirmed_section(confirmed, test),
            _importance_section(found),
            _parallel_section(records, space),
            _curve_section(records),
            _failed_section(records),
        ]
    chips = "".join(f"<li><b>{html.escape(k)}</b>{html.escape(str(v))}</li>" for k, v in facts.items())
    body = "".join(sections) or "<section><p>No trial has reached its first validation.</p></section>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body><main>'
        f"<header><h1>{html.escape(title)}</h1><p class=lead>A search over loss weights and learning rates: what was "
        f"tried and what it found.</p><ul class=chips>{chips}</ul></header>{body}</main></body></html>\n"
    )


def _table(head: list[str], rows: list[list[str]], marked: int | None = None) -> str:
    top = "".join(f"<th scope=col>{html.escape(h)}</th>" for h in head)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(c)}</td>" for c in row[1:])
        body += f"<tr{' class=model' * (i == marked)}><th scope=row>{html.escape(row[0])}</th>{cells}</tr>"
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _trial_table(records: list[TrialResult], space: Space) -> str:
    best = ranked(records)
    if not best:
        return ""
    unbeaten = front(records)
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
    stopped = sum(r.status == STOPPED for r in records)
    read = (
        f"The best {len(rows)} of {len(records)} trials by their best validation score (one seed, so the first places "
        f"are flattered by luck); {stopped} were stopped early. The trial named preset has the preset's own values. "
        "● is on the Pareto front of both directions: no other trial is better in one and not worse in the other."
    )
    return section("Best trials", read, _table(head, rows, 0))


def _confirmed_section(confirmed: list[Confirmed], test: dict[str, Any]) -> str:
    if not confirmed and not test:
        return ""
    order = sorted(confirmed, key=lambda c: -c.mean)
    rows = [[c.name, f"{c.mean:.4f} ± {c.std:.4f}", " ".join(f"{s:.4f}" for s in c.scores)] for c in order]
    parts = [_table(["trial", "validation", "by seed"], rows, 0)] if rows else []
    if test:
        lines = [[k, f"{mean:.4f} ± {std:.4f}"] for k, (mean, std) in test["scores"].items()]
        parts.append(f"<h3>Test split, trial {html.escape(test['name'])}</h3>" + _table(["", "mean"], lines))
    read = (
        "The best trials, and the preset, trained again from seeds that the search did not use: mean ± standard "
        "deviation. The first row became best.yaml. The test split was read once, after that choice, for it alone."
        if rows
        else "The test split was read once, at the end, for the best trial alone."
    )
    return section("Confirmation", read, *parts)


def _importance_section(found: Importance | None) -> str:
    if found is None:
        return ""
    figure, (axis,) = grid(1, 1, 0.9 + 0.3 * len(found.shares))
    names, shares = list(found.shares), list(found.shares.values())
    bars = axis.barh(names, shares, height=0.62)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.margins(x=0.12)
    axis.set_xlabel("growth of the prediction's squared error when shuffled, as a share of the variance of the scores")
    read = (
        f"A random forest predicts the score at epoch {found.epoch:.3g}, which all {found.trials} trials reached; "
        f"shown is how much worse it predicts trials that it was not fitted on when one value is shuffled. Around 0: "
        f"no effect to be seen. It explains {100 * max(found.r2, 0):.0f} % of the variance of unseen trials"
        + (": too little to trust the order." if found.r2 < 0.2 else ".")
    )
    return section("Importance", read, svg(figure, "Importance of each value, most important first."))


def _parallel_section(records: list[TrialResult], space: Space) -> str:
    best = ranked(records)
    if len(best) < 2:
        return ""
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
    return section("All trials", read, svg(figure, "Values of all trials as lines over parallel axes."))


def _curve_section(records: list[TrialResult]) -> str:
    best = ranked(records)
    if not best:
        return ""
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
    return section("Learning curves", read, svg(figure, "Validation score over epochs, one line per trial."))


def _failed_section(records: list[TrialResult]) -> str:
    failed = [[r.name, r.failed] for r in records if r.status == FAILED]
    return section("Failed trials", "Recorded, not fatal.", _table(["trial", "why"], failed)) if failed else ""
