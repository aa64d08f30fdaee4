"""More alarms at once than devices raise by themselves: an e-detector over counts. Pure functions, numpy only.

In a window K of N devices raise an alarm. Under the hypothesis each does so with a chance whose mean over the devices
is at most p, and chances within a window go up and down together with a correlation of at most r. For a tilt t the
factor exp(t K) / E[exp(t K)], with E under the beta-binomial distribution of p and r, is an e-value: exp is convex, so
devices of different chances (Hoeffding 1956, doi:10.1214/aoms/1177728178), smaller chances and smaller correlations all
give less. The factors of successive windows make an e-detector for each tilt, M = (M + 1) e. Without a surge the mean
of all tilts' M takes A windows or more, on average, to reach A, and reaches it within n windows with a chance of at
most n / A, whenever and however often one looks.

Source:
    Shin, Ramdas & Rinaldo 2024, "E-detectors: a nonparametric framework for sequential change detection",
    doi:10.51387/23-NEJSDS51.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from edge_sdk.types import DoubleArray

_TILTS = np.geomspace(0.002, 6.0, 16)
_LEAST = 1e-12


def fold(wealth: Sequence[float], alarmed: int, at_risk: int, expected: float, correlation: float) -> tuple[float, ...]:
    """The e-detectors of all tilts after one more window: M = (M + 1) e, as logarithms.

    Args:
        wealth: Before it; empty: all 0.
        alarmed: Devices that raised an alarm.
        at_risk: Devices that could have.
        expected: Alarms that are allowed.
        correlation: Of the devices' chances within a window.
    """
    if not at_risk:
        return tuple(wealth)
    before = np.array(wealth) if wealth else np.full(len(_TILTS), -np.inf)
    factors = _TILTS * min(alarmed, at_risk) - _log_means(at_risk, _rounded_up(expected / at_risk), correlation)
    after: DoubleArray = np.logaddexp(before, 0.0) + factors
    return tuple(after.tolist())


def evidence(wealth: Sequence[float]) -> float:
    """Logarithm of the mean of the e-detectors; compare it with the logarithm of the windows between false alarms."""
    return float(np.logaddexp.reduce(wealth) - math.log(len(wealth))) if wealth else -math.inf


def _rounded_up(chance: float) -> float:
    """To three figures, so that what was computed can be used again; more is allowed by it, never less."""
    if chance <= 0:
        return _LEAST
    step = 10.0 ** (math.floor(math.log10(chance)) - 2)
    return min(0.5, math.ceil(chance / step - 1e-9) * step)


@lru_cache(maxsize=4096)
def _log_means(devices: int, chance: float, correlation: float) -> DoubleArray:
    """Logarithms of E[exp(t K)] for every tilt, float64 [16], with K beta-binomial."""
    terms = log_beta_binomial(devices, chance, correlation)[None, :] + _TILTS[:, None] * np.arange(devices + 1)
    top = terms.max(axis=1)
    means: DoubleArray = top + np.log(np.exp(terms - top[:, None]).sum(axis=1))
    return means


def log_beta_binomial(devices: int, chance: float, correlation: float) -> DoubleArray:
    """Logarithm of how likely 0 ... `devices` alarms are, float64 [devices + 1].

    Args:
        devices: At least 1.
        chance: Of each, in (0, 1).
        correlation: In [0, 1); 0: binomial.
    """
    k = np.arange(devices)
    if correlation > _LEAST:
        a, b = (share * (1 - correlation) / correlation for share in (chance, 1 - chance))
        ratios = np.log((devices - k) * (k + a) / ((k + 1) * (devices - k - 1 + b)))
    else:
        ratios = np.log((devices - k) / (k + 1) * chance / (1 - chance))
    terms = np.concatenate([[0.0], np.cumsum(ratios)])
    logs: DoubleArray = terms - np.logaddexp.reduce(terms)
    return logs


def sign_p(same: int, other: int) -> float:
    """How likely at least so many of same + other agree by chance: two-sided sign test."""
    n, k = same + other, max(same, other)
    tail = sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n if n <= 1000 else math.exp(-2 * (k - n / 2) ** 2 / n)
    return min(1.0, 2 * tail)
