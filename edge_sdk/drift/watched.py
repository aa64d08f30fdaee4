"""Channels under watch: thinned, without their season, against what they were on average."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.drift.both import Both
from edge_sdk.drift.edetector import EDetector
from edge_sdk.drift.ranks import with_spread
from edge_sdk.drift.season import Season
from edge_sdk.drift.steps import LEVELS, StepDetector, binned
from edge_sdk.drift.thin import Thinner
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

_Z = 2.0
"""How many standard errors of the reference the band forgives; see ADR 14."""
_RARE = 4.0
"""Rows that a channel may have missed in the reference: what is rarer than one row in so many is badly known."""
_STRIDE = 8
_SPARSER = 2
"""Of rows that were thinned, the test of whole windows gets one in so many: it cannot bear the rest of what they have
in common, as the e-detector can."""
LOOK_BACK = 300
"""Rows that the running means reach back over: fewer say too little of what has changed."""


class Watched:
    """One monitor over channels in [0, 1]: detectors behind a season and a thinner.

    Args:
        mean: float64 [K], of the reference.
        std: float64 [K].
        rows: Independent rows that these are of.
        run_length: Rows between two false alarms of the e-detector.
        spread: Whether distances from the middle are watched beside the channels (`with_spread`): mean and std then
            have 2 K values.
        levels: float [K, 31] of the reference, `levels_of`: whole windows are tested as well. None or no rows: not.
        step_run_length: Rows between two false alarms of these tests.
        cuts: float32 [K, 31] that the levels are at; None: at equal parts.
    """

    def __init__(
        self,
        mean: DoubleArray,
        std: DoubleArray,
        *,
        rows: float,
        run_length: float,
        spread: bool = False,
        levels: AnyArray | None = None,
        step_run_length: float = math.inf,
        cuts: FloatArray | None = None,
    ) -> None:
        self._run_length, self._step_run_length, self._spread = run_length, step_run_length, spread
        self._cuts = cuts
        self._channels = len(mean) // 2 if spread else len(mean)
        self.season, self.thinner = Season(self._channels), Thinner(self._channels)
        self._sums: DoubleArray = np.zeros((2, len(mean)))
        self._binned: AnyArray = np.zeros((0, LEVELS + 1), np.uint32)
        self._collected = 0
        known = np.zeros((0, LEVELS), np.float16) if levels is None else levels
        self._refer(mean, std, rows, known)

    def _refer(self, mean: DoubleArray, std: DoubleArray, rows: float, levels: AnyArray) -> None:
        self.mean, self.std, self.rows = np.asarray(mean, np.float64), np.asarray(std, np.float64), rows
        self.levels: AnyArray = np.asarray(levels, np.float16)
        means = EDetector(self.mean, self._slack, run_length=self._run_length, stride=_STRIDE)
        steps = None
        if len(levels):
            steps = StepDetector(self.levels, rows=max(1.0, rows), run_length=self._step_run_length, cuts=self._cuts)
            steps.take(self._sparseness)
        self.detector = Both(means, steps, channels=self._channels, spread=self._spread)
        self._allow_for_season()
        self.recent: DoubleArray = self.mean[: self._channels].copy()
        """float64 [K], running mean of the channels as they came."""

    @property
    def _sparseness(self) -> int:
        return _SPARSER if self.thinner.step > 1 else 1

    def _allow_for_season(self) -> None:
        self.detector.means.refit(self.mean, self._slack)
        if self.detector.steps is not None:
            self.detector.steps.ignored = self.season.used

    @property
    def _slack(self) -> DoubleArray:
        """What a mean over so many rows, and the season, do not know.

        The second term, which soon vanishes, is for what is rarer than one row in `rows`.

        Source:
            The shape of the bound in Maurer & Pontil 2009, "Empirical Bernstein bounds", arXiv:0907.3740, theorem 4.
        """
        rows = max(1.0, self.rows)
        slack: DoubleArray = _Z * self.std / math.sqrt(rows) + _RARE / rows
        season = self.season.slack
        return slack + (np.concatenate([season, 2 * season]) if self._spread else season)

    def fold(self, block: DoubleArray, times: DoubleArray | None = None) -> None:
        """Fold rows, float64 [N, K], and when they came, in seconds since the epoch; None: no season is known."""
        before = self.thinner.step
        channels = self._without_season(block, times)[self.thinner.keep(len(block))]
        if self.detector.steps is not None and self.thinner.step != before:
            self.detector.steps.take(self._sparseness)
        self.detector.update(channels)

    def collect(self, block: DoubleArray, times: DoubleArray | None = None) -> int:
        """Sum rows up for a new reference; returns how many there are so far."""
        channels = self._without_season(block, times)
        counted = binned(channels, self._cuts).astype(np.uint32)
        self._binned = self._binned + counted if len(self._binned) else counted
        channels = with_spread(channels) if self._spread else channels
        self._sums += [channels.sum(axis=0), (channels**2).sum(axis=0)]
        self._collected += len(channels)
        return self._collected

    def adopt(self) -> None:
        """Take what was collected for normal. Correlated rows count for as many as are kept of them."""
        if not self._collected:
            return
        mean = self._sums[0] / self._collected
        std = np.sqrt(np.maximum(self._sums[1] / self._collected - mean**2, 0))
        rows = self._collected / self.thinner.step
        levels = np.cumsum(self._binned, axis=1)[:, :-1] / self._collected if len(self.levels) else self.levels
        self.start_collecting()
        self._refer(mean, std, rows, levels)

    def start_collecting(self) -> None:
        """Forget what was collected."""
        self._sums, self._collected = np.zeros_like(self._sums), 0
        self._binned = np.zeros((0, LEVELS + 1), np.uint32)

    def _without_season(self, block: DoubleArray, times: DoubleArray | None) -> DoubleArray:
        """What the detectors are shown of these rows, before they are thinned; and learn from them all."""
        self.thinner.learn(block)
        fade = (1 - 1 / LOOK_BACK) ** len(block)
        if len(block):
            self.recent = fade * self.recent + (1 - fade) / len(block) * np.add.reduce(block, axis=0)
        if times is None:
            return block
        adjusted = self.season.adjust(block, times)
        if self.season.learn(block, times):
            self._allow_for_season()
        return adjusted

    def state(self) -> dict[str, AnyArray]:
        """All that `restore` needs, the reference in use too."""
        states = {"detector": self.detector.state(), "season": self.season.state(), "thinner": self.thinner.state()}
        arrays = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
        own = {"mean": self.mean, "std": self.std, "recent": self.recent, "sums": self._sums,
               "levels": self.levels, "binned": self._binned}  # fmt: skip
        return {**arrays, **own, "rows": np.array([self.rows, self._collected])}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: It is the state of other channels.
        """
        if state["mean"].shape != self.mean.shape or state["sums"].shape != self._sums.shape:
            raise ValueError(f"state of {len(state['mean'])} channels for {len(self.mean)}")
        if state["std"].shape != self.std.shape or state["recent"].shape != (self._channels,):
            raise ValueError("the parts of the state do not fit each other")
        width = len(self.levels)
        if len(state["levels"]) != width or len(state["binned"]) not in (0, self._channels):
            raise ValueError(f"state with levels of {len(state['levels'])} channels for {width}")
        parts = {
            name: {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            for name in ("detector", "season", "thinner")
        }
        self.season.restore(parts["season"])
        self.thinner.restore(parts["thinner"])
        rows, collected = (float(value) for value in state["rows"])
        self._refer(state["mean"].copy(), state["std"].copy(), rows, state["levels"].copy())
        self.detector.restore(parts["detector"])
        self.recent, self._sums, self._collected = state["recent"].copy(), state["sums"].copy(), int(collected)
        self._binned = state["binned"].copy()
