"""The releases that were taken in."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import ReleaseRecord
from edge_server.rows import from_row, to_json

_MAX_LINEAGE = 100


class ReleaseStore:
    """Releases. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, record: ReleaseRecord) -> None:
        """Record a release. Belongs inside a transaction."""
        fields = (record.release, record.name, record.digest, record.size, record.parent)
        self._db.execute(
            "INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*fields, to_json(record.labels), to_json(record.metrics), record.pushed),
        )

    def find(self, *, number: int | None = None, before: int | None = None, limit: int = 1) -> list[ReleaseRecord]:
        """Releases below `before`, or the one of that number; newest first."""
        rows = self._db.read(
            "SELECT release, name, digest, size, parent, labels, metrics, pushed FROM releases"
            " WHERE (?1 IS NULL OR release = ?1) AND (?2 IS NULL OR release < ?2)"
            " ORDER BY release DESC LIMIT ?3",
            number,
            before,
            limit,
        )
        return [from_row(ReleaseRecord, row) for row in rows]

    def lineage(self, number: int) -> list[ReleaseRecord]:
        """The release, what it was made from, what that was made from, and so on; as far as it is known here."""
        rows = self._db.read(
            "WITH RECURSIVE line (digest, step) AS ("
            " SELECT digest, 0 FROM releases WHERE release = ?"
            " UNION SELECT r.parent, step + 1 FROM line JOIN releases r ON r.digest = line.digest"
            " WHERE r.parent IS NOT NULL AND step < ?)"
            " SELECT release, name, r.digest, size, parent, labels, metrics, pushed"
            " FROM line JOIN releases r ON r.digest = line.digest ORDER BY step",
            number,
            _MAX_LINEAGE,
        )
        return [from_row(ReleaseRecord, row) for row in rows]
