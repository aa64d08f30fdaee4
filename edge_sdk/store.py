"""The device's database: the only place with SQL. SQLite in WAL mode, one writer (`step`)."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from edge_sdk.errors import DiskFullError, StoreError
from edge_sdk.files import crashpoint

logger = logging.getLogger(__name__)
Role = Literal["fresh", "replay", "judge"]
_ROW_BYTES = 120
"""What a logged row costs beside its latent."""
_HISTORY_ROWS = 2_000


class LoggedRow(NamedTuple):
    """A prediction that waits for its label."""

    id: str
    time: float
    latent: bytes
    predicted: str
    release: int
    head: int
    trunk: str


class Sample(NamedTuple):
    """A labelled latent, with the time of its input. `slot` is its place in the replay buffer, or None."""

    key: int
    time: float
    latent: bytes
    label: str
    role: Role
    slot: int | None


class OutboxRow(NamedTuple):
    """A message that the coordinator has not acknowledged. A gap stands for `first` to `seq`."""

    seq: int
    first: int
    kind: str
    time: float
    body: bytes


class HistoryEntry(NamedTuple):
    """Something that happened: seconds since the epoch, and an event as in docs/protocol.md."""

    key: int
    time: float
    name: str
    detail: dict[str, Any]


def _migrations() -> Any:
    from sqlite_utils import Migrations  # noqa: PLC0415 - takes a third of a second to import

    migrations = Migrations("edge_sdk")

    @migrations()
    def m001_first(db: Any) -> None:
        db["meta"].create({"key": str, "value": bytes}, pk="key")
        db["rows"].create(
            {"id": str, "time": float, "latent": bytes, "predicted": str, "release": int, "head": int, "trunk": str},
            pk="id",
        )
        db["rows"].create_index(["time"])
        db["samples"].create(
            {"key": int, "time": float, "latent": bytes, "label": str, "role": str, "slot": int, "trunk": str},
            pk="key",
            not_null={"latent", "label", "role", "trunk"},
        )
        db["samples"].create_index(["trunk", "role", "slot"])
        # AUTOINCREMENT, which sqlite-utils does not offer: a sequence number is never given twice
        db.execute(
            "CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, first INTEGER NOT NULL, kind TEXT NOT NULL,"
            " time REAL NOT NULL, body BLOB NOT NULL)"
        )
        db["history"].create({"key": int, "time": float, "name": str, "detail": str}, pk="key")

    return migrations


class Store:
    """Everything a device must remember.

    Writes happen inside `transaction`; every public method raises `StoreError`, or `DiskFullError` when there is no
    room. Not thread-safe: the device calls it under its step lock.

    A file that is damaged beyond use is put aside as `*.damaged` and begun anew: the device lives on, under another
    store id, and tells of it.

    Args:
        path: The database file; made if it is missing.
        durability: "full" flushes to the disk at every commit.
    """

    def __init__(self, path: Path, *, durability: Literal["full", "normal"] = "full") -> None:
        self.replaced = False
        """Whether a damaged file was put aside."""
        try:
            self._open(path, durability)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise _store_error(error, f"{path} cannot be opened") from error
            logger.error("%s is damaged and begun anew: %s", path, error)  # noqa: TRY400
            self.conn.close()
            for suffix in ("", "-wal", "-shm"):
                file = path.with_name(path.name + suffix)
                if file.exists():
                    file.replace(path.with_name(f"{path.name}{suffix}.damaged"))
            self.replaced = True
            self._open(path, durability)

    def _open(self, path: Path, durability: Literal["full", "normal"]) -> None:
        self.conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
        self.conn.execute("PRAGMA journal_mode = WAL")
        self.conn.execute(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
        self._migrate()

    def _migrate(self) -> None:
        from sqlite_utils import Database  # noqa: PLC0415 - slow to import

        if self.conn.execute("PRAGMA user_version").fetchone()[0] >= 1:
            return
        _migrations().apply(Database(self.conn))
        self.conn.execute("PRAGMA user_version = 1")

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
            raise _store_error(error, "the device's database refused a write") from error

    def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self.conn.execute(sql, parameters)
        except sqlite3.Error as error:
            raise _store_error(error, "the device's database failed") from error

    def _execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        try:
            self.conn.executemany(sql, rows)
        except sqlite3.Error as error:
            raise _store_error(error, "the device's database failed") from error

    # ---- small facts

    def get(self, key: str) -> bytes | None:
        """The value under `key`."""
        row = self._execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, key: str, value: bytes) -> None:
        """Set the value under `key`."""
        self._execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def delete(self, key: str) -> None:
        """Remove `key`."""
        self._execute("DELETE FROM meta WHERE key = ?", (key,))

    # ---- predictions that wait for labels

    def add_rows(self, rows: Iterable[LoggedRow]) -> None:
        """Log predictions."""
        self._execute_many("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def take_rows(self, ids: Sequence[str]) -> dict[str, LoggedRow]:
        """Remove and return the logged predictions among `ids`."""
        found: dict[str, LoggedRow] = {}
        for start in range(0, len(ids), 500):
            part = list(ids[start : start + 500])
            marks = ",".join("?" * len(part))
            for row in self._execute(f"SELECT * FROM rows WHERE id IN ({marks})", part):  # noqa: S608 - marks only
                found[row[0]] = LoggedRow(*row)
            self._execute(f"DELETE FROM rows WHERE id IN ({marks})", part)  # noqa: S608
        return found

    def waiting_ids(self, *, not_like: str) -> list[str]:
        """Ids of logged predictions that do not begin with `not_like`: those that the app gave."""
        rows = self._execute("SELECT id FROM rows WHERE substr(id, 1, ?) != ?", (len(not_like), not_like))
        return [row[0] for row in rows]

    def trim_rows(self, *, older_than: float, max_bytes: int) -> list[str]:
        """Drop logged predictions that are too old or too many; returns their ids."""
        dropped = self._execute("DELETE FROM rows WHERE time < ? RETURNING id", (older_than,)).fetchall()
        count, size = self._execute("SELECT count(*), coalesce(max(length(latent)), 0) FROM rows").fetchone()
        if (excess := count - max(1, max_bytes // (size + _ROW_BYTES))) > 0:
            dropped += self._execute(
                "DELETE FROM rows WHERE id IN (SELECT id FROM rows ORDER BY time LIMIT ?) RETURNING id", (excess,)
            ).fetchall()
        return [row[0] for row in dropped]

    # ---- labelled samples

    def add_sample(self, *, time: float, latent: bytes, label: str, role: Role, trunk: str) -> None:
        """Keep a labelled latent."""
        self._execute(
            "INSERT INTO samples (time, latent, label, role, trunk) VALUES (?, ?, ?, ?, ?)",
            (time, latent, label, role, trunk),
        )

    def samples(self, role: Role, trunk: str) -> list[Sample]:
        """The samples of a role whose latents come from `trunk`, by slot and then by age."""
        rows = self._execute(
            "SELECT key, time, latent, label, role, slot FROM samples WHERE role = ? AND trunk = ? ORDER BY slot, key",
            (role, trunk),
        )
        return [Sample(*row) for row in rows]

    def count_samples(self, role: Role, trunk: str, *, since: float = 0.0) -> int:
        """How many samples of a role there are, whose inputs came at `since` or later."""
        count = self._execute(
            "SELECT count(*) FROM samples WHERE role = ? AND trunk = ? AND time >= ?", (role, trunk, since)
        )
        return int(count.fetchone()[0])

    def newest_sample(self, role: Role, trunk: str) -> int:
        """Key of the newest sample of a role, or 0."""
        newest = self._execute("SELECT max(key) FROM samples WHERE role = ? AND trunk = ?", (role, trunk))
        return int(newest.fetchone()[0] or 0)

    def move_to_replay(self, key: int, slot: int, trunk: str) -> None:
        """A fresh sample takes a slot of the replay buffer; the one that was there is deleted."""
        self._execute("DELETE FROM samples WHERE role = 'replay' AND slot = ? AND trunk = ?", (slot, trunk))
        self._execute("UPDATE samples SET role = 'replay', slot = ? WHERE key = ?", (slot, key))

    def delete_samples(self, keys: Iterable[int]) -> None:
        """Forget samples."""
        self._execute_many("DELETE FROM samples WHERE key = ?", ((key,) for key in keys))

    def trim_samples(self, role: Role, trunk: str, keep: int) -> None:
        """Keep only the newest `keep` samples of a role."""
        self._execute(
            "DELETE FROM samples WHERE role = ? AND trunk = ? AND key NOT IN "
            "(SELECT key FROM samples WHERE role = ? AND trunk = ? ORDER BY key DESC LIMIT ?)",
            (role, trunk, role, trunk, keep),
        )

    def keep_trunks(self, trunks: Sequence[str]) -> None:
        """Drop samples and logged predictions whose latents no installed trunk can read."""
        marks = ",".join("?" * len(trunks))
        for table in ("samples", "rows"):
            self._execute(f"DELETE FROM {table} WHERE trunk NOT IN ({marks})", list(trunks))  # noqa: S608

    # ---- outbox

    def append(self, kind: str, time: float, body: bytes) -> int:
        """Put a message at the end of the outbox; returns its sequence number."""
        cursor = self._execute("INSERT INTO outbox (first, kind, time, body) VALUES (0, ?, ?, ?)", (kind, time, body))
        seq = int(cursor.lastrowid or 0)
        self._execute("UPDATE outbox SET first = ? WHERE seq = ?", (seq, seq))
        return seq

    def outbox(self, *, after: int = 0, limit: int = 1_000_000) -> list[OutboxRow]:
        """Unacknowledged messages above a sequence number, in order."""
        rows = self._execute(
            "SELECT seq, first, kind, time, body FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
        )
        return [OutboxRow(*row) for row in rows]

    def outbox_size(self) -> tuple[int, int, int]:
        """(rows, bytes, lowest sequence number held or 0)."""
        count, size, first = self._execute(
            "SELECT count(*), coalesce(sum(length(body) + 40), 0), coalesce(min(first), 0) FROM outbox"
        ).fetchone()
        return int(count), int(size), int(first)

    def acknowledge(self, seq: int) -> None:
        """Forget messages up to a sequence number."""
        self._execute("DELETE FROM outbox WHERE seq <= ?", (seq,))

    def replace_with_gap(self, rows: Sequence[OutboxRow], time: float, body: bytes) -> None:
        """A run of neighbouring messages becomes one gap."""
        self._execute_many("DELETE FROM outbox WHERE seq = ?", ((row.seq,) for row in rows))
        self._execute(
            "INSERT INTO outbox (seq, first, kind, time, body) VALUES (?, ?, 'gap', ?, ?)",
            (rows[-1].seq, rows[0].first, time, body),
        )

    # ---- history

    def record(self, time: float, name: str, detail: dict[str, Any]) -> None:
        """Note what happened, for `edge history`; the oldest notes are dropped."""
        cursor = self._execute(
            "INSERT INTO history (time, name, detail) VALUES (?, ?, ?)",
            (time, name, msgspec.json.encode(detail).decode()),
        )
        self._execute("DELETE FROM history WHERE key <= ?", (int(cursor.lastrowid or 0) - _HISTORY_ROWS,))

    def history(self, *, limit: int = 100, after: int = 0) -> list[HistoryEntry]:
        """The latest notes with a key above `after`, oldest first."""
        rows = self._execute(
            "SELECT key, time, name, detail FROM history WHERE key > ? ORDER BY key DESC LIMIT ?", (after, limit)
        ).fetchall()
        return [HistoryEntry(row[0], row[1], row[2], msgspec.json.decode(row[3])) for row in reversed(rows)]


def stack(latents: Sequence[bytes], dim: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Stored latents as uint8 [N, D]."""
    return np.frombuffer(b"".join(latents), dtype=np.uint8).reshape(len(latents), dim)


def _store_error(error: sqlite3.Error, what: str) -> StoreError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return DiskFullError(f"{what}: no room; free some space, the device goes on serving")
    return StoreError(f"{what}: {error}")
