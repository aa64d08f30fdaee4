"""alibi-detect's KSDrift with Bonferroni's correction, on windows that follow each other.

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
from scipy.stats import ks_2samp

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


def least_p(reference: Any, window: Any) -> float:
    """Smallest p-value of all channels."""
    k = int(np.argmax(ks_statistics(reference, window)))
    return float(ks_2samp(reference[:, k], window[:, k]).pvalue)


def alarms(
    streams: str, references: str, size: int, run_length: float, starts: list[int] | None = None
) -> list[list[int]]:
    """Last rows of the windows that were called drift, for each stream of a float32 [S, N, K] file.

    Each window is tested at the level size / run_length, so that one false alarm in a run length is expected at most.
    """
    found = []
    given, held = np.load(streams, mmap_mode="r"), np.load(references, mmap_mode="r")
    for rows, reference, start in zip(given, held, starts or [None] * len(given), strict=True):
        ordered = np.sort(reference, axis=0)
        level = size / run_length / reference.shape[1]
        raised = []
        for end in range(size, len(rows) + 1, size):
            if least_p(ordered, np.asarray(rows[end - size : end])) < level:
                raised.append(end - 1)
                if start is not None and end > start:
                    break
        found.append(raised)
    return found


def check(streams: str, references: str, size: int, run_length: float) -> int:
    """Windows, one of each stream, of which alibi-detect itself says something else than `alarms`."""
    from alibi_detect.cd import KSDrift  # noqa: PLC0415 - it takes seconds

    wrong = 0
    for rows, reference in zip(np.load(streams), np.load(references), strict=True):
        window, level = rows[-size:], size / run_length
        said = KSDrift(reference, p_val=level, correction="bonferroni").predict(window)["data"]["is_drift"]
        ours = least_p(np.sort(reference, axis=0), window) < level / reference.shape[1]
        wrong += bool(said) != ours
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
