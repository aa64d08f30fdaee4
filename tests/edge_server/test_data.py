"""Exports, backups and upgrades: nothing is lost, and nothing is written over by mistake."""

import csv
import io
import json
import sqlite3
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from edge_sdk.errors import IntegrityError, StoreError
from edge_sdk.files import lock_folder
from edge_server import backup
from edge_server.cli import main
from edge_server.errors import BackupError
from edge_server.export import datasette_metadata, write
from edge_server.ingest import ReportRow
from edge_server.records import AuditRecord
from edge_server.registry import Registry
from edge_server.schema import STEPS
from edge_server.settings import Settings, load_settings
from edge_server.store import Store
from edge_server.store_export import KINDS

SCHEMAS = sorted((Path(__file__).parent / "schemas").glob("v*.sql"))


def filled(home, report, *, at=100.0):
    """A coordinator's folder with a little of everything."""
    registry = Registry(home)
    registry.enrol("a", group="lab", out=home / "a.json", actor="ann")
    registry.label("a", {"site": "berlin"}, actor="ann")
    body = msgspec.msgpack.encode(report(start=50.0, predicted={"x": 3}))
    row = ReportRow("a", "s", 1, at, at, 50.0, 1, 0, "adapt", 100, 0, 10, 9, 1, 0, 1.0, 2.0, body)
    with registry.store.transaction():
        registry.store.ingest.write_reports([row, row._replace(seq=2, start=150.0, received=at + 1, body=b"\xc1")])
        registry.store.execute(
            "INSERT INTO events (device, store_id, seq, time, received, name, release, head, detail)"
            " VALUES ('a', 's', 3, 60.0, 101.0, 'boot', 1, 0, '{\"why\": \"test\"}')"
        )
    return registry


@pytest.fixture
def home(tmp_path, report):
    folder = tmp_path / "home"
    registry = filled(folder, report)
    registry.close()
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "blobs" / ("ab" * 32)).write_bytes(b"a file of a release")
    (folder / "commands.key").write_bytes(b"secret")
    return folder


def exported(home, kind, form, **between):
    store, out = Store(home / "coordinator.db"), io.StringIO()
    count = write(store, kind, out, form=form, **between)
    store.close()
    rows = list(csv.DictReader(io.StringIO(out.getvalue()))) if form == "csv" else list(
        map(json.loads, out.getvalue().splitlines())
    )  # fmt: skip
    assert len(rows) == count
    return rows


class TestExport:
    @pytest.mark.parametrize("kind", KINDS)
    def test_both_forms_have_the_same_rows(self, home, kind):
        as_csv, as_json = exported(home, kind, "csv"), exported(home, kind, "jsonl")
        assert len(as_csv) == len(as_json)
        for one, other in zip(as_csv, as_json, strict=True):
            key = KINDS[kind].key
            assert one[key] == str(other[key])

    def test_a_report_comes_with_all_that_it_says(self, home):
        first, second = exported(home, "reports", "jsonl")
        assert (first["device"], first["predicted"], first["p95_ms"]) == ("a", {"x": 3}, 2.0)
        assert "unreadable" in second
        assert exported(home, "reports", "csv")[0]["p95_ms"] == "2.0"

    def test_a_range_of_time_leaves_out_the_rest(self, home):
        assert [row["seq"] for row in exported(home, "reports", "jsonl", since=100.0)] == [2]
        assert [row["seq"] for row in exported(home, "reports", "jsonl", until=100.0)] == [1]
        assert exported(home, "events", "jsonl", since=61.0) == []

    def test_rows_come_a_page_at_a_time_and_none_twice(self, home, monkeypatch):
        monkeypatch.setattr("edge_server.store_export._PAGE", 1)
        assert [row["seq"] for row in exported(home, "reports", "jsonl")] == [1, 2]

    def test_devices_come_with_their_labels_and_without_their_passwords(self, home):
        (row,) = exported(home, "devices", "jsonl")
        assert (row["name"], row["labels"], row["enrolled"]) == ("a", {"site": "berlin"}, 1)
        assert "credential" not in json.dumps(row)

    def test_the_command_line_reads_times_in_words(self, home):
        (home / "coordinator.toml").write_text("")
        arguments = ["export", "events", "--format", "jsonl", "--home", str(home)]
        result = CliRunner().invoke(main, [*arguments, "--since", "1970-01-01T00:01"])
        assert json.loads(result.stdout)["detail"] == {"why": "test"}
        assert CliRunner().invoke(main, [*arguments, "--until", "1970-01-01T00:01:00+00:00"]).stdout == ""
        assert CliRunner().invoke(main, [*arguments, "--since", "tomorrow"]).exit_code == 2

    def test_datasette_is_told_of_tables_and_columns_that_exist(self, home):
        tables = json.loads(datasette_metadata())["databases"]["coordinator"]["tables"]
        connection = sqlite3.connect(home / "coordinator.db")
        for name, told in tables.items():
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({name})")}
            mentioned = {*told.get("columns", {}), *told.get("facets", []), *told.get("units", {})}
            mentioned |= {told[key] for key in ("sort", "sort_desc") if key in told}
            assert columns, name
            assert mentioned <= columns, name
        connection.close()


class TestBackup:
    def make(self, home, folder, **more):
        return backup.make(home, folder, settings=Settings(), now=1000.0, **more)

    def test_a_backup_holds_all_but_the_keys_and_can_be_put_back_elsewhere(self, home, tmp_path):
        found = self.make(home, tmp_path / "kept")
        assert set(found.files) == {"coordinator.db", f"blobs/{'ab' * 32}"}
        backup.restore(tmp_path / "kept", tmp_path / "new")
        for kind in KINDS:
            assert exported(tmp_path / "new", kind, "jsonl") == exported(home, kind, "jsonl")
        assert (tmp_path / "new" / "blobs" / ("ab" * 32)).read_bytes() == b"a file of a release"

    def test_keys_come_along_on_request(self, home, tmp_path):
        self.make(home, tmp_path / "kept", keys=True)
        backup.restore(tmp_path / "kept", tmp_path / "new")
        assert (tmp_path / "new" / "commands.key").read_bytes() == b"secret"

    def test_so_do_the_files_that_the_settings_name(self, home, tmp_path):
        (home / "pager.secret").write_bytes(b"s" * 16)
        (home / "coordinator.toml").write_text(
            '[alerts.sinks.pager]\nkind = "webhook"\nurl = "https://example.org/"\nsecret_file = "pager.secret"\n'
            '[broker]\npassword_file = "../elsewhere"\n'
        )
        settings = load_settings(home / "coordinator.toml")
        backup.make(home, tmp_path / "without", settings=settings, now=1000.0)
        assert not (tmp_path / "without" / "pager.secret").exists()
        backup.make(home, tmp_path / "kept", settings=settings, now=1000.0, keys=True)
        backup.restore(tmp_path / "kept", tmp_path / "new")
        assert (tmp_path / "new" / "pager.secret").read_bytes() == b"s" * 16

    def test_it_is_made_while_the_coordinator_writes(self, home, tmp_path):
        store = Store(home / "coordinator.db")
        with store.transaction():
            store.execute("INSERT INTO counters VALUES ('under way', 1)")
            found = self.make(home, tmp_path / "kept")
        assert found.form == len(STEPS)
        copy = sqlite3.connect(tmp_path / "kept" / "coordinator.db")
        assert copy.execute("SELECT count(*) FROM counters WHERE name = 'under way'").fetchone() == (0,)
        copy.close()
        store.close()

    @pytest.mark.parametrize("name", ["coordinator.db", f"blobs/{'ab' * 32}", "backup.json"])
    def test_a_backup_that_was_altered_is_refused_and_nothing_changed(self, home, tmp_path, name):
        self.make(home, tmp_path / "kept")
        path = tmp_path / "kept" / name
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(IntegrityError):
            backup.restore(tmp_path / "kept", tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_half_a_backup_is_none(self, home, tmp_path):
        self.make(home, tmp_path / "kept")
        (tmp_path / "kept" / "backup.json").unlink()
        with pytest.raises(BackupError, match="half of one"):
            backup.verify(tmp_path / "kept")

    def test_a_folder_that_is_not_empty_is_not_written_to(self, home, tmp_path):
        with pytest.raises(BackupError, match="not empty"):
            self.make(home, home)

    def test_names_that_lead_outside_are_refused(self, home, tmp_path):
        self.make(home, tmp_path / "kept")
        path = tmp_path / "kept" / "backup.json"
        listed = json.loads(path.read_text())
        listed["files"]["../evil"] = listed["files"]["coordinator.db"]
        path.write_text(json.dumps(listed))
        with pytest.raises(IntegrityError, match="outside"):
            backup.verify(tmp_path / "kept")

    def test_a_running_coordinator_is_not_written_over(self, home, tmp_path):
        self.make(home, tmp_path / "kept")
        with lock_folder(home), pytest.raises(BackupError, match="running"):
            backup.restore(tmp_path / "kept", home)

    def test_a_newer_database_is_not_written_over_unless_that_is_meant(self, home, tmp_path, report):
        self.make(home, tmp_path / "kept")
        backup.restore(tmp_path / "kept", home)  # over the same
        registry = Registry(home)
        registry.label("a", {"site": "rome"}, actor="ben")
        registry.close()
        with pytest.raises(BackupError, match="newer"):
            backup.restore(tmp_path / "kept", home)
        assert exported(home, "devices", "jsonl")[0]["labels"] == {"site": "rome"}
        backup.restore(tmp_path / "kept", home, force=True)
        assert exported(home, "devices", "jsonl")[0]["labels"] == {"site": "berlin"}
        assert (home / "coordinator.db.replaced").exists()

    def test_a_damaged_database_gives_way_only_by_force(self, home, tmp_path):
        self.make(home, tmp_path / "kept")
        (home / "coordinator.db").write_bytes(b"rubbish" * 1000)
        with pytest.raises(BackupError, match="--force"):
            backup.restore(tmp_path / "kept", home)
        backup.restore(tmp_path / "kept", home, force=True)
        assert len(exported(home, "reports", "jsonl")) == 2

    def test_settings_and_signed_metadata_that_are_there_stay(self, home, tmp_path):
        (home / "tuf").mkdir(exist_ok=True)
        (home / "tuf" / "timestamp.json").write_text("old")
        self.make(home, tmp_path / "kept")
        (home / "tuf" / "timestamp.json").write_text("new")
        backup.restore(tmp_path / "kept", home)
        assert (home / "tuf" / "timestamp.json").read_text() == "new"

    def test_a_backup_of_a_later_form_is_refused(self, home, tmp_path):
        self.make(home, tmp_path / "kept")
        path = tmp_path / "kept" / "backup.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"form": len(STEPS) + 1}))
        with pytest.raises(BackupError, match="update the SDK"):
            backup.verify(tmp_path / "kept")

    def test_the_command_line_backs_up_and_restores(self, home, tmp_path):
        (home / "coordinator.toml").write_text("")
        run = CliRunner().invoke
        assert run(main, ["backup", str(tmp_path / "kept"), "--home", str(home)]).exit_code == 0
        result = run(main, ["restore", str(tmp_path / "kept"), "--home", str(tmp_path / "new")])
        assert result.exit_code == 0, result.output
        assert run(main, ["devices", "list", "--home", str(tmp_path / "new")]).output.count("site=berlin") == 1


class TestUpgrade:
    def old(self, folder, schema):
        """A database as an earlier version made it, with a device, a report and an event."""
        folder.mkdir(exist_ok=True)
        connection = sqlite3.connect(folder / "coordinator.db")
        connection.executescript(schema.read_text())
        connection.execute("INSERT INTO devices (name, group_name, registered, last_seen) VALUES ('a', 'lab', 1, 2)")
        connection.execute(
            "INSERT INTO reports (device, store_id, seq, time, received, start, release, head, predictions, errors,"
            " labelled, correct, body) VALUES ('a', 's', 1, 5, 6, 4, 1, 0, 100, 1, 10, 9, x'c1')"
        )
        connection.execute("INSERT INTO events (device, store_id, seq, time, received, name, release, head, detail)"
                           " VALUES ('a', 's', 2, 5, 6, 'boot', 1, 0, '{}')")  # fmt: skip
        connection.execute("INSERT INTO positions VALUES ('a', 's', 2)")
        connection.execute("INSERT INTO audit (time, actor, action, detail) VALUES (3, 'ann', 'device added', '{}')")
        connection.commit()
        connection.close()

    @pytest.mark.parametrize("schema", SCHEMAS, ids=lambda path: path.stem)
    def test_every_earlier_form_becomes_the_present_one_and_loses_nothing(self, tmp_path, schema):
        self.old(tmp_path, schema)
        store, fresh = Store(tmp_path / "coordinator.db"), Store(tmp_path / "fresh.db")
        shape = "SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2"
        assert store.read(shape) == fresh.read(shape)
        for (table,) in fresh.read("SELECT name FROM sqlite_master WHERE type = 'table'"):
            columns = f"SELECT name, type, pk FROM pragma_table_info('{table}') ORDER BY name"
            assert store.read(columns) == fresh.read(columns), table
        assert store.devices.get("a").group == "lab"
        assert store.ingest.load(["a"]).positions == {("a", "s"): 2}
        assert store.audit.find() == [AuditRecord(id=1, time=3.0, actor="ann", action="device added", detail={})]
        with store.transaction():
            assert store.rollups.add_reports(10) == 1
        assert store.rollups.of_fleet(span=60, since=0, until=60)[0].predictions == 100
        store.close()
        fresh.close()

    def test_every_form_that_was_on_main_is_among_them(self):
        unreleased = {8}  # came to main together with 9
        assert {int(path.stem[1:]) for path in SCHEMAS} >= set(range(1, len(STEPS))) - unreleased

    @pytest.mark.parametrize("schema", SCHEMAS[:1], ids=lambda path: path.stem)
    def test_what_was_there_before_is_kept(self, tmp_path, schema):
        self.old(tmp_path, schema)
        (tmp_path / "coordinator.toml").write_text("")
        result = CliRunner().invoke(main, ["upgrade", "--home", str(tmp_path)])
        assert result.exit_code == 0, result.output
        kept = sqlite3.connect(tmp_path / "coordinator.db.form-1")
        assert kept.execute("PRAGMA user_version").fetchone() == (1,)
        assert kept.execute("SELECT count(*) FROM reports").fetchone() == (1,)
        kept.close()
        assert "nothing to do" in CliRunner().invoke(main, ["upgrade", "--home", str(tmp_path)]).output

    def test_a_later_form_is_refused_and_left_alone(self, home):
        connection = sqlite3.connect(home / "coordinator.db")
        connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
        connection.commit()
        connection.close()
        before = (home / "coordinator.db").read_bytes()
        with pytest.raises(StoreError, match="update the SDK"):
            Store(home / "coordinator.db")
        assert (home / "coordinator.db").read_bytes() == before

    def test_an_upgrade_that_fails_leaves_the_earlier_form(self, tmp_path, monkeypatch):
        self.old(tmp_path, SCHEMAS[0])

        def fail(_db):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr("edge_server.store.STEPS", (*STEPS[:3], fail, *STEPS[4:]))
        with pytest.raises(StoreError):
            Store(tmp_path / "coordinator.db")
        connection = sqlite3.connect(tmp_path / "coordinator.db")
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        connection.close()
