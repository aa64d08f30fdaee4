"""What one turn brought, written as it came: the hot path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edge_sdk.database import Database
from edge_server.ingest import WILL, EventRow, RejectedRow, ReportRow, Turn
from edge_server.rows import to_json

INSERT_REPORT = (
    "INSERT INTO reports (device, store_id, seq, time, received, start, release, head, mode, predictions, errors,"
    " labelled, correct, alarms, warnings, p50_ms, p99_ms, body)"
)
"""A `ReportRow`."""
_MAX_UNKNOWN = 1000
_HOUR_S = 3600
_MAX_SUMMARIES = 31 * 24
"""So many of a device are kept as they came, though it tells of more than one an hour: of 8 kB each."""
_SEEN = (
    "UPDATE devices SET last_seen = said.column1, row_release = coalesce(said.column2, row_release),"
    " row_head = coalesce(said.column3, row_head), row_time = CASE WHEN said.column4 IS NULL THEN row_time"
    " ELSE max(coalesce(row_time, 0), said.column4) END, store_id = coalesce(said.column5, store_id),"
    " predictions = coalesce(said.column6, predictions), errors = coalesce(said.column7, errors),"
    " alarms = coalesce(said.column8, alarms), warnings = coalesce(said.column9, warnings),"
    " mode = coalesce(said.column10, mode), labelled = coalesce(said.column11, labelled),"
    " correct = coalesce(said.column12, correct), disk_free_mb = coalesce(said.column13, disk_free_mb),"
    " memory_free_mb = coalesce(said.column14, memory_free_mb),"
    " memory_total_mb = coalesce(said.column15, memory_total_mb) FROM (VALUES ?) AS said WHERE name = said.column16"
)
"""All that a row may change of its device: each further statement costs as much as the row."""
_OUTCOMES = ("done", "failed", "expired", "interrupted")


class Known:
    """What the next turn is judged by.

    Attributes:
        devices: Names of registered ones.
        revoked: Those of all that are turned away.
        positions: Last committed sequence number by (device, store id), of `devices`.
    """

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.revoked: set[str] = set()
        self.positions: dict[tuple[str, str], int] = {}


class IngestStore:
    """Everything that comes from devices goes in here."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._version = -1
        self._loaded = Known()

    def load(self, devices: Iterable[str]) -> Known:
        """What is known of these devices, at least. Belongs inside the transaction that writes the turn.

        Rows of this connection change nothing here that `committed` is not told; those of others empty it.
        """
        version = self._db.read("PRAGMA data_version")[0][0]
        if version != self._version:
            self._version, self._loaded = version, Known()
        loaded = self._loaded
        if missing := set(devices) - loaded.devices:
            names = to_json(missing)
            loaded.devices.update(
                row[0]
                for row in self._db.read(
                    "SELECT name FROM devices WHERE name IN (SELECT value FROM json_each(?))", names
                )
            )
            rows = self._db.read(
                "SELECT device, store_id, last_seq FROM positions WHERE device IN (SELECT value FROM json_each(?))",
                names,
            )
            loaded.positions.update(((row[0], row[1]), row[2]) for row in rows)
        loaded.revoked = {row[0] for row in self._db.read("SELECT name FROM devices WHERE revoked IS NOT NULL")}
        return loaded

    def committed(self, turn: Turn) -> None:
        """What `write` wrote is in the database from now on."""
        self._loaded.devices |= turn.joined
        self._loaded.positions |= turn.positions

    def write(self, turn: Turn) -> None:
        """Store all that one turn brought. Belongs inside a transaction."""
        now, many = turn.now, self._db.execute_many
        many(
            "INSERT OR IGNORE INTO devices (name, group_name, registered) VALUES (?, 'default', ?)",
            [(device, now) for device in turn.joined],
        )
        self.write_reports(turn.reports)
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
        self._db.execute_rows(
            "INSERT INTO positions (device, store_id, last_seq) VALUES ?"
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

    def write_reports(self, rows: Sequence[ReportRow]) -> None:
        """Nearly all that comes. Belongs inside a transaction."""
        self._db.execute_rows(f"{INSERT_REPORT} VALUES ?", rows)

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
            "DELETE FROM summaries WHERE device = ?1 AND span = ?2 AND rowid NOT IN (SELECT rowid FROM summaries"
            " WHERE device = ?1 AND span = ?2 ORDER BY received DESC, hour DESC, start DESC LIMIT ?3)",
            [(device, _HOUR_S, _MAX_SUMMARIES) for device in {row.device for row in turn.summaries}],
        )

    def _write_devices(self, turn: Turn) -> None:
        many = self._db.execute_many
        self._db.execute_rows(_SEEN, [(turn.now, *last, device) for device, last in _last_words(turn).items()])
        many(
            # the group of an enrolled device is what the person said who added it
            "UPDATE devices SET online = ?, reason = ?, boot = ?, digest = ?, mode = ?, sdk = ?, hardware = ?,"
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
                    s.hardware,
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


def _identity(row: EventRow | RejectedRow) -> tuple[str, str, int, float]:
    return row.device, row.store_id, row.seq, row.time


def _last_words(turn: Turn) -> dict[str, list[Any]]:
    """What each device that sent something said last, in the order of `_SEEN`; None where it said nothing."""
    words: dict[str, list[Any]] = {device: [None] * 14 for device in turn.seen}
    for device, row in turn.latest.items():
        body = row if isinstance(row, ReportRow) else row.event
        words[device][:4] = body.release, body.head, row.time, row.store_id
    for device, report in {row.device: row for row in turn.reports}.items():
        words[device][4:9] = report.predictions, report.errors, report.alarms, report.warnings, report.mode
    for device, report in {row.device: row for row in turn.reports if row.labelled}.items():
        words[device][9:11] = report.labelled, report.correct
    for device, machine in turn.machines.items():
        words[device][11:] = machine
    return words
