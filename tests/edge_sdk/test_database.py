"""Many rows in one statement."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.database import Database
from edge_sdk.errors import StoreError


def _table(tables):
    tables.table("kept").create({"id": int, "name": str, "size": int}, pk="id")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    database = Database(tmp_path_factory.mktemp("database") / "kept.db", [_table])
    yield database
    database.close()


@given(count=st.integers(0, 2_500))
def test_every_row_is_written_once_and_in_order_however_many_there_are(database, count):
    rows = [(f"row {number}", number) for number in range(count)]
    with database.transaction():
        database.execute("DELETE FROM kept")
        database.execute_rows("INSERT INTO kept (name, size) VALUES ?", rows)
    assert database.read("SELECT name, size FROM kept ORDER BY id") == rows


def test_none_of_the_rows_is_written_if_one_cannot_be(database):
    database.execute("DELETE FROM kept")
    rows = [(number, "row", 1) for number in (*range(700), 3)]
    with pytest.raises(StoreError), database.transaction():
        database.execute_rows("INSERT INTO kept (id, name, size) VALUES ?", rows)
    assert database.read("SELECT count(*) FROM kept") == [(0,)]


def test_what_was_written_never_shrinks_when_a_log_is_cut_that_a_crash_had_left_behind(tmp_path):
    first = Database(tmp_path / "kept.db", [_table])
    with first.transaction():
        first.execute_rows("INSERT INTO kept (name, size) VALUES ?", [("row" * 100, number) for number in range(1000)])
    first.execute("PRAGMA wal_checkpoint(FULL)")
    shutil.copy(tmp_path / "kept.db", tmp_path / "left.db")
    log = (tmp_path / "kept.db-wal").read_bytes()
    first.close()
    # killed as the log began anew: its header is written, and behind it lies what it held before
    (tmp_path / "left.db-wal").write_bytes(log[:32] + bytes(len(log) - 32))
    left = Database(tmp_path / "left.db", [_table])
    with left.transaction():
        left.execute("DELETE FROM kept WHERE id = 1")
    assert 0 < left.written_bytes < len(log)
    left.close()
