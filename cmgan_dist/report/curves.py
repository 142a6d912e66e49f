"""How a run went: validation, losses, discriminators."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from cmgan_dist.report.page import COLOURS, INK, grid, section, svg
from cmgan_dist.report.table import DIRECTIONS


def _series(lines: list[dict[str, Any]], key: str, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """(samples, values) of `key`, averaged in at most `points` equal groups so that long runs stay readable."""
    kept = [(line["samples"], line[key]) for line in lines if line.get(key) is not None]
    x, y = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    groups = np.array_split(np.arange(len(x)), min(points, len(x)) or 1)
    return np.array([x[g].mean() for g in groups if len(g)]), np.array([y[g].mean() for g in groups if len(g)])


def _tree(lines: list[dict[str, Any]], prefix: str) -> dict[str, list[str]]:
    """``prefix/NAME/REST`` keys of all lines: NAME -> [REST] in order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        for key in line:
            parts = key.split("/", 2)
            if parts[0] == prefix and len(parts) > 1:
                found.setdefault(parts[1], {}).setdefault(parts[2] if len(parts) > 2 else "", None)
    return {name: list(rest) for name, rest in found.items()}


def _samples_axis(axis: Any) -> None:
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("samples seen")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _validation_section(val: list[dict[str, Any]]) -> str:
    keys = {f"map/{name}": title for name, title in DIRECTIONS.items()} | {"map/mean": "mean"}
    name = "MAP"
    if not any(line.get("map/mean") is not None for line in val):
        keys = {f"recall/{d}@{k}": f"{title}, @{k}" for d, title in DIRECTIONS.items() for k in (1, 10)}
        name = "recall"
        for line in val:
            values = [line[key] for key in keys if line.get(key) is not None]
            if values:
                line["recall/mean"] = sum(values) / len(values)
        keys["recall/mean"] = "mean"
    drawn = {key: title for key, title in keys.items() if any(line.get(key) is not None for line in val)}
    if not drawn:
        return ""
    best_key = list(keys)[-1]
    figure, (axis,) = grid(1, 1, 3.3)
    for key, title in drawn.items():
        x, y = _series(val, key, points=len(val))
        mean = key == best_key
        axis.plot(x, y, label=title, marker="o", markersize=3.5 if mean else 2.5, linewidth=2.2 if mean else 1.2)
    best = max((line for line in val if line.get(best_key) is not None), key=lambda line: line[best_key])
    axis.plot(
        best["samples"], best[best_key], marker="*", markersize=16, color=COLOURS[3], linestyle="none", label="best"
    )
    axis.annotate(
        f"{best[best_key]:.3f}", (best["samples"], best[best_key]), (0, 10), textcoords="offset points", ha="center"
    )
    axis.margins(y=0.18)
    axis.set_ylabel(name)
    _samples_axis(axis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    alt = f"Validation {name} over training: best mean {best[best_key]:.3f} after {best['samples']:,} samples."
    read = (
        f"{name[0].upper() + name[1:]} on the validation split while training. The star marks the best mean; a curve "
        "that falls after it says that the rest of the training fitted the training set only. The test split has no "
        "part in it."
    )
    return section("Validation", read, svg(figure, alt))


def _loss_section(train: list[dict[str, Any]]) -> str:
    phases = _tree(train, "loss")
    if not phases:
        return ""
    figure, axes = grid(len(phases), 3, 2.8)
    for axis, (phase, terms) in zip(axes, phases.items(), strict=False):
        for term in terms:
            key = f"loss/{phase}/{term}" if term else f"loss/{phase}"
            axis.plot(*_series(train, key), label=_words(term) or "total")
        axis.set_title(phase)
        _samples_axis(axis)
        axis.legend()
    read = (
        "One panel per phase of the training loop, one line per term of its loss. A discriminator's loss and the "
        "adversarial term of the generator that faces it move against each other: neither should run to zero, or "
        "nothing is left to learn from."
    )
    return section("Losses", read, svg(figure, f"Losses of the phases {', '.join(phases)} over samples seen."))


def _discriminator_section(train: list[dict[str, Any]]) -> str:
    margins = _tree(train, "margin")
    accuracies = {name: groups for name, groups in _tree(train, "accuracy").items() if {"real", "fake"} <= {*groups}}
    if not accuracies:
        return ""
    columns = len(accuracies)
    figure, axes = grid(columns * 2 if margins else columns, columns, 2.5, rows=2 if margins else 1, sharex=True)
    colours = {"real": COLOURS[2], "fake": COLOURS[3], "wrong": COLOURS[5]}
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
        "Above: the share of real, fake and mismatched (wrong) inputs that each discriminator judges rightly. Below: "
        "its mean logit for real minus that for fake. Near 0.5 and 0 it cannot tell them apart; at 1 with a growing "
        "margin it has won, and its gradient says little to the generator."
    )
    alt = f"Accuracy and margin of the discriminators {', '.join(accuracies)} over samples seen."
    return section("Discriminators", read, svg(figure, alt))
