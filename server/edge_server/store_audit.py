"""Who did what, and when."""

from __future__ import annotations

from typing import Any

from edge_sdk.database import Database
from edge_server.rows import to_json


class AuditStore:
    """Every change of state that a person asked for."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, now: float, actor: str, action: str, detail: dict[str, Any]) -> None:
        """Note who did what. Belongs inside the transaction that does it."""
        self._db.execute(
            "INSERT INTO audit (time, actor, action, detail) VALUES (?, ?, ?, ?)",
            (now, actor, action, to_json(detail)),
        )
