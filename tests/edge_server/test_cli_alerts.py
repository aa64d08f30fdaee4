import json

import pytest
from click.testing import CliRunner

from edge_server.cli import main
from edge_server.runbook import RUNBOOK
from edge_server.settings import SETTINGS_NAME


@pytest.fixture
def run(tmp_path, coordinator, clock, monkeypatch):
    """The command line over the coordinator's folder, at its time."""
    from edge_server import registry

    monkeypatch.setattr(registry, "SystemClock", lambda: clock)
    (tmp_path / "home" / SETTINGS_NAME).write_text("accept_unknown = true\n")

    def invoke(*arguments, expect=0):
        home = () if arguments[1] == "runbook" else ("--home", str(tmp_path / "home"))
        result = CliRunner().invoke(main, [*arguments, *home])
        assert result.exit_code == expect, (result.output, result.exception)
        return result.output

    return invoke


@pytest.fixture
def failed(coordinator, make_device, clock, settle):
    """Two devices could not take release 7."""
    devices = [make_device("d0"), make_device("d1")]
    for device in devices:
        device.event("release_failed", release=7, reason="why")
    settle(devices)
    coordinator.watch()
    return devices


def test_alerts_are_listed_and_shown_with_what_to_do_and_what_was_delivered(run, failed):
    text = run("alerts", "list")
    assert "update_failed" in text
    assert "release 7" in text
    (alert,) = json.loads(run("alerts", "list", "--json"))
    assert (alert["count"], alert["members"], alert["severity"]) == (2, ["d0", "d1"], "warning")
    text = run("alerts", "show", str(alert["id"]))
    assert "releases verify" in text
    assert "d0, d1" in text
    detail = json.loads(run("alerts", "show", str(alert["id"]), "--json"))
    assert detail["deliveries"][0]["sink"] == "log"
    assert detail["deliveries"][0]["done"] is not None


def test_a_silence_is_made_listed_and_ended(run, failed, clock, coordinator):
    (silence,) = json.loads(
        run("alerts", "silence", "--kind", "update_*", "--hours", "2", "--reason", "we know", "--json")
    )
    assert (silence["until"], silence["reason"]) == (clock.now() + 7200, "we know")
    clock.advance(60.0)
    coordinator.watch()
    text = run("alerts", "list")
    assert f"silenced ({silence['id']})" in text
    assert "we know" in text
    assert json.loads(run("alerts", "silence", "--end", str(silence["id"]), "--json")) == []
    run("alerts", "silence", "--end", "99", expect=1)


def test_a_silence_without_end_or_reason_is_wrong_usage(run, failed):
    assert "--hours" in run("alerts", "silence", "--kind", "rollback", expect=2)
    assert "kind" in run("alerts", "silence", "--kind", "nothing", "--hours", "1", "--reason", "x", expect=2)


def test_a_resolved_alert_says_by_whom(run, failed):
    assert "stays quiet" in run("alerts", "resolve", "1", "--reason", "known")
    assert "closed by cli" in run("alerts", "list")
    assert json.loads(run("alerts", "resolve", "1", "--json"))["closed_by"] == "cli"
    assert "no alert 99" in run("alerts", "resolve", "99", expect=1)


def test_the_run_book_has_every_kind(run):
    told = json.loads(run("alerts", "runbook", "--json"))
    assert told.keys() == RUNBOOK.keys()
    assert "NTP" in run("alerts", "runbook", "clock_untrusted")
    assert "rollback" in run("alerts", "runbook", "nothing", expect=2)
