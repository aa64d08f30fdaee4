"""Which secrets belong to the database: what devices trust lies in files beside it, and files get lost."""

from __future__ import annotations

import hashlib

from edge_sdk.database import Database


class SecretStore:
    """The SHA-256 of each secret, by its name; never the secret. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def exists(self, name: str) -> bool:
        """Whether devices were given something that hangs on a secret of that name."""
        return bool(self._db.read("SELECT 1 FROM secrets WHERE name = ?", name))

    def is_known(self, name: str, data: bytes) -> bool:
        """Whether this is the one that was noted."""
        return self._db.read("SELECT sha256 FROM secrets WHERE name = ?", name) == [(_digest(data),)]

    def note(self, name: str, data: bytes) -> bool:
        """Remember a secret; False if another one is remembered. Belongs inside a transaction."""
        self._db.execute(
            "INSERT INTO secrets (name, sha256) VALUES (?1, ?2)"
            # one that was made before this table was is known to exist, and is taken for what is found
            " ON CONFLICT (name) DO UPDATE SET sha256 = excluded.sha256 WHERE sha256 = ''",
            (name, _digest(data)),
        )
        return self.is_known(name, data)

    def forget(self, name: str) -> None:
        """The next one that is found is taken for the right one. Belongs inside a transaction."""
        self._db.execute("DELETE FROM secrets WHERE name = ?", (name,))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
