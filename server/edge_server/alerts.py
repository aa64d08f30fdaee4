"""When a person is told of something, and when that is over. Pure: conditions in, alerts and notices out.

A condition is what holds now: a kind, a cause, and the devices that it concerns; many devices with one cause are one
condition and so one alert. An alert is raised when its condition held in some successive looks, and resolved when it
did not in more of them; one that comes back within a day needs twice as many each time, so that what flaps is told of
ever more rarely. A silence keeps notices back, not alerts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Severity = Literal["info", "warning", "critical"]
Status = Literal["pending", "firing", "resolved"]
Reason = Literal["raised", "worse", "more", "resolved"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
MAX_MEMBERS = 50
"""So many devices are named; all are counted."""
_FLAP_S = 86_400.0
_MOST_DOUBLINGS = 8
_MORE = 2
_FEW = 5


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """How soon an alert of a kind is raised and resolved."""

    raise_after: Annotated[int, Meta(ge=1)] = 2
    """Successive looks."""
    resolve_after: Annotated[int, Meta(ge=1)] = 5


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """Something that holds now."""

    kind: str
    cause: str
    """What those concerned have in common: with the kind it names the alert."""
    severity: Severity
    words: str
    """What holds, with its numbers."""
    members: tuple[str, ...] = ()
    """Devices concerned, all of them; none where it is the coordinator."""


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """Who is not to be told of what, until when, by whom and why. Patterns with * and ?."""

    id: int
    kind: str
    cause: str
    device: str
    """"*": alerts as a whole; else only these devices are left out of them."""
    until: float
    """Seconds since the epoch."""
    actor: str
    reason: str
    created: float


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """A condition over time."""

    id: int
    """0: not stored yet."""
    kind: str
    cause: str
    severity: Severity
    status: Status
    words: str
    members: tuple[str, ...]
    count: int
    """Devices concerned."""
    since: float
    """When the condition was first seen, seconds since the epoch; so all times."""
    raised: float | None = None
    resolved: float | None = None
    held: int = 0
    """Successive looks in which the condition held."""
    gone: int = 0
    """Successive looks in which it did not."""
    flaps: int = 0
    """How often it came back within a day."""
    told: Severity | None = None
    """Severity that people were last told of; None: they were not, or of its end."""
    told_count: int = 0
    silence: int | None = None
    """Number of the silence that keeps it quiet."""
    closed_by: str = ""
    """Who said that it is done with: it stays quiet until its condition has gone."""

    @property
    def key(self) -> tuple[str, str]:
        """What names it."""
        return self.kind, self.cause


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What people are to be told."""

    reason: Reason
    alert: Alert


def advance(
    alerts: Iterable[Alert],
    conditions: Iterable[Condition],
    silences: Sequence[Silence],
    rules: Mapping[str, Rule],
    now: float,
) -> tuple[list[Alert], list[Notice]]:
    """One look.

    Args:
        alerts: All that are not resolved, and those that were within the last day.
        conditions: All that hold, each kind and cause once.
        silences: All; those that are over do nothing.
        rules: By kind; the defaults for others.
        now: Seconds since the epoch.

    Returns:
        The alerts that changed or are new, and the notices.
    """
    before = {alert.key: alert for alert in sorted(alerts, key=lambda alert: alert.id)}
    active = [silence for silence in silences if silence.until > now]
    holding = {(condition.kind, condition.cause): _heard(condition, active) for condition in conditions}
    after, notices = [], []
    for key in sorted(before.keys() | holding.keys()):
        known, rule = before.get(key), rules.get(key[0], Rule())
        changed = _held(known, *holding[key], rule, now) if key in holding else _gone(before[key], rule, now)
        changed, notice = _told(changed)
        if notice is not None:
            notices.append(notice)
        if changed != known:
            after.append(changed)
    return after, notices


def _heard(condition: Condition, silences: Sequence[Silence]) -> tuple[Condition, int | None]:
    """The condition without devices that are silenced, and the silence that keeps all of it quiet."""
    left, last = condition.members, None
    for silence in silences:
        if not (fnmatchcase(condition.kind, silence.kind) and fnmatchcase(condition.cause, silence.cause)):
            continue
        if silence.device == "*":
            return condition, silence.id
        kept = tuple(member for member in left if not fnmatchcase(member, silence.device))
        if len(kept) < len(left):
            left, last = kept, silence.id
    if condition.members and not left:
        return condition, last
    return msgspec.structs.replace(condition, members=left), None


def _held(known: Alert | None, condition: Condition, silence: int | None, rule: Rule, now: float) -> Alert:
    held = Alert(
        id=0,
        kind=condition.kind,
        cause=condition.cause,
        severity=condition.severity,
        status="pending",
        words=condition.words,
        members=condition.members[:MAX_MEMBERS],
        count=len(condition.members),
        since=now,
        silence=silence,
        # counting ends where it no longer matters, so that what goes on is not written anew at each look
        held=1,
    )
    if known is not None and known.status != "resolved":
        held = msgspec.structs.replace(
            held, id=known.id, status=known.status, since=known.since, raised=known.raised, flaps=known.flaps,
            held=min(known.held + 1, rule.raise_after), told=known.told, told_count=known.told_count,
            closed_by=known.closed_by,
        )  # fmt: skip
    elif known is not None and now - (known.resolved or 0.0) < _FLAP_S:
        # it comes back: the same alert, which is slower to be resolved each time that people had been told of it
        held = msgspec.structs.replace(held, id=known.id, flaps=known.flaps + (known.raised is not None))
    if held.status == "pending" and held.held >= rule.raise_after:
        held = msgspec.structs.replace(held, status="firing", raised=now)
    return held


def _gone(known: Alert, rule: Rule, now: float) -> Alert:
    if known.status == "resolved":
        return known
    if known.status == "pending":
        # nobody was told: as if it had never been
        return msgspec.structs.replace(known, status="resolved", resolved=now, held=0)
    gone = known.gone + 1
    if gone < rule.resolve_after * 2 ** min(known.flaps, _MOST_DOUBLINGS):
        return msgspec.structs.replace(known, gone=gone, held=0)
    return msgspec.structs.replace(known, status="resolved", resolved=now, gone=0, held=0, silence=None)


def _told(alert: Alert) -> tuple[Alert, Notice | None]:
    """What people are told of it now, if anything."""
    if alert.status == "pending" or alert.silence is not None or alert.closed_by:
        return alert, None
    if alert.status == "resolved":
        if alert.told is None:
            return alert, None
        alert = msgspec.structs.replace(alert, told=None, told_count=0)
        return alert, Notice(reason="resolved", alert=alert)
    reason: Reason
    if alert.told is None:
        reason = "raised"
    elif SEVERITIES.index(alert.severity) > SEVERITIES.index(alert.told):
        reason = "worse"
    elif alert.count >= _MORE * alert.told_count + _FEW:
        reason = "more"
    else:
        return alert, None
    alert = msgspec.structs.replace(alert, told=alert.severity, told_count=alert.count)
    return alert, Notice(reason=reason, alert=alert)
