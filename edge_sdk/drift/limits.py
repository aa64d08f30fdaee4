"""What to call impossible: limits for each feature, suggested from rows that were normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.schema import Column
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

_TAIL = 0.05
_LEAST_TAIL = 20
_ATOM = 0.01
"""A smallest value that is had by so large a share of the rows is an end of the range."""
_NEAR = 0.05
_MISSING_ROWS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What is suggested for one feature.

    Attributes:
        column: With its range; a category has none.
        seen: Least and largest value seen, in the feature's unit; NaN of a category.
        middle: Median of the values; of a category the most frequent code; 0 if it was always missing.
        missing: Share of the rows in which it was missing.
        most_missing: More than so many missing among 256 rows are no chance.
        repeats: Share of the rows in which it was what it was in the row before.
        longest: Most rows in a row with the same value.
        frozen_rows: The same value for so many rows in a row is no chance; 0: it never changed, so one cannot say.
    """

    column: Column
    seen: tuple[float, float]
    middle: float
    missing: float
    most_missing: int
    repeats: float
    longest: int
    frozen_rows: int


def suggest(features: FloatArray, columns: Sequence[Column], *, run_length: float) -> list[Limits]:
    """Limits that normal rows break once in `run_length` rows, all of them together.

    A range reaches beyond what was seen, by the tail of what was seen: a generalized Pareto distribution, with a shape
    in 0 to 0.5, is fitted to the outermost twentieth. An end of the range at which values pile up is taken for a limit
    of the sensor. What never changed gets no range.

    Args:
        features: float32 [N, F], in the order of time; NaN: missing.
        columns: What they are.
        run_length: Rows in which one false violation is allowed.

    Source:
        Hosking & Wallis 1987, "Parameter and quantile estimation for the generalized Pareto distribution",
        doi:10.1080/00401706.1987.10488243 (probability-weighted moments).
    """
    chance = 1 / (run_length * len(columns) * 4)  # two ends of the range, missing, frozen
    return [_limits(np.asarray(x, np.float64), column, chance) for x, column in zip(features.T, columns, strict=True)]


def _limits(x: DoubleArray, column: Column, chance: float) -> Limits:
    known = x[~np.isnan(x)]
    missing = 1 - len(known) / len(x)
    same = (x[1:] == x[:-1]) if len(x) > 1 else np.zeros(0, bool)
    repeats, longest = float(same.mean()) if len(same) else 0.0, _longest(same)
    often = _at_most(repeats, len(x))
    frozen = max(longest + 1, math.ceil(1 + math.log(chance) / math.log(often))) if often < 1 else 0
    seen = (math.nan, math.nan)
    if column.kind == "number" and len(known):
        seen = (float(known.min()), float(known.max()))
    if seen[0] < seen[1]:
        column = Column(
            column.name, low=_low(known, seen, chance), high=_rounded(_beyond(known, chance), seen, up=True)
        )
    elif column.kind == "number" or len(np.unique(known)) < 2:  # of what never changed nobody can say what is too much
        frozen = 0
    return Limits(
        column, seen, _middle(known, column), missing, _most(missing, len(x), chance), repeats, longest, frozen
    )


def _middle(known: DoubleArray, column: Column) -> float:
    if not len(known):
        return 0.0
    if column.kind == "number":
        return float(f"{np.median(known):.6g}")
    codes, counts = np.unique(known, return_counts=True)
    return float(codes[counts.argmax()])


def _low(known: DoubleArray, seen: tuple[float, float], chance: float) -> float:
    low = _rounded(-_beyond(-known, chance), seen, up=False)
    at_zero = 0 <= seen[0] <= _NEAR * (seen[1] - seen[0])  # what comes so close to 0 and is never below it cannot be
    return max(0.0, low) if at_zero else low


def _beyond(values: DoubleArray, chance: float) -> float:
    """The value that one row exceeds with such a chance."""
    top = float(values.max())
    if (values == top).mean() >= _ATOM:
        return top
    count = max(_LEAST_TAIL, round(_TAIL * len(values)))
    ordered = np.sort(values)[-count - 1 :]
    if len(ordered) <= _LEAST_TAIL // 2:
        return top + float(values.max() - values.min())
    excess = ordered[1:] - ordered[0]
    n = len(excess)
    first, second = float(excess.mean()), float((excess * np.arange(n - 1, -1, -1)).sum() / (n * (n - 1)))
    # about a standard error more than fitted: too wide a range only sees less, too narrow a one refuses normal rows
    shape = (2 - first / (first - 2 * second) if first > 2 * second else 0.0) + 1 / math.sqrt(n)
    shape = min(0.5, max(0.0, shape))
    scale = first * (1 - shape)
    odds = (n / len(values)) / min(chance, 1 / len(values))
    reach = scale * (math.log(odds) if shape < 1e-6 else (odds**shape - 1) / shape)
    return max(top, float(ordered[0]) + reach)


def _rounded(value: float, seen: tuple[float, float], *, up: bool) -> float:
    """Outwards, to a hundredth of the range seen, so that a person can read it; never inwards of what was seen."""
    if value in seen or seen[0] == seen[1]:
        return value
    step = 10.0 ** math.floor(math.log10((seen[1] - seen[0]) / 20))
    steps = math.ceil(value / step) if up else math.floor(value / step)
    return float(f"{steps * step:.12g}")


def _at_most(share: float, rows: int) -> float:
    """What a share seen in so many rows may be in truth: three standard errors more, and room for what is rare."""
    return min(1.0, share + 3 * math.sqrt(max(share * (1 - share), 0.0) / rows) + 3 / rows)


def _most(share: float, rows: int, chance: float) -> int:
    """More of 256 rows than this are missing with at most such a chance."""
    p = _at_most(share, rows)
    if p >= 1:
        return _MISSING_ROWS
    log_p, log_q = math.log(p), math.log1p(-p)
    tail, most = 0.0, _MISSING_ROWS
    for k in range(_MISSING_ROWS, 0, -1):  # from the far end, where the sum is small
        ways = math.lgamma(_MISSING_ROWS + 1) - math.lgamma(k + 1) - math.lgamma(_MISSING_ROWS - k + 1)
        tail += math.exp(ways + k * log_p + (_MISSING_ROWS - k) * log_q)
        if tail > chance:
            return most
        most = k - 1
    return most


def _longest(same: AnyArray) -> int:
    """Longest run of equal values, in rows."""
    if not len(same):
        return 1
    ends = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
    return int(np.diff(ends).max())
