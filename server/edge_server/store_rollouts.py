"""Rollouts, and what they are judged by."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import RolloutRecord
from edge_server.rollout import DeviceMetrics, RolloutPlan, RolloutState
from edge_server.rows import from_row, to_json


class RolloutStore:
    """Rollouts. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def save(self, record: RolloutRecord) -> None:
        """Store a rollout, new or changed. Belongs inside a transaction."""
        self._db.execute(
            "INSERT OR REPLACE INTO rollouts (id, group_name, release, active, started, plan, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                record.id,
                record.plan.group,
                record.plan.release,
                record.state.is_active,
                record.started,
                to_json(record.plan),
                to_json(record.state),
            ),
        )

    def next_id(self) -> int:
        """The number for a new rollout. Belongs inside the transaction that stores it."""
        return int(self._db.read("SELECT coalesce(max(id), 0) + 1 FROM rollouts")[0][0])

    def find(
        self,
        *,
        number: int | None = None,
        group: str | None = None,
        active: bool | None = None,
        before: int | None = None,
        limit: int = -1,
    ) -> list[RolloutRecord]:
        """Rollouts that match, newest first; -1 for all."""
        rows = self._db.read(
            "SELECT id, started, plan, state FROM rollouts WHERE (?1 IS NULL OR id = ?1)"
            " AND (?2 IS NULL OR group_name = ?2) AND (?3 IS NULL OR active = ?3) AND (?4 IS NULL OR id < ?4)"
            " ORDER BY id DESC LIMIT ?5",
            number,
            group,
            active,
            before,
            limit,
        )
        return [from_row(RolloutRecord, row) for row in rows]

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
        windows = self._db.read(
            "SELECT r.device, sum(r.predictions), sum(r.errors), sum(r.labelled), sum(r.correct), min(r.id)"
            " FROM reports r JOIN devices d ON d.name = r.device WHERE d.group_name = ?1 AND r.start >= ?3"
            " AND (r.release = ?2) = (d.row_release IS ?2) GROUP BY r.device",
            plan.group,
            release,
            since,
        )
        counts = {row[0]: row[1:] for row in windows}
        earlier = self._db.read("SELECT DISTINCT device FROM reports WHERE release = ? AND start < ?", release, since)
        had_it = {row[0] for row in earlier}
        last_words = dict(
            self._db.read(
                # with a bare column beside max(), SQLite gives the row of the maximum
                "SELECT device, name FROM (SELECT device, name, max(id) FROM events WHERE subject = ?"
                " AND name IN ('release_activated', 'release_failed', 'release_rolled_back')"
                " GROUP BY device)",
                release,
            )
        )
        entries = []
        for name, row_release, row_time in self._db.read(
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
        row = self._db.read(
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
