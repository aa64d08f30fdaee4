"""Who belongs to the fleet, and how each was last heard."""

from __future__ import annotations

from edge_sdk.database import Database
from edge_server.records import DeviceRecord, FleetRecord, Glance, health_of
from edge_server.rows import from_row, to_json

_DEVICE = """
    name, group_name, credential IS NOT NULL, online, reason, coalesce(row_release, state_release),
    coalesce(row_head, state_head), mode, sdk, last_seen, predictions, errors, labelled, correct, alarms,
    warnings, revoked IS NOT NULL, hardware,
    (SELECT json_group_object(l.key, l.value) FROM labels l WHERE l.device = devices.name),
    disk_free_mb, memory_free_mb, memory_total_mb
"""


class DeviceStore:
    """Devices. Writes belong inside a transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, name: str, *, group: str, credential: str, now: float) -> bool:
        """Register a device; False if the name is taken. Belongs inside a transaction."""
        cursor = self._db.execute(
            "INSERT OR IGNORE INTO devices (name, group_name, credential, registered) VALUES (?, ?, ?, ?)",
            (name, group, credential, now),
        )
        return cursor.rowcount == 1

    def get(self, name: str) -> DeviceRecord | None:
        """The device of that name."""
        rows = self._db.read(f"SELECT {_DEVICE} FROM devices WHERE name = ?", name)  # noqa: S608 - a constant
        return from_row(DeviceRecord, rows[0]) if rows else None

    def page(self, *, group: str | None, after: str, limit: int) -> list[DeviceRecord]:
        """Devices whose name comes after `after`, in order."""
        rows = self._db.read(
            f"SELECT {_DEVICE} FROM devices WHERE name > ? AND (?2 IS NULL OR group_name = ?2)"  # noqa: S608
            " ORDER BY name LIMIT ?3",
            after,
            group,
            limit,
        )
        return [from_row(DeviceRecord, row) for row in rows]

    def named(self, names: list[str]) -> list[DeviceRecord]:
        """The devices of these names, in this order, as far as there are."""
        rows = self._db.read(
            f"SELECT {_DEVICE} FROM devices WHERE name IN (SELECT value FROM json_each(?))",  # noqa: S608
            to_json(names),
        )
        found = {record.name: record for record in (from_row(DeviceRecord, row) for row in rows)}
        return [found[name] for name in names if name in found]

    def glance(self) -> list[Glance]:
        """Every device that was not revoked, by group and name."""
        rows = self._db.read(
            "SELECT name, group_name, coalesce(row_release, state_release), last_seen, online, errors, alarms"
            " FROM devices WHERE revoked IS NULL ORDER BY group_name, name"
        )
        return [Glance(row[0], row[1], row[2], health_of(*row[3:])) for row in rows]

    def machines(self, *, since: float) -> list[tuple[str, str, int | None, int | None, int | None]]:
        """(group, name, disk_free_mb, memory_free_mb, memory_total_mb) of those heard of since and not revoked."""
        rows = self._db.read(
            "SELECT group_name, name, disk_free_mb, memory_free_mb, memory_total_mb FROM devices"
            " WHERE revoked IS NULL AND last_seen >= ? ORDER BY group_name, name",
            since,
        )
        return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]

    def forget_presence(self) -> None:
        """Set every device offline."""
        self._db.execute("UPDATE devices SET online = 0 WHERE online")

    def replace(self, name: str, *, credential: str) -> bool:
        """Enrol a device anew; False if it was never added. Belongs inside a transaction."""
        cursor = self._db.execute(
            "UPDATE devices SET credential = ?, enrolment = enrolment + 1, revoked = NULL"
            " WHERE name = ? AND credential IS NOT NULL",
            (credential, name),
        )
        return cursor.rowcount == 1

    def revoke(self, name: str, *, now: float) -> bool:
        """Turn a device away from now on; False if it is unknown. Belongs inside a transaction."""
        cursor = self._db.execute("UPDATE devices SET revoked = coalesce(revoked, ?) WHERE name = ?", (now, name))
        return cursor.rowcount == 1

    def credentials(self) -> list[tuple[str, str]]:
        """(name, hashed password) of every enrolled device that was not revoked."""
        rows = self._db.read(
            "SELECT name, credential FROM devices WHERE credential IS NOT NULL AND revoked IS NULL ORDER BY name"
        )
        return [(row[0], row[1]) for row in rows]

    def enrolment(self, name: str) -> int | None:
        """How often the device was enrolled; None: never, or it was revoked."""
        rows = self._db.read(
            "SELECT enrolment FROM devices WHERE name = ? AND credential IS NOT NULL AND revoked IS NULL", name
        )
        return int(rows[0][0]) if rows else None

    def enrolments(self, name: str) -> int:
        """How often the device was enrolled, revoked or not."""
        rows = self._db.read("SELECT enrolment FROM devices WHERE name = ?", name)
        return int(rows[0][0]) if rows else 0

    def enrolled(self) -> list[tuple[str, str]]:
        """(name, group) of every enrolled device that was not revoked, by name."""
        rows = self._db.read(
            "SELECT name, group_name FROM devices WHERE credential IS NOT NULL AND revoked IS NULL ORDER BY name"
        )
        return [(row[0], row[1]) for row in rows]

    def in_other_modes(self, *, not_told_since: float) -> list[tuple[str, str]]:
        """(name, mode of its group) of enrolled devices that are online in another mode, and were not told since."""
        rows = self._db.read(
            "SELECT d.name, g.mode FROM devices d JOIN groups g ON g.name = d.group_name WHERE g.mode <> ''"
            " AND d.online AND d.mode <> g.mode AND d.credential IS NOT NULL AND d.revoked IS NULL AND NOT EXISTS"
            " (SELECT 1 FROM commands c WHERE c.device = d.name AND c.issued > ? AND c.name = 'mode'"
            " AND json_extract(c.args, '$.mode') = g.mode) ORDER BY d.name",
            not_told_since,
        )
        return [(row[0], row[1]) for row in rows]

    def fleet(self) -> FleetRecord:
        """The fleet in numbers, without devices that were revoked."""
        totals = self._db.read(
            "SELECT count(*), coalesce(sum(online), 0), coalesce(sum(alarms > 0), 0),"
            " coalesce(sum(predictions), 0), coalesce(sum(labelled), 0), coalesce(sum(correct), 0)"
            " FROM devices WHERE revoked IS NULL"
        )[0]
        releases = self._db.read(
            "SELECT coalesce(row_release, state_release), count(*) FROM devices WHERE revoked IS NULL"
            " GROUP BY 1 ORDER BY 1"
        )
        return FleetRecord(
            devices=totals[0],
            online=totals[1],
            in_drift=totals[2],
            predictions=totals[3],
            labelled=totals[4],
            correct=totals[5],
            releases={"none" if row[0] is None else str(row[0]): row[1] for row in releases},
            counters=dict(self._pairs("SELECT name, value FROM counters ORDER BY name")),
            unknown_devices=dict(self._pairs("SELECT device, messages FROM unknown ORDER BY device")),
        )

    def _pairs(self, sql: str) -> list[tuple[str, int]]:
        return [(row[0], row[1]) for row in self._db.read(sql)]
