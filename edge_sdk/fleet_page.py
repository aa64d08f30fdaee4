"""What a simulation found, as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from edge_sdk.fleet_report import ALL, DeviceSummary, FleetReport, score_text, summary_lines
from edge_sdk.fleet_tally import Curve
from edge_sdk.page import COLOURS, LEFT, WIDTH, band, document, finite, soft, table

_HEIGHT = 220
_FLOOR = _HEIGHT - 24
_ROW = 14
_DRAWN_EVENTS = {
    "drift_alarm": "raised",
    "promoted": "promoted",
    "head_rolled_back": "back",
    "release_rolled_back": "back",
    "release_activated": "release",
}
_MOST_DEVICES = 60
_STYLE = """<style>.promoted { stroke: var(--trace); stroke-width: 2; } .back { stroke: var(--warn); stroke-width: 2; }
.release { stroke: var(--soft); stroke-width: 2; } .onset { stroke: var(--soft); stroke-dasharray: 2 3; }
.unmet { color: var(--alarm); } ul { padding-left: 1.2rem; }</style>"""
_SCORES = """Bands: 95 %, by differences between devices. Dotted: the data of a cohort begin to change. Dashed: a
release is pushed."""
_ACCURACY = "Share of right predictions on what the devices met, which only the simulation can know."
_ERROR = "Mean absolute error on what the devices met, in standard deviations"
_KEPT = "On data without any drift that no model has seen, with the versions in use: what"
_EVENTS = """Each line is a device. Red: a drift alarm. Blue: a learned head is promoted. Amber: a head or release is
rolled back. Grey: a release begins to serve."""
_DEVICES = """On data that no model has seen: without drift at the start; as they are when most has changed,
with the version that met the change, and with the last one; without drift with the last one."""


def page(report: FleetReport) -> str:
    """A whole HTML document."""
    title = f"Simulated fleet: {report.scenario or 'in code'}"
    curves = {name: curve for name, curve in report.scores.items() if name != ALL or len(report.scores) == 1}
    kept = {name: curve for name, curve in report.kept.items() if name != ALL or len(report.kept) == 1}
    score = "error" if report.targets else "accuracy"
    parts = [
        _STYLE,
        f"<h1>{escape(title)}</h1>",
        soft(report.about) if report.about else "",
        soft(f"Seed {report.seed}, ticks of {report.tick_s:g} s, {report.duration_h:g} hours planned.", small=True),
        _partial(report),
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in summary_lines(report)) + "</ul>",
        "<h2>Expectations</h2>",
        _expectations(report),
        f"<h2>{score.capitalize()} over time</h2>",
        soft(f"{_meaning(report)} {_SCORES}", small=True),
        _chart(f"{score} over time", curves, report),
        "<h2>What is kept</h2>",
        soft(f"{_KEPT} {'rises' if report.targets else 'falls'} is forgotten.", small=True),
        _chart(f"{score} on data without drift", kept, report),
        "<h2>What happened</h2>",
        soft(_EVENTS, small=True),
        _strip(report),
        _releases(report),
        "<h2>Cohorts</h2>",
        _cohorts(report),
        "<h2>Devices</h2>",
        soft(_DEVICES, small=True),
        _devices(report),
    ]
    return document(title, parts)


def _meaning(report: FleetReport) -> str:
    if not report.targets:
        return _ACCURACY
    spreads = ", ".join(f"{name}: {std:.4g}" for name, std in report.targets.items())
    return f"{_ERROR} ({spreads}), which only the simulation can know."


def _partial(report: FleetReport) -> str:
    if not report.partial:
        return ""
    told = f"Partial: stopped after {report.ended_h:.1f} of {report.duration_h:g} hours."
    return f'<p class="alarm">{told}</p>'


def _expectations(report: FleetReport) -> str:
    if not report.unmet:
        return '<p class="ok">All that was stated came out.</p>'
    return "<ul>" + "".join(f'<li class="unmet">{escape(line)}</li>' for line in report.unmet) + "</ul>"


# ---- charts


def _x(hours: float, report: FleetReport) -> float:
    return LEFT + (WIDTH - LEFT) * hours / report.duration_h


def _chart(label: str, curves: Mapping[str, Curve], report: FleetReport) -> str:
    """Scores over time, a band for each cohort."""
    lows = [low for curve in curves.values() for low in curve.low if low is not None]
    highs = [high for curve in curves.values() for high in curve.high if high is not None]
    bottom, top = max(0.0, math.floor((min(lows, default=0.0) - 0.02) * 10) / 10), 1.0
    if report.targets:
        bottom, top = 0.0, max(highs, default=0.0) * 1.05 or 1.0

    def y(value: float) -> float:
        return 8 + (_FLOOR - 8) * (top - value) / (top - bottom)

    drawn = []
    for place in range(5):
        value = bottom + (top - bottom) * place / 4
        told = f"{value:.2g}" if report.targets else f"{value:.0%}"
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{told}</text>')
    drawn += _marks(report, _FLOOR)
    for number, curve in enumerate(curves.values()):
        xs = [_x(hour, report) for hour in curve.hours]
        middle, low, high = ([y(value) for value in finite(part)] for part in (curve.value, curve.low, curve.high))
        drawn.append(band(xs, middle, low, high, f"c{number % COLOURS}"))
    return (
        f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>'
        f"{''.join(drawn)}{_axis(report, _FLOOR)}</svg>{_key(list(curves))}"
    )


def _marks(report: FleetReport, floor: float) -> list[str]:
    """When data change, and releases are pushed."""
    drawn = [
        f'<line class="onset" x1="{_x(hour, report):.1f}" x2="{_x(hour, report):.1f}" y1="8" y2="{floor}">'
        f"<title>{escape(name)} changes at {hour:g} h</title></line>"
        for name, hours in report.onsets_h.items()
        for hour in hours
    ]
    drawn += [
        f'<line class="limit" x1="{_x(release.at_h, report):.1f}" x2="{_x(release.at_h, report):.1f}" y1="8" '
        f'y2="{floor}"><title>{escape(release.name)} at {release.at_h:g} h</title></line>'
        for release in report.releases
    ]
    return drawn


def _axis(report: FleetReport, y: float) -> str:
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}"/>']
    for i in range(5):
        hours = report.duration_h * i / 4
        anchor = ("start", "middle", "middle", "middle", "end")[i]
        text = f"{hours / 24:.3g} days" if report.duration_h > 72 else f"{hours:.3g} h"
        parts.append(f'<text x="{_x(hours, report):.1f}" y="{y + 15}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _key(names: Sequence[str]) -> str:
    items = "".join(
        f'<span class="c{i % COLOURS}"><svg viewBox="0 0 20 10" style="display:inline;width:20px">'
        f'<line class="key" x1="1" x2="19" y1="5" y2="5"/></svg> {escape(name)}</span> &nbsp; '
        for i, name in enumerate(names)
    )
    return f'<p class="small">{items}</p>'


def _strip(report: FleetReport) -> str:
    """A line for each device, with what happened to it; of a large fleet, those to which most did."""
    told: dict[str, list[str]] = {device.device: [] for device in report.devices}
    for event in report.events:
        if kind := _DRAWN_EVENTS.get(event.name):
            x = _x(event.time_s / 3600, report)
            told[event.device].append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="%d" y2="%d"><title>'
                                      f"{escape(event.device)}: {escape(event.name)}, "
                                      f"{event.time_s / 3600:.1f} h</title></line>")  # fmt: skip
    names = list(told)
    if len(names) > _MOST_DEVICES:
        kept = set(sorted(names, key=lambda name: -len(told[name]))[:_MOST_DEVICES])
        names = [name for name in names if name in kept]
    drawn = []
    for row, name in enumerate(names):
        top = 4 + row * _ROW
        drawn.append(f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{escape(name[-7:])}</text>')
        drawn += [line % (top + 1, top + _ROW - 3) for line in told[name]]
    floor = 4 + len(names) * _ROW
    rest = len(told) - len(names)
    return (
        f'<svg viewBox="0 0 {WIDTH} {floor + 24}" role="img" aria-label="events by device">'
        f"{''.join(_marks(report, floor))}{''.join(drawn)}{_axis(report, floor)}</svg>"
        + (soft(f"{rest} devices to which less happened are not drawn.", small=True) if rest else "")
    )


# ---- tables


def _releases(report: FleetReport) -> str:
    if not report.releases:
        return ""
    rows = [
        [release.name + (" (bad)" if release.bad else ""), f"{release.at_h:g} h", release.status, release.reason]
        for release in report.releases
    ]
    steps = [
        f"<li>{escape(release.name)}, {hours:.1f} h: {escape(status)}: {escape(reason)}</li>"
        for release in report.releases
        for hours, status, reason in release.history
    ]
    listed = f'<ul class="small">{"".join(steps)}</ul>' if steps else ""
    return "<h2>Releases</h2>" + table(["release", "pushed", "ended as", "why"], rows, words=4) + listed


def _cohorts(report: FleetReport) -> str:
    head = ["cohort", "devices", _live(report), "before", "under", "after", "forgotten", "alarms", "false", "delay, h",
            "promotions", "rejections", "rollbacks", "bytes a day"]  # fmt: skip
    cohorts: dict[str, list[DeviceSummary]] = {}
    for device in report.devices:
        cohorts.setdefault(device.cohort, []).append(device)
    rows = []
    for name, members in cohorts.items():
        days = sum(d.days for d in members)
        delays = [d.delay_h for d in members if d.delay_h is not None]
        rows.append(
            [name, str(len(members)), score_text(_met(members, report), report)]
            + [
                score_text(_mean([getattr(d, key) for d in members]), report)
                for key in ("before", "under", "after", "forgotten")
            ]
            + [str(sum(getattr(d, key) for d in members)) for key in ("alarms", "false_alarms")]
            + [f"{np.median(delays):.1f}" if delays else "-"]
            + [str(sum(getattr(d, key) for d in members)) for key in ("promotions", "rejections", "rollbacks")]
            + [f"{sum(d.bytes_sent for d in members) / days:,.0f}" if days else "-"]
        )
    return table(head, rows)


def _devices(report: FleetReport) -> str:
    head = ["device", _live(report), "before", "under", "after", "original", "alarms", "false", "delay, h", "jobs",
            "promoted", "rejected", "back", "release", "head", "lost, h"]  # fmt: skip
    rows = [
        [
            d.device + (" (lied to)" if d.poisoned else ""),
            score_text(_met([d], report), report),
            *(score_text(value, report) for value in (d.before, d.under, d.after, d.original)),
            str(d.alarms),
            str(d.false_alarms),
            "-" if d.delay_h is None else f"{d.delay_h:.1f}",
            *(str(n) for n in (d.learned, d.promotions, d.rejections, d.rollbacks, d.release, d.head)),
            "-" if d.lost_h is None else f"{d.lost_h:.0f}",
        ]
        for d in report.devices
    ]
    return table(head, rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _live(report: FleetReport) -> str:
    return "error" if report.targets else "right"


def _met(members: Sequence[DeviceSummary], report: FleetReport) -> float | None:
    """Score of devices on what they met."""
    made = sum(d.predictions for d in members)
    if not made:
        return None
    if report.targets:
        return sum((d.error or 0.0) * d.predictions for d in members) / made
    return sum(d.right for d in members) / made
