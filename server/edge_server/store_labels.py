"""Labels of devices, and which devices have them."""

from __future__ import annotations

from collections.abc import Mapping

from edge_sdk.database import Database
from edge_server.labels import FIELDS, Query


class LabelStore:
    """Labels. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, device: str) -> dict[str, str]:
        """The labels of a device, by key."""
        return dict(self._db.read("SELECT key, value FROM labels WHERE device = ? ORDER BY key", device))

    def set(self, device: str, changes: Mapping[str, str | None]) -> None:
        """Set labels of a device; None takes one away."""
        self._db.execute_many(
            "DELETE FROM labels WHERE device = ? AND key = ?",
            [(device, key) for key, value in changes.items() if value is None],
        )
        self._db.execute_many(
            "INSERT INTO labels (device, key, value) VALUES (?, ?, ?)"
            " ON CONFLICT (device, key) DO UPDATE SET value = excluded.value",
            [(device, key, value) for key, value in changes.items() if value is not None],
        )

    def facts(self, device: str) -> dict[str, str]:
        """What `Query.matches` asks for; without fields that are not known."""
        columns = ", ".join(FIELDS.values())
        rows = self._db.read(f"SELECT {columns} FROM devices d WHERE d.name = ?", device)  # noqa: S608 - constants
        known = dict(zip(FIELDS, rows[0], strict=True)) if rows else {}
        return self.of(device) | {key: value for key, value in known.items() if value is not None}

    def matching(self, query: Query) -> list[str]:
        """Names of the devices that a query is true of, in order."""
        condition = query.to_sql()
        rows = self._db.read(
            f"SELECT d.name FROM devices d WHERE {condition.text} ORDER BY d.name",  # noqa: S608 - has no values in it
            *condition.values,
        )
        return [row[0] for row in rows]
