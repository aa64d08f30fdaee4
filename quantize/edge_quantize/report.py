"""A comparison as text for a terminal and as one HTML page that needs nothing else.

The page has no scripts and fetches nothing; charts are small inline SVG strips beside their numbers, so that text
keeps its size on a phone. Every name that comes from a model or its data is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_quantize.measure import Timing
from edge_quantize.metrics import Accuracy, Estimate, Score

if TYPE_CHECKING:
    from edge_quantize.compare import Comparison, Contrast, VariantResult

TITLES = {"int8": "INT8", "fp32": "FP32", "reference": "unsplit"}

Interval = Accuracy | Estimate
Cell = str | float
Grid = list[list[str]]


class _Metric(NamedTuple):
    """A figure of a score: its heading and how it is shown."""

    heading: str
    of: Callable[[Score], Interval | None]


_METRICS = (
    _Metric("accuracy", lambda score: score.accuracy),
    _Metric("Hamming loss", lambda score: score.hamming),
    _Metric("RMSE", lambda score: score.rmse),
    _Metric("MAE", lambda score: score.mae),
    _Metric("R²", lambda score: score.r2),
    _Metric("precision", lambda score: score.precision),
    _Metric("recall", lambda score: score.recall),
)
_MEANING = {
    "classification": "Accuracy: share of rows with the right label; of one label, of the rows that have it.",
    "multilabel": "Accuracy: share of rows with all labels right; of one label, of rows where it is rightly said or "
    "left out. Hamming loss: share of wrong decisions among all labels of all rows.",
    "regression": "Accuracy: share of rows with every target within its tolerance. RMSE and MAE are in the target's "
    "units.",
    "raw": "Outputs of a raw model are compared with each other; nothing says which are right.",
}
_INTERVALS = (
    "Intervals cover the truth in 95 of 100 repetitions: Wilson for shares, Newcombe for paired differences, "
    "bootstrap for the rest."
)


# ---- text


def render_text(comparison: Comparison, *, parts: bool = True) -> str:
    """Plain text for a terminal; with labels and slices one by one, or without."""
    words = [*_sentences(comparison), *_details(comparison)]
    blocks = [_aligned(_main_grid(comparison)), _aligned(_batch_grid(comparison)), *words]
    for heading, found in _parts(comparison) if parts else ():
        grid = _part_grid(found)
        grid[0][0] = heading
        blocks.append(_aligned(grid, texts=2))
    return "\n".join(block for block in blocks if block)


def _main_grid(comparison: Comparison) -> Grid:
    metrics = _shown(result.score for result in comparison.variants.values())
    results = comparison.variants
    first = next(iter(results.values()))
    headings = [heading for metric in metrics for heading in (metric.heading, "95 % interval")]
    headings += ["p50 ms", "p95 ms", "p99 ms", "size kB", *(["RSS MB", "peak MB"] if first.footprint else [])]
    grid = [["", *headings]]
    for name, result in results.items():
        row = [TITLES[name]]
        for metric in metrics:
            found = metric.of(result.score) if result.score else None
            row += [_number(found.value), _span(found)] if found else ["", ""]
        row += [*_milliseconds(result.timings[0]), f"{result.size_bytes / 1000:.1f}"]
        if result.footprint:
            row += [f"{result.footprint.loaded_mb:.1f}", f"{result.footprint.peak_mb:.1f}"]
        grid.append(row)
    return grid


def _batch_grid(comparison: Comparison) -> Grid:
    """Times of larger batches."""
    grid = []
    for i, timing in enumerate(next(iter(comparison.variants.values())).timings):
        if i:
            grid.append([f"batch of {timing.batch}", "p50 ms", "p95 ms", "p99 ms"])
            grid += [[TITLES[name], *_milliseconds(r.timings[i])] for name, r in comparison.variants.items()]
    return grid


def _sentences(comparison: Comparison) -> list[str]:
    """What the variants are to each other, in words."""
    return [
        f"{comparison.rows} rows; {comparison.task}; one thread",
        *(_contrast_line(comparison, contrast) for contrast in comparison.contrasts),
    ]


def _contrast_line(comparison: Comparison, contrast: Contrast) -> str:
    facts = []
    if contrast.agreement:
        facts.append(f"agreement {contrast.agreement.value:.3f} ({_span(contrast.agreement)})")
    if contrast.difference:
        difference = contrast.difference
        facts.append(
            f"accuracy {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}, "
            f"McNemar p {difference.p_value:.2g})"
        )
    if contrast.error_ratio:
        facts.append(f"RMSE x{contrast.error_ratio.value:.3f} ({_span(contrast.error_ratio)})")
    if contrast.shapes_differ:
        facts.append(f"outputs of {contrast.shapes_differ} calls differ in shape and are left out")
    facts.append(_speed_and_size(comparison, contrast))
    return f"{TITLES[contrast.first]} against {TITLES[contrast.second]}: " + "; ".join(facts)


def _details(comparison: Comparison) -> list[str]:
    """What the page shows in tables of its own."""
    lines = []
    for contrast in comparison.contrasts:
        ratios = [f"{_plain(name)} {_decibels(o.sqnr_db, o.equal)}" for name, o in contrast.outputs.items()]
        if ratios:
            lines.append(f"SQNR, {TITLES[contrast.first]} against {TITLES[contrast.second]}: {', '.join(ratios)}")
    footprints = [result.footprint for result in comparison.variants.values() if result.footprint]
    if footprints:
        lines.append(f"RSS is that of a process of its own; its imports alone take {footprints[0].imports_mb:.1f} MB")
    return lines


def _speed_and_size(comparison: Comparison, contrast: Contrast) -> str:
    first, second = (comparison.variants[name] for name in (contrast.first, contrast.second))
    speed = second.p50_ms / first.p50_ms if first.p50_ms > 0 else math.nan
    return f"{speed:.2f}x speed, {first.size_bytes / second.size_bytes:.2f}x size"


def _parts(comparison: Comparison) -> list[tuple[str, dict[str, list[tuple[str, Score]]]]]:
    """By label and by slice: the scores of every variant for each name."""
    kinds: list[tuple[str, Callable[[VariantResult], dict[str, Score]]]] = [
        ("target" if comparison.task == "regression" else "label", lambda result: result.by_label),
        ("slice", lambda result: result.by_slice),
    ]
    found = []
    for heading, scores_of in kinds:
        parts: dict[str, list[tuple[str, Score]]] = {}
        for variant, result in comparison.variants.items():
            for name, score in scores_of(result).items():
                parts.setdefault(name, []).append((TITLES[variant], score))
        if parts and not (heading == "target" and len(parts) == 1):  # one target is the whole
            found.append((heading, parts))
    return found


def _part_grid(parts: dict[str, list[tuple[str, Score]]]) -> Grid:
    metrics = _shown(score for scores in parts.values() for _, score in scores)
    grid = [["", "", "rows", *(h for metric in metrics for h in (metric.heading, "95 % interval"))]]
    for name, scores in parts.items():
        for i, (variant, score) in enumerate(scores):
            row = ["" if i else _plain(name), variant, str(score.rows)]
            for metric in metrics:
                found = metric.of(score)
                row += [_number(found.value), _span(found)] if found and not math.isnan(found.value) else ["", ""]
            grid.append(row)
    return grid


def _aligned(grid: Grid, *, texts: int = 1) -> str:
    """Columns as wide as they must be: the first `texts` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < texts else cell.rjust(width) for i, (cell, width) in
                  enumerate(zip(row, widths, strict=True))).rstrip()
        for row in grid
    )  # fmt: skip


def _shown(scores: Any) -> list[_Metric]:
    """The metrics that any of the scores has."""
    found = [score for score in scores if score is not None]
    return [metric for metric in _METRICS if any(metric.of(score) is not None for score in found)]


def _span(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _number(value: float) -> str:
    """Three decimals, or three digits where that would say nothing."""
    return f"{value:.3f}" if value == 0 or 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def _milliseconds(timing: Timing) -> list[str]:
    """p50, p95 and p99, to a tenth of a microsecond where that matters."""
    return [f"{ms:.4f}" if ms < 0.1 else _number(ms) for ms in (timing.p50_ms, timing.p95_ms, timing.p99_ms)]


def _decibels(ratio: float | None, equal: float) -> str:
    if ratio is not None:
        return f"{ratio:.1f} dB"
    return "equal" if equal == 1 else "of nothing"


def _plain(name: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in name)


# ---- HTML

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1f;--soft:#5c5f66;--line:#d5d7dc;--page:#fff;--int8:#1766b5;--fp32:#b3541e;
--reference:#4d7c3a}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8ea;--soft:#a5a8b0;--line:#3b3e45;--page:#17181b;--int8:#6db3f5;
--fp32:#f0a071;--reference:#9ccb86}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}
p,li{color:var(--soft)}
.scroll{overflow-x:auto}
table{margin-top:1rem;border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:break-word;min-width:6.5rem}
th{font-weight:600}td.strip{width:35%;min-width:7rem;padding-right:0}
svg{display:block;width:100%;height:auto}svg.strip{height:1rem}
.int8{fill:var(--int8)}.fp32{fill:var(--fp32)}.reference{fill:var(--reference)}.zero{fill:var(--soft)}
.track{fill:var(--line)}
pre{overflow-x:auto;font-size:.85rem}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(comparison: Comparison, *, sensitivity: Any = None) -> str:
    """One page.

    Args:
        comparison: What was measured.
        sensitivity: The sensitivity of the layers, if it was measured: `.plot()` gives SVG, `.table()` text.
    """
    title = f"{comparison.name}, release {comparison.release}: variants compared"
    sections = [_summary(comparison), _times(comparison), _sizes(comparison), _outputs(comparison)]
    sections += [_by_part(heading, parts) for heading, parts in _parts(comparison)]
    if sensitivity is not None:
        # within HTML the namespace is implied
        plot = re.sub(r'\sxmlns="[^"]*"', "", sensitivity.plot())
        sections.append(_section("Sensitivity of the layers", plot + f"<pre>{escape(sensitivity.table())}</pre>"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )


def _summary(comparison: Comparison) -> str:
    sentences = "".join(f"<li>{escape(line.strip())}</li>" for line in _sentences(comparison))
    body = f"<ul>{sentences}</ul>"
    scores = {name: result.score for name, result in comparison.variants.items() if result.score}
    for metric in _shown(scores.values()):
        body += _interval_table(_capital(metric.heading), [(TITLES[n], n, found) for n, s in scores.items()
                                                 if (found := metric.of(s)) is not None])  # fmt: skip
    differences = [contrast for contrast in comparison.contrasts if contrast.difference]
    if differences:
        body += _difference_table(differences)
    note = f"<p>{escape(_MEANING[comparison.task])} {escape('' if comparison.task == 'raw' else _INTERVALS)}</p>"
    return _section("How right", body + note)


def _interval_table(heading: str, rows: Sequence[tuple[str, str, Interval]]) -> str:
    low, high = _domain([found for *_, found in rows])
    lines = [
        _row([escape(title), _number(found.value), _span(found)], _interval_strip(variant, found, low, high))
        for title, variant, found in rows
    ]
    scale = f"{_number(low)} to {_number(high)}"
    return _table([escape(heading), "", "95 % interval", scale], lines)


def _difference_table(contrasts: Sequence[Contrast]) -> str:
    lines = []
    for contrast in contrasts:
        found = contrast.difference
        if found is None:
            continue
        reach = max(abs(found.low), abs(found.high), 0.01)
        strip = _interval_strip(contrast.first, Estimate(found.value, found.low, found.high), -reach, reach, zero=True)
        title = f"{TITLES[contrast.first]} - {TITLES[contrast.second]}"
        lines.append(_row([escape(title), f"{found.value:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}",
                           f"{found.first_only} : {found.second_only}", f"{found.p_value:.2g}"], strip))  # fmt: skip
    headings = ["Difference in accuracy", "", "95 % interval", "right alone", "McNemar p"]
    return _table([*headings, "around zero"], lines)


def _times(comparison: Comparison) -> str:
    lines = []
    results = comparison.variants.items()
    for i, timing in enumerate(next(iter(comparison.variants.values())).timings):
        longest = max(result.timings[i].p99_ms for _, result in results)
        for name, result in results:
            found = result.timings[i]
            cells = [f"{TITLES[name]}, batch {timing.batch}", *_milliseconds(found),
                     str(found.calls)]  # fmt: skip
            lines.append(_row(cells, _bar(name, found.p50_ms, longest, mark=found.p99_ms)))
    note = (
        "<p>Milliseconds a call on one thread, without preprocessing; the variants took turns. Bar: p50, mark: p99.</p>"
    )
    return _section("How fast", _table(["", "p50 ms", "p95 ms", "p99 ms", "calls", ""], lines) + note)


def _sizes(comparison: Comparison) -> str:
    results = comparison.variants
    largest = max(result.size_bytes for result in results.values())
    lines = [_row([TITLES[name], f"{result.size_bytes / 1000:.1f}"], _bar(name, result.size_bytes, largest))
             for name, result in results.items()]  # fmt: skip
    body = _table(["Model files", "kB", ""], lines)
    footprints = {name: result.footprint for name, result in results.items() if result.footprint}
    if footprints:
        most = max(found.peak_mb for found in footprints.values())
        lines = [
            _row([TITLES[name], *(f"{mb:.1f}" for mb in (found.imports_mb, found.loaded_mb, found.peak_mb))],
                 _bar(name, found.loaded_mb, most, mark=found.peak_mb))
            for name, found in footprints.items()
        ]  # fmt: skip
        body += _table(["Memory (RSS)", "imports MB", "loaded MB", "peak MB", ""], lines)
        body += "<p>Of a fresh process that only serves. Pages of shared libraries count in full. Mark: peak.</p>"
    return _section("How large", body)


def _outputs(comparison: Comparison) -> str:
    lines = []
    for contrast in comparison.contrasts:
        for name, output in contrast.outputs.items():
            title = f"{_plain(name)}: {TITLES[contrast.first]} against {TITLES[contrast.second]}"
            cells = [escape(title), _decibels(output.sqnr_db, output.equal), f"{output.equal:.1%}",
                     _number(output.largest)]  # fmt: skip
            lines.append(_row(cells, _bar(contrast.first, max(output.sqnr_db or 0.0, 0.0), 60.0)))
    if not lines:
        return ""
    note = (
        "<p>Signal-to-quantization-noise ratio; 20 dB means noise of a tenth of the signal's size. Strip: to 60 dB.</p>"
    )
    return _section("How close the outputs", _table(["Output", "SQNR", "equal", "largest error", ""], lines) + note)


def _by_part(heading: str, parts: dict[str, list[tuple[str, Score]]]) -> str:
    metric = _shown(score for scores in parts.values() for _, score in scores)[0]
    classes = {title: name for name, title in TITLES.items()}
    found = [(name, title, score, value) for name, scores in parts.items() for title, score in scores
             if (value := metric.of(score)) is not None]  # fmt: skip
    low, high = _domain([value for *_, value in found])
    lines = [
        _row([f"{escape(_plain(name))}, {title}", str(score.rows), _number(value.value), _span(value)],
             _interval_strip(classes[title], value, low, high))
        for name, title, score, value in found
    ]  # fmt: skip
    headings = [_capital(heading), "rows", metric.heading, "95 % interval", f"{_number(low)} to {_number(high)}"]
    return _section(f"By {heading}", _table(headings, lines))


def _capital(heading: str) -> str:
    return heading[:1].upper() + heading[1:]


def _domain(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Ends of a scale that holds all intervals; of shares, up to 1."""
    shares = all(isinstance(interval, Accuracy) for interval in intervals)
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    if shares:
        return math.floor(low * 20) / 20, 1.0
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _interval_strip(variant: str, found: Interval, low: float, high: float, *, zero: bool = False) -> str:
    """A line from end to end of the interval, with a mark at the value; 100 units stand for the scale."""
    at = [100 * min(max((v - low) / (high - low or 1.0), 0.0), 1.0) for v in (found.low, found.high, found.value)]
    parts = '<rect class="track" x="0" y="9.5" width="100" height="1"/>'
    if zero:
        parts += '<rect class="zero" x="49.75" y="0" width="0.5" height="20"/>'
    parts += f'<rect class="{variant}" x="{at[0]:.2f}" y="8" width="{max(at[1] - at[0], 0.4):.2f}" height="4"/>'
    parts += f'<rect class="{variant}" x="{min(max(at[2] - 0.7, 0.0), 98.6):.2f}" y="2" width="1.4" height="16"/>'
    return _svg(f"{_number(found.value)}, {_span(found)}", parts)


def _bar(variant: str, value: float, full: float, *, mark: float | None = None) -> str:
    width = 100 * min(value / full, 1.0) if full > 0 else 0.0
    parts = f'<rect class="{variant}" x="0" y="4" width="{width:.2f}" height="12"/>'
    if mark is not None and full > 0:
        parts += f'<rect class="zero" x="{min(100 * mark / full, 99.0):.2f}" y="2" width="0.8" height="16"/>'
    return _svg(_number(value), parts)


def _svg(label: str, parts: str) -> str:
    return (
        f'<svg class="strip" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{parts}</svg>"
    )


def _row(cells: Sequence[str], strip: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="strip">{strip}</td></tr>'


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"
