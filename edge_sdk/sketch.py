"""Quantiles of a stream in a few hundred bytes, which can be added up over time and over devices. numpy only."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Self

import numpy as np

from edge_sdk.types import AnyArray

ACCURACY = 0.02
"""Relative: what is told as 100 was 98 to 102."""
MAX_BUCKETS = 256
"""Enough for values that differ by a factor of 27 000; of a wider range the lowest values are told as too high."""
_SMALLEST = 1e-9
_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_LOG_GAMMA = math.log(_GAMMA)
_MAX_INDEX = 20_000
"""Beyond the bucket of the largest float64."""


class QuantileSketch:
    """Counts of values of 0 or more, in buckets whose width is in proportion to what they hold.

    Bucket i holds the values in (g^(i-1), g^i], with g = 1.02 / 0.98; those below 1e-9 are zeros. Two sketches added
    are the sketch of all their values.

    Source:
        Masson, Rim & Lee 2019, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees",
        doi:10.14778/3352063.3352135.

    Example:
        >>> sketch = QuantileSketch()
        >>> sketch.add(np.arange(1.0, 1001.0))
        >>> bool(abs(sketch.quantile(0.5) - 500) < 10)
        True
    """

    def __init__(self) -> None:
        self._indexes = np.empty(0, np.int64)  # ascending
        self._counts = np.empty(0, np.int64)
        self._zeros = 0

    def add(self, values: AnyArray) -> None:
        """Count values.

        Raises:
            ValueError: One is negative, NaN or infinite; none was counted.
        """
        x = np.asarray(values, dtype=np.float64).ravel()
        if x.size and not (x.min() >= 0 and x.max() < np.inf):  # NaN is neither
            raise ValueError(f"a sketch takes values of 0 or more, got {x.min()} to {x.max()}")
        above = x[x >= _SMALLEST]
        found, counts = np.unique(np.ceil(np.log(above) / _LOG_GAMMA).astype(np.int64), return_counts=True)
        self._zeros += x.size - above.size
        self._take(found, counts)

    def merge(self, other: Self) -> None:
        """Count all that another sketch has counted."""
        self._zeros += other._zeros
        self._take(other._indexes, other._counts)

    @property
    def count(self) -> int:
        """How many values it has counted."""
        return self._zeros + int(self._counts.sum())

    def quantile(self, q: float) -> float:
        """The value that a share `q` of all values lie below, to within 2 %; 0 if there are none.

        Raises:
            ValueError: `q` is not in [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is a share from 0 to 1, got {q}")
        place = math.floor(q * (self.count - 1)) if self.count else 0
        if place < self._zeros or not self._counts.size:
            return 0.0
        bucket = np.searchsorted(np.cumsum(self._counts), place - self._zeros, side="right")
        return float(2 * math.exp(int(self._indexes[bucket]) * _LOG_GAMMA) / (_GAMMA + 1))

    def count_above(self, value: float) -> int:
        """How many values were larger, to within 2 % of the value."""
        if value < 0:
            return self.count
        told = 2 * np.exp(self._indexes * _LOG_GAMMA) / (_GAMMA + 1)
        return int(self._counts[told > value].sum())

    def to_wire(self) -> tuple[list[int], list[int], int]:
        """Numbers of the buckets, ascending; how many values each has; and how many zeros there are."""
        return self._indexes.tolist(), self._counts.tolist(), self._zeros

    @classmethod
    def from_wire(cls, indexes: list[int], counts: list[int], zeros: int) -> Self:
        """What `to_wire` gave.

        Raises:
            ValueError: It did not give this.
        """
        sketch = cls()
        if len(indexes) > MAX_BUCKETS or any(abs(index) > _MAX_INDEX for index in indexes):
            raise ValueError(f"a sketch has at most {MAX_BUCKETS} buckets, with numbers up to {_MAX_INDEX}")
        if any(not 0 < count < 2**53 for count in counts) or not 0 <= zeros < 2**53:
            raise ValueError("a bucket counts at least 1 value, and fewer than 2^53")
        if len(indexes) != len(counts) or any(a >= b for a, b in pairwise(indexes)):
            raise ValueError("a sketch has one count for each bucket, in ascending order")
        sketch._indexes, sketch._counts, sketch._zeros = np.array(indexes, np.int64), np.array(counts, np.int64), zeros
        return sketch

    def _take(self, indexes: AnyArray, counts: AnyArray) -> None:
        both, place = np.unique(np.concatenate([self._indexes, indexes]), return_inverse=True)
        total = np.zeros(both.size, np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        if (more := both.size - MAX_BUCKETS) > 0:  # the lowest become one: it is the high quantiles that matter
            total[more] += total[:more].sum()
            both, total = both[more:], total[more:]
        self._indexes, self._counts = both, total
