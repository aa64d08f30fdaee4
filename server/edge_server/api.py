"""The endpoints of the JSON API that read. Those that change something are in `api_orders.py`."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from edge_sdk.messages import as_json as as_message
from edge_server.alerting import AlertDetail
from edge_server.alerts import Alert, Silence
from edge_server.alerts import Status as AlertStatus
from edge_server.endpoint import BEFORE, LIMIT, Call, Endpoint, Param, page, plain
from edge_server.errors import UnknownCandidateError
from edge_server.fleet_views import FleetView
from edge_server.freshness import Freshness
from edge_server.insight import DriftReport
from edge_server.records import (
    AuditRecord,
    CandidateRecord,
    CommandRecord,
    DeviceRecord,
    EventRecord,
    FleetRecord,
    GroupRecord,
    ReleaseDetail,
    ReleaseRecord,
    Role,
    RolloutRecord,
    SegmentDetail,
    UserRecord,
)
from edge_server.registry import Registry

_HOUR_S = 3600.0
_YEAR_HOURS = 8784
_LATEST = 30


class Me(msgspec.Struct, frozen=True):
    """Who the coordinator takes the caller for."""

    name: str
    role: Role


class DeviceDetail(DeviceRecord, frozen=True, kw_only=True):
    """A device with its last report."""

    last_report: dict[str, Any] | None


class ReportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A report of a device."""

    id: int
    time: float
    """By the device's clock, seconds since the epoch."""
    report: dict[str, Any]


class ReleaseView(ReleaseDetail, frozen=True, kw_only=True):
    """A release with its card, where it comes from, and who runs it."""

    signed: bool
    groups: list[str]
    """Groups whose base it is."""


class CandidateView(CandidateRecord, frozen=True, kw_only=True):
    """A candidate with its card."""

    card: str
    """Markdown; empty of candidates from before cards were kept."""
    pushed: bool
    """Whether it is a release here."""


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """What a group is told."""

    name: str
    revision: int
    base: int | None
    revoked: tuple[int, ...]
    mode: str


def _me(call: Call) -> Me:
    return Me(call.caller.name, call.caller.role)


def _fleet(call: Call) -> FleetRecord:
    return call.registry.fleet()


def _drift(call: Call) -> DriftReport:
    return call.registry.insight.drift()


def _views(call: Call) -> list[FleetView]:
    query = call.query
    since = call.registry.clock.now() - query["hours"] * _HOUR_S
    return call.registry.insight.view(by=query["by"], since=since, where=query["where"], sample=query["sample"])


def _freshness(call: Call) -> Freshness:
    return call.registry.insight.freshness()


def _devices(call: Call) -> dict[str, Any]:
    registry, limit, where = call.registry, call.query["limit"], call.query["where"]
    chosen = {"group": call.query["group"], "after": call.query["after"]}
    if where:
        having = set(registry.matching(where))
        found = [record for record in registry.devices(**chosen) if record.name in having][: limit + 1]
    else:
        found = registry.devices(**chosen, limit=limit + 1)
    return page("devices", found, limit, lambda record: record.name)


def device_detail(call: Call) -> dict[str, Any]:
    """One device with its last report."""
    return {**plain(call.registry.device(call.name)), "last_report": call.registry.last_report(call.name)}


def _reports(call: Call) -> dict[str, Any]:
    limit = call.query["limit"]
    call.registry.device(call.name)
    found = call.registry.reports(call.name, before=call.query["before"], limit=limit + 1)
    records = [ReportRecord(id=number, time=time, report=as_message(report)) for number, time, report in found]
    return page("reports", records, limit, lambda record: record.id)


def _groups(call: Call) -> list[GroupView]:
    return [group_view(group) for group in call.registry.store.groups.all()]


def _segments(call: Call) -> list[SegmentDetail]:
    return call.registry.segments.all()


def _segment(call: Call) -> SegmentDetail:
    return call.registry.segments.show(call.name)


def group_view(group: GroupRecord) -> GroupView:
    """A group without the message as it is published."""
    return GroupView(name=group.name, revision=group.revision, base=group.base, revoked=group.revoked, mode=group.mode)


def _releases(call: Call) -> dict[str, Any]:
    limit = call.query["limit"]
    found = call.registry.releases(before=call.query["before"], limit=limit + 1)
    return page("releases", found, limit, lambda record: record.release)


def release_view(registry: Registry, number: int) -> ReleaseView:
    """One release with its card, where it comes from, and who runs it."""
    return ReleaseView(
        **msgspec.structs.asdict(registry.release(number)),
        signed=registry.is_signed(number),
        groups=[group.name for group in registry.store.groups.all() if group.base == number],
    )


def _release(call: Call) -> ReleaseView:
    return release_view(call.registry, call.number)


def _candidates(call: Call) -> dict[str, Any]:
    limit = call.query["limit"]
    found = call.registry.store.candidates.page(before=call.query["before"], limit=limit + 1)
    return page("candidates", found, limit, lambda record: record.digest)


def _candidate(call: Call) -> CandidateView:
    return candidate_view(call.registry, call.path["digest"])


def candidate_view(registry: Registry, digest: str) -> CandidateView:
    """One candidate with its card.

    Raises:
        UnknownCandidateError: There is none of that digest.
    """
    found = registry.store.candidates.find(digest)
    if found is None:
        raise UnknownCandidateError(f"there is no candidate {digest[:64]!r}")
    release = registry.store.releases.find(number=found.release)
    return CandidateView(
        **msgspec.structs.asdict(found),
        card=registry.store.candidates.card(digest),
        pushed=bool(release) and release[0].digest == digest,
    )


def _rollouts(call: Call) -> dict[str, Any]:
    limit = call.query["limit"]
    found = call.registry.rollouts(before=call.query["before"], limit=limit + 1)
    return page("rollouts", found, limit, lambda record: record.id)


def _rollout(call: Call) -> RolloutRecord:
    return call.registry.rollout(call.number)


def _events(call: Call) -> dict[str, Any]:
    query, limit = call.query, call.query["limit"]
    found = call.registry.events(device=query["device"], name=query["name"], before=query["before"], limit=limit + 1)
    return page("events", found, limit, lambda record: record.id)


def _commands(call: Call) -> dict[str, Any]:
    query, limit = call.query, call.query["limit"]
    found = call.registry.store.commands.find(device=query["device"], before=query["before"], limit=limit + 1)
    return page("commands", found, limit, lambda record: record.id)


def _alerts(call: Call) -> dict[str, Any]:
    query, limit = call.query, call.query["limit"]
    found = call.registry.alerts.find(status=query["status"], before=query["before"], limit=limit + 1)
    return page("alerts", found, limit, lambda record: record.id)


def _alert(call: Call) -> AlertDetail:
    return call.registry.alerts.show(call.number)


def _silences(call: Call) -> list[Silence]:
    return call.registry.alerts.silences()


def _audit(call: Call) -> dict[str, Any]:
    query, limit = call.query, call.query["limit"]
    found = call.registry.store.audit.find(actor=query["actor"], before=query["before"], limit=limit + 1)
    return page("audit", found, limit, lambda record: record.id)


def _users(call: Call) -> list[UserRecord]:
    return call.registry.users.all()


READING = (
    Endpoint("GET", "/me", "viewer", _me, "Who the coordinator takes the caller for", reply=Me),
    Endpoint("GET", "/fleet", "viewer", _fleet, "The fleet in numbers, and what the ingest counted", reply=FleetRecord),
    Endpoint(
        "GET", "/fleet/drift", "viewer", _drift, "Drift of the fleet, told from that of single devices",
        reply=DriftReport, slow=True,
    ),
    Endpoint(
        "GET", "/fleet/view", "viewer", _views, "The devices' summaries added up, feature by feature",
        query=(
            Param("by", "text", "all, hour, day, device, group, release, hw, or the name of a label.", "all"),
            Param("hours", "hours", "Back from now.", 24.0, _YEAR_HOURS),
            Param("where", "text", "Only devices that this label query is true of.", ""),
            Param("sample", "number", "Of at most so many devices, always the same ones."),
        ),
        reply=list[FleetView], slow=True,
    ),
    Endpoint(
        "GET", "/fleet/freshness", "viewer", _freshness, "What a new base would bring, and cost to ship",
        reply=Freshness, slow=True,
    ),
    Endpoint(
        "GET", "/devices", "viewer", _devices, "Devices by name",
        query=(
            Param("group", "name", "Only devices of this group."),
            Param("where", "text", "Only devices that this label query is true of, such as site=berlin or @pilot.", ""),
            Param("after", "text", "Only names after this one: `next` of the page before.", ""),
            LIMIT,
        ),
        page=("devices", str), reply=DeviceRecord,
    ),
    Endpoint("GET", "/devices/{name}", "viewer", device_detail, "One device with its last report", reply=DeviceDetail),
    Endpoint(
        "GET", "/devices/{name}/reports", "viewer", _reports, "Reports of a device, newest first",
        query=(BEFORE, LIMIT), page=("reports", int), reply=ReportRecord,
    ),
    Endpoint("GET", "/groups", "viewer", _groups, "Groups that were ever told something", reply=list[GroupView]),
    Endpoint("GET", "/segments", "viewer", _segments, "Label queries that have a name", reply=list[SegmentDetail]),
    Endpoint(
        "GET", "/segments/{name}", "viewer", _segment, "A segment, how many devices are in it, and rollouts for it",
        reply=SegmentDetail,
    ),
    Endpoint(
        "GET", "/releases", "viewer", _releases, "Releases, newest first",
        query=(BEFORE, LIMIT), page=("releases", int), reply=ReleaseRecord,
    ),
    Endpoint(
        "GET", "/releases/{number}", "viewer", _release, "One release with its card and lineage", reply=ReleaseView
    ),
    Endpoint(
        "GET", "/candidates", "viewer", _candidates, "What was built here, and how it did against the release in use",
        query=(Param("before", "text", "Only those built before this digest: `next` of the page before."), LIMIT),
        page=("candidates", str), reply=CandidateRecord,
    ),
    Endpoint(
        "GET", "/candidates/{digest}", "viewer", _candidate, "One candidate by slices, with its lineage and card",
        reply=CandidateView,
    ),
    Endpoint(
        "GET", "/rollouts", "viewer", _rollouts, "Rollouts, newest first",
        query=(BEFORE, LIMIT), page=("rollouts", int), reply=RolloutRecord,
    ),
    Endpoint(
        "GET", "/rollouts/{number}", "viewer", _rollout, "One rollout with plan, gates, state and history",
        reply=RolloutRecord,
    ),
    Endpoint(
        "GET", "/events", "viewer", _events, "Events of devices, newest first",
        query=(
            Param("device", "name", "Only of this device."),
            Param("name", "text", "Only of this name, such as drift_alarm."),
            BEFORE,
            LIMIT,
        ),
        page=("events", int), reply=EventRecord,
    ),
    Endpoint(
        "GET", "/commands", "viewer", _commands, "Commands and their answers, newest first",
        query=(
            Param("device", "name", "Only of this device."),
            Param("before", "text", "Only those after this id: `next` of the page before."),
            LIMIT,
        ),
        page=("commands", str), reply=CommandRecord,
    ),
    Endpoint(
        "GET", "/alerts", "viewer", _alerts, "Alerts that people were or would be told of, newest first",
        query=(Param("status", "text", "Only with this status.", choices=get_args(AlertStatus)), BEFORE, LIMIT),
        page=("alerts", int), reply=Alert,
    ),
    Endpoint(
        "GET", "/alerts/{number}", "viewer", _alert, "One alert with what to do, and what became of its notices",
        reply=AlertDetail,
    ),
    Endpoint("GET", "/silences", "viewer", _silences, "Silences that last", reply=list[Silence]),
    Endpoint(
        "GET", "/audit", "viewer", _audit, "Who did what, newest first",
        query=(Param("actor", "text", "Only of this one."), BEFORE, LIMIT), page=("audit", int), reply=AuditRecord,
    ),
    Endpoint("GET", "/users", "releaser", _users, "Everybody who has or had a token", reply=list[UserRecord]),
)  # fmt: skip
