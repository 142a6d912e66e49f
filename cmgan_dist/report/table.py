"""The table of an evaluation, for a page and for the terminal."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cmgan_dist.report.page import section

MODEL = "CM-GAN"
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


@dataclass
class Column:
    group: str
    title: str
    key: str
    percent: bool = False

    def show(self, value: float | None) -> str:
        """MAP as .123, recall as 12.3 (percent), – for what is not there."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}".replace("0.", ".", 1)


def _headline(evaluation: dict[str, Any]) -> tuple[list[Column], list[tuple[str, dict[str, Any]]]]:
    """Columns that any row has, and rows (name, metrics): the model, baselines, chance last."""
    baselines = dict(evaluation.get("baselines") or {})
    chance = {"chance": baselines.pop("chance")} if "chance" in baselines else {}
    rows = [(MODEL, evaluation.get("metrics") or {}), *baselines.items(), *chance.items()]
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


def _best(column: Column, rows: list[tuple[str, dict[str, Any]]]) -> float:
    return max((row[column.key] for _, row in rows if row.get(column.key) is not None), default=math.nan)


def results_table(evaluation: dict[str, Any], console: Console | None = None) -> None:
    """Print the headline table of an evaluation.json; the best value of each column is bold."""
    columns, rows = _headline(evaluation)
    where = " ".join(str(evaluation[name]) for name in ("data", "split") if evaluation.get(name) is not None)
    table = Table(title=f"Retrieval on {where}" if where else "Retrieval", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name, _ in rows:
        table.add_column(name, justify="right", style="cyan" if name == MODEL else None)
    for column, following in zip(columns, [*columns[1:], None], strict=True):
        best = _best(column, rows)
        cells = []
        for _, row in rows:
            value = row.get(column.key)
            text = column.show(value)
            cells.append(f"[bold]{text}[/bold]" if value == best else text)
        last = following is None or following.group != column.group
        measure = column.group.split(",")[0].replace("Recall", "R" + column.title) + (" %" if column.percent else "")
        label = measure if column.percent else f"{measure} {column.title}"
        table.add_row(label.replace(" → ", "→"), *cells, end_section=last)
    (console or Console()).print(table)


def _headline_section(evaluation: dict[str, Any]) -> str:
    columns, rows = _headline(evaluation)
    if not columns:
        return ""
    groups: dict[str, int] = defaultdict(int)
    for column in columns:
        groups[column.group] += 1
    first = {next(c.key for c in columns if c.group == group) for group in groups}
    top = "".join(f"<th class=group colspan={count} scope=colgroup>{group}</th>" for group, count in groups.items())
    head = "".join(f"<th scope=col{' class=group' * (c.key in first)}>{c.title}</th>" for c in columns)
    body = ""
    for name, row in rows:
        cells = ""
        for column in columns:
            value = row.get(column.key)
            kinds = " ".join(["group"] * (column.key in first) + ["best"] * (value == _best(column, rows)))
            cells += f'<td class="{kinds}">{column.show(value)}</td>'
        body += f"<tr{' class=model' * (name == MODEL)}><th scope=row>{html.escape(name)}</th>{cells}</tr>"
    table = (
        f"<div class=scroll><table><thead><tr><th></th>{top}</tr><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    read = (
        "MAP is the mean average precision over the whole ranking: 1 when everything of the query's class comes before "
        "everything else. In the all-modal columns the gallery holds images and texts together, without the query. "
        if any(not c.percent for c in columns)
        else ""
    )
    read += (
        "Recall@K is the share of queries whose own partner is among the first K. "
        "Chance is the exact expectation of a random ranking; the other rows are linear models on the same features, "
        "their settings chosen on the validation split. The best value of a column is coloured."
    )
    return section("Results", read, table)
