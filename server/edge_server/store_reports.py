"""What devices sent, read back."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_sdk.messages import Report, Summary, unpack
from edge_server.records import EventRecord
from edge_server.rows import from_row


class ReportStore:
    """Reports, summaries and events as they were committed."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def last(self, device: str) -> Report | None:
        """The newest report of a device."""
        rows = self._db.read("SELECT body FROM reports WHERE device = ? ORDER BY id DESC LIMIT 1", device)
        return unpack(rows[0][0], Report) if rows else None

    def find(self, device: str, *, before: int | None = None, limit: int = 100) -> list[tuple[int, float, Report]]:
        """Number, time and report of a device below `before`, newest first."""
        rows = self._db.read(
            "SELECT id, time, body FROM reports WHERE device = ?1 AND (?2 IS NULL OR id < ?2)"
            " ORDER BY id DESC LIMIT ?3",
            device,
            before,
            limit,
        )
        return [(row[0], row[1], unpack(row[2], Report)) for row in rows]

    def summaries(self, device: str, *, limit: int = 24) -> list[Summary]:
        """The newest summaries of a device, newest first."""
        rows = self._db.read(
            "SELECT body FROM summaries WHERE device = ? ORDER BY hour DESC, start DESC LIMIT ?", device, limit
        )
        return [unpack(row[0], Summary) for row in rows]

    def events(self, *, device: str | None, name: str | None, before: int | None, limit: int) -> list[EventRecord]:
        """Events with a number below `before`, newest first."""
        rows = self._db.read(
            "SELECT id, device, time, name, release, head, detail FROM events"
            " WHERE (?1 IS NULL OR device = ?1) AND (?2 IS NULL OR name = ?2) AND (?3 IS NULL OR id < ?3)"
            " ORDER BY id DESC LIMIT ?4",
            device,
            name,
            before,
            limit,
        )
        return [from_row(EventRecord, row) for row in rows]
