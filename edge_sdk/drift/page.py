"""What a replay saw, as one HTML file that needs nothing else: charts are SVG within it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np

from edge_sdk.drift.replay import BUDGETS, Raised, Replay, Strip, Trace
from edge_sdk.page import document, runs, soft
from edge_sdk.types import AnyArray, DoubleArray

_WIDTH, _HEIGHT, _STRIP = 760, 150, 64
_POINTS = 600
_FLOOR = 1e-4
"""Evidence below this share of the threshold is drawn at the bottom."""
_CEILING = 10.0
_WARNING = 0.05
_STRIPS = 24
_NAMED = 0.15
"""A value of a category with a smaller share is named where the pointer rests only."""

_EVIDENCE = """Evidence of each monitor as a share of its threshold, on a scale of powers of ten. At the dashed line
the alarm is raised; it stays up until it is cleared. The dotted line is the warning."""
_BUDGETS = "The row of the first alarm, had you tolerated more or fewer false alarms a day."
_FEATURES = """Grey: where the middle 80 % of the reference lie. Blue: the same of the stream, with its median. Below:
the share that is missing. Of a category: the shares of its values, with lines where they usually end. Those that
carried an alarm come first, then those that moved most."""


def page(found: Replay) -> str:
    """A whole HTML document."""
    title = f"Drift replay of {found.data}"
    settings = found.settings
    shown = (
        f"{found.rows:,} rows in blocks of {settings.block_rows}, against {found.reference_rows:,} normal rows of "
        f"{found.reference}."
    )
    toml = (
        f"[drift]\nalarms_per_day = {settings.alarms_per_day:g}\nrows_per_day = {settings.rows_per_day:.6g}\n"
        f"block_rows = {settings.block_rows}"
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        soft(shown),
        _verdict(found),
        "<h2>Alarms</h2>",
        _alarms(found.alarms),
        "<h2>Evidence</h2>",
        soft(_EVIDENCE, small=True),
        *(_evidence(name, trace, found) for name, trace in found.traces.items()),
        "<h2>Other budgets</h2>",
        soft(_BUDGETS, small=True),
        _budgets(found),
        "<h2>Settings</h2>",
        f"<p>For <code>device.toml</code>:</p>\n<pre>{toml}</pre>",
        "<h2>Features</h2>",
        soft(_FEATURES, small=True),
        *(_strip(strip, found) for strip in found.strips[:_STRIPS]),
        _rest(found),
    ]
    return document(title, parts)


def _verdict(found: Replay) -> str:
    length, lived = found.run_length, found.rows / found.run_length
    settings = found.settings
    pace = f"{settings.alarms_per_day:g} false alarms a day and {settings.rows_per_day:,.0f} rows a day"
    budget = (
        f"At {pace}, one false alarm is to be expected in {length:,.0f} rows; this stream is {_times(lived)} that long."
    )
    seen = f"{len(found.alarms)} alarms were raised." if len(found.alarms) != 1 else "One alarm was raised."
    said = [f"<p><strong>{seen if found.alarms else 'No alarm was raised.'}</strong> {escape(budget)}</p>"]
    if found.caveat:
        said.append(soft(f"{found.caveat[:1].upper()}{found.caveat[1:]}."))
    return "\n".join(said)


def _times(share: float) -> str:
    return f"{share:.1f} times" if share >= 0.1 else f"{share:.2g} times"


def _alarms(alarms: Sequence[Raised]) -> str:
    if not alarms:
        return '<p class="ok">None.</p>'
    rows = [
        f'<tr><td class="number">{a.row:,}</td><td>{_when(a.time)}</td><td class="alarm">{escape(a.monitor)}</td>'
        f'<td>{escape(a.kind)}</td><td>{escape(a.words)}<div class="soft small">{escape(a.carried)}</div></td></tr>'
        for a in alarms
    ]
    names = ("time", "monitor", "kind", "what is the matter, and what carried it")
    head = f'<tr><th class="number">row</th>{"".join(f"<th>{name}</th>" for name in names)}</tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _when(time: float | None) -> str:
    return "" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"


# ---- charts


def _evidence(name: str, trace: Trace, found: Replay) -> str:
    ends, values = _thinned(found.ends, trace.evidence)
    top, bottom = math.log10(_CEILING), math.log10(_FLOOR)

    def y(share: float) -> float:
        inside = min(_CEILING, max(_FLOOR, share))
        return 8 + (_HEIGHT - 30) * (top - math.log10(inside)) / (top - bottom)

    x = [_x(end, found.rows) for end in ends]
    marks = [
        f'<line class="{kind}" x1="40" x2="{_WIDTH}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        f'<text x="34" y="{y(level) + 4:.1f}" text-anchor="end">{text}</text>'
        for kind, level, text in (("limit", 1.0, "alarm"), ("level", _WARNING, "warn"))
    ]
    marks += [
        f'<line class="raised" x1="{_x(a.row, found.rows):.1f}" x2="{_x(a.row, found.rows):.1f}" y1="8" '
        f'y2="{_HEIGHT - 22}"><title>alarm at row {a.row}: {escape(a.words)}</title></line>'
        for a in found.alarms
        if a.monitor == name
    ]
    line = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in zip(x, values, strict=True))
    most = max(trace.evidence, default=0.0)
    label = f"{escape(name)}: most evidence {most:.3g} of the threshold"
    return (
        f"<h3>{escape(name)}</h3>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'{"".join(marks)}<polyline class="trace" points="{line}"/>{_axis(found, _HEIGHT - 18)}</svg>'
    )


def _axis(found: Replay, y: float) -> str:
    parts = [f'<line class="grid" x1="40" x2="{_WIDTH}" y1="{y}" y2="{y}"/>']
    for i in range(5):
        row = round(found.rows * i / 4)
        anchor = ("start", "middle", "middle", "middle", "end")[i]
        text = f"{row:,}" if i else "row 0"
        if found.times and i in (0, 4):
            text += f" ({_when(found.times[0 if i == 0 else -1])[:16]})"
        parts.append(f'<text x="{_x(row, found.rows):.1f}" y="{y + 14}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _strip(strip: Strip, found: Replay) -> str:
    parts = len(strip.missing)
    if np.isnan(strip.quantiles).all():
        return f'<h3>{escape(strip.name)}</h3><p class="soft small">always missing</p>'
    x = [_x(found.rows * (i + 0.5) / parts, found.rows) for i in range(parts)]
    width = (_WIDTH - 40) / parts
    drawn = _shares(strip, x) if strip.categories else _values(strip, x)
    drawn += [
        f'<rect class="missing" x="{x[i] - width / 2:.1f}" width="{width + 0.2:.1f}" y="{_STRIP - 8 * share - 1:.1f}" '
        f'height="{8 * share:.1f}"><title>{share:.0%} missing</title></rect>'
        for i, share in enumerate(strip.missing)
        if share > 0
    ]
    drawn += [
        f'<line class="raised" x1="{_x(a.row, found.rows):.1f}" x2="{_x(a.row, found.rows):.1f}" y1="2" '
        f'y2="{_STRIP - 2}"><title>{escape(a.monitor)} alarm at row {a.row}</title></line>'
        for a in found.alarms
        if strip.name in a.suspects
    ]
    moved = "largest change of a share" if strip.categories else "mean moved, in usual spreads:"
    said = f"{moved} {strip.shift:+.2f}"
    missing = float(strip.missing.mean())
    if missing > 0 or strip.usually_missing > 0:
        said += f"; {missing:.1%} missing (usually {strip.usually_missing:.1%})"
    return (
        f'<h3>{escape(strip.name)} <span class="soft small">{said}</span></h3>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_STRIP}" role="img" aria-label="{escape(strip.name)}: {said}">'
        f"{''.join(drawn)}</svg>"
    )


def _values(strip: Strip, x: Sequence[float]) -> list[str]:
    """The middle 80 % of a number over the stream, before that of the reference."""
    known = strip.quantiles[~np.isnan(strip.quantiles)]
    ends = [float(end) for end in (*strip.usual, *np.quantile(known, (0.01, 0.99))) if not math.isnan(end)]
    low, high = min(ends), max(ends)
    margin = (high - low or abs(high) or 1.0) * 0.15
    bottom, top = low - margin, high + margin

    def y(value: float) -> float:
        return 4 + (_STRIP - 14) * (top - min(top, max(bottom, value))) / (top - bottom)

    drawn = [
        f'<text x="34" y="{place}" text-anchor="end">{_short(value)}</text>'
        for place, value in ((12, high), (_STRIP - 12, low))
    ]
    if not math.isnan(strip.usual[0]):
        drawn.append(
            f'<rect class="usual" x="40" width="{_WIDTH - 40}" y="{y(strip.usual[2]):.1f}" '
            f'height="{max(1.0, y(strip.usual[0]) - y(strip.usual[2])):.1f}"/>'
        )
    for run in runs(~np.isnan(strip.quantiles[0])):
        upper = [f"{x[i]:.1f},{y(strip.quantiles[2, i]):.1f}" for i in run]
        lower = [f"{x[i]:.1f},{y(strip.quantiles[0, i]):.1f}" for i in reversed(run)]
        middle = " ".join(f"{x[i]:.1f},{y(strip.quantiles[1, i]):.1f}" for i in run)
        drawn.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
        drawn.append(f'<polyline class="trace" points="{middle}"/>')
    return drawn


def _shares(strip: Strip, x: Sequence[float]) -> list[str]:
    """The shares of a category's values over the stream, stacked; a line where each would usually end."""
    height, drawn = _STRIP - 14, []
    ends = np.cumsum(strip.shares, axis=0)
    usual = np.cumsum([share for _, share in strip.categories])
    for place, (value, share) in enumerate(strip.categories):
        if not strip.shares[place].any() and not share:
            continue
        upper = ends[place]
        lower = upper - strip.shares[place]
        there = [f"{a:.1f},{4 + height * (1 - b):.1f}" for a, b in zip(x, upper, strict=True)]
        back = [f"{a:.1f},{4 + height * (1 - b):.1f}" for a, b in zip(reversed(x), lower[::-1], strict=True)]
        told = f"{value}: {strip.shares[place].mean():.1%} (usually {share:.1%})"
        kind = "others" if place == len(strip.categories) - 1 else f"share{place % 2}"
        drawn.append(
            f'<polygon class="{kind}" points="{" ".join(there + back)}"><title>{escape(told)}</title></polygon>'
        )
        y = 4 + height * (1 - float(usual[place]))
        drawn.append(f'<line class="level" x1="40" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if strip.shares[place].mean() > _NAMED:
            middle = 4 + height * (1 - float((upper + lower).mean()) / 2)
            drawn.append(f'<text x="34" y="{middle + 4:.1f}" text-anchor="end">{escape(value[:5])}</text>')
    return drawn


def _rest(found: Replay) -> str:
    said = []
    if len(found.strips) > _STRIPS:
        said.append(f"{len(found.strips) - _STRIPS} features that moved less are not drawn.")
    if found.left_out:
        said.append(f"Columns that are not watched: {', '.join(found.left_out)}.")
    return soft(" ".join(said), small=True) if said else ""


def _budgets(found: Replay) -> str:
    names = list(found.traces)
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    rows = []
    for budget in sorted({*BUDGETS, found.settings.alarms_per_day}):
        first = found.first_alarms(budget)
        cells = "".join(
            f'<td class="number">{"-" if (row := first[name]) is None else f"{row:,}"}</td>' for name in names
        )
        chosen = " (chosen)" if budget == found.settings.alarms_per_day else ""
        rows.append(f"<tr><td>{budget:g} a day{chosen}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th>false alarms</th>{head}</tr>{"".join(rows)}</table></div>'


def _x(row: float, rows: int) -> float:
    return 40 + (_WIDTH - 40) * row / max(1, rows)


def _thinned(ends: Sequence[int], values: Sequence[float]) -> tuple[AnyArray, DoubleArray]:
    """At most 600 points; of neighbours the largest counts, so that no peak is lost."""
    step = max(1, math.ceil(len(values) / _POINTS))
    starts = np.arange(0, len(values), step)
    last = np.minimum(starts + step, len(values)) - 1
    return np.asarray(ends)[last], np.maximum.reduceat(np.asarray(values, np.float64), starts)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"
