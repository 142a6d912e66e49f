"""The frame of a report, filled from templates that escape every value, and the figures in it.

A report is one HTML file that asks nothing of another host: templates/page.html with templates/style.css inlined, and
figures as inline SVG. Text becomes part of a page in two ways only: through a template, which escapes it, or in a
figure, where matplotlib does.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cycler import cycler
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from cmgan_dist.errors import shown

# Mid-tones that keep their contrast on a light and on a dark page.
COLOURS = ["#3b82c4", "#d9792b", "#3f9d63", "#c9496b", "#8b6cc9", "#a8853a", "#2a9fa8", "#b064b8", "#7f8a3c", "#c2604a"]
# Ink and grid lines stand in for CSS variables, so that figures follow the page's light or dark scheme.
INK, LINE = "#010203", "#040506"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a class name or a key may hold and no page can."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Section:
    """A card of a page: its title, a paragraph that says how to read it, and what it shows, in order."""

    title: str
    read: str
    parts: list[Markup]


@functools.cache
def _environment() -> Environment:
    """Return the templates, which escape every value that is not `Markup`."""
    loader = PackageLoader("cmgan_dist.report")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )


def render(template: str, **values: Any) -> Markup:
    """Return templates/`template` filled with `values`, as markup that another template takes as it is."""
    return Markup(_environment().get_template(template).render(**values))


def render_page(
    title: str,
    lead: str,
    facts: dict[str, Any],
    sections: Iterable[Section | None],
    when_empty: str,
    config: str | None = None,
) -> str:
    """Return the whole HTML file of a report.

    `lead` is the sentence below the title and `facts` are the chips below that. Sections that are None are left out;
    the sentence `when_empty` stands where no section is left. `config` is text to unfold at the end."""
    kept = [section for section in sections if section is not None]
    page = render(
        "page.html", title=title, lead=lead, facts=facts.items(), sections=kept, when_empty=when_empty, config=config
    )
    return CONTROL.sub(lambda found: shown(found[0]), str(page))


def svg(figure: Figure, alt: str) -> Markup:
    """Return the figure as inline SVG in the page's colours, with `alt` for readers that do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None}, dpi=180)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are unique in a figure only: the page holds several.
    prefix = re.sub(r"\W+", "-", alt[:40]).lower()
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = f'<svg {box.group()} role="img" aria-label="{escape(alt)}"' + svg[svg.index(">") :]
    return Markup(f"<figure>{svg}</figure>")


def grid(count: int, columns: int, height: float, rows: int | None = None, **share: Any) -> tuple[Figure, list[Any]]:
    """Return a figure of the page's width and its axes in reading order; those beyond `count` are hidden.

    `height` is that of one row, in inches."""
    columns = min(columns, max(count, 1))
    rows = rows or math.ceil(count / columns)
    figure = Figure(figsize=(10.2, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes
