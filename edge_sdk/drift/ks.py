"""Kolmogorov-Smirnov test of each window against the reference."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.drift.windows import WindowedDetector
from edge_sdk.types import DoubleArray

_TERMS = 5


def kolmogorov(distance: float, rows: float, seen: float) -> float:
    """How likely two samples of one distribution are so far apart: the p-value of the two-sample test.

    Args:
        distance: Largest distance of their distribution functions, in [0, 1].
        rows: Size of the one sample.
        seen: Size of the other.

    Source:
        See `KSDetector`.
    """
    root = math.sqrt(rows * seen / (rows + seen))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.3:  # there the series converges slowly, and to 1
        return 1.0
    p: float = 2 * sum((-1) ** (i - 1) * math.exp(-2 * (i * scaled) ** 2) for i in range(1, _TERMS + 1))
    return min(1.0, max(0.0, p))


class KSDetector(WindowedDetector):
    """Raises an alarm when the distribution of any channel in a window differs from its reference, in any way.

    On 64 bins the largest distance of the distributions is found at the edges of bins only, which makes the test a
    little conservative. For arguments, and what the threshold promises and does not, see `WindowedDetector`.

    Source:
        Smirnov 1948, doi:10.1214/aoms/1177730256; the correction for few rows of Stephens 1970,
        doi:10.1111/j.2517-6161.1970.tb00821.x.

    Example:
        >>> detector = KSDetector(np.ones((1, 64)), rows=1000, run_length=10_000.0)
        >>> detector.update(np.random.default_rng(0).random((256, 1)) ** 2)
        >>> detector.drift_detected
        True
    """

    def p_values(self, counts: DoubleArray) -> DoubleArray:
        """Of the two-sample test, from its limit distribution."""
        seen = counts.sum(axis=1, keepdims=True)
        distance = np.abs(np.cumsum(counts / seen - self.shares, axis=1)).max(axis=1)
        return np.array([kolmogorov(float(far), self.rows, self.window) for far in distance])
