"""Tables of a page, and the table of an evaluation for a page and for the terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmgan_dist.errors import shown
from cmgan_dist.report.page import Section, render
from cmgan_dist.retrieval.headline import END, MODEL, Column, Rows, headline


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, and the CSS classes that it is drawn with."""

    text: str
    classes: str = ""


def html_table(
    head: Sequence[str | Cell],
    rows: Sequence[Sequence[str | Cell]],
    marked: int | None = None,
    groups: Sequence[tuple[str, int]] = (),
) -> Markup:
    """Return a table whose first column names the rows.

    The row number `marked` is tinted. `groups` are titles over so many columns each, from the second column on."""

    def cells(row: Sequence[str | Cell]) -> list[Cell]:
        return [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]

    return render("table.html", head=cells(head), rows=[cells(row) for row in rows], marked=marked, groups=groups)


def _best(column: Column, rows: Rows) -> float:
    return max((row[column.key] for _, row in rows if row.get(column.key) is not None), default=math.nan)


def results_table(evaluation: dict[str, Any], console: Console | None = None) -> None:
    """Print the headline table of an evaluation.json; the best value of each measure is bold."""
    columns, rows = headline(evaluation)
    source = " ".join(shown(str(evaluation[name])) for name in ("data", "split") if evaluation.get(name) is not None)
    title = f"Retrieval on {escape(source)}" if source else "Retrieval"
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name, _ in rows:
        ours = name == MODEL or name.endswith(END.format(""))
        words = escape(name).replace(" ", "\n")  # so that none is cut on a terminal of 80 columns
        table.add_column(words, justify="right", style="cyan" if ours else None)
    for column, following in zip(columns, [*columns[1:], None], strict=True):
        best = _best(column, rows)
        cells = []
        for _, row in rows:
            value = row.get(column.key)
            text = column.show(value)
            cells.append(f"[bold]{text}[/bold]" if value == best else text)
        last = following is None or following.group != column.group
        table.add_row(column.label, *cells, end_section=last)
    (console or Console()).print(table)


READ_MAP = (
    "MAP is the mean average precision over the whole ranking: 1 when everything of the query's class comes before "
    "everything else. In the all-modal columns the gallery holds images and texts together, without the query. "
)
READ_RECALL = (
    "Recall@K is the share of queries whose own partner is among the first K. "
    "Chance is the exact expectation of a random ranking; the other rows are linear models on the same features, "
    "their settings chosen on the validation split. The best value of a column is coloured."
)


READ_TRAINED = (
    " The features of {} are of a backbone that this run has trained, with its labels where there are any: what a "
    "baseline reaches on them is no result without the model."
)


def headline_section(evaluation: dict[str, Any]) -> Section | None:
    """Return the same table for a page, or None when nothing was measured."""
    columns, rows = headline(evaluation)
    if not columns:
        return None
    grouped = [(group, list(members)) for group, members in itertools.groupby(columns, lambda c: c.group)]
    first = {members[0].key for _, members in grouped}

    def cell(column: Column, text: str, *classes: str) -> Cell:
        return Cell(text, " ".join(["group"] * (column.key in first) + list(classes)))

    best = {c.key: _best(c, rows) for c in columns}
    body: list[list[str | Cell]] = []
    for name, row in rows:
        values = [(c, row.get(c.key)) for c in columns]
        body.append([name, *(cell(c, c.show(v), *["best"] * (v == best[c.key])) for c, v in values)])
    table = html_table(
        ["", *(cell(c, c.title) for c in columns)],
        body,
        marked=0,
        groups=[(group, len(members)) for group, members in grouped],
    )
    trained = " and ".join(evaluation.get("trained_features") or [])
    noted = READ_TRAINED.format(trained) if trained else ""
    map_is_shown = any(not c.percent for c in columns)
    return Section("Results", (READ_MAP if map_is_shown else "") + READ_RECALL + noted, [table])
