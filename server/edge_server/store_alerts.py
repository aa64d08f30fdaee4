"""Alerts, silences, what has to be delivered of them, and what the conditions are read from."""

from __future__ import annotations

import msgspec

from edge_sdk.database import Database
from edge_server.alerts import Alert, Silence
from edge_server.rows import from_row, to_json

_ALERT = "id, body"
_SILENCE = "id, kind, cause, device, until, actor, reason, created"


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A notice for one sink: stored with the alert it tells of, and before it is sent."""

    id: int
    alert: int
    sink: str
    body: str
    created: float
    """Seconds since the epoch, as all times here."""
    attempts: int
    next_at: float
    done: float | None = None
    error: str = ""
    """Why the last attempt failed."""


class DeviceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event, with the group of its device."""

    device: str
    group: str
    name: str
    subject: int | None
    """The release that it is about."""


class AlertStore:
    """Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # ---- alerts

    def open(self, *, resolved_after: float) -> list[Alert]:
        """All that are not resolved, and those that were after that time."""
        rows = self._db.read(
            f"SELECT {_ALERT} FROM alerts WHERE status IN ('pending', 'firing')"  # noqa: S608 - a constant
            " OR (status = 'resolved' AND resolved > ?) ORDER BY id",
            resolved_after,
        )
        return [_alert(row) for row in rows]

    def find(
        self, *, number: int | None = None, status: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[Alert]:
        """Alerts below `before` that people were or would be told of, or the one of that number; newest first."""
        rows = self._db.read(
            f"SELECT {_ALERT} FROM alerts WHERE (?1 IS NULL OR id = ?1) AND (?2 IS NULL OR status = ?2)"  # noqa: S608
            " AND (?1 IS NOT NULL OR raised IS NOT NULL) AND (?3 IS NULL OR id < ?3) ORDER BY id DESC LIMIT ?4",
            number,
            status,
            before,
            limit,
        )
        return [_alert(row) for row in rows]

    def save(self, alert: Alert) -> Alert:
        """Store an alert; one without a number gets one."""
        cursor = self._db.execute(
            "INSERT OR REPLACE INTO alerts (id, kind, cause, severity, status, since, raised, resolved, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(alert.id or None, alert.kind, alert.cause, alert.severity, alert.status),
                *(alert.since, alert.raised, alert.resolved, to_json(alert)),
            ),
        )
        return msgspec.structs.replace(alert, id=alert.id or cursor.lastrowid or 0)

    def forget(self, *, before: float) -> None:
        """Drop alerts that were resolved before that time, and deliveries that were done by then."""
        self._db.execute("DELETE FROM alerts WHERE status = 'resolved' AND resolved < ?", (before,))
        self._db.execute("DELETE FROM deliveries WHERE done < ?", (before,))
        self._db.execute("DELETE FROM silences WHERE until < ?", (before,))

    # ---- silences

    def silences(self, *, after: float) -> list[Silence]:
        """Those that last beyond that time."""
        rows = self._db.read(f"SELECT {_SILENCE} FROM silences WHERE until > ? ORDER BY id", after)  # noqa: S608
        return [from_row(Silence, row) for row in rows]

    def add_silence(self, silence: Silence) -> int:
        """Store a silence; returns its number."""
        cursor = self._db.execute(
            "INSERT INTO silences (kind, cause, device, until, actor, reason, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (silence.kind, silence.cause, silence.device, silence.until, silence.actor, silence.reason,
             silence.created),
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def end_silence(self, number: int, *, now: float) -> bool:
        """End a silence; False if there is none that lasts."""
        return (
            self._db.execute("UPDATE silences SET until = ?1 WHERE id = ?2 AND until > ?1", (now, number)).rowcount > 0
        )

    # ---- deliveries

    def enqueue(self, *, alert: int, sink: str, body: str, now: float) -> None:
        """Have a notice delivered."""
        self._db.execute(
            "INSERT INTO deliveries (alert, sink, body, created, next_at) VALUES (?, ?, ?, ?, ?)",
            (alert, sink, body, now, now),
        )

    def waiting(self, sink: str, *, limit: int) -> list[Delivery]:
        """What was not delivered yet, oldest first."""
        rows = self._db.read(
            "SELECT id, alert, sink, body, created, attempts, next_at, done, error FROM deliveries"
            " WHERE done IS NULL AND sink = ? ORDER BY id LIMIT ?",
            sink,
            limit,
        )
        return [_delivery(row) for row in rows]

    def deliveries(self, alert: int) -> list[Delivery]:
        """Of one alert, oldest first."""
        rows = self._db.read(
            "SELECT id, alert, sink, body, created, attempts, next_at, done, error FROM deliveries WHERE alert = ?"
            " ORDER BY id",
            alert,
        )
        return [_delivery(row) for row in rows]

    def attempted(self, number: int, *, next_at: float, error: str) -> None:
        """An attempt failed, or has not been confirmed yet."""
        self._db.execute(
            "UPDATE deliveries SET attempts = attempts + 1, next_at = ?, error = ? WHERE id = ? AND done IS NULL",
            (next_at, error, number),
        )

    def done(self, number: int, *, now: float, error: str = "") -> None:
        """It was delivered, or is given up."""
        self._db.execute(
            "UPDATE deliveries SET done = ?, error = ? WHERE id = ? AND done IS NULL", (now, error, number)
        )

    # ---- what conditions are read from

    def offline(self, *, before: float) -> list[tuple[str, str]]:
        """(group, device) of those that were last heard of before that time."""
        rows = self._db.read(
            "SELECT group_name, name FROM devices WHERE revoked IS NULL AND last_seen < ? ORDER BY group_name, name",
            before,
        )
        return [(row[0], row[1]) for row in rows]

    def scored(self) -> list[tuple[str, str, int, int]]:
        """(group, device, right, labelled) of the last report with labels of every device."""
        rows = self._db.read(
            "SELECT group_name, name, correct, labelled FROM devices WHERE revoked IS NULL AND labelled > 0"
            " ORDER BY group_name, name"
        )
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    def events(self, names: tuple[str, ...], *, since: float) -> list[DeviceEvent]:
        """Events of these names that came from then on, in the order in which they came."""
        rows = self._db.read(
            "SELECT e.device, d.group_name, e.name, e.subject FROM events e JOIN devices d ON d.name = e.device"
            " WHERE d.revoked IS NULL AND e.name IN (SELECT value FROM json_each(?)) AND e.received >= ? ORDER BY e.id",
            to_json(names),
            since,
        )
        return [DeviceEvent(device=row[0], group=row[1], name=row[2], subject=row[3]) for row in rows]

    def gaps(self, *, since: float) -> list[tuple[str, str, int]]:
        """(group, device, rows lost) of gaps that came from then on."""
        rows = self._db.read(
            "SELECT d.group_name, g.device, sum(g.last - g.first + 1) FROM gaps g JOIN devices d ON d.name = g.device"
            " WHERE d.revoked IS NULL AND g.received >= ? GROUP BY g.device ORDER BY d.group_name, g.device",
            since,
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def last_reports(self, *, since: float) -> list[tuple[str, str, float, bytes]]:
        """(group, device, seconds by which its clock was ahead, body) of the last report of each device heard of since.

        A report that took long to come makes a clock look behind, never ahead.
        """
        rows = self._db.read(
            "SELECT d.group_name, d.name, r.time - r.received, r.body FROM devices d JOIN reports r ON r.id ="
            " (SELECT max(id) FROM reports WHERE device = d.name) WHERE d.revoked IS NULL AND d.last_seen >= ?"
            " ORDER BY d.group_name, d.name",
            since,
        )
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    def groups_of(self, devices: list[str]) -> dict[str, str]:
        """Group by device."""
        rows = self._db.read(
            "SELECT name, group_name FROM devices WHERE name IN (SELECT value FROM json_each(?))", to_json(devices)
        )
        return {row[0]: row[1] for row in rows}


def _alert(row: tuple[int, str]) -> Alert:
    return msgspec.structs.replace(msgspec.json.decode(row[1], type=Alert), id=row[0])


def _delivery(row: tuple[object, ...]) -> Delivery:
    return msgspec.convert(dict(zip(Delivery.__struct_fields__, row, strict=True)), Delivery)
