"""evidently's data drift preset on windows that follow each other.

With a reference of at most 1000 rows the preset calls a numeric column drifted if the Kolmogorov-Smirnov p-value is
below 0.05, and the data set if half of the columns are. `alarms` does so with the same scipy test, since a report takes
seconds; `check` compares with the reports themselves.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
from drift_worker import serve
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset
from scipy.stats import ks_2samp

warnings.simplefilter("ignore")
SHARE, LEVEL = 0.5, 0.05


def report(reference: Any, window: Any) -> float:
    """Share of drifted columns in evidently's own words."""
    names = [f"channel {k}" for k in range(reference.shape[1])]
    definition = DataDefinition(numerical_columns=names)
    sets = [
        Dataset.from_pandas(pd.DataFrame(x, columns=names), data_definition=definition) for x in (window, reference)
    ]
    return float(Report([DataDriftPreset()]).run(*sets).dict()["metrics"][0]["value"]["share"])


def share(reference: Any, window: Any) -> float:
    """The same by the test alone."""
    return float(np.mean([ks_2samp(reference[:, k], window[:, k]).pvalue < LEVEL for k in range(reference.shape[1])]))


def alarms(streams: str, references: str, size: int, least: float, starts: list[int] | None = None) -> list[list[int]]:
    """Last rows of the windows of which more than `least`, or half, of the columns drifted."""
    found = []
    given, held = np.load(streams, mmap_mode="r"), np.load(references, mmap_mode="r")
    for rows, reference, start in zip(given, held, starts or [None] * len(given), strict=True):
        raised = []
        for end in range(size, len(rows) + 1, size):
            drifted = share(reference, np.asarray(rows[end - size : end]))
            if drifted > 0 if least == 0 else drifted >= least:
                raised.append(end - 1)
                if start is not None and end > start:
                    break
        found.append(raised)
    return found


def check(streams: str, references: str, size: int, count: int) -> int:
    """Windows, one of each of the first streams, of which a report says something else than `alarms`."""
    pairs = list(zip(np.load(streams), np.load(references), strict=True))[:count]
    return sum((report(r, rows[-size:]) >= SHARE) != (share(r, rows[-size:]) >= SHARE) for rows, r in pairs)


def cost(rows: str, reference: str) -> float:
    """Seconds a row of a report on a window [N, K]."""
    window, before = np.load(rows), np.load(reference)
    begun = time.perf_counter()
    report(before, window)
    return (time.perf_counter() - begun) / len(window)


if __name__ == "__main__":
    serve(alarms=alarms, check=check, cost=cost)
