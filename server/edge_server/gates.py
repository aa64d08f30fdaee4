"""What the fleet reports of a release, held against its control group: pure figures in, a verdict in words out.

Each gate compares how the devices on the release changed with how the control group changed meanwhile, by a test that
may be read at any time (ADR 23). A device's own past takes out what distinguishes it from the others, the control group
what happened to all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from edge_sdk.sketch import ACCURACY
from edge_sdk.stats import sequence_radius
from edge_server.plan import APP_METRIC, LATENCIES, Gate, RolloutPlan, count_devices

_DAY_S = 86_400.0
_EVENTS = ("crashes", "rollbacks", "drift")
LEAST_JUDGED = 10
"""A normal limit of fewer values is none, however bad they are."""
_MIN_DEVICES = 5
"""So many devices of both groups together say how much devices differ from each other."""
_WIDEST = 20.0
"""Difference of logarithms that is told: beyond it is as bad."""
_ROUGHNESS = (2 * ACCURACY) ** 2 / 12
"""Variance of a logarithm that is told to within a bucket of a sketch: equal figures are not equal latencies."""


class Sums(msgspec.Struct, frozen=True, array_like=True):
    """Number, sum and sum of squares of values."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        """0 for no values."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """0 for no values."""
        return max(0.0, self.squares / self.count - self.mean**2) if self.count else 0.0

    def __add__(self, other: Sums) -> Sums:
        """All values of both."""
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)


def share(count: float, hits: float) -> Sums:
    """Of `count` values, `hits` are 1 and the others 0."""
    return Sums(count, hits, hits)


class DeviceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the committed reports and events say about one device of the group.

    Attributes:
        device: Its name.
        eligible: It has the labels that the plan asks for.
        on_candidate: Its last row came from the release that is being rolled out.
        in_shadow: It runs the release beside the one in use, and told so.
        switched: It runs the candidate, and did not before this stage.
        reachable: Its last row is recent.
        failed: The last it said about the release is that it could not be installed.
        rolled_back: The last it said about the release is that it left it.
        predictions: Since the stage began; of a device that runs the candidate, only those on it. So are
            the next three.
        errors: Predictions that ended in an error.
        labelled: Labelled predictions.
        correct: Those that were right.
        labelled_before: In its last reports before those, on what it ran when the stage began.
        correct_before: Those that were right.
        reports: Windows since the stage began.
        seconds: Their length together.
        values: What else the plan's gates look at, by metric: since the stage began, and before. Of p50_ms and p99_ms
            the logarithms of what reports tell. In shadow, of pairs: accuracy is how often the release was right where
            the one in use was not, less the reverse.
    """

    device: str
    eligible: bool = True
    on_candidate: bool = False
    in_shadow: bool = False
    switched: bool = False
    reachable: bool = True
    failed: bool = False
    rolled_back: bool = False
    predictions: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    labelled_before: int = 0
    correct_before: int = 0
    reports: int = 0
    seconds: float = 0.0
    values: dict[str, tuple[Sums, Sums]] = {}

    @property
    def has_failed(self) -> bool:
        """Whether it tried the candidate and does not run it."""
        return self.failed or self.rolled_back

    def sums(self, metric: str) -> tuple[Sums, Sums]:
        """What a gate looks at: since the stage began, and before."""
        if metric in self.values:
            return self.values[metric]
        if metric == "accuracy":
            return share(self.labelled, self.correct), share(self.labelled_before, self.correct_before)
        if metric == "errors":
            return share(self.predictions + self.errors, self.errors), Sums()
        return Sums(), Sums()


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How one gate stands.

    Attributes:
        metric: What it looks at.
        verdict: harm halts; pass lets the stage go on; wait: it must see more.
        sample: Values on the release so far.
        wanted: So many are wanted.
        worse: By how much the release is worse than what the control group did, in the unit of the margin; negative if
            it is better.
        radius: Half-width of the interval about it, at the gate's error level, valid at all times together; 0 while
            nothing is known.
        devices: On the release, of which something is known.
        control: Values in the control group.
        reason: The figures in words.
    """

    metric: str
    verdict: Literal["harm", "pass", "wait"]
    sample: float
    wanted: int
    worse: float = 0.0
    radius: float = 0.0
    devices: int = 0
    control: float = 0.0
    reason: str = ""


class _Seen(NamedTuple):
    """What a gate looks at, of one device."""

    after: Sums
    before: Sums
    switched: bool
    reports: int
    seconds: float


class Arm(NamedTuple):
    """One side of a comparison: how many values since the stage began, and what they say, each weighing the same."""

    values: float
    change: float
    after: float
    before: float
    noise: float
    """Sum over devices of weight squared by (1 / values since + 1 / values before)."""
    weights: float
    """Sum of squared weights: 1 for one device, 1 / N for N alike."""
    devices: int
    scatter: float
    """Mean squared distance of the devices' changes from their mean."""


def readings(
    plan: RolloutPlan, metrics: Sequence[DeviceMetrics], *, shadowing: bool = False, last: bool = True
) -> list[Reading]:
    """How every gate of the stage stands.

    Args:
        plan: With its gates and error level.
        metrics: One entry for every device of the group.
        shadowing: The release runs beside the one in use: pairs are judged, and there is no control group.
        last: It is the last stage.
    """
    eligible = [entry for entry in metrics if entry.eligible]
    on_it = [entry for entry in eligible if (entry.in_shadow if shadowing else entry.on_candidate)]
    return [
        read(
            gate,
            on_it,
            [] if shadowing else _control(eligible),
            plan.level,
            release=plan.release,
            paired=shadowing,
        )
        for gate in plan.judged_by(shadowing=shadowing, last=last)
    ]


def _control(eligible: Sequence[DeviceMetrics]) -> list[DeviceMetrics]:
    return [entry for entry in eligible if not entry.on_candidate and not entry.has_failed]


def read(
    gate: Gate,
    treated: Sequence[DeviceMetrics],
    control: Sequence[DeviceMetrics],
    level: float,
    *,
    release: int,
    paired: bool = False,
) -> Reading:
    """How one gate stands.

    The release is worse by D = (change of the treated) - (change of the control group), in the direction that is bad; a
    control group that got better does not raise the bar. It does harm if D is above the margin by more than the radius
    of a confidence sequence. The variance of D is the larger of two: what the values within a device say (no less
    varied than any group seen, so that a run of equal values proves nothing), and what devices differ by.

    Args:
        gate: What is looked at, and how much harm is tolerated.
        treated: Devices on the release.
        control: Devices still on the old one. Where they say too little, it is those that ran the release before the
            stage, for which nothing has changed but the world either.
        level: Error level of this gate: chance that it ever calls a release harmful (or proven) that is not.
        release: Number, for the words.
        paired: Of the time in shadow.

    Source:
        Waudby-Smith et al. 2024, arXiv:2103.06476 (see `stats.sequence_radius`), for a difference of differences.
    """
    ran, others = ([_Seen(*e.sums(gate.metric), e.switched, e.reports, e.seconds) for e in group]
                   for group in (treated, control))  # fmt: skip
    sample, wanted = sum(entry.after.count for entry in ran), gate.min_sample
    direct = paired or gate.metric in ("errors", *_EVENTS)
    others, ran = _groups(gate, ran, others, direct=direct)
    one = _arm(ran, direct=direct)
    if one is None or one.values < LEAST_JUDGED:
        return _undecided(gate, sample, wanted)
    other = _arm(others, direct=direct)
    if other is not None and other.values < LEAST_JUDGED:
        other = None
    sign = -1.0 if gate.higher_is_better else 1.0
    gone = sign * other.change if other is not None else 0.0
    worse = sign * one.change - gone
    margin = _margin(gate, ran)
    variance = _variance(gate, ran, others if other is not None else [], direct=direct)
    error = math.sqrt(_of_arm(one, variance, other) + (_of_arm(other, variance, one) if other is not None else 0.0))
    size = min(one.values, other.values) if other is not None else one.values
    radius = error * math.sqrt(size) * sequence_radius(size, level)
    shown = _told(gate, worse, radius)
    reading = Reading(
        metric=gate.metric, verdict="pass", sample=sample, wanted=wanted, worse=shown[0], radius=shown[1],
        devices=one.devices, control=other.values if other is not None else 0.0,
    )  # fmt: skip
    words = _words(gate, reading, one, other, release=release, margin=margin, paired=paired)
    reading = msgspec.structs.replace(reading, reason=words)
    if sign * one.change - max(gone, 0.0) - radius > margin:
        return msgspec.structs.replace(reading, verdict="harm")
    proven = {"no_harm": True, "not_worse": worse + radius < margin, "better": worse + radius < 0}[gate.proof]
    if sample < wanted or not proven:
        return msgspec.structs.replace(reading, verdict="wait")
    return reading


def _groups(
    gate: Gate, treated: Sequence[_Seen], control: Sequence[_Seen], *, direct: bool
) -> tuple[list[_Seen], list[_Seen]]:
    """(control, treated) as far as both sides of a comparison are known for each device."""
    others, on_it = ([e for e in group if e.after.count and (direct or e.before.count)] for group in (control, treated))
    earlier = [entry for entry in on_it if not entry.switched]
    found, enough = sum(entry.after.count for entry in others), max(LEAST_JUDGED, gate.min_sample)
    if direct or found >= enough or found >= sum(entry.after.count for entry in earlier):
        return others, on_it
    return earlier, [entry for entry in on_it if entry.switched]


def _arm(entries: Sequence[_Seen], *, direct: bool) -> Arm | None:
    count = sum(entry.after.count for entry in entries)
    if not count:
        return None
    noise = weights = after_mean = before_mean = 0.0
    changes: list[tuple[float, float]] = []
    for after, before, *_ in entries:
        weight = after.count / count
        was = 0.0 if direct else before.mean
        noise += weight**2 * (1 / after.count + (0.0 if direct else 1 / before.count))
        weights += weight**2
        after_mean += weight * after.mean
        before_mean += weight * was
        changes.append((weight, after.mean - was))
    change = after_mean - before_mean
    scatter = sum(weight * (value - change) ** 2 for weight, value in changes)
    return Arm(count, change, after_mean, before_mean, noise, weights, len(entries), scatter)


def _variance(gate: Gate, treated: Sequence[_Seen], control: Sequence[_Seen], *, direct: bool) -> float:
    """Of one value within a device: that of the most varied of the groups, as far as they are known."""
    found = []
    for group in (treated, control):
        for when in (0,) if direct else (0, 1):
            total = _total(entry.before if when else entry.after for entry in group)
            if gate.metric in _EVENTS:
                found.append(total.mean)  # counts: a Poisson variable varies as much as its mean
            elif total.count:
                # of 0 in n, the next may still be a 1
                smoothed = (total.squares + 1) / (total.count + 2)
                if gate.metric in LATENCIES:
                    least = _ROUGHNESS
                else:
                    least = 0.0 if gate.metric.startswith(APP_METRIC) else smoothed * (1 - smoothed)
                found.append(max(total.variance, least))
    return max(found, default=0.0)


def _total(parts: Iterable[Sums]) -> Sums:
    every = list(parts)
    return Sums(sum(p.count for p in every), sum(p.total for p in every), sum(p.squares for p in every))


def _of_arm(arm: Arm, variance: float, other: Arm | None) -> float:
    """Variance of an arm's change."""
    within = variance * arm.noise
    devices = arm.devices + (other.devices if other is not None else 0)
    arms = 2 if other is not None else 1
    if devices < max(_MIN_DEVICES, arms + 2):
        return within
    scatter = (arm.scatter * arm.devices + (other.scatter * other.devices if other is not None else 0.0)) / (
        devices - arms
    )
    return max(within, scatter * arm.weights)


def _margin(gate: Gate, treated: Sequence[_Seen]) -> float:
    """In the unit of the values."""
    if gate.metric in LATENCIES:
        return math.log1p(gate.margin)
    if gate.metric in _EVENTS:
        reports = sum(entry.reports for entry in treated)
        return gate.margin * sum(entry.seconds for entry in treated) / reports / _DAY_S if reports else gate.margin
    return gate.margin


def _told(gate: Gate, worse: float, radius: float) -> tuple[float, float]:
    """`worse` and `radius` in the unit of the margin: of logarithms as shares, the radius as far as it goes up."""
    if gate.metric not in LATENCIES:
        return worse, radius
    worse, radius = min(worse, _WIDEST), min(radius, _WIDEST)
    return math.expm1(worse), math.exp(worse) * math.expm1(radius)


def _undecided(gate: Gate, sample: float, wanted: int) -> Reading:
    enough = sample >= wanted and gate.proof == "no_harm"
    return Reading(
        metric=gate.metric, verdict="pass" if enough else "wait", sample=sample, wanted=wanted,
        reason=f"{sample:.0f} of {wanted} {_unit(gate)}",
    )  # fmt: skip


def _unit(gate: Gate) -> str:
    if gate.metric == "accuracy":
        return "labelled predictions"
    if gate.metric in (*_EVENTS, *LATENCIES):
        return f"reports for {gate.metric}"
    return f"values of {gate.metric.removeprefix(APP_METRIC)}" if gate.metric.startswith(APP_METRIC) else "predictions"


def _words(
    gate: Gate, reading: Reading, one: Arm, other: Arm | None, *, release: int, margin: float, paired: bool
) -> str:
    """The figures of a comparison."""
    metric, name = gate.metric, gate.metric.removeprefix(APP_METRIC)
    of = f"{one.values:.0f} {_unit(gate)}, {count_devices(one.devices)}"
    elsewhere = "" if other is None else f", {other.after:.4g} in the control group"
    if metric == "accuracy" and paired:
        told = f"release {release} in shadow is right {one.change:+.1%} more often than the one in use ({of})"
    elif metric == "accuracy":
        of = f"{one.values:.0f} labelled, {count_devices(one.devices)}"
        changed = (
            "there is no control group"
            if other is None
            else (
                f"control changed by {other.change:+.1%} ({other.values:.0f} labelled, {count_devices(other.devices)})"
            )
        )
        told = f"accuracy on release {release} is {one.after:.1%} ({of}), before {one.before:.1%}; {changed}"
    elif metric == "disagreement":
        told = f"release {release} in shadow differs on {one.after:.1%} ({of})"
    elif metric == "errors":
        told = f"{one.after * one.values:.0f} of {one.values:.0f} predictions on release {release} failed{elsewhere}"
    elif metric in LATENCIES:
        margin = gate.margin
        elsewhere = (
            f", {_ms(other.after)} in the control group, before {_ms(other.before)}" if other is not None else ""
        )
        told = f"{metric} on release {release} is {_ms(one.after)}, before {_ms(one.before)} ({of}){elsewhere}"
    elif metric in _EVENTS:
        told = f"{one.after:.4g} {metric} by report on release {release} ({of}){elsewhere}"
    else:
        told = f"{name} on release {release} is {one.after:.4g}, before {one.before:.4g} ({of}){elsewhere}"
    form = ".4g" if metric in _EVENTS or metric.startswith(APP_METRIC) else ".1%"
    return f"{told}; worse by {reading.worse:+{form}} ± {reading.radius:{form}}, {margin:{form}} is tolerated"


def _ms(logarithm: float) -> str:
    return f"{math.exp(min(logarithm, 2 * _WIDEST)):.3g} ms"
