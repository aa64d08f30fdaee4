"""The device's command line: what it says, and with which exit code."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from edge_sdk import messages
from edge_sdk.cli import main
from edge_sdk.config import load_config
from edge_sdk.errors import IntegrityError
from edge_sdk.progress import AdaptState
from edge_sdk.skew import Score, Skew
from edge_sdk.store import Lineage, Store

BUNDLE = {
    "schema": 1,
    "device": "pump-1",
    "group": "pumps",
    "prefix": "plant",
    "broker": {"host": "10.0.0.5", "port": 8883, "username": "pump-1", "password": 'quo"te'},
}
DEADLINE_S = 30


def edge(*arguments):
    """Run `edge`; gives its result, whose exit code is the process's."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def home(tmp_path):
    return tmp_path / "device"


@pytest.fixture
def bundle(tmp_path):
    """Writes an enrolment bundle: `bundle(schema=2)`."""

    def write(**changes):
        path = tmp_path / "bundle.json"
        path.write_text(json.dumps({**BUNDLE, **changes}))
        return path

    return write


@pytest.fixture
def used(make_device, digits, home):
    """A stopped device that has predicted, and learned a head that it serves."""
    device = make_device(home.name)
    device.observe(device.predict(digits.life.x[0]).id, "3")
    slots = device._slots
    slots.promote(slots.write_head(slots.pointer.current.slot, slots.head(slots.pointer.current)))
    device.stop()
    return home


@pytest.fixture
def learned(make_device, digits, home):
    """A stopped device that serves a head it learned, with samples of a label it does not know."""
    device = make_device(home.name)
    x, y = digits.life.x[:300], [str(label) for label in digits.life.y[:300]]
    device.learn(x, y)  # 8 and 9 are new to it
    device.learn_now()
    device.step()
    device.learn(x[:40], ["comma"] * 40)
    device.predict(x[0], id="mine")
    device.predict(x[1], id="other")
    device.stop()
    (home / "device.toml").write_text("[join]\nwindow_s = 1e9\n")  # its clock has stood still for long
    return home


def last_line(result):
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[-1]


# ---- enrolment


def test_enrolment_writes_settings_that_only_the_owner_reads(bundle, home):
    result = edge("enroll", bundle(), "--home", home)
    assert result.exit_code == 0, result.output
    assert "enrolled as pump-1 in group pumps" in result.output
    path = home / "device.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    config = load_config(path)
    assert (config.device, config.group, config.prefix) == ("pump-1", "pumps", "plant")
    broker = config.broker
    assert (broker.host, broker.port, broker.username, broker.password) == ("10.0.0.5", 8883, "pump-1", 'quo"te')


def test_enrolling_twice_needs_force(bundle, home):
    edge("enroll", bundle(), "--home", home)
    result = edge("enroll", bundle(device="pump-2"), "--home", home)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert load_config(home / "device.toml").device == "pump-1"
    assert edge("enroll", bundle(device="pump-2"), "--home", home, "--force").exit_code == 0
    assert load_config(home / "device.toml").device == "pump-2"
    assert (home / "device.toml").stat().st_mode & 0o777 == 0o600


def test_without_a_root_the_device_is_told_that_nothing_is_signed(bundle, home):
    result = edge("enroll", bundle(), "--home", home)
    assert "NOT signed" in result.stderr
    assert load_config(home / "device.toml").update.trust == "none"
    assert not (home / "root.json").exists()


def test_a_root_is_installed_and_never_taken_away_by_a_bundle(bundle, home):
    root = '{"signed": {"version": 1}, "signatures": []}'
    assert "NOT signed" not in edge("enroll", bundle(root=root), "--home", home).stderr
    assert (home / "root.json").read_text() == root
    assert load_config(home / "device.toml").update.trust == "root"
    result = edge("enroll", bundle(device="pump-2"), "--home", home, "--force")
    assert result.exit_code == 2
    assert "the bundle has no root: nothing was changed" in result.output
    assert load_config(home / "device.toml").device == "pump-1"


def test_a_root_that_is_none_is_refused(bundle, home):
    assert edge("enroll", bundle(root="{"), "--home", home).exit_code == 2
    assert not (home / "device.toml").exists()


def test_the_home_may_stand_in_the_environment(bundle, home, monkeypatch):
    monkeypatch.setenv("EDGE_HOME", str(home))
    assert edge("enroll", bundle()).exit_code == 0
    assert (home / "device.toml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2, this SDK reads 1; update the SDK"),
        ({"broker": {"hots": "10.0.0.5", "port": 1}}, "is not an enrolment bundle"),
        ({"broker": {"host": "10.0.0.5", "port": 1, "pasword": "x"}}, "pasword"),
        ({"group": 7}, "is not an enrolment bundle"),
    ],
)
def test_a_bundle_with_a_typo_or_of_a_newer_schema_is_a_usage_error(bundle, home, changes, message):
    result = edge("enroll", bundle(**changes), "--home", home)
    assert result.exit_code == 2
    assert message in result.output
    assert not (home / "device.toml").exists()


def test_a_bundle_that_is_no_json_is_a_usage_error(tmp_path, home):
    path = tmp_path / "bundle.json"
    path.write_bytes(b"\xff{")
    assert edge("enroll", path, "--home", home).exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "a/b"},
        {"group": "a/b"},
        {"prefix": "a/#"},
        {"broker": {"host": "10.0.0.5", "port": 70_000}},
    ],
    ids=["device", "group", "prefix", "port"],
)
def test_a_bundle_that_no_device_could_run_with_is_a_usage_error_and_installs_nothing(bundle, home, changes):
    result = edge("enroll", bundle(**changes), "--home", home)
    assert result.exit_code == 2, result.output
    assert not (home / "device.toml").exists()


def test_a_missing_bundle_is_a_usage_error(tmp_path, home):
    assert edge("enroll", tmp_path / "none.json", "--home", home).exit_code == 2


# ---- looking


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "history",
        "history --heads",
        "skew",
        "labels",
        "labels --accept 8",
        "forget a",
        "forget --all --yes",
        "rollback",
        "reset",
    ],
)
def test_a_home_without_a_device_is_a_usage_error(home, command):
    result = edge(*command.split(), "--home", home)
    assert result.exit_code == 2
    assert "there is no device in" in result.output
    assert not home.exists()


@pytest.mark.torch
def test_status_shows_the_device_for_people_and_for_programs(used):
    text = edge("status", "--home", used)
    assert text.exit_code == 0
    assert "predictions            1" in text.output
    assert "labels                 0, 1, 2, 3, 4, 5, 6, 7\n" in text.output
    found = json.loads(edge("status", "--json", "--home", used).output)
    assert (found["device"], found["release"], found["head"]) == ("dev-1", 1, 1)
    assert found["counters"]["labelled"] == 1


@pytest.mark.torch
def test_history_shows_what_happened(used):
    assert "release_activated" in edge("history", "--home", used).output
    lines = edge("history", "--json", "--home", used).output.splitlines()
    assert json.loads(lines[0])["name"] == "release_activated"
    (last,) = edge("history", "--json", "--limit", 1, "--home", used).output.splitlines()
    assert last == lines[-1]
    assert edge("history", "--limit", 0, "--home", used).exit_code == 2


@pytest.mark.torch
def test_the_making_of_each_head_is_shown(learned):
    headers, line = edge("history", "--heads", "--home", learned).output.splitlines()
    assert headers.split()[:9] == ["time", "release", "parent", "head", "outcome", "rows", "seed", "before", "after"]
    assert line.split()[2:6] == ["1", "0", "1", "promoted"]
    assert "on demand: better on " in line
    (entry,) = map(json.loads, edge("history", "--heads", "--json", "--home", learned).output.splitlines())
    assert (entry["release"], entry["parent"], entry["head"], entry["outcome"]) == (1, 0, 1, "promoted")
    detail = entry["detail"]
    assert detail["challenger"] > detail["champion"]
    assert detail["config"]["learner"] == "hybrid"
    assert {"trigger", "fresh", "seed", "evidence", "alpha", "cpu_s"} <= set(detail)


@pytest.mark.torch
def test_a_challenger_that_was_never_judged_has_no_scores(used):
    with contextlib.closing(Store(used / "edge.db")) as store, store.transaction():
        detail = {"reason": "stopped after 1 s", "trigger": "volume", "fresh": 70, "seed": 3, "cpu_s": 1.25}
        store.record_lineage(Lineage(0.0, 1, 1, None, "learn_failed", detail))
    line = last_line(edge("history", "--heads", "--home", used))
    assert line.split()[:11] == ["1970-01-01", "00:00:00", "1", "1", "-", "learn_failed", "70", "3", "-", "-", "-"]
    assert line.split()[11:] == ["1.2", "volume:", "stopped", "after", "1", "s"]


@pytest.mark.torch
def test_skew_is_shown_for_people_and_for_programs(learned):
    headers, training, *_ = edge("skew", "--home", learned).output.splitlines()
    assert headers.split() == ["rows", "right", "count", "95", "%", "interval"]
    assert training.startswith("training ")
    found = json.loads(edge("skew", "--json", "--home", learned).output)
    assert [row["name"] for row in found["scores"]] == ["training", "judge"]
    assert found["scores"][0]["rows"] >= 100


@pytest.mark.torch
def test_without_a_learned_head_there_is_no_skew_to_show(used):
    assert "no score has 10 rows yet" in edge("skew", "--home", used).output
    assert json.loads(edge("skew", "--json", "--home", used).output) == {"scores": [], "findings": []}


@pytest.mark.torch
def test_skew_says_in_words_what_is_wrong(used):
    scores = Skew(training=Score(100, 100), judge=Score(60, 100))
    with contextlib.closing(Store(used / "edge.db")) as store, store.transaction():
        store.put("adaptation", msgspec.json.encode(AdaptState(skew=scores)))
    assert last_line(edge("skew", "--home", used)).startswith("overfits: 1.000 right on rows it was trained on, 0.600")


@pytest.mark.torch
@pytest.mark.parametrize("command", [("status",), ("history",), ("skew",), ("labels",)])
def test_looking_changes_nothing_not_even_what_is_damaged(used, command):
    database = used / "edge.db"
    database.write_bytes(b"no database" * 1_000)
    result = edge(*command, "--home", used)
    assert result.exit_code == 1
    assert "edge.db cannot be opened: file is not a database" in result.output
    assert database.read_bytes() == b"no database" * 1_000
    assert not list(used.glob("*.damaged"))


@pytest.mark.torch
def test_looking_at_the_database_of_an_older_version_leaves_it_to_the_device(used):
    with contextlib.closing(sqlite3.connect(used / "edge.db")) as database:
        database.execute("PRAGMA user_version = 1")
    result = edge("status", "--home", used)
    assert result.exit_code == 1
    assert "start the device once" in result.output
    with contextlib.closing(sqlite3.connect(used / "edge.db")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.torch
def test_a_folder_that_may_only_be_read_can_be_looked_at(used, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)  # permissions do not bind the superuser
    assert json.loads(edge("status", "--json", "--home", used).output)["release"] == 1
    assert sorted(path.name for path in used.glob("edge.db*")) == ["edge.db"]


@pytest.mark.torch
def test_privacy_lists_what_leaves_the_device(used, tmp_path):
    result = edge("privacy", "--home", used)
    assert result.exit_code == 0
    assert "No input, latent or single label leaves the device" in result.output
    assert "sent so far: 0 bytes" in result.output
    assert "sent so far" not in edge("privacy", "--home", tmp_path / "none").output


def test_privacy_leaves_out_no_message_of_a_device():
    told = {"Ack", "Offer", "Part", "Desired", "MetadataSet", "Order", "Command", "Signature"}  # what a device hears
    output = edge("privacy").output
    for name, kind in vars(messages).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name not in told:
            assert f"{name}: {', '.join(kind.__struct_fields__)}" in output


# ---- changing


@pytest.mark.torch
def test_rollback_goes_back_once_and_then_says_that_it_cannot(used):
    result = edge("rollback", "--home", used)
    assert result.exit_code == 0, result.output
    assert "release 1, head 0 will serve" in result.output
    result = edge("rollback", "--home", used)
    assert result.exit_code == 3
    assert "there is no version to go back to" in result.output


@pytest.mark.torch
def test_reset_drops_the_learned_head(used):
    result = edge("reset", "--home", used)
    assert result.exit_code == 0, result.output
    assert "release 1, head 0 will serve" in result.output
    assert json.loads(edge("status", "--json", "--home", used).output)["head"] == 0


@pytest.mark.torch
def test_a_new_label_waits_until_it_is_accepted_or_refused(learned):
    count = int(last_line(edge("labels", "--home", learned)).removeprefix("comma  ").removesuffix(" samples"))
    assert 20 <= count <= 40
    assert f"new_labels             comma ({count})\n" in edge("status", "--home", learned).output
    assert last_line(edge("labels", "--accept", "comma", "--home", learned)) == "comma may be learned"
    assert last_line(edge("labels", "--home", learned)) == "no new label waits"
    assert "comma is refused" in last_line(edge("labels", "--refuse", "comma", "--home", learned))
    assert json.loads(edge("status", "--json", "--home", learned).output)["fresh_rows"] == 0
    result = edge("labels", "--accept", "3", "--home", learned)
    assert result.exit_code == 1
    assert "'3' is one of the model's labels already" in result.output


@pytest.mark.torch
def test_predictions_are_forgotten_by_their_ids(learned):
    assert last_line(edge("forget", "mine", "unknown", "--home", learned)) == "1 rows erased"
    assert last_line(edge("forget", "mine", "--home", learned)) == "0 rows erased"
    assert json.loads(edge("status", "--json", "--home", learned).output)["head"] == 1


@pytest.mark.torch
def test_everything_is_forgotten_only_by_who_means_it(learned):
    refused = CliRunner().invoke(main, ["forget", "--all", "--home", str(learned)], input="n\n")
    assert refused.exit_code == 1
    found = json.loads(edge("status", "--json", "--home", learned).output)
    assert (found["head"], found["replay_rows"] > 0) == (1, True)
    assert last_line(edge("forget", "--all", "--yes", "--home", learned)) == "release 1, head 0 will serve"
    found = json.loads(edge("status", "--json", "--home", learned).output)
    assert [found[key] for key in ("head", "replay_rows", "fresh_rows", "judge_rows")] == [0, 0, 0, 0]


@pytest.mark.parametrize("arguments", [(), ("a", "--all")])
def test_what_to_forget_must_be_said_in_one_way(home, arguments):
    result = edge("forget", *arguments, "--home", home)
    assert result.exit_code == 2
    assert "either ids of predictions or --all" in result.output


@pytest.mark.torch
def test_a_device_that_runs_is_looked_at_but_not_changed(make_device, home):
    make_device(home.name).step()
    for command in ("history", "history --heads", "skew"):
        assert edge(*command.split(), "--home", home).exit_code == 0
    for command in ("reset", "rollback", "forget a", "forget --all --yes", "labels --accept 8", "labels --refuse 8"):
        result = edge(*command.split(), "--home", home)
        assert result.exit_code == 1
        assert "in use by another process" in result.output


@pytest.mark.torch
def test_a_typo_in_the_settings_is_a_usage_error_that_names_file_and_key(used):
    (used / "device.toml").write_text('divice = "pump-1"\n')
    for command in ("reset", "run"):
        result = edge(command, "--home", used)
        assert result.exit_code == 2
        assert "device.toml" in result.output
        assert "divice" in result.output


# ---- checkpoints


@pytest.mark.torch
def test_verify_accepts_a_good_checkpoint_and_refuses_an_altered_one(checkpoint, tmp_path):
    result = edge("verify", checkpoint)
    assert result.exit_code == 0, result.output
    assert "digits release 1" in result.output
    assert "self-test ok, " in result.output
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "head.npz").write_bytes(b"")
    result = edge("verify", copy)
    assert result.exit_code == 3
    assert "head.npz has 0 bytes" in result.output
    assert edge("verify", tmp_path / "none").exit_code == 2


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["edge", "--debug", "verify", str(tmp_path)])
    assert isinstance(edge("--debug", "verify", tmp_path).exception, IntegrityError)


# ---- running


def test_running_without_settings_is_a_usage_error(home):
    result = edge("run", "--home", home)
    assert result.exit_code == 2
    assert "device.toml is missing: `edge enroll` writes it" in result.output


def test_running_with_nothing_to_serve_and_nobody_to_get_it_from_is_a_usage_error(home):
    home.mkdir()
    (home / "device.toml").touch()
    result = edge("run", "--home", home)
    assert result.exit_code == 2
    assert "give a --checkpoint" in result.output


@pytest.mark.torch
def test_what_the_system_refuses_is_one_line(tmp_path, checkpoint, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = edge("verify", checkpoint)
    assert result.exit_code == 1
    assert result.output == f"edge: {checkpoint}/manifest.json: Permission denied\n"


@pytest.mark.torch
def test_a_device_without_a_broker_runs_until_sigterm_and_stops_cleanly(home, tmp_path, checkpoint):
    home.mkdir()
    (home / "device.toml").write_text('device = "alone"\n')
    log = tmp_path / "run.log"
    command = [Path(sys.executable).with_name("edge"), "run", "--home", home, "--checkpoint", checkpoint]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while "alone runs" not in log.read_text():
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            threading.Event().wait(0.02)
        child.send_signal(signal.SIGTERM)
        assert child.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        child.kill()
        child.wait()
    assert "alone stopped" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads(edge("status", "--json", "--home", home).output)["release"] == 1
