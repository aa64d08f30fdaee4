"""Shiryaev-Roberts e-detector for the means of bounded channels."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.drift.base import DriftDetector
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

_FRACTIONS = np.array([0.05, 0.15, 0.4, 0.9])
"""The boldest bet halves the delay of large shifts; the smallest is for changes of rare events."""
_WARNING = 0.05
_RECENT = 0.97
_CAP = np.float32(1e30)
_CHUNK = 256
_WEIGHTS = ((1 - _RECENT) * _RECENT ** np.arange(_CHUNK - 1, -1, -1.0)).astype(np.float32)
_LEAST = 1e-3
_MOST_STRIDE = 32


class EDetector(DriftDetector):
    """Raises an alarm when the mean of any channel leaves its reference band.

    For each channel bets are laid on a mean above and a mean below the band. Each bet's Shiryaev-Roberts statistic
    M_t = (1 + M_{t-1}) L_t is an e-detector, and so is their average over bets and channels. While every channel's
    mean stays in its band, the expected number of rows until the average reaches `threshold` is at least `threshold`,
    whatever else the channels do and however they depend on each other within a row.

    With a stride s the statistic takes one step in s rows: M_t = (s + M_{t-1}) times the product of their L. It is an
    e-detector of the same run length in rows, looked at every s rows only, and takes a fraction of the time.

    The statistics are kept in single precision: they need to be known to no better than a millionth, and take half
    the room and time.

    Args:
        mean: float64 [K], reference means in [0, 1].
        slack: float64 [K], half-width of the band: what the reference itself does not know.
        run_length: Rows between two false alarms; the threshold.
        sides: "both", or "up" for channels such as errors, where only more is bad.
        stride: Rows in a step, 1 to 32. Those of a step that is not full yet count when it is.

    Source:
        Shin, Ramdas & Rinaldo 2024, "E-detectors: a nonparametric framework for sequential change detection",
        doi:10.51387/23-NEJSDS51.

    Example:
        >>> detector = EDetector(np.array([0.1]), np.array([0.02]), run_length=1000.0)
        >>> detector.update(np.full((50, 1), 0.9))
        >>> detector.drift_detected
        True
    """

    def __init__(
        self, mean: DoubleArray, slack: DoubleArray, *, run_length: float, sides: str = "both", stride: int = 1
    ) -> None:
        if run_length <= 1 or not math.isfinite(run_length):
            raise ValueError(f"the run length must be a number above 1, got {run_length}")
        if sides not in ("both", "up"):
            raise ValueError(f'sides is "both" or "up", got {sides!r}')
        if not 1 <= stride <= _MOST_STRIDE:
            raise ValueError(f"the stride must lie in 1..{_MOST_STRIDE}, got {stride}")
        self._run_length, self._sides, self._stride = run_length, sides, stride
        self._mean = np.zeros(np.shape(mean))
        self.refit(mean, slack)
        self._m: FloatArray = np.zeros_like(self._slope)
        self._recent: DoubleArray = self._mean.copy()
        self._evidence = self._peak = 0.0
        self._phase = self._quiet = 0

    def refit(self, mean: DoubleArray, slack: DoubleArray) -> None:
        """Take another band for the rows to come, and keep the evidence.

        Args:
            mean: float64 [K], as many as before.
            slack: float64 [K].

        Raises:
            ValueError: The shapes are wrong.
        """
        mean, slack = np.asarray(mean, dtype=np.float64), np.asarray(slack, dtype=np.float64)
        if mean.ndim != 1 or mean.shape != slack.shape or not len(mean):
            raise ValueError(f"mean and slack need one value a channel, got {mean.shape} and {slack.shape}")
        if mean.shape != self._mean.shape:
            raise ValueError(f"expected {len(self._mean)} channels as before, got {len(mean)}")
        self._mean = mean.copy()
        # a bet pays in units of its bound's distance to the end of the range, which must not vanish: where it would,
        # the band is widened, never narrowed. A bound beyond the other end is one that no mean can cross.
        up = np.maximum(mean + slack, _LEAST)
        down = np.minimum(mean - slack, 1 - _LEAST)
        # the factor of a bet b on "above" is 1 + b (x - up) / up, of one on "below" 1 + b (down - x) / (1 - down).
        # Both are at least 1 - b > 0 for every x in [0, 1]. Here as constant + slope x, float32 [bets, K].
        bets = _FRACTIONS[:, None]
        slope, constant = bets / up, np.repeat(1 - bets, len(mean), axis=1)
        if self._sides == "both":
            below = bets / (1 - down)
            slope = np.concatenate([slope, -below])
            constant = np.concatenate([constant, 1 + below * down])
        self._slope: FloatArray = slope.astype(np.float32)
        self._constant: FloatArray = constant.astype(np.float32)
        self._by_count: FloatArray | None = None

    def update(self, block: AnyArray) -> None:
        """Fold rows, float [N, K] in [0, 1]; or bool, of channels that are nothing but 0 or 1, which is faster."""
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != len(self._mean):
            raise ValueError(f"expected rows of {len(self._mean)} channels, got shape {block.shape}")
        if block.dtype != np.bool_ and block.size and not (block.min() >= 0 and block.max() <= 1):
            raise ValueError(f"channels lie in [0, 1], got {block.min()} to {block.max()}")
        for start in range(0, len(block), _CHUNK):
            self._fold(block[start : start + _CHUNK])

    def _fold(self, rows: AnyArray) -> None:
        """Rows that end the step that was begun, then whole steps, then the beginning of another one."""
        stride, values = self._stride, np.asarray(rows, np.float32)
        ended = min(len(rows), -self._phase % stride)
        steps = (len(rows) - ended) // stride
        begun = ended + steps * stride
        with np.errstate(over="ignore", under="ignore"):  # both are taken care of by the cap and by adding
            if ended:
                self._m = self._m * self._product(values[None, :ended])[0]
                self._phase = (self._phase + ended) % stride
                if not self._phase:
                    self._m = np.minimum(self._m, _CAP)
                    self._look(self._m[None])
            if steps:
                shape = (steps, stride, len(self._mean))
                whole = slice(ended, begun)
                if rows.dtype == np.bool_:
                    flags = np.ascontiguousarray(rows[whole]).view(np.uint8).reshape(shape)
                    factors = self._of_counts(np.add.reduce(flags, axis=1, dtype=np.uint8))
                else:
                    factors = self._product(values[whole].reshape(shape))
                m = self._m
                for factor in factors:  # each is replaced by the statistic after its step
                    m = m + np.float32(stride)
                    m *= factor
                    m = np.minimum(m, _CAP, out=factor)
                self._m = m.copy()
                self._look(factors)
            if begun < len(rows):
                self._m = (self._m + np.float32(stride)) * self._product(values[None, begun:])[0]
                self._phase = len(rows) - begun
        self._recent = _RECENT ** len(rows) * self._recent + _WEIGHTS[_CHUNK - len(rows) :] @ values

    def _product(self, steps: FloatArray) -> FloatArray:
        """Factors of rows float32 [S, N, K], multiplied over each step's rows: [S, bets, K]."""
        factors = steps[:, :, None, :] * self._slope
        factors += self._constant
        product: FloatArray = np.multiply.reduce(factors, axis=1)
        return product

    def _of_counts(self, counts: AnyArray) -> FloatArray:
        """The same of whole steps, of which is known how often each channel was 1, uint8 [S, K], and else 0."""
        if self._by_count is None:
            ones = np.arange(self._stride + 1.0)[:, None, None]
            zero, one = self._constant.astype(np.float64), (self._constant + self._slope).astype(np.float64)
            self._by_count = (zero ** (self._stride - ones) * one**ones).astype(np.float32)
        factors: FloatArray = np.repeat(self._by_count[:1], len(counts), axis=0)
        steps, channels = counts.nonzero()  # few: these channels are for what is seldom
        factors[steps, :, channels] = self._by_count[counts[steps, channels], :, channels]
        return factors

    def _look(self, m: FloatArray) -> None:
        """At the statistics after each of a few steps, float32 [S, bets, K]."""
        # in pairs, and far below what single precision holds
        seen = np.add.reduce(m.reshape(len(m), -1), axis=1) / np.float32(m[0].size)
        for evidence in seen.tolist():
            self._evidence = evidence
            self._peak = max(self._peak, evidence)
            self._quiet = 0 if evidence >= _WARNING * self._run_length else self._quiet + self._stride

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

    @property
    def quiet_rows(self) -> int:
        """Rows since the statistic last was at or above the warning level, or since the last reset."""
        return self._quiet

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Channels by their share of the evidence, with the shift of their recent mean (over about 33 rows)."""
        order = np.argsort(-self._m.max(axis=0), kind="stable")[:count]
        return [(int(i), float(self._recent[i] - self._mean[i])) for i in order]

    def look_again(self) -> None:
        """Begin anew, with the alarm still up: evidence that grew for long would take as long to fall."""
        self._m = np.zeros_like(self._slope)
        self._evidence = 0.0

    def reset(self) -> None:
        """Forget the evidence and take the alarm down."""
        self._m = np.zeros_like(self._slope)
        self._recent = self._mean.copy()
        self._evidence = self._peak = 0.0
        self._phase = self._quiet = 0

    def state(self) -> dict[str, AnyArray]:
        """Evidence so far."""
        scalars = np.array([self._evidence, self._peak, self._phase, self._quiet])
        return {"m": self._m, "recent": self._recent, "scalars": scalars}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        if any(state[key].shape != array.shape for key, array in self.state().items()):
            raise ValueError(f"state of shape {state['m'].shape} for a detector of {self._m.shape}")
        evidence, peak, phase, quiet = (float(v) for v in state["scalars"])
        if not 0 <= phase < self._stride:
            raise ValueError(f"state within a step of more than {phase:g} rows for a stride of {self._stride}")
        self._m, self._recent = state["m"].copy(), state["recent"].copy()
        self._evidence, self._peak, self._phase, self._quiet = evidence, peak, int(phase), int(quiet)


class OverEDetector(DriftDetector):
    """A detector that makes channels of something else, and leaves the evidence to an `EDetector` over them."""

    _detector: EDetector

    @property
    def evidence(self) -> float:
        """Of the e-detector."""
        return self._detector.evidence

    @property
    def threshold(self) -> float:
        """The run length."""
        return self._detector.threshold

    @property
    def warning(self) -> bool:
        """Whether evidence has reached a twentieth of the threshold since the last reset."""
        return self._detector.warning

    @property
    def drift_detected(self) -> bool:
        """Whether evidence has reached the threshold since the last reset."""
        return self._detector.drift_detected

    @property
    def quiet_rows(self) -> int:
        """Rows since the evidence last was at or above the warning level."""
        return self._detector.quiet_rows

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Channels by their share of the evidence, with the shift of their recent mean."""
        return self._detector.suspects(count)

    def look_again(self) -> None:
        """Begin anew, with the alarm still up."""
        self._detector.look_again()
