"""The frame of a page, and figures in it."""

from __future__ import annotations

import html
import io
import math
import re
from typing import Any

from cycler import cycler
from matplotlib.figure import Figure

# Mid-tones that keep their contrast on a light and on a dark page.
COLOURS = ["#3b82c4", "#d9792b", "#3f9d63", "#c9496b", "#8b6cc9", "#a8853a", "#2a9fa8", "#b064b8", "#7f8a3c", "#c2604a"]
# Ink and grid lines stand in for CSS variables, so that figures follow the page's light or dark scheme.
INK, LINE = "#010203", "#040506"
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
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
CSS = """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--ink:#22252b;--soft:#636976;--line:#e2e0da;--accent:#2f6fad;
--good:#2f8f57;--bad:#c4453f;--tint:#eef4fa}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--ink:#e6e7ea;--soft:#9aa1ad;--line:#343943;
--accent:#7db4e6;--good:#55b97e;--bad:#e5736c;--tint:#22303f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:48px 24px 96px}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:1rem;margin:28px 0 8px}
p{margin:4px 0 16px;max-width:76ch}
.read{color:var(--soft);font-size:.95rem}
.lead{color:var(--soft);font-size:1.05rem;margin:0 0 20px}
.chips{display:flex;flex-wrap:wrap;gap:8px;margin:0;padding:0;list-style:none;font-size:.85rem}
.chips li{border:1px solid var(--line);background:var(--card);border-radius:999px;padding:3px 12px;
overflow-wrap:anywhere}
.chips b{font-weight:600;color:var(--soft);margin-right:6px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px 28px;margin-top:24px}
figure{margin:0}
svg{width:100%;height:auto;display:block}
svg text{font-family:inherit!important}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
thead th{font-weight:600;color:var(--soft);font-size:.78rem}
thead tr:first-child th{border-bottom:none;padding-bottom:0;color:var(--ink)}
th[scope=colgroup]{text-align:left}
th.group,td.group{border-left:1px solid var(--line)}
tbody th{font-weight:500}
tr.model{background:var(--tint)}
tr.model th{font-weight:700}
td.best{font-weight:700;color:var(--accent)}
.row{display:grid;grid-template-columns:148px 1fr;gap:16px;padding:14px 0;border-top:1px solid var(--line);
align-items:start}
.row .note{font-size:.78rem;color:var(--soft);margin-top:4px;line-height:1.35}
.found{display:grid;grid-template-columns:repeat(8,minmax(0,1fr));gap:8px;margin:0;padding:0;list-style:none}
.found.text{grid-template-columns:repeat(4,minmax(0,1fr))}
@media(max-width:760px){.found{grid-template-columns:repeat(4,minmax(0,1fr))}
.found.text{grid-template-columns:repeat(2,minmax(0,1fr))}section{padding:20px 16px}.row{grid-template-columns:1fr}}
.tile{border:2px solid var(--line);border-radius:8px;overflow:hidden;background:var(--page);position:relative;
min-height:64px;font-size:.8rem;line-height:1.35}
.tile img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#fff}
.tile div{margin:6px 8px 18px;overflow-wrap:break-word;display:-webkit-box;-webkit-line-clamp:6;
-webkit-box-orient:vertical;overflow:hidden}
.tile.query{border-color:var(--accent)}
.tile.good{border-color:var(--good)}
.tile.bad{border-color:var(--bad)}
.mark{position:absolute;right:0;bottom:0;color:#fff;font-size:.68rem;line-height:1;padding:3px 6px;
border-radius:6px 0 0 0;font-weight:700}
.good .mark{background:#2f8f57}
.bad .mark{background:#c4453f}
details{margin-top:24px;border:1px solid var(--line);border-radius:14px;background:var(--card);padding:14px 28px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:12px 0 4px}
"""


def section(title: str, read: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p class=read>{read}</p>{''.join(parts)}</section>"


def svg(figure: Any, alt: str) -> str:
    """The figure as inline SVG in the page's colours, with `alt` for readers that do not see it."""
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
    svg = f'<svg {box.group()} role="img" aria-label="{html.escape(alt)}"' + svg[svg.index(">") :]
    return f"<figure>{svg}</figure>"


def grid(count: int, columns: int, height: float, rows: int | None = None, **share: Any) -> tuple[Any, list[Any]]:
    """A figure of the page's width and its axes in reading order; those beyond `count` are hidden."""
    columns = min(columns, max(count, 1))
    rows = rows or math.ceil(count / columns)
    figure = Figure(figsize=(10.2, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes
