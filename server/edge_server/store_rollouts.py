"""Rollouts: what was planned, and where they are."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import RolloutRecord
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

    def parts(self, group: str, *, above: int) -> list[RolloutRecord]:
        """Completed rollouts to some devices of a group, newest first, one for each query, of releases `above` one."""
        found: dict[str, RolloutRecord] = {}
        for record in self.find(group=group, active=False):
            if record.plan.where and record.state.status == "completed" and record.plan.release > above:
                found.setdefault(record.plan.where, record)
        return list(found.values())
