"""Segments: label queries that have a name."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.labels import spell_out
from edge_server.records import SegmentRecord
from edge_server.rows import from_row


class SegmentStore:
    """Segments. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self) -> list[SegmentRecord]:
        """Every segment, by name."""
        rows = self._db.read("SELECT name, query, created, actor FROM segments ORDER BY name")
        return [from_row(SegmentRecord, row) for row in rows]

    def add(self, segment: SegmentRecord) -> bool:
        """Keep a segment; False if the name is taken."""
        cursor = self._db.execute(
            "INSERT OR IGNORE INTO segments (name, query, created, actor) VALUES (?, ?, ?, ?)",
            (segment.name, segment.query, segment.created, segment.actor),
        )
        return cursor.rowcount == 1

    def delete(self, name: str) -> bool:
        """Forget a segment; False if there is none of that name."""
        return self._db.execute("DELETE FROM segments WHERE name = ?", (name,)).rowcount == 1

    def spell_out(self, text: str) -> str:
        """A label query with the queries of the segments that it names in their places.

        Raises:
            ConfigError: There is no segment of a name in it.
        """
        # most queries name none
        return spell_out(text, {segment.name: segment.query for segment in self.all()}) if "@" in text else text
