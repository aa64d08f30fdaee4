"""The coordinator's database file: opened, brought to the present form, and written all or nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_sdk.errors import DiskFullError, StoreError
from edge_sdk.files import crashpoint
from edge_server.schema import STEPS

_BUSY_S = 30.0


class Database:
    """A connection. Every method raises `StoreError`, or `DiskFullError` when there is no room.

    Args:
        path: The file; made if it is missing.
        durable: Flush to the disk at every commit, so that what was acknowledged survives a power cut. False
            is for simulations: a crash of the process still loses nothing.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        try:
            self.conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
            self.conn.execute("PRAGMA journal_mode = WAL")
            self.conn.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        except sqlite3.Error as error:
            raise _store_error(error, f"{path} cannot be opened") from error
        self._migrate(path)

    def _migrate(self, path: Path) -> None:
        version = int(self.read("PRAGMA user_version")[0][0])
        if version > len(STEPS):
            raise StoreError(
                f"{path} has form {version}, this version reads up to {len(STEPS)}: update the coordinator"
            )
        if version == len(STEPS):
            return
        from sqlite_utils import Database  # noqa: PLC0415 - takes a third of a second to import

        with self.transaction():
            # read again: another process may have been faster
            for i in range(int(self.read("PRAGMA user_version")[0][0]), len(STEPS)):
                STEPS[i](Database(self.conn))
                self.conn.execute(f"PRAGMA user_version = {i + 1}")

    def close(self) -> None:
        """Close the file."""
        self.conn.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing.

        Raises:
            DiskFullError: No room; nothing was written.
            StoreError: The database failed; nothing was written.
        """
        try:
            self.conn.execute("BEGIN IMMEDIATE")
            try:
                yield
                crashpoint("commit:before")
                self.conn.execute("COMMIT")
                crashpoint("commit:after")
            except BaseException:
                if self.conn.in_transaction:
                    self.conn.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _store_error(error, "the database refused a write") from error

    def read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        try:
            return self.conn.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _store_error(error, "the database cannot be read") from error


def _store_error(error: sqlite3.Error, what: str) -> StoreError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return DiskFullError(f"{what}: no room; free some space, nothing unacknowledged is lost")
    return StoreError(f"{what}: {error}")
