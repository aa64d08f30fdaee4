"""Autocorrelated streams, thinned until their rows are nearly independent."""

from __future__ import annotations

import numpy as np

from edge_sdk.types import AnyArray, BoolArray, DoubleArray, FloatArray

_LIMIT = 0.1
_ERRORS = 1.5
_ENOUGH = 64
_UNKNOWN = 4
_PARTS = 3
_MEMORY = 1 - _PARTS / 8192
_PARTS_OF_ONE = 255
_SURE = 1024
_SELDOM = 4


class Thinner:
    """Finds how far apart rows must be for their autocorrelation to be small, and keeps one in so many.

    The autocorrelation at a lag is one minus the mean squared difference at that lag over the one at twice the largest
    lag, which stands for the variance nearby. A jump of the mean, which is for the detectors to see, is in those
    differences once: stretches of rows go to three estimates in turn, a jump reaches two of them, and rows count as
    correlated only if all three say so, by 0.1 and a margin for chance. So independent rows are all kept. The channel
    that needs the largest step decides. Until 256 rows are known one in four is kept: a correlated stream folded whole
    raises its false alarms in that time. From some 3000 rows on one stretch in four is enough.

    Args:
        channels: How many there are.
        most: Largest step, a power of two.

    Source:
        Matheron 1963, "Principles of geostatistics", doi:10.2113/gsecongeo.58.8.1246, for the variogram.

    Example:
        >>> thinner = Thinner(1)
        >>> thinner.learn(np.repeat(np.random.default_rng(0).random(500), 4)[:, None])
        >>> thinner.step, thinner.keep(10)
        (4, slice(0, 10, 4))
    """

    def __init__(self, channels: int, *, most: int = 32) -> None:
        if channels < 1 or most < 1 or most & (most - 1):
            raise ValueError(f"at least one channel and a power of two are needed, got {channels} and {most}")
        self._lags: list[int] = [2**i for i in range(most.bit_length())]
        self._far = 2 * most
        self._back = np.array([*self._lags, self._far])[:, None]
        self._last: AnyArray = np.zeros((self._far, channels), dtype=np.uint8)  # in parts of 255
        self._squares: FloatArray = np.zeros((_PARTS, len(self._lags) + 1, channels), dtype=np.float32)
        self._fourths: FloatArray = np.zeros((_PARTS, channels), dtype=np.float32)
        self._pairs: DoubleArray = np.zeros(_PARTS)
        self._rows = self._wait = 0
        self._every = 1
        self._step = min(_UNKNOWN, most)

    def learn(self, block: DoubleArray) -> None:
        """Look at rows, float64 [N, K], oldest first, none left out. N may be 0.

        Raises:
            ValueError: The shape is wrong.
        """
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != self._last.shape[1]:
            raise ValueError(f"expected rows of {self._last.shape[1]} channels, got shape {block.shape}")
        begin = 0
        while begin < len(block):
            end = begin + self._far - self._rows % self._far
            self._learn(block[begin:end])
            begin = end

    def _learn(self, rows: DoubleArray) -> None:
        """Rows of one stretch; stretches are as long as the largest difference reaches."""
        stretch = self._rows // self._far
        if not self._rows % self._far:
            self._every = _SELDOM if self._pairs.min() >= _SURE else 1
        every = self._every
        self._rows += len(rows)
        if self._rows >= (_PARTS * _SELDOM + 1) * self._far:  # only whose turn it is matters
            self._rows -= _PARTS * _SELDOM * self._far
        if stretch % every and (stretch + 1) % every:  # neither looked at nor just before one that is
            return
        parts = np.concatenate([self._last, np.rint(rows * _PARTS_OF_ONE).astype(np.uint8)])
        self._last = parts[-self._far :]
        if stretch % every or not stretch:  # before the first there is none
            return
        values = parts.astype(np.float32)
        values *= np.float32(1 / _PARTS_OF_ONE)
        weights = (_MEMORY ** np.arange(len(rows) - 1, -1, -1.0)).astype(np.float32)
        part, fade = stretch // every % _PARTS, np.float32(_MEMORY ** len(rows))
        steps = values[self._far + np.arange(len(rows)) - self._back]  # [lags, rows, K]
        steps -= values[self._far :]
        steps *= steps
        for sums, new in ((self._squares, weights @ steps), (self._fourths, weights @ steps[-1] ** 2)):
            sums[part] *= fade
            sums[part] += new
        self._pairs[part] = fade * self._pairs[part] + weights.sum()
        if self._rows % self._far == 0 and self._pairs.min() >= _ENOUGH * _MEMORY**_ENOUGH:
            fine = np.flatnonzero(~self._correlated().any(axis=1))
            self._step = self._lags[int(fine[0])] if len(fine) else self._lags[-1]

    @property
    def step(self) -> int:
        """One row in so many is kept: 1, 2, 4, ... `most`; 4 until enough is known. Changes between stretches."""
        return self._step

    def _correlated(self) -> BoolArray:
        """Whether each channel's autocorrelation is too large, at each lag: bool [lags, K]."""
        pairs = self._pairs[:, None]
        far = self._squares[:, -1]
        moves = (far > 1e-9 * pairs).all(axis=0)
        far = far[:, moves]
        # a channel of rare spikes knows little: two that meet by chance look like a pattern. Its kurtosis tells.
        kurtosis = np.maximum(3.0, pairs * self._fourths[:, moves] / far**2)
        error = np.sqrt(2 / pairs * kurtosis / 3)
        exceeds = 1 - self._squares[:, :-1, moves] / far[:, None] > (_LIMIT + _ERRORS * error)[:, None]
        result: BoolArray = exceeds.all(axis=0)
        return result

    def keep(self, rows: int) -> slice:
        """Which of the next so many rows to fold; goes on where the call before left off."""
        step, first = self.step, self._wait
        if first >= rows:
            self._wait -= rows
            return slice(rows, rows, step)
        last = first + (rows - 1 - first) // step * step
        self._wait = last + step - rows
        return slice(first, rows, step)

    def state(self) -> dict[str, AnyArray]:
        """All that `restore` needs."""
        arrays: dict[str, AnyArray] = {
            "last": self._last,
            "squares": self._squares.copy(),
            "fourths": self._fourths.copy(),
            "pairs": self._pairs.copy(),
        }
        return {**arrays, "scalars": np.array([self._rows, self._wait, self._step, self._every])}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: It is the state of a thinner of another shape.
        """
        if any(state[key].shape != array.shape for key, array in self.state().items()):
            raise ValueError(f"state of {state['last'].shape[1]} channels for a thinner of {self._last.shape[1]}")
        self._last, self._squares = state["last"].astype(np.uint8), state["squares"].copy()
        self._fourths, self._pairs = state["fourths"].copy(), state["pairs"].copy()
        self._rows, self._wait, self._step, self._every = (int(v) for v in state["scalars"])
