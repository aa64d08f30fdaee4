"""Whether the data itself is broken: missing, out of range, unseen, frozen, or in another unit."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from edge_sdk.drift.edetector import EDetector, OverEDetector
from edge_sdk.drift.reference import Reference
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

_Z = 3.0
_STRIDE = 16
_EXTREMES = 4
"""How many rows in N may lie beyond the extremes of N others, where chance alone has two of them do so."""
_DISTINCT = 0.9
_UNKNOWN = 0.5


Fault = Literal["missing", "range", "category", "frozen"]


class Finding(NamedTuple):
    """What is wrong with a feature: its name, the fault, and how often, in words."""

    feature: str
    fault: Fault
    words: str


class QualityMonitor(OverEDetector):
    """Raises an alarm when more values are bad than in the reference.

    Channels are indicators, by feature: the value is missing; lies outside the reference's range; is a category that
    the reference does not know; is the same as in the row before. The last says that a sensor is frozen: it is up
    only once repeats are half way from their usual rate to all. Of a reference whose rows have no order that rate is
    taken for one half, and features that take few values are left out.

    Differs from other detectors in what it is shown: raw features, not channels in [0, 1].

    Args:
        reference: What is usual.
        run_length: Rows between two false alarms.

    Raises:
        ValueError: The run length is not above 1.

    Example:
        >>> monitor = QualityMonitor(Reference.from_rows(rows, ["acc_x"]), run_length=10_000)
        >>> monitor.update(np.full((32, 1), np.nan, np.float32))
        >>> monitor.findings()
        [Finding(feature='acc_x', fault='missing', words='62 % of the values missing (usually 0 %)')]
    """

    def __init__(self, reference: Reference, *, run_length: float) -> None:
        r = reference
        categorical = ~np.isnan(r.values).all(axis=1)
        distinct = (np.diff(r.edges, axis=1) > 0).mean(axis=1) > _DISTINCT
        repeats = np.where(np.isnan(r.repeats), _UNKNOWN, r.repeats).astype(np.float64)
        width = len(r.names)
        self._numbers = np.flatnonzero(~categorical & ~np.isnan(r.low))
        self._categories = np.flatnonzero(categorical)
        self._moving = np.flatnonzero((repeats < 1) & (distinct | ~np.isnan(r.repeats)))
        self._low, self._high, self._values = r.low[self._numbers], r.high[self._numbers], r.values[self._categories]
        self._kinds: list[tuple[int, Fault, str]] = [
            *((i, "missing", "missing") for i in range(width)),
            *((i, "range", f"outside {r.low[i]:.4g} to {r.high[i]:.4g}") for i in self._numbers.tolist()),
            *((i, "category", "of an unseen category") for i in self._categories.tolist()),
            *((i, "frozen", "the same as the one before") for i in self._moving.tolist()),
        ]
        usual = np.concatenate([r.missing, np.zeros(len(self._numbers) + len(self._categories))])
        slack = _Z * (np.sqrt(usual * (1 - usual) / r.rows) + _EXTREMES / r.rows)
        again = repeats[self._moving]
        self._usual = np.concatenate([usual, again])
        self._told = np.concatenate([np.ones(len(usual), bool), ~np.isnan(r.repeats[self._moving])])
        self._slack = np.concatenate([slack, (1 - again) / 2])
        self._names = r.names
        self._detector = EDetector(self._usual, self._slack, run_length=run_length, sides="up", stride=_STRIDE)
        self._last: FloatArray = np.full(width, np.nan, np.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the channels that `suspects` numbers."""
        return tuple(f"{self._names[i]}: {what}" for i, _, what in self._kinds)

    def update(self, block: AnyArray) -> None:
        """Fold raw features, float32 [N, F] of `input_features`, oldest first.

        Raises:
            ValueError: The shape is wrong.
        """
        x = np.asarray(block, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != len(self._last):
            raise ValueError(f"expected rows of {len(self._last)} features, got shape {x.shape}")
        if not len(x):
            return
        missing = np.isnan(x)
        numbers = x if len(self._numbers) == x.shape[1] else x[:, self._numbers]
        parts = [missing, (numbers < self._low) | (numbers > self._high)]
        if len(self._categories):
            chosen = x[:, self._categories]
            parts.append(~((chosen[:, :, None] == self._values).any(axis=2) | missing[:, self._categories]))
        same = x == np.concatenate([self._last[None], x[:-1]])
        parts.append(same[:, self._moving])
        self._detector.update(np.concatenate(parts, axis=1))
        self._last = x[-1].copy()

    def findings(self, count: int = 3) -> list[Finding]:
        """The suspects whose rate left its band lately, strongest first."""
        found = []
        for i, rise in self.suspects(count):
            feature, fault, what = self._kinds[i]
            if rise > self._slack[i]:
                usually = f" (usually {100 * self._usual[i]:.0f} %)" if self._told[i] else ""
                words = f"{100 * (self._usual[i] + rise):.0f} % of the values {what}{usually}"
                found.append(Finding(self._names[feature], fault, words))
        return found

    def reset(self) -> None:
        """Forget the evidence and take the alarm down."""
        self._detector.reset()
        self._last = np.full_like(self._last, np.nan)

    def state(self) -> dict[str, AnyArray]:
        """Evidence so far, and the last row."""
        return {**self._detector.state(), "last": self._last}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        if state["last"].shape != self._last.shape:
            raise ValueError(f"state of {state['last'].shape} features for a monitor of {len(self._last)}")
        self._detector.restore({key: array for key, array in state.items() if key != "last"})
        self._last = np.asarray(state["last"], np.float32).copy()


_UNITS = (
    ("degrees Celsius", "degrees Fahrenheit", 1.8, 32.0),
    ("degrees Celsius", "kelvin", 1.0, 273.15),
    ("degrees Fahrenheit", "kelvin", 5 / 9, 459.67 * 5 / 9),
    ("metres", "feet", 1 / 0.3048, 0.0),
    ("kilopascal", "psi", 1 / 6.894757, 0.0),
    ("kilopascal", "bar", 0.01, 0.0),
    ("bar", "psi", 14.503774, 0.0),
    ("g", "metres per second squared", 9.80665, 0.0),
    ("degrees", "radians", math.pi / 180, 0.0),
    ("whole units", "thousandths", 1000.0, 0.0),
    ("0 to 1", "0 to 255", 255.0, 0.0),
)
_MAPS = (*_UNITS, *((after, before, 1 / a, -b / a) for before, after, a, b in _UNITS))
_EXPLAINED = 0.2
_EXPLAINED_WITH_OFFSET = 0.3
"""Where both place and spread must fit, chance hardly makes them do so."""
_CHANGED = 0.5
_FAR = 5.0
"""A feature about 0 shows no more of a conversion than its factor: below this, it may as well be a wider spread."""


def unit_change(reference: Reference, quantiles: AnyArray) -> str | None:
    """Whether a feature seems to come in another unit.

    Its live quantiles must lie where a known conversion takes the reference's, within a fraction of their spread, and
    clearly not where they were. A shift of another cause may look the same: the words say what to check.

    Args:
        reference: What is usual.
        quantiles: float [F, Q], Q >= 3, of live values at the levels 1/(Q+1) ... Q/(Q+1), each of 100 rows or more;
            NaN for features to leave out.

    Returns:
        The feature that fits best in words; None if there is none.

    Example:
        >>> unit_change(reference, live)
        'oven: values look like degrees Fahrenheit, no longer like degrees Celsius'
    """
    live = np.asarray(quantiles, dtype=np.float64)
    count = live.shape[1]
    bins = reference.edges.shape[1] + 1
    levels = np.arange(1, count + 1) / (count + 1)
    usual = np.stack([np.interp(levels, np.arange(1, bins) / bins, edges) for edges in reference.edges])
    told = np.isfinite(live).all(axis=1) & (usual.std(axis=1) > 0)
    told &= _misfit(usual[:, None], live)[:, 0] >= _CHANGED
    factors, offsets = (np.array([unit[i] for unit in _MAPS], dtype=np.float64) for i in (2, 3))
    misfits = _misfit(factors[:, None] * usual[:, None] + offsets[:, None], live)
    about_zero = np.abs(usual.mean(axis=1)) < usual.std(axis=1)
    little = (offsets == 0) & (factors > 1 / _FAR) & (factors < _FAR)
    fits = misfits < np.where(offsets, _EXPLAINED_WITH_OFFSET, _EXPLAINED)
    fits &= told[:, None] & ~(about_zero[:, None] & little)
    if not fits.any():
        return None
    feature, unit = np.unravel_index(np.where(fits, misfits, np.inf).argmin(), fits.shape)
    before, after = _MAPS[unit][:2]
    return f"{reference.names[feature]}: values look like {after}, no longer like {before}"


def _misfit(expected: DoubleArray, seen: DoubleArray) -> DoubleArray:
    """Distance of quantiles [F, M, Q] from those seen, [F, Q], in the larger of their spreads: [F, M]."""
    with np.errstate(invalid="ignore", divide="ignore"):  # of features that are left out
        apart = np.sqrt(np.mean((seen[:, None] - expected) ** 2, axis=2))
        return np.asarray(apart / np.maximum(expected.std(axis=2), seen.std(axis=1)[:, None]))
