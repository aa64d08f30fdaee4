"""The benchmark of the alerts runs, and what it found is within the budgets that it states."""

import json
from pathlib import Path

import alerts
import pytest

pytestmark = pytest.mark.torch
COMMITTED = Path(alerts.__file__).with_suffix(".json")


@pytest.fixture(scope="module")
def committed():
    return json.loads(COMMITTED.read_text())


def test_fleets_of_numbers_are_measured_and_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(alerts, "delay", lambda count, share: {
        "devices": count, "share": share, "median_h": 1.0, "worst_h": 2, "as_fleet": 1.0})  # fmt: skip
    alerts.main(["--only", "numbers", "--years", "0.003", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["devices"] for row in found["numbers"]] == [10, 10, 50, 50, 300, 300]
    assert "false alarms of the fleet" in (tmp_path / "found.md").read_text()


def test_a_drift_of_half_the_devices_is_told_within_hours():
    assert alerts.delay(20, 0.5, runs=3)["worst_h"] <= 3


def test_the_committed_table_is_that_of_the_committed_results(committed):
    assert COMMITTED.with_suffix(".md").read_text() == alerts.table(committed)


def test_a_healthy_fleet_made_no_more_noise_than_its_budget(committed):
    healthy = committed["healthy"]
    assert healthy["days"] >= 7
    assert healthy["severe_per_day"] <= alerts.BUDGET["warning"]
    assert healthy["notices_per_day"] <= alerts.BUDGET["info"]
    assert healthy["fleet_alerts"] == 0


def test_false_alarms_of_the_fleet_were_no_more_than_stated(committed):
    for row in committed["numbers"]:
        assert row["days"] >= 365
        assert row["per_day"] <= row["allowed"], row


def test_drift_of_the_fleet_was_one_alert_within_hours_and_drift_of_two_devices_none(committed):
    assert committed["fleet drift"]["fleet_alerts"] == 1
    assert committed["fleet drift"]["hours_from_drift"] <= 8
    assert committed["local drift"]["fleet_alerts"] == 0
    assert committed["local drift"]["device_alarms"] > 0
