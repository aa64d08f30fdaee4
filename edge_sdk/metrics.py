"""The app's own metrics: proxies and business figures, recorded from any thread, in windows of bounded size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from random import Random
from statistics import NormalDist
from threading import Lock

import msgspec
import numpy as np

from edge_sdk.config import MetricConfig
from edge_sdk.errors import ConfigError, InputError, IntegrityError, NonFiniteError, RangeError
from edge_sdk.messages import MetricSummary, to_buckets
from edge_sdk.sketch import QuantileSketch
from edge_sdk.stats import round_at_random, round_outward, sequence_radius
from edge_sdk.types import DoubleArray

MAX_METRICS = 32
MAX_NAME = 64
MAX_PENDING = 100_000
"""Values between two folds; beyond it the oldest are dropped and counted."""
_LARGEST = 1e100
_FADING = 0.998
"""The recent mean looks back over about 500 values."""
_MIN_VALUES = 30
"""With fewer, neither a mean nor its error is known."""

Wire = tuple[list[int], list[int], int]
_NOTHING: Wire = ([], [], 0)


class Tally(msgspec.Struct):
    """Count, mean and squared deviations of values; old ones may fade."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def variance(self) -> float:
        """0 for no values."""
        return self.m2 / self.count if self.count else 0.0

    def add(self, values: DoubleArray, fading: float = 1.0) -> None:
        """Add float64 [N], oldest first, each of weight `fading` relative to the one after it.

        Source:
            Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115, equation 2.1, with weights.
        """
        if not len(values):
            return
        weights = np.power(fading, np.arange(len(values) - 1, -1, -1.0))
        weight = float(weights.sum())
        mean = float(weights @ values) / weight
        before, shift = self.count * fading ** len(values), mean - self.mean
        self.m2 = self.m2 * fading ** len(values) + float(weights @ (values - mean) ** 2)
        self.count = before + weight
        self.m2 += shift * shift * before * weight / self.count
        self.mean += shift * weight / self.count


class MetricState(msgspec.Struct):
    """What is known of one metric.

    Attributes:
        window: Since the last summary, as `low`, `high` and the sketches.
        low: Least value of the window.
        high: Largest value of the window.
        above: Sketch of the window's values of 0 or more.
        below: Of those below 0, without their sign.
        recent: Fading; about the last 500 values.
        before: `recent` as it was at the promotion under probation; None: there is none.
        after: Since that promotion.
    """

    window: Tally
    recent: Tally
    after: Tally
    before: Tally | None = None
    low: float = math.inf
    high: float = -math.inf
    above: Wire = _NOTHING
    below: Wire = _NOTHING

    @classmethod
    def new(cls) -> MetricState:
        """Nothing is known yet."""
        return cls(window=Tally(), recent=Tally(), after=Tally())

    def add(self, values: DoubleArray) -> None:
        """Add float64 [N], N > 0, oldest first."""
        self.window.add(values)
        self.recent.add(values, _FADING)
        if self.before is not None:
            self.after.add(values)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.above = _sketched(self.above, values[values >= 0])
        self.below = _sketched(self.below, -values[values < 0])


class Metrics:
    """Takes values from any thread; everything else happens on the one that folds.

    Args:
        configs: Of the metrics that have settings. Others may be recorded as well: they are only reported.

    Raises:
        ConfigError: Too many of them, or a name that is none.

    Example:
        >>> metrics = Metrics({"click": MetricConfig(floor=0.05, low=0, high=1)})
        >>> for _ in range(400):
        ...     metrics.record("click", 0)
        >>> metrics.fold()
        400
        >>> metrics.triggers()
        ['click: mean 0 of about 276 values, below 0.05']
    """

    def __init__(self, configs: Mapping[str, MetricConfig] | None = None) -> None:
        self._configs = dict(configs or {})
        if len(self._configs) > MAX_METRICS:
            raise ConfigError(f"metrics: at most {MAX_METRICS} are kept, got {len(self._configs)}")
        for name in self._configs:
            if problem := _problem(name):
                raise ConfigError(f"metrics.{name}: {problem}")
        self._names = set(self._configs)
        self._pending: deque[tuple[str, float]] = deque()
        self._lock = Lock()
        self._states: dict[str, MetricState] = {}
        self.dropped = 0
        """Values that came faster than they were folded."""

    def record(self, name: str, value: float) -> None:
        """Record a value; from any thread, in about a microsecond. It is lost if the process dies before the next fold.

        Raises:
            InputError: The name is none, or one too many, or the value is no number.
            NonFiniteError, RangeError: The value is NaN or infinite, or outside what the settings allow.
        """
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"metric {name!r}: expected a number, got {value!r:.80}") from error
        if not abs(number) <= _LARGEST:  # NaN is neither
            raise NonFiniteError(f"metric {name!r}: {number} is not finite, or its square would not be")
        if (config := self._configs.get(name)) is not None:
            low, high = _range(config)
            if not low <= number <= high:
                raise RangeError(f"metric {name!r}: {number:g} lies outside {low:g} to {high:g}")
        with self._lock:
            if name not in self._names:
                if (problem := _problem(name)) or len(self._names) >= MAX_METRICS:
                    raise InputError(f"metric {name!r}: {problem or f'at most {MAX_METRICS} names are kept'}")
                self._names.add(name)
            self._pending.append((name, number))
            if len(self._pending) > MAX_PENDING:
                self._pending.popleft()
                self.dropped += 1

    def fold(self) -> int:
        """Add what was recorded to the windows; returns how many values."""
        with self._lock:
            pending, self._pending = self._pending, deque()
        by_name: dict[str, list[float]] = {}
        for name, value in pending:
            by_name.setdefault(name, []).append(value)
        for name, values in by_name.items():
            self._states.setdefault(name, MetricState.new()).add(np.array(values))
        return len(pending)

    def means(self) -> dict[str, float]:
        """The recent mean of each metric, over about the last 500 values."""
        return {name: state.recent.mean for name, state in self._states.items()}

    def triggers(self) -> list[str]:
        """Why the metrics call for learning, one reason for each that does. See `metric_trigger`."""
        told = {name: metric_trigger(config, self._state(name)) for name, config in self._configs.items()}
        return [f"{name}: {why}" for name, why in told.items() if why]

    def begin_probation(self) -> None:
        """A new version serves: what comes is compared with what was."""
        for name in self._configs:
            state = self._states.setdefault(name, MetricState.new())
            state.before, state.after = msgspec.structs.replace(state.recent), Tally()

    @property
    def on_probation(self) -> bool:
        """Whether what comes is compared with what was."""
        return any(state.before is not None for state in self._states.values())

    def end_probation(self) -> None:
        """The comparison is over."""
        for state in self._states.values():
            state.before, state.after = None, Tally()

    def verdict(self, *, alpha: float) -> str:
        """Why the version on probation must be left, or "". See `metric_verdict`; all metrics share `alpha`."""
        watched = {name: config for name, config in self._configs.items() if config.margin is not None}
        for name, config in watched.items():
            if why := metric_verdict(config, self._state(name), alpha=alpha / len(watched)):
                return f"{name}: {why}"
        return ""

    def take_window(self, *, min_count: int, chance: Random) -> list[MetricSummary]:
        """Close the windows and tell of those with at least `min_count` values; the others go on."""
        told = []
        for name, state in sorted(self._states.items()):
            if state.window.count >= min_count:
                told.append(_summary(name, state, min_count, chance))
                state.window, state.low, state.high = Tally(), math.inf, -math.inf
                state.above = state.below = _NOTHING
        return told

    def to_bytes(self) -> bytes:
        """All that was folded."""
        return msgspec.msgpack.encode(self._states)

    def restore(self, data: bytes) -> None:
        """Continue from what `to_bytes` gave.

        Raises:
            IntegrityError: The state is damaged; nothing was changed.
        """
        try:
            states = _READ.decode(data)
            for state in states.values():
                for wire in (state.above, state.below):
                    QuantileSketch.from_wire(*wire)
        except (msgspec.MsgspecError, ValueError) as error:
            raise IntegrityError(f"the state of the metrics is damaged: {error}") from error
        others = [name for name in states if name not in self._configs]
        with self._lock:
            self._names = {*self._configs, *others[: MAX_METRICS - len(self._configs)]}
            self._states = {name: state for name, state in states.items() if name in self._names}

    def _state(self, name: str) -> MetricState:
        return self._states.get(name) or MetricState.new()


_READ = msgspec.msgpack.Decoder(dict[str, MetricState])


def metric_trigger(config: MetricConfig, state: MetricState) -> str | None:
    """Why a metric calls for learning, or None.

    The recent mean must lie beyond the limit by more than two of its standard errors, so that chance seldom calls. It
    is looked at again and again, so now and then it does: learning costs little, and the gate judges what comes of it.
    """
    recent = state.recent
    if recent.count < _MIN_VALUES:
        return None
    for limit, sign, what in ((config.floor, 1, "below"), (config.ceiling, -1, "above")):
        if limit is None:
            continue
        low, high = _range(config)
        # 30 zeros do not prove that fewer than one in 50 is a one: at the limit, values of a known range may vary most
        most = max(0.0, (limit - low) * (high - limit)) if math.isfinite(high - low) else 0.0
        error = math.sqrt(max(recent.variance, most) / recent.count)
        if sign * (limit - recent.mean) > 2 * error:
            return f"mean {recent.mean:.4g} of about {recent.count:.0f} values, {what} {limit:g}"
    return None


def metric_verdict(config: MetricConfig, state: MetricState, *, alpha: float) -> str | None:
    """Why the version on probation must be left for what it does to this metric, or None.

    It must be worse than before by more than `margin`. It may be asked after every value: the bound on the new mean
    holds at all times together, in the limit of many values, with 30 as the least. Values that depend on those before
    them (one user's clicks) make it err more often.

    Args:
        config: Which way is better, and the margin; without one the answer is None.
        state: With what was before the promotion, and what came after.
        alpha: Chance of leaving a version that is not worse than before by more than the margin.

    Source:
        Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024, "Time-uniform central limit theory and asymptotic confidence
        sequences", arXiv:2103.06476, one-sided form; the mean before, which was taken once, has a normal interval.
    """
    before, after = state.before, state.after
    if config.margin is None or before is None or min(before.count, after.count) < _MIN_VALUES:
        return None
    worse = (before.mean - after.mean) * (1 if config.better == "higher" else -1)
    # no worse means no less varied, either: without this, thirty zeros would be thirty proofs
    spread = math.sqrt(max(before.variance, after.variance))
    known = spread * (
        sequence_radius(after.count, alpha / 2) + NormalDist().inv_cdf(1 - alpha / 2) / math.sqrt(before.count)
    )
    if worse - config.margin <= known:
        return None
    return (
        f"mean {after.mean:.4g} of {after.count:.0f} values, before it {before.mean:.4g}: "
        f"worse by more than {config.margin:g}"
    )


def sketch_bytes(wire: Wire, unit: int, chance: Random) -> bytes:
    """A quantile sketch as a message carries it, its counts rounded at random."""
    indexes, counts, zeros = wire
    rounded = round_at_random(np.array([*counts, zeros], dtype=np.int64), unit, chance).tolist()
    return to_buckets(indexes, rounded[:-1], rounded[-1])


def _summary(name: str, state: MetricState, unit: int, chance: Random) -> MetricSummary:
    window, std = state.window, math.sqrt(state.window.variance)
    low, high = round_outward(np.array(state.low), np.array(state.high), np.array(std))
    count = int(round_at_random(np.array(round(window.count)), unit, chance)) * unit
    above, below = (sketch_bytes(wire, unit, chance) for wire in (state.above, state.below))
    return MetricSummary(name, count, window.mean, std, float(low), float(high), above, below)


def _sketched(wire: Wire, values: DoubleArray) -> Wire:
    if not len(values):
        return wire
    sketch = QuantileSketch.from_wire(*wire)
    sketch.add(values)
    return sketch.to_wire()


def _range(config: MetricConfig) -> tuple[float, float]:
    return (
        -math.inf if config.low is None else config.low,
        math.inf if config.high is None else config.high,
    )


def _problem(name: str) -> str:
    if 0 < len(name) <= MAX_NAME and name.isprintable():
        return ""
    return f"a name has 1 to {MAX_NAME} printable characters"
