"""Seasons, hour of the day and day of the week: learned on the device and taken out before the detectors look."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.types import AnyArray, BoolArray, DoubleArray, FloatArray

_DAY_S = 86_400.0
_MEMORY = 27 / 28
_LEAST_PERIODS = 2
_SURE = 4.0
_COVERED = 0.75
_CLIP = 3.0
_SLACK = 1.5


class Season:
    """Additive effects of the hour of the day (UTC) and of the day of the week on each channel.

    Only shapes are learned, never the level: of each whole day, counted from the first row, the hours' means less the
    day's mean go into the effects; of each whole week the days' less the week's. A drift of the level is left to the
    detectors, and a jump is in one day's shape once, clipped where the effects are known. So all rows can be learned
    from, also while an alarm is up.

    A channel's effects are used when they are there: when their spread stands out of what they differ by from period
    to period (analysis of variance), after two whole days for hours and two whole weeks for days.

    Args:
        channels: How many there are.

    Source:
        Paulson 1942, "An approximate normalization of the analysis of variance distribution",
        doi:10.1214/aoms/1177731608, for the test.

    Example:
        >>> season = Season(1)
        >>> times = np.arange(0.0, 4 * 86400, 600)
        >>> wave = 0.5 + 0.2 * np.sin(times / 86400 * 2 * np.pi)[:, None]
        >>> season.learn(wave, times)
        >>> float(np.ptp(season.adjust(wave, times))) < 0.1
        True
    """

    def __init__(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(f"at least one channel is needed, got {channels}")
        self._hours = _Cycle(channels, cells=24, cell_s=3_600.0)
        self._days = _Cycle(channels, cells=7, cell_s=_DAY_S)

    def learn(self, block: DoubleArray, times: DoubleArray) -> bool:
        """Look at rows, float64 [N, K], and when they came, float64 [N] in seconds since the epoch, oldest first.

        Returns:
            Whether a day or week is over, so that `slack` may have changed.

        Raises:
            ValueError: A shape is wrong or a time is not finite.
        """
        block, times = self._checked(block, times)
        if not len(times):
            return False
        first, last = float(times.min()), float(times.max())
        if not self._hours.active and self._hours.within(first, last) and self._days.within(first, last):
            total = block.sum(axis=0)  # nearly always a block lies within one hour
            self._hours.add(total, len(times), first)
            self._days.add(total, len(times), first)
            return False
        day = self._hours.learn(block, times)
        week = self._days.learn(self._hours.adjust(block, times), times)
        return day or week

    def adjust(self, block: DoubleArray, times: DoubleArray) -> DoubleArray:
        """Rows, float64 [N, K], without the season, within [0, 1]; the same rows until it is established.

        Raises:
            ValueError: A shape is wrong or a time is not finite.
        """
        block, times = self._checked(block, times)
        if not self.established:
            return block
        adjusted: DoubleArray = np.clip(self._days.adjust(self._hours.adjust(block, times), times), 0.0, 1.0)
        return adjusted

    def _checked(self, block: DoubleArray, times: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
        block, times = np.asarray(block, dtype=np.float64), np.asarray(times, dtype=np.float64)
        channels = self._hours.sums.shape[1]
        if block.ndim != 2 or block.shape[1] != channels or times.shape != block.shape[:1]:
            raise ValueError(f"expected rows of {channels} channels and their times, got {block.shape}, {times.shape}")
        if not np.isfinite(times).all():
            raise ValueError("times are seconds since the epoch")
        return block, times

    @property
    def established(self) -> bool:
        """Whether any channel has a season that is taken out."""
        return self._hours.active or self._days.active

    @property
    def used(self) -> BoolArray:
        """Which channels have a season that is taken out: bool [K]."""
        used: BoolArray = self._hours.used | self._days.used
        return used

    @property
    def slack(self) -> DoubleArray:
        """float64 [K]: what the effects in use do not know, to be added to a detector's band."""
        slack: DoubleArray = np.hypot(self._hours.error, self._days.error)
        return slack

    def state(self) -> dict[str, AnyArray]:
        """All that `restore` needs."""
        cycles = {"hours": self._hours, "days": self._days}
        return {f"{name}.{key}": array for name, cycle in cycles.items() for key, array in cycle.state().items()}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: It is the state of another number of channels.
        """
        if any(state[key].shape != array.shape for key, array in self.state().items()):
            raise ValueError(f"state of another number of channels than {self._hours.sums.shape[1]}")
        for name, cycle in {"hours": self._hours, "days": self._days}.items():
            cycle.restore({key.partition(".")[2]: array for key, array in state.items() if key.startswith(name)})


class _Cycle:
    """Mean shape over so many cells of a period, and how far it is to be trusted."""

    def __init__(self, channels: int, *, cells: int, cell_s: float) -> None:
        self._cell_s, self._period_s = cell_s, cells * cell_s
        self._began = math.nan
        self._counts: DoubleArray = np.zeros(cells)
        self.sums: FloatArray = np.zeros((cells, channels), dtype=np.float32)
        self._weights: DoubleArray = np.zeros(cells)  # whole periods that had rows in the cell, faded
        self._shape: FloatArray = np.zeros((cells, channels), dtype=np.float32)
        self._squares: DoubleArray = np.zeros(channels)  # of what differs from the mean shape, over cells and periods
        self._freedom = 0.0
        self._judge()

    def _cells(self, times: DoubleArray) -> AnyArray:
        cells: AnyArray = (times // self._cell_s).astype(np.int64) % len(self._counts)
        return cells

    def adjust(self, block: DoubleArray, times: DoubleArray) -> DoubleArray:
        return block - self._effects[self._cells(times)] if self.active else block

    def within(self, first: float, last: float) -> bool:
        """Whether times from first to last are in one cell of the period that runs."""
        known = self._began <= first and last < self._began + self._period_s
        return known and first // self._cell_s == last // self._cell_s

    def add(self, total: DoubleArray, rows: int, time: float) -> None:
        """Count rows within one cell, of which the sum is known."""
        cell = int(time // self._cell_s) % len(self._counts)
        self._counts[cell] += rows
        self.sums[cell] += total

    def learn(self, block: DoubleArray, times: DoubleArray) -> bool:
        """Whether a period was over."""
        closed = False
        while len(times):
            if not self._began <= times[0] < self._began + self._period_s:
                if times[0] >= self._began:
                    self._close()
                    closed = True
                self._counts, self.sums = np.zeros_like(self._counts), np.zeros_like(self.sums)
                # periods follow each other; after a gap, and where the clock went back, one begins here
                following = self._began + self._period_s
                self._began = following if following <= times[0] < following + self._period_s else float(times[0])
            outside = ~((times >= self._began) & (times < self._began + self._period_s))
            count = int(outside.argmax()) if outside.any() else len(times)
            chosen = (self._cells(times[:count]) == np.arange(len(self._counts))[:, None]).astype(np.float64)
            self._counts = self._counts + chosen.sum(axis=1)
            self.sums = self.sums + (chosen @ block[:count]).astype(np.float32)
            block, times = block[count:], times[count:]
        return closed

    def _close(self) -> None:
        """Take the shape of a period that is over, if it is whole."""
        there = self._counts > 0
        known = there | (self._weights > 0)
        if there.sum() < max(2, _COVERED * known.sum()):
            return
        means = self.sums[there] / self._counts[there, None]
        # centred on what the known shape says of the cells that are there: one of them may be missing today
        shape = means - (means - self._shape[there]).mean(axis=0)
        gain = 1 / (1 + _MEMORY * self._weights[there, None])
        off = shape - self._shape[there]
        if self.active:
            most = _CLIP * np.sqrt(self._spread * (1 + 1 / np.maximum(1, self._weights[there, None])))
            off = np.where(self.used, np.clip(off, -most, most), off)
        before = self._weights[there] > 0
        self._squares = _MEMORY * self._squares + (off**2 * (1 - gain))[before].sum(axis=0)
        self._freedom = _MEMORY * self._freedom + max(0, before.sum() - 1)
        self._shape = self._shape.copy()
        self._shape[there] += (gain * off).astype(np.float32)
        self._weights = _MEMORY * self._weights + there
        self._judge()

    def _judge(self) -> None:
        """Which channels have a season: the F test, by its normal approximation."""
        channels = self._squares.shape[0]
        known = self._weights > 0
        self.used: BoolArray = np.zeros(channels, dtype=bool)
        self._spread: DoubleArray = np.zeros(channels)
        between = known.sum() - 1.0
        # a little less than two: the weight of the earlier period has faded
        if between >= 1 and self._freedom >= 1 and self._weights.max() > _LEAST_PERIODS - 0.5:
            weights = self._weights[known, None]
            self._spread = self._squares / self._freedom
            centred = self._shape[known] - np.average(self._shape[known], axis=0, weights=weights[:, 0])
            signal = (weights * centred**2).sum(axis=0) / between
            ratio = np.cbrt(signal / np.maximum(self._spread, 1e-12))
            a, b = 2 / (9 * between), 2 / (9 * self._freedom)
            self.used = ((1 - b) * ratio - (1 - a)) / np.sqrt(b * ratio**2 + a) > _SURE
        self.active = bool(self.used.any())
        self._effects: DoubleArray = np.where(self.used, self._shape, 0.0).astype(np.float64)
        trusted = np.where(self.used, self._spread, 0.0)
        self.error: DoubleArray = _SLACK * np.sqrt(trusted / max(1.0, float(self._weights.max())))

    def state(self) -> dict[str, AnyArray]:
        return {
            "counts": self._counts.copy(),
            "sums": self.sums.copy(),
            "weights": self._weights,
            "shape": self._shape,
            "squares": self._squares,
            "scalars": np.array([self._began, self._freedom]),
        }

    def restore(self, state: dict[str, AnyArray]) -> None:
        self._counts, self.sums, self._weights = (state[key].copy() for key in ("counts", "sums", "weights"))
        self._shape, self._squares = state["shape"].copy(), state["squares"].copy()
        self._began, self._freedom = (float(v) for v in state["scalars"])
        self._judge()
