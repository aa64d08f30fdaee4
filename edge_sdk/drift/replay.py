"""The monitors over files, before anything is shipped: what they would have seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.drift.monitors import DriftMonitors
from edge_sdk.drift.reference import MIN_ROWS, Reference
from edge_sdk.drift.table import Layout, Roles, Rows
from edge_sdk.errors import InputError
from edge_sdk.schema import Column
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

DAY_S = 86_400.0
_BUCKETS = 200
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Alarms a day, for the table that shows what other budgets would have done."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to look at the files.

    Attributes:
        alarms_per_day: False alarms that are tolerated, as in `[drift]` of device.toml.
        rows_per_day: 0: from the times of the stream, else 10 000.
        block_rows: Rows folded at once.
        clear_rows: An alarm is taken down after so many rows without new evidence.
    """

    alarms_per_day: float = 0.1
    rows_per_day: float = 0.0
    block_rows: int = 32
    clear_rows: int = 2000


@dataclass(frozen=True, slots=True)
class Raised:
    """An alarm.

    Attributes:
        monitor: Which.
        row: Number of the row at which it was raised, from 1: the last of its block.
        time: Of that row, seconds since the epoch; None if the stream has no times.
        kind: Of change: "quality", "covariate", "prior" or "concept".
        words: What is the matter, all monitors taken together.
        carried: What carried this one: channels and the shift of their recent mean, strongest first.
        suspects: Names of the channels that did, strongest first.
    """

    monitor: str
    row: int
    time: float | None
    kind: str
    words: str
    carried: str
    suspects: tuple[str, ...]


@dataclass
class Trace:
    """What one monitor went through: evidence as a share of its threshold, at each block."""

    threshold: float
    evidence: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Strip:
    """One feature over the stream, in about 200 parts.

    Attributes:
        name: Of the feature.
        usual: 0.1, 0.5 and 0.9 quantile of the reference.
        quantiles: float64 [3, P]: the same of each part; NaN where all is missing.
        missing: float64 [P]: share in each part.
        usually_missing: Share in the reference.
        shift: Of the whole stream's mean, in standard deviations of the reference; of a category the largest change of
            a share.
        categories: Of a category its values and "others", with their usual shares; empty for a number.
        shares: float64 [V, P]: of each in each part.
    """

    name: str
    usual: tuple[float, float, float]
    quantiles: DoubleArray
    missing: DoubleArray
    usually_missing: float
    shift: float
    categories: tuple[tuple[str, float], ...] = ()
    shares: DoubleArray = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True, eq=False)
class Replay:
    """What was seen.

    Attributes:
        data: Name of the stream's file.
        reference: Name of the reference's file.
        rows: Of the stream.
        reference_rows: Of the reference.
        settings: With the number of rows a day that was used.
        ends: Last row of each block, from 1.
        times: Time of each of these rows; empty without times.
        traces: By monitor.
        alarms: In the order in which they were raised.
        strips: By feature, those that carried an alarm first.
        left_out: Columns that were not looked at.
        caveat: Why the monitors are less sharp than they could be; "" if nothing is.
    """

    data: str
    reference: str
    rows: int
    reference_rows: int
    settings: Settings
    ends: list[int]
    times: list[float]
    traces: dict[str, Trace]
    alarms: list[Raised]
    strips: list[Strip]
    left_out: tuple[str, ...]
    caveat: str

    @property
    def run_length(self) -> float:
        """Rows between two false alarms of all monitors together."""
        return self.settings.rows_per_day / self.settings.alarms_per_day

    def first_alarms(self, alarms_per_day: float) -> dict[str, int | None]:
        """Row at which each monitor would have raised its first alarm with another budget; None: never."""
        share = self.settings.alarms_per_day / alarms_per_day
        return {
            name: next((row for row, e in zip(self.ends, trace.evidence, strict=True) if e >= share), None)
            for name, trace in self.traces.items()
        }

    def as_json(self) -> dict[str, Any]:
        """For other programs."""
        return {
            "data": self.data, "reference": self.reference, "rows": self.rows, "reference_rows": self.reference_rows,
            "alarms_per_day": self.settings.alarms_per_day, "rows_per_day": self.settings.rows_per_day,
            "block_rows": self.settings.block_rows,
            "alarms": [
                {name: getattr(a, name) for name in ("monitor", "row", "time", "kind", "words", "carried")}
                for a in self.alarms
            ],
            "most_evidence": {name: max(trace.evidence, default=0.0) for name, trace in self.traces.items()},
            "first_alarm_by_alarms_per_day": {f"{budget:g}": self.first_alarms(budget) for budget in BUDGETS},
            "left_out": list(self.left_out), "caveat": self.caveat,
        }  # fmt: skip


def replay(
    data: Path,
    reference: Path,
    *,
    roles: Roles | None = None,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Run the monitors over a CSV file, as a device would run them over its predictions.

    Args:
        data: The stream, oldest row first, read once for the pace and once for the monitors.
        reference: Normal rows, at least 200, with the same columns.
        roles: Columns that are no features.
        settings: Budget, pace, and block size.
        progress: Called with the rows done so far.

    Raises:
        InputError: A file cannot be read or does not fit; says which row and column.
        ConfigError: A column that is named is not there.
    """
    settings = settings or Settings()
    layout = Layout(reference, roles or Roles())
    normal = layout.read_all(reference)
    if len(normal) < MIN_ROWS:
        raise InputError(f"{reference.name} has {len(normal)} rows; a reference needs at least {MIN_ROWS}")
    if not settings.rows_per_day:
        settings = replace(settings, rows_per_day=_pace(layout, data) if layout.roles.time else 10_000.0)
    built = _reference(layout, normal)
    monitors = DriftMonitors(
        built,
        layout.classes or ((layout.roles.prediction,) if layout.roles.prediction else ()),
        run_length=max(2.0, settings.rows_per_day / settings.alarms_per_day),
        rereference_rows=max(MIN_ROWS, len(normal)),
    )
    seen = _Seen({name: Trace(detector.threshold) for name, detector in monitors.detectors.items()})
    kept: list[FloatArray] = []
    rows = 0
    for part in layout.read(data, settings.block_rows):
        rows += len(part)
        kept.append(part.features)
        _fold(monitors, part, settings.clear_rows)
        seen.look(monitors, rows, part)
        if progress is not None:
            progress(rows)
    if not rows:
        raise InputError(f"{data.name} has a header and no rows")
    return Replay(
        data=data.name,
        reference=reference.name,
        rows=rows,
        reference_rows=len(normal),
        settings=settings,
        ends=seen.ends,
        times=seen.times,
        traces=seen.traces,
        alarms=seen.alarms,
        strips=_strips(normal.features, np.concatenate(kept), layout.columns, seen.alarms),
        left_out=tuple(layout.not_watched(data)),
        caveat=built.caveat,
    )


def _reference(layout: Layout, rows: Rows) -> Reference:
    if rows.scores is None:
        return Reference.from_rows(rows.features, layout.names, categories=layout.categories)
    right = np.zeros(0) if rows.right is None else rows.right[~np.isnan(rows.right)]
    regression = layout.task == "regression"
    return Reference.build(
        rows.features,
        rows.scores,
        np.zeros(0, bool) if regression else right.astype(bool),
        task=layout.task,
        names=layout.names,
        categories=layout.categories,
        losses=right if regression else None,
        ordered=True,
    )


def _fold(monitors: DriftMonitors, part: Rows, clear_rows: int) -> None:
    scores = np.zeros((len(part), 0), np.float32) if part.scores is None else part.scores
    monitors.fold(part.features, scores, times=part.times)
    if part.right is not None and (known := ~np.isnan(part.right)).any():
        right = part.right[known]
        if monitors.reference.task == "regression":
            monitors.fold_labels(np.zeros(len(right), bool), losses=right)
        else:
            monitors.fold_labels(right.astype(bool))
    monitors.clear(clear_rows)


@dataclass
class _Seen:
    """What is noted while the stream runs."""

    traces: dict[str, Trace]
    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    alarms: list[Raised] = field(default_factory=list)
    up: set[str] = field(default_factory=set)

    def look(self, monitors: DriftMonitors, rows: int, part: Rows) -> None:
        """Note evidence, and alarms that were not up before."""
        time = None if part.times is None else float(part.times[-1])
        self.ends.append(rows)
        if time is not None:
            self.times.append(time)
        for name, trace in self.traces.items():
            detector = monitors.detectors[name]
            trace.evidence.append(detector.evidence / detector.threshold)
        raised = monitors.alarms()
        if (new := [alarm for alarm in raised if alarm.monitor not in self.up]) and (found := monitors.diagnosis()):
            for alarm in new:
                carried = ", ".join(f"{name} {shift:+.2f}" for name, shift in alarm.suspects)
                names = (*found.suspects, *(name for name, _ in alarm.suspects))
                self.alarms.append(Raised(alarm.monitor, rows, time, found.kind, found.words, carried, names))
        self.up = {alarm.monitor for alarm in raised}


def _pace(layout: Layout, data: Path) -> float:
    """Rows a day, by the first and the last time."""
    rows, first, last = 0, math.inf, -math.inf
    for part in layout.read(data, 4096):
        if part.times is not None:
            rows += len(part)
            first, last = min(first, float(part.times.min())), max(last, float(part.times.max()))
    if rows < 2 or last <= first:
        raise InputError(f"{data.name}: all times are the same, so give the rows a day")
    return (rows - 1) / (last - first) * DAY_S


def _strips(normal: FloatArray, stream: FloatArray, columns: Sequence[Column], alarms: list[Raised]) -> list[Strip]:
    count = min(_BUCKETS, len(stream))
    strips = [_strip(normal[:, i], stream[:, i], column, count) for i, column in enumerate(columns)]
    blamed = [strip.name for alarm in alarms for strip in strips if strip.name in alarm.suspects]
    place = {name: i for i, name in enumerate(dict.fromkeys(blamed))}
    return sorted(strips, key=lambda strip: (place.get(strip.name, len(place)), -abs(strip.shift)))


def _strip(normal: FloatArray, stream: FloatArray, column: Column, count: int) -> Strip:
    parts = np.array_split(stream, count)
    usual, known = normal[~np.isnan(normal)], stream[~np.isnan(stream)]
    spread = float(usual.std()) if len(usual) else 0.0
    strip = Strip(
        column.name,
        _quantiles(usual),
        np.array([_quantiles(part[~np.isnan(part)]) for part in parts]).T,
        np.array([float(np.isnan(part).mean()) for part in parts]),
        float(np.isnan(normal).mean()),
        float(known.mean() - usual.mean()) / spread if spread > 0 and len(known) else 0.0,
    )
    if column.kind == "number":
        return strip
    codes = np.array([*range(len(column.values)), -1])
    was, now = (_shares(values, codes) for values in (usual, known))
    return replace(
        strip,
        shift=float((now - was)[np.argmax(np.abs(now - was))]),
        categories=tuple(zip([*column.values, "others"], was.tolist(), strict=True)),
        shares=np.array([_shares(part[~np.isnan(part)], codes) for part in parts]).T,
    )


def _shares(values: FloatArray, codes: AnyArray) -> DoubleArray:
    shares: DoubleArray = (values[:, None] == codes).mean(axis=0) if len(values) else np.zeros(len(codes))
    return shares


def _quantiles(values: FloatArray) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return low, middle, high
