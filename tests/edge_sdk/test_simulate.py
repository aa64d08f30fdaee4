"""Simulated fleets: real devices that follow a scenario, whose story depends on the seed alone."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main
from edge_sdk.errors import ConfigError, MissingExtraError
from edge_sdk.fleet_compare import compare
from edge_sdk.fleet_page import page
from edge_sdk.fleet_report import ALL, load_report, summary_lines
from edge_sdk.mqtt import MqttTransport, Tls
from edge_sdk.plan import prepare, prepare_scenario
from edge_sdk.scenario import Expect
from edge_sdk.simulate import COORDINATORS, Acknowledging, Fleet, FleetTimeoutError, installed_coordinator
from edge_server.simulation import open_coordinator

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]
TOML = """
about = "a small fleet"

[fleet]
checkpoint = "{checkpoint}"
devices = 6
duration_h = 10
tick_s = 1200
predictions_per_h = 120

[data]
source = "digits"
labels = ["0", "1", "2", "3", "4", "5", "6", "7"]

[config]
mode = "adapt"
policy = {{ cooldown_s = 3600, min_fresh_rows = 40 }}
drift.alarms_per_day = 0.5
gate.max_wait_s = 7200
update.trust = "none"
report.interval_s = 1200

[[cohort]]
name = "steady"
label = {{ share = 0.5, delay_h = 1, noise = 0.02 }}
network = {{ online_share = 0.7, outage_h = 1 }}
clock = {{ skew_s = 60 }}

[[cohort]]
name = "tilted"
count = 2
drift = [{{ effect = "rotation", size = 35, at_h = 4 }}]

[[cohort]]
name = "weak"
count = 2
loss = {{ share = 0.5, from_h = 3, until_h = 3.1 }}
battery = {{ start = 0.1, drain_per_h = 0.04, plug_from_h = 5, plug_until_h = 7 }}
"""
RELEASES = """
[[release]]
checkpoint = "{second}"
at_h = 1
rollout = {{ stages = [50, 100], soak_s = 600, min_labelled = 10, max_accuracy_drop = 0.2 }}
"""


@pytest.fixture
def scenario(tmp_path, checkpoint):
    """Writes a scenario file: what is in TOML, with some of it replaced, and more after it.

    With fewer `hours` nobody is lost or runs out of power, and data change after half an hour.
    """

    def write(*changes, more="", name="small.toml", hours=10, **values):
        text = TOML.format(checkpoint=checkpoint)
        if hours < 10:
            text = text[: text.index("loss =")].replace("at_h = 4", "at_h = 0.5")
            text = text.replace("duration_h = 10", f"duration_h = {hours}")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text + more.format(**values))
        return path

    return write


def run(prepared, **options):
    with Fleet(prepared, **options) as fleet:
        return fleet.run()


def lasting(report):
    """What must be the same for the same seed, as bytes."""
    return msgspec.json.encode(report.lasting())


@pytest.fixture(scope="module")
def story(checkpoint, tmp_path_factory):
    """One run of the small fleet, for tests that only look at it."""
    path = tmp_path_factory.mktemp("story") / "small.toml"
    path.write_text(TOML.format(checkpoint=checkpoint))
    return run(prepare(path, seed=1), workers=1)


# ---- the same seed, the same story


def test_the_same_seed_gives_the_same_bytes_in_one_process_and_in_two_and_another_seed_others(scenario, story):
    path = scenario()
    again, other = run(prepare(path, seed=1), workers=2), run(prepare(path, seed=2), workers=1)
    assert again.event_log() == story.event_log()
    assert lasting(again) == lasting(story)
    assert other.event_log() != story.event_log()
    assert {"release_activated", "drift_alarm", "learn_started", "promoted"} <= {event.name for event in story.events}
    lines = [json.loads(line) for line in story.event_log().splitlines()]
    assert [line["time_s"] for line in lines] == sorted(line["time_s"] for line in lines)


def test_releases_give_the_same_bytes_with_any_number_of_processes(scenario, build):
    path = scenario(more=RELEASES, second=build(release=2, seed=1))
    first, second = (run(prepare(path), workers=workers, coordinator=open_coordinator) for workers in (1, 2))
    assert lasting(first) == lasting(second)
    (release,) = first.releases
    assert (release.name, release.status) == ("release 2", "completed"), release
    assert release.history[0][0] == 1.0  # when it was pushed
    reached = [device for device in first.devices if device.lost_h is None]
    assert {device.release for device in reached} == {2}
    (lost,) = (device for device in first.devices if device.lost_h is not None)
    assert lost.wire_received < min(device.wire_received for device in reached)


def test_over_a_real_broker_the_same_happens_as_in_memory(scenario, embedded_broker):
    path = scenario(("online_share = 0.7", "online_share = 1.0"), hours=4)
    memory = run(prepare(path), workers=1)
    mqtt = run(prepare(path), broker=f"mqtt://{embedded_broker.host}:{embedded_broker.port}")
    assert mqtt.event_log() == memory.event_log()
    assert len(mqtt.events) > 6
    assert all(device.wire_sent > device.bytes_sent > 0 for device in mqtt.devices)
    reader = MqttTransport(embedded_broker.host, embedded_broker.port, client_id="reader")
    reader.subscribe("#")
    reader.connect()
    wait_until(lambda: reader.connected)
    assert reader.receive() == []  # nothing that was retained stays at the broker
    reader.close()


# ---- what happens to devices


def test_a_device_whose_data_change_is_told_from_one_whose_data_do_not(story):
    devices = {device.device: device for device in story.devices}
    for name in ("tilted-0", "tilted-1"):
        device = devices[name]
        assert device.changed_h == 4
        assert device.under < device.before - 0.1
        assert device.after > device.under
        assert 0 <= device.delay_h <= 2
        assert device.clear_days == pytest.approx(4 / 24)
        assert device.promotions > 0
    steady = devices["steady-0"]
    assert (steady.changed_h, steady.under, steady.after, steady.delay_h) == (None, None, None, None)
    assert steady.clear_days == pytest.approx(10 / 24)
    assert story.onsets_h == {"tilted": [4.0]}


def test_a_lost_device_stays_away_and_one_with_an_empty_battery_comes_back(story):
    devices = {device.device: device for device in story.devices}
    lost, back = sorted((devices["weak-0"], devices["weak-1"]), key=lambda device: device.lost_h is None)
    assert 3 <= lost.lost_h <= 3.1
    assert lost.days == pytest.approx(lost.lost_h / 24)
    assert back.lost_h is None
    # off from 2.5 h on, until it is plugged in at 5
    assert 7 * 120 <= back.predictions <= 8 * 120
    told = [event.time_s / 3600 for event in story.events if event.device == lost.device]
    assert max(told) <= 3.4


def test_what_a_report_says_adds_up(story):
    assert story.ended_h == story.duration_h == 10
    assert not story.partial
    assert story.measured.accuracy == pytest.approx(story.total("right") / story.total("predictions"))
    assert story.measured.bytes_per_device_day > 0
    assert set(story.scores) == {ALL, "steady", "tilted", "weak"}
    for curve in story.scores.values():
        known = [row for row in zip(curve.low, curve.value, curve.high, strict=True) if None not in row]
        assert all(0 <= low <= share <= high <= 1 for low, share, high in known)
    assert len(story.scores[ALL].hours) == 30
    assert all(device.forgotten == device.before - device.original for device in story.devices)
    assert story.kept["tilted"].value[0] == pytest.approx(
        np.mean([device.before for device in story.devices[2:4]]), abs=1e-4
    )
    alarms = [event for event in story.events if event.name == "drift_alarm"]
    assert story.total("alarms") == len(alarms) >= story.total("false_alarms")
    assert story.total("learned") == sum(event.name == "learn_started" for event in story.events)
    assert all(cost.cpu_s > cost.learner_s >= 0 for cost in story.costs)
    assert len(summary_lines(story)) >= 7


def test_files_of_a_release_lie_on_the_disk_once_however_many_devices_have_it(scenario, tmp_path):
    with Fleet(prepare(scenario()), workers=1, home=tmp_path / "fleet") as fleet:
        fleet.open()
        heads = sorted((tmp_path / "fleet" / "devices").glob("*/slots/a/trunk*.onnx"))
        assert len(heads) >= 6
        assert len({path.stat().st_ino for path in heads}) == len({path.name for path in heads})
        trunks = {id(s.device._served.model.trunk) for s in fleet.devices}
        assert len(trunks) == 1
    assert (tmp_path / "fleet").is_dir()  # given, so it stays


def test_a_temporary_folder_goes_with_the_fleet(scenario):
    with Fleet(prepare(scenario(hours=1)), workers=1) as fleet:
        fleet.run()
        home = fleet._home
        assert home.is_dir()
    assert not home.exists()


def test_samples_that_the_model_cannot_take_are_counted_and_stop_nobody(scenario):
    path = scenario(
        ('effect = "rotation", size = 35, at_h = 0.5', 'effect = "missing", size = 0.001, at_h = 1'),
        hours=3,
    )
    report = run(prepare(path), workers=1)
    tilted = [device for device in report.devices if device.cohort == "tilted"]
    assert all(0 < device.refused < device.predictions for device in tilted)
    assert all(device.refused == 0 for device in report.devices if device.cohort != "tilted")
    assert all(device.under is None for device in tilted)  # nobody can say


def test_devices_that_are_lied_to_do_not_count_where_accuracy_is_expected(scenario):
    path = scenario(
        ('drift = [{ effect = "rotation", size = 35, at_h = 0.5 }]', "poison = { share = 0.5, from_h = 2 }"),
        hours=4,
        more="\n[expect]\nmin_accuracy = 0.5\nmin_accuracy_from_h = 2\n",
    )
    report = run(prepare(path), workers=1)
    (poisoned,) = (device for device in report.devices if device.poisoned)
    assert (poisoned.cohort, poisoned.changed_h) == ("tilted", 2)
    assert report.unmet == []
    assert report.measured.accuracy > 0.9


def test_a_scenario_made_in_code_runs_as_one_that_was_read(scenario):
    read = prepare(scenario(hours=2))
    made = prepare_scenario(msgspec.structs.replace(read.scenario, file=""))
    assert run(made, workers=1).event_log() == run(read, workers=1).event_log()


# ---- ends


def test_a_fleet_that_is_stopped_reports_what_there_is_and_says_so(scenario):
    seen = []
    with Fleet(prepare(scenario()), workers=2) as fleet:

        def stop_soon(progress):
            seen.append(progress)
            fleet.stop_requested = len(seen) == 5

        report = fleet.run(on_tick=stop_soon)
        pids = [shard.pid for shard in fleet._shards[:-1]]  # the last one lives in this process
        assert pids
        with pytest.raises(ValueError, match="reported already"):
            fleet.report()
    assert report.partial
    assert report.ended_h == pytest.approx(5 * 1200 / 3600)
    assert summary_lines(report)[0].startswith("PARTIAL: stopped after 1.7 of 10 hours")
    assert "Partial: stopped" in page(report)
    assert len(report.scores[ALL].hours) == 5
    assert seen[-1].predictions == report.total("predictions")
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def children(pid):
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
            if (found := stat(path)) and found[1] == str(pid)]  # fmt: skip


def stat(path):
    try:
        return path.read_text().rpartition(") ")[2].split()
    except OSError:
        return None


@pytest.fixture
def command(scenario, tmp_path):
    """`edge simulate` in a process group of its own, well under way."""
    path = scenario(("duration_h = 10", "duration_h = 2000"))
    process = subprocess.Popen(
        [sys.executable, "-c", "from edge_sdk.cli import main; main()", "simulate", path,
         "--workers", "3", "--json", tmp_path / "out.json"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    homes = f"{tmp_path}/edge-simulation-*/devices/*/edge.db"
    wait_until(lambda: process.poll() is not None or len(list(Path("/").glob(homes[1:]))) == 6)
    yield process
    process.kill()
    process.communicate()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        threading.Event().wait(0.02)


def test_ctrl_c_leaves_no_process_and_a_partial_report(command, tmp_path):
    workers = children(command.pid)
    assert len(workers) == 2
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to all of the group
    _, told = command.communicate(timeout=60)
    assert command.returncode == 130, told
    assert "stopping after this tick" in told
    assert not any(is_alive(pid) for pid in workers)
    report = load_report(tmp_path / "out.json")
    assert report.partial
    assert len(report.devices) == 6
    assert list(tmp_path.glob("edge-simulation-*")) == []


def test_workers_end_when_their_fleet_is_killed(command):
    workers = children(command.pid)
    command.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in workers))


def test_a_worker_that_is_killed_ends_the_run_with_one_line(scenario):
    from edge_sdk.errors import TransportError

    with Fleet(prepare(scenario()), workers=2) as fleet:
        fleet.open()
        os.kill(fleet._shards[0].pid, signal.SIGKILL)
        with pytest.raises(TransportError, match="process of the simulation"):
            fleet.run()


# ---- what is missing or wrong


def test_releases_need_a_coordinator_and_the_error_says_what_to_install(scenario, build, monkeypatch):
    prepared = prepare(scenario(more=RELEASES, second=build(release=2, seed=1)))
    monkeypatch.setattr("edge_sdk.simulate.entry_points", lambda **_: [])
    with pytest.raises(MissingExtraError, match=r"edge-sdk\[server\]"):
        Fleet(prepared)
    with pytest.raises(MissingExtraError, match=r"edge-sdk\[server\]"):
        run(prepared, workers=1, coordinator=Acknowledging)


def test_the_installed_coordinator_is_found_by_its_entry_point(monkeypatch):
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][COORDINATORS]
    entries = [EntryPoint(name, value, COORDINATORS) for name, value in named.items()]
    monkeypatch.setattr("edge_sdk.simulate.entry_points", lambda group: entries if group == COORDINATORS else [])
    assert installed_coordinator() is open_coordinator


def test_a_rule_that_a_rollout_does_not_have_is_a_configuration_error(scenario, build):
    more = RELEASES.replace("soak_s", "soak")
    prepared = prepare(scenario(more=more, second=build(release=2, seed=1)))
    with pytest.raises(ConfigError, match=r"release\.rollout.*soak"):
        run(prepared, workers=1, coordinator=open_coordinator)


@pytest.mark.parametrize(("epochs", "status"), [(8, "completed"), (0, "rolled_back")])
def test_a_release_is_seen_in_shadow_before_it_serves_or_not(scenario, build, epochs, status):
    """A network that was never trained is right on one label in eight: it never serves."""
    rules = (
        'rollout = {{ strategy = "shadow", stages = [100], max_parallel = 2, shadow_s = 3600, soak_s = 600,'
        " min_labelled = 20, max_accuracy_drop = 0.2, max_failures = 6 }}"  # drift sets in while some are on probation
    )
    more = RELEASES.replace(RELEASES[RELEASES.index("rollout") :], rules)
    path = scenario(more=more, second=build(release=2, seed=1, epochs=epochs))
    report = run(prepare(path), workers=1, coordinator=open_coordinator)
    (release,) = report.releases
    assert release.status == status, release
    reached = {device.release for device in report.devices if device.lost_h is None}
    assert (2 in reached) is (status == "completed")
    assert "in shadow" in release.history[0][2]


def test_a_release_that_the_coordinator_refuses_is_reported_and_stops_nothing(scenario, build):
    second = build(release=2, seed=1)
    third = build(release=3, seed=2)
    more = RELEASES + RELEASES.replace("{second}", "{third}").replace("at_h = 1", "at_h = 1.2")
    path = scenario(hours=2, more=more, second=second, third=third)
    report = run(prepare(path), workers=1, coordinator=open_coordinator)
    assert [release.status for release in report.releases][1] == "not pushed"
    assert "active rollout" in report.releases[1].reason or "rollout" in report.releases[1].reason


@pytest.mark.parametrize("url", ["http://host", "mqtt://", "mqtt://host:port", "mqtt://host/path", "host:1883"])
def test_a_broker_that_is_no_mqtt_url_is_refused(scenario, url):
    with pytest.raises(ConfigError, match="is no broker's URL"):
        Fleet(prepare(scenario()), broker=url)


def test_certificates_need_an_encrypted_broker_and_a_key_its_certificate(scenario, edge, tmp_path):
    tls = Tls(ca_file=tmp_path / "ca.pem")
    cases = {"": "without a broker", "mqtt://h": "use mqtts://", "mqtts://h": "ca.pem: .*No such file"}
    for broker, says in cases.items():
        with pytest.raises(ConfigError, match=says):
            Fleet(prepare(scenario()), broker=broker, tls=tls)
    result = edge(scenario(), "--broker", "mqtts://h", "--key", tmp_path / "one.key")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "give --cert as well" in result.stderr


def test_a_broker_that_is_none_is_refused_without_telling_the_password(scenario):
    with pytest.raises(ConfigError) as caught:
        Fleet(prepare(scenario()), broker="http://me:secret@host")
    assert "secret" not in str(caught.value)


def test_a_broker_and_several_processes_do_not_go_together(scenario):
    with pytest.raises(ConfigError, match="one process"):
        Fleet(prepare(scenario()), broker="mqtt://127.0.0.1", workers=2)


def test_a_broker_that_does_not_answer_is_an_error_that_says_so(scenario, free_port_number):
    with (
        Fleet(prepare(scenario()), broker=f"mqtt://127.0.0.1:{free_port_number}", settle_timeout_s=0.2) as fleet,
        pytest.raises(FleetTimeoutError, match="devices still wait for a connection"),
    ):
        fleet.run()


@pytest.fixture
def free_port_number():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- the command


@pytest.fixture
def edge(monkeypatch):
    monkeypatch.setattr("edge_sdk.simulate._fitting_workers", lambda _: 1)

    def call(*arguments):
        return CliRunner().invoke(main, ["simulate", *map(str, arguments)])

    return call


def test_the_command_writes_page_report_and_events_and_tells_what_came_out(edge, scenario, tmp_path):
    path = scenario(hours=3)
    made = edge(path, "--html", tmp_path / "o.html", "--json", tmp_path / "o.json", "--events", tmp_path / "o.jsonl")
    assert made.exit_code == 0, made.output
    assert "6 devices" in made.output
    assert "3.0 of 3 h" in made.stderr
    report = load_report(tmp_path / "o.json")
    assert (tmp_path / "o.jsonl").read_bytes() == report.event_log()
    drawn = (tmp_path / "o.html").read_text()
    assert drawn == page(report)
    assert drawn.count("<svg") >= 3
    assert not any(word in drawn for word in ("http:", "https:", "<script", "<link", "<img", "nan,", "None"))


def test_what_is_expected_decides_the_exit_code_with_ci_alone(edge, scenario):
    good = scenario(hours=1, more="\n[expect]\nmin_accuracy = 0.5\n", name="good.toml")
    bad = scenario(
        hours=1,
                more="\n[expect]\nmin_accuracy = 1.0\nmax_bytes_per_device_day = 1\n", name="bad.toml",
    )  # fmt: skip
    assert edge(good, "--ci", "--quiet").exit_code == 0
    failed = edge(bad, "--ci", "--quiet")
    assert failed.exit_code == 1
    assert "not met: expect.min_accuracy: 1 was stated" in failed.stderr
    assert "expect.max_bytes_per_device_day" in failed.stderr
    assert edge(bad, "--quiet").exit_code == 0


def test_bad_files_are_one_line_with_the_usage_code(edge, scenario, tmp_path):
    typo = scenario(("devices = 6", "device = 6"))
    result = edge(typo)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "fleet.device: unknown key; did you mean 'devices'" in result.stderr
    missing = edge(scenario(), "--html", tmp_path / "no" / "o.html")
    assert missing.exit_code == 2
    assert "there is no folder" in missing.stderr
    (tmp_path / "odd.json").write_text('{"schema": 2}')
    odd = edge("compare", tmp_path / "odd.json", tmp_path / "odd.json")
    assert odd.exit_code == 2
    assert "no report of `edge simulate --json`" in odd.stderr


def test_comparing_tells_a_changed_setting_from_chance(edge, scenario, story, tmp_path):
    off = scenario(('mode = "adapt"', 'mode = "monitor"'))
    other = run(prepare(off, seed=1), workers=1)
    rows = {row.name: row for row in compare(story, other)}
    after = rows["accuracy after learning"]
    assert after.second < after.first
    assert rows["accuracy under drift"].first == pytest.approx(rows["accuracy under drift"].second, abs=0.05)
    assert rows["promotions"].second == 0
    same = compare(story, story)
    assert not any(row.clear for row in same)
    for name, report in (("a", story), ("b", other)):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(report))
    told = edge("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert told.exit_code == 0
    assert "accuracy after learning" in told.output
    listed = json.loads(edge("compare", tmp_path / "a.json", tmp_path / "b.json", "--json").output)
    assert [row["name"] for row in listed] == list(rows)


def test_a_report_survives_its_file(story, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode(story))
    assert load_report(path) == story
    newer = msgspec.structs.replace(story, schema=3)
    path.write_bytes(msgspec.json.encode(newer))
    with pytest.raises(ConfigError, match="schema 3"):
        load_report(path)


def test_a_page_tells_what_was_not_met_and_escapes_what_it_is_given(story):
    report = msgspec.structs.replace(story, about="<b>", unmet=Expect(min_accuracy=1.0).unmet(story.measured))
    drawn = page(report)
    assert "&lt;b&gt;" in drawn
    assert "expect.min_accuracy" in drawn
    assert math.isclose(report.measured.accuracy, story.measured.accuracy)
