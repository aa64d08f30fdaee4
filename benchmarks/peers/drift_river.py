"""river's drift detectors, one for each channel. An alarm of any channel is an alarm; see drift_worker.py."""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
from drift_worker import serve
from river import drift

KINDS = {
    "ADWIN": drift.ADWIN, "PageHinkley": drift.PageHinkley, "KSWIN": drift.KSWIN, "DDM": drift.binary.DDM,
    "EDDM": drift.binary.EDDM, "HDDM-A": drift.binary.HDDMA, "HDDM-W": drift.binary.HDDMW, "FHDDM": drift.binary.FHDDM,
}  # fmt: skip
kept: dict[int, list[Any]] = {}


def cost(rows: str) -> float:
    """Seconds a row of ADWIN with its defaults for each channel of a float64 [N, K] file, going on where it was."""
    block = np.load(rows).tolist()
    detectors = kept.setdefault(len(block[0]), [drift.ADWIN() for _ in block[0]])
    begun = time.perf_counter()
    for row in block:
        for detector, value in zip(detectors, row, strict=True):
            detector.update(value)
    return (time.perf_counter() - begun) / len(block)


def state(channels: int) -> int:
    """Bytes of the detectors that `cost` has fed."""
    return len(pickle.dumps(kept[channels]))


def alarms(streams: str, kind: str, settings: dict[str, Any], starts: list[int] | None = None) -> list[list[int]]:
    """Rows after which an alarm was up, for each stream of a float32 [S, N, K] file.

    Args:
        streams: File.
        kind: Of KINDS.
        settings: Arguments of the detector.
        starts: For each stream: the first alarm from this row on ends it.
    """
    rows = np.load(streams, mmap_mode="r")
    return [one(x, kind, settings, start) for x, start in zip(rows, starts or [None] * len(rows), strict=True)]


def one(stream: Any, kind: str, settings: dict[str, Any], start: int | None) -> list[int]:
    """Of one stream."""
    rows = np.asarray(stream, dtype=np.float64)
    binary = kind not in ("ADWIN", "PageHinkley", "KSWIN")
    detectors = [KINDS[kind](**settings) for _ in range(rows.shape[1])]
    found = []
    for number, row in enumerate((rows > 0.5).tolist() if binary else rows.tolist()):
        up = False
        for detector, value in zip(detectors, row, strict=True):
            detector.update(value)
            up |= detector.drift_detected
        if up:
            found.append(number)
            if start is not None and number >= start:
                break
    return found


if __name__ == "__main__":
    serve(cost=cost, state=state, alarms=alarms)
