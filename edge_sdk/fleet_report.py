"""What a simulation found: pure functions from counts and events to a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.fleet_tally import Curve, Tally, error_band, share_band
from edge_sdk.plan import DAY_S, DevicePlan, Prepared
from edge_sdk.scenario import Measured, ReleaseOutcome
from edge_sdk.streams import HOUR_S
from edge_sdk.types import AnyArray

SCHEMA = 2
ALL = "all"
"""The curve of the whole fleet."""


class FleetEvent(msgspec.Struct, frozen=True):
    """Something that happened on a device."""

    time_s: float
    """Of the simulation's own clock at the end of the tick, from the start."""
    device: str
    name: str
    detail: dict[str, Any]


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
