"""Summaries of one device added up, so that what is read from the sum is what was read from its parts. Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from edge_sdk.drift.summary import Summary
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import MetricSummary, to_buckets, to_counts
from edge_sdk.messages import Summary as SummaryMessage
from edge_sdk.types import AnyArray
from edge_server.fleet import MetricSum, metrics_of

_DAY_S = 86_400.0


class Part(NamedTuple):
    """Summaries that became one."""

    places: list[int]
    """Of these, among those given, ascending."""
    message: SummaryMessage


def day_of(message: SummaryMessage) -> int:
    """Days since the epoch. That of the middle: an hour that ends a second after midnight is of the day before."""
    return int((message.start + message.end) / 2 // _DAY_S)


def add_up(told: Sequence[SummaryMessage]) -> list[Part]:
    """Add up what can be added without a loss: of one version, reference, unit, width of bins, and the same features.

    A feature whose moments were held back stands beside those that have them: a sum could not say of how many rows its
    moments are. What cannot be read is left as it is.

    Args:
        told: Of one device, oldest first.
    """
    parts: dict[Hashable, list[int]] = {}
    totals: dict[Hashable, _Total] = {}
    for place, message in enumerate(told):
        try:
            summary, key = _read(message)
        except (ProtocolError, ValueError):
            parts[place] = [place]
            continue
        parts.setdefault(key, []).append(place)
        totals.setdefault(key, _Total()).add(message, summary)
    return [
        Part(places, told[places[0]] if len(places) == 1 else totals[key].message(told[places[-1]]))
        for key, places in parts.items()
    ]


def _read(message: SummaryMessage) -> tuple[Summary, Hashable]:
    """The summary, and what has to agree.

    Raises:
        ProtocolError, ValueError: It is none that can be read.
    """
    summary = Summary.from_message(message)
    metrics_of(message, unit=1)
    if not message.unit:
        raise ValueError("a summary in units of 0")
    version = (message.release, message.head, message.reference)
    return summary, (*version, message.unit, message.bins, tuple(message.features), (summary.known > 0).tobytes())


class _Total:
    """A sum in the making."""

    def __init__(self) -> None:
        self._summary: Summary | None = None
        self._metrics: dict[str, MetricSum] = {}

    def add(self, message: SummaryMessage, summary: Summary) -> None:
        """Add one more of the same kind."""
        if self._summary is None:
            self._summary = summary
        else:
            self._summary.merge(summary)
        for metric, above, below in metrics_of(message, unit=1):  # as they will be told again
            self._metrics.setdefault(metric.name, MetricSum()).add(metric, above, below)

    def message(self, last: SummaryMessage) -> SummaryMessage:
        """The sum in the form of what it is of; monitors are those of the last."""
        summary = self._summary or Summary.from_message(last)
        indexes, counts, zeros = summary.latency.to_wire()
        unit = last.unit
        with np.errstate(invalid="ignore"):
            std = np.sqrt(summary.m2 / np.maximum(summary.known, 1))
        moments = np.stack([summary.mean, std, summary.low, summary.high], axis=1)
        return msgspec.structs.replace(
            last,
            start=summary.start,
            end=summary.end,
            rows=summary.rows,
            counts=_in_units(summary.counts, unit),
            missing=_in_units(summary.missing, unit),
            moments=np.where(summary.known[:, None] > 0, moments, np.nan).astype("<f4").tobytes(),
            confidence=_in_units(summary.confidence, unit) if summary.confidence.any() else b"",
            classes=dict(summary.classes),
            latency=to_buckets(indexes, [count // unit for count in counts], zeros // unit),
            metrics=[_told(name, metric) for name, metric in self._metrics.items()],
        )


def _told(name: str, metric: MetricSum) -> MetricSummary:
    std = math.sqrt(max(metric.m2, 0.0) / metric.count)
    above, below = (to_buckets(*sketch.to_wire()) for sketch in (metric.above, metric.below))
    return MetricSummary(name, round(metric.count), metric.mean, std, metric.low, metric.high, above, below)


def _in_units(counts: AnyArray, unit: int) -> bytes:
    return to_counts((counts.ravel().astype(np.int64) // unit).tolist())
