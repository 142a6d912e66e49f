"""The sections of a report that show how training went: validation, losses, discriminators."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from cmgan_dist.report.page import COLOURS, INK, Section, grid, svg
from cmgan_dist.retrieval.headline import DIRECTIONS


def _series(lines: list[dict[str, Any]], key: str, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples, values) of `key`, averaged in at most `points` equal groups so that long runs stay readable."""
    kept = [(line["samples"], line[key]) for line in lines if line.get(key) is not None]
    x, y = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    groups = np.array_split(np.arange(len(x)), min(points, len(x)) or 1)
    return np.array([x[g].mean() for g in groups if len(g)]), np.array([y[g].mean() for g in groups if len(g)])


def _tree(lines: list[dict[str, Any]], prefix: str) -> dict[str, list[str]]:
    """Return {NAME: [REST]} of the keys ``prefix/NAME/REST`` of all lines, in order of appearance."""
    tree: dict[str, dict[str, None]] = {}
    for line in lines:
        for key in line:
            parts = key.split("/", 2)
            if parts[0] == prefix and len(parts) > 1:
                tree.setdefault(parts[1], {}).setdefault(parts[2] if len(parts) > 2 else "", None)
    return {name: list(rest) for name, rest in tree.items()}


def _samples_axis(axis: Any) -> None:
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("samples seen")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _measure(val: list[dict[str, Any]]) -> tuple[str, dict[str, str], list[dict[str, Any]]]:
    """Return what validation is drawn by: "MAP" or "recall", titles by metric key (the mean last), and the lines.

    It is MAP where any line has it, else recall, whose mean is added to the lines."""
    if any(line.get("map/mean") is not None for line in val):
        keys = {f"map/{name}": title for name, title in DIRECTIONS.items()}
        return "MAP", keys | {"map/mean": "mean"}, val
    keys = {f"recall/{name}@{k}": f"{title}, @{k}" for name, title in DIRECTIONS.items() for k in (1, 10)}
    lines = []
    for line in val:
        values = [line[key] for key in keys if line.get(key) is not None]
        lines.append(line | {"recall/mean": sum(values) / len(values)} if values else line)
    return "recall", keys | {"recall/mean": "mean"}, lines


def validation_section(val: list[dict[str, Any]]) -> Section | None:
    """Return the curves of the validations over training, or None when there are none."""
    measure, titles, lines = _measure(val)
    mean = list(titles)[-1]
    drawn = {key: title for key, title in titles.items() if any(line.get(key) is not None for line in lines)}
    if not drawn:
        return None
    figure, (axis,) = grid(1, 1, 3.3)
    for key, title in drawn.items():
        x, y = _series(lines, key, points=len(lines))
        size, width = (3.5, 2.2) if key == mean else (2.5, 1.2)
        axis.plot(x, y, label=title, marker="o", markersize=size, linewidth=width)
    best = max((line for line in lines if line.get(mean) is not None), key=lambda line: line[mean])
    samples, value = best["samples"], best[mean]
    axis.plot(samples, value, marker="*", markersize=16, color=COLOURS[3], linestyle="none", label="best")
    axis.annotate(f"{value:.3f}", (samples, value), (0, 10), textcoords="offset points", ha="center")
    axis.margins(y=0.18)
    axis.set_ylabel(measure)
    _samples_axis(axis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    read = (
        f"{measure[0].upper() + measure[1:]} on the validation split while training. The star marks the best mean; a "
        "curve that falls after it says that the rest of the training fitted the training set only. The test split has "
        "no part in it."
    )
    alt = f"Validation {measure} over training: best mean {value:.3f} after {samples:,} samples."
    return Section("Validation", read, [svg(figure, alt)])


def loss_section(train: list[dict[str, Any]]) -> Section | None:
    """Return the terms of each phase's loss over training, or None when none was recorded."""
    phases = _tree(train, "loss")
    if not phases:
        return None
    figure, axes = grid(len(phases), 3, 3.6)
    for axis, (phase, terms) in zip(axes, phases.items(), strict=False):
        for term in terms:
            key = f"loss/{phase}/{term}" if term else f"loss/{phase}"
            axis.plot(*_series(train, key), label=_words(term) or "total")
        axis.set_title(phase)
        _samples_axis(axis)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2)  # below: it would cover curves
    read = (
        "One panel per phase of the training loop, one line per term of its loss. A discriminator's loss and the "
        "adversarial term of the generator that faces it move against each other: neither should run to zero, or "
        "nothing is left to learn from."
    )
    alt = f"Losses of the phases {', '.join(phases)} over samples seen."
    return Section("Losses", read, [svg(figure, alt)])


def discriminator_section(train: list[dict[str, Any]]) -> Section | None:
    """Return accuracy and margin of each discriminator over training, or None when none was recorded."""
    margins = _tree(train, "margin")
    accuracies = {name: groups for name, groups in _tree(train, "accuracy").items() if {"real", "fake"} <= {*groups}}
    if not accuracies:
        return None
    columns = len(accuracies)
    figure, axes = grid(columns * 2 if margins else columns, columns, 2.5, rows=2 if margins else 1, sharex=True)
    colours = {"real": COLOURS[2], "fake": COLOURS[3], "mismatched": COLOURS[5]}
    for column, (name, groups) in enumerate(accuracies.items()):
        axis = axes[column]
        axis.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
        for group in groups:
            axis.plot(*_series(train, f"accuracy/{name}/{group}"), color=colours.get(group), label=_words(group))
        axis.set_title(name)
        axis.set_ylim(-0.03, 1.03)
        if name in margins:
            lower = axes[columns + column]
            lower.axhline(0, color=INK, linewidth=0.8, linestyle=":")
            lower.plot(*_series(train, f"margin/{name}"), color=COLOURS[4])
        _samples_axis(axes[columns + column] if margins else axis)
    axes[0].set_ylabel("accuracy")
    axes[max(range(columns), key=lambda c: len(list(accuracies.values())[c]))].legend(loc="lower left")
    if margins:
        axes[columns].set_ylabel("margin (logits)")
    read = (
        "Above: the share of real, fake and mismatched inputs that each discriminator judges rightly. Below: "
        "its mean logit for real minus that for fake. Near 0.5 and 0 it cannot tell them apart; at 1 with a growing "
        "margin it has won, and its gradient says little to the generator."
    )
    alt = f"Accuracy and margin of the discriminators {', '.join(accuracies)} over samples seen."
    return Section("Discriminators", read, [svg(figure, alt)])
