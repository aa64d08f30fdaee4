"""Milliseconds and megabytes on this machine. What the numbers mean is worked out elsewhere."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import edge_sdk
from edge_quantize.metrics import round_quantiles
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.types import AnyArray

BUDGET_S = 10.0
"""Timing of one batch size takes about this long at most."""
_WARM_UP = 3
_CHILD = Path(__file__).with_name("_footprint.py")


class Timing(msgspec.Struct, frozen=True):
    """How long calls of one batch size take, in milliseconds; one thread, without preprocessing.

    Attributes:
        batch: Rows in a call.
        p50_ms: Median; this and the others are medians over rounds.
        p95_ms: Exceeded by 1 call in 20.
        p99_ms: Exceeded by 1 call in 100; of fewer than 100 calls a round, nearly the slowest.
        calls: How many were timed.
    """

    batch: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    calls: int


class Footprint(msgspec.Struct, frozen=True):
    """Resident memory of a fresh process that does nothing but serve, in MB (10^6 bytes), as the kernel counts it.

    Pages of shared libraries count in full, also where other processes share them.

    Attributes:
        imports_mb: With Python, numpy, ONNX Runtime and the SDK imported, before a model is loaded.
        loaded_mb: After loading and one call of one row.
        peak_mb: The most at any time, while loading as a rule.
    """

    imports_mb: float
    loaded_mb: float
    peak_mb: float


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    batch: int,
    repeats: int = 200,
    rounds: int = 5,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several ways of doing the same. They take turns, so that a busy moment strikes all alike.

    Args:
        calls: By name.
        batch: Rows in each call; for the result.
        repeats: How often each is called, rounded up to whole rounds; fewer where `budget_s` would not do.
        rounds: How many parts the calls are looked at in.
        budget_s: About how long it may take in all; every round has at least one call.
        clock: Seconds.
    """
    names = list(calls)
    start = clock()
    for _ in range(_WARM_UP):
        for name in names:
            calls[name]()
    turn_s = max((clock() - start) / _WARM_UP, 1e-9)
    in_round = max(1, min(math.ceil(repeats / rounds), int(budget_s / turn_s / rounds)))
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append([])
        for turn in range(in_round):
            # who goes first changes, since the first finds the caches as the last has left them
            for name in names if turn % 2 else reversed(names):
                start = clock()
                calls[name]()
                times[name][-1].append((clock() - start) * 1000)
    results = {}
    for name in names:
        p50, p95, p99 = round_quantiles(times[name], (0.5, 0.95, 0.99))
        results[name] = Timing(batch, p50, p95, p99, rounds * in_round)
    return results


def footprint(folder: Path, variant: str, feeds: Mapping[str, AnyArray]) -> Footprint:
    """Memory that serving takes, measured in a process of its own.

    Args:
        folder: A checkpoint folder; or an ONNX file, which is served whole.
        variant: "int8" or "fp32".
        feeds: One row for each input, as the network takes it.

    Raises:
        RuntimeUnavailableError: The process failed.
    """
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "feeds.npz"
        np.savez(inputs, allow_pickle=False, **{f"feed_{key}": value for key, value in feeds.items()})
        # the SDK this process uses, also where it is not installed
        source = str(Path(edge_sdk.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH", ""))))
        command = [sys.executable, "-P", str(_CHILD), str(folder), variant, str(inputs)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()[::-1]), f"exit code {done.returncode}")
        raise RuntimeUnavailableError(f"memory cannot be measured, the process that serves {variant} failed: {said}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return Footprint(**figures)
