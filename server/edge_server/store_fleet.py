"""What the analysis of the fleet reads, and what it keeps from one window to the next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import msgspec

from edge_sdk.database import Database
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import Report, Summary, unpack
from edge_server.freshness import Cell
from edge_server.labels import FIELDS


class FleetStore:
    """Streams over all devices, and the state of the drift test."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def members(self) -> dict[str, dict[str, str]]:
        """Devices that were not revoked, by name: their labels, and what is known of themselves (`labels.FIELDS`)."""
        columns = ", ".join(FIELDS.values())
        rows = self._db.read(f"SELECT {columns} FROM devices d WHERE d.revoked IS NULL ORDER BY d.name")  # noqa: S608
        facts = {row[0]: {key: value for key, value in zip(FIELDS, row, strict=True) if value} for row in rows}
        for device, key, value in self._db.read("SELECT device, key, value FROM labels"):
            if device in facts:
                facts[device].setdefault(key, value)
        for known in facts.values():
            if known.get("release") == "0":
                del known["release"]
        return facts

    def summaries(self, devices: Collection[str], *, since: float, until: float) -> Iterator[tuple[str, Summary]]:
        """Summaries of these devices that ended in (since, until], by device and time; without unreadable ones."""
        for device in sorted(devices):  # one by one, so that nothing has to be sorted
            rows = self._db.execute(
                "SELECT body FROM summaries WHERE device = ? AND hour >= ? AND hour <= ? ORDER BY hour, start",
                (device, int(since // 3600), int(until // 3600)),
            )
            for (body,) in rows:
                try:
                    message = unpack(body, Summary)
                except ProtocolError:
                    continue
                if since < message.end <= until:
                    yield device, message

    def marks(self) -> tuple[int, int]:
        """Numbers of the newest report and the newest event."""
        row = self._db.read(
            "SELECT (SELECT coalesce(max(id), 0) FROM reports), (SELECT coalesce(max(id), 0) FROM events)"
        )
        return row[0][0], row[0][1]

    def reports(self, *, after: int, to: int, limit: int) -> list[tuple[int, str, Report]]:
        """Number, device and report, in the order in which they came."""
        rows = self._db.read(
            "SELECT id, device, body FROM reports WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", after, to, limit
        )
        return [(row[0], row[1], unpack(row[2], Report)) for row in rows]

    def events_between(self, name: str, *, after: int, to: int) -> list[tuple[str, float, str]]:
        """Device, its time and the detail (JSON) of the events of a name, in the order in which they came."""
        rows = self._db.read(
            "SELECT device, time, detail FROM events WHERE name = ? AND id > ? AND id <= ? ORDER BY id", name, after, to
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def events_since(self, name: str, *, received: float) -> list[tuple[str, float, str]]:
        """As `events_between`, of those that came from then on."""
        rows = self._db.read(
            "SELECT device, time, detail FROM events WHERE name = ? AND received >= ? ORDER BY id", name, received
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def state(self, name: str) -> bytes | None:
        """What was kept under that name."""
        rows = self._db.read("SELECT body FROM fleet_state WHERE name = ?", name)
        return None if not rows else bytes(rows[0][0])

    def keep(self, name: str, body: bytes) -> None:
        """Keep something. Belongs inside a transaction."""
        self._db.execute("INSERT OR REPLACE INTO fleet_state (name, body) VALUES (?, ?)", (name, body))

    def add_cells(self, cells: Iterable[Cell]) -> None:
        """Add to what versions did on a day. Belongs inside a transaction."""
        self._db.execute_many(
            "INSERT INTO version_days (device, release, head, day, predictions, labelled, correct, start)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, release, head, day) DO UPDATE SET"
            " predictions = predictions + excluded.predictions, labelled = labelled + excluded.labelled,"
            " correct = correct + excluded.correct, start = min(start, excluded.start)",
            map(msgspec.structs.astuple, cells),
        )

    def cells(self) -> list[Cell]:
        """What every version did on every day."""
        rows = self._db.read(
            "SELECT device, release, head, day, predictions, labelled, correct, start FROM version_days"
            " ORDER BY device, release, head, day"
        )
        return [Cell(*row) for row in rows]
