"""How candidates did against the release in use, before they were pushed."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import CandidateRecord
from edge_server.rows import from_row, to_json


class CandidateStore:
    """Evaluations of candidates, by the digest of their manifest. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def save(self, record: CandidateRecord, *, card: str = "") -> None:
        """Store an evaluation and the candidate's model card; another one of the same candidate is replaced."""
        self._db.execute(
            "INSERT OR REPLACE INTO candidates (digest, name, release, champion, verdict, reason, built, report, card)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(record.digest, record.name, record.release, record.champion, record.verdict, record.reason),
                *(record.built, to_json(record.report), card),
            ),
        )

    def find(self, digest: str) -> CandidateRecord | None:
        """The evaluation of a candidate; None: it was not built here."""
        rows = self._db.read(
            "SELECT digest, name, release, champion, verdict, reason, built, report FROM candidates WHERE digest = ?",
            digest,
        )
        return from_row(CandidateRecord, rows[0]) if rows else None

    def card(self, digest: str) -> str:
        """The model card of a candidate, Markdown; "": it was not kept."""
        rows = self._db.read("SELECT card FROM candidates WHERE digest = ?", digest)
        return rows[0][0] if rows else ""

    def page(self, *, before: str | None = None, limit: int = 100) -> list[CandidateRecord]:
        """Evaluations, the one made last first; only those made before that of the digest `before`."""
        rows = self._db.read(
            "SELECT digest, name, release, champion, verdict, reason, built, report FROM candidates"
            " WHERE ?1 IS NULL OR rowid < (SELECT rowid FROM candidates WHERE digest = ?1)"
            " ORDER BY rowid DESC LIMIT ?2",
            before,
            limit,
        )
        return [from_row(CandidateRecord, row) for row in rows]
