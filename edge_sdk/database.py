"""A SQLite file, opened, brought to its present form, and written all or nothing: shared with the coordinator."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from edge_sdk.errors import DiskFullError, StoreError
from edge_sdk.files import crashpoint, flush, is_flushing

logger = logging.getLogger(__name__)
_BUSY_S = 30.0
_LOG_HEADER_BYTES = 32
_MAX_VALUES = 999
"""In one statement: what SQLite before 3.32 takes."""

Step = Callable[[Any], None]
"""One migration: takes a `sqlite_utils.Database`, and brings the file from one form to the next."""


_made: dict[tuple[Step, ...], list[str]] = {}
"""What makes the tables that migrations ended with, for the next new files of this process: a tenth of the time."""


class _Log(NamedTuple):
    """Where SQLite's write-ahead log is."""

    number: int
    """How often it began anew."""
    size: int


class Database:
    """A connection in WAL mode. Every method raises `StoreError`, or `DiskFullError` when there is no room.

    Not thread-safe.

    Args:
        path: The file; made if it is missing.
        steps: All migrations ever, oldest first; `PRAGMA user_version` counts those that were made.
        durable: Flush to the disk at every commit, so that what was acknowledged survives a power cut. False still
            survives a crash of the process.
        replace_damaged: Put a file that is damaged beyond use aside as `*.damaged`, and begin anew.
        writes: False: nothing is made, migrated or mended, for it is another process's.
    """

    def __init__(
        self,
        path: Path,
        steps: Sequence[Step],
        *,
        durable: bool = True,
        replace_damaged: bool = False,
        writes: bool = True,
    ) -> None:
        self.replaced = False
        """Whether a damaged file was put aside."""
        self.written_bytes = 0
        """About so many were written to the disk by transactions: whole pages, to the log and from it to the file."""
        self._steps, self._path, self._log_path = steps, path, f"{path}-wal"
        if not writes:
            self._open_to_read(path)
            return
        try:
            self._open(path, durable=durable)
            if replace_damaged and (found := self.conn.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise _damaged(found)
        except sqlite3.Error as error:
            self.conn.close()
            damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            if not (damaged and replace_damaged):
                raise store_error(error, f"{path} cannot be opened") from error
            logger.error("%s is damaged and begun anew: %s", path, error)  # noqa: TRY400 - the file says it all
            _put_aside(path)
            self.replaced = True
            self._open(path, durable=durable)

    def _open(self, path: Path, *, durable: bool) -> None:
        try:
            self.conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
        except sqlite3.Error as error:
            raise store_error(error, f"{path} cannot be opened") from error
        level = "FULL" if durable else "NORMAL"  # NORMAL waits for the disk when the log is brought into the file
        self.conn.execute(f"PRAGMA synchronous = {level if is_flushing() else 'OFF'}")
        self.conn.execute("PRAGMA journal_mode = WAL")
        # a log that begins anew is cut to what it holds: its size says what was written
        self.conn.execute("PRAGMA journal_size_limit = 0")
        self._log = self._read_log()
        version = self._version()
        if version > len(self._steps):
            self.conn.close()
            raise StoreError(f"{path} has form {version}, this version reads up to {len(self._steps)}: update the SDK")
        if version < len(self._steps):
            self._migrate()

    def _open_to_read(self, path: Path) -> None:
        try:
            self.conn = read_only(path)
            version = self._version()
        except sqlite3.Error as error:
            raise store_error(error, f"{path} cannot be opened") from error
        if version != len(self._steps):
            self.conn.close()
            what = "update the SDK" if version > len(self._steps) else "start the device once, which updates it"
            raise StoreError(f"{path} has form {version}, this version reads {len(self._steps)}: {what}")

    def _migrate(self) -> None:
        with self.transaction():
            first = self._version()  # read again: another process may have been faster
            if (known := _made.get(tuple(self._steps))) is not None and not first:
                for sql in known:
                    self.conn.execute(sql)
                self.conn.execute(f"PRAGMA user_version = {len(self._steps)}")
                return
            from sqlite_utils import Database as Tables  # noqa: PLC0415 - takes a third of a second to import

            for number in range(first, len(self._steps)):
                self._steps[number](Tables(self.conn))
                self.conn.execute(f"PRAGMA user_version = {number + 1}")
        if not first and self._is_empty():
            sql = "SELECT sql FROM sqlite_master WHERE sql NOT NULL AND name NOT LIKE 'sqlite%' ORDER BY rowid"
            _made[tuple(self._steps)] = [text for (text,) in self.conn.execute(sql)]

    def _is_empty(self) -> bool:
        tables = self.conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return not any(self.conn.execute(f"SELECT 1 FROM [{name}] LIMIT 1").fetchone() for (name,) in tables)  # noqa: S608

    def _version(self) -> int:
        return int(self.conn.execute("PRAGMA user_version").fetchone()[0])

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
                self.undone()
                raise
        except sqlite3.Error as error:
            raise store_error(error, "the database refused a write") from error
        self._count_written()

    def undone(self) -> None:
        """A transaction was rolled back: what a subclass remembers of the tables may be wrong."""

    def _count_written(self) -> None:
        before, self._log = self._log, self._read_log()
        if self._log.number == before.number:
            # one that was cut held behind its header what a crash had left of the log before it
            grown = self._log.size - before.size
            self.written_bytes += grown if grown >= 0 else self._log.size
            return
        with suppress(OSError):  # the log before was brought into the file, each of its pages once
            self.written_bytes += self._log.size + min(before.size, self._path.stat().st_size)

    def _read_log(self) -> _Log:
        """How far the log has come: see https://www.sqlite.org/fileformat2.html#walformat."""
        try:
            descriptor = os.open(self._log_path, os.O_RDONLY | os.O_CLOEXEC)  # after every commit: a tenth of `open`
        except OSError:
            return _Log(0, 0)
        try:
            header, size = os.pread(descriptor, _LOG_HEADER_BYTES, 0), os.fstat(descriptor).st_size
        except OSError:
            return _Log(0, 0)
        finally:
            os.close(descriptor)
        return _Log(int.from_bytes(header[12:16]), size) if len(header) == _LOG_HEADER_BYTES else _Log(0, 0)

    def read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self.execute(sql, values).fetchall()

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        try:
            return self.conn.execute(sql, values)
        except sqlite3.Error as error:
            raise store_error(error, "the database failed") from error

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for every row."""
        try:
            self.conn.executemany(sql, rows)
        except sqlite3.Error as error:
            raise store_error(error, "the database failed") from error

    def execute_rows(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement, in which `VALUES ?` stands for rows, for all of them: some tens at a time.

        `sqlite3` lets other threads run at every row that `executemany` takes, and waits for its turn again after each.
        Where another thread is as busy, that costs more than the row does.
        """
        if not rows:
            return
        one = f"({', '.join('?' * len(rows[0]))})"
        size = _MAX_VALUES // len(rows[0])
        whole = len(rows) - len(rows) % size
        try:
            if whole:
                many = sql.replace("VALUES ?", f"VALUES {', '.join([one] * size)}")
                for first in range(0, whole, size):
                    self.conn.execute(many, list(chain.from_iterable(rows[first : first + size])))
            self.conn.executemany(sql.replace("VALUES ?", f"VALUES {one}"), rows[whole:])
        except sqlite3.Error as error:
            raise store_error(error, "the database failed") from error


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, also beside one that does. Raises `sqlite3.Error`."""
    uri = f"{path.resolve().as_uri()}?mode=ro"
    # where this user may make no file, nobody who could change the database has it open if there is no log
    if not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
        uri += "&immutable=1"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_S)


def copy_database(source: Path, target: Path) -> None:
    """A consistent copy of a database that may be in use, flushed, in one file. Neither readers nor writers wait.

    Raises:
        StoreError: It cannot be read, or the copy not written.
    """
    try:
        # one step: a copy in several begins anew whenever somebody writes
        with closing(read_only(source)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")
        with target.open("rb") as file:
            flush(file.fileno())
    except sqlite3.Error as error:
        raise store_error(error, f"{source} cannot be copied to {target}") from error


def store_error(error: sqlite3.Error, what: str) -> StoreError:
    """The typed error for a failed database operation: full disks are told from all others."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return DiskFullError(f"{what}: no room; free some space, nothing acknowledged is lost")
    return StoreError(f"{what}: {error}")


def _damaged(found: str) -> sqlite3.DatabaseError:
    """What SQLite would raise at the first read of a damaged page."""
    error = sqlite3.DatabaseError(found)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _put_aside(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.replace(path.with_name(f"{path.name}{suffix}.damaged"))
