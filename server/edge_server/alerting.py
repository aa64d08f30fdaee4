"""Alerts over the records: looks, stores what changed with what has to be delivered, and does what people order."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import msgspec

from edge_sdk.clock import Clock
from edge_sdk.errors import ConfigError
from edge_server.alert_settings import AlertSettings
from edge_server.alert_sources import Now, Sources
from edge_server.alerts import SEVERITIES, Alert, Notice, Silence, Status, advance
from edge_server.errors import UnknownAlertError
from edge_server.runbook import RULES, RUNBOOK
from edge_server.store import Store
from edge_server.store_alerts import Delivery

_DAY_S = 86_400.0
_LONGEST_SILENCE_S = 366 * _DAY_S


class AlertDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An alert with its run-book text and what became of its notices."""

    alert: Alert
    title: str
    meaning: str
    todo: tuple[str, ...]
    deliveries: list[Delivery]


class Alerting:
    """The coordinator's alerts. To be used by one thread at a time.

    Args:
        sources: Where conditions come from.
        store: The records.
        settings: See `AlertSettings`.
        clock: Where the time comes from.
    """

    def __init__(self, sources: Sources, *, store: Store, settings: AlertSettings, clock: Clock) -> None:
        self._sources, self._store, self._settings, self._clock = sources, store, settings, clock

    def look(self, known: Now | None = None) -> list[Notice]:
        """One look at everything; what has to be delivered is stored with what it tells of.

        Args:
            known: What only the running coordinator knows.

        Raises:
            StoreError: Nothing changed; the next look sees the same.
        """
        now, store = self._clock.now(), self._store.alerts
        conditions = self._sources.conditions(now, known or Now())
        with self._store.transaction():
            changed, notices = advance(
                store.open(resolved_after=now - _DAY_S), conditions, store.silences(after=now), RULES, now
            )
            numbers = {alert.key: store.save(alert).id for alert in changed}
            notices = [
                msgspec.structs.replace(n, alert=msgspec.structs.replace(n.alert, id=numbers[n.alert.key]))
                for n in notices
            ]
            for notice in notices:
                self._enqueue(notice, now)
            if changed:
                store.forget(before=now - self._settings.keep_days * _DAY_S)
        return notices

    def _enqueue(self, notice: Notice, now: float) -> None:
        severity = SEVERITIES.index(notice.alert.severity)
        for name, sink in self._settings.sinks.items():
            if severity >= SEVERITIES.index(sink.min_severity):
                self._store.alerts.enqueue(alert=notice.alert.id, sink=name, body=as_text(notice, now), now=now)

    # ---- looking

    def find(self, *, status: Status | None = None, before: int | None = None, limit: int = 100) -> list[Alert]:
        """Alerts with a number below `before`, newest first."""
        return self._store.alerts.find(status=status, before=before, limit=limit)

    def show(self, number: int) -> AlertDetail:
        """One alert, with what to do about it.

        Raises:
            UnknownAlertError: There is none of that number.
        """
        found = self._store.alerts.find(number=number)
        if not found:
            raise UnknownAlertError(f"there is no alert {number}: edge-coordinator alerts list")
        entry = RUNBOOK[found[0].kind]
        return AlertDetail(
            alert=found[0],
            title=entry.title,
            meaning=entry.meaning,
            todo=entry.todo,
            deliveries=self._store.alerts.deliveries(number),
        )

    def silences(self) -> list[Silence]:
        """Those that last."""
        return self._store.alerts.silences(after=self._clock.now())

    # ---- ordering

    def silence(
        self,
        *,
        kind: str = "*",
        cause: str = "*",
        device: str = "*",
        for_s: float,
        reason: str,
        actor: str = "library",
    ) -> int:
        """Keep people from being told; returns the silence's number.

        Args:
            kind: Pattern with * and ?, as the next two.
            cause: Of alerts.
            device: "*": whole alerts; else only these devices are left out of them.
            for_s: Seconds from now, a year at most.
            reason: Why: kept.
            actor: Who: kept.

        Raises:
            ConfigError: It has no end, no reason, or matches no kind that there is.
        """
        if not 0 < for_s <= _LONGEST_SILENCE_S:
            raise ConfigError(f"a silence lasts above 0 s and up to a year, got {for_s:g} s")
        if not reason.strip():
            raise ConfigError("a silence needs a reason: others will ask why they were not told")
        if not any(fnmatchcase(known, kind) for known in RUNBOOK):
            raise ConfigError(f"no kind of alert is like {kind!r}; there are {', '.join(RUNBOOK)}")
        now = self._clock.now()
        silence = Silence(
            id=0, kind=kind, cause=cause, device=device, until=now + for_s, actor=actor, reason=reason, created=now
        )
        with self._store.transaction():
            number = self._store.alerts.add_silence(silence)
            detail = {
                "silence": number,
                "kind": kind,
                "cause": cause,
                "device": device,
                "for_s": for_s,
                "reason": reason,
            }
            self._store.audit.add(now, actor, "alerts silenced", detail)
        return number

    def end_silence(self, number: int, *, actor: str = "library") -> None:
        """Let people be told again.

        Raises:
            UnknownAlertError: No silence of that number lasts.
        """
        now = self._clock.now()
        with self._store.transaction():
            if not self._store.alerts.end_silence(number, now=now):
                raise UnknownAlertError(f"no silence {number} lasts")
            self._store.audit.add(now, actor, "silence ended", {"silence": number})

    def resolve(self, number: int, *, actor: str = "library", reason: str = "") -> None:
        """Be done with an alert: it stays quiet until its condition has gone and comes anew.

        Raises:
            UnknownAlertError: There is none of that number.
        """
        now = self._clock.now()
        with self._store.transaction():
            alert = self.show(number).alert
            if alert.status == "firing":
                self._store.alerts.save(msgspec.structs.replace(alert, closed_by=actor))
            self._store.audit.add(now, actor, "alert resolved", {"alert": number, "reason": reason})


def as_text(notice: Notice, now: float) -> str:
    """What sinks are given, as JSON: the alert with its run-book text."""
    entry = RUNBOOK[notice.alert.kind]
    told: dict[str, Any] = {
        "reason": notice.reason,
        "time": now,
        "title": entry.title,
        "meaning": entry.meaning,
        "todo": entry.todo,
        "alert": msgspec.to_builtins(notice.alert),
    }
    return msgspec.json.encode(told).decode()
