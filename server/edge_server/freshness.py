"""What freshness is worth: accuracy by age of the model, and what a new one would bring and cost. Pure functions.

Labelled predictions of one device are alike, so every interval takes the devices, not the predictions, for what was
drawn at random, and none is given for fewer than `MIN_DEVICES` devices or `MIN_LABELLED` labelled predictions a side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_sdk.stats import wilson_interval

MIN_DEVICES = 5
MIN_LABELLED = 50
FRESH_DAYS = 7.0
AGES = (0.0, 1.0, 2.0, 4.0, 7.0, 14.0, 30.0, 60.0, 90.0, 180.0, math.inf)
"""Ends of the ages that are told apart, in days."""
_DAY_S = 86_400.0
_Z = 1.96
_HORIZON_DAYS = 30.0


class Cell(msgspec.Struct, frozen=True):
    """What one version on one device did on one day."""

    device: str
    release: int
    head: int
    day: int
    """Since the epoch (UTC)."""
    predictions: int
    labelled: int
    correct: int
    start: float
    """Of its first report, seconds since the epoch."""


class CostSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it takes to ship a release.

    Attributes:
        joules_per_mb: For a device to receive and store a million bytes; depends on its radio.
        joules_per_install: For a device to check and activate it.
    """

    joules_per_mb: Annotated[float, Meta(ge=0)] = 5.0
    joules_per_install: Annotated[float, Meta(ge=0)] = 10.0


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A number with its 95 % interval, or why there is none.

    Attributes:
        value: None: too little is known.
        low: Of the interval.
        high: Of the interval.
        devices: That it rests on.
        labelled: Labelled predictions that it rests on; of a difference, the fewer of its two sides.
        problem: Why there is no value.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    devices: int = 0
    labelled: int = 0
    problem: str = ""


class AgeBin(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy of models of some age."""

    from_days: float
    to_days: float | None
    """None: and older."""
    accuracy: Estimate


class Freshness(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the value of freshness. Accuracies and their differences lie in 0 to 1."""

    now: float
    """Seconds since the epoch."""
    by_base_age: list[AgeBin]
    """Since the release was taken in by the coordinator."""
    by_version_age: list[AgeBin]
    """Since the release or learned head began to serve on the device."""
    slope_per_day: Estimate
    """Change of accuracy for each day of the base's age, within devices; older bases also met later data."""
    lost_since_release: Estimate
    """Accuracy in the first week of the release in use less that of the last week, on the same devices."""
    lost_since_adaptation: Estimate
    """The same of the version (release and head) in use."""
    gained_by_releases: Estimate
    """Accuracy in a release's first week less that in the last week of the one before, on the same devices."""
    gained_by_adaptations: Estimate
    """The same of learned heads."""
    devices: int
    predictions_per_day: float
    """Of all devices together, over the last week."""
    release_bytes: int
    """Of the newest release; devices that have parts of it fetch less."""
    ship_bytes: int
    """To all devices."""
    ship_joules: float
    right_per_day: Estimate
    """More right answers a day, of all devices, if a new base were as good on today's data as this one was at first."""
    right_per_mb: float | None
    """The same over 30 days for each million bytes sent; None: not known."""
    advice: str


def freshness(
    cells: Sequence[Cell],
    *,
    built: Mapping[int, float],
    release_bytes: int,
    devices: int,
    costs: CostSettings,
    now: float,
) -> Freshness:
    """The report.

    Args:
        cells: From the beginning of each version.
        built: When each release was taken in.
        release_bytes: Size of the newest release's files.
        devices: That a release would be shipped to.
        costs: See `CostSettings`.
        now: Seconds since the epoch.
    """
    judged = [cell for cell in cells if cell.labelled]
    released, began = (_began(cells, key) for key in (_release, _version))

    def release_age(cell: Cell) -> float:
        return cell.start - released[_release(cell)]

    def version_age(cell: Cell) -> float:
        return cell.start - began[_version(cell)]

    based = [cell for cell in judged if cell.release in built]
    lost = _lost(judged, release_age, lambda cell: (cell.release,), now)
    week = [cell for cell in cells if cell.start >= now - FRESH_DAYS * _DAY_S]
    per_day = sum(cell.predictions for cell in week) / FRESH_DAYS
    ship_bytes = release_bytes * devices
    more = _scaled(lost, per_day)
    return Freshness(
        now=now,
        by_base_age=by_age(based, lambda cell: cell.start - built[cell.release]),
        by_version_age=by_age(judged, version_age),
        slope_per_day=slope(based, lambda cell: (cell.start - built[cell.release]) / _DAY_S),
        lost_since_release=lost,
        lost_since_adaptation=_lost(judged, version_age, lambda cell: (cell.release, cell.head), now),
        gained_by_releases=_gained(judged, release_age, lambda cell: (cell.release,)),
        gained_by_adaptations=_gained(judged, version_age, lambda cell: (cell.release, cell.head), within=True),
        devices=devices,
        predictions_per_day=per_day,
        release_bytes=release_bytes,
        ship_bytes=ship_bytes,
        ship_joules=ship_bytes / 1e6 * costs.joules_per_mb + devices * costs.joules_per_install,
        right_per_day=more,
        right_per_mb=None if more.value is None or not ship_bytes else more.value * _HORIZON_DAYS / (ship_bytes / 1e6),
        advice=_advice(lost),
    )


def _release(cell: Cell) -> Hashable:
    return cell.device, cell.release


def _version(cell: Cell) -> Hashable:
    return cell.device, cell.release, cell.head


def _began(cells: Iterable[Cell], key: Callable[[Cell], Hashable]) -> dict[Hashable, float]:
    """When each release or version began to serve on its device."""
    began: dict[Hashable, float] = {}
    for cell in cells:
        began[key(cell)] = min(cell.start, began.get(key(cell), math.inf))
    return began


def by_age(cells: Iterable[Cell], age_s: Callable[[Cell], float]) -> list[AgeBin]:
    """Accuracy in each of `AGES` that any cell falls into."""
    bins: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        days = max(0.0, age_s(cell) / _DAY_S)
        bins[max(i for i, low in enumerate(AGES[:-1]) if low <= days)].append(cell)
    return [
        AgeBin(
            from_days=AGES[i],
            to_days=None if math.isinf(AGES[i + 1]) else AGES[i + 1],
            accuracy=share(_by_device(bins[i]).values()),
        )
        for i in sorted(bins)
    ]


def _by_device(cells: Iterable[Cell]) -> dict[str, tuple[int, int]]:
    """Right and labelled predictions of each device."""
    sums: dict[str, tuple[int, int]] = {}
    for cell in cells:
        right, labelled = sums.get(cell.device, (0, 0))
        sums[cell.device] = right + cell.correct, labelled + cell.labelled
    return sums


def share(counts: Iterable[tuple[int, int]]) -> Estimate:
    """Share of right answers over devices that differ.

    Args:
        counts: Right and labelled predictions of each device.

    Source:
        The ratio estimator of cluster samples, Cochran 1977, "Sampling techniques", 3rd edition, section 9A.5; at least
        as wide as Wilson's interval.
    """
    pairs = [pair for pair in counts if pair[1]]
    labelled, devices = sum(n for _, n in pairs), len(pairs)
    if problem := _too_little(devices, labelled):
        return Estimate(devices=devices, labelled=labelled, problem=problem)
    right = sum(k for k, _ in pairs)
    p = right / labelled
    error = math.sqrt(devices / (devices - 1) * sum((k - p * n) ** 2 for k, n in pairs)) / labelled
    low, high = wilson_interval(right, labelled)
    reach = _t(devices - 1) * error
    return Estimate(
        value=p, low=max(0.0, min(low, p - reach)), high=min(1.0, max(high, p + reach)), devices=devices,
        labelled=labelled,
    )  # fmt: skip


Pair = tuple[tuple[int, int], tuple[int, int]]
"""Right and labelled predictions of one device on two sides."""


def difference(pairs: Iterable[Pair]) -> Estimate:
    """Mean of the devices' differences in accuracy, second less first, weighted by their labels.

    The interval is that of a weighted mean over devices, and at least as wide as the labels alone would make it.
    """
    used = [pair for pair in pairs if pair[0][1] and pair[1][1]]
    devices, labelled = len(used), min((sum(pair[side][1] for pair in used) for side in (0, 1)), default=0)
    if problem := _too_little(devices, labelled):
        return Estimate(devices=devices, labelled=labelled, problem=problem)
    terms = []
    for (k0, n0), (k1, n1) in used:
        p0, p1 = (k0 + 1) / (n0 + 2), (k1 + 1) / (n1 + 2)
        noise = p0 * (1 - p0) / n0 + p1 * (1 - p1) / n1
        terms.append((1 / (1 / n0 + 1 / n1), k1 / n1 - k0 / n0, noise))
    total = sum(weight for weight, _, _ in terms)
    mean = sum(weight * d for weight, d, _ in terms) / total
    between = devices / (devices - 1) * sum(weight**2 * (d - mean) ** 2 for weight, d, _ in terms)
    within = sum(weight**2 * noise for weight, _, noise in terms)
    reach = _t(devices - 1) * math.sqrt(max(between, within)) / total
    return Estimate(value=mean, low=mean - reach, high=mean + reach, devices=devices, labelled=labelled)


def slope(cells: Iterable[Cell], age_days: Callable[[Cell], float]) -> Estimate:
    """Change of accuracy for a day of age, from how each device's own accuracy changes; devices may differ in level.

    Source:
        Within (fixed-effects) regression with errors clustered by device: Arellano 1987,
        doi:10.1111/j.1468-0084.1987.mp49004006.x.
    """
    own: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for cell in cells:
        own[cell.device].append((float(cell.labelled), age_days(cell), cell.correct / cell.labelled))
    scores, weight_of_age, labelled = [], 0.0, 0.0
    for rows in own.values():
        total = sum(w for w, _, _ in rows)
        age, level = (sum(w * row[i] for row in rows for w in [row[0]]) / total for i in (1, 2))
        spread = sum(w * (a - age) ** 2 for w, a, _ in rows)
        if len(rows) < 2 or spread <= 0:
            continue
        scores.append([(w, a - age, y - level) for w, a, y in rows])
        weight_of_age += spread
        labelled += total
    devices = len(scores)
    if problem := _too_little(devices, int(labelled)):
        return Estimate(devices=devices, labelled=int(labelled), problem=problem)
    value = sum(w * a * y for rows in scores for w, a, y in rows) / weight_of_age
    squares = sum(sum(w * a * (y - value * a) for w, a, y in rows) ** 2 for rows in scores)
    reach = _t(devices - 1) * math.sqrt(devices / (devices - 1) * squares) / weight_of_age
    return Estimate(value=value, low=value - reach, high=value + reach, devices=devices, labelled=int(labelled))


def _lost(
    cells: Sequence[Cell], age_s: Callable[[Cell], float], version: Callable[[Cell], tuple[int, ...]], now: float
) -> Estimate:
    """Accuracy when fresh less that of the last week, of the version that each device has now."""
    latest: dict[str, Cell] = {}
    for cell in cells:
        if cell.device not in latest or cell.start >= latest[cell.device].start:
            latest[cell.device] = cell
    fresh_s = FRESH_DAYS * _DAY_S
    current = [cell for cell in cells if version(cell) == version(latest[cell.device])]
    recent = _by_device(cell for cell in current if cell.start >= now - fresh_s and age_s(cell) >= fresh_s)
    fresh = _by_device(cell for cell in current if age_s(cell) < fresh_s)
    return difference((recent[device], fresh[device]) for device in recent.keys() & fresh.keys())


def _gained(
    cells: Sequence[Cell],
    age_s: Callable[[Cell], float],
    version: Callable[[Cell], tuple[int, ...]],
    *,
    within: bool = False,
) -> Estimate:
    """Accuracy in a version's first week less that in the last week of the one before it; `within` a release."""
    fresh_s = FRESH_DAYS * _DAY_S
    own: dict[str, list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: (cell.device, cell.start)):
        own[cell.device].append(cell)
    pairs: list[Pair] = []
    for rows in own.values():
        sides = [[0, 0], [0, 0]]
        order = list(dict.fromkeys(version(cell) for cell in rows))
        for before, after in pairwise(order):
            if within and before[0] != after[0]:
                continue
            former = [cell for cell in rows if version(cell) == before]
            latter = [cell for cell in rows if version(cell) == after and age_s(cell) < fresh_s]
            former = [cell for cell in former if cell.start >= former[-1].start - fresh_s]
            if former and latter:
                for side, part in zip(sides, (former, latter), strict=True):
                    side[0] += sum(cell.correct for cell in part)
                    side[1] += sum(cell.labelled for cell in part)
        pairs.append(((sides[0][0], sides[0][1]), (sides[1][0], sides[1][1])))
    return difference(pairs)


def _too_little(devices: int, labelled: int) -> str:
    if devices < MIN_DEVICES:
        return f"{devices} devices have labels for it, at least {MIN_DEVICES} are needed"
    return f"{labelled} labelled predictions, at least {MIN_LABELLED} are needed" if labelled < MIN_LABELLED else ""


def _t(freedom: int) -> float:
    """0.975 quantile of Student's t: the expansion of Fisher & Cornish 1960, doi:10.1080/00401706.1960.10489895."""
    z = _Z
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate
    return msgspec.structs.replace(
        estimate, value=estimate.value * factor, low=estimate.low * factor, high=estimate.high * factor
    )


def _advice(lost: Estimate) -> str:
    if lost.value is None or lost.low is None or lost.high is None:
        return f"Cannot tell what a new base would bring: {lost.problem}."
    interval = f"{100 * lost.value:.1f} points (95 %: {100 * lost.low:.1f} to {100 * lost.high:.1f})"
    if lost.low > 0:
        return f"A new base may bring back {interval}: the devices have lost so much since this one was fresh."
    if lost.high <= 0:
        return f"Nothing was lost since this base was fresh ({interval}): a new one need not be hurried."
    return f"Not decided: since this base was fresh the devices have lost {interval}. More labels would tell."
