"""Large changes that come at once: a Kolmogorov-Smirnov test of each 32 rows, and of the last 64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_sdk.drift.base import DriftDetector
from edge_sdk.drift.ks import kolmogorov
from edge_sdk.types import AnyArray, BoolArray, DoubleArray, FloatArray

WINDOW = 32
LEVELS = 31
_BINS = LEVELS + 1
_SHARE = 0.7
"""Of the budget, for the test of one window; the rest is for two windows together."""
_TINY = 1e-300
_EDGES = np.arange(1, _BINS) / _BINS


def cuts_of(channels: DoubleArray) -> FloatArray:
    """Values that part rows, float64 [N, K], into 32 of about equal size: float32 [K, 31], ascending."""
    cuts: FloatArray = np.quantile(channels, _EDGES, axis=0).T.astype(np.float32)
    return cuts


def binned(channels: DoubleArray, cuts: FloatArray | None = None) -> AnyArray:
    """Rows counted by 32 parts of their range: int64 [K, 32].

    Args:
        channels: float64 [N, K] in [0, 1].
        cuts: float32 [K, 31], from `cuts_of`; None: at 1/32, 2/32, ... 31/32.
    """
    width = channels.shape[1]
    if cuts is None:
        bins = np.minimum((channels * _BINS).astype(np.int64), LEVELS)
    else:
        bins = (channels[:, :, None] >= cuts).sum(axis=2)
    bins += _BINS * np.arange(width)
    return np.bincount(bins.ravel(), minlength=_BINS * width).reshape(width, _BINS)


def levels_of(channels: DoubleArray, cuts: FloatArray | None = None) -> AnyArray:
    """How rows are distributed: the share of them below each cut, float16 [K, 31]. Arguments as in `binned`."""
    counts = np.cumsum(binned(channels, cuts), axis=1)[:, :-1]
    return (counts / max(1, len(channels))).astype(np.float16)


class StepDetector(DriftDetector):
    """Raises an alarm when the last 32 or 64 rows are distributed otherwise than the reference, in any channel.

    An `EDetector` pays for its bound with rows: it sees a jump by half of a channel's range some twenty rows later.
    This test has no bound of the same kind. Its p-values are approximations, and rows must not depend on each other;
    so it is for independent or well thinned rows, and is told to take one in `every`.

    Args:
        levels: float [K, 31], of the reference: `levels_of`.
        rows: Independent rows that these are of.
        run_length: Rows between two false alarms.
        cuts: float32 [K, 31], that the levels are at, for channels that crowd together in parts of [0, 1].

    Raises:
        ValueError: An argument has the wrong shape or lies out of range.

    Source:
        See `KSDetector`.

    Example:
        >>> detector = StepDetector(levels_of(np.random.default_rng(0).random((1000, 2))), rows=1000, run_length=10_000)
        >>> detector.update(np.ones((32, 2)))
        >>> detector.drift_detected
        True
    """

    def __init__(self, levels: AnyArray, *, rows: float, run_length: float, cuts: FloatArray | None = None) -> None:
        levels = np.asarray(levels, dtype=np.float64)
        if levels.ndim != 2 or levels.shape[1] != LEVELS or not len(levels):
            raise ValueError(f"the reference needs {LEVELS} levels a channel, got shape {levels.shape}")
        if not (levels.min() >= 0 and levels.max() <= 1):
            raise ValueError("the levels of the reference are shares")
        if cuts is not None and cuts.shape != levels.shape:
            raise ValueError(f"cuts of shape {cuts.shape} for levels of {levels.shape}")
        if rows < 1:
            raise ValueError(f"at least one row is needed in the reference, got {rows}")
        if run_length <= 1 or not math.isfinite(run_length):
            raise ValueError(f"the run length must be a number above 1, got {run_length}")
        self._levels: FloatArray = levels.astype(np.float32)
        self._rows, self._run_length, self._cuts = rows, run_length, cuts
        self.ignored: BoolArray = np.zeros(len(levels), dtype=bool)
        """bool [K]: channels not tested. Of one that a season was taken out of, the reference's levels say nothing."""
        self._every = 1
        self._clear()

    def _clear(self) -> None:
        channels = len(self._levels)
        self._counts: NDArray[np.uint8] = np.zeros((channels, _BINS), dtype=np.uint8)  # of the window that fills
        self._below: NDArray[np.uint8] = np.zeros((channels, LEVELS), dtype=np.uint8)  # of the one before, by level
        self._filled = self._windows = self._wait = self._quiet = 0
        self._evidence = self._peak = 0.0

    def take(self, every: int) -> None:
        """Take one row in so many from the next one on, with which a window begins: blocks are then whole windows."""
        self._every, self._filled, self._wait = every, 0, 0
        self._counts = np.zeros_like(self._counts)

    def update(self, block: DoubleArray) -> None:
        """Fold rows, float64 [N, K] in [0, 1]."""
        block = np.asarray(block, dtype=np.float64)
        if block.ndim != 2 or block.shape[1] != len(self._levels):
            raise ValueError(f"expected rows of {len(self._levels)} channels, got shape {block.shape}")
        if block.size and not (block.min() >= 0 and block.max() <= 1):
            raise ValueError(f"channels lie in [0, 1], got {block.min()} to {block.max()}")
        taken = block[self._wait :: self._every]
        self._wait = self._wait + len(taken) * self._every - len(block)
        begin = 0
        while begin < len(taken):
            rows = taken[begin : begin + WINDOW - self._filled]
            begin += len(rows)
            self._counts += binned(rows, self._cuts).astype(np.uint8)
            self._filled += len(rows)
            if self._filled == WINDOW:
                self._look()

    def _look(self) -> None:
        """At the window that is full, and at it and the one before."""
        below = np.cumsum(self._counts, axis=1, dtype=np.uint8)[:, :-1]
        self._evidence = _SHARE * self._run_of(below, WINDOW)
        if self._windows:
            both = self._run_of(below + self._below, 2 * WINDOW)
            self._evidence = max(self._evidence, (1 - _SHARE) * both)
        self._peak = max(self._peak, self._evidence)
        self._quiet = 0 if self._evidence >= self._run_length else self._quiet + WINDOW * self._every
        self._counts, self._below = np.zeros_like(self._counts), below
        self._filled, self._windows = 0, 1

    def _apart(self, below: NDArray[np.uint8], seen: int) -> FloatArray:
        """How far each channel's distribution is from the reference's, at each level: float32 [K, 31]."""
        off = below * np.float32(1 / seen)
        off -= self._levels
        if self.ignored.any():
            off[self.ignored] = 0
        apart: FloatArray = np.abs(off, out=off)
        return apart

    def _run_of(self, below: NDArray[np.uint8], seen: int) -> float:
        """Rows between false alarms at the level that the largest distance just reaches (Bonferroni)."""
        most = float(self._apart(below, seen).max())
        return WINDOW * self._every / max(_TINY, len(below) * kolmogorov(most, self._rows, seen))

    @property
    def evidence(self) -> float:
        """Of the last full window, in rows of run length."""
        return self._evidence

    @property
    def threshold(self) -> float:
        """The run length."""
        return self._run_length

    @property
    def warning(self) -> bool:
        """As `drift_detected`: a window is looked at once, there is no level before."""
        return self.drift_detected

    @property
    def drift_detected(self) -> bool:
        """Whether a window reached the threshold since the last reset."""
        return self._peak >= self._run_length

    @property
    def quiet_rows(self) -> int:
        """Rows since a window last reached the threshold, or since the last reset."""
        return self._quiet

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Channels by the distance of the last full window from the reference, with the shift of their mean in it."""
        distance = self._apart(self._below, WINDOW).max(axis=1)
        order = np.argsort(-distance, kind="stable")[:count]
        # a mean is the area above its distribution function; with cuts it is that of the ranks
        shift = (self._levels - self._below / WINDOW).sum(axis=1) / _BINS
        return [(int(i), float(shift[i])) for i in order]

    def reset(self) -> None:
        """Forget the counts and take the alarm down."""
        self._clear()

    def state(self) -> dict[str, AnyArray]:
        """Counts so far and the last window's result."""
        scalars = [self._filled, self._windows, self._wait, self._quiet, self._evidence, self._peak]
        return {"counts": self._counts.copy(), "below": self._below, "scalars": np.array(scalars)}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        if any(state[key].shape != array.shape for key, array in self.state().items()):
            raise ValueError(f"state of {state['below'].shape} channels for a detector of {len(self._levels)}")
        filled, windows, wait, quiet, evidence, peak = (float(value) for value in state["scalars"])
        if not 0 <= filled < WINDOW or wait < 0:
            raise ValueError(f"state of {filled:g} rows in a window of {WINDOW}")
        self._counts = state["counts"].astype(np.uint8)
        self._below = state["below"].astype(np.uint8)
        self._filled, self._windows, self._wait, self._quiet = int(filled), int(windows), int(wait), int(quiet)
        self._evidence, self._peak = evidence, peak
