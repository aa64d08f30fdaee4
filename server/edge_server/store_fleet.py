"""What the analysis of the fleet reads, and what it keeps from one window to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge_sdk.database import Database
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import Report, Summary, unpack
from edge_server.freshness import Cell
from edge_server.rows import from_row

_DAY_S = 86_400


class FleetStore:
    """Streams over all devices, and the state of the drift test."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def members(self) -> list[tuple[str, dict[str, str]]]:
        """Devices that were not revoked, with their group and release, by name."""
        rows = self._db.read(
            "SELECT name, group_name, coalesce(row_release, state_release) FROM devices WHERE revoked IS NULL"
            " ORDER BY name"
        )
        return [(row[0], {"group": row[1]} | ({"release": str(row[2])} if row[2] else {})) for row in rows]

    def summaries(self, *, since: float, until: float) -> Iterator[tuple[str, Summary]]:
        """Devices and their summaries that ended in (since, until], by device and time; without unreadable ones."""
        rows = self._db.execute(
            "SELECT device, body FROM summaries WHERE hour >= ? AND hour <= ? ORDER BY device, hour, start",
            (int(since // 3600), int(until // 3600)),
        )
        for device, body in rows:
            try:
                message = unpack(body, Summary)
            except ProtocolError:
                continue
            if since < message.end <= until:
                yield device, message

    def marks(self) -> tuple[int, int]:
        """Numbers of the newest report and the newest event."""
        row = self._db.read(
            "SELECT (SELECT coalesce(max(id), 0) FROM reports), (SELECT coalesce(max(id), 0) FROM events)"
        )
        return row[0][0], row[0][1]

    def reports(self, *, after: int, to: int, limit: int) -> list[tuple[int, str, Report]]:
        """Number, device and report, in the order in which they came."""
        rows = self._db.read(
            "SELECT id, device, body FROM reports WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", after, to, limit
        )
        return [(row[0], row[1], unpack(row[2], Report)) for row in rows]

    def events_between(self, name: str, *, after: int, to: int) -> list[tuple[str, float, str]]:
        """Device, its time and the detail (JSON) of the events of a name, in the order in which they came."""
        rows = self._db.read(
            "SELECT device, time, detail FROM events WHERE name = ? AND id > ? AND id <= ? ORDER BY id", name, after, to
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def events_since(self, name: str, *, received: float) -> list[tuple[str, float, str]]:
        """As `events_between`, of those that came from then on."""
        rows = self._db.read(
            "SELECT device, time, detail FROM events WHERE name = ? AND received >= ? ORDER BY id", name, received
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def state(self, name: str) -> bytes | None:
        """What was kept under that name."""
        rows = self._db.read("SELECT body FROM fleet_state WHERE name = ?", name)
        return None if not rows else bytes(rows[0][0])

    def keep(self, name: str, body: bytes) -> None:
        """Keep something. Belongs inside a transaction."""
        self._db.execute("INSERT OR REPLACE INTO fleet_state (name, body) VALUES (?, ?)", (name, body))

    def cells(self, *, since: float) -> list[Cell]:
        """Labelled predictions by device, version and day (UTC), of reports that began from then on."""
        rows = self._db.read(
            "SELECT device, release, head, CAST(start / ?2 AS INTEGER) AS day, sum(predictions), sum(labelled),"
            " sum(correct), min(start) FROM reports WHERE start >= ?1 AND release > 0"
            " GROUP BY device, release, head, day ORDER BY device, release, head, day",
            since,
            _DAY_S,
        )
        return [from_row(Cell, row) for row in rows]

    def began(self) -> dict[tuple[str, int, int], float]:
        """When each version first told of itself, by device, release and head."""
        rows: list[tuple[Any, ...]] = self._db.read(
            "SELECT device, release, head, min(start) FROM reports WHERE release > 0 GROUP BY device, release, head"
        )
        return {(row[0], row[1], row[2]): row[3] for row in rows}
