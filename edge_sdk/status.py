"""How a device is, and what one of its steps did: aggregates only."""

from __future__ import annotations

import msgspec

from edge_sdk.reporter import Counters
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
    accuracy: float | None
    """Live, over the latest labels."""
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
