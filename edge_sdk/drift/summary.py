"""How the data looked over some time, in numbers that can be added up over time and over devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, Self

import msgspec
import numpy as np

from edge_sdk import messages
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import MAX_SUMMARY_BYTES, MetricSummary, MonitorState, from_buckets, from_counts, to_counts
from edge_sdk.metrics import sketch_bytes
from edge_sdk.sketch import QuantileSketch
from edge_sdk.stats import round_at_random, round_outward
from edge_sdk.types import AnyArray, DoubleArray

BINS = 64
_COARSER = (32, 16, 8)
_MAX_NAME = 64
_MAX_LABELS = 32
_OTHER = "other"
_SHORT = 1 << 24
"""Counts below this are stored in three bytes: a window of so many rows hardly ever comes."""
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Summary:
    """Bins and moments of each feature of the input, confidences, latencies and classes; in 20 kB for 64 features.

    Not thread-safe.

    Args:
        names: Of the features.
        reference: Names the reference whose quantiles the bins are of: `Reference.digest`.
        start: When its window began, in seconds since the epoch.

    Example:
        >>> summary = Summary(["x"], reference="9f86d081", start=0.0)
        >>> summary.add(np.array([[1.0], [2.0]]), np.array([[10], [50]]), said=["a", "b"])
        >>> summary.merge(summary)
        >>> summary.rows
        4
    """

    def __init__(self, names: Sequence[str], *, reference: str = "", start: float = 0.0) -> None:
        self.names, self.reference, self.start = tuple(names), reference, start
        self.end = start
        """Of a summary that was read; the device says it when it sends one."""
        features = len(self.names)
        self.rows = 0
        self.counts: AnyArray = np.zeros((features, BINS), np.uint32)
        """uint32 [F, B], rows by feature and bin."""
        self.missing: AnyArray = np.zeros(features, np.uint32)
        """uint32 [F]."""
        self.known: DoubleArray = np.zeros(features)
        """float64 [F], values that the moments are of."""
        self.mean: DoubleArray = np.zeros(features)
        self.m2: DoubleArray = np.zeros(features)
        """float64 [F], sum of squared deviations from the mean."""
        self.low: DoubleArray = np.full(features, np.inf)
        self.high: DoubleArray = np.full(features, -np.inf)
        self.confidence: AnyArray = np.zeros(BINS, np.uint32)
        """uint32 [64], rows by equal parts of 0 to 1."""
        self.classes: Counter[str] = Counter()
        self.latency = QuantileSketch()
        """Of milliseconds."""

    def add(
        self,
        features: AnyArray,
        bins: AnyArray,
        *,
        said: Sequence[str] = (),
        confidence: AnyArray | None = None,
        latency_ms: AnyArray | None = None,
    ) -> None:
        """Count predictions.

        Args:
            features: float32 [N, F], in their own units; what is not finite counts as missing.
            bins: uint8 [N, F], 0 to 63, where each lies within the reference (see `drift.ranks.ranked`).
            said: The labels predicted.
            confidence: float [N] in [0, 1]; NaN: not told.
            latency_ms: float >= 0, of each prediction.

        Raises:
            ValueError: The shapes do not fit; nothing was counted.
        """
        if features.ndim != 2 or features.shape != bins.shape or features.shape[1] != len(self.names):
            raise ValueError(f"features {features.shape} and bins {bins.shape} for {len(self.names)} names")
        if bins.size and not bins.max() < BINS:
            raise ValueError(f"bins are numbers below {BINS}, got {bins.max()}")
        if latency_ms is not None:
            self.latency.add(latency_ms)
        if not len(features):
            return
        values = features.astype(np.float64)
        width = len(self.names)
        cells = bins + np.arange(0, BINS * width, BINS)
        known = np.isfinite(values)
        if known.all():
            count = np.full(width, float(len(values)))
            mean = values.mean(axis=0)
            deviations = values - mean
            low, high = values.min(axis=0), values.max(axis=0)
        else:
            cells = cells[known]
            count = known.sum(axis=0, dtype=np.float64)
            mean = np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1)
            deviations = np.where(known, values - mean, 0)
            low, high = np.where(known, values, np.inf).min(axis=0), np.where(known, values, -np.inf).max(axis=0)
            self.missing += (len(values) - count).astype(np.uint32)
        self.counts += np.bincount(cells.ravel(), minlength=BINS * width).reshape(width, BINS).astype(np.uint32)
        self._add_moments(count, mean, (deviations * deviations).sum(axis=0), low, high)
        self.rows += len(values)
        self.classes.update(said)
        if confidence is not None:
            told = np.asarray(confidence, dtype=np.float64)
            parts = np.clip((told[np.isfinite(told)] * BINS).astype(np.int64), 0, BINS - 1)
            self.confidence += np.bincount(parts, minlength=BINS).astype(np.uint32)

    def _add_moments(
        self, count: DoubleArray, mean: DoubleArray, m2: DoubleArray, low: DoubleArray, high: DoubleArray
    ) -> None:
        """Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115, equation 2.1."""
        before, shift = self.known, mean - self.mean
        self.known = before + count
        share = count / np.maximum(self.known, 1)
        self.m2 = self.m2 + m2 + shift * shift * before * share
        self.mean = self.mean + shift * share
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def merge(self, other: Summary) -> None:
        """Count all that another one has counted, of the same reference; the result has the fewer bins of the two.

        Raises:
            ValueError: It is of another reference or of other features.
        """
        if (other.reference, len(other.names)) != (self.reference, len(self.names)):
            raise ValueError(
                f"a summary of reference {other.reference!r} with {len(other.names)} features cannot be added to one "
                f"of {self.reference!r} with {len(self.names)}"
            )
        self.names = self.names if any(self.names) else other.names
        bins = min(self.counts.shape[1], other.counts.shape[1])
        self.counts = _sum(_coarser(self.counts, bins), _coarser(other.counts, bins))
        self.missing = _sum(self.missing, other.missing)
        self.confidence = _sum(self.confidence, other.confidence)
        self._add_moments(other.known, other.mean, other.m2, other.low, other.high)
        self.rows += other.rows
        self.classes = self.classes + other.classes
        self.latency.merge(other.latency)
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)

    def message(
        self,
        *,
        end: float,
        release: int = 0,
        head: int = 0,
        min_count: int = 10,
        monitors: Sequence[MonitorState] = (),
        metrics: Sequence[MetricSummary] = (),
        chance: Random | None = None,
    ) -> messages.Summary:
        """What the coordinator is told: at most `MAX_SUMMARY_BYTES` as a body, and nothing of single rows.

        Counts are rounded at random to multiples of `min_count`, which is the wire's unit. To fit, bins are made
        coarser; then the metrics lose their quantiles, features their names, and last the classes and metrics go.

        Args:
            end: When the window ended, in seconds since the epoch.
            release: The version that made the predictions, with `head`.
            head: See `release`.
            min_count: `report.min_count`.
            monitors: All of them, as in a report.
            metrics: From `Metrics.take_window`, with the same `min_count`.
            chance: For rounding; None: fresh from the operating system.
        """
        chance = chance or Random()  # noqa: S311 - rounds; nobody is kept from guessing
        message = self._message(end, release, head, min_count, monitors, metrics, chance)
        blank = [msgspec.structs.replace(metric, above=b"", below=b"") for metric in metrics]
        steps: tuple[dict[str, Any], ...] = (
            *({"bins": bins, "counts": self._told_counts(bins, min_count, chance)} for bins in _COARSER),
            {"metrics": blank},
            {"features": [""] * len(self.names)},
            {"classes": {}},
            {"metrics": []},
        )
        for step in steps:
            if len(msgspec.msgpack.encode(message)) <= MAX_SUMMARY_BYTES:
                break
            message = msgspec.structs.replace(message, **step)
        return message

    def _message(
        self,
        end: float,
        release: int,
        head: int,
        unit: int,
        monitors: Sequence[MonitorState],
        metrics: Sequence[MetricSummary],
        chance: Random,
    ) -> messages.Summary:
        few = self.known < unit
        with np.errstate(invalid="ignore"):
            std = np.sqrt(self.m2 / np.maximum(self.known, 1))
            moments = np.stack([self.mean, std, *round_outward(self.low, self.high, std)], axis=1)
            moments = np.where(few[:, None], np.nan, moments).astype("<f4")
        common = Counter(dict(self.classes.most_common(_MAX_LABELS)))
        common[_OTHER] += self.classes.total() - common.total()
        rounded = round_at_random(np.array([self.rows, *common.values()]), unit, chance) * unit
        told: Counter[str] = Counter()
        for label, count in zip(common, rounded[1:].tolist(), strict=True):
            told[label[:_MAX_NAME]] += count
        return messages.Summary(
            start=self.start,
            end=end,
            release=release,
            head=head,
            reference=self.reference,
            unit=unit,
            rows=int(rounded[0]),
            features=[name[:_MAX_NAME] for name in self.names],
            bins=self.counts.shape[1],
            counts=self._told_counts(self.counts.shape[1], unit, chance),
            missing=_told(self.missing, unit, chance),
            moments=moments.tobytes(),
            confidence=_told(self.confidence, unit, chance) if self.confidence.any() else b"",
            classes={label: count for label, count in told.items() if count},
            latency=sketch_bytes(self.latency.to_wire(), unit, chance),
            metrics=list(metrics),
            monitors=list(monitors),
        )

    def _told_counts(self, bins: int, unit: int, chance: Random) -> bytes:
        return _told(_coarser(self.counts, min(bins, self.counts.shape[1])), unit, chance)

    @classmethod
    def from_message(cls, message: messages.Summary) -> Self:
        """The numbers of a message; monitors and metrics are read from itself.

        Raises:
            ProtocolError: Its arrays do not fit together.
        """
        features, unit = len(message.features), message.unit
        summary = cls(message.features, reference=message.reference, start=message.start)
        try:
            counts = np.array(from_counts(message.counts), np.float64).reshape(features, message.bins) * unit
            missing = np.array(from_counts(message.missing), np.float64).reshape(features) * unit
            moments = np.frombuffer(message.moments, "<f4").reshape(features, 4).astype(np.float64)
            confidence = np.array(from_counts(message.confidence) or [0] * BINS, np.float64).reshape(BINS) * unit
            indexes, buckets, zeros = from_buckets(message.latency)
            summary.latency = QuantileSketch.from_wire(indexes, [count * unit for count in buckets], zeros * unit)
        except ValueError as error:
            raise ProtocolError(f"a summary whose parts do not fit together: {error}") from error
        if message.bins not in (BINS, *_COARSER) and features:
            raise ProtocolError(f"a summary in {message.bins} bins; {BINS} or {_COARSER} are read")
        summary.end, summary.rows, summary.classes = message.end, message.rows, Counter(message.classes)
        summary.counts, summary.missing, summary.confidence = map(_bounded, (counts, missing, confidence))
        told = np.isfinite(moments).all(axis=1)
        summary.known = np.where(told, counts.sum(axis=1), 0.0)
        mean, std, low, high = np.where(summary.known[:, None] > 0, moments, [0, 0, np.inf, -np.inf]).T
        summary.mean, summary.m2, summary.low, summary.high = mean, std * std * summary.known, low, high
        return summary

    def to_wire(self, *, end: float, min_count: int = 10, chance: Random | None = None) -> bytes:
        """`message` in the form of an envelope's body, without what is not the summary's own."""
        return msgspec.msgpack.encode(self.message(end=end, min_count=min_count, chance=chance))

    @classmethod
    def from_wire(cls, data: bytes) -> Self:
        """What `to_wire` gave.

        Raises:
            ProtocolError: It did not give this.
        """
        return cls.from_message(messages.unpack(data, messages.Summary))

    def state(self) -> dict[str, AnyArray]:
        """All that `restore` needs, exactly, as plain arrays: for this device's own disk."""
        facts = (self.start, self.end, self.classes, self.latency.to_wire())
        return {
            "rows": np.array([self.rows]),
            "counts": _packed(self.counts),
            "missing": self.missing.copy(),
            "moments": np.stack([self.known, self.mean, self.m2, self.low, self.high]),
            "confidence": self.confidence.copy(),
            "facts": np.frombuffer(msgspec.msgpack.encode(facts), dtype=np.uint8),
        }

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: It is the state of other features, or damaged; nothing was changed.
        """
        shapes = {key: value.shape for key, value in self.state().items() if key not in ("counts", "facts")}
        if {key: state[key].shape for key in shapes} != shapes or state["counts"].shape[:-1] != self.counts.shape:
            raise ValueError(f"the state is not of a summary of {len(self.names)} features")
        try:
            facts = msgspec.msgpack.decode(state["facts"].tobytes(), type=_Facts)
        except _UNREADABLE as error:
            raise ValueError(f"the state of the summary is damaged: {error}") from error
        self.latency = QuantileSketch.from_wire(*facts[3])
        self.start, self.end, self.rows, self.classes = facts[0], facts[1], int(state["rows"][0]), Counter(facts[2])
        self.counts = _unpacked(state["counts"])
        self.missing, self.confidence = (state[key].astype(np.uint32) for key in ("missing", "confidence"))
        self.known, self.mean, self.m2, self.low, self.high = state["moments"].copy()


_Facts = tuple[float, float, dict[str, int], tuple[list[int], list[int], int]]


def _packed(counts: AnyArray) -> AnyArray:
    """uint32 [F, B] as its bytes, lowest first: uint8 [F, B, 3], or 4 where a count needs them."""
    parts: AnyArray = counts.astype("<u4").view(np.uint8).reshape(*counts.shape, 4)
    return np.ascontiguousarray(parts[..., : 3 if counts.max(initial=0) < _SHORT else 4])


def _unpacked(parts: AnyArray) -> AnyArray:
    """What `_packed` was given."""
    if parts.dtype != np.uint8 or parts.shape[-1] not in (3, 4):
        raise ValueError(f"counts are stored in three or four bytes, got {parts.dtype} {parts.shape}")
    whole = np.zeros((*parts.shape[:-1], 4), np.uint8)
    whole[..., : parts.shape[-1]] = parts
    counts: AnyArray = whole.view("<u4")[..., 0].astype(np.uint32)
    return counts


def _coarser(counts: AnyArray, bins: int) -> AnyArray:
    """Counts [F, B] in fewer bins."""
    summed: AnyArray = counts.reshape(len(counts), bins, counts.shape[1] // bins).sum(axis=2, dtype=np.float64)
    return summed


def _sum(first: AnyArray, second: AnyArray) -> AnyArray:
    return _bounded(first.astype(np.float64) + second)


def _bounded(counts: AnyArray) -> AnyArray:
    """As uint32; a fleet's sum may be larger than that can hold."""
    bounded: AnyArray = np.minimum(counts, float(np.iinfo(np.uint32).max)).astype(np.uint32)
    return bounded


def _told(counts: AnyArray, unit: int, chance: Random) -> bytes:
    return to_counts(round_at_random(counts.ravel(), unit, chance).tolist())
