import errno
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_server.cli import main
from edge_server.registry import Registry
from edge_server.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def run(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def invoke(*arguments, expect=0):
        result = runner.invoke(main, [*map(str, arguments), "--home", str(home)])
        assert result.exit_code == expect, (result.output, result.exception)
        return result

    return invoke


@pytest.fixture
def ready(run):
    run("init")
    return run


class TestInit:
    def test_it_makes_settings_and_database(self, run, home):
        assert "serve --home" in run("init").output
        assert (home / "coordinator.toml").is_file()
        assert (home / "coordinator.db").is_file()

    def test_it_makes_a_first_user_whose_token_is_shown_this_once(self, run, home):
        told = json.loads(run("init", "--user", "rita", "--json").output)
        assert told["user"] == "rita"
        with closing(Registry(home)) as registry:
            assert registry.users.by_token(told["token"]).role == "releaser"

    def test_it_says_the_token_and_how_to_sign(self, run):
        output = run("init").output
        assert re.search(r"token of owner \(releaser\).*: edge-[\w-]{43}\n", output)
        assert "keys init" in output

    def test_it_does_not_overwrite(self, ready):
        result = ready("init", expect=2)
        assert "exists already" in result.stderr

    def test_its_folder_is_its_owners_alone(self, ready, home):
        assert home.stat().st_mode & 0o777 == 0o700

    def test_settings_that_came_first_stay(self, run, home):
        home.mkdir()
        (home / "coordinator.toml").write_text('prefix = "mine"\n')
        assert "token of owner" in run("init").output
        assert (home / "coordinator.toml").read_text() == 'prefix = "mine"\n'

    @pytest.mark.parametrize("command", [("devices", "list"), ("serve",), ("upgrade",)])
    def test_a_database_that_is_gone_is_told_and_not_made_anew(self, ready, home, command):
        for file in home.glob("coordinator.db*"):
            file.unlink()
        said = ready(*command, expect=2).stderr
        assert "is its disk there?" in said
        assert "restore" in said
        assert not (home / "coordinator.db").exists()

    @pytest.mark.parametrize("file", ["coordinator.db", "coordinator.toml", "lock"])
    def test_a_file_that_cannot_be_read_is_an_error_on_one_line(self, ready, home, file):
        for old in home.glob(f"{file}*"):
            old.unlink()
        (home / file).mkdir()
        said = ready("upgrade", expect=2 if file == "coordinator.toml" else 1).stderr
        assert said.startswith("error: ")
        assert file in said or "cannot be written" in said
        assert said.count("\n") == 1

    def test_a_folder_that_is_not_ours_is_an_error_on_one_line(self, ready, home, monkeypatch):
        def refuse(path, *_, **__):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("edge_server.registry.Registry.__init__", refuse)
        assert ready("devices", "list", expect=1).stderr.endswith(": Permission denied\n")

    def test_a_folder_that_cannot_be_made_is_refused(self, run, home):
        home.write_text("a file")
        result = run("init", expect=2)
        assert "home" in result.stderr


class TestPush:
    def test_the_first_release_and_then_a_staged_one(self, ready, checkpoint):
        assert "release 1 to group default" in ready("push", checkpoint(1)).output
        result = ready("push", checkpoint(2), "--stages", "5,50,100", "--soak", "60", "--min-labelled", "0")
        assert "5 % of the group" in result.output
        plan = json.loads(ready("rollout", "show", "2", "--json").output)["plan"]
        assert (plan["stages"], plan["soak_s"], plan["min_labelled"]) == ([5, 50, 100], 60.0, 0)

    def test_a_rollout_for_nobody_is_told(self, ready, checkpoint, tmp_path):
        assert "NO device is in group default" in ready("push", checkpoint(1)).stderr
        ready("devices", "add", "pump-1", "--group", "pumps", "--out", tmp_path / "bundle.json")
        assert "NO device" not in ready("push", checkpoint(2), "--group", "pumps").stderr
        result = ready("push", checkpoint(3), "--group", "pumps", "--where", "site=moon")
        assert "NO device is in group pumps where site=moon" in result.stderr

    def test_a_release_that_is_here_is_calculated_and_started(self, ready, checkpoint):
        assert "nobody is told" in ready("releases", "add", checkpoint(1)).output
        assert json.loads(ready("releases", "add", checkpoint(2), "--json").output)["release"] == 2
        assert "release 1 to group default" in ready("rollout", "start", "1").output
        test = ("rollout", "start", "2", "--strategy", "ab", "--control-percent", "30", "--calculate")
        assert json.loads(ready(*test, "--json").output)["enough"] is False
        assert ready(*test).output.splitlines()[1].endswith("no")
        assert "--strategy ab" in ready("rollout", "start", "2", "--calculate", expect=2).stderr
        assert "no release 3" in ready("rollout", "start", "3", "--calculate", expect=1).stderr
        started = json.loads(ready("rollout", "start", "2", "--stages", "5 devices,100", "--json").stdout)
        assert (started["id"], started["plan"]["stages"]) == (2, ["5 devices", 100])

    def test_a_busy_group_is_an_error_on_one_line(self, ready, checkpoint):
        ready("push", checkpoint(1))
        ready("push", checkpoint(2))
        result = ready("push", checkpoint(3), expect=1)
        assert result.stderr.startswith("error: group 'default' is busy with rollout 2")
        assert result.stderr.count("\n") == 1

    def test_a_damaged_checkpoint_is_an_integrity_error(self, ready, checkpoint):
        folder = checkpoint(1)
        (folder / "card.md").write_text("!")
        assert "card.md" in ready("push", folder, expect=3).stderr

    def test_a_folder_that_is_no_checkpoint_is_an_integrity_error(self, ready, tmp_path):
        assert "manifest.json" in ready("push", tmp_path / "nothing", expect=3).stderr

    @pytest.mark.parametrize(
        "options",
        [
            ("--stages", "10"),
            ("--stages", "a,b"),
            ("--stages", ""),
            ("--soak", "-1"),
            ("--soak", "x"),
            ("--max-drop", "7"),
            ("--group", "a/b"),
        ],
    )
    def test_wrong_options_are_wrong_usage(self, ready, checkpoint, options):
        assert ready("push", checkpoint(1), *options, expect=2).stderr

    def test_without_settings_it_says_what_to_do(self, run, checkpoint):
        assert "edge-coordinator init" in run("push", checkpoint(1), expect=2).stderr

    def test_a_traceback_only_with_debug(self, ready, checkpoint, home):
        ready("push", checkpoint(2))
        folder = checkpoint(1)
        assert "Traceback" not in ready("push", folder, expect=1).stderr
        result = CliRunner().invoke(main, ["--debug", "push", str(folder), "--home", str(home)])
        assert result.exit_code == 1
        assert type(result.exception).__name__ == "ReleaseError"


class TestRollout:
    def test_list_show_and_abort(self, ready, checkpoint):
        ready("push", checkpoint(1))
        ready("push", checkpoint(2))
        table = ready("rollout", "list").output.splitlines()
        assert table[0].split()[:5] == ["id", "release", "group", "strategy", "status"]
        assert table[1].split()[:5] == ["2", "2", "default", "canary", "running"]
        ready("rollout", "abort", "2", "--reason", "wrong labels")
        assert "aborted: wrong labels" in ready("rollout", "show", "2").output
        records = json.loads(ready("rollout", "list", "--json").output)
        assert [record["state"]["status"] for record in records] == ["rolling_back", "completed"]

    def test_a_plan_comes_from_a_file_and_options_go_before_it(self, ready, checkpoint, tmp_path):
        plan = tmp_path / "plan.toml"
        plan.write_text('stages = ["3 devices", 100]\nsoak_s = 5.0\n[[gates]]\nmetric = "drift"\nmargin = 1.0\n')
        ready("push", checkpoint(1))
        result = ready("push", checkpoint(2), "--plan", plan, "--soak", "7", "--approval", "each", "--json")
        record = json.loads(result.stdout)
        assert record["plan"]["stages"] == ["3 devices", 100]
        assert (record["plan"]["soak_s"], record["plan"]["gates"][0]["metric"]) == (7.0, "drift")
        assert "approve stage 1" in record["state"]["waits"]
        plan.write_text("soak = 1")
        assert "plan.toml" in ready("push", checkpoint(3), "--plan", plan, expect=2).stderr
        assert "stages must" in ready("push", checkpoint(4), "--stages", "some,100", expect=2).stderr

    def test_approve_pause_and_resume_are_audited(self, ready, checkpoint, rows):
        ready("push", checkpoint(1))
        ready("push", checkpoint(2), "--approval", "each")
        assert "completed" in ready("rollout", "approve", "1", expect=1).stderr
        assert "rollout 2 is approved" in ready("rollout", "approve", "2", "--reason", "looks good").output
        assert "waits for no approval" in ready("rollout", "approve", "2", expect=1).stderr
        assert "rollout 2 is paused" in ready("rollout", "pause", "2", "--reason", "lunch").output
        assert "paused already" in ready("rollout", "pause", "2", expect=1).stderr
        assert ready("rollout", "list").output.splitlines()[1].split()[4] == "paused"
        assert json.loads(ready("rollout", "resume", "2", "--json").output)["state"]["paused"] is False
        assert "is not paused" in ready("rollout", "resume", "2", expect=1).stderr
        acts = [(actor, action) for actor, action in rows("SELECT actor, action FROM audit ORDER BY id")][-3:]
        assert acts == [("cli", f"rollout {what}") for what in ("approved", "paused", "resumed")]

    def test_watch_prints_every_change_until_the_end(self, ready, checkpoint, home, monkeypatch):
        ready("push", checkpoint(1))
        ready("push", checkpoint(2))
        acts = [lambda: None, lambda: ready("rollout", "pause", "2"), lambda: ready("rollout", "abort", "2"), None]

        def sleep(seconds):
            assert seconds == 1.5
            if (act := acts.pop(0)) is not None:
                act()
            else:
                with closing(Registry(home)) as registry:
                    registry.advance()

        monkeypatch.setattr("edge_server.cli_rollouts.time.sleep", sleep)
        lines = ready("rollout", "watch", "2", "--interval", "1.5", expect=1).output.splitlines()
        assert lines[0].startswith("stage 1/2 [------------------------] 0 of 0 devices")
        assert [line.split(":")[0] for line in lines[2:]] == ["rolling back", "rolled back"]
        assert ready("rollout", "watch", "1").output.startswith("completed")

    def test_groups_are_told_a_mode(self, ready):
        assert "0 devices are told now" in ready("group", "mode", "lab", "adapt").output, "none is online"
        assert json.loads(ready("group", "list", "--json").output)[0]["mode"] == "adapt"
        assert ready("group", "list").output.splitlines()[1].split() == ["lab", "-", "adapt", "-"]
        ready("group", "mode", "lab", "own")
        assert json.loads(ready("group", "list", "--json").output)[0]["mode"] == ""

    def test_unknown_and_ended_rollouts_are_refused(self, ready, checkpoint):
        ready("push", checkpoint(1))
        assert "no rollout 9" in ready("rollout", "show", "9", expect=1).stderr
        assert "no rollout 9" in ready("rollout", "abort", "9", expect=1).stderr
        assert "completed" in ready("rollout", "abort", "1", expect=1).stderr
        ready("rollout", "show", "x", expect=2)
        assert ready("rollout", "show", "1").output.startswith("rollout 1: release 1 to default, canary, completed\n")


class TestDevices:
    def test_add_list_and_password_file(self, ready, tmp_path):
        assert "edge enroll pump-1.bundle.json" in ready("devices", "add", "pump-1", "--group", "lab").output
        bundle = json.loads((tmp_path / "pump-1.bundle.json").read_text())
        assert bundle["group"] == "lab"
        assert ready("devices", "list").output.splitlines()[1].split()[:3] == ["pump-1", "lab", "new"]
        (record,) = json.loads(ready("devices", "list", "--json").output)
        assert (record["name"], record["health"], record["accuracy"]) == ("pump-1", "new", None)
        password_file = ready("devices", "passwd").output
        assert password_file.startswith("pump-1:$7$")
        assert bundle["broker"]["password"] not in password_file

    def test_many_are_added_at_once_and_stay_when_one_cannot_be(self, ready, tmp_path):
        (tmp_path / "bundles").mkdir()
        many = ("devices", "add", "pump-1", "pump-2", "--out", tmp_path / "bundles", "--json")
        assert [told["device"] for told in json.loads(ready(*many).output)] == ["pump-1", "pump-2"]
        assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == [
            "pump-1.bundle.json", "pump-2.bundle.json",
        ]  # fmt: skip
        ready("devices", "add", "pump-3", "no good", "--out", tmp_path / "bundles", expect=2)
        assert len(json.loads(ready("devices", "list", "--json").output)) == 3
        assert "must be a folder" in ready("devices", "add", "a", "b", "--out", tmp_path / "one", expect=2).stderr

    def test_commands_of_a_device_that_is_none_are_an_error(self, ready):
        assert "no device 'nobody'" in ready("commands", "nobody", expect=1).stderr

    def test_a_duplicate_is_refused(self, ready):
        ready("devices", "add", "pump-1")
        assert "choose another name" in ready("devices", "add", "pump-1", "--out", "b.json", expect=1).stderr

    def test_a_bad_name_is_wrong_usage(self, ready):
        assert "device name" in ready("devices", "add", "a/b", "--out", "b.json", expect=2).stderr


class TestUsers:
    def test_add_list_and_revoke(self, ready, home):
        token = json.loads(ready("users", "add", "vic", "--role", "viewer", "--json").output)["token"]
        with closing(Registry(home)) as registry:
            assert registry.users.by_token(token).name == "vic"
        assert "vic" in ready("users", "list").output
        assert token not in ready("users", "list", "--json").output
        ready("users", "revoke", "vic")
        listed = json.loads(ready("users", "list", "--json").output)
        assert [user["revoked"] is None for user in listed] == [True, False]
        assert "no user 'vic'" in ready("users", "revoke", "vic", expect=1).stderr

    def test_a_role_that_there_is_not_is_wrong_usage(self, ready):
        assert "viewer" in ready("users", "add", "vic", "--role", "king", expect=2).stderr


def leaves(command, path=()):
    for name, sub in getattr(command, "commands", {}).items():
        yield from leaves(sub, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


@pytest.mark.parametrize(
    ("path", "command"), list(leaves(main)), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_can_print_json(path, command):
    assert "--json" in {option for parameter in command.params for option in parameter.opts}


class TestJson:
    def test_what_is_done_is_told_as_json_too(self, ready, tmp_path, home):
        added = json.loads(ready("devices", "add", "pump", "--out", tmp_path / "b.json", "--json").output)
        assert added == {"device": "pump", "group": "default", "bundle": str(tmp_path / "b.json")}
        assert len(json.loads(ready("command", "pump", "status", "--json").output)) == 1
        assert json.loads(ready("group", "mode", "default", "monitor", "--json").output)["told"] == 0
        keys = ready("keys", "init", "--root-keys", tmp_path / "away", "--no-passphrase", "--json")
        assert json.loads(keys.output)["threshold"] == 2
        assert json.loads(ready("devices", "passwd", "--json").output)["password_file"].startswith("pump:")
        assert json.loads(ready("devices", "revoke", "pump", "--json").output)["revoked"] is True


class TestServe:
    def test_the_embedded_broker_is_not_exposed_by_mistake(self, ready, home):
        settings = home / "coordinator.toml"
        settings.write_text('[broker]\nembedded = true\nhost = "0.0.0.0"\n')
        assert "--expose-broker" in ready("serve", expect=2).stderr

    def test_an_http_address_beyond_this_machine_is_refused(self, ready, home):
        (home / "coordinator.toml").write_text('[http]\nhost = "0.0.0.0"\n')
        assert "in the clear" in ready("serve", expect=2).stderr

    def test_nor_is_one_with_tls_while_there_are_no_users(self, home, run):
        home.mkdir()
        (home / "coordinator.toml").write_text('[http]\nhost = "0.0.0.0"\ncert_file = "c"\nkey_file = "k"\n')
        Store(home / "coordinator.db").close()  # as from before there were users
        assert "there are no users" in run("serve", expect=2).stderr

    def test_a_password_file_that_is_missing_is_named(self, ready, home):
        (home / "coordinator.toml").write_text('[broker]\nusername = "c"\npassword_file = "nowhere"\n')
        assert "nowhere" in ready("serve", expect=2).stderr


def test_the_home_folder_comes_from_the_environment_too(ready, home, monkeypatch):
    monkeypatch.setenv("EDGE_COORDINATOR_HOME", str(home))
    assert CliRunner().invoke(main, ["devices", "list"]).exit_code == 0


def test_it_runs_from_a_checkout():
    result = subprocess.run(
        [sys.executable, "-m", "server", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "edge-coordinator" in result.stdout or "python -m server" in result.stdout


def test_help_imports_neither_web_framework_nor_database(tmp_path):
    program = (
        "import sys\n"
        "from edge_server.cli import main\n"
        "main(['push', '--help'], standalone_mode=False)\n"
        "assert not {'starlette', 'uvicorn', 'sqlite_utils', 'paho', 'iotcore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)


def test_exported_names_resolve():
    import edge_server

    assert sorted(edge_server.__all__) == edge_server.__all__
    assert all(getattr(edge_server, name) is not None for name in edge_server.__all__)
    assert dir(edge_server) == edge_server.__all__
    with pytest.raises(AttributeError):
        edge_server.nothing  # noqa: B018


class TestReleaseDetail:
    def test_it_shows_what_a_release_was_made_from_and_its_card(self, ready, checkpoint, home):
        ready("push", checkpoint(1))
        ready("push", checkpoint(2), "--group", "other")
        connection = sqlite3.connect(home / "coordinator.db")
        connection.execute(
            "UPDATE releases SET parent = (SELECT digest FROM releases WHERE release = 1) WHERE release = 2"
        )
        connection.execute("UPDATE releases SET parent = 'cafe' WHERE release = 1")
        connection.commit()
        connection.close()
        told = ready("releases", "show", 2).output
        assert "card.md of 2" in told
        assert [line.split()[0] for line in told.splitlines()[1:4]] == ["2", "1", "-"]
        found = json.loads(ready("releases", "show", 2, "--json").output)
        assert ([entry["release"] for entry in found["lineage"]], found["origin"]) == ([1], "cafe")

    def test_a_release_that_is_not_there_is_told(self, ready):
        assert "there is no release 7" in ready("releases", "show", 7, expect=1).stderr

    def test_the_audit_log_is_shown_newest_first(self, ready, tmp_path):
        for name in ("a", "b"):
            ready("devices", "add", name, "--out", tmp_path / f"{name}.json")
        entries = json.loads(ready("audit", "--json").output)
        assert [entry["detail"].get("device") for entry in entries] == ["b", "a", None]
        assert "device added" in ready("audit", "--limit", 1).output
