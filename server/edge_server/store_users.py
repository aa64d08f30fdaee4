"""Users and their sessions. Neither tokens nor the cookies' secrets are here, only their digests."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import UserRecord
from edge_server.rows import from_row

_USER = "u.id, u.name, u.role, u.created, u.revoked"


class UserStore:
    """Users. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, *, name: str, role: str, digest: str, now: float) -> None:
        """Store a user."""
        self._db.execute(
            "INSERT INTO users (name, role, digest, created) VALUES (?, ?, ?, ?)", (name, role, digest, now)
        )

    def all(self) -> list[UserRecord]:
        """Everybody there ever was, in the order in which they came."""
        return [from_row(UserRecord, row) for row in self._db.read(f"SELECT {_USER} FROM users u ORDER BY u.id")]  # noqa: S608

    def exist(self) -> bool:
        """Whether there ever was a user: a fleet whose last one was revoked is not open again."""
        return bool(self._db.read("SELECT 1 FROM users LIMIT 1"))

    def by_token(self, digest: str) -> tuple[UserRecord, str] | None:
        """The user of a token who was not revoked, and the digest as stored."""
        rows = self._db.read(f"SELECT {_USER}, u.digest FROM users u WHERE digest = ? AND revoked IS NULL", digest)  # noqa: S608
        return (from_row(UserRecord, rows[0][:-1]), rows[0][-1]) if rows else None

    def revoke(self, number: int, *, now: float) -> None:
        """Turn a user away from now on, and end the user's sessions."""
        self._db.execute("UPDATE users SET revoked = ? WHERE id = ?", (now, number))
        self._db.execute("DELETE FROM sessions WHERE user = ?", (number,))

    # ---- sessions

    def begin(self, *, digest: str, user: int, now: float, expires: float) -> None:
        """Store a session, and drop those that are over."""
        self._db.execute("DELETE FROM sessions WHERE expires <= ?", (now,))
        self._db.execute(
            "INSERT INTO sessions (digest, user, created, expires) VALUES (?, ?, ?, ?)", (digest, user, now, expires)
        )

    def by_session(self, digest: str, *, now: float) -> tuple[UserRecord, str] | None:
        """The user of a session that lasts, and the digest as stored."""
        rows = self._db.read(
            f"SELECT {_USER}, s.digest FROM sessions s JOIN users u ON u.id = s.user"  # noqa: S608
            " WHERE s.digest = ? AND s.expires > ? AND u.revoked IS NULL",
            digest,
            now,
        )
        return (from_row(UserRecord, rows[0][:-1]), rows[0][-1]) if rows else None

    def end(self, digest: str) -> None:
        """Forget a session."""
        self._db.execute("DELETE FROM sessions WHERE digest = ?", (digest,))
