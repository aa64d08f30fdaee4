"""alibi-detect's KSDrift and CVMDrift with Bonferroni's correction, on windows that follow each other.

A window's verdict depends on its most suspicious channel alone: the statistics of all channels are computed at once,
and scipy's p-value, which alibi-detect takes, is asked for that channel. `check` compares with alibi-detect itself.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import numpy as np
from drift_worker import serve
from scipy.stats import cramervonmises_2samp, ks_2samp, rankdata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.simplefilter("ignore")
kept: dict[str, Any] = {}


def ks_statistics(reference: Any, window: Any) -> Any:
    """Largest distance between the two distribution functions, float64 [K]; `reference` is sorted."""
    found = np.empty(reference.shape[1])
    n, m = len(reference), len(window)
    for k in range(reference.shape[1]):
        places = np.sort(window[:, k])
        for_each = np.concatenate([reference[:, k], places])
        first = np.searchsorted(reference[:, k], for_each, side="right") / n
        second = np.searchsorted(places, for_each, side="right") / m
        found[k] = np.abs(first - second).max()
    return found


def cvm_statistics(reference: Any, window: Any) -> Any:
    """Monotone in the Cramer-von Mises statistic, float64 [K]."""
    n, m = len(reference), len(window)
    ranks = rankdata(np.concatenate([reference, np.sort(window, axis=0)]), axis=0)
    first = ((ranks[:n] - np.arange(1, n + 1)[:, None]) ** 2).sum(axis=0)
    second = ((ranks[n:] - np.arange(1, m + 1)[:, None]) ** 2).sum(axis=0)
    return n * first + m * second


TESTS = {"KS": (ks_statistics, ks_2samp), "CVM": (cvm_statistics, cramervonmises_2samp)}


def least_p(test: str, reference: Any, window: Any) -> float:
    """Smallest p-value of all channels."""
    statistics, ask = TESTS[test]
    k = int(np.argmax(statistics(reference, window)))
    return float(ask(reference[:, k], window[:, k]).pvalue)


def alarms(
    streams: str, references: str, test: str, size: int, run_length: float, start: int | None = None
) -> list[list[int]]:
    """Last rows of the windows that were called drift, for each stream of a float32 [S, N, K] file.

    Each window is tested at the level size / run_length, so that one false alarm in a run length is expected at most.
    """
    found = []
    for rows, reference in zip(np.load(streams, mmap_mode="r"), np.load(references, mmap_mode="r"), strict=True):
        ordered = np.sort(reference, axis=0)
        level = size / run_length / reference.shape[1]
        raised = []
        for end in range(size, len(rows) + 1, size):
            if least_p(test, ordered, np.asarray(rows[end - size : end])) < level:
                raised.append(end - 1)
                if start is not None and end > start:
                    break
        found.append(raised)
    return found


def check(streams: str, references: str, size: int, run_length: float) -> int:
    """Windows, one of each stream, of which alibi-detect itself says something else than `alarms`."""
    from alibi_detect.cd import CVMDrift, KSDrift  # noqa: PLC0415 - it takes seconds

    wrong = 0
    for rows, reference in zip(np.load(streams), np.load(references), strict=True):
        window = rows[-size:]
        for test, kind in (("KS", KSDrift), ("CVM", CVMDrift)):
            level = size / run_length
            said = kind(reference, p_val=level, correction="bonferroni").predict(window)["data"]["is_drift"]
            ours = least_p(test, np.sort(reference, axis=0), window) < level / reference.shape[1]
            wrong += bool(said) != bool(ours)
    return wrong


def cost(rows: str, reference: str) -> float:
    """Seconds a row of KSDrift on a window [N, K]."""
    if "ks" not in kept:
        from alibi_detect.cd import KSDrift  # noqa: PLC0415

        kept["ks"] = KSDrift(np.load(reference), p_val=0.05, correction="bonferroni")
    window = np.load(rows)
    begun = time.perf_counter()
    kept["ks"].predict(window)
    return (time.perf_counter() - begun) / len(window)


if __name__ == "__main__":
    serve(alarms=alarms, check=check, cost=cost)
