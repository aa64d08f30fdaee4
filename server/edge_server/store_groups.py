"""What each group should run."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import GroupRecord
from edge_server.rows import from_row, to_json


class GroupStore:
    """Groups. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self) -> list[GroupRecord]:
        """Every group that was ever told something."""
        rows = self._db.read("SELECT name, revision, base, revoked, desired, mode FROM groups ORDER BY name")
        return [from_row(GroupRecord, row) for row in rows]

    def get(self, name: str) -> GroupRecord:
        """The group of that name; a blank one if it was never told anything."""
        return next((group for group in self.all() if group.name == name), GroupRecord(name=name))

    def save(self, group: GroupRecord) -> None:
        """Store a group. Belongs inside a transaction."""
        self._db.execute(
            "INSERT OR REPLACE INTO groups (name, revision, base, revoked, desired, mode) VALUES (?, ?, ?, ?, ?, ?)",
            (group.name, group.revision, group.base, to_json(group.revoked), group.desired, group.mode),
        )
