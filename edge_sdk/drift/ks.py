"""Kolmogorov-Smirnov test of each window against the reference."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.drift.windows import WindowedDetector
from edge_sdk.types import DoubleArray

_TERMS = np.arange(1, 6.0)


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
        root = math.sqrt(self.rows * self.window / (self.rows + self.window))
        scaled = (root + 0.12 + 0.11 / root) * distance
        terms = (-1) ** (_TERMS - 1) * np.exp(-2 * (_TERMS * scaled[:, None]) ** 2)
        # of small distances the series converges slowly, and to 1
        p: DoubleArray = np.where(scaled < 0.3, 1.0, np.clip(2 * terms.sum(axis=1), 0.0, 1.0))
        return p
