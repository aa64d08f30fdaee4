"""Who did what, and when."""

from __future__ import annotations

import sqlite3
from typing import Any

from edge_sdk.database import Database
from edge_server.records import AuditRecord
from edge_server.rows import from_row, to_json


def last_change(connection: sqlite3.Connection) -> float:
    """When the last row of any kind came, seconds since the epoch; 0 for an empty database. Of any form."""
    newest = [
        connection.execute(f"SELECT coalesce(max({column}), 0) FROM {table}").fetchone()[0]  # noqa: S608 - constants
        for table, column in (
            ("reports", "received"),
            ("events", "received"),
            ("audit", "time"),
            ("devices", "last_seen"),
        )
    ]
    return float(max(newest))


class AuditStore:
    """Every change of state that a person asked for, and what the coordinator decided."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, now: float, actor: str, action: str, detail: dict[str, Any]) -> None:
        """Note who did what. Belongs inside the transaction that does it."""
        self._db.execute(
            "INSERT INTO audit (time, actor, action, detail) VALUES (?, ?, ?, ?)",
            (now, actor, action, to_json(detail)),
        )

    def find(self, *, actor: str | None = None, before: int | None = None, limit: int = 100) -> list[AuditRecord]:
        """Entries with a number below `before`, newest first."""
        rows = self._db.read(
            "SELECT id, time, actor, action, detail FROM audit WHERE (?1 IS NULL OR actor = ?1)"
            " AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3",
            actor,
            before,
            limit,
        )
        return [from_row(AuditRecord, row) for row in rows]
