"""Two reports of simulated fleets, and how far their differences are from chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.fleet_report import DeviceSummary, FleetReport

_Z = 1.96


class Difference(msgspec.Struct, frozen=True):
    """One figure of two reports."""

    name: str
    first: float | None
    second: float | None
    spread: float | None
    """1.96 standard errors of the difference over devices; None: it cannot be told."""

    @property
    def clear(self) -> bool:
        """Whether the difference is more than chance between devices explains."""
        if self.first is None or self.second is None or self.spread is None:
            return False
        return abs(self.second - self.first) > self.spread


Column = Callable[[DeviceSummary], float | None]

_ACCURACY: dict[str, Column] = {"accuracy": lambda d: d.right / d.predictions if d.predictions else None}
_ERROR: dict[str, Column] = {
    "error": lambda d: d.error,
    "within tolerance": lambda d: d.right / d.predictions if d.predictions else None,
}
_COLUMNS: dict[str, Column] = {
    "{} before drift": lambda d: d.before,
    "{} under drift": lambda d: d.under,
    "{} after learning": lambda d: d.after,
    "forgotten": lambda d: d.forgotten,
    "alarms a day": lambda d: d.alarms / d.days if d.days else None,
    "false alarms a clear day": lambda d: d.false_alarms / d.clear_days if d.clear_days else None,
    "drift delay, hours": lambda d: d.delay_h,
    "learning jobs": lambda d: d.learned,
    "promotions": lambda d: d.promotions,
    "rejections": lambda d: d.rejections,
    "rollbacks": lambda d: d.rollbacks,
    "payload bytes a day": lambda d: d.bytes_sent / d.days if d.days else None,
    "bytes on the wire": lambda d: d.wire_sent + d.wire_received,
}


def compare(first: FleetReport, second: FleetReport) -> list[Difference]:
    """Means over devices of two reports, and how far their difference is from chance.

    Devices of the same name under the same seed meet the same data, so that they are compared one by one; otherwise the
    two fleets are taken for independent.

    Raises:
        ConfigError: One predicts labels, the other numbers; or other numbers.
    """
    if set(first.targets) != set(second.targets):
        told = [", ".join(report.targets) or "labels" for report in (first, second)]
        raise ConfigError(f"one report is about {told[0]}, the other about {told[1]}: they cannot be compared")
    score, columns = ("error", _ERROR) if first.targets else ("accuracy", _ACCURACY)
    columns = columns | {name.format(score): column for name, column in _COLUMNS.items()}
    names = [device.device for device in first.devices]
    paired = first.seed == second.seed and names == [device.device for device in second.devices]
    found = [_difference(name, column, first, second, paired=paired) for name, column in columns.items()]
    for name, key in (("learner seconds a device", "learner_s"), ("joules a device", "joules")):
        a, b = (sum(getattr(c, key) for c in r.costs) / max(1, len(r.costs)) for r in (first, second))
        found.append(Difference(name, a, b, None))
    return found


def _difference(name: str, column: Column, first: FleetReport, second: FleetReport, *, paired: bool) -> Difference:
    a, b = (np.array([math.nan if (v := column(d)) is None else v for d in r.devices], float) for r in (first, second))
    if paired:
        both = ~np.isnan(a) & ~np.isnan(b)
        a, b = a[both], b[both]
    else:
        a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    spread = None
    if min(len(a), len(b)) > 1:
        variance = np.var(b - a, ddof=1) / len(a) if paired else np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)
        spread = _Z * math.sqrt(float(variance))
    means = [float(values.mean()) if len(values) else None for values in (a, b)]
    return Difference(name, means[0], means[1], spread)


def comparison_lines(found: Sequence[Difference], names: tuple[str, str]) -> list[str]:
    """A table for a terminal; a star where the difference is more than chance between devices explains."""

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    width = max(12, *(len(name) for name in names))
    lines = [f"{'mean over devices':26} {names[0]:>{width}} {names[1]:>{width}} {'difference':>12}"]
    for row in found:
        both = row.first is not None and row.second is not None
        change = f"{row.second - row.first:+.4g}" if both else "-"  # type: ignore[operator]
        star = " *" if row.clear else ""
        lines.append(f"{row.name:26} {figure(row.first):>{width}} {figure(row.second):>{width}} {change:>12}{star}")
    return [*lines, "* more than chance between devices explains (95 %)"]
