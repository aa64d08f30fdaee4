import json

import pytest
from click.testing import CliRunner

from edge_sdk.messages import MonitorState, to_counts
from edge_server.cli import main
from edge_server.settings import SETTINGS_NAME


@pytest.fixture
def run(tmp_path, coordinator, clock, monkeypatch):
    """The command line over the coordinator's folder, at its time."""
    from edge_server import registry

    monkeypatch.setattr(registry, "SystemClock", lambda: clock)
    (tmp_path / "home" / SETTINGS_NAME).write_text("accept_unknown = true\n")

    def invoke(*arguments, expect=0):
        result = CliRunner().invoke(main, [*arguments, "--home", str(tmp_path / "home")])
        assert result.exit_code == expect, (result.output, result.exception)
        return result.output

    return invoke


@pytest.fixture
def fleet(coordinator, make_device, clock, settle, summary):
    devices = [make_device(f"d{i:02}") for i in range(12)]
    coordinator.watch()
    for hour in range(3):
        clock.advance(3600.0)
        for i, device in enumerate(devices):
            if hour == 2 and i < 8:
                device.event("drift_alarm", monitor="input", evidence=2e5, threshold=1e5, kind="covariate",
                             suspects="acc_x +0.40", words="acc_x: mean 1 -> 2")  # fmt: skip
            if hour == 2 and i == 9:
                device.event("drift_alarm", monitor="input", evidence=2e5, threshold=1e5, kind="concept",
                             suspects="acc_y -0.40", words="answers changed")  # fmt: skip
            device.report(start=clock.now() - 3600, monitors=[MonitorState("input", 0.0, 1e5, False, False)])
            device.put(summary(start=clock.now() - 3600, end=clock.now(), bins=8, counts=to_counts([7] * 16)))
        settle(devices)
        coordinator.watch()
    return devices


def test_a_device_is_shown_with_the_room_it_has_left(run, make_device, settle):
    device = make_device("pump-1", group="lab")
    device.report(disk_free_mb=812, memory_free_mb=301, memory_total_mb=3926)
    device.report()  # a later one that does not tell
    settle([device])
    lines = dict(line.split(maxsplit=1) for line in run("devices", "show", "pump-1").splitlines() if "(" not in line)
    assert (lines["group"], lines["free"], lines["memory"]) == ("lab", "disk        812 MB", "301 MB of 3.9 GB free")
    told = json.loads(run("devices", "show", "pump-1", "--json"))
    assert (told["disk_free_mb"], told["health"], told["last_report"]["disk_free_mb"]) == (812, "ok", None)
    assert "no device 'pump-2'" in run("devices", "show", "pump-2", expect=1)


def test_show_adds_up_the_summaries(run, fleet):
    assert "acc_x" in run("fleet", "show")
    (view,) = json.loads(run("fleet", "show", "--json", "--hours", "2.5", "--where", "group=default"))
    assert (view["devices"], view["rows"], view["group"]) == (12, 12 * 3 * 600, "all")
    assert len(json.loads(run("fleet", "show", "--by", "device", "--json"))) == 12


def test_show_refuses_what_it_does_not_know(run, fleet):
    assert "colour" in run("fleet", "show", "--by", "colour", expect=2)
    run("fleet", "show", "--where", "group=(", expect=2)


def test_drift_says_what_happened_with_which_evidence_and_what_to_do(run, fleet):
    text = run("fleet", "drift")
    assert "9 of 12 devices of the fleet raised the input alarm" in text
    assert "acc_x up on 89 % of them" in text
    assert "new base" in text
    assert "1 alarms of single devices" in text
    assert "d09" in text
    found = json.loads(run("fleet", "drift", "--json"))
    assert found["causes"][0]["findings"][0]["features"][0] == "acc_x+"
    assert found["local"]["onsets"][0]["device"] == "d09"


def test_drift_before_the_first_window_says_so(run):
    assert "no window" in run("fleet", "drift")


def test_freshness_of_a_fleet_without_history_says_that_it_cannot_tell(run, fleet):
    text = run("fleet", "freshness")
    assert "Cannot tell" in text
    assert "12 devices" in text
    told = json.loads(run("fleet", "freshness", "--json"))
    assert told["lost_since_release"]["value"] is None
    assert told["lost_since_release"]["problem"]
