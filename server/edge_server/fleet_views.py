"""What was found about the fleet, as plain structs: what the API, the dashboard and `--json` show."""

from __future__ import annotations

import msgspec


class FeatureView(msgspec.Struct, frozen=True, kw_only=True):
    """One feature over a group of devices.

    Attributes:
        name: Of the feature.
        rows: Values that were counted.
        missing: Share of values that were missing, 0 to 1.
        mean: In the feature's own unit, as the next four; None: nobody told.
        std: Standard deviation.
        low: Least value, rounded away from the mean.
        high: Largest value, likewise.
        quantiles: By percent; empty where the reference is not here.
        histogram: Shares of 64 bins, each of which holds as much of the reference (or that of a value which repeats).
        psi: Population stability index against the reference; 0: the same.
        ks: Largest distance of the two distributions, 0 to 1.
        shift: Of the mean rank, -1 to 1: positive where values are larger than in the reference.
        devices: That told of it.
        up: Devices whose own mean rank is above the reference's.
        down: Below it.
        t: Mean of the devices' shifts over its standard error, that of the reference included: whether they agree.
            Rows of one device are alike, so that tests which count rows, of `psi` and `ks`, would always find
            something. None with fewer than three devices.
    """

    name: str
    rows: int
    missing: float
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    quantiles: dict[str, float]
    histogram: list[float]
    psi: float | None
    ks: float | None
    shift: float | None
    devices: int
    up: int
    down: int
    t: float | None


class MetricView(msgspec.Struct, frozen=True, kw_only=True):
    """One of the app's own metrics over a group of devices."""

    count: int
    mean: float
    std: float
    low: float
    high: float
    quantiles: dict[str, float]
    """By percent, to within 2 %."""


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """A group of devices over some time, as far as their summaries have one reference."""

    group: str
    """What it was grouped by: "all", or such as "hardware=rpi4" or "2026-01-01"."""
    reference: str
    known_reference: bool
    """The checkpoint with the reference is here; if not, bins are taken to be equal and there are no quantiles."""
    releases: list[int]
    start: float
    """Seconds since the epoch."""
    end: float
    devices: int
    rows: int
    features: list[FeatureView]
    confidence: list[float]
    """Shares of 64 equal parts of 0 to 1; empty without probabilities."""
    classes: dict[str, int]
    latency_ms: dict[str, float]
    """Quantiles by percent."""
    metrics: dict[str, MetricView]
    skipped: int = 0
    """Summaries that could not be added."""
