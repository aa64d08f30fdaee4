"""How good the predictions of a simulated fleet are over time: sums by device, and curves with bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from edge_sdk.plan import Prepared
from edge_sdk.stats import wilson_interval
from edge_sdk.streams import HOUR_S
from edge_sdk.types import AnyArray, DoubleArray, IndexArray

_BINS = 168
_Z = 1.96


class Curve(msgspec.Struct, frozen=True):
    """A score over time, with a band of 95 %."""

    hours: list[float]
    """Ends of the intervals that it was counted over."""
    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


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
