"""The device's database: the only place with SQL. SQLite in WAL mode, one writer (`step`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from edge_sdk.database import Database
from edge_sdk.errors import IntegrityError, StoreError
from edge_sdk.seal import MARK, Seal, is_sealed

Role = Literal["fresh", "replay", "judge"]
_ROW_BYTES = 120
"""What a logged row costs beside its latent."""
_HISTORY_ROWS = 2_000
_LINEAGE_ROWS = 500
_SAMPLE = "key, time, latent, label, role, slot, slice, weight, mass, translated"
_SIZES = (128, 8, 1)
"""Rows or ids to a statement. Not as many as there are: a connection keeps its last 128 statements, of all sizes."""
_OF_TRUNKS = ("moments", "undo", "buffer", "strata")
"""Kinds of facts that are kept for each trunk, as "kind:first 16 characters of the trunk's id"."""


class LoggedRow(NamedTuple):
    """A prediction that waits for its label."""

    id: str
    time: float
    latent: bytes
    predicted: str
    release: int
    head: int
    trunk: str
    slice: str = ""
    """The app's own name for the part of the world it comes from."""
    weight: float = 1.0
    """How many predictions it stands for: above 1 if only some are logged."""
    holdout: bool = False
    """The app did not act on it."""
    guess: float | None = None
    """What a guess about it counted, that came before any truth; 0: nothing was learned from it; None: none came."""
    translated: bool = False
    """The latent was not made by its trunk, but mapped from that of another."""


class NewSample(NamedTuple):
    """A labelled latent to keep. `id` is that of its prediction, "" if there was none."""

    time: float
    latent: bytes
    label: str
    role: Role
    trunk: str
    id: str = ""
    source: str = ""
    slice: str = ""
    weight: float = 1.0
    translated: bool = False
    """The latent was not made by its trunk, but mapped from that of another."""


class Sample(NamedTuple):
    """A labelled latent, with the time of its input.

    `slot` is its place in the replay buffer, or None. `weight` is what it counts, below zero if the label is *not* this
    one. `mass` is what it has added to the device's moments.
    """

    key: int
    time: float
    latent: bytes
    label: str
    role: Role
    slot: int | None
    slice: str
    weight: float
    mass: float
    translated: bool = False


class Lineage(NamedTuple):
    """How a head came to be: what it was learned from, and what the gate said."""

    time: float
    release: int
    parent: int
    """The head in use then."""
    head: int | None
    """Its number, if it was promoted."""
    outcome: str
    """promoted, would_promote, rejected, superseded or learn_failed."""
    detail: dict[str, Any]
    """Reason, trigger, rows, settings, seed, cost and the verdict's numbers."""


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


def _first(db: Any) -> None:
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


def _second(db: Any) -> None:
    """Where labels come from, what they count, and how heads came to be."""
    for table, columns in {
        "rows": {"slice": (str, ""), "weight": (float, 1.0), "holdout": (int, 0)},
        "samples": {
            "id": (str, ""),
            "source": (str, ""),
            "slice": (str, ""),
            "weight": (float, 1.0),
            "mass": (float, 0.0),
        },
    }.items():
        for name, (kind, default) in columns.items():
            db[table].add_column(name, kind, not_null_default=default)
    db["samples"].create_index(["id"])
    db["lineage"].create(
        {"key": int, "time": float, "release": int, "parent": int, "head": int, "outcome": str, "detail": str}, pk="key"
    )


def _third(db: Any) -> None:
    """A truth may follow a guess."""
    db["rows"].add_column("guess", float)


def _fourth(db: Any) -> None:
    """Another trunk may take over from the one in use."""
    db["samples"].add_column("translated", int, not_null_default=0)
    db["pairs"].create({"id": str, "old": bytes, "new": bytes}, pk="id")
    db["inputs"].create({"id": str, "x": bytes}, pk="id")
    # an input goes with the last sample of its prediction, whatever makes that go
    db.execute(
        "CREATE TRIGGER forget_input AFTER DELETE ON samples WHEN old.id != '' BEGIN"
        " DELETE FROM inputs WHERE id = old.id AND NOT EXISTS (SELECT 1 FROM samples WHERE id = old.id); END"
    )


def _fifth(db: Any) -> None:
    """Predictions that wait for their label cross over to another trunk, too."""
    db["rows"].add_column("translated", int, not_null_default=0)


STEPS = (_first, _second, _third, _fourth, _fifth)


class Store(Database):
    """Everything a device must remember.

    Writes happen inside `transaction`; every public method raises `StoreError`, or `DiskFullError` when there is no
    room. Not thread-safe: the device calls it under its step lock.

    A file that is damaged beyond use is put aside as `*.damaged` and begun anew: the device lives on, under another
    store id, and tells of it.

    Args:
        path: The database file; made if it is missing.
        durability: "full" flushes to the disk at every commit.
        seal: Encrypts the inputs that are kept; None: they are kept as they are.
        writes: False: to look at, beside the device that has it.
    """

    def __init__(
        self,
        path: Path,
        *,
        durability: Literal["full", "normal"] = "full",
        seal: Seal | None = None,
        writes: bool = True,
    ) -> None:
        super().__init__(path, STEPS, durable=durability == "full", replace_damaged=True, writes=writes)
        self._seal = seal
        # what is erased is overwritten: some builds of SQLite leave it in free pages until they are used again
        self.execute("PRAGMA secure_delete = ON")
        self._tallies: dict[tuple[str, str], Counter[str]] = {}
        """Samples of each label, by role and trunk: counted once, then kept up to date: each flush asks."""
        self._waiting: tuple[int, int] | None = None
        """Logged predictions, perhaps fewer, and the bytes of their widest latent; None: not counted."""
        if seal is not None:
            self._seal_inputs(seal)

    def undone(self) -> None:
        """Count anew."""
        self._tallies, self._waiting = {}, None

    # ---- small facts

    def get(self, key: str) -> bytes | None:
        """The value under `key`."""
        row = self.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, key: str, value: bytes) -> None:
        """Set the value under `key`."""
        self.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def delete(self, key: str) -> None:
        """Drop the value under `key`."""
        self.execute("DELETE FROM meta WHERE key = ?", (key,))

    # ---- predictions that wait for labels

    def add_rows(self, rows: Sequence[LoggedRow]) -> None:
        """Log predictions.

        Many to a statement: at each, SQLite gives up the interpreter's lock and must wait for it while threads predict.
        """
        if self._waiting is not None:
            count, size = self._waiting
            self._waiting = count + len(rows), max([size, *(len(row.latent) for row in rows)])
        start = 0
        while start < len(rows):
            size = next(size for size in _SIZES if size <= len(rows) - start)
            part, start = rows[start : start + size], start + size
            marks = ", ".join([f"({', '.join('?' * len(LoggedRow._fields))})"] * len(part))
            values = [value for row in part for value in row]
            names = ", ".join(LoggedRow._fields)  # by name: a newer version may have added columns
            self.execute(f"INSERT OR REPLACE INTO rows ({names}) VALUES {marks}", values)  # noqa: S608 - no values

    def take_rows(self, ids: Sequence[str]) -> dict[str, LoggedRow]:
        """Remove and return the logged predictions among `ids`."""
        found = self.look_at_rows(ids)
        for marks, part in _lists(ids):
            self.execute(f"DELETE FROM rows WHERE id IN ({marks})", part)  # noqa: S608 - marks only
        self._fewer_wait(len(found))
        return found

    def _fewer_wait(self, gone: int) -> None:
        if self._waiting is not None:
            self._waiting = self._waiting[0] - gone, self._waiting[1]

    def look_at_rows(self, ids: Sequence[str]) -> dict[str, LoggedRow]:
        """The logged predictions among `ids`, which stay."""
        found: dict[str, LoggedRow] = {}
        for marks, part in _lists(ids):
            for row in self.execute(f"SELECT * FROM rows WHERE id IN ({marks})", part):  # noqa: S608 - marks only
                found[row[0]] = LoggedRow(*row)
        return found

    def set_guesses(self, guesses: Iterable[tuple[str, float]]) -> None:
        """Note what the guesses about logged predictions, by id, counted."""
        self.execute_many("UPDATE rows SET guess = ? WHERE id = ?", ((guess, name) for name, guess in guesses))

    def waiting_ids(self, *, not_like: str) -> list[str]:
        """Ids of logged predictions that no label came for and that do not begin with `not_like`: the app's own."""
        rows = self.execute(
            "SELECT id FROM rows WHERE guess IS NULL AND substr(id, 1, ?) != ?", (len(not_like), not_like)
        )
        return [row[0] for row in rows]

    def trim_rows(self, *, older_than: float, max_bytes: int) -> list[str]:
        """Drop logged predictions that are too old or too many; returns their ids."""
        dropped = self.execute("DELETE FROM rows WHERE time < ? RETURNING id", (older_than,)).fetchall()
        self._fewer_wait(len(dropped))
        if self._excess(max_bytes) > 0:
            self._waiting = None  # those that took the place of one of the same id were counted twice
            excess = max(0, self._excess(max_bytes))
            more = self.execute(
                "DELETE FROM rows WHERE id IN (SELECT id FROM rows ORDER BY time LIMIT ?) RETURNING id", (excess,)
            ).fetchall()
            self._fewer_wait(len(more))
            dropped += more
        return [row[0] for row in dropped]

    def _excess(self, max_bytes: int) -> int:
        if self._waiting is None:  # reads them all
            self._waiting = self.execute("SELECT count(*), coalesce(max(length(latent)), 0) FROM rows").fetchone()
        count, size = self._waiting
        return count - max(1, max_bytes // (size + _ROW_BYTES))

    # ---- labelled samples

    def add_samples(self, samples: Iterable[NewSample]) -> None:
        """Keep labelled latents."""
        new = list(samples)
        self.execute_many(
            "INSERT INTO samples (time, latent, label, role, trunk, id, source, slice, weight, translated)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            new,
        )
        for sample in new:
            if (tally := self._tallies.get((sample.role, sample.trunk))) is not None:
                tally[sample.label] += 1

    def waiting_rows(self, trunk: str, *, limit: int) -> list[LoggedRow]:
        """The newest logged predictions that no label came for and whose latents come from `trunk`, newest first."""
        rows = self.execute(
            "SELECT * FROM rows WHERE trunk = ? AND guess IS NULL ORDER BY time DESC, id DESC LIMIT ?", (trunk, limit)
        )
        return [LoggedRow(*row) for row in rows]

    def samples(self, role: Role, trunk: str) -> list[Sample]:
        """The samples of a role whose latents come from `trunk`, by slot and then by age."""
        rows = self.execute(
            f"SELECT {_SAMPLE} FROM samples WHERE role = ? AND trunk = ? ORDER BY slot, key",  # noqa: S608 - constants
            (role, trunk),
        )
        return [Sample(*row) for row in rows]

    def samples_of(self, ids: Sequence[str]) -> list[tuple[Sample, str]]:
        """The samples of these predictions, each with the trunk of its latent."""
        found: list[tuple[Sample, str]] = []
        for marks, part in _lists(ids):
            rows = self.execute(f"SELECT {_SAMPLE}, trunk FROM samples WHERE id IN ({marks})", part)  # noqa: S608
            found += [(Sample(*row[:-1]), row[-1]) for row in rows]
        return found

    def old_samples(self, *, before: float) -> list[tuple[Sample, str]]:
        """Samples of inputs older than a time, each with the trunk of its latent."""
        rows = self.execute(f"SELECT {_SAMPLE}, trunk FROM samples WHERE time < ?", (before,))  # noqa: S608
        return [(Sample(*row[:-1]), row[-1]) for row in rows]

    def samples_labelled(self, label: str) -> list[tuple[Sample, str]]:
        """The samples of a label, each with the trunk of its latent."""
        rows = self.execute(f"SELECT {_SAMPLE}, trunk FROM samples WHERE label = ?", (label,))  # noqa: S608
        return [(Sample(*row[:-1]), row[-1]) for row in rows]

    def count_labels(self, role: Role, trunk: str, *, since: float = 0.0) -> dict[str, int]:
        """How many samples of a role each label has, whose inputs came at `since` or later."""
        if since > 0:
            rows = self.execute(
                "SELECT label, count(*) FROM samples WHERE role = ? AND trunk = ? AND time >= ? GROUP BY label",
                (role, trunk, since),
            )
            return dict(rows.fetchall())
        return dict(self._tally(role, trunk))

    def _tally(self, role: Role, trunk: str) -> Counter[str]:
        if (tally := self._tallies.get((role, trunk))) is None:
            rows = self.execute(
                "SELECT label, count(*) FROM samples WHERE role = ? AND trunk = ? GROUP BY label", (role, trunk)
            )
            tally = self._tallies[role, trunk] = Counter(dict(rows.fetchall()))
        return tally

    def count_samples(self, role: Role, trunk: str, *, since: float = 0.0) -> int:
        """How many samples of a role there are, whose inputs came at `since` or later."""
        if since > 0:
            count = self.execute(
                "SELECT count(*) FROM samples WHERE role = ? AND trunk = ? AND time >= ?", (role, trunk, since)
            )
            return int(count.fetchone()[0])
        return self._tally(role, trunk).total()

    def newest_sample(self, role: Role, trunk: str) -> int:
        """Key of the newest sample of a role, or 0."""
        newest = self.execute("SELECT max(key) FROM samples WHERE role = ? AND trunk = ?", (role, trunk))
        return int(newest.fetchone()[0] or 0)

    def move_to_replay(self, key: int, slot: int, trunk: str, *, mass: float = 0.0) -> None:
        """A fresh sample takes a slot of the replay buffer; the one that was there is deleted."""
        self._tallies.clear()
        self.execute("DELETE FROM samples WHERE role = 'replay' AND slot = ? AND trunk = ?", (slot, trunk))
        self.execute("UPDATE samples SET role = 'replay', slot = ?, mass = ? WHERE key = ?", (slot, mass, key))

    def move_slot(self, trunk: str, old: int, new: int) -> None:
        """A replayed sample changes its place."""
        self.execute("UPDATE samples SET slot = ? WHERE role = 'replay' AND slot = ? AND trunk = ?", (new, old, trunk))

    def fade_mass(self, trunk: str, factor: float) -> None:
        """What samples have added to the device's moments has faded."""
        self.execute("UPDATE samples SET mass = mass * ? WHERE trunk = ? AND mass > 0", (factor, trunk))

    def set_mass(self, trunk: str, mass: Iterable[tuple[int, float]]) -> None:
        """These samples have added so much to the device's moments, and no others on this trunk anything."""
        self.execute("UPDATE samples SET mass = 0 WHERE trunk = ? AND mass > 0", (trunk,))
        self.execute_many("UPDATE samples SET mass = ? WHERE key = ?", ((value, key) for key, value in mass))

    def delete_samples(self, keys: Iterable[int]) -> None:
        """Forget samples."""
        self._tallies.clear()
        self.execute_many("DELETE FROM samples WHERE key = ?", ((key,) for key in keys))

    def trim_samples(self, role: Role, trunk: str, keep: int) -> None:
        """Keep only the newest `keep` samples of a role."""
        if self.count_samples(role, trunk) <= keep:
            return  # nearly always: what follows reads them all, at every flush
        self._tallies.clear()
        self.execute(
            "DELETE FROM samples WHERE role = ? AND trunk = ? AND key NOT IN "
            "(SELECT key FROM samples WHERE role = ? AND trunk = ? ORDER BY key DESC LIMIT ?)",
            (role, trunk, role, trunk, keep),
        )

    def keep_trunks(self, trunks: Sequence[str]) -> list[str]:
        """Drop samples, what is known of them and logged predictions whose latents no installed trunk can read.

        Returns:
            Ids of the predictions.
        """
        self._tallies, self._waiting = {}, None
        marks = ",".join("?" * len(trunks))
        self.execute(f"DELETE FROM samples WHERE trunk NOT IN ({marks})", list(trunks))  # noqa: S608 - marks only
        kept = {trunk[:16] for trunk in trunks}
        for (key,) in self.read("SELECT key FROM meta WHERE key LIKE '%:%'"):
            kind, _, trunk = key.partition(":")
            if kind in _OF_TRUNKS and trunk not in kept:
                self.delete(key)
        dropped = self.execute(f"DELETE FROM rows WHERE trunk NOT IN ({marks}) RETURNING id", list(trunks))  # noqa: S608
        return [row[0] for row in dropped.fetchall()]

    def delete_learned(self) -> None:
        """Forget all samples, rows that wait, and what was summed up of them."""
        self._tallies, self._waiting = {}, None
        self.execute("DELETE FROM samples")
        self.execute("DELETE FROM inputs")
        self.delete_pairs()
        self.execute("DELETE FROM rows")
        for kind in _OF_TRUNKS:
            self.execute("DELETE FROM meta WHERE key LIKE ?", (f"{kind}:%",))

    # ---- from one trunk to another

    def labelled(self, trunk: str, *, after: int = 0) -> list[NewSample]:
        """All samples whose latents come from `trunk` and whose key is above `after`, oldest first."""
        names = ", ".join(NewSample._fields)
        rows = self.execute(
            f"SELECT {names} FROM samples WHERE trunk = ? AND key > ? ORDER BY key",  # noqa: S608 - constants
            (trunk, after),
        )
        return [NewSample(*row) for row in rows]

    def waiting_latents(self, trunk: str) -> Iterator[list[tuple[str, bytes]]]:
        """Id and latent of the logged predictions whose latents come from `trunk`, some hundred at a time."""
        ids = [row[0] for row in self.execute("SELECT id FROM rows WHERE trunk = ?", (trunk,))]
        for _, part in _lists(ids):
            yield [(row.id, row.latent) for row in self.look_at_rows(part).values()]

    def move_rows(self, rows: Iterable[tuple[str, bytes]], trunk: str, *, translated: bool) -> None:
        """Give logged predictions, by id, latents of another trunk."""
        self._waiting = None
        self.execute_many(
            "UPDATE rows SET latent = ?, trunk = ?, translated = ? WHERE id = ?",
            ((latent, trunk, int(translated), name) for name, latent in rows),
        )

    def ids_of(self, keys: Sequence[int]) -> dict[int, str]:
        """The prediction of each of these samples; "" if there was none."""
        found: dict[int, str] = {}
        for marks, part in _lists(keys):
            found.update(self.execute(f"SELECT key, id FROM samples WHERE key IN ({marks})", part).fetchall())  # noqa: S608
        return found

    def newest_key(self, trunk: str) -> int:
        """Key of the newest sample whose latent comes from `trunk`, or 0."""
        return int(self.execute("SELECT coalesce(max(key), 0) FROM samples WHERE trunk = ?", (trunk,)).fetchone()[0])

    def delete_trunk(self, trunk: str, *, translated: bool = False) -> None:
        """Forget the samples of a trunk and what is known of them; `translated`: only what was translated to it."""
        self._tallies.clear()
        if translated:
            self.execute("DELETE FROM samples WHERE trunk = ? AND translated = 1", (trunk,))
            return
        self.execute("DELETE FROM samples WHERE trunk = ?", (trunk,))
        for kind in _OF_TRUNKS:
            self.delete(f"{kind}:{trunk[:16]}")

    def add_pairs(self, pairs: Iterable[tuple[str, bytes, bytes]]) -> None:
        """Keep what the trunk in use and the one in shadow made of inputs: prediction id, old latent, new latent."""
        self.execute_many("INSERT OR REPLACE INTO pairs (id, old, new) VALUES (?, ?, ?)", pairs)

    def pairs(self) -> list[tuple[str, bytes, bytes]]:
        """All of them, oldest first."""
        return [tuple(row) for row in self.execute("SELECT id, old, new FROM pairs ORDER BY rowid")]

    def count_pairs(self) -> int:
        """How many there are."""
        return int(self.execute("SELECT count(*) FROM pairs").fetchone()[0])

    def delete_pairs(self, ids: Sequence[str] | None = None) -> None:
        """Forget those of these predictions; None: all."""
        if ids is None:
            self.execute("DELETE FROM pairs")
        else:
            self.execute_many("DELETE FROM pairs WHERE id = ?", ((name,) for name in ids))

    def add_inputs(self, inputs: Iterable[tuple[str, bytes]], *, keep: int) -> None:
        """Keep the inputs of labelled predictions, the newest `keep` of all."""
        if (seal := self._seal) is not None:
            inputs = ((name, seal.close(name, data)) for name, data in inputs)
        self.execute_many("INSERT OR REPLACE INTO inputs (id, x) VALUES (?, ?)", inputs)
        self.execute(
            "DELETE FROM inputs WHERE rowid NOT IN (SELECT rowid FROM inputs ORDER BY rowid DESC LIMIT ?)", (keep,)
        )

    def input_of(self, name: str) -> bytes | None:
        """The input of a prediction, if it was kept.

        Raises:
            IntegrityError: It is encrypted, and this is not the key.
        """
        row = self.execute("SELECT x FROM inputs WHERE id = ?", (name,)).fetchone()
        if row is None or not is_sealed(data := bytes(row[0])):
            return None if row is None else bytes(row[0])
        if self._seal is None:
            raise IntegrityError("it is encrypted, and there is no key: set update.inputs_key_file")
        return self._seal.open(name, data)

    def _seal_inputs(self, seal: Seal) -> None:
        """Encrypt what was kept before there was a key."""
        rows = self.execute("SELECT id FROM inputs WHERE substr(x, 1, ?) != ?", (len(MARK), MARK)).fetchall()
        with self.transaction():
            for (name,) in rows:
                data = bytes(self.execute("SELECT x FROM inputs WHERE id = ?", (name,)).fetchone()[0])
                self.execute("UPDATE inputs SET x = ? WHERE id = ?", (seal.close(name, data), name))
        if rows:
            self.clear_log()

    def compact(self) -> None:
        """Give up the pages of deleted rows, and empty the log; outside a transaction.

        Raises:
            StoreError: Another process reads: what was deleted is still in the log. A retry helps.
        """
        self.execute("VACUUM")
        self.clear_log()

    def clear_log(self) -> None:
        """Bring what was written into the file and empty the log, which still holds what was erased.

        Outside a transaction.

        Raises:
            StoreError: Another process reads. A retry helps.
        """
        if self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise StoreError("another process reads the database: what was erased is still in its log; try again")

    # ---- outbox

    def append(self, kind: str, time: float, body: bytes) -> int:
        """Put a message at the end of the outbox; returns its sequence number."""
        cursor = self.execute("INSERT INTO outbox (first, kind, time, body) VALUES (0, ?, ?, ?)", (kind, time, body))
        seq = int(cursor.lastrowid or 0)
        self.execute("UPDATE outbox SET first = ? WHERE seq = ?", (seq, seq))
        return seq

    def outbox(self, *, after: int = 0, limit: int = 1_000_000) -> list[OutboxRow]:
        """Unacknowledged messages above a sequence number, in order."""
        rows = self.execute(
            "SELECT seq, first, kind, time, body FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
        )
        return [OutboxRow(*row) for row in rows]

    def outbox_size(self) -> tuple[int, int, int]:
        """(rows, bytes, lowest sequence number held or 0)."""
        count, size, first = self.execute(
            "SELECT count(*), coalesce(sum(length(body) + 40), 0), coalesce(min(first), 0) FROM outbox"
        ).fetchone()
        return int(count), int(size), int(first)

    def acknowledge(self, seq: int) -> None:
        """Forget messages up to a sequence number."""
        self.execute("DELETE FROM outbox WHERE seq <= ?", (seq,))

    def replace_with_gap(self, rows: Sequence[OutboxRow], time: float, body: bytes) -> None:
        """A run of neighbouring messages becomes one gap."""
        self.execute_many("DELETE FROM outbox WHERE seq = ?", ((row.seq,) for row in rows))
        self.execute(
            "INSERT INTO outbox (seq, first, kind, time, body) VALUES (?, ?, 'gap', ?, ?)",
            (rows[-1].seq, rows[0].first, time, body),
        )

    # ---- history

    def record(self, time: float, name: str, detail: dict[str, Any]) -> None:
        """Note what happened, for `edge history`; the oldest notes are dropped."""
        cursor = self.execute(
            "INSERT INTO history (time, name, detail) VALUES (?, ?, ?)",
            (time, name, msgspec.json.encode(detail).decode()),
        )
        self.execute("DELETE FROM history WHERE key <= ?", (int(cursor.lastrowid or 0) - _HISTORY_ROWS,))

    def history(self, *, limit: int = 100, after: int = 0) -> list[HistoryEntry]:
        """The latest notes with a key above `after`, oldest first."""
        rows = self.execute(
            "SELECT key, time, name, detail FROM history WHERE key > ? ORDER BY key DESC LIMIT ?", (after, limit)
        ).fetchall()
        return [HistoryEntry(row[0], row[1], row[2], msgspec.json.decode(row[3])) for row in reversed(rows)]

    # ---- how heads came to be

    def record_lineage(self, entry: Lineage) -> None:
        """Note how a head came to be, or why it did not; the oldest notes are dropped."""
        cursor = self.execute(
            "INSERT INTO lineage (time, release, parent, head, outcome, detail) VALUES (?, ?, ?, ?, ?, ?)",
            (*entry[:-1], msgspec.json.encode(entry.detail).decode()),
        )
        self.execute("DELETE FROM lineage WHERE key <= ?", (int(cursor.lastrowid or 0) - _LINEAGE_ROWS,))

    def lineage(self, *, limit: int = 100) -> list[Lineage]:
        """The latest of these notes, oldest first."""
        rows = self.execute(
            "SELECT time, release, parent, head, outcome, detail FROM lineage ORDER BY key DESC LIMIT ?", (limit,)
        ).fetchall()
        return [Lineage._make((*row[:5], msgspec.json.decode(row[5]))) for row in reversed(rows)]


def _lists(values: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Marks and values for IN (...): few sizes of lists, filled up with their last value."""
    most, few, _ = _SIZES
    for start in range(0, len(values), most):
        part = list(values[start : start + most])
        size = few if len(part) <= few else most
        yield ",".join("?" * size), part + part[-1:] * (size - len(part))


def stack(latents: Sequence[bytes], dim: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Stored latents as uint8 [N, D]."""
    return np.frombuffer(b"".join(latents), dtype=np.uint8).reshape(len(latents), dim)
