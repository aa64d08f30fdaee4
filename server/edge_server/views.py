"""What each page of the dashboard shows: reads the records, gives what its template names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args
from urllib.parse import urlencode

import msgspec
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from edge_server.alerts import Status as AlertStatus
from edge_server.api import candidate_view, release_view
from edge_server.api_orders import ORDERS, VERBS
from edge_server.charts import heat, timeline
from edge_server.endpoint import BEFORE, Call, Param
from edge_server.fleet_words import LOCAL
from edge_server.plan import Approval, Strategy
from edge_server.power import Power
from edge_server.records import DeviceRecord, Glance, Health, Role, RolloutRecord
from edge_server.rollout import awaits_approval
from edge_server.runbook import RUNBOOK
from edge_server.store_rollups import HOUR
from edge_server.users import may

HEALTH: tuple[Health, ...] = get_args(Health)
_WORST: tuple[Health, ...] = ("degraded", "drift", "offline")
_PAGE = 200
_FEW = 20
_REPORTS = 400
SAMPLE = 300
"""Devices whose summaries the charts of drift are made of: each takes a quarter of a millisecond for each hour."""
_DAY_S = 86_400.0
_ACCURACY_S = 14 * _DAY_S
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


@dataclasses.dataclass(frozen=True)
class View:
    """A page, or data that a page fetches.

    Attributes:
        path: Of the page.
        handle: Gives what the template names; of data, what is told as JSON.
        template: Its file; "" for data.
        query: Parameters.
        section: Entry of the navigation.
        live: Topics of `live.py` by which the page is out of date.
        role: The least that may see it.
        slow: It reads much: answered in a thread of its own.
    """

    path: str
    handle: Callable[[Call], Any]
    template: str = ""
    query: tuple[Param, ...] = ()
    section: str = ""
    live: str = ""
    role: Role = "viewer"
    slow: bool = False


def _overview(call: Call) -> dict[str, Any]:
    registry = call.registry
    glance = registry.glance()
    count = Counter(device.health for device in glance)
    worst = [device for word in _WORST for device in glance if device.health == word][:_FEW]
    return {
        "fleet": registry.fleet(),
        "health": [(word, count[word]) for word in HEALTH],
        "map": _map(glance),
        "alerts": registry.alerts.find(status="firing", limit=5),
        "rollouts": registry.rollouts(limit=5),
        "attention": registry.store.devices.named([device.name for device in worst]),
        "events": registry.events(limit=_FEW),
    }


def _map(glance: list[Glance]) -> dict[str, Any]:
    """Names by group, and one digit of health for each: small enough for ten thousand devices in a page."""
    groups: dict[str, list[Glance]] = {}
    for device in glance:
        groups.setdefault(device.group, []).append(device)
    return {
        "health": HEALTH,
        "groups": [
            {
                "name": name,
                "devices": [device.name for device in members],
                "health": "".join(str(HEALTH.index(device.health)) for device in members),
            }
            for name, members in groups.items()
        ],
    }


def _devices(call: Call) -> dict[str, Any]:
    query = call.query
    text, wanted = query["text"].lower(), {name: query[name] for name in ("group", "health", "release")}
    glance = call.registry.glance()
    having = set(call.registry.matching(query["where"])) if query["where"] else None
    found = sorted(
        device.name
        for device in glance
        if (having is None or device.name in having)
        and text in device.name.lower()
        and wanted["group"] in ("", device.group)
        and wanted["health"] in ("", device.health)
        and wanted["release"] in (None, device.release)
    )
    shown = [name for name in found if name > query["after"]]
    more = ""
    if len(shown) > _PAGE:
        kept = {name: value for name, value in query.items() if value}
        more = "/devices?" + urlencode({**kept, "after": shown[_PAGE - 1]})
    return {
        "query": query,
        "groups": sorted({device.group for device in glance}),
        "segments": _segment_names(call),
        "words": HEALTH,
        "count": len(found),
        "devices": call.registry.store.devices.named(shown[:_PAGE]),
        "more": more,
    }


def _segments(call: Call) -> dict[str, Any]:
    return {"segments": call.registry.segments.all()}


def _segment_names(call: Call) -> list[str]:
    """What fields for label queries propose."""
    return [segment.name for segment in call.registry.store.segments.all()]


def _device(call: Call) -> dict[str, Any]:
    registry, name = call.registry, call.name
    device: DeviceRecord = registry.device(name)
    now = registry.clock.now()
    before = call.query["before"]
    events = registry.events(device=name, before=before, limit=_PAGE + 1)
    reports = [(time, report) for _, time, report in reversed(registry.reports(name, limit=_REPORTS))]
    sums = registry.store.rollups.of_device(name, span=HOUR, since=now - _ACCURACY_S, until=now + _DAY_S)
    return {
        "device": device,
        "timeline": timeline(events, reports, sums),
        "events": events[:_PAGE],
        "more": events[_PAGE - 1].id if len(events) > _PAGE else None,
        "commands": registry.store.commands.find(device=name, limit=_FEW),
        "orders": ORDERS,
    }


def _drift(call: Call) -> dict[str, Any]:
    registry = call.registry
    cohorts = dict.fromkeys(("group", "release", "hw", *registry.settings.fleet.cohorts))
    return {
        "report": registry.insight.drift(),
        "advice": LOCAL,
        "query": call.query,
        "cohorts": list(cohorts),
        "segments": _segment_names(call),
        "sample": SAMPLE,
    }


def _drift_data(call: Call) -> dict[str, Any]:
    query, registry = call.query, call.registry
    since = registry.clock.now() - query["hours"] * 3600.0
    return heat(registry.insight.view(by=query["by"], since=since, where=query["where"], sample=SAMPLE))


def _freshness(call: Call) -> dict[str, Any]:
    return {"advice": call.registry.insight.freshness().advice}


def _rollouts(call: Call) -> dict[str, Any]:
    found = call.registry.rollouts(before=call.query["before"], limit=_PAGE + 1)
    return {"rollouts": found[:_PAGE], "more": found[_PAGE - 1].id if len(found) > _PAGE else None}


def _rollout(call: Call) -> dict[str, Any]:
    record = call.registry.rollout(call.number)
    facts = [
        (name.replace("_", " "), value if isinstance(value, str) else msgspec.json.encode(value).decode())
        for name, value in msgspec.to_builtins(record.plan).items()
        if value not in ("", None, [])
    ]
    verbs = [(verb, text) for verb, text in _possible(record) if may(call.caller.role, VERBS[verb])]
    return {"rollout": record, "plan_facts": facts, "verbs": verbs}


def _possible(record: RolloutRecord) -> list[tuple[str, str]]:
    """What can be done about a rollout now."""
    state, found = record.state, []
    if state.status not in ("queued", "running"):
        return []
    if awaits_approval(state, record.plan):
        found.append(("approve", f"Stage {state.stage + 1} waits for it."))
    if state.paused:
        found.append(("resume", "Go on where it was paused."))
    elif state.status == "running":
        found.append(("pause", "Tell no further device; gates still halt it."))
    return [*found, ("abort", "Withdraw the release: devices that run it go back to what they had.")]


def _releases(call: Call) -> dict[str, Any]:
    registry = call.registry
    found = registry.releases(before=call.query["before"], limit=_PAGE + 1)
    bases: dict[int | None, list[str]] = {}
    for group in registry.store.groups.all():
        bases.setdefault(group.base, []).append(group.name)
    signed = {record.release for record in found[:_PAGE] if registry.is_signed(record.release)}
    return {
        "releases": found[:_PAGE],
        "signed": signed.__contains__,
        "bases": bases,
        "more": found[_PAGE - 1].release if len(found) > _PAGE else None,
    }


def _release(call: Call) -> dict[str, Any]:
    return release(call)


def release(call: Call, *, given: dict[str, str] | None = None, power: Power | None = None) -> dict[str, Any]:
    """One release.

    Args:
        call: Names it.
        given: What was filled into the form that starts a rollout; None: it is as in the settings.
        power: What was calculated from that.
    """
    registry, usual = call.registry, call.registry.settings.rollout
    detail = release_view(registry, call.number)
    fields = {
        "group": "default", "strategy": usual.strategy, "approval": usual.approval, "where": usual.where,
        "stages": ", ".join(map(str, usual.stages)), "control_percent": str(usual.control_percent or ""),
        "effect": f"{100 * usual.effect:.6g}", "power": f"{100 * usual.power:.6g}",
    }  # fmt: skip
    return {
        "release": detail.release,
        "detail": detail,
        "groups": sorted({device.group for device in registry.glance()}),
        "segments": _segment_names(call),
        "choices": {"strategy": get_args(Strategy), "approval": get_args(Approval)},
        "fields": fields | (given or {}),
        "power": power,
        "candidate": registry.store.candidates.find(detail.release.digest),
        "card": _html_of(detail.card),
    }


def _html_of(card: str) -> Markup:
    # the renderer escapes what is HTML in it, and knows no link but to http, https and mailto
    return Markup(_MARKDOWN.renderer.render(_below(_MARKDOWN.parse(card)), _MARKDOWN.options, {}))  # noqa: S704


def _candidates(call: Call) -> dict[str, Any]:
    before = call.query["before"]
    found = call.registry.store.candidates.page(before=before, limit=_PAGE + 1)
    return {"candidates": found[:_PAGE], "more": found[_PAGE - 1].digest if len(found) > _PAGE else None}


def _candidate(call: Call) -> dict[str, Any]:
    candidate = candidate_view(call.registry, call.path["digest"])
    return {
        "candidate": candidate,
        "evaluation": candidate.report.get("evaluation", {}),
        "lineage": candidate.report.get("lineage", {}),
        "metrics": candidate.report.get("metrics", {}),
        "card": _html_of(candidate.card),
    }


def _below(tokens: list[Token]) -> list[Token]:
    """A text whose headings stand below that of its section: a page has one of the first level."""
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1:]) + 2)}"
    return tokens


def _alerts(call: Call) -> dict[str, Any]:
    status = call.query["status"]
    found = call.registry.alerts.find(status=status, before=call.query["before"], limit=_PAGE + 1)
    return {
        "status": status,
        "alerts": found[:_PAGE],
        "more": found[_PAGE - 1].id if len(found) > _PAGE else None,
        "silences": call.registry.alerts.silences(),
        "kinds": list(RUNBOOK),
    }


def _alert(call: Call) -> dict[str, Any]:
    detail = call.registry.alerts.show(call.number)
    return {"detail": detail, "alert": detail.alert}


def _audit(call: Call) -> dict[str, Any]:
    found = call.registry.store.audit.find(before=call.query["before"], limit=_PAGE + 1)
    return {"audit": found[:_PAGE], "more": found[_PAGE - 1].id if len(found) > _PAGE else None}


def users(call: Call) -> dict[str, Any]:
    """Everybody who has or had a token."""
    return {"users": call.registry.users.all(), "token": None}


class _Field(Param):
    """A parameter that comes from a form: what was left empty was left out."""

    def read(self, given: str | None) -> Any:
        """The value."""
        return super().read(given or None)


_GROUP = _Field("group", "name", "Of the devices.", "")
_WHERE = _Field("where", "text", "Label query.", "")
_HOURS = Param("hours", "number", "Back from now.", 24, 8784)
VIEWS = (
    View("/", _overview, "overview.html", section="/", live="devices rollouts alerts"),
    View(
        "/devices", _devices, "devices.html", section="/devices", live="devices",
        query=(
            _Field("text", "text", "Part of the name.", ""),
            _GROUP,
            _Field("health", "text", "Of the devices.", "", choices=HEALTH),
            _Field("release", "number", "That they run."),
            _WHERE,
            Param("after", "text", "Names after this one.", ""),
        ),
    ),
    View("/segments", _segments, "segments.html", (), "/devices"),
    View("/devices/{name}", _device, "device.html", (BEFORE,), "/devices", "devices"),
    View(
        "/drift", _drift, "drift.html", section="/drift",
        query=(Param("by", "text", "Cohorts.", "group"), _WHERE, _HOURS),
    ),
    View("/rollouts", _rollouts, "rollouts.html", (BEFORE,), "/rollouts", "rollouts"),
    View("/rollouts/{number}", _rollout, "rollout.html", (), "/rollouts", "rollouts"),
    View("/releases", _releases, "releases.html", (BEFORE,), "/releases"),
    View(
        "/candidates", _candidates, "candidates.html", section="/releases",
        query=(Param("before", "text", "Those built before this digest."),),
    ),
    View("/candidates/{digest}", _candidate, "candidate.html", (), "/releases"),
    View("/releases/{number}", _release, "release.html", (), "/releases"),
    View(
        "/alerts", _alerts, "alerts.html", section="/alerts", live="alerts",
        query=(Param("status", "text", "Of the alerts.", "firing", choices=get_args(AlertStatus)), BEFORE),
    ),
    View("/alerts/{number}", _alert, "alert.html", (), "/alerts", "alerts"),
    View("/audit", _audit, "audit.html", (BEFORE,), "/audit", "audit"),
    View("/users", users, "users.html", (), "/users", role="releaser"),
)  # fmt: skip
DATA = (
    View("/drift/data", _drift_data, query=(Param("by", "text", "Cohorts.", "hour"), _WHERE, _HOURS), slow=True),
    View("/drift/freshness", _freshness, slow=True),
)
