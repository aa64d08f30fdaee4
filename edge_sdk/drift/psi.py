"""Population stability index of each window against the reference."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.drift.windows import WindowedDetector
from edge_sdk.types import DoubleArray

_GROUPS = 10


class PSIDetector(WindowedDetector):
    """Raises an alarm when the population stability index of any channel in a window is more than chance makes it.

    The 64 bins are joined to at most ten groups with a tenth of the reference or more each. The usual limits of 0.1
    and 0.25 do not say how many rows they are for. By chance alone the index is distributed as chi-squared with one
    less degrees of freedom than groups, times (1 / reference rows + 1 / window), and that gives the p-value. A channel
    with less than a tenth of its reference beside one value has one group, and is not seen by this test. For arguments,
    and what the threshold promises and does not, see `WindowedDetector`.

    Source:
        Yurdakul & Naranjo 2020, "Statistical properties of the population stability index",
        doi:10.21314/JRMV.2020.227.

    Example:
        >>> detector = PSIDetector(np.ones((1, 64)), rows=1000, run_length=10_000.0)
        >>> detector.update(np.random.default_rng(0).random((256, 1)) ** 2)
        >>> detector.drift_detected
        True
    """

    def __init__(self, reference: DoubleArray, *, rows: int, run_length: float, window: int = 256) -> None:
        super().__init__(reference, rows=rows, run_length=run_length, window=window)
        self._join = np.stack([_groups(shares) for shares in self.shares])
        self._expected = self._grouped(self.rows * self.shares)

    def _grouped(self, counts: DoubleArray) -> DoubleArray:
        """Shares of the groups, float64 [K, 10]; half a row is added to each, so that none is empty."""
        joined = (self._join @ counts[:, :, None])[:, :, 0] + 0.5
        there = self._join.any(axis=2)
        joined = np.where(there, joined, 0.0)
        shares: DoubleArray = np.where(there, joined / joined.sum(axis=1, keepdims=True), 1.0)
        return shares

    def index(self, counts: DoubleArray) -> DoubleArray:
        """The population stability index of counts, float64 [K, 64] to [K]."""
        seen = self._grouped(counts)
        index: DoubleArray = ((seen - self._expected) * np.log(seen / self._expected)).sum(axis=1)
        return index

    def p_values(self, counts: DoubleArray) -> DoubleArray:
        """From the limit distribution."""
        freedom = np.maximum(1, self._join.any(axis=2).sum(axis=1) - 1)
        return _chi2_above(self.index(counts) / (1 / self.rows + 1 / self.window), freedom)


def _groups(shares: DoubleArray) -> DoubleArray:
    """Which bins make up each group: float64 [10, 64] of 0 and 1; groups that are not needed are empty."""
    groups, group, gathered = np.zeros((_GROUPS, len(shares))), 0, 0.0
    left = float(shares.sum())
    for i, share in enumerate(shares):
        groups[group, i] = 1
        gathered, left = gathered + share, left - share
        if gathered >= 1 / _GROUPS - 1e-9 and left >= 1 / _GROUPS - 1e-9:
            group, gathered = group + 1, 0.0
    return groups


def _chi2_above(value: DoubleArray, freedom: DoubleArray) -> DoubleArray:
    """Probability that chi-squared is above `value`: Wilson & Hilferty 1931, doi:10.1073/pnas.17.12.684."""
    spread = 2 / (9 * freedom)
    z = (np.cbrt(value / freedom) - (1 - spread)) / np.sqrt(spread)
    return np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in z])
