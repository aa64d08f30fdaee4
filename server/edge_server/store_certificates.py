"""The certificates that devices were given."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import CertificateRecord
from edge_server.rows import from_row


class CertificateStore:
    """Certificates. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(
        self, device: str, *, serial: str, pem: str, issued: float, expires: float, command: str | None = None
    ) -> None:
        """Record a certificate; without `command` the device has it already. Belongs inside a transaction."""
        self._db.execute(
            "INSERT INTO certificates (serial, device, pem, issued, expires, command, in_use)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (serial, device, pem, issued, expires, command, command is None),
        )

    def forget(self) -> None:
        """Drop all of them: the authority that signed them is given up. Belongs inside a transaction."""
        self._db.execute("DELETE FROM certificates")

    def revoke(self, device: str, *, now: float) -> None:
        """All certificates of a device so far. Belongs inside a transaction."""
        self._db.execute("UPDATE certificates SET revoked = ? WHERE device = ? AND revoked IS NULL", (now, device))

    def revoked(self, *, now: float) -> list[tuple[str, float]]:
        """(serial, when) of those that were revoked and would still be good."""
        rows = self._db.read(
            "SELECT serial, revoked FROM certificates WHERE revoked IS NOT NULL AND expires > ? ORDER BY revoked", now
        )
        return [(row[0], row[1]) for row in rows]

    def to_renew(self, *, before: float) -> list[CertificateRecord]:
        """The latest that each device has, where it ends before that time and no later one is on its way."""
        rows = self._db.read(
            # with a bare column beside max(), SQLite gives the row of the maximum
            "SELECT serial, device, pem, issued, end, in_use FROM"
            " (SELECT serial, device, pem, issued, max(expires) AS end, in_use FROM certificates"
            " WHERE in_use AND revoked IS NULL GROUP BY device) WHERE end < ? AND device NOT IN"
            " (SELECT device FROM commands WHERE outcome = 'waiting' AND name = 'renew-certificate') ORDER BY device",
            before,
        )
        return [from_row(CertificateRecord, row) for row in rows]
