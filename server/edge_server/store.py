"""The coordinator's database: the only place with SQL. SQLite in WAL mode.

Other processes (the command line) may write to the same file at any time, so nothing is cached: every
decision reads what it needs inside the transaction that writes its outcome.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_sdk.database import Database
from edge_sdk.messages import Report, Summary, unpack
from edge_server.ingest import WILL, EventRow, RejectedRow, ReportRow, Turn
from edge_server.records import (
    CertificateRecord,
    CommandRecord,
    DeviceRecord,
    EventRecord,
    FleetRecord,
    GroupRecord,
    ReleaseRecord,
    RolloutRecord,
)
from edge_server.rollout import DeviceMetrics, RolloutPlan, RolloutState
from edge_server.schema import STEPS

_MAX_UNKNOWN = 1000
_SUMMARY_HOURS = 31 * 24
"""So many hours of a device's summaries are kept: of 8 kB each."""
_OUTCOMES = ("done", "failed", "expired", "interrupted")
_COMMAND = "id, device, name, args, issued, expires, actor, outcome, answered, reason, result"
_NESTED = {"args", "detail", "labels", "metrics", "revoked", "plan", "state"}
_DEVICE = """
    name, group_name, credential IS NOT NULL, online, reason, coalesce(row_release, state_release),
    coalesce(row_head, state_head), mode, sdk, last_seen, predictions, errors, labelled, correct, alarms,
    warnings, revoked IS NOT NULL
"""
R = TypeVar("R", bound=msgspec.Struct)


class Store(Database):
    """Everything the coordinator must remember.

    Writes happen inside `transaction`. To be used by one thread at a time.

    Args:
        path: The database file; made if it is missing. A damaged one is an error: a person decides what becomes of it.
        durable: Flush to the disk at every commit; False only for simulations.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        super().__init__(path, STEPS, durable=durable)

    # ---- ingest

    def known(self, devices: Collection[str]) -> set[str]:
        """Those of `devices` that are registered."""
        rows = self.read("SELECT name FROM devices WHERE name IN (SELECT value FROM json_each(?))", _json(devices))
        return {row[0] for row in rows}

    def revoked(self, devices: Collection[str]) -> set[str]:
        """Those of `devices` that were revoked."""
        rows = self.read(
            "SELECT name FROM devices WHERE revoked IS NOT NULL AND name IN (SELECT value FROM json_each(?))",
            _json(devices),
        )
        return {row[0] for row in rows}

    def positions(self, devices: Collection[str]) -> dict[tuple[str, str], int]:
        """Last committed sequence number by (device, store id)."""
        rows = self.read(
            "SELECT device, store_id, last_seq FROM positions WHERE device IN (SELECT value FROM json_each(?))",
            _json(devices),
        )
        return {(row[0], row[1]): row[2] for row in rows}

    def write_turn(self, turn: Turn) -> None:
        """Store all that one turn brought. Belongs inside a transaction."""
        now, many = turn.now, self.execute_many
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
                (*_identity(row), now, e.name, e.release, e.head, row.subject, _json(e.detail))
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
        self.execute_many(
            "UPDATE commands SET outcome = ?, reason = ?, result = ?, answered = ? WHERE id = ? AND device = ?"
            " AND outcome IN ('waiting', 'unanswered')",
            [
                (outcome if outcome in _OUTCOMES else "failed", reason, result, turn.now, number, device)
                for outcome, reason, result, number, device in answers
            ],
        )
        self.execute_many(
            "UPDATE certificates SET in_use = 1 WHERE command = ? AND device = ?",
            [(number, device) for outcome, _, _, number, device in answers if outcome == "done"],
        )

    def _write_summaries(self, turn: Turn) -> None:
        self.execute_many(
            "INSERT OR REPLACE INTO summaries (device, hour, time, received, release, head, reference, rows, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (row.device, row.hour, row.time, turn.now, s.release, s.head, s.reference, s.rows, row.body)
                for row in turn.summaries
                for s in [row.summary]
            ],
        )
        self.execute_many(
            # by rank of arrival: a device whose clock was once far ahead keeps what it tells now
            "DELETE FROM summaries WHERE device = ?1 AND hour NOT IN (SELECT hour FROM summaries WHERE device = ?1"
            " ORDER BY received DESC, hour DESC LIMIT ?2)",
            [(device, _SUMMARY_HOURS) for device in {row.device for row in turn.summaries}],
        )

    def _write_devices(self, turn: Turn) -> None:
        many = self.execute_many
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

    # ---- devices

    def forget_presence(self) -> None:
        """Set every device offline."""
        self.execute("UPDATE devices SET online = 0 WHERE online")

    def add_device(self, name: str, *, group: str, credential: str, now: float) -> bool:
        """Register a device; False if the name is taken. Belongs inside a transaction."""
        cursor = self.execute(
            "INSERT OR IGNORE INTO devices (name, group_name, credential, registered) VALUES (?, ?, ?, ?)",
            (name, group, credential, now),
        )
        return cursor.rowcount == 1

    def device(self, name: str) -> DeviceRecord | None:
        """The device of that name."""
        rows = self.read(f"SELECT {_DEVICE} FROM devices WHERE name = ?", name)  # noqa: S608 - a constant
        return _record(DeviceRecord, rows[0]) if rows else None

    def devices(self, *, group: str | None, after: str, limit: int) -> list[DeviceRecord]:
        """Devices whose name comes after `after`, in order."""
        rows = self.read(
            f"SELECT {_DEVICE} FROM devices WHERE name > ? AND (?2 IS NULL OR group_name = ?2)"  # noqa: S608
            " ORDER BY name LIMIT ?3",
            after,
            group,
            limit,
        )
        return [_record(DeviceRecord, row) for row in rows]

    def credentials(self) -> list[tuple[str, str]]:
        """(name, hashed password) of every enrolled device that was not revoked."""
        rows = self.read(
            "SELECT name, credential FROM devices WHERE credential IS NOT NULL AND revoked IS NULL ORDER BY name"
        )
        return [(row[0], row[1]) for row in rows]

    def enrolment(self, name: str) -> int | None:
        """How often the device was enrolled; None: never, or it was revoked."""
        rows = self.read(
            "SELECT enrolment FROM devices WHERE name = ? AND credential IS NOT NULL AND revoked IS NULL", name
        )
        return int(rows[0][0]) if rows else None

    def enrolments(self, name: str) -> int:
        """How often the device was enrolled, revoked or not."""
        rows = self.read("SELECT enrolment FROM devices WHERE name = ?", name)
        return int(rows[0][0]) if rows else 0

    def enrolled(self) -> list[tuple[str, str]]:
        """(name, group) of every enrolled device that was not revoked, by name."""
        rows = self.read(
            "SELECT name, group_name FROM devices WHERE credential IS NOT NULL AND revoked IS NULL ORDER BY name"
        )
        return [(row[0], row[1]) for row in rows]

    def replace_device(self, name: str, *, credential: str) -> bool:
        """Enrol a device anew; False if it was never added. Belongs inside a transaction."""
        cursor = self.execute(
            "UPDATE devices SET credential = ?, enrolment = enrolment + 1, revoked = NULL"
            " WHERE name = ? AND credential IS NOT NULL",
            (credential, name),
        )
        return cursor.rowcount == 1

    def revoke_device(self, name: str, *, now: float) -> bool:
        """Turn a device away from now on; False if it is unknown. Belongs inside a transaction."""
        cursor = self.execute("UPDATE devices SET revoked = coalesce(revoked, ?) WHERE name = ?", (now, name))
        return cursor.rowcount == 1

    # ---- certificates

    def add_certificate(
        self, device: str, *, serial: str, pem: str, issued: float, expires: float, command: str | None = None
    ) -> None:
        """Record a certificate; without `command` the device has it already. Belongs inside a transaction."""
        self.execute(
            "INSERT INTO certificates (serial, device, pem, issued, expires, command, in_use)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (serial, device, pem, issued, expires, command, command is None),
        )

    def revoke_certificates(self, device: str, *, now: float) -> None:
        """All certificates of a device so far. Belongs inside a transaction."""
        self.execute("UPDATE certificates SET revoked = ? WHERE device = ? AND revoked IS NULL", (now, device))

    def revoked_certificates(self, *, now: float) -> list[tuple[str, float]]:
        """(serial, when) of those that were revoked and would still be good."""
        rows = self.read(
            "SELECT serial, revoked FROM certificates WHERE revoked IS NOT NULL AND expires > ? ORDER BY revoked", now
        )
        return [(row[0], row[1]) for row in rows]

    def certificates_to_renew(self, *, before: float) -> list[CertificateRecord]:
        """The latest that each device has, where it ends before that time and no later one is on its way."""
        rows = self.read(
            # with a bare column beside max(), SQLite gives the row of the maximum
            "SELECT serial, device, pem, issued, end, in_use FROM"
            " (SELECT serial, device, pem, issued, max(expires) AS end, in_use FROM certificates"
            " WHERE in_use AND revoked IS NULL GROUP BY device) WHERE end < ? AND device NOT IN"
            " (SELECT device FROM commands WHERE outcome = 'waiting' AND name = 'renew-certificate') ORDER BY device",
            before,
        )
        return [_record(CertificateRecord, row) for row in rows]

    # ---- commands

    def add_command(self, record: CommandRecord) -> None:
        """Store a new command. Belongs inside a transaction."""
        self.execute(
            "INSERT INTO commands (id, device, name, args, issued, expires, actor) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                *(record.id, record.device, record.name, _json(record.args)),
                *(record.issued, record.expires, record.actor),
            ),
        )

    def commands(
        self, *, device: str | None = None, number: str | None = None, limit: int = 1000
    ) -> list[CommandRecord]:
        """Commands of a device, or the one of that id; newest first."""
        rows = self.read(
            f"SELECT {_COMMAND} FROM commands WHERE (?1 IS NULL OR device = ?1)"  # noqa: S608 - a constant
            " AND (?2 IS NULL OR id = ?2) ORDER BY issued DESC, id LIMIT ?3",
            device,
            number,
            limit,
        )
        return [_record(CommandRecord, row) for row in rows]

    def waiting_commands(self, *, limit: int = 10_000) -> list[tuple[str, str]]:
        """(id, device) of the commands without an answer, oldest first. Asked in every turn, so without the rest."""
        rows = self.read("SELECT id, device FROM commands WHERE outcome = 'waiting' ORDER BY issued, id LIMIT ?", limit)
        return [(row[0], row[1]) for row in rows]

    def commands_to_give_up(self, *, now: float) -> bool:
        """Whether `give_up_commands` would do anything."""
        rows = self.read(
            "SELECT 1 FROM commands WHERE outcome = 'waiting' AND (expires <= ? OR device IN"
            " (SELECT name FROM devices WHERE revoked IS NOT NULL)) LIMIT 1",
            now,
        )
        return bool(rows)

    def give_up_commands(self, *, now: float) -> None:
        """What has expired without an answer is no longer waited for, nor what a revoked device was told."""
        self.execute(
            "UPDATE commands SET outcome = 'unanswered' WHERE outcome = 'waiting' AND (expires <= ? OR device IN"
            " (SELECT name FROM devices WHERE revoked IS NOT NULL))",
            (now,),
        )

    def last_report(self, device: str) -> Report | None:
        """The newest report of a device."""
        rows = self.read("SELECT body FROM reports WHERE device = ? ORDER BY id DESC LIMIT 1", device)
        return unpack(rows[0][0], Report) if rows else None

    def summaries(self, device: str, *, limit: int = 24) -> list[Summary]:
        """The newest summaries of a device, one by hour, newest first."""
        rows = self.read("SELECT body FROM summaries WHERE device = ? ORDER BY hour DESC LIMIT ?", device, limit)
        return [unpack(row[0], Summary) for row in rows]

    def fleet(self) -> FleetRecord:
        """The fleet in numbers."""
        totals = self.read(
            "SELECT count(*), coalesce(sum(online), 0), coalesce(sum(alarms > 0), 0),"
            " coalesce(sum(predictions), 0), coalesce(sum(labelled), 0), coalesce(sum(correct), 0)"
            " FROM devices"
        )[0]
        releases = self.read("SELECT coalesce(row_release, state_release), count(*) FROM devices GROUP BY 1 ORDER BY 1")
        return FleetRecord(
            devices=totals[0],
            online=totals[1],
            in_drift=totals[2],
            predictions=totals[3],
            labelled=totals[4],
            correct=totals[5],
            releases={"none" if row[0] is None else str(row[0]): row[1] for row in releases},
            counters=dict(self._pairs("SELECT name, value FROM counters ORDER BY name")),
            unknown_devices=dict(self._pairs("SELECT device, messages FROM unknown ORDER BY device")),
        )

    def _pairs(self, sql: str) -> list[tuple[str, int]]:
        return [(row[0], row[1]) for row in self.read(sql)]

    def events(self, *, device: str | None, name: str | None, before: int | None, limit: int) -> list[EventRecord]:
        """Events with a number below `before`, newest first."""
        rows = self.read(
            "SELECT id, device, time, name, release, head, detail FROM events"
            " WHERE (?1 IS NULL OR device = ?1) AND (?2 IS NULL OR name = ?2) AND (?3 IS NULL OR id < ?3)"
            " ORDER BY id DESC LIMIT ?4",
            device,
            name,
            before,
            limit,
        )
        return [_record(EventRecord, row) for row in rows]

    # ---- releases, groups, rollouts

    def add_release(self, record: ReleaseRecord) -> None:
        """Record a release. Belongs inside a transaction."""
        fields = (record.release, record.name, record.digest, record.size, record.parent)
        self.execute(
            "INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*fields, _json(record.labels), _json(record.metrics), record.pushed),
        )

    def releases(self, *, number: int | None = None, before: int | None = None, limit: int = 1) -> list[ReleaseRecord]:
        """Releases below `before`, or the one of that number; newest first."""
        rows = self.read(
            "SELECT release, name, digest, size, parent, labels, metrics, pushed FROM releases"
            " WHERE (?1 IS NULL OR release = ?1) AND (?2 IS NULL OR release < ?2)"
            " ORDER BY release DESC LIMIT ?3",
            number,
            before,
            limit,
        )
        return [_record(ReleaseRecord, row) for row in rows]

    def groups(self) -> list[GroupRecord]:
        """Every group that was ever told something."""
        rows = self.read("SELECT name, revision, base, revoked, desired FROM groups ORDER BY name")
        return [_record(GroupRecord, row) for row in rows]

    def group(self, name: str) -> GroupRecord:
        """The group of that name; a blank one if it was never told anything."""
        return next((group for group in self.groups() if group.name == name), GroupRecord(name=name))

    def save_group(self, group: GroupRecord) -> None:
        """Store a group. Belongs inside a transaction."""
        self.execute(
            "INSERT OR REPLACE INTO groups (name, revision, base, revoked, desired) VALUES (?, ?, ?, ?, ?)",
            (group.name, group.revision, group.base, _json(group.revoked), group.desired),
        )

    def save_rollout(self, record: RolloutRecord) -> None:
        """Store a rollout, new or changed. Belongs inside a transaction."""
        self.execute(
            "INSERT OR REPLACE INTO rollouts (id, group_name, release, active, started, plan, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                record.id,
                record.plan.group,
                record.plan.release,
                record.state.is_active,
                record.started,
                _json(record.plan),
                _json(record.state),
            ),
        )

    def next_rollout(self) -> int:
        """The number for a new rollout. Belongs inside the transaction that stores it."""
        return int(self.read("SELECT coalesce(max(id), 0) + 1 FROM rollouts")[0][0])

    def rollouts(
        self,
        *,
        number: int | None = None,
        group: str | None = None,
        active: bool | None = None,
        before: int | None = None,
        limit: int = -1,
    ) -> list[RolloutRecord]:
        """Rollouts that match, newest first; -1 for all."""
        rows = self.read(
            "SELECT id, started, plan, state FROM rollouts WHERE (?1 IS NULL OR id = ?1)"
            " AND (?2 IS NULL OR group_name = ?2) AND (?3 IS NULL OR active = ?3) AND (?4 IS NULL OR id < ?4)"
            " ORDER BY id DESC LIMIT ?5",
            number,
            group,
            active,
            before,
            limit,
        )
        return [_record(RolloutRecord, row) for row in rows]

    def audit(self, now: float, actor: str, action: str, detail: dict[str, Any]) -> None:
        """Note who did what. Belongs inside the transaction that does it."""
        self.execute(
            "INSERT INTO audit (time, actor, action, detail) VALUES (?, ?, ?, ?)",
            (now, actor, action, _json(detail)),
        )

    # ---- what rollouts are judged by

    def metrics(self, plan: RolloutPlan, state: RolloutState | None, *, now: float) -> list[DeviceMetrics]:
        """One entry for every device of the plan's group, from committed reports and events alone.

        Windows are cut by the devices' own report times, not by when the messages came.

        Args:
            plan: The rollout.
            state: Where it is; None before it begins.
            now: Seconds since the epoch.
        """
        release = plan.release
        since, baseline_since = (now, now) if state is None else (state.stage_started, state.baseline_since)
        windows = self.read(
            "SELECT r.device, sum(r.predictions), sum(r.errors), sum(r.labelled), sum(r.correct), min(r.id)"
            " FROM reports r JOIN devices d ON d.name = r.device WHERE d.group_name = ?1 AND r.start >= ?3"
            " AND (r.release = ?2) = (d.row_release IS ?2) GROUP BY r.device",
            plan.group,
            release,
            since,
        )
        counts = {row[0]: row[1:] for row in windows}
        earlier = self.read("SELECT DISTINCT device FROM reports WHERE release = ? AND start < ?", release, since)
        had_it = {row[0] for row in earlier}
        last_words = dict(
            self.read(
                # with a bare column beside max(), SQLite gives the row of the maximum
                "SELECT device, name FROM (SELECT device, name, max(id) FROM events WHERE subject = ?"
                " AND name IN ('release_activated', 'release_failed', 'release_rolled_back')"
                " GROUP BY device)",
                release,
            )
        )
        entries = []
        for name, row_release, row_time in self.read(
            "SELECT name, row_release, row_time FROM devices WHERE group_name = ? ORDER BY name", plan.group
        ):
            runs_it = row_release == release
            predictions, errors, labelled, correct, first = counts.get(name, (0, 0, 0, 0, 0))
            before = (0, 0)
            if labelled:
                before = self._before(name, first, baseline_since, had_it=name in had_it, plan=plan)
            entries.append(
                DeviceMetrics(
                    device=name,
                    on_candidate=runs_it,
                    switched=runs_it and name not in had_it,
                    reachable=row_time is not None and now - row_time <= plan.reachable_s,
                    failed=last_words.get(name) == "release_failed" and not runs_it,
                    rolled_back=last_words.get(name) == "release_rolled_back" and not runs_it,
                    predictions=predictions,
                    errors=errors,
                    labelled=labelled,
                    correct=correct,
                    labelled_before=before[0],
                    correct_before=before[1],
                )
            )
        return entries

    def _before(self, device: str, first: int, since: float, *, had_it: bool, plan: RolloutPlan) -> tuple[int, int]:
        """(labelled, correct) in a device's last labelled reports begun after `since` and before row `first`.

        On the candidate, if the device ran it before this stage already; else on what it ran before.
        """
        row = self.read(
            "SELECT coalesce(sum(labelled), 0), coalesce(sum(correct), 0) FROM"
            " (SELECT labelled, correct FROM reports WHERE device = ? AND id < ? AND start >= ?"
            " AND (release = ?) = ? AND labelled > 0 ORDER BY id DESC LIMIT ?)",
            device,
            first,
            since,
            plan.release,
            had_it,
            plan.baseline_reports,
        )[0]
        return row[0], row[1]


def _record(kind: type[R], row: Sequence[Any]) -> R:
    """A row whose columns come in the order of the struct's fields; nested fields are kept as JSON text."""
    fields = dict(zip(kind.__struct_fields__, row, strict=True))
    for name in _NESTED.intersection(fields):
        fields[name] = msgspec.json.decode(fields[name])
    # SQLite has no booleans
    return msgspec.convert(fields, kind, strict=False)


def _identity(row: ReportRow | EventRow | RejectedRow) -> tuple[str, str, int, float]:
    return row.device, row.store_id, row.seq, row.time


def _counts(report: Report) -> tuple[int, int, int, int]:
    return report.predictions, report.errors, report.labelled, report.correct


def _json(value: Any) -> str:
    """Text of plain data and structs; sets become lists."""
    return msgspec.json.encode(value).decode()
