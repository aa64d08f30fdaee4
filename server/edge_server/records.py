"""What the registry knows, as plain structs: what the API, the dashboard and `--json` show."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import msgspec

from edge_server.plan import RolloutPlan
from edge_server.rollout import RolloutState

Health = Literal["ok", "drift", "degraded", "offline", "new"]


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it was last heard.

    Attributes:
        enrolled: Added by a person, not by itself.
        online: What its retained state says.
        reason: Why it is online or not: "birth", "stopped" or "lost".
        release: Release it last reported; None before the first message.
        last_seen: Seconds since the epoch; None before the first message.
        predictions: In its last report, as all below.
        labelled: In its last report that had any.
        correct: Those that were right.
        alarms: Drift monitors that raise an alarm.
        warnings: Drift monitors that warn.
    """

    name: str
    group: str
    enrolled: bool
    online: bool
    reason: str
    release: int | None
    head: int | None
    mode: str
    sdk: str
    last_seen: float | None
    predictions: int
    errors: int
    labelled: int
    correct: int
    alarms: int
    warnings: int
    is_revoked: bool = False
    """Turned away, whatever it says."""
    hardware: str = ""
    """What it runs on, as it says."""
    labels: dict[str, str] = {}
    """Set by people."""
    disk_free_mb: int | None = None
    """Room on the disk of its database, in its last report that told; so the next two. None: unknown."""
    memory_free_mb: int | None = None
    """Of the machine, that can be had without swapping."""
    memory_total_mb: int | None = None

    @property
    def health(self) -> Health:
        """One word for the state of the device; the worst applies."""
        return health_of(self.last_seen, self.online, self.errors, self.alarms)

    @property
    def accuracy(self) -> float | None:
        """Share of labelled predictions that were right, 0 to 1; None without labels."""
        return self.correct / self.labelled if self.labelled else None


def megabytes(value: int | None) -> str:
    """Room in words: in MB, or in GB; "-" for what is unknown."""
    if value is None:
        return "-"
    return f"{value} MB" if value < 1000 else f"{value / 1000:,.1f} GB"


def memory(device: DeviceRecord) -> str:
    """What is left of a device's memory, in words."""
    if device.memory_free_mb is None or device.memory_total_mb is None:
        return megabytes(device.memory_free_mb)
    return f"{megabytes(device.memory_free_mb)} of {megabytes(device.memory_total_mb)} free"


class Glance(NamedTuple):
    """What is seen of a device from afar, where there are thousands."""

    name: str
    group: str
    release: int | None
    health: Health


def health_of(last_seen: float | None, online: bool, errors: int, alarms: int) -> Health:  # noqa: FBT001 - columns
    """One word for the state of a device; the worst applies."""
    if last_seen is None:
        return "new"
    if not online:
        return "offline"
    if errors:
        return "degraded"
    return "drift" if alarms else "ok"


class CommandRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An order to one device, and its answer."""

    id: str
    device: str
    name: str
    args: dict[str, Any]
    """The values are str, int, float or bool."""
    issued: float
    """Seconds since the epoch, as all times here."""
    expires: float
    actor: str
    outcome: str
    """By the device "done", "failed", "expired" or "interrupted"; "waiting"; "unanswered": no word came in time."""
    answered: float | None
    reason: str
    result: str
    """JSON, or nothing."""


class CertificateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that was issued to a device."""

    serial: str
    device: str
    pem: str
    issued: float
    expires: float
    in_use: bool


class ReleaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A base checkpoint that was taken in."""

    release: int
    name: str
    digest: str
    size: int
    """Of the manifest, in bytes."""
    parent: str | None
    labels: list[str]
    metrics: dict[str, float]
    pushed: float
    """Seconds since the epoch."""


class ReleaseDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A release, where it comes from, and what its makers say of it.

    Attributes:
        lineage: The releases it was made from, the nearest first; those that were taken in here.
        origin: Digest of what the last of them was made from, which is not here; None: from nothing.
        card: Its model card, Markdown.
    """

    release: ReleaseRecord
    lineage: list[ReleaseRecord]
    origin: str | None
    card: str


class CandidateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a candidate did against the release in use on held-out rows.

    Attributes:
        digest: SHA-256 of its manifest.
        champion: Release it was compared with; None: there was none.
        verdict: better, equal (no evidence either way) or lost; alone: there was nothing to compare with.
        built: Seconds since the epoch.
        report: The figures, overall and by slice.
    """

    digest: str
    name: str
    release: int
    champion: int | None
    verdict: Literal["better", "equal", "lost", "alone"]
    reason: str
    built: float
    report: dict[str, Any]

    @property
    def slices(self) -> list[dict[str, Any]]:
        """Of the held-out rows, as `evaluate.Slice`, the largest loss first."""
        found = self.report.get("evaluation", {}).get("slices", ())
        return sorted(found, key=lambda part: part["challenger"] - part["champion"])


class RolloutRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout: what was planned and where it is."""

    id: int
    started: float
    """Seconds since the epoch."""
    plan: RolloutPlan
    state: RolloutState


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A label query that has a name.

    Attributes:
        query: Spelled out: it names no other segment.
        created: Seconds since the epoch.
        actor: Who made it.
    """

    name: str
    query: str
    created: float
    actor: str


class SegmentDetail(SegmentRecord, frozen=True, kw_only=True):
    """A segment as it is now.

    Attributes:
        devices: How many it is true of.
        rollouts: Those for it that are not over.
    """

    devices: int
    rollouts: list[int]


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a group should run.

    Attributes:
        revision: Number of `desired`; 0 before the first.
        base: Release for all; None before the first.
        revoked: Releases that nobody may run.
        desired: The message as published, encoded; empty before the first.
        mode: What its devices are to be trusted with: monitor, shadow or adapt; "": what each was told last.
    """

    name: str
    revision: int = 0
    base: int | None = None
    revoked: tuple[int, ...] = ()
    desired: bytes = b""
    mode: str = ""


class EventRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened once on a device."""

    id: int
    device: str
    time: float
    """By the device's clock, seconds since the epoch."""
    name: str
    release: int
    head: int
    detail: dict[str, Any]
    """The values are str, int, float or bool."""


Role = Literal["viewer", "operator", "releaser"]


class UserRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody, or a program, that may use the API and the dashboard."""

    id: int
    name: str
    role: Role
    created: float
    """Seconds since the epoch."""
    revoked: float | None = None


class FleetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet in numbers."""

    devices: int
    online: int
    in_drift: int
    predictions: int
    """In the devices' last reports, as the next two."""
    labelled: int
    correct: int
    releases: dict[str, int]
    """Devices per release; "none" for those that have not said."""
    counters: dict[str, int]
    """What the ingest has counted since the database was made."""
    unknown_devices: dict[str, int]
    """Messages per device that was turned away because nobody added it."""

    @property
    def accuracy(self) -> float | None:
        """Share of labelled predictions that were right, 0 to 1; None without labels."""
        return self.correct / self.labelled if self.labelled else None


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A change of state that somebody asked for."""

    id: int
    time: float
    """Seconds since the epoch."""
    actor: str
    """Name of a user; "cli", "library", "coordinator"; "api" and "dashboard" while there are no users."""
    action: str
    detail: dict[str, Any]


class RollupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over a minute, an hour or a day.

    Attributes:
        device: Empty for all together.
        span: Seconds.
        start: Seconds since the epoch, a multiple of `span`.
        release: The release that made the predictions.
        reports: Those that began within the span.
        alarmed: Reports in which a drift monitor raised an alarm.
        warned: Reports in which one warned.
        received_bytes: Of these reports as they came.
        latency: Quantile sketch of milliseconds, see `edge_sdk.messages.to_buckets`; of hours and days, from summaries.
    """

    device: str
    span: int
    start: int
    release: int
    reports: int
    predictions: int
    errors: int
    labelled: int
    correct: int
    alarmed: int
    warned: int
    received_bytes: int
    latency: bytes


COMPUTED: dict[str, dict[str, Any]] = {
    "health": {"type": "string", "enum": list(get_args(Health))},
    "accuracy": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
}
"""Properties that are told with the fields, and their JSON schema."""


def as_json(record: msgspec.Struct) -> dict[str, Any]:
    """A record with field names, and its computed properties where it has them."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    for name in COMPUTED:
        if hasattr(record, name):
            fields[name] = getattr(record, name)
    return fields
