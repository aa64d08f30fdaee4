"""What one turn brought, written as it came: the hot path."""

from __future__ import annotations

from collections.abc import Collection

from edge_sdk.database import Database
from edge_sdk.messages import Report
from edge_server.ingest import WILL, EventRow, RejectedRow, ReportRow, Turn
from edge_server.rows import to_json

_MAX_UNKNOWN = 1000
_MAX_SUMMARIES = 31 * 24
"""So many of a device are kept: of 8 kB each, usually one an hour."""
_OUTCOMES = ("done", "failed", "expired", "interrupted")


class IngestStore:
    """Everything that comes from devices goes in here."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def known(self, devices: Collection[str]) -> set[str]:
        """Those of `devices` that are registered."""
        rows = self._db.read(
            "SELECT name FROM devices WHERE name IN (SELECT value FROM json_each(?))", to_json(devices)
        )
        return {row[0] for row in rows}

    def revoked(self, devices: Collection[str]) -> set[str]:
        """Those of `devices` that were revoked."""
        rows = self._db.read(
            "SELECT name FROM devices WHERE revoked IS NOT NULL AND name IN (SELECT value FROM json_each(?))",
            to_json(devices),
        )
        return {row[0] for row in rows}

    def positions(self, devices: Collection[str]) -> dict[tuple[str, str], int]:
        """Last committed sequence number by (device, store id)."""
        rows = self._db.read(
            "SELECT device, store_id, last_seq FROM positions WHERE device IN (SELECT value FROM json_each(?))",
            to_json(devices),
        )
        return {(row[0], row[1]): row[2] for row in rows}

    def write(self, turn: Turn) -> None:
        """Store all that one turn brought. Belongs inside a transaction."""
        now, many = turn.now, self._db.execute_many
        many(
            "INSERT OR IGNORE INTO devices (name, group_name, registered) VALUES (?, 'default', ?)",
            [(device, now) for device in turn.joined],
        )
        many(
            "INSERT INTO reports (device, store_id, seq, time, received, start, release, head, predictions,"
            " errors, labelled, correct, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (*_identity(row), now, r.start, r.release, r.head, *_counts(r), row.body)
                for row in turn.reports
                for r in [row.report]
            ],
        )
        many(
            "INSERT INTO events (device, store_id, seq, time, received, name, release, head, subject, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (*_identity(row), now, e.name, e.release, e.head, row.subject, to_json(e.detail))
                for row in turn.events
                for e in [row.event]
            ],
        )
        self._write_summaries(turn)
        self._write_answers(turn)
        many(
            "INSERT INTO rejected (device, store_id, seq, time, received, kind, reason, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(*_identity(row), now, row.kind, row.reason, row.body) for row in turn.rejected],
        )
        many(
            "INSERT INTO gaps (device, store_id, first, last, source, received) VALUES (?, ?, ?, ?, ?, ?)",
            [(gap.device, gap.store_id, gap.first, gap.last, gap.source, now) for gap in turn.gaps],
        )
        many(
            "INSERT INTO positions (device, store_id, last_seq) VALUES (?, ?, ?)"
            " ON CONFLICT (device, store_id) DO UPDATE SET last_seq = excluded.last_seq",
            [(device, store_id, seq) for (device, store_id), seq in turn.positions.items()],
        )
        self._write_devices(turn)
        many(
            "INSERT INTO counters (name, value) VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            list(turn.counters.items()),
        )
        if turn.unknown:
            many(
                "INSERT INTO unknown (device, messages, last_seen) VALUES (?, ?, ?) ON CONFLICT (device)"
                " DO UPDATE SET messages = messages + excluded.messages, last_seen = excluded.last_seen",
                [(device, count, now) for device, count in turn.unknown.items()],
            )
            # whoever can reach the broker can invent names
            many(
                "DELETE FROM unknown WHERE device NOT IN (SELECT device FROM unknown ORDER BY last_seen DESC LIMIT ?)",
                [(_MAX_UNKNOWN,)],
            )

    def _write_answers(self, turn: Turn) -> None:
        answers = [
            (*(str(row.event.detail.get(key, "")) for key in ("outcome", "reason", "result", "id")), row.device)
            for row in turn.events
            if row.event.name == "command_done"
        ]
        self._db.execute_many(
            "UPDATE commands SET outcome = ?, reason = ?, result = ?, answered = ? WHERE id = ? AND device = ?"
            " AND outcome IN ('waiting', 'unanswered')",
            [
                (outcome if outcome in _OUTCOMES else "failed", reason, result, turn.now, number, device)
                for outcome, reason, result, number, device in answers
            ],
        )
        self._db.execute_many(
            "UPDATE certificates SET in_use = 1 WHERE command = ? AND device = ?",
            [(number, device) for outcome, _, _, number, device in answers if outcome == "done"],
        )

    def _write_summaries(self, turn: Turn) -> None:
        self._db.execute_many(
            "INSERT OR REPLACE INTO summaries (device, hour, start, time, received, release, head, reference, rows,"
            " body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (row.device, row.hour, s.start, row.time, turn.now, s.release, s.head, s.reference, s.rows, row.body)
                for row in turn.summaries
                for s in [row.summary]
            ],
        )
        self._db.execute_many(
            # by rank of arrival: a device whose clock was once far ahead keeps what it tells now
            "DELETE FROM summaries WHERE device = ?1 AND rowid NOT IN (SELECT rowid FROM summaries WHERE device = ?1"
            " ORDER BY received DESC, hour DESC, start DESC LIMIT ?2)",
            [(device, _MAX_SUMMARIES) for device in {row.device for row in turn.summaries}],
        )

    def _write_devices(self, turn: Turn) -> None:
        many = self._db.execute_many
        many(
            "UPDATE devices SET row_release = ?, row_head = ?, row_time = max(coalesce(row_time, 0), ?),"
            " store_id = ? WHERE name = ?",
            [
                (body.release, body.head, row.time, row.store_id, device)
                for device, row in turn.latest.items()
                for body in [row.report if isinstance(row, ReportRow) else row.event]
            ],
        )
        many(
            "UPDATE devices SET predictions = ?, errors = ?, alarms = ?, warnings = ?, mode = ? WHERE name = ?",
            [
                (
                    row.report.predictions,
                    row.report.errors,
                    sum(monitor.alarm for monitor in row.report.monitors),
                    sum(monitor.warning for monitor in row.report.monitors),
                    row.report.mode,
                    row.device,
                )
                for row in turn.reports
            ],
        )
        many(
            "UPDATE devices SET labelled = ?, correct = ? WHERE name = ?",
            [(row.report.labelled, row.report.correct, row.device) for row in turn.reports if row.report.labelled],
        )
        many(
            # the group of an enrolled device is what the person said who added it
            "UPDATE devices SET online = ?, reason = ?, boot = ?, digest = ?, mode = ?, sdk = ?,"
            " state_release = ?, state_head = ?, last_seen = max(coalesce(last_seen, 0), min(?, ?)),"
            " group_name = CASE WHEN credential IS NULL THEN ? ELSE group_name END WHERE name = ?",
            [
                (
                    s.online,
                    s.reason,
                    s.boot,
                    s.digest,
                    s.mode,
                    s.sdk,
                    s.release,
                    s.head,
                    s.time,
                    turn.now,
                    s.group,
                    name,
                )
                for name, s in turn.states.items()
                if s.reason != WILL
            ],
        )
        many(
            # written when the device connected, and maybe no longer true but in this
            "UPDATE devices SET online = ?, reason = ?, last_seen = coalesce(last_seen, min(?, ?)) WHERE name = ?",
            [(s.online, s.reason, s.time, turn.now, name) for name, s in turn.states.items() if s.reason == WILL],
        )
        many("UPDATE devices SET last_seen = ? WHERE name = ?", [(turn.now, device) for device in turn.seen])


def _identity(row: ReportRow | EventRow | RejectedRow) -> tuple[str, str, int, float]:
    return row.device, row.store_id, row.seq, row.time


def _counts(report: Report) -> tuple[int, int, int, int]:
    return report.predictions, report.errors, report.labelled, report.correct
