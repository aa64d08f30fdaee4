"""Datasette opens the database with the metadata that comes with the package: every table, row and blob."""

import asyncio
import html
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from edge_sdk.messages import raw, to_buckets
from edge_server.export import datasette_metadata

TABLES = json.loads(datasette_metadata())["databases"]["coordinator"]["tables"]


@pytest.fixture
def database(coordinator, small_fleet, settle, summary, clock, tmp_path):
    """A coordinator's file with blobs of every kind."""
    device = small_fleet[0]
    device.put(summary(start=clock.now() - 3600, end=clock.now(), latency=to_buckets([3, 4], [5, 6], 0)))
    device.event("drift_alarm", monitor="inputs", kind="quality", words="x: stuck", suspects="")
    device.seq += 1
    device.rows.append((device.seq, device.seq, "novelty", clock.now(), raw(summary())))  # a kind that is none
    settle(small_fleet)
    clock.advance(3600.0)
    coordinator.step()
    return tmp_path / "home" / "coordinator.db"


def tables(database):
    with closing(sqlite3.connect(database)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]


def test_every_table_every_row_and_every_blob_opens(database):
    from datasette.app import Datasette

    opened = set()

    async def visit(datasette):
        async def get(path):
            answer = await datasette.client.get(path)
            assert answer.status_code == 200, (path, answer.text)
            opened.add(path)
            return answer

        for table in tables(database):
            page = (await get(f"/coordinator/{table}")).text
            assert html.escape(TABLES[table].get("title", table)) in page
            found = (await get(f"/coordinator/{table}.json?_shape=objects")).json()["rows"]
            links = [html.unescape(link) for link in re.findall(rf'href="(/coordinator/{table}/[^"]+)"', page)]
            blobs = [link for link in links if ".blob?" in link]
            assert bool(links) is bool(found)
            for link in (*[link for link in links if link not in blobs][:2], *blobs):
                await get(link)

    asyncio.run(visit(Datasette([str(database)], metadata=json.loads(datasette_metadata()))))
    columns = {re.sub(r"/[^/]*\?_blob_column=", " ", path) for path in opened if ".blob?" in path}
    assert columns >= {"/coordinator/reports body", "/coordinator/summaries body", "/coordinator/rejected body",
                       "/coordinator/fleet_state body", "/coordinator/rollups latency"}  # fmt: skip


def test_every_table_is_described_or_hidden_and_what_could_be_used_to_log_in_is_hidden(database):
    assert set(tables(database)) - {"sqlite_sequence"} == set(TABLES)
    assert all(TABLES[name].get("hidden") for name in ("users", "sessions", "secrets", "certificates"))


def test_the_documented_command_shows_the_tables_and_not_those_hidden(database, tmp_path):
    metadata = tmp_path / "metadata.json"
    metadata.write_text(datasette_metadata())
    command = [sys.executable, "-m", "datasette", str(database), "--metadata", str(metadata), "--get"]
    told = json.loads(subprocess.run([*command, "/coordinator.json"], check=True, capture_output=True).stdout)
    assert {table["name"] for table in told["tables"] if table["hidden"]} == {
        name for name, facts in TABLES.items() if facts.get("hidden")
    }
