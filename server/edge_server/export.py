"""Rows for other tools: CSV or JSON lines, written as they are read."""

from __future__ import annotations

import csv
from importlib import resources
from typing import Any, TextIO

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.messages import Report, as_json, unpack
from edge_server.store import Store
from edge_server.store_export import KINDS, Kind, rows_of

_SCALARS = tuple(
    field.name
    for field in msgspec.structs.fields(Report)
    if not isinstance(field.default, bytes) and not str(field.type).startswith(("list", "dict"))
)


def write(
    store: Store, kind: str, out: TextIO, *, form: str, since: float | None = None, until: float | None = None
) -> int:
    """Write all rows of a kind, oldest first; returns how many.

    A report is given with all that it says: in JSON lines as it came, in CSV without lists and dictionaries.

    Args:
        store: Where the rows are.
        kind: One of `store_export.KINDS`.
        out: Where they go.
        form: "csv" or "jsonl".
        since: Only rows of this time or later, seconds since the epoch; by the column `Kind.time`.
        until: Only rows before this time.

    Raises:
        ValueError: There is no such kind or form.
        StoreError: The database cannot be read.
    """
    if kind not in KINDS or form not in ("csv", "jsonl"):
        raise ValueError(f"{kind!r} as {form!r}: rows are {', '.join(KINDS)}, as csv or jsonl")
    what = KINDS[kind]
    writer = csv.DictWriter(out, _header(what), extrasaction="ignore") if form == "csv" else None
    if writer:
        writer.writeheader()
    count = 0
    for row in rows_of(store, kind, since=since, until=until):
        entry = _entry(what, row)
        if writer:
            writer.writerow({key: _flat(value) for key, value in entry.items()})
        else:
            out.write(msgspec.json.encode(entry).decode() + "\n")
        count += 1
    return count


def datasette_metadata() -> str:
    """What Datasette is told about the database: titles, descriptions, units and facets, as JSON."""
    return resources.files("edge_server").joinpath("datasette.json").read_text("utf-8")


def _header(kind: Kind) -> list[str]:
    plain = [name for name in kind.columns if name != kind.report]
    return plain + [name for name in _SCALARS if name not in plain] if kind.report else plain


def _entry(kind: Kind, row: dict[str, Any]) -> dict[str, Any]:
    """One row: reports opened, JSON text read."""
    if kind.report:
        body = row.pop(kind.report)
        try:
            row |= as_json(unpack(body, Report))
        except ProtocolError as error:  # of a form that was once taken in
            row["unreadable"] = str(error)
    return {key: _read(value) if key in kind.nested else value for key, value in row.items()}


def _read(value: Any) -> Any:
    return None if value is None else msgspec.json.decode(value)


def _flat(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, (dict, list)) else value
