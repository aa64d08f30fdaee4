"""How a device is, and what one of its steps did: aggregates only."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.policy import ResourceState
from edge_sdk.reporter import Counters
from edge_sdk.slots import Version
from edge_sdk.types import Mode

STATUS_KEY = "status"
"""Where the latest status is kept for `edge status`, which may run beside the device."""


class StepReport(msgspec.Struct, frozen=True):
    """What one `step` did."""

    predictions: int = 0
    """Logged."""
    labelled: int = 0
    """Labels joined with their prediction."""
    unmatched: int = 0
    received: int = 0
    """Messages."""
    sent: int = 0
    swapped: bool = False
    """Another version serves now."""
    problem: str = ""
    """Empty, or what could not be done; serving goes on."""


class ShadowStatus(msgspec.Struct, frozen=True):
    """How it stands with a release that waits in shadow."""

    release: int
    since: float
    """Seconds since the epoch."""
    pairs: int
    """Inputs that passed both trunks, or that both releases answered."""
    pairs_wanted: int
    """With so many it is decided; 0: the coordinator decides."""
    left_s: float
    """And after so many seconds at most, with those that came."""
    training: bool
    """Whether a head is being trained for it; what comes of that decides."""


class Status(msgspec.Struct, frozen=True):
    """How the device is. Contains aggregates only."""

    device: str
    mode: Mode
    ready: bool
    release: int
    head: int
    labels: list[str]
    variant: str
    """int8 or fp32."""
    variant_reason: str
    """Why."""
    phase: str
    """Of learning: idle, training, judging or probation."""
    waits: str
    """Why learning or judging waits."""
    release_on_probation: bool
    alarms: list[str]
    warnings: list[str]
    diagnosis: str
    """What kind of change raised the alarms (quality, covariate, prior, concept), in words; empty without alarm."""
    accuracy: float | None
    """Live, over the latest labels."""
    estimated_accuracy: float | None
    """What the confidences of the latest answers foretell, without labels; None while inputs are not as they were."""
    metrics: dict[str, float]
    """Recent mean of each of the app's own metrics."""
    fresh_rows: int
    replay_rows: int
    judge_rows: int
    asked: int
    """Labels asked for by `label_requests` and not given yet."""
    new_labels: dict[str, int]
    """Labels that the model does not know, with so many samples each that it could; `accept_label` says whether."""
    connected: bool
    outbox_rows: int
    fetching: int | None
    """Number of the release on its way."""
    problem: str
    counters: Counters
    updates: str = "unsigned"
    """unsigned; or how it stands with the signed metadata: trusted, waiting, expired, clock_untrusted, refused, or
    no_root: none is installed, and every release is refused."""
    shadow: ShadowStatus | None = None
    """The release that waits until what was learned can be carried over to it."""


def told_version(version: Version) -> dict[str, Any]:
    """What serves, as the coordinator is told."""
    return {"release": version.release, "head": version.head}


def told_status(status: Status, *, min_count: int) -> dict[str, Any]:
    """A status as the coordinator is told on demand: without texts that could name paths, and without small counts."""
    told: dict[str, Any] = msgspec.to_builtins(status)
    told["new_labels"] = {label: rows for label, rows in status.new_labels.items() if rows >= min_count}
    if status.counters.labelled < min_count:
        told["accuracy"] = None
    told["problem"] = bool(status.problem)
    return told


def diagnostics(home: Path, resources: ResourceState, *, boot: int) -> dict[str, Any]:
    """The machine, as the coordinator is told on demand."""
    disk = shutil.disk_usage(home)
    return {
        "boot": boot,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.release(),
        "cores": os.cpu_count(),
        "disk_free_mb": round(disk.free / 1e6),
        "database_mb": round(sum(file.stat().st_size for file in home.glob("edge.db*")) / 1e6, 1),
        "free_mb": resources.free_mb,
        "total_mb": resources.total_mb,
        "battery": resources.battery,
        "on_mains": resources.on_mains,
        "temperature_c": resources.temperature_c,
        "cpu_load": resources.cpu_load,
    }
