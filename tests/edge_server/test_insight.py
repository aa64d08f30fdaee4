"""The analysis over what devices really send: windows, cohorts, times, and what a restart keeps."""

import numpy as np
import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.files import set_crash_hook
from edge_sdk.messages import MonitorState, to_counts
from edge_server import insight
from edge_server.fleet_drift import DriftRules
from edge_server.insight import Insight

DAY = 86_400.0


def monitor(*, alarm=False, threshold=100_000.0):
    return MonitorState("input", 0.0, threshold, alarm, alarm)


@pytest.fixture
def life(coordinator, make_device, clock, settle):
    """Hours of a fleet: everybody reports; those in `drifts` raise an alarm in the first of them."""
    devices = [make_device(f"d{i:02}", group="north" if i % 2 else "south") for i in range(20)]
    coordinator.watch()

    def run(hours, drifts=(), suspects="acc_x +0.40, acc_y -0.10", up=()):
        for hour in range(hours):
            clock.advance(3600.0)
            for i, device in enumerate(devices):
                if i in drifts and hour == 0:
                    device.event("drift_alarm", monitor="input", evidence=2e5, threshold=1e5, kind="covariate",
                                 suspects=suspects, words="acc_x: mean 1 -> 2")  # fmt: skip
                device.report(start=clock.now() - 3600, monitors=[monitor(alarm=i in drifts or i in up)])
            settle(devices)
            coordinator.watch()
        return coordinator.registry.insight.drift()

    run.devices = devices
    return run


class TestDrift:
    def test_a_healthy_fleet_has_none(self, life):
        found = life(24)
        assert (found.causes, found.local.onsets) == ([], ())
        assert found.false_alarms_per_day == DriftRules().alarms_per_day

    def test_a_few_devices_are_local_drift_and_the_budget_is_told(self, life):
        life(3)
        found = life(1, drifts=(3,))
        assert found.causes == []
        (onset,) = found.local.onsets
        assert (onset.device, onset.suspects) == ("d03", ("acc_x+", "acc_y-"))
        assert found.local.expected == pytest.approx(4 * 20 * 100 / 100_000 - 0, rel=0.3)

    def test_many_devices_are_drift_of_the_fleet_with_one_cause(self, life):
        life(3)
        found = life(2, drifts=range(12))
        (cause,) = found.causes
        assert (cause.cohort, cause.scope, cause.kind) == ("all", "fleet", "covariate")
        assert {finding.cohort for finding in cause.findings} <= {"all", "group=north", "group=south"}
        assert "acc_x up" in cause.words
        assert found.local.onsets == ()

    def test_a_cohort_alone_is_named(self, life):
        life(3)
        found = life(1, drifts=range(1, 20, 2))
        (cause,) = found.causes
        assert cause.cohort == "group=north"

    def test_a_restart_between_windows_goes_on_where_it_was(self, life, coordinator):
        life(3)
        before = coordinator.registry.insight._kept()
        registry = coordinator.registry
        registry.insight = Insight(registry.store, registry.blobs, settings=registry.settings, clock=registry.clock)
        found = life(1, drifts=range(12))
        assert len(found.causes) == 1
        assert registry.insight._kept().report == before.report + 20

    def test_a_crash_at_the_commit_counts_the_window_once(self, life, coordinator, clock):
        life(2)

        class PowerCutError(BaseException):
            pass

        def cut(name):
            if name == "commit:before":
                raise PowerCutError

        clock.advance(3600.0)
        before = coordinator.registry.insight._kept()
        set_crash_hook(cut)
        with pytest.raises(PowerCutError):
            coordinator.registry.insight.turn()
        set_crash_hook(None)
        assert coordinator.registry.insight._kept() == before
        registry = coordinator.registry
        again = Insight(registry.store, registry.blobs, settings=registry.settings, clock=clock)
        assert again.turn()
        assert again._kept().drift.end == clock.now()

    def test_a_large_window_is_read_in_several_turns(self, life, coordinator, clock, settle, monkeypatch):
        monkeypatch.setattr(insight, "ROWS_A_TURN", 7)
        clock.advance(3600.0)
        for device in life.devices:
            device.report(start=clock.now() - 3600, monitors=[monitor()])
        settle(life.devices)
        turns = [coordinator.registry.insight.turn() for _ in range(4)]
        assert turns == [False, False, True, False]
        tally = coordinator.registry.insight._kept().drift.streams["all\tinput"].windows[-1]
        assert (tally.devices, tally.at_risk) == (20, 20)
        assert tally.budget == pytest.approx(20 * 100 / 100_000)

    def test_what_was_there_before_the_first_window_is_not_counted(self, coordinator, make_device, clock, settle):
        device = make_device("a")
        device.report(monitors=[monitor()])
        settle([device])
        clock.advance(7200)
        coordinator.watch()
        assert coordinator.registry.insight._kept().drift.streams == {}

    def test_an_alarm_that_is_up_already_cannot_be_raised_again(self, life, coordinator):
        life(1, up=range(5))
        tally = coordinator.registry.insight._kept().drift.streams["all\tinput"].windows[-1]
        assert (tally.devices, tally.at_risk, tally.up) == (20, 15, 5)


class TestView:
    @pytest.fixture
    def told(self, coordinator, make_device, clock, summary, settle):
        devices = [make_device(f"d{i}", group="north" if i % 2 else "south") for i in range(4)]
        begin = clock.now()
        for hour in range(30):
            clock.advance(3600.0)
            for i, device in enumerate(devices):
                counts = [15, 15, 15, 15] if i % 2 == 0 else [0, 0, 0, 60]
                device.put(
                    summary(start=clock.now() - 3600, end=clock.now(), bins=8, release=1 + hour // 24,
                            counts=to_counts([c // 2 for c in counts for _ in range(2)] * 2))
                )  # fmt: skip
        settle(devices)
        return begin

    def test_it_is_told_apart_by_group_release_and_time(self, coordinator, told):
        view = coordinator.registry.insight.view
        assert [(v.group, v.devices, v.rows) for v in view(since=told)] == [("all", 4, 4 * 30 * 600)]
        assert [v.group for v in view(by="group", since=told)] == ["group=north", "group=south"]
        assert [v.group for v in view(by="release", since=told)] == ["release=1", "release=2"]
        assert len(view(by="hour", since=told)) == 30
        assert [v.devices for v in view(by="day", since=told)] == [4, 4]
        assert [v.group for v in view(by="device", since=told, where="group=north")] == ["d1", "d3"]

    def test_a_group_that_is_shifted_is_seen(self, coordinator, told):
        north, south = coordinator.registry.insight.view(by="group", since=told)
        assert north.features[0].psi > 1
        assert south.features[0].psi < 0.01
        assert (north.features[0].up, north.features[0].down) == (2, 0)
        assert np.isclose(sum(north.features[0].histogram), 1, atol=1e-4)

    def test_times_bound_it(self, coordinator, told):
        (view,) = coordinator.registry.insight.view(since=told + 5 * 3600, until=told + 10 * 3600)
        assert view.rows == 4 * 5 * 600

    def test_devices_are_told_apart_by_labels_and_hardware(self, coordinator, told):
        store = coordinator.registry.store
        with store.transaction():
            for i in range(4):
                store.labels.set(f"d{i}", {"site": "berlin" if i < 3 else "paris"})
            store.execute("UPDATE devices SET hardware = 'pi4' WHERE name = 'd0'")
        view = coordinator.registry.insight.view
        assert [(v.group, v.devices) for v in view(by="site", since=told)] == [("site=berlin", 3), ("site=paris", 1)]
        assert [(v.group, v.devices) for v in view(by="hw", since=told)] == [("hw=pi4", 1)]
        assert [v.devices for v in view(since=told, where="site=berlin and not hw=pi4")] == [2]

    def test_a_sample_is_always_of_the_same_devices(self, coordinator, told):
        view = coordinator.registry.insight.view
        sampled = [v.group for v in view(by="device", since=told, sample=2)]
        assert len(sampled) == 2
        assert sampled == [v.group for v in view(by="device", since=told + 3600, sample=2)]
        assert view(since=told, sample=3)[0].devices == 3

    def test_what_nobody_is_told_apart_by_is_refused(self, coordinator, told):
        with pytest.raises(ConfigError, match="'colour'"):
            coordinator.registry.insight.view(by="colour", since=told)


def test_freshness_is_read_from_the_reports(coordinator, make_device, clock, settle, checkpoint):
    folder = checkpoint(1)
    coordinator.push(folder)
    devices = [make_device(f"d{i}") for i in range(8)]
    for device in devices:
        device.receive()
        device.obey()
    for day in range(20):
        clock.advance(DAY)
        for device in devices:
            device.accuracy = 0.9 - 0.01 * day
            device.report(start=clock.now() - 3600, labelled=100)
        settle(devices)
        coordinator.watch()
    told = coordinator.registry.insight.freshness()
    assert told.lost_since_release.low > 0.05
    assert told.devices == 8
    assert told.release_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert told.predictions_per_day == pytest.approx(8 * 100, rel=0.15)
    assert told.slope_per_day.high < 0
