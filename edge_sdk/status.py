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
