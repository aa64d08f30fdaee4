"""What says that something changed, for pages that show it."""

from __future__ import annotations

from edge_sdk.database import Database


class LiveStore:
    """Looks at the ends of tables, and over the devices."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def versions(self) -> dict[str, object]:
        """By topic, something that changes when its records do."""
        row = self._db.read(
            "SELECT (SELECT max(id) FROM reports), (SELECT max(id) FROM events), (SELECT max(id) FROM audit),"
            " (SELECT max(issued) FROM commands), (SELECT max(answered) FROM commands),"
            # a millisecond for 10,000 devices
            " (SELECT total(online) FROM devices), (SELECT total(alarms > 0) FROM devices)"
        )[0]
        return {
            "devices": (row[0], row[1], *row[3:]),
            "rollouts": self._db.read("SELECT max(id), total(active) FROM rollouts")
            + self._db.read("SELECT id, state FROM rollouts WHERE active"),
            "alerts": self._db.read("SELECT id, severity, body FROM alerts WHERE status = 'firing'")
            + self._db.read("SELECT max(id), total(until) FROM silences"),
            "audit": row[2],
        }
