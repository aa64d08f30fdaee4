"""Tests that stay valid however often one looks, and small summaries. numpy only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from random import Random

import numpy as np

from edge_sdk.types import AnyArray, DoubleArray

_BETS = np.append(np.arange(1, 10) / 10, 0.99)
"""Near the best single bet for rows of -1, 0 and 1; the boldest one is for small differences, which ruin nobody."""


class MeanEProcess:
    """Evidence, as a betting score, that the mean of bounded values exceeds a bound.

    Under the null hypothesis E[x_t | past] <= `null_mean` the evidence is a supermartingale that starts at 1, so
    it ever reaches 1/alpha with probability at most alpha, whenever and however often it is read.

    Source:
        Waudby-Smith & Ramdas 2023, "Estimating means of bounded random variables by betting",
        doi:10.1093/jrsssb/qkad009; a fixed uniform mixture of bets is used.

    Example:
        >>> process = MeanEProcess(null_mean=0.5)
        >>> process.update([1.0] * 10)
        >>> process.evidence > 20
        True
    """

    def __init__(self, null_mean: float, *, low: float = 0.0, high: float = 1.0) -> None:
        if not low < null_mean < high:
            raise ValueError(f"the null mean must lie inside ({low}, {high}), got {null_mean}")
        self._low, self._high, self._null = low, high, null_mean
        # a bet b pays 1 + b (x - m) / (m - low): never negative for x >= low and b < 1
        self._bets = _BETS / (null_mean - low)
        self._log_wealth = np.zeros(len(_BETS))

    def update(self, values: Iterable[float]) -> None:
        """Add observations.

        Raises:
            ValueError: A value lies outside [low, high] or is NaN; nothing was added.
        """
        x = np.fromiter(values, dtype=np.float64)
        if x.size and not (x.min() >= self._low - 1e-9 and x.max() <= self._high + 1e-9):  # NaN is neither
            raise ValueError(f"values must lie in [{self._low}, {self._high}], got {x.min()} to {x.max()}")
        self._log_wealth += np.log1p(self._bets * (x[:, None] - self._null)).sum(axis=0)

    @property
    def evidence(self) -> float:
        """The e-value: mean wealth over the bets; 1 means no evidence either way."""
        top = self._log_wealth.max()
        return float(np.exp(min(top, 700.0)) * np.exp(self._log_wealth - top).mean())


def paired_evidence(differences: AnyArray, *, margin: float = 0.0) -> float:
    """E-value against "the mean of `differences` is at most `margin`".

    Args:
        differences: float [N] in [-1, 1]: how much better one model did than the other on each row.
        margin: In (-1, 1).

    Returns:
        1 for no rows; >= 1/alpha is evidence at level alpha, valid under optional stopping.
    """
    process = MeanEProcess(margin, low=-1.0, high=1.0)
    process.update(np.asarray(differences, dtype=np.float64))
    return process.evidence


def calibration_error(confidence: AnyArray, right: AnyArray, *, bins: int = 10) -> float:
    """Expected calibration error: how far confidence and success differ, over bins of like confidence.

    Args:
        confidence: float [N] in [0, 1]; rows of NaN are left out.
        right: bool [N], or float [N] in [0, 1]: the share that was right.
        bins: Of equal width.

    Returns:
        In [0, 1]; 0 for no rows. Noise alone gives about 0.08 with 100 rows and 10 bins.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599, equation 3.
    """
    told = np.isfinite(confidence)
    if not told.any():
        return 0.0
    p = np.asarray(confidence, dtype=np.float64)[told]
    gaps = np.bincount(np.minimum((p * bins).astype(np.int64), bins - 1), weights=p - np.asarray(right)[told])
    return float(np.abs(gaps).sum() / len(p))


def wilson_interval(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion; (0, 1) for no trials.

    Source:
        Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if trials <= 0:
        return 0.0, 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sequence_radius(count: float, alpha: float, *, tuned_to: float = 200.0) -> float:
    """Half-width of a one-sided asymptotic confidence sequence of a mean, in standard deviations.

    A mean of `count` values exceeds its expectation by more than this at any time with probability alpha at most, in
    the limit of many values: it may be asked after each of them.

    Args:
        count: Of values, above 0.
        alpha: In (0, 1).
        tuned_to: At about so many values it is at its sharpest.

    Source:
        Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024, "Time-uniform central limit theory and asymptotic confidence
        sequences", arXiv:2103.06476, one-sided form.

    Example:
        >>> round(sequence_radius(200, 0.05), 3)
        0.207
    """
    log = -2 * math.log(alpha)
    rho = (log + math.log(log + 1)) / tuned_to  # squared
    grown = count * rho + 1
    return math.sqrt(2 * grown / (count * count * rho) * math.log(1 + math.sqrt(grown) / (2 * alpha)))


def difference_interval(first: tuple[int, int], second: tuple[int, int], *, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of the difference of two independent proportions, first - second.

    Args:
        first: Successes and trials.
        second: The same.
        z: Standard normal quantile: 1.96 for 95 %.

    Returns:
        Bounds in [-1, 1].

    Source:
        Newcombe 1998, method 10, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I.
    """
    p, q = (successes / trials if trials else 0.5 for successes, trials in (first, second))
    (p_low, p_high), (q_low, q_high) = wilson_interval(*first, z=z), wilson_interval(*second, z=z)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def entropy(probabilities: AnyArray) -> DoubleArray:
    """Entropy of each row divided by its maximum, so in [0, 1]. probabilities: [N, C]."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-12, 1.0)
    classes = max(2, p.shape[1])
    result: DoubleArray = -(p * np.log(p)).sum(axis=1) / math.log(classes)
    return result


def suppress_small(counts: dict[str, int], *, min_count: int) -> dict[str, int]:
    """Counts with every cell below `min_count` merged into "other".

    Where even that is too small, the smallest of the other cells is merged with it: what is left out could be had by
    subtraction from the total. Nothing is told of a total below `min_count`.

    Example:
        >>> suppress_small({"a": 50, "b": 4, "c": 7}, min_count=10)
        {'a': 50, 'other': 11}
        >>> suppress_small({"a": 50, "b": 20, "c": 7}, min_count=10)
        {'a': 50, 'other': 27}
    """
    kept = {key: count for key, count in counts.items() if count >= min_count}
    rest = sum(count for count in counts.values() if count < min_count)
    if 0 < rest < min_count and kept:
        smallest = min(kept, key=lambda key: (kept[key], key))
        rest += kept.pop(smallest)
    if rest >= min_count:
        kept["other"] = kept.get("other", 0) + rest  # a label may bear that name
    return kept


def round_at_random(counts: AnyArray, unit: int, chance: Random) -> AnyArray:
    """Counts in units, rounded up as often as their remainder says: right on average, and silent about single rows.

    Args:
        counts: int [...], >= 0.
        unit: At least 1; with 1 the counts stay as they are.
        chance: Drawn from once for each count. Not numpy's, which costs a serving process 4 MB.

    Returns:
        int64 [...]: a count c becomes floor(c / unit), and one more with a chance of (c mod unit) / unit.
    """
    whole = np.asarray(counts, dtype=np.int64)
    drawn = np.frombuffer(chance.randbytes(4 * whole.size), dtype=np.uint32).reshape(whole.shape)
    units: AnyArray = (whole + drawn % unit) // unit
    return units


def round_outward(low: AnyArray, high: AnyArray, std: AnyArray) -> tuple[DoubleArray, DoubleArray]:
    """Extremes moved apart to multiples of the power of two next above the standard deviation.

    So that a range can be told without telling the one value that made it. All float64 [...]; NaN stays.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        step = np.exp2(np.ceil(np.log2(std)))
        apart = np.floor(low / step) * step, np.ceil(high / step) * step
    # where nothing varies, the mean says as much; and the smallest numbers there are vanish in a division
    below = np.isfinite(apart[0]) & (apart[0] <= low)
    above = np.isfinite(apart[1]) & (apart[1] >= high)
    return np.where(below, apart[0], low), np.where(above, apart[1], high)


def share_of(key: str, purpose: str = "") -> float:
    """A number in [0, 1) that depends on key and purpose alone: a sample by it is the same whenever it is drawn."""
    return int.from_bytes(hashlib.sha256(f"{purpose}{key}".encode()).digest()[:4], "big") / 2**32
