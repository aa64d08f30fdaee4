"""The device's database: all or nothing, bounded, and numbers that are never given twice."""

import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.database import Database
from edge_sdk.errors import DiskFullError, StoreError
from edge_sdk.files import without_flushing
from edge_sdk.store import STEPS, Lineage, LoggedRow, NewSample, OutboxRow, Store, stack

TRUNK = "trunk"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "edge.db"


@pytest.fixture
def store(path):
    opened = Store(path)
    yield opened
    opened.close()


def row(name, *, time=1.0, size=32, trunk=TRUNK):
    return LoggedRow(name, time, bytes(size), "3", 1, 0, trunk)


def add(store, *rows):
    with store.transaction():
        store.add_rows(rows)


def append(store, count=1, kind="event"):
    with store.transaction():
        return [store.append(kind, 1.0, b"body") for _ in range(count)]


def waiting(store):
    return store.waiting_ids(not_like="own-")


def fill(store):
    """No room for another page; returns the bound that was in force."""
    (before,) = store.conn.execute("PRAGMA max_page_count").fetchone()
    store.conn.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size instead
    return before


def write_big(store):
    with store.transaction():
        store.put("small", b"x")
        store.put("big", bytes(1_000_000))


def refuses_big_write(store):
    with pytest.raises(DiskFullError, match="no room"):
        write_big(store)


# ---- opening


def test_an_empty_file_is_brought_to_the_present_form(store, path):
    tables = {name for (name,) in store.conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {"meta", "rows", "samples", "outbox", "history"} <= tables
    assert not store.replaced
    assert store.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_each_file_that_a_process_makes_has_the_same_form(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_sdk.database._made", {})
    forms = []
    for name in ("a", "b"):
        store = Store(tmp_path / name)
        forms.append(store.read("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"))
        forms[-1] += store.read("PRAGMA user_version")
        store.close()
    assert forms[0] == forms[1]


def test_rows_that_a_migration_writes_are_in_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_sdk.database._made", {})

    def begin(db):
        db.execute("CREATE TABLE facts (name TEXT)")
        db.execute("INSERT INTO facts VALUES ('first')")

    for name in ("a", "b"):
        database = Database(tmp_path / name, [begin])
        assert database.read("SELECT name FROM facts") == [("first",)]
        database.close()


def test_an_existing_file_keeps_its_form_and_content(store, path):
    with store.transaction():
        store.put("key", b"value")
    form = store.conn.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
    version = store.conn.execute("PRAGMA user_version").fetchone()
    store.close()
    again = Store(path)
    assert again.get("key") == b"value"
    assert again.conn.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == form
    assert again.conn.execute("PRAGMA user_version").fetchone() == version != (0,)
    again.close()


@pytest.mark.parametrize(("durability", "level"), [("full", 2), ("normal", 1)])
def test_full_durability_flushes_at_every_commit(path, durability, level):
    store = Store(path, durability=durability)
    assert store.conn.execute("PRAGMA synchronous").fetchone() == (level,)
    store.close()


def test_a_simulation_never_waits_for_the_disk(path):
    with without_flushing():
        store = Store(path)
    assert store.conn.execute("PRAGMA synchronous").fetchone() == (0,)
    store.close()


def test_a_file_that_cannot_be_opened_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path)


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("table", ["meta", "rows", "samples", "history"])
def test_a_kill_while_the_tables_are_made_leaves_a_file_that_opens(path, monkeypatch, table):
    from sqlite_utils.db import Table

    create = Table.create

    def dies(self, *args, **kwargs):
        made = create(self, *args, **kwargs)
        if self.name == table:
            raise PowerCut
        return made

    with monkeypatch.context() as patch:
        patch.setattr("edge_sdk.database._made", {})  # as in a process that makes its first one
        patch.setattr(Table, "create", dies)
        with pytest.raises(PowerCut):
            Store(path)
    store = Store(path)
    assert store.outbox() == store.history() == waiting(store) == []
    assert not store.replaced
    store.close()


def test_a_file_that_is_no_database_is_put_aside(path):
    path.write_bytes(b"no database" * 1_000)
    store = Store(path)
    assert store.replaced
    assert append(store) == [1]
    store.close()
    assert path.with_name("edge.db.damaged").read_bytes() == b"no database" * 1_000
    again = Store(path)
    assert not again.replaced
    assert append(again) == [2]
    again.close()


def test_a_truncated_database_is_put_aside(store, path):
    add(store, *(row(f"row-{i}") for i in range(2_000)))
    store.close()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    again = Store(path)
    assert again.replaced
    assert waiting(again) == []
    again.close()
    assert path.with_name("edge.db.damaged").stat().st_size == len(data) // 2


def test_a_second_damaged_file_takes_the_place_of_the_first(path):
    for content in (b"first" * 1_000, b"second" * 1_000):
        path.write_bytes(content)
        Store(path).close()
    assert path.with_name("edge.db.damaged").read_bytes() == b"second" * 1_000


def test_another_process_may_read_while_the_device_writes(store, path):
    append(store)
    reader = Store(path)
    with store.transaction():
        store.append("event", 1.0, b"body")
        assert reader.outbox_size()[0] == 1
    assert reader.outbox_size()[0] == 2
    reader.close()


def test_a_file_of_an_earlier_form_keeps_its_rows_with_defaults_for_what_is_new(path):
    old = Database(path, STEPS[:1])
    with old.transaction():
        old.execute("INSERT INTO rows VALUES ('a', 1.0, x'01', '3', 1, 0, ?)", (TRUNK,))
        for role, slot in (("fresh", None), ("judge", None), ("replay", 0)):
            old.execute(
                "INSERT INTO samples (time, latent, label, role, slot, trunk) VALUES (2.0, x'02', '4', ?, ?, ?)",
                (role, slot, TRUNK),
            )
        old.execute("INSERT INTO meta VALUES ('key', x'03')")
    old.close()
    store = Store(path)
    assert store.get("key") == b"\x03"
    (kept,) = store.waiting_rows(TRUNK, limit=9)
    assert kept == LoggedRow("a", 1.0, b"\x01", "3", 1, 0, TRUNK, "", 1.0, False, None, False)
    for role in ("fresh", "judge", "replay"):
        (kept,) = store.samples(role, TRUNK)
        assert kept[1:] == (2.0, b"\x02", "4", role, 0 if role == "replay" else None, "", 1.0, 0.0, False)
    assert store.samples_of(["a"]) == store.lineage() == []
    add(store, row("b"))
    sample(store, "5", id="b", source="expert", slice="left", weight=-0.5)
    assert waiting(store) == ["a", "b"]
    store.close()


# ---- what is written


def written_by_this_process():
    io = Path("/proc/self/io").read_text().split()
    return int(io[io.index("write_bytes:") + 1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("durability", ["full", "normal"])
@pytest.mark.parametrize(("rows", "dim", "flushes"), [(1, 32, 400), (20, 1_280, 100), (1_000, 128, 20)])
def test_it_tells_about_how_much_went_to_the_disk(path, rows, dim, flushes, durability):
    """Labels come a flush after their rows, as they do in use; the log begins anew several times."""
    store = Store(path, durability=durability)
    before, waiting = written_by_this_process(), {}
    for flush in range(flushes):
        with store.transaction():
            new = [row(f"{flush}-{i}", time=flush, size=dim) for i in range(rows)]
            store.add_rows(new)
            taken = store.take_rows(list(waiting))
            store.add_samples(NewSample(r.time, r.latent, "4", "fresh", TRUNK, r.id) for r in taken.values())
            store.trim_samples("fresh", TRUNK, 2_000)
            waiting = {each.id for each in new}
    told, written = store.written_bytes, written_by_this_process() - before
    store.close()
    if not written:
        pytest.skip("temporary files are in memory here")
    assert written / 2 <= told <= written * 2
    assert told >= 2 * flushes * rows * dim


def test_erased_bytes_are_gone_from_the_files(store, path):
    secret = bytes(range(1, 256)) * 40  # more than a page
    with store.transaction():
        store.add_samples([NewSample(1.0, secret + bytes([i]), "1", "fresh", TRUNK) for i in range(20)])
        store.add_rows([row("a")._replace(latent=secret)])
    with store.transaction():
        store.take_rows(["a"])
        store.delete_samples(sample.key for sample in store.samples("fresh", TRUNK))
    store.clear_log()
    assert all(secret[:200] not in file.read_bytes() for file in path.parent.iterdir() if file.is_file())


# ---- transactions


def test_a_transaction_that_fails_writes_nothing(store):
    def fails():
        with store.transaction():
            store.put("key", b"value")
            store.append("event", 1.0, b"body")
            store.record(1.0, "event", {})
            store.add_rows([row("a")])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert store.get("key") is None
    assert store.outbox() == store.history() == waiting(store) == []
    assert append(store) == [1]


def test_a_database_error_is_a_store_error_and_writes_nothing(store):
    def fails():
        with store.transaction():
            store.put("key", b"value")
            store.conn.execute("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(StoreError, match="nowhere"):
        fails()
    assert store.get("key") is None


def test_a_closed_database_is_a_store_error(path):
    store = Store(path)
    store.close()
    with pytest.raises(StoreError):
        store.get("key")
    with pytest.raises(StoreError), store.transaction():
        pass


KILLED_WRITER = """
import os, sys
from pathlib import Path
from edge_sdk.files import set_crash_hook
from edge_sdk.store import Store
store = Store(Path(sys.argv[1]))
with store.transaction():
    store.put("key", b"old")
set_crash_hook(lambda name: os._exit(9) if name == sys.argv[2] else None)
with store.transaction():
    store.put("key", b"new")
"""


@pytest.mark.parametrize(("point", "expected"), [("commit:before", b"old"), ("commit:after", b"new")])
def test_a_kill_around_a_commit_leaves_all_or_nothing(path, point, expected):
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, path, point], timeout=60, check=False)
    assert done.returncode == 9
    store = Store(path)
    assert store.get("key") == expected
    store.close()


# ---- a full disk


def test_a_full_disk_is_told_and_nothing_is_half_written(store):
    fill(store)
    refuses_big_write(store)
    assert store.get("small") is store.get("big") is None


def test_what_was_written_can_be_read_and_removed_while_the_disk_is_full(store):
    append(store, 3)
    fill(store)
    refuses_big_write(store)
    assert [held.seq for held in store.outbox()] == [1, 2, 3]
    with store.transaction():
        store.acknowledge(2)
    assert [held.seq for held in store.outbox()] == [3]


def test_once_there_is_room_the_same_write_succeeds(store):
    before = fill(store)
    refuses_big_write(store)
    store.conn.execute(f"PRAGMA max_page_count = {before}")
    with store.transaction():
        store.put("big", bytes(1_000_000))
    assert len(store.get("big")) == 1_000_000


# ---- small facts


def test_facts_are_set_and_replaced(store):
    assert store.get("key") is None
    with store.transaction():
        store.put("key", b"1")
        store.put("key", b"2")
    assert store.get("key") == b"2"


# ---- predictions that wait


def test_a_logged_prediction_can_be_taken_once(store):
    add(store, row("a"), row("b"))
    with store.transaction():
        assert store.take_rows(["b", "unknown"]) == {"b": row("b")}
        assert store.take_rows(["b"]) == {}
    assert waiting(store) == ["a"]


def test_a_row_that_met_a_guess_still_waits_for_its_truth(store):
    add(store, row("a"), row("b"), row("c"))
    with store.transaction():
        store.set_guesses([("a", -0.5)])
    assert {name: found.guess for name, found in store.look_at_rows(["a", "b", "d"]).items()} == {"a": -0.5, "b": None}
    assert store.waiting_ids(not_like="x") == ["b", "c"]
    with store.transaction():
        assert store.take_rows(["a"])["a"].guess == -0.5


def test_more_rows_than_one_statement_takes_are_taken(store):
    names = [f"row-{i}" for i in range(1_201)]
    add(store, *map(row, names))
    with store.transaction():
        assert sorted(store.take_rows(names)) == sorted(names)
    assert waiting(store) == []


def test_flushes_of_any_size_are_made_of_few_statements(store, monkeypatch):
    """A connection keeps its last 128: with one for each size, a database took megabytes more with every hundred."""
    said, execute = set(), Store.execute
    monkeypatch.setattr(Store, "execute", lambda self, sql, *more: (said.add(sql), execute(self, sql, *more))[1])
    for size in range(150):
        names = [f"{size}-{number}" for number in range(size)]
        add(store, *map(row, names))
        with store.transaction():
            assert store.take_rows(names).keys() == {*names}
            assert store.samples_of(names) == []
    assert waiting(store) == []
    assert len(said) <= 3 + 3 * 2 + 1


def test_waiting_ids_are_those_that_the_app_gave(store):
    add(store, row("own-1"), row("order-7"), row("ow"))
    assert sorted(waiting(store)) == ["order-7", "ow"]


def test_old_predictions_are_dropped(store):
    add(store, *(row(str(i), time=float(i)) for i in range(5)))
    with store.transaction():
        assert sorted(store.trim_rows(older_than=2.0, max_bytes=10**9)) == ["0", "1"]
    assert sorted(waiting(store)) == ["2", "3", "4"]


def test_the_oldest_predictions_are_dropped_beyond_the_bound_in_bytes(store):
    add(store, *(row(str(i), time=float(i), size=80) for i in range(10)))
    with store.transaction():
        dropped = store.trim_rows(older_than=0.0, max_bytes=4 * 200)  # a row counts 80 + 120
    assert sorted(dropped) == ["0", "1", "2", "3", "4", "5"]
    with store.transaction():
        assert store.trim_rows(older_than=0.0, max_bytes=1) == ["6", "7", "8"]  # one may always wait


# ---- labelled samples


def sample(store, label="1", role="fresh", *, time=1.0, trunk=TRUNK, **rest):
    with store.transaction():
        store.add_samples([NewSample(time, label.encode() * 4, label, role, trunk, **rest)])


def labels(store, role, trunk=TRUNK):
    return [kept.label for kept in store.samples(role, trunk)]


def test_samples_are_kept_by_role_and_trunk(store):
    sample(store, "1")
    sample(store, "2", "judge")
    sample(store, "3", trunk="other")
    assert labels(store, "fresh") == ["1"]
    assert labels(store, "judge") == ["2"]
    assert labels(store, "fresh", "other") == ["3"]
    assert store.newest_sample("judge", TRUNK) == 2
    assert store.newest_sample("replay", TRUNK) == 0


def test_samples_are_counted_from_a_time_on(store):
    for time in (1.0, 2.0, 3.0):
        sample(store, time=time)
    assert store.count_samples("fresh", TRUNK) == 3
    assert store.count_samples("fresh", TRUNK, since=2.0) == 2


def test_a_sample_that_takes_a_slot_of_the_buffer_replaces_the_one_there(store):
    sample(store, "1")
    sample(store, "2")
    with store.transaction():
        store.move_to_replay(1, 0, TRUNK)
        store.move_to_replay(2, 0, TRUNK)
    assert labels(store, "fresh") == []
    assert [(kept.label, kept.slot) for kept in store.samples("replay", TRUNK)] == [("2", 0)]


def test_the_newest_samples_of_a_role_are_kept(store):
    for label in "1234":
        sample(store, label, "judge")
    sample(store, "5", "judge", trunk="other")
    with store.transaction():
        store.trim_samples("judge", TRUNK, 2)
    assert labels(store, "judge") == ["3", "4"]
    assert labels(store, "judge", "other") == ["5"]


def test_samples_can_be_forgotten(store):
    sample(store)
    with store.transaction():
        store.delete_samples([1, 99])
    assert labels(store, "fresh") == []


def test_samples_are_found_by_prediction_by_label_and_by_age(store):
    for number in range(1_200):
        sample(store, str(number % 3), time=float(number), id=f"p{number}", trunk=TRUNK if number % 2 else "other")
    found = store.samples_of([f"p{number}" for number in range(0, 1_200, 2)] + ["unknown"])
    assert sorted(kept.key for kept, _ in found) == list(range(1, 1_200, 2))
    assert {trunk for _, trunk in found} == {"other"}
    assert [(kept.label, trunk) for kept, trunk in store.samples_labelled("1")[:2]] == [("1", TRUNK), ("1", "other")]
    assert [kept.time for kept, _ in store.old_samples(before=2.0)] == [0.0, 1.0]


def test_what_came_with_a_sample_is_kept(store):
    sample(store, id="p", source="expert", slice="left", weight=-0.25)
    (kept,) = store.samples("fresh", TRUNK)
    assert (kept.slice, kept.weight, kept.mass) == ("left", -0.25, 0.0)


def test_labels_are_counted_by_role_trunk_and_age(store):
    for label, time in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        sample(store, label, time=time)
    sample(store, "c", "judge")
    sample(store, "c", trunk="other")
    assert store.count_labels("fresh", TRUNK) == {"a": 2, "b": 1}
    assert store.count_labels("fresh", TRUNK, since=2.0) == {"a": 1, "b": 1}


def masses(store):
    return {kept.key: kept.mass for kept in store.samples("replay", TRUNK)}


_CHANGES = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(["fresh", "judge"]), st.sampled_from("ab"), st.sampled_from(["t", "u"])),
    st.tuples(st.just("move"), st.integers(1, 9), st.integers(0, 2), st.sampled_from(["t", "u"])),
    st.tuples(st.just("delete"), st.integers(1, 9)),
    st.tuples(st.just("trim"), st.sampled_from(["fresh", "judge"]), st.integers(0, 3)),
    st.tuples(st.just("keep"), st.sampled_from([("t",), ("t", "u")])),
    st.tuples(st.just("delete_trunk"), st.booleans()),
    st.tuples(st.just("log"), st.integers(1, 6), st.integers(10, 40)),
    st.tuples(st.just("take"), st.integers(1, 6)),
    st.tuples(st.just("drop"), st.integers(1, 900)),
    st.just(("delete_learned",)),
)


def drop(store, most):
    store.trim_rows(older_than=0.0, max_bytes=most)
    ((count, widest),) = store.read("SELECT count(*), coalesce(max(length(latent)), 0) FROM rows")
    assert count * (120 + widest) <= most or count <= 1


CHANGE = {
    "add": lambda store, role, label, trunk: store.add_samples([NewSample(1.0, b"x", label, role, trunk)]),
    "move": Store.move_to_replay,
    "delete": lambda store, key: store.delete_samples([key]),
    "trim": lambda store, role, keep: store.trim_samples(role, "t", keep),
    "keep": Store.keep_trunks,
    "delete_trunk": lambda store, translated: store.delete_trunk("u", translated=translated),
    "log": lambda store, name, size: store.add_rows([row(f"r{name}", size=size, trunk="t")]),
    "take": lambda store, name: store.take_rows([f"r{name}"]),
    "drop": drop,
    "delete_learned": Store.delete_learned,
}


@given(st.lists(st.tuples(st.booleans(), _CHANGES), max_size=25))
def test_what_is_counted_in_memory_is_what_the_tables_hold(changes):
    store = Store(Path(":memory:"))
    for fails, (what, *how) in changes:
        with suppress(StoreError), store.transaction():
            CHANGE[what](store, *how)
            if fails:
                raise StoreError("after all of it")
        for role in ("fresh", "judge", "replay"):
            for trunk in ("t", "u"):
                sql = "SELECT label, count(*) FROM samples WHERE role = ? AND trunk = ? GROUP BY label"
                held = dict(store.read(sql, role, trunk))
                assert store.count_labels(role, trunk) == held
                assert store.count_samples(role, trunk) == sum(held.values())
    store.close()


def test_what_samples_have_added_fades_and_is_set(store):
    for slot in range(3):
        sample(store)
        with store.transaction():
            store.move_to_replay(slot + 1, slot, TRUNK, mass=2.0 * slot)
    with store.transaction():
        store.fade_mass(TRUNK, 0.5)
    assert masses(store) == {1: 0.0, 2: 1.0, 3: 2.0}
    with store.transaction():
        store.set_mass(TRUNK, [(1, 5.0), (99, 1.0)])
    assert masses(store) == {1: 5.0, 2: 0.0, 3: 0.0}


def test_what_is_known_of_samples_goes_with_their_trunk_and_with_all_of_them(store):
    kinds, trunks = ("moments", "undo", "buffer", "strata"), ("a" * 20, "b" * 20)
    with store.transaction():
        for key in [*(f"{kind}:{trunk[:16]}" for kind in kinds for trunk in trunks), "adaptation", "note:of an app"]:
            store.put(key, b"x")
        store.keep_trunks(trunks[1:])
    left = {key for (key,) in store.read("SELECT key FROM meta")}
    assert left == {*(f"{kind}:{'b' * 16}" for kind in kinds), "adaptation", "note:of an app"}
    with store.transaction():
        store.delete_learned()
    assert {key for (key,) in store.read("SELECT key FROM meta")} == {"adaptation", "note:of an app"}


def test_what_no_installed_trunk_can_read_is_dropped(store):
    for trunk in ("old", "new", "gone"):
        sample(store, "1", trunk=trunk)
        add(store, row(trunk, trunk=trunk))
    with store.transaction():
        store.keep_trunks(["old", "new"])
    assert sorted(waiting(store)) == ["new", "old"]
    assert (labels(store, "fresh", "old"), labels(store, "fresh", "gone")) == (["1"], [])


def test_stored_latents_are_stacked():
    assert stack([b"\x01\x02", b"\x03\xff"], 2).tolist() == [[1, 2], [3, 255]]
    empty = stack([], 7)
    assert (empty.shape, empty.dtype) == ((0, 7), np.uint8)


# ---- the outbox's rows


def test_sequence_numbers_are_never_given_twice(store, path):
    assert append(store, 3) == [1, 2, 3]
    with store.transaction():
        store.acknowledge(3)
    assert append(store) == [4]
    with store.transaction():
        store.acknowledge(4)
    store.close()
    again = Store(path)
    assert append(again) == [5]
    again.close()


def test_a_number_of_a_transaction_that_failed_was_never_given(store):
    def fails():
        with store.transaction():
            store.append("event", 1.0, b"body")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert append(store) == [1]


def test_the_outbox_is_read_in_order_from_any_place(store):
    append(store, 5)
    assert [held.seq for held in store.outbox(after=2, limit=2)] == [3, 4]
    assert store.outbox_size() == (5, 5 * (4 + 40), 1)
    with store.transaction():
        store.acknowledge(2)
    assert store.outbox_size() == (3, 3 * (4 + 40), 3)


def test_an_empty_outbox_has_no_lowest_number(store):
    assert store.outbox_size() == (0, 0, 0)


def test_a_run_of_messages_becomes_one_gap(store):
    append(store, 5)
    with store.transaction():
        store.replace_with_gap(store.outbox()[1:4], 9.0, b"gap")
    assert store.outbox()[1] == OutboxRow(seq=4, first=2, kind="gap", time=9.0, body=b"gap")
    assert [held.seq for held in store.outbox()] == [1, 4, 5]
    assert append(store) == [6]


def test_a_gap_at_the_end_does_not_give_its_numbers_again(store):
    append(store, 3)
    with store.transaction():
        store.replace_with_gap(store.outbox(), 9.0, b"gap")
        store.acknowledge(3)
    assert append(store) == [4]


# ---- how heads came to be


def test_lines_are_told_oldest_first_and_are_bounded(store):
    with store.transaction():
        for number in range(505):
            head = number if number % 2 else None
            store.record_lineage(Lineage(float(number), 1, 0, head, "promoted", {"rows": number}))
    assert store.lineage(limit=2) == [
        Lineage(503.0, 1, 0, 503, "promoted", {"rows": 503}), Lineage(504.0, 1, 0, None, "promoted", {"rows": 504})
    ]  # fmt: skip
    assert len(store.lineage(limit=1_000)) == 500


# ---- history


def test_history_is_told_oldest_first_from_any_place(store):
    with store.transaction():
        for i in range(5):
            store.record(float(i), f"event-{i}", {"i": i})
    assert [entry.name for entry in store.history(limit=2)] == ["event-3", "event-4"]
    assert [entry.detail for entry in store.history(after=4)] == [{"i": 4}]


def test_history_is_bounded(store):
    with store.transaction():
        for i in range(2_100):
            store.record(float(i), "event", {})
    entries = store.history(limit=10_000)
    assert len(entries) == 2_000
    assert entries[-1].time == 2_099.0


def test_a_library_error_never_leaves_the_store(store):
    store.conn.execute("DROP TABLE outbox")
    for broken in (store.outbox, store.outbox_size, lambda: store.append("event", 1.0, b"")):
        with pytest.raises(StoreError) as caught:
            broken()
        assert isinstance(caught.value.__cause__, sqlite3.Error)


# ---- from one trunk to another


def test_an_input_stays_as_long_as_a_sample_of_its_prediction(store):
    with store.transaction():
        for trunk in ("one", "other"):
            store.add_samples(
                [NewSample(0.0, b"1", "3", "fresh", trunk, id="a"), NewSample(0.0, b"1", "3", "fresh", trunk)]
            )
        store.add_inputs([("a", b"x")], keep=5)
        store.delete_trunk("one")
    assert store.input_of("a") == b"x"
    with store.transaction():
        store.delete_trunk("other")
    assert store.input_of("a") is None


def test_the_newest_inputs_are_kept(store):
    with store.transaction():
        for name in "abcab":
            store.add_inputs([(name, name.encode())], keep=2)
    assert [store.input_of(name) for name in "abc"] == [b"a", b"b", None]


def test_what_was_translated_can_be_dropped_by_itself(store):
    with store.transaction():
        store.add_samples([NewSample(0.0, b"1", "3", "judge", "t", translated=made) for made in (True, False, True)])
        store.delete_trunk("t", translated=True)
    assert [sample.translated for sample in store.samples("judge", "t")] == [False]


def test_pairs_are_forgotten_one_by_one_or_all(store):
    with store.transaction():
        store.add_pairs([("a", b"1", b"2"), ("b", b"3", b"4"), ("c", b"5", b"6")])
        store.delete_pairs(["b"])
    assert store.pairs() == [("a", b"1", b"2"), ("c", b"5", b"6")]
    assert store.count_pairs() == 2
    with store.transaction():
        store.delete_learned()
    assert store.pairs() == []
