"""What an evaluation says first: the measures that a terminal, a page and a model card show, and who is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODEL = "CM-GAN"
"""Name of the row that shows the run itself."""
END = "{} end"
"""Name of a row that shows the run by the shares of another objective."""
ON_TRAINED = "{} on its features"
"""Name of a baseline's row where the model itself has trained the features that the baseline takes."""
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
"""Titles of the two directions of retrieval, by the names that metrics bear."""

Rows = list[tuple[str, dict[str, Any]]]
"""Rows of an evaluation: a name, and the metrics by their keys."""


@dataclass(frozen=True)
class Column:
    """One measure of an evaluation: its group, its title in the group, its key in the metrics, and how it is shown."""

    group: str
    title: str
    key: str
    percent: bool = False

    @property
    def label(self) -> str:
        """Return group and title in one, such as ``MAP image→text`` and ``R@1 image→text %``."""
        measure = self.group.split(",")[0].replace("Recall", "R" + self.title)
        return (f"{measure} %" if self.percent else f"{measure} {self.title}").replace(" → ", "→")

    def show(self, value: float | None) -> str:
        """Return MAP as .123, recall as 12.3 (percent), and – for what is not there."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}".replace("0.", ".", 1)


def headline(evaluation: dict[str, Any]) -> tuple[list[Column], Rows]:
    """Return the columns that any row has, and the rows: the model, its other ends, then the baselines, chance last."""
    baselines = dict(evaluation.get("baselines") or {})
    if evaluation.get("trained_features"):
        baselines = {name if name == "chance" else ON_TRAINED.format(name): row for name, row in baselines.items()}
    chance = {"chance": baselines.pop("chance")} if "chance" in baselines else {}
    ends = [(END.format(end), metrics) for end, metrics in (evaluation.get("ends") or {}).items()]
    rows = [(MODEL, evaluation.get("metrics") or {}), *ends, *baselines.items(), *chance.items()]
    columns = [
        *(Column("MAP", title, f"map/{name}") for name, title in DIRECTIONS.items()),
        Column("MAP", "mean", "map/mean"),
        Column("MAP, all-modal", "image → all", "map/image_to_all_without_query"),
        Column("MAP, all-modal", "text → all", "map/text_to_all_without_query"),
        *(
            Column(f"Recall {title}, %", f"@{k}", f"recall/{name}@{k}", percent=True)
            for name, title in DIRECTIONS.items()
            for k in (1, 5, 10)
        ),
    ]
    return [c for c in columns if any(row.get(c.key) is not None for _, row in rows)], rows
