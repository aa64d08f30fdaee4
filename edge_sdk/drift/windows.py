"""What KS and PSI share: counts over 64 bins, looked at window by window."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from edge_sdk.drift.base import DriftDetector
from edge_sdk.types import AnyArray, DoubleArray

BINS = 64
_WARNING = 0.05
_CHUNK = 1_024
_TINY = 1e-300


class WindowedDetector(DriftDetector):
    """Counts each channel's values over 64 equal bins of [0, 1], and tests the counts of each full window.

    Evidence is the run length at which a window would just have raised the alarm: window rows over the smallest
    p-value times the number of channels (Bonferroni). Windows are apart, so with exact p-values there is one false
    alarm in `run_length` rows on average. They are not exact: they are approximations, worst where they are small, and
    they account for the reference's own error within one window only. That error is the same in every window, so that
    false alarms come together: many with one reference, none with another. Rows that depend on each other break the
    tests. The `EDetector` bounds its false alarms without any of this; these are for comparison with other tools.

    Args:
        reference: float64 [K, 64], how often each channel's values fall into each bin: counts, or shares that sum to 1.
        rows: Rows that the reference was taken from.
        run_length: Rows between two false alarms, see above.
        window: Rows looked at together; also the delay, at least.
    """

    def __init__(self, reference: DoubleArray, *, rows: int, run_length: float, window: int = 256) -> None:
        reference = np.asarray(reference, dtype=np.float64)
        if reference.ndim != 2 or reference.shape[1] != BINS or not len(reference):
            raise ValueError(f"the reference needs {BINS} bins a channel, got shape {reference.shape}")
        if not (reference.min() >= 0 and reference.sum(axis=1).min() > 0):
            raise ValueError("the reference needs counts or shares of every channel, none below 0")
        if rows < 1 or window < 1:
            raise ValueError(f"at least one row is needed, got {rows} in the reference and a window of {window}")
        if run_length <= 1 or not math.isfinite(run_length):
            raise ValueError(f"the run length must be a number above 1, got {run_length}")
        self.shares = reference / reference.sum(axis=1, keepdims=True)
        self.rows, self.window = rows, window
        self._run_length = run_length
        self._centres = (np.arange(BINS) + 0.5) / BINS
        self._mean = self.shares @ self._centres
        self._offsets = BINS * np.arange(len(reference))
        self._counts: NDArray[np.int32] = np.zeros(reference.shape, dtype=np.int32)
        self._p: DoubleArray = np.ones(len(reference))
        self._shift: DoubleArray = np.zeros(len(reference))
        self._filled, self._evidence, self._peak = 0, 0.0, 0.0

    @abstractmethod
    def p_values(self, counts: DoubleArray) -> DoubleArray:
        """How likely counts as far from the reference are by chance: float64 [K, 64] to [K] in [0, 1]."""

    def update(self, block: DoubleArray) -> None:
        """Fold rows, float64 [N, K] in [0, 1]."""
        block = np.asarray(block, dtype=np.float64)
        if block.ndim != 2 or block.shape[1] != len(self._mean):
            raise ValueError(f"expected rows of {len(self._mean)} channels, got shape {block.shape}")
        if block.size and not (block.min() >= 0 and block.max() <= 1):
            raise ValueError(f"channels lie in [0, 1], got {block.min()} to {block.max()}")
        begin = 0
        while begin < len(block):
            rows = block[begin : begin + min(_CHUNK, self.window - self._filled)]
            begin += len(rows)
            bins = np.minimum((rows * BINS).astype(np.int64), BINS - 1) + self._offsets
            counted = np.bincount(bins.ravel(), minlength=self._counts.size).reshape(self._counts.shape)
            self._counts = self._counts + counted.astype(np.int32)
            self._filled += len(rows)
            if self._filled == self.window:
                self._look()

    def _look(self) -> None:
        counts = self._counts.astype(np.float64)
        self._p = self.p_values(counts)
        self._shift = counts @ self._centres / self.window - self._mean
        self._evidence = self.window / max(_TINY, len(self._p) * float(self._p.min()))
        self._peak = max(self._peak, self._evidence)
        self._counts, self._filled = np.zeros_like(self._counts), 0

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
        """Whether a window reached a twentieth of the threshold since the last reset."""
        return self._peak >= _WARNING * self._run_length

    @property
    def drift_detected(self) -> bool:
        """Whether a window reached the threshold since the last reset."""
        return self._peak >= self._run_length

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Channels by their p-value in the last full window, with the shift of their mean in it."""
        order = np.lexsort((-np.abs(self._shift), self._p))[:count]
        return [(int(i), float(self._shift[i])) for i in order]

    def reset(self) -> None:
        """Forget the counts and take the alarm down."""
        self._counts = np.zeros_like(self._counts)
        self._p, self._shift = np.ones_like(self._p), np.zeros_like(self._shift)
        self._filled, self._evidence, self._peak = 0, 0.0, 0.0

    def state(self) -> dict[str, AnyArray]:
        """Counts so far and the last window's result."""
        scalars = np.array([self._filled, self._evidence, self._peak])
        return {"counts": self._counts, "p": self._p, "shift": self._shift, "scalars": scalars}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        if any(state[key].shape != array.shape for key, array in self.state().items()):
            raise ValueError(f"state of {len(state['counts'])} channels for a detector of {len(self._mean)}")
        filled, evidence, peak = (float(v) for v in state["scalars"])
        if not 0 <= filled < self.window:
            raise ValueError(f"state of {filled:g} rows in a window of {self.window}")
        self._counts, self._p, self._shift = (state[key].copy() for key in ("counts", "p", "shift"))
        self._filled, self._evidence, self._peak = int(filled), evidence, peak
