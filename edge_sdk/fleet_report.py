"""What a simulation found: pure functions from counts and events to a report, and from two reports to a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.plan import DAY_S, DevicePlan, Prepared
from edge_sdk.scenario import Measured, ReleaseOutcome
from edge_sdk.stats import wilson_interval
from edge_sdk.streams import HOUR_S
from edge_sdk.types import AnyArray, DoubleArray, IndexArray

SCHEMA = 2
ALL = "all"
"""The curve of the whole fleet."""
_BINS = 168
_Z = 1.96


class FleetEvent(msgspec.Struct, frozen=True):
    """Something that happened on a device."""

    time_s: float
    """Of the simulation's own clock at the end of the tick, from the start."""
    device: str
    name: str
    detail: dict[str, Any]


class Curve(msgspec.Struct, frozen=True):
    """A score over time, with a band of 95 %."""

    hours: list[float]
    """Ends of the intervals that it was counted over."""
    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


class DeviceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One device over a whole run.

    Scores are on samples that no model was trained on: accuracies, or where numbers are predicted mean errors, as
    `FleetReport.targets` has them.
    """

    device: str
    cohort: str
    poisoned: bool
    lost_h: float | None
    """When it vanished."""
    changed_h: float | None
    """When its data first changed, or the lies began."""
    days: float
    """How long it was there."""
    predictions: int
    right: int
    """Of numbers: within the tolerance of each target."""
    error: float | None
    """Of numbers: mean error of its predictions."""
    refused: int
    """Samples that the model could not take."""
    labels: int
    """Truths and lies that it was told."""
    before: float | None
    """On the data as they are without any drift, with the version that it started with."""
    under: float | None
    """On the data as they are when most has changed, with the version that met the first change."""
    after: float | None
    """On the same data, with the last version."""
    original: float | None
    """On the data without any drift, with the last version."""
    forgotten: float | None
    """By how much `original` is worse than `before`."""
    alarms: int
    false_alarms: int
    """Before anything changed."""
    clear_days: float
    """Days in which nothing had changed: what false alarms are counted by."""
    delay_h: float | None
    """From the first change to the first alarm after it."""
    learned: int
    """Learning jobs."""
    promotions: int
    rejections: int
    rollbacks: int
    release: int
    head: int
    bytes_sent: int
    """Payload."""
    wire_sent: int
    """With topics and the headers of MQTT; over a real connection, bytes given to TCP."""
    wire_received: int

    @property
    def drifts(self) -> bool:
        """Whether anything changed for it."""
        return self.changed_h is not None


class Cost(msgspec.Struct, frozen=True):
    """What a device took of this machine; differs from run to run."""

    device: str
    cpu_s: float
    """Of everything that the device did."""
    learner_s: float
    """Of learning jobs alone."""
    joules: float
    """`cpu_s` times `resources.watts`."""


class ReleaseSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A release of the scenario, and what became of it."""

    name: str
    group: str
    bad: bool
    at_h: float
    status: str
    """Of its rollout; "not pushed": the run ended before, or the coordinator refused it."""
    reason: str
    history: list[tuple[float, str, str]]
    """Hours, status, reason."""


class FleetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What happened. The same seed gives the same report, but for what `lasting` leaves out."""

    schema: int = SCHEMA
    scenario: str
    """Name of the file."""
    about: str
    seed: int
    tick_s: float
    duration_h: float
    """As planned."""
    ended_h: float
    """As it was; less than planned in a partial report."""
    onsets_h: dict[str, list[float]]
    """By cohort: when its devices' data change, at most 50 times."""
    measured: Measured
    unmet: list[str]
    """Expectations that were not met."""
    targets: dict[str, float]
    """Of each number that is predicted, its standard deviation as the checkpoint has it. Errors are absolute, in these,
    and means over the targets. Empty: labels are predicted."""
    scores: dict[str, Curve]
    """By cohort, and of "all", on what the devices met: share of right predictions, or mean error."""
    kept: dict[str, Curve]
    """By cohort, and of "all": score on the data without any drift: what becomes worse is forgotten."""
    devices: list[DeviceSummary]
    releases: list[ReleaseSummary]
    events: list[FleetEvent]
    costs: list[Cost]
    wall_s: float
    workers: int
    peak_mb: float
    """Most memory, of all processes together."""

    @property
    def partial(self) -> bool:
        """Whether it was stopped before its end."""
        return self.ended_h < self.duration_h - 1e-9

    def lasting(self) -> FleetReport:
        """The report without what differs from run to run: the same bytes for the same seed."""
        replace = msgspec.structs.replace
        devices = [replace(device, wire_sent=0, wire_received=0) for device in self.devices]
        return replace(self, devices=devices, costs=[], wall_s=0.0, workers=0, peak_mb=0.0)

    def event_log(self) -> bytes:
        """All events as JSON lines: the same bytes for the same seed, however many processes there are."""
        return b"".join(msgspec.json.encode(event) + b"\n" for event in self.events)

    def total(self, key: str) -> float:
        """Sum of a column over all devices; what is unknown counts 0."""
        return float(sum(getattr(device, key) or 0 for device in self.devices))

    def mean(self, key: str, *, drifted: bool = False) -> float | None:
        """Mean of a column over the devices (those whose data changed) in which it is known."""
        values = [getattr(device, key) for device in self.devices if device.drifts or not drifted]
        known = [float(value) for value in values if value is not None]
        return float(np.mean(known)) if known else None


class _Versioned(msgspec.Struct):
    schema: int


def load_report(path: Path) -> FleetReport:
    """The report in a JSON file.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        data = path.read_bytes()
        schema = msgspec.json.decode(data, type=_Versioned).schema
        if schema != SCHEMA:
            raise ConfigError(f"{path} has schema {schema}, this SDK reads {SCHEMA}: simulate it again")
        return msgspec.json.decode(data, type=FleetReport)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no report of `edge simulate --json`: {error}") from error


# ---- counting


class Lived(msgspec.Struct, frozen=True, array_like=True):
    """One device in one tick."""

    made: int
    right: int
    release: int
    head: int
    kept: float | None = None
    """Score on the data without any drift, when another version has begun to serve."""
    off: float = 0.0
    """Sum of the errors of numbers, and of their squares below."""
    squares: float = 0.0


class Tally:
    """How many predictions each device made over time, and how good they were.

    Args:
        prepared: The scenario.
    """

    def __init__(self, prepared: Prepared) -> None:
        fleet, count = prepared.scenario.fleet, len(prepared.devices)
        self._duration_s = fleet.duration_h * HOUR_S
        self.bins = max(1, min(_BINS, math.ceil(self._duration_s / fleet.tick_s)))
        self.numbers = bool(prepared.world.targets)
        self.made = np.zeros((count, self.bins), np.int64)
        self.good = np.zeros((count, self.bins))
        """Right ones, or the sum of their errors."""
        self.squares = np.zeros((count, self.bins))
        """Sum of the errors' squares."""
        self.expected = np.zeros((2, count))
        """Right ones, or the sum of errors, and how many were made, from when on they count in what is expected."""
        expect = prepared.scenario.expect
        self._from_s = (expect.max_error_from_h if self.numbers else expect.min_accuracy_from_h) * HOUR_S
        self.kept: list[list[tuple[float, float]]] = [[] for _ in range(count)]
        """Times and scores on the data without any drift, whenever another version serves."""

    @property
    def hours(self) -> list[float]:
        """Ends of the bins."""
        return [round(self._duration_s * (i + 1) / self.bins / HOUR_S, 4) for i in range(self.bins)]

    def add(self, device: int, time_s: float, life: Lived) -> None:
        """Count a tick that ended at a time."""
        place = min(self.bins - 1, max(0, math.ceil(time_s * self.bins / self._duration_s - 1e-9) - 1))
        good = life.off if self.numbers else life.right
        self.made[device, place] += life.made
        self.good[device, place] += good
        self.squares[device, place] += life.squares
        if time_s > self._from_s:
            self.expected[:, device] += good, life.made

    def curve(self, members: IndexArray, ended_s: float) -> Curve:
        """Score of some devices; their number decides how wide the band is."""
        good, made, squares = self.good[members].T, self.made[members].T, self.squares[members].T
        if self.numbers:
            found = [error_band(*of_bin) for of_bin in zip(good, squares, made, strict=True)]
        else:
            found = [share_band(*of_bin) for of_bin in zip(good, made, strict=True)]
        return _curve(self.hours, found, ended_s)

    def kept_curve(self, members: IndexArray, ended_s: float) -> Curve:
        """Mean score on the data without any drift of some devices."""
        values = np.full((len(members), self.bins), np.nan)
        ends = self._duration_s * np.arange(1, self.bins + 1) / self.bins + 1e-6
        for row, device in enumerate(members):
            for time_s, score in self.kept[device]:
                values[row, ends >= time_s] = score
        most = math.inf if self.numbers else 1.0
        return _curve(self.hours, [mean_band(values[:, i], most=most) for i in range(self.bins)], ended_s)


Band = tuple[float, float, float] | None
"""Value, lower and upper end; None: there is nothing to say."""


def share_band(right: AnyArray, made: IndexArray) -> Band:
    """Share of right predictions of several devices, with a band of 95 %.

    Devices are alike within and differ between each other, so that it is devices that are counted: the variance is that
    of a ratio estimator over clusters. Where devices agree too well to tell, Wilson's interval over all predictions is
    the narrowest that the band becomes.

    Args:
        right: [devices].
        made: int64 [devices].

    Source:
        Cochran 1977, Sampling Techniques, 3rd ed., section 9A (ratio to size); Wilson 1927,
        doi:10.1080/01621459.1927.10502953.
    """
    total = int(made.sum())
    if not total:
        return None
    share, spread = _ratio(right, made)
    low, high = wilson_interval(int(right.sum()), total)
    return share, max(0.0, min(low, share - spread)), min(1.0, max(high, share + spread))


def error_band(off: DoubleArray, squares: DoubleArray, made: IndexArray) -> Band:
    """Mean error of several devices' predictions, with a band of 95 %.

    As `share_band`, but the band becomes no narrower than the spread of all errors makes it.

    Args:
        off: float64 [devices], sums of errors.
        squares: float64 [devices], sums of their squares.
        made: int64 [devices].
    """
    total = int(made.sum())
    if not total:
        return None
    mean, spread = _ratio(off, made)
    variance = max(0.0, float(squares.sum()) / total - mean * mean)
    spread = max(spread, _Z * math.sqrt(variance / total))
    return mean, max(0.0, mean - spread), mean + spread


def _ratio(sums: AnyArray, made: IndexArray) -> tuple[float, float]:
    """Sums by what they were counted over, and 1.96 standard errors over those devices that have any."""
    there = made > 0
    sums, made = sums[there], made[there]
    total, count = int(made.sum()), len(made)
    ratio = float(sums.sum()) / total
    if count < 2:
        return ratio, 0.0
    residuals = sums - ratio * made
    return ratio, _Z * math.sqrt(float((residuals**2).sum()) * count / (count - 1)) / total


def mean_band(values: DoubleArray, *, most: float = 1.0) -> Band:
    """Mean of values float64 [N], NaN where unknown, with 1.96 standard errors either way, within [0, most]."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    mean = float(known.mean())
    spread = _Z * float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return mean, max(0.0, mean - spread), min(most, mean + spread)


def _curve(hours: Sequence[float], found: Sequence[Band], ended_s: float) -> Curve:
    def part(place: int) -> list[float | None]:
        return [None if band is None else round(band[place], 5) for band in found[:last]]

    last = sum(hour * HOUR_S <= ended_s + 1 for hour in hours) or 1  # hours are rounded
    return Curve(list(hours[:last]), part(0), part(1), part(2))


# ---- what the plan says of a device


def changed_at(plan: DevicePlan, duration_s: float) -> float | None:
    """When a device's data first change, or it is first lied to; None: never."""
    times = [time for drift in plan.drifts for time in drift.onsets(duration_s)[:1]]
    if plan.poison is not None and plan.poison.from_h * HOUR_S < duration_s:
        times.append(plan.poison.from_h * HOUR_S)
    return min(times, default=None)


def extreme_at(plan: DevicePlan, duration_s: float) -> float:
    """When most has changed in a device's data, to the hour; the latest such time."""
    hours = np.append(np.arange(0.0, duration_s, HOUR_S), duration_s * (1 - 1e-9))
    extents = [sum(math.prod(drift.extent(time)) for drift in plan.drifts) for time in hours]
    best = max(extents)
    return float(max(time for time, extent in zip(hours, extents, strict=True) if extent >= best - 1e-9))


def alarm_facts(alarms: Sequence[float], changed_s: float | None, there_s: float) -> tuple[int, float, float | None]:
    """False alarms, the days in which any would have been one, and the delay of the first true one in hours.

    Args:
        alarms: Their times, in order.
        changed_s: When the data first changed; None: never.
        there_s: How long the device was there.
    """
    if changed_s is None or changed_s >= there_s:
        return len(alarms), there_s / DAY_S, None
    # the rows of a tick look as data do at its end, and so may the alarm
    late = [time for time in alarms if time >= changed_s]
    return len(alarms) - len(late), changed_s / DAY_S, (late[0] - changed_s) / HOUR_S if late else None


# ---- the report


def measure(
    devices: Sequence[DeviceSummary], expected: AnyArray, releases: Sequence[ReleaseSummary], *, numbers: bool = False
) -> Measured:
    """What may be expected of a fleet.

    Args:
        devices: In the order of `expected`.
        expected: [2, devices]: right predictions (or the sum of their errors) and made ones that count.
        releases: Of the scenario.
        numbers: Whether errors are counted.
    """
    honest = np.array([not device.poisoned for device in devices], dtype=bool)
    good, made = expected[:, honest].sum(axis=1)
    score = float(good / made) if made else None
    clear_days, days = (sum(getattr(d, key) for d in devices) for key in ("clear_days", "days"))
    return Measured(
        accuracy=None if numbers else score,
        error=score if numbers else None,
        false_alarms_per_device_day=sum(d.false_alarms for d in devices) / clear_days if clear_days else None,
        bytes_per_device_day=sum(d.bytes_sent for d in devices) / days if days else None,
        releases=tuple(ReleaseOutcome(release.name, release.bad, release.status) for release in releases),
    )


def build_report(
    prepared: Prepared,
    tally: Tally,
    *,
    devices: Sequence[DeviceSummary],
    costs: Sequence[Cost],
    events: Sequence[FleetEvent],
    releases: Sequence[ReleaseSummary],
    ended_s: float,
    wall_s: float,
    workers: int,
    peak_mb: float,
) -> FleetReport:
    """Everything that is known after a run, whole or not."""
    scenario = prepared.scenario
    cohorts = [plan.cohort for plan in prepared.devices]
    groups = {ALL: np.arange(len(cohorts))}
    if len(set(cohorts)) > 1:
        groups |= {name: np.flatnonzero([cohort == name for cohort in cohorts]) for name in dict.fromkeys(cohorts)}
    measured = measure(devices, tally.expected, releases, numbers=tally.numbers)
    duration_s = scenario.fleet.duration_h * HOUR_S
    onsets: dict[str, list[float]] = {}
    for plan in prepared.devices:
        times = {time for drift in plan.drifts for time in drift.onsets(duration_s)}
        onsets.setdefault(plan.cohort, []).extend(round(time / HOUR_S, 4) for time in times)
    return FleetReport(
        scenario=Path(scenario.file).name if scenario.file else "",
        about=scenario.about,
        seed=scenario.fleet.seed,
        tick_s=scenario.fleet.tick_s,
        duration_h=scenario.fleet.duration_h,
        ended_h=ended_s / HOUR_S,
        onsets_h={name: sorted(set(times))[:50] for name, times in onsets.items() if times},
        measured=measured,
        unmet=scenario.expect.unmet(measured),
        targets={
            name: target.std for name, target in zip(prepared.world.targets, prepared.manifest.targets, strict=True)
        },
        scores={name: tally.curve(members, ended_s) for name, members in groups.items()},
        kept={name: tally.kept_curve(members, ended_s) for name, members in groups.items()},
        devices=list(devices),
        releases=list(releases),
        events=list(events),
        costs=list(costs),
        wall_s=wall_s,
        workers=workers,
        peak_mb=peak_mb,
    )


# ---- in words


def summary_lines(report: FleetReport) -> list[str]:
    """The report in a dozen lines for a terminal."""
    found = report.measured
    lines = []
    if report.partial:
        lines.append(f"PARTIAL: stopped after {report.ended_h:.1f} of {report.duration_h:g} hours")
    made = int(report.total("predictions"))
    lines.append(
        f"{len(report.devices)} devices, {report.ended_h / 24:.1f} days, {made:,} predictions{_how_good(report)}"
    )
    if report.mean("under", drifted=True) is not None:
        lines.append(
            f"where data changed: {score_text(report.mean('before', drifted=True), report)} before,"
            f" {score_text(report.mean('under', drifted=True), report)} with the model that met the change,"
            f" {score_text(report.mean('after', drifted=True), report)} at the end"
        )
    forgotten = report.mean("forgotten")
    told = f"{forgotten:+.3g}" if report.targets and forgotten is not None else _points(forgotten)
    lines.append(f"forgotten of the original data: {told} on average")
    drifted = [d for d in report.devices if d.drifts and (d.lost_h is None or (d.changed_h or 0) < d.lost_h)]
    seen = [d.delay_h for d in drifted if d.delay_h is not None]
    delay = f", {np.median(seen):.1f} h after it (median)" if seen else ""
    lines.append(
        f"alarms: {report.total('alarms'):.0f}; false {_number(found.false_alarms_per_device_day)} a device and day;"
        f" changes noticed on {len(seen)} of {len(drifted)} devices{delay}"
    )
    lines.append(
        f"learning: {report.total('learned'):.0f} jobs, {report.total('promotions'):.0f} promotions,"
        f" {report.total('rejections'):.0f} rejections, {report.total('rollbacks'):.0f} rollbacks"
    )
    lines.append(
        f"network: {_bytes(found.bytes_per_device_day or 0)} payload a device and day; on the wire"
        f" {_bytes(report.total('wire_sent'))} sent, {_bytes(report.total('wire_received'))} received"
    )
    cpu_s, learner_s, joules = (sum(getattr(c, key) for c in report.costs) for key in ("cpu_s", "learner_s", "joules"))
    lines.append(
        f"on this machine: {cpu_s:.1f} s of CPU, {learner_s:.1f} of them learning, about {joules:.0f} J;"
        f" {report.wall_s:.0f} s, {report.workers} process{'es' if report.workers > 1 else ''},"
        f" {report.peak_mb:.0f} MB at most"
    )
    lines += [f"{release.name}: {release.status}" + (f" ({release.reason})" if release.reason else "")
              for release in report.releases]  # fmt: skip
    return lines


def _how_good(report: FleetReport) -> str:
    """Score of all devices over the whole run, with its band."""
    made = np.array([device.predictions for device in report.devices])
    if report.targets:
        off = np.array([(device.error or 0.0) * device.predictions for device in report.devices])
        band = error_band(off, np.zeros_like(off), made)
    else:
        band = share_band(np.array([device.right for device in report.devices]), made)
    if band is None:
        return ""
    value, low, high = (score_text(part, report) for part in band)
    if not report.targets:
        return f", {value} right (95 %: {low} to {high})"
    told = f", off by {value} standard deviations"
    if len(report.targets) == 1:
        told += f" ({band[0] * next(iter(report.targets.values())):.3g} of {next(iter(report.targets))})"
    return told + (f", 95 %: {low} to {high}" if len(report.devices) > 1 else "")


def score_text(value: float | None, report: FleetReport) -> str:
    """An accuracy in percent, or an error."""
    if value is None:
        return "-"
    return f"{value:.3g}" if report.targets else f"{value:.1%}"


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f} points"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


# ---- two reports


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
