"""Shiryaev-Roberts e-detector for the means of bounded channels."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.drift.base import DriftDetector
from edge_sdk.types import AnyArray, DoubleArray

_FRACTIONS = np.array([0.05, 0.15, 0.4])
_WARNING = 0.05
_RECENT = 0.97
_CAP = 1e200
_LOG_CAP = math.log(_CAP)
_CHUNK = 256
_LEAST = 1e-3


class EDetector(DriftDetector):
    """Raises an alarm when the mean of any channel leaves its reference band.

    For each channel bets are laid on a mean above and a mean below the band. Each bet's Shiryaev-Roberts statistic
    M_t = (1 + M_{t-1}) L_t is an e-detector, and so is their average over bets and channels. While every channel's
    mean stays in its band, the expected number of rows until the average reaches `threshold` is at least `threshold`,
    whatever else the channels do and however they depend on each other within a row.

    Args:
        mean: float64 [K], reference means in [0, 1].
        slack: float64 [K], half-width of the band: what the reference itself does not know.
        run_length: Rows between two false alarms; the threshold.
        sides: "both", or "up" for channels such as errors, where only more is bad.

    Source:
        Shin, Ramdas & Rinaldo 2024, "E-detectors: a nonparametric framework for sequential change detection",
        doi:10.51387/23-NEJSDS51.

    Example:
        >>> detector = EDetector(np.array([0.1]), np.array([0.02]), run_length=1000.0)
        >>> detector.update(np.full((50, 1), 0.9))
        >>> detector.drift_detected
        True
    """

    def __init__(self, mean: DoubleArray, slack: DoubleArray, *, run_length: float, sides: str = "both") -> None:
        self._mean = np.asarray(mean, dtype=np.float64)
        slack = np.asarray(slack, dtype=np.float64)
        if self._mean.ndim != 1 or self._mean.shape != slack.shape or not len(self._mean):
            raise ValueError(f"mean and slack need one value a channel, got {self._mean.shape} and {slack.shape}")
        if run_length <= 1 or not math.isfinite(run_length):
            raise ValueError(f"the run length must be a number above 1, got {run_length}")
        self._run_length = run_length
        # a bet pays in units of its bound's distance to the end of the range, which must not vanish: where it would,
        # the band is widened, never narrowed. A bound beyond the other end is one that no mean can cross.
        up = np.maximum(self._mean + slack, _LEAST)
        down = np.minimum(self._mean - slack, 1 - _LEAST)
        # log of the factor of a bet b on "above": log(1 + b (x - up) / up); of one on "below": log(1 + b (down - x) /
        # (1 - down)). Both are at least 1 - b > 0 for every x in [0, 1].
        centres, slopes = [np.repeat(up[:, None], len(_FRACTIONS), 1)], [_FRACTIONS / up[:, None]]
        if sides == "both":
            centres.append(np.repeat(down[:, None], len(_FRACTIONS), 1))
            slopes.append(-_FRACTIONS / (1 - down[:, None]))
        elif sides != "up":
            raise ValueError(f'sides is "both" or "up", got {sides!r}')
        self._centre, self._slope = np.concatenate(centres, axis=1), np.concatenate(slopes, axis=1)
        self._m: DoubleArray = np.zeros_like(self._centre)
        self._recent: DoubleArray = self._mean.copy()
        self._evidence = self._peak = 0.0

    def update(self, block: DoubleArray) -> None:
        """Fold rows, float64 [N, K] in [0, 1]."""
        block = np.asarray(block, dtype=np.float64)
        if block.ndim != 2 or block.shape[1] != len(self._mean):
            raise ValueError(f"expected rows of {len(self._mean)} channels, got shape {block.shape}")
        if block.size and not (block.min() >= 0 and block.max() <= 1):
            raise ValueError(f"channels lie in [0, 1], got {block.min()} to {block.max()}")
        for start in range(0, len(block), _CHUNK):
            self._fold(block[start : start + _CHUNK])

    def _fold(self, rows: DoubleArray) -> None:
        logs = np.log1p(self._slope * (rows[:, :, None] - self._centre))
        running = np.cumsum(logs, axis=0)
        if math.log(self._m.max() + len(rows)) + running.max() - min(0.0, running.min()) < _LOG_CAP:
            # M_t = exp(S_t) (M_0 + sum_{s<=t} exp(-S_{s-1})), S the running sum of log factors: no loop over rows
            path = np.exp(running) * (self._m + np.cumsum(np.exp(logs - running), axis=0))
        else:  # it may reach the cap, which holds at every row
            path = np.exp(logs)
            before = self._m
            for row in path:
                before = row[:] = np.minimum((1 + before) * row, _CAP)
        self._m = path[-1].copy()
        average = path.mean(axis=(1, 2))
        self._evidence = float(average[-1])
        self._peak = max(self._peak, float(average.max()))
        decay = _RECENT ** np.arange(len(rows), -1, -1.0)
        stacked = np.concatenate([self._recent[None], rows])
        weights = np.concatenate([decay[:1], (1 - _RECENT) * decay[1:]])
        self._recent = (weights[:, None] * stacked).sum(axis=0)

    @property
    def evidence(self) -> float:
        """Current value of the averaged statistic."""
        return self._evidence

    @property
    def threshold(self) -> float:
        """The run length."""
        return self._run_length

    @property
    def warning(self) -> bool:
        """Whether the statistic has reached a twentieth of the threshold since the last reset."""
        return self._peak >= _WARNING * self._run_length

    @property
    def drift_detected(self) -> bool:
        """Whether the statistic has reached the threshold since the last reset."""
        return self._peak >= self._run_length

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Channels by their share of the evidence, with the shift of their recent mean (over about 33 rows)."""
        order = np.argsort(-self._m.max(axis=1), kind="stable")[:count]
        return [(int(i), float(self._recent[i] - self._mean[i])) for i in order]

    def reset(self) -> None:
        """Forget the evidence and take the alarm down."""
        self._m = np.zeros_like(self._centre)
        self._evidence = self._peak = 0.0
        self._recent = self._mean.copy()

    def state(self) -> dict[str, AnyArray]:
        """Evidence so far."""
        return {"m": self._m, "recent": self._recent, "scalars": np.array([self._evidence, self._peak])}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        if state["m"].shape != self._m.shape or state["recent"].shape != self._recent.shape:
            raise ValueError(f"state of {state['m'].shape[0]} channels for a detector of {len(self._mean)}")
        self._m, self._recent = state["m"].copy(), state["recent"].copy()
        self._evidence, self._peak = (float(v) for v in state["scalars"])
