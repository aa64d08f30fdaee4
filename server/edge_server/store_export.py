"""Rows in the order of their keys, a page at a time, for exports that may take long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from edge_sdk.database import Database

_PAGE = 2_000
"""Rows of one query: while one is open, SQLite cannot begin its log anew."""


class Kind(NamedTuple):
    """Rows of one kind.

    Attributes:
        columns: Names, as exported, in order.
        time: The column that a range of time is of; None: there is none.
        key: The column that orders them.
        sql: By name the expression, where it is another than the name.
        nested: Columns of JSON text.
        report: The column that holds a whole report.
    """

    table: str
    columns: tuple[str, ...]
    time: str | None
    key: str = "id"
    sql: dict[str, str] = {}  # noqa: RUF012 - never changed
    nested: tuple[str, ...] = ()
    report: str | None = None


_COUNTS = ("reports", "predictions", "errors", "labelled", "correct", "alarmed", "warned", "received_bytes")
KINDS = {
    "reports": Kind("reports", ("id", "device", "store_id", "seq", "time", "received", "alarms", "warnings", "body"),
                    "start", report="body"),
    "events": Kind("events",
                   ("id", "device", "store_id", "seq", "time", "received", "name", "release", "head", "detail"),
                   "time", nested=("detail",)),
    "devices": Kind(
        "devices",
        ("name", "group", "registered", "enrolled", "revoked", "online", "last_seen", "release", "head", "mode", "sdk",
         "hardware", "predictions", "errors", "labelled", "correct", "alarms", "warnings", "labels"),
        None,
        key="name",
        sql={
            "group": "group_name",
            "enrolled": "credential IS NOT NULL",
            "release": "coalesce(row_release, state_release)",
            "head": "coalesce(row_head, state_head)",
            "labels": "(SELECT json_group_object(l.key, l.value) FROM labels l WHERE l.device = devices.name)",
        },
        nested=("labels",),
    ),
    "rollouts": Kind("rollouts", ("id", "group", "release", "active", "started", "plan", "state"), "started",
                     sql={"group": "group_name"}, nested=("plan", "state")),
    "rollups": Kind("rollups", ("id", "device", "span", "start", "release", *_COUNTS), "start"),
    "audit": Kind("audit", ("id", "time", "actor", "action", "detail"), "time", nested=("detail",)),
}  # fmt: skip


def rows_of(db: Database, kind: str, *, since: float | None, until: float | None) -> Iterator[dict[str, Any]]:
    """All rows of a kind within a range of time, in order of their keys. Raises `StoreError`."""
    what = KINDS[kind]
    columns = ", ".join(f'{what.sql.get(name, name)} AS "{name}"' for name in what.columns)
    within = ""
    times: tuple[float | None, ...] = ()
    if what.time:
        within = f"AND (?3 IS NULL OR {what.time} >= ?3) AND (?4 IS NULL OR {what.time} < ?4)"
        times = (since, until)
    last: Any = "" if what.key == "name" else -1
    at = what.columns.index(what.key)
    while True:
        rows = db.read(
            f"SELECT {columns} FROM {what.table} WHERE {what.key} > ?1 {within}"  # noqa: S608 - constants
            f" ORDER BY {what.key} LIMIT ?2",
            last,
            _PAGE,
            *times,
        )
        for row in rows:
            yield dict(zip(what.columns, row, strict=True))
        if len(rows) < _PAGE:
            return
        last = rows[-1][at]
