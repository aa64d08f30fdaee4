"""Orders to devices, and their answers."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import CommandRecord
from edge_server.rows import from_row, to_json

_COMMAND = "id, device, name, args, issued, expires, actor, outcome, answered, reason, result"


class CommandStore:
    """Commands. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, record: CommandRecord) -> None:
        """Store a new command. Belongs inside a transaction."""
        self._db.execute(
            "INSERT INTO commands (id, device, name, args, issued, expires, actor) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                *(record.id, record.device, record.name, to_json(record.args)),
                *(record.issued, record.expires, record.actor),
            ),
        )

    def find(
        self, *, device: str | None = None, number: str | None = None, before: str | None = None, limit: int = 1000
    ) -> list[CommandRecord]:
        """Commands of a device, those that come after the one of id `before`, or the one of that id; newest first."""
        rows = self._db.read(
            f"SELECT {_COMMAND} FROM commands WHERE (?1 IS NULL OR device = ?1)"  # noqa: S608 - a constant
            " AND (?2 IS NULL OR id = ?2) AND (?3 IS NULL OR (-issued, id) >"
            " (SELECT -issued, id FROM commands WHERE id = ?3)) ORDER BY issued DESC, id LIMIT ?4",
            device,
            number,
            before,
            limit,
        )
        return [from_row(CommandRecord, row) for row in rows]

    def waiting(self, *, limit: int = 10_000) -> list[tuple[str, str]]:
        """(id, device) of the commands without an answer, oldest first. Asked in every turn, so without the rest."""
        rows = self._db.read(
            "SELECT id, device FROM commands WHERE outcome = 'waiting' ORDER BY issued, id LIMIT ?", limit
        )
        return [(row[0], row[1]) for row in rows]

    def to_give_up(self, *, now: float) -> bool:
        """Whether `give_up_commands` would do anything."""
        rows = self._db.read(
            "SELECT 1 FROM commands WHERE outcome = 'waiting' AND (expires <= ? OR device IN"
            " (SELECT name FROM devices WHERE revoked IS NOT NULL)) LIMIT 1",
            now,
        )
        return bool(rows)

    def give_up(self, *, now: float) -> None:
        """What has expired without an answer is no longer waited for, nor what a revoked device was told."""
        self._db.execute(
            "UPDATE commands SET outcome = 'unanswered' WHERE outcome = 'waiting' AND (expires <= ? OR device IN"
            " (SELECT name FROM devices WHERE revoked IS NOT NULL))",
            (now,),
        )
