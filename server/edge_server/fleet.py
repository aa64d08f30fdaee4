"""The fleet's data as one: devices' summaries added up by cohort and time, and how far they are from the reference.

A stream of summaries in, one `FleetSummary` a group out: memory depends on the groups and features, not on the devices.
`FleetSummary` can itself be added up, over groups that have no device in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Self

import numpy as np

from edge_sdk.drift.psi import PSIDetector
from edge_sdk.drift.ranks import ranked
from edge_sdk.drift.reference import Reference
from edge_sdk.drift.summary import BINS, Summary
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import MetricSummary, from_buckets
from edge_sdk.messages import Summary as SummaryMessage
from edge_sdk.sketch import QuantileSketch
from edge_sdk.types import AnyArray, DoubleArray
from edge_server.fleet_views import FeatureView, FleetView, MetricView

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_CENTRES = (np.arange(BINS) + 0.5) / BINS
_LEAST_DEVICES = 3
_LARGEST = 1e100
_ROUGH = 1 / 256
"""Of a mean rank, for values that repeat: bins are a 64th wide."""


class Baseline:
    """What the bins of a reference hold when nothing has changed.

    Args:
        reference: Of the checkpoint; None: it is not here, and each bin is taken to hold as many rows as any other, as
            it does for features whose values do not repeat.
    """

    def __init__(self, reference: Reference | None = None) -> None:
        self.rows = reference.rows if reference else 1_000
        self.edges: AnyArray | None = reference.edges.astype(np.float64) if reference else None
        self._shares = _expected(reference) if reference else None

    def shares(self, features: int) -> DoubleArray:
        """float64 [F, 64], of each bin of each feature."""
        if self._shares is not None and len(self._shares) == features:
            return self._shares
        return np.full((features, BINS), 1 / BINS)


def _expected(reference: Reference) -> DoubleArray:
    """Bins into which 64 values fall that stand for as many equal parts of the reference, as shares, [F, 64]."""
    edges = reference.edges.astype(np.float64)
    ends = np.concatenate([reference.low[:, None], edges, reference.high[:, None]], axis=1)
    middles = np.where(np.isnan(ends[:, :-1] + ends[:, 1:]), 0.0, (ends[:, :-1] + ends[:, 1:]) / 2)
    _, bins = ranked(middles.T.astype(np.float32), reference.edges)
    return np.stack([np.bincount(column, minlength=BINS) for column in bins.T]) / BINS


class MetricSum:
    """One of the app's own metrics, added up."""

    def __init__(self) -> None:
        self.count = self.mean = self.m2 = 0.0
        self.low, self.high = math.inf, -math.inf
        self.above, self.below = QuantileSketch(), QuantileSketch()

    def add(self, told: MetricSummary, above: QuantileSketch, below: QuantileSketch) -> None:
        """Add one device's."""
        self._add(told.count, told.mean, told.std**2 * told.count, told.low, told.high)
        self.above.merge(above)
        self.below.merge(below)

    def merge(self, other: Self) -> None:
        """Add another group's."""
        self._add(other.count, other.mean, other.m2, other.low, other.high)
        self.above.merge(other.above)
        self.below.merge(other.below)

    def _add(self, count: float, mean: float, m2: float, low: float, high: float) -> None:
        if not count:
            return
        before, shift = self.count, mean - self.mean
        self.count += count
        self.mean += shift * count / self.count
        self.m2 += m2 + shift * shift * before * count / self.count
        self.low, self.high = min(self.low, low), max(self.high, high)

    def quantile(self, q: float) -> float | None:
        """None: nobody told of quantiles."""
        below, above = self.below.count, self.above.count
        if not below + above:
            return None
        place = q * (below + above)
        if place < below:
            return -self.below.quantile(1 - place / below)
        return self.above.quantile(min(1.0, (place - below) / above)) if above else -self.below.quantile(0.0)


def metrics_of(message: SummaryMessage, *, unit: int) -> list[tuple[MetricSummary, QuantileSketch, QuantileSketch]]:
    """The metrics of a summary that tell something, with their sketches: of values of 0 or more, and of those below.

    Args:
        message: The summary.
        unit: Of the counts in the sketches.

    Raises:
        ProtocolError, ValueError: One cannot be read, or is beyond what can be squared.
    """
    told = [metric for metric in message.metrics if metric.count > 0]
    for metric in told:
        if not max(abs(metric.mean), abs(metric.std)) < _LARGEST:
            raise ValueError(f"metric {metric.name!r} has mean {metric.mean:g} and deviation {metric.std:g}")
    return [(metric, _sketch(metric.above, unit), _sketch(metric.below, unit)) for metric in told]


def _sketch(data: bytes, unit: int) -> QuantileSketch:
    indexes, counts, zeros = from_buckets(data)
    return QuantileSketch.from_wire(indexes, [count * unit for count in counts], zeros * unit)


class FleetSummary:
    """Summaries of many devices, of one reference, added up.

    Args:
        features: How many there are.
        reference: Names the reference that the bins are of.
    """

    def __init__(self, features: int, *, reference: str) -> None:
        self.features, self.reference = features, reference
        self.devices = 0
        self.skipped = 0
        """Summaries that do not fit the others, or cannot be read."""
        self.releases: set[int] = set()
        self._parts: dict[int, Summary] = {}
        """By number of bins, so that one device's coarse bins do not make all others coarse."""
        self._metrics: dict[str, MetricSum] = {}
        # mean ranks of the devices, for how far they differ: number, mean and squared deviations of each feature
        self._between: DoubleArray = np.zeros((3, features))
        self._sides: DoubleArray = np.zeros((2, features))

    def add_device(self, told: Sequence[SummaryMessage], baseline: Baseline) -> None:
        """Add all summaries of one device that belong here."""
        own: dict[int, Summary] = {}
        for message in told:
            try:
                self._read(message, own)
            except (ProtocolError, ValueError):
                self.skipped += 1
        if not own:
            return
        self.devices += 1
        self._compare(own, baseline)
        for bins, summary in own.items():
            self._take(bins, summary)

    def _read(self, message: SummaryMessage, own: dict[int, Summary]) -> None:
        """Add a summary to those of its device.

        Raises:
            ProtocolError, ValueError: It is no summary, or not of these features; nothing was added.
        """
        if (len(message.features), message.reference) != (self.features, self.reference):
            raise ValueError(f"a summary of {len(message.features)} features of reference {message.reference!r}")
        summary = Summary.from_message(message)
        metrics = metrics_of(message, unit=message.unit)
        if (first := own.setdefault(message.bins, summary)) is not summary:
            first.merge(summary)
        for metric, above, below in metrics:
            self._metrics.setdefault(metric.name, MetricSum()).add(metric, above, below)
        self.releases.add(message.release)

    def _compare(self, own: dict[int, Summary], baseline: Baseline) -> None:
        """How far the device's mean ranks are from the usual ones."""
        counts = sum((_finer(summary.counts, baseline.shares(self.features)) for summary in own.values()), np.zeros(1))
        rows = counts.sum(axis=1)
        there = rows > 0
        shift = (counts / np.maximum(rows, 1)[:, None] - baseline.shares(self.features)) @ _CENTRES
        self._sides += np.stack([(shift > 0) & there, (shift < 0) & there])
        self._add_between(there.astype(float), np.where(there, shift, 0.0), np.zeros(self.features))

    def _add_between(self, count: DoubleArray, mean: DoubleArray, m2: DoubleArray) -> None:
        """Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115, equation 2.1."""
        before, old, old_m2 = self._between
        total, shift = before + count, mean - old
        share = count / np.maximum(total, 1)
        self._between = np.stack([total, old + shift * share, old_m2 + m2 + shift * shift * before * share])

    def _take(self, bins: int, summary: Summary) -> None:
        if bins in self._parts:
            self._parts[bins].merge(summary)
            return
        # a copy, so that what was given is left as it is
        empty = Summary([""] * self.features, reference=self.reference, start=summary.start)
        empty.counts = np.zeros((self.features, bins), np.uint32)
        empty.merge(summary)
        self._parts[bins] = empty

    def merge(self, other: FleetSummary) -> None:
        """Add what another one has, of the same reference and of other devices.

        Raises:
            ValueError: It is of another reference or of other features.
        """
        if (other.features, other.reference) != (self.features, self.reference):
            raise ValueError(f"reference {other.reference!r} cannot be added to {self.reference!r}")
        self.devices += other.devices
        self.skipped += other.skipped
        self.releases |= other.releases
        self._sides = self._sides + other._sides
        self._add_between(*other._between)
        for bins, summary in other._parts.items():
            self._take(bins, summary)
        for name, metric in other._metrics.items():
            self._metrics.setdefault(name, MetricSum()).merge(metric)

    def view(self, group: str, baseline: Baseline) -> FleetView:
        """What it says, in numbers to look at."""
        shares = baseline.shares(self.features)
        whole = Summary([""] * self.features, reference=self.reference)
        whole.start, whole.end = math.inf, -math.inf
        counts = np.zeros((self.features, BINS))
        for _, part in sorted(self._parts.items(), reverse=True):
            counts += _finer(part.counts, shares)
            whole.merge(part)
        features = _features(whole, counts, baseline, shares, self._between, self._sides)
        latency = {_percent(q): whole.latency.quantile(q) for q in LEVELS} if whole.latency.count else {}
        metrics = {
            name: MetricView(
                count=round(metric.count),
                mean=metric.mean,
                std=math.sqrt(max(metric.m2, 0.0) / metric.count),
                low=metric.low,
                high=metric.high,
                quantiles={_percent(q): value for q in LEVELS if (value := metric.quantile(q)) is not None},
            )
            for name, metric in sorted(self._metrics.items())
        }
        return FleetView(
            group=group,
            reference=self.reference,
            known_reference=baseline.edges is not None,
            releases=sorted(self.releases),
            start=whole.start if self._parts else 0.0,
            end=whole.end if self._parts else 0.0,
            devices=self.devices,
            rows=whole.rows,
            features=features,
            confidence=_shares(whole.confidence.astype(np.float64)),
            classes=dict(whole.classes.most_common()),
            latency_ms=latency,
            metrics=metrics,
            skipped=self.skipped,
        )


def _finer(counts: AnyArray, shares: DoubleArray) -> DoubleArray:
    """Counts [F, B] over 64 bins: those of a coarse bin in the proportions of the baseline."""
    width = BINS // counts.shape[1]
    if width == 1:
        return counts.astype(np.float64)
    parts = shares.reshape(len(shares), -1, width)
    sums = parts.sum(axis=2, keepdims=True)
    spread = np.where(sums > 0, parts / np.where(sums > 0, sums, 1), 1 / width)
    finer: DoubleArray = (spread * counts[:, :, None]).reshape(len(shares), BINS)
    return finer


def _features(
    whole: Summary,
    counts: DoubleArray,
    baseline: Baseline,
    shares: DoubleArray,
    between: DoubleArray,
    sides: DoubleArray,
) -> list[FeatureView]:
    rows = counts.sum(axis=1)
    seen = counts / np.maximum(rows, 1)[:, None]
    used = rows > 0
    psi = np.full(len(counts), np.nan)
    if used.any():
        found = PSIDetector(shares[used], rows=baseline.rows, run_length=2.0, window=max(1, int(rows.max())))
        psi[used] = found.index(counts[used])
    distance = np.abs(np.cumsum(seen - shares, axis=1)).max(axis=1)
    shift = (seen - shares) @ _CENTRES
    std = np.sqrt(whole.m2 / np.maximum(whole.known, 1))
    told = []
    for i, name in enumerate(whole.names):
        n, mean, m2 = between[:, i]
        error = (
            math.sqrt(max(m2, 0.0) / (n - 1) / n + 1 / (12 * baseline.rows) + _ROUGH**2) if n >= _LEAST_DEVICES else 0
        )
        known = whole.known[i] > 0
        told.append(
            FeatureView(
                name=name or f"feature {i}",
                rows=int(rows[i]),
                missing=float(whole.missing[i] / max(1.0, rows[i] + whole.missing[i])),
                mean=float(whole.mean[i]) if known else None,
                std=float(std[i]) if known else None,
                low=float(whole.low[i]) if known else None,
                high=float(whole.high[i]) if known else None,
                quantiles=_quantiles(whole, i, counts[i], baseline.edges) if rows[i] and known else {},
                histogram=_shares(counts[i]),
                psi=float(psi[i]) if rows[i] else None,
                ks=float(distance[i]) if rows[i] else None,
                shift=float(shift[i]) if rows[i] else None,
                devices=int(n),
                up=int(sides[0, i]),
                down=int(sides[1, i]),
                t=float(mean / error) if error else None,
            )
        )
    return told


def _quantiles(whole: Summary, feature: int, counts: DoubleArray, edges: AnyArray | None) -> dict[str, float]:
    """From the bins, linear within each; empty without the reference's edges."""
    if edges is None or feature >= len(edges):
        return {}
    low, high = whole.low[feature], whole.high[feature]
    ends = np.concatenate([[min(low, edges[feature, 0])], edges[feature], [max(high, edges[feature, -1])]])
    below = np.concatenate([[0.0], np.cumsum(counts)])
    return {_percent(q): float(np.interp(q * below[-1], below, ends)) for q in LEVELS}


def _shares(counts: DoubleArray) -> list[float]:
    total = counts.sum()
    return [round(float(share), 6) for share in counts / total] if total else []


def _percent(q: float) -> str:
    return f"{100 * q:g}"


Groups = Callable[[str, SummaryMessage], Iterable[str]]
"""The groups that a summary of a device belongs to."""


def merge_summaries(
    told: Iterable[tuple[str, SummaryMessage]], groups: Groups, baselines: Callable[[str, int], Baseline]
) -> dict[tuple[str, str], FleetSummary]:
    """Add up a stream of summaries, by group and reference.

    Args:
        told: Devices and their summaries; those of one device come one after the other.
        groups: See `Groups`.
        baselines: By reference and release.
    """
    found: dict[tuple[str, str], FleetSummary] = {}
    known: dict[str, Baseline] = {}
    for _, own in groupby(told, key=lambda entry: entry[0]):
        for key, messages in _by_group(own, groups):
            first = messages[0]
            if key[1] not in known:
                known[key[1]] = baselines(key[1], first.release)
            if key not in found:
                found[key] = FleetSummary(len(first.features), reference=key[1])
            found[key].add_device(messages, known[key[1]])
    return found


def _by_group(
    own: Iterable[tuple[str, SummaryMessage]], groups: Groups
) -> Iterator[tuple[tuple[str, str], list[SummaryMessage]]]:
    parts: dict[tuple[str, str], list[SummaryMessage]] = {}
    for device, message in own:
        for group in groups(device, message):
            parts.setdefault((group, message.reference), []).append(message)
    yield from parts.items()
