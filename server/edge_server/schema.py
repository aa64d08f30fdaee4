"""The database's tables, and the steps from each earlier form to the present one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database

_ROW = {"device": str, "store_id": str, "seq": int, "time": float, "received": float}


def _first_tables(db: Database) -> None:
    db.table("devices").create(
        {
            "name": str,
            "group_name": str,
            "registered": float,
            "credential": str,
            "store_id": str,
            "online": int,
            "reason": str,
            "boot": int,
            "digest": str,
            "mode": str,
            "sdk": str,
            # what the retained state says, and what the last committed row says: only the latter
            # decides rollouts
            "state_release": int,
            "state_head": int,
            "row_release": int,
            "row_head": int,
            "row_time": float,
            "last_seen": float,
            "predictions": int,
            "errors": int,
            "labelled": int,
            "correct": int,
            "alarms": int,
            "warnings": int,
        },
        pk="name",
        not_null={"group_name", "registered"},
        defaults={
            "online": 0,
            "reason": "",
            "boot": 0,
            "mode": "",
            "sdk": "",
            "predictions": 0,
            "errors": 0,
            "labelled": 0,
            "correct": 0,
            "alarms": 0,
            "warnings": 0,
        },
    )
    db.table("devices").create_index(["group_name", "name"])
    db.table("positions").create({"device": str, "store_id": str, "last_seq": int}, pk=("device", "store_id"))
    counts = {"predictions": int, "errors": int, "labelled": int, "correct": int}
    db.table("reports").create(
        {"id": int, **_ROW, "start": float, "release": int, "head": int, **counts, "body": bytes}, pk="id"
    )
    db.table("events").create(
        {"id": int, **_ROW, "name": str, "release": int, "head": int, "subject": int, "detail": str}, pk="id"
    )
    db.table("rejected").create({"id": int, **_ROW, "kind": str, "reason": str, "body": bytes}, pk="id")
    for name in ("reports", "events", "rejected"):
        db.table(name).create_index(["device", "store_id", "seq"], unique=True)
    db.table("reports").create_index(["device", "id"])
    db.table("reports").create_index(["release", "device"])
    db.table("reports").create_index(["start"])
    db.table("events").create_index(["device", "id"])
    db.table("events").create_index(["subject", "name"])
    db.table("gaps").create(
        {
            "id": int,
            "device": str,
            "store_id": str,
            "first": int,
            "last": int,
            "source": str,
            "received": float,
        },
        pk="id",
    )
    db.table("gaps").create_index(["device", "store_id", "first"], unique=True)
    db.table("releases").create(
        {
            "release": int,
            "name": str,
            "digest": str,
            "size": int,
            "parent": str,
            "labels": str,
            "metrics": str,
            "pushed": float,
        },
        pk="release",
    )
    db.table("groups").create({"name": str, "revision": int, "base": int, "revoked": str, "desired": bytes}, pk="name")
    db.table("rollouts").create(
        {
            "id": int,
            "group_name": str,
            "release": int,
            "active": int,
            "started": float,
            "plan": str,
            "state": str,
        },
        pk="id",
    )
    db.table("rollouts").create_index(["active"])
    db.table("counters").create({"name": str, "value": int}, pk="name")
    db.table("unknown").create({"device": str, "messages": int, "last_seen": float}, pk="device")
    db.table("audit").create({"id": int, "time": float, "actor": str, "action": str, "detail": str}, pk="id")


def _summaries(db: Database) -> None:
    db.table("summaries").create(
        {
            "device": str,
            "hour": int,
            "time": float,
            "received": float,
            "release": int,
            "head": int,
            "reference": str,
            "rows": int,
            "body": bytes,
        },
        pk=("device", "hour"),
    )


def _identities_and_commands(db: Database) -> None:
    db.table("devices").add_column("enrolment", int, not_null_default=1)
    db.table("devices").add_column("revoked", float)
    db.table("certificates").create(
        {
            "serial": str,
            "device": str,
            "pem": str,
            "issued": float,
            "expires": float,
            "command": str,
            "in_use": int,  # the device has it: it came with the bundle, or the device said so
            "revoked": float,
        },
        pk="serial",
        not_null={"device", "pem", "issued", "expires"},
        defaults={"in_use": 0},
    )
    db.table("certificates").create_index(["device"])
    db.table("commands").create(
        {
            "id": str,
            "device": str,
            "name": str,
            "args": str,
            "issued": float,
            "expires": float,
            "actor": str,
            "outcome": str,
            "answered": float,
            "reason": str,
            "result": str,
        },
        pk="id",
        defaults={"outcome": "waiting", "reason": "", "result": ""},
    )
    db.table("commands").create_index(["outcome", "device"])


def _summaries_of_every_version(db: Database) -> None:
    # two versions may serve within an hour: each tells of its own part
    db.table("summaries").add_column("start", float, not_null_default=0.0)
    db.table("summaries").transform(pk=("device", "hour", "start"))


def _fleet(db: Database) -> None:
    db.table("fleet_state").create({"name": str, "body": bytes}, pk="name", not_null={"body"})
    db.table("events").create_index(["name", "received"])


def _alerts(db: Database) -> None:
    db.table("alerts").create(
        {
            "id": int,
            "kind": str,
            "cause": str,
            "severity": str,
            "status": str,
            "since": float,
            "raised": float,
            "resolved": float,
            "body": str,
        },
        pk="id",
    )
    db.table("alerts").create_index(["status", "resolved"])
    db.table("silences").create(
        {
            "id": int,
            "kind": str,
            "cause": str,
            "device": str,
            "until": float,
            "actor": str,
            "reason": str,
            "created": float,
        },
        pk="id",
    )
    db.table("deliveries").create(
        {
            "id": int,
            "alert": int,
            "sink": str,
            "body": str,
            "created": float,
            "attempts": int,
            "next_at": float,
            "done": float,  # delivered, or given up if there is an error
            "error": str,
        },
        pk="id",
        defaults={"attempts": 0, "error": ""},
    )
    db.table("deliveries").create_index(["done", "sink", "id"])


def _rollouts_by_many_gates(db: Database) -> None:
    db.table("groups").add_column("mode", str, not_null_default="")
    db.table("candidates").create(
        {
            "digest": str,
            "name": str,
            "release": int,
            "champion": int,
            "verdict": str,
            "reason": str,
            "built": float,
            "report": str,
        },
        pk="digest",
    )
    # gates read the summaries that came since the last look
    db.table("summaries").create_index(["received"])
    db.table("commands").create_index(["device", "issued"])


def _reports_in_columns(db: Database) -> None:
    # so that they can be rolled up without being read one by one
    reports = db.table("reports")
    reports.add_column("mode", str, not_null_default="")
    reports.add_column("alarms", int, not_null_default=0)
    reports.add_column("warnings", int, not_null_default=0)


def _rollups(db: Database) -> None:
    counts = ("reports", "predictions", "errors", "labelled", "correct", "alarmed", "warned", "received_bytes")
    db.table("rollups").create(
        {
            "id": int,
            "device": str,
            "span": int,
            "start": int,
            "release": int,
            **dict.fromkeys(counts, int),
            "latency": bytes,
        },
        pk="id",
        not_null={"device", "span", "start", "release", "latency"},
        defaults=dict.fromkeys(counts, 0),
    )
    db.table("rollups").create_index(["device", "span", "start", "release"], unique=True)
    db.table("rollups").create_index(["span", "start"])
    db.table("rolled_up").create({"name": str, "last": int}, pk="name")


def _labels(db: Database) -> None:
    db.table("devices").add_column("hardware", str, not_null_default="")
    # asked for with every batch, and few
    db.execute("CREATE INDEX idx_devices_revoked ON devices (revoked) WHERE revoked IS NOT NULL")
    db.table("labels").create({"device": str, "key": str, "value": str}, pk=("device", "key"), not_null={"value"})
    db.table("labels").create_index(["key", "value"])
    db.table("audit").create_index(["time"])


def _version_days(db: Database) -> None:
    db.table("version_days").create(
        {"device": str, "release": int, "head": int, "day": int, "start": float, "predictions": int, "labelled": int,
         "correct": int},
        pk=("device", "release", "head", "day"),
    )  # fmt: skip
    db.execute(
        "INSERT INTO version_days SELECT device, release, head, CAST(start / 86400 AS INTEGER) AS day, min(start),"
        " sum(predictions), sum(labelled), sum(correct) FROM reports WHERE release > 0"
        " GROUP BY device, release, head, day"
    )


def _users(db: Database) -> None:
    db.table("users").create(
        {"id": int, "name": str, "role": str, "digest": str, "created": float, "revoked": float},
        pk="id",
        not_null={"name", "role", "digest", "created"},
    )
    db.table("users").create_index(["digest"], unique=True)
    db.table("sessions").create(
        {"digest": str, "user": int, "created": float, "expires": float}, pk="digest", not_null={"user", "expires"}
    )
    db.table("audit").create_index(["actor", "id"])


def _summaries_of_days(db: Database) -> None:
    db.table("summaries").add_column("span", int, not_null_default=3600)
    db.table("summaries").create_index(["span", "hour"])


def _segments_and_cards(db: Database) -> None:
    db.table("segments").create(
        {"name": str, "query": str, "created": float, "actor": str},
        pk="name",
        not_null={"query", "created", "actor"},
    )
    db.table("candidates").add_column("card", str, not_null_default="")


def _machines(db: Database) -> None:
    for name in ("disk_free_mb", "memory_free_mb", "memory_total_mb"):
        db.table("devices").add_column(name, int)


def _latencies_of_reports(db: Database) -> None:
    # gates hold them against those of the control group, report by report
    for name in ("p50_ms", "p99_ms"):
        db.table("reports").add_column(name, float, not_null_default=0.0)


def _secrets(db: Database) -> None:
    db.table("secrets").create({"name": str, "sha256": str}, pk="name", not_null={"sha256"})
    db.execute("INSERT INTO secrets SELECT 'ca', '' FROM certificates LIMIT 1")
    db.execute("INSERT INTO secrets SELECT 'commands.key', '' FROM commands LIMIT 1")


STEPS: tuple[Callable[[Database], None], ...] = (
    _first_tables,  # 1
    _summaries,  # 2
    _identities_and_commands,  # 3
    _summaries_of_every_version,  # 4
    _fleet,  # 5
    _alerts,  # 6
    _rollouts_by_many_gates,  # 7
    _reports_in_columns,  # 8
    _rollups,  # 9
    _labels,  # 10
    _version_days,  # 11
    _users,  # 12
    _summaries_of_days,  # 13
    _segments_and_cards,  # 14
    _machines,  # 15
    _latencies_of_reports,  # 16
    _secrets,  # 17
)
"""Step n leads from `user_version` n - 1 to n. Steps are only ever appended, and never changed once they are on main:
who changes a table, changes it in a step of its own."""
