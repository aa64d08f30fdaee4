"""What every page that is drawn here shares: one HTML file that needs nothing else, with charts as SVG within it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from edge_sdk.types import AnyArray

WIDTH = 760
LEFT = 40
"""Where charts begin; labels of the axis stand left of it."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #d8dde6; --paper: #ffffff; --card: #f6f7f9;
  --trace: #2f6fde; --band: #2f6fde33; --usual: #8a94a633; --alarm: #c9302c; --warn: #b7791f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #333b49; --paper: #12161d;
  --card: #1a202a; --trace: #7aa7f7; --band: #7aa7f733; --usual: #98a2b32b; --alarm: #f1716b; --warn: #e2b04a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .2rem; font-weight: 600; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .small { font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; } td.number, th.number { text-align: right; }
.alarm { color: var(--alarm); font-weight: 600; } .ok { color: var(--soft); }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); } .trace { fill: none; stroke: var(--trace); stroke-width: 1.5; }
.limit { stroke: var(--alarm); stroke-dasharray: 5 3; } .level { stroke: var(--warn); stroke-dasharray: 2 3; }
.raised { stroke: var(--alarm); } .band { fill: var(--band); } .usual { fill: var(--usual); }
.share0 { fill: var(--band); } .share1 { fill: var(--usual); } .others { fill: var(--alarm); opacity: .6; }
.missing { fill: var(--warn); } svg .tag { fill: var(--alarm); }
.c0 { --trace: #2f6fde; } .c1 { --trace: #c2571a; } .c2 { --trace: #2a8a4a; } .c3 { --trace: #8a4bbf; }
.c4 { --trace: #a88400; } .c5 { --trace: #0f8b8d; } .c6 { --trace: #b83280; } .c7 { --trace: #6b7280; }
.c0 .band, .c1 .band, .c2 .band, .c3 .band, .c4 .band, .c5 .band, .c6 .band, .c7 .band { fill: var(--trace);
  opacity: .18; } .key { stroke: var(--trace); stroke-width: 3; }
"""
COLOURS = 8


def document(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document of parts that are HTML; empty ones are left out."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def soft(text: str, *, small: bool = False) -> str:
    """A paragraph that explains."""
    return f'<p class="soft{" small" if small else ""}">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table of plain texts; the columns after the first `words` ones hold numbers."""

    def cell(tag: str, place: int, text: str) -> str:
        number = ' class="number"' if place >= words else ""
        return f"<{tag}{number}>{escape(text)}</{tag}>"

    lines = ["".join(cell("th", i, text) for i, text in enumerate(head))]
    lines += ["".join(cell("td", i, text) for i, text in enumerate(row)) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def runs(flags: AnyArray) -> list[list[int]]:
    """Places of each run of true values."""
    places = np.flatnonzero(flags)
    return [list(map(int, run)) for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(run)]


def band(xs: Sequence[float], middle: Sequence[float], low: Sequence[float], high: Sequence[float], kind: str) -> str:
    """A line in a band, in points of the drawing; NaN leaves gaps. `kind`: its class."""
    drawn = []
    for run in runs(~np.isnan(np.asarray(middle, float))):
        upper = [f"{xs[i]:.1f},{high[i]:.1f}" for i in run]
        lower = [f"{xs[i]:.1f},{low[i]:.1f}" for i in reversed(run)]
        line = " ".join(f"{xs[i]:.1f},{middle[i]:.1f}" for i in run)
        drawn.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
        drawn.append(f'<polyline class="trace" points="{line}"/>')
    return f'<g class="{kind}">{"".join(drawn)}</g>'


def finite(values: Sequence[float | None]) -> list[float]:
    """The same with NaN for what is unknown."""
    return [math.nan if value is None else value for value in values]
