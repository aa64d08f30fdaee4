"""Sums over minutes, hours and days, which outlive the rows that they are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edge_sdk.database import Database
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import Summary, from_buckets, raw, to_buckets, unpack
from edge_sdk.sketch import QuantileSketch
from edge_server.records import RollupRecord
from edge_server.rows import from_row
from edge_server.summaries import add_up, day_of

MINUTE, HOUR, DAY = 60, 3_600, 86_400
SPANS = (MINUTE, HOUR, DAY)
"""Seconds."""
_COUNTS = ("reports", "predictions", "errors", "labelled", "correct", "alarmed", "warned", "received_bytes")
_ADD = ", ".join(f"{name} = {name} + excluded.{name}" for name in _COUNTS)
_ROLL_UP = (
    f"INSERT INTO rollups (device, span, start, release, {', '.join(_COUNTS)}, latency)"  # noqa: S608 - constants
    " SELECT device, ?1, CAST(start / ?1 AS INTEGER) * ?1 AS bucket, release, count(*), sum(predictions), sum(errors),"
    " sum(labelled), sum(correct), sum(alarms > 0), sum(warnings > 0), sum(length(body)), x''"
    " FROM reports WHERE id > ?2 AND id <= ?3 GROUP BY device, bucket, release"
    f" ON CONFLICT (device, span, start, release) DO UPDATE SET {_ADD}"
)
_RAW = ("reports", "events", "rejected", "gaps")
"""Tables whose numbers rise as rows come in."""
_MAX_PARTS = 100
"""Of one day of one device, added up at once: a quarter of a millisecond each."""


class RollupStore:
    """Roll-ups, and the deletion of what is too old. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add_reports(self, limit: int) -> int:
        """Add the next reports, `limit` at most, to the sums they belong to; returns how many."""
        last = self._cursor("reports")
        rows = self._db.read(
            "SELECT count(*), max(id) FROM (SELECT id FROM reports WHERE id > ? ORDER BY id LIMIT ?)", last, limit
        )
        count, upto = rows[0]
        if count:
            for span in SPANS:
                self._db.execute(_ROLL_UP, (span, last, upto))
            self._move("reports", upto)
        return int(count)

    def add_summaries(self, limit: int) -> int:
        """Add the latencies of the next summaries, `limit` at most, to hours and days; returns how many."""
        rows = self._db.read(
            "SELECT rowid, device, start, release, body FROM summaries WHERE rowid > ? ORDER BY rowid LIMIT ?",
            self._cursor("summaries"),
            limit,
        )
        merged: dict[tuple[str, int, int, int], QuantileSketch] = {}
        for _, device, start, release, body in rows:
            try:
                sketch = _sketch(unpack(body, Summary).latency)
            except (ProtocolError, ValueError):  # of a form that was once taken in
                continue
            if sketch.count:
                for span in (HOUR, DAY):
                    key = (device, span, int(start // span) * span, release)
                    merged.setdefault(key, QuantileSketch()).merge(sketch)
        for key, sketch in merged.items():
            for (before,) in self._db.read(
                "SELECT latency FROM rollups WHERE device = ? AND span = ? AND start = ? AND release = ?", *key
            ):
                sketch.merge(_sketch(before))
            self._db.execute(
                "INSERT INTO rollups (device, span, start, release, latency) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (device, span, start, release) DO UPDATE SET latency = excluded.latency",
                (*key, to_buckets(*sketch.to_wire())),
            )
        if rows:
            self._move("summaries", rows[-1][0])
        return len(rows)

    def add_up_days(self, *, before: float, limit: int) -> int:
        """Add up summaries of hours by device and day, for days that ended before that time.

        A sum takes the place of the last of its parts: so no number is given twice, and no latency is added again to
        what `add_summaries` has made of them.

        Args:
            before: Seconds since the epoch, by the devices' clocks.
            limit: Most days of a device that are added up.

        Returns:
            How many were.
        """
        known = self._cursor("summaries")
        rows = self._db.read(
            f"SELECT rowid, device, body FROM summaries WHERE span = {HOUR} AND hour < ? AND rowid <= ?"  # noqa: S608
            " ORDER BY hour LIMIT ?",
            int(before // DAY) * 24,
            known,
            limit,
        )
        done: set[int] = set()
        for number, device, body in rows:
            if number not in done and (first := _readable(body)) is not None:
                done |= self._add_up_day(device, day_of(first), known)
        self._mark(number for number, *_ in rows if number not in done)
        return len(rows)

    def _add_up_day(self, device: str, day: int, known: int) -> set[int]:
        """Numbers of the rows that need no second look."""
        rows = self._db.read(
            # what was added up already comes last: with it, however many there are, the others become one in the end
            "SELECT rowid, received, body FROM summaries WHERE rowid IN (SELECT rowid FROM summaries WHERE device = ?"
            " AND hour BETWEEN ? AND ? AND rowid <= ? ORDER BY span, hour, start LIMIT ?) ORDER BY hour, start",
            *(device, day * 24, day * 24 + 24, known, _MAX_PARTS),
        )
        told = [(row, message) for row in rows if (message := _readable(row[2])) is not None and day_of(message) == day]
        for places, message in add_up([message for _, message in told]):
            parts = [told[place][0] for place in places]
            numbers = [number for number, *_ in parts]
            key = (int(message.end // HOUR), message.start)
            if len(parts) == 1 or day_of(message) != day or self._is_taken(device, key, numbers):
                # windows that overlap in odd ways stay as they came
                self._mark(numbers)
                continue
            stays = max(numbers)
            self._db.execute_many("DELETE FROM summaries WHERE rowid = ?", [(n,) for n in numbers if n != stays])
            self._db.execute(
                f"UPDATE summaries SET span = {DAY}, hour = ?, start = ?, received = ?, rows = ?, body = ?"  # noqa: S608
                " WHERE rowid = ?",
                (*key, max(received for _, received, _ in parts), message.rows, bytes(raw(message)), stays),
            )
        return {number for (number, *_), _ in told}

    def _mark(self, numbers: Iterable[int]) -> None:
        """These stand for their part of a day."""
        self._db.execute_many(
            f"UPDATE summaries SET span = {DAY} WHERE rowid = ?",  # noqa: S608 - a constant
            [(number,) for number in numbers],
        )

    def _is_taken(self, device: str, key: tuple[int, float], parts: Sequence[int]) -> bool:
        rows = self._db.read("SELECT rowid FROM summaries WHERE device = ? AND hour = ? AND start = ?", device, *key)
        return any(number not in parts for (number,) in rows)

    def drop_summaries(self, *, before: float, limit: int) -> int:
        """Delete summaries of days that ended before that time, by the devices' clocks, `limit` at most; how many."""
        cursor = self._db.execute(
            f"DELETE FROM summaries WHERE rowid IN (SELECT rowid FROM summaries WHERE span = {DAY} AND hour < ?"  # noqa: S608
            " AND rowid < (SELECT max(rowid) FROM summaries) LIMIT ?)",
            (int(before // HOUR), limit),
        )
        return cursor.rowcount

    def drop_rows(self, table: str, *, before: float, limit: int) -> int:
        """Delete the oldest rows of a table that came before that time, `limit` at most; returns how many.

        Never the newest row, whose number the next one follows, and no report that has not been added to the sums.
        """
        if table not in _RAW:
            raise ValueError(f"rows of {' or '.join(_RAW)} can be dropped, not of {table!r}")
        newest = self._cursor(table) if table == "reports" else self._db.read(f"SELECT max(id) FROM {table}")[0][0]  # noqa: S608
        cursor = self._db.execute(
            # numbers rise with the time of arrival, so this ends at the first that is too young
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE id < ? AND received < ?"  # noqa: S608
            " ORDER BY id LIMIT ?)",
            (newest or 0, before, limit),
        )
        return cursor.rowcount

    def drop_sums(self, span: int, *, before: float, limit: int) -> int:
        """Delete sums over `span` seconds that began before that time, `limit` at most; returns how many."""
        cursor = self._db.execute(
            "DELETE FROM rollups WHERE id IN (SELECT id FROM rollups WHERE span = ? AND start < ? LIMIT ?)",
            (span, before, limit),
        )
        return cursor.rowcount

    def of_device(self, device: str, *, span: int, since: float, until: float) -> list[RollupRecord]:
        """The sums of one device, oldest first."""
        rows = self._db.read(
            f"SELECT {_columns()} FROM rollups WHERE device = ? AND span = ? AND start >= ? AND start < ?"  # noqa: S608
            " ORDER BY start, release",
            device,
            span,
            since,
            until,
        )
        return [from_row(RollupRecord, row) for row in rows]

    def of_fleet(self, *, span: int, since: float, until: float) -> list[RollupRecord]:
        """The sums of all devices together, by release, oldest first; without latencies."""
        rows = self._db.read(
            f"SELECT '', span, start, release, {', '.join(f'sum({name})' for name in _COUNTS)}, x''"  # noqa: S608
            " FROM rollups WHERE span = ? AND start >= ? AND start < ? GROUP BY start, release ORDER BY start, release",
            span,
            since,
            until,
        )
        return [from_row(RollupRecord, row) for row in rows]

    def _cursor(self, table: str) -> int:
        rows = self._db.read("SELECT last FROM rolled_up WHERE name = ?", table)
        return rows[0][0] if rows else 0

    def _move(self, table: str, last: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO rolled_up (name, last) VALUES (?, ?)", (table, last))


def latency_ms(records: Iterable[RollupRecord], q: float) -> float | None:
    """A quantile of the latencies of these sums together, in ms; None without any."""
    sketch = QuantileSketch()
    for record in records:
        sketch.merge(_sketch(record.latency))
    return sketch.quantile(q) if sketch.count else None


def _readable(body: bytes) -> Summary | None:
    try:
        return unpack(body, Summary)
    except ProtocolError:  # of a form that was once taken in
        return None


def _sketch(buckets: bytes) -> QuantileSketch:
    return QuantileSketch.from_wire(*from_buckets(buckets))


def _columns() -> str:
    return f"device, span, start, release, {', '.join(_COUNTS)}, latency"
