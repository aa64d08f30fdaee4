"""Every kind of alert from what devices really send; stored with what is to be delivered; ordered by people."""

import json

import msgspec
import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.files import set_crash_hook
from edge_sdk.messages import MonitorState
from edge_server.alert_settings import AlertSettings, SinkSettings
from edge_server.alert_sources import Now
from edge_server.errors import UnknownAlertError
from edge_server.plan import RolloutRules
from edge_server.runbook import RUNBOOK

HOUR = 3600.0
DAY = 24 * HOUR
QUIET = {"log": SinkSettings(kind="log", min_severity="info")}


@pytest.fixture
def desk(make_coordinator, make_device, clock):
    """A coordinator with alerts, and some devices."""

    class Desk:
        def __init__(self, **settings):
            settings = {"sinks": QUIET, **settings}
            self.coordinator = make_coordinator(alerts=AlertSettings(**settings))
            self.store, self.alerts = self.coordinator.registry.store, self.coordinator.registry.alerts
            self.devices = [make_device(f"d{i}", group="north" if i % 2 else "south") for i in range(6)]
            self.talk()

        def talk(self):
            for _ in range(3):
                for device in self.devices:
                    device.send()
                self.coordinator.pump()
                for device in self.devices:
                    device.receive()

        def look(self, times=1, **known):
            told = []
            for _ in range(times):
                clock.advance(60.0)
                told += self.alerts.look(Now(**known))
            return [(n.reason, n.alert.kind, n.alert.cause, n.alert.severity) for n in told]

        def everybody_reports(self, **changes):
            for device in self.devices:
                device.report(**changes)
            self.talk()

    return Desk


class TestKinds:
    def test_a_healthy_fleet_raises_none(self, desk, clock):
        fleet = desk(accuracy_floor=0.5, max_rss_mb=500)
        for _ in range(10):
            clock.advance(HOUR)
            fleet.everybody_reports()
            assert fleet.look(3) == []

    def test_devices_that_fall_silent_are_one_alert_a_group(self, desk, clock):
        fleet = desk()
        fleet.everybody_reports()
        clock.advance(DAY + 1)
        fleet.devices[0].report()
        fleet.talk()
        assert fleet.look(2) == [
            ("raised", "device_offline", "group north", "warning"),
            ("raised", "device_offline", "group south", "warning"),
        ]
        assert {alert.members for alert in fleet.alerts.find()} == {("d1", "d3", "d5"), ("d2", "d4")}
        fleet.everybody_reports()
        assert [entry[0] for entry in fleet.look(5)] == ["resolved", "resolved"]

    @pytest.mark.parametrize(
        ("event", "kind", "cause", "better"),
        [
            ("release_failed", "update_failed", "release 7", "release_activated"),
            ("release_untrusted", "update_failed", "release 7", "release_activated"),
            ("release_rolled_back", "rollback", "release 7", "release_confirmed"),
            ("clock_untrusted", "clock_untrusted", "group south", "release_activated"),
            ("metadata_expired", "metadata_expiry", "group south", "release_activated"),
            ("release_delayed", "disk_full", "group south", "release_activated"),
        ],
    )
    def test_what_devices_tell_is_an_alert_until_they_tell_better(self, desk, event, kind, cause, better):
        fleet = desk()
        for device in fleet.devices[::2]:
            device.event(event, release=7, reason="why")
        fleet.talk()
        assert ("raised", kind, cause, "warning") in fleet.look(2)
        (alert,) = [a for a in fleet.alerts.find() if a.kind == kind]
        assert (alert.count, alert.members) == (3, ("d0", "d2", "d4"))
        for device in fleet.devices[::2]:
            device.event(better, release=7, previous=0)
        fleet.talk()
        assert ("resolved", kind, cause, "warning") in fleet.look(5)

    def test_somebody_else_who_says_what_to_run_is_an_alert_for_a_day(self, desk, clock):
        fleet = desk()
        fleet.devices[0].event("desired_refused", count=3, reason="not signed")
        fleet.talk()
        assert fleet.look() == [("raised", "desired_refused", "group south", "warning")]
        clock.advance(DAY)
        fleet.everybody_reports()
        assert ("resolved", "desired_refused", "group south", "warning") in fleet.look(3)

    def test_what_happened_once_is_over_after_a_day(self, desk, clock):
        fleet = desk()
        fleet.devices[0].event("release_failed", release=7, reason="why")
        fleet.talk()
        assert fleet.look() == [("raised", "update_failed", "release 7", "warning")]
        clock.advance(DAY)
        fleet.everybody_reports()
        assert ("resolved", "update_failed", "release 7", "warning") in fleet.look(3)

    def test_learned_heads_that_were_left_are_for_information(self, desk):
        fleet = desk()
        fleet.devices[1].event("head_rolled_back", to=0, reason="worse")
        fleet.talk()
        assert fleet.look() == [("raised", "rollback", "learned heads in group north", "info")]

    def test_rows_that_never_came_are_told(self, desk):
        fleet = desk()
        device = fleet.devices[0]
        for _ in range(4):
            device.report()
        device.drop(1, 3)
        fleet.talk()
        assert fleet.look() == [("raised", "outbox_gaps", "group south", "warning")]
        assert "3 rows" in fleet.alerts.find()[0].words

    def test_a_clock_that_is_ahead_is_told_and_one_that_was_is_not(self, desk, clock):
        fleet = desk()
        device = fleet.devices[0]
        clock.advance(7200)
        device.report()
        clock._now -= 7200  # the device's clock alone was ahead
        fleet.talk()
        assert fleet.look() == [("raised", "clock_untrusted", "group south", "warning")]
        device.report()
        fleet.talk()
        assert fleet.look(2) == [("resolved", "clock_untrusted", "group south", "warning")]

    def test_memory_above_the_limit_is_told(self, desk):
        fleet = desk(max_rss_mb=100)
        for device in fleet.devices[:2]:
            device.report(rss_mb=150.0)
        fleet.talk()
        assert {entry[1:3] for entry in fleet.look(3)} == {("memory_low", "group north"), ("memory_low", "group south")}

    def test_devices_low_on_disk_are_one_alert_a_group_until_there_is_room(self, desk):
        fleet = desk(min_device_disk_mb=100)
        fleet.everybody_reports(disk_free_mb=99)
        fleet.devices[1].report(disk_free_mb=100)
        fleet.devices[2].report()  # of one that does not tell any more, what it told last counts
        fleet.talk()
        assert fleet.look(2) == []
        assert fleet.look() == [("raised", "disk_low", "group north", "warning"),
                                ("raised", "disk_low", "group south", "warning")]  # fmt: skip
        assert {alert.members for alert in fleet.alerts.find()} == {("d3", "d5"), ("d0", "d2", "d4")}
        assert "3 devices have less than 100 MB left on their disk" in fleet.alerts.find()[0].words
        fleet.everybody_reports(disk_free_mb=5000)
        assert fleet.look(9) == []
        assert [entry[0] for entry in fleet.look(3)] == ["resolved", "resolved"]

    def test_a_device_that_is_not_heard_of_is_not_called_low_on_disk(self, desk, clock):
        fleet = desk()
        fleet.everybody_reports(disk_free_mb=1)
        clock.advance(DAY + 1)
        assert {entry[1] for entry in fleet.look(9)} == {"device_offline"}

    def test_accuracy_below_the_floor_is_told_only_when_it_is_sure(self, desk):
        fleet = desk(accuracy_floor=0.8)
        fleet.devices[0].accuracy = 0.5
        fleet.devices[1].accuracy = 0.75  # of 100: may as well be 0.8
        fleet.everybody_reports()
        assert fleet.look(4) == [("raised", "accuracy_below", "group south", "warning")]
        assert fleet.alerts.find()[0].members == ("d0",)

    def test_a_rollout_that_was_halted_is_critical_and_one_that_a_person_aborted_is_none(self, desk, checkpoint, clock):
        fleet = desk()
        fleet.coordinator.push(checkpoint(1), group="north")
        fleet.talk()
        for device in fleet.devices:
            device.obey()
        fleet.everybody_reports()
        rules = RolloutRules(stages=(100,), soak_s=10.0, timeout_s=50.0, min_labelled=100)
        number = fleet.coordinator.push(checkpoint(2), group="north", plan=rules)
        clock.advance(60.0)
        fleet.coordinator.advance()
        assert ("raised", "rollout_halted", f"rollout {number}", "critical") in fleet.look()
        fleet.coordinator.push(checkpoint(3), group="south")
        fleet.everybody_reports()
        aborted = fleet.coordinator.push(checkpoint(4), group="south", plan=rules)
        fleet.coordinator.abort(aborted, reason="a mistake")
        assert all(entry[2] != f"rollout {aborted}" for entry in fleet.look(3))

    @pytest.fixture
    def shipping(self, desk, checkpoint, clock):
        """A rollout in two stages, of which a person lets the second begin."""
        fleet = desk(paused_s=2 * HOUR)
        fleet.coordinator.push(checkpoint(1), group="north")
        fleet.talk()
        for device in fleet.devices:
            device.obey()
        fleet.everybody_reports()
        rules = RolloutRules(stages=(50, 100), soak_s=10.0, min_labelled=0, approval="last")
        fleet.rollout = fleet.coordinator.push(checkpoint(2), group="north", plan=rules)
        fleet.onwards = lambda: [self.onwards(fleet, clock) for _ in range(3)]
        return fleet

    def onwards(self, fleet, clock):
        clock.advance(30.0)
        fleet.coordinator.advance()
        fleet.talk()
        for device in fleet.devices:
            device.obey()
        fleet.everybody_reports()

    def test_a_rollout_that_waits_for_approval_is_told_until_it_is_approved(self, shipping):
        fleet, number = shipping, shipping.rollout
        assert fleet.look(3) == []
        fleet.onwards()
        assert fleet.look() == [], "it must have waited for a while"
        assert fleet.look(9) == [("raised", "rollout_waits", f"rollout {number}: stage 2", "warning")]
        assert "waits for a person to approve stage 2" in fleet.alerts.find()[0].words
        fleet.coordinator.registry.approve(number)
        assert fleet.look() == []
        assert fleet.look() == [("resolved", "rollout_waits", f"rollout {number}: stage 2", "warning")]

    def test_a_rollout_is_told_only_once_it_has_been_paused_for_long(self, shipping, clock):
        fleet, number = shipping, shipping.rollout
        fleet.coordinator.registry.pause(number)
        clock.advance(HOUR)
        assert fleet.look(3) == []
        clock.advance(HOUR)
        assert fleet.look(3) == [("raised", "rollout_waits", f"rollout {number}: paused", "warning")]
        assert "paused for 2 hours" in fleet.alerts.find()[0].words
        fleet.coordinator.registry.resume(number)
        assert fleet.look(2) == [("resolved", "rollout_waits", f"rollout {number}: paused", "warning")]

    def test_a_rollout_that_was_paused_while_it_waited_for_approval_is_not_told_before_it_is_resumed(self, shipping):
        fleet, number = shipping, shipping.rollout
        fleet.onwards()
        fleet.coordinator.registry.pause(number)
        assert fleet.look(3) == []
        fleet.coordinator.registry.resume(number)
        assert fleet.look(3) == [("raised", "rollout_waits", f"rollout {number}: stage 2", "warning")]

    def test_a_root_near_its_end_and_what_cannot_be_signed_are_told(self, desk, tmp_path, clock):
        fleet = desk()
        fleet.coordinator.registry.repository.init(tmp_path / "keys", count=2, threshold=2, passphrase=None)
        clock.advance(690 * DAY)
        fleet.everybody_reports()
        assert ("raised", "metadata_expiry", "root", "warning") in fleet.look(2)
        clock.advance(36 * DAY)
        fleet.everybody_reports()
        assert ("worse", "metadata_expiry", "root", "critical") in fleet.look(2, problem="the root has expired")

    def test_the_coordinator_that_falls_behind_is_told(self, desk):
        fleet = desk(behind_s=60)
        assert fleet.look(4, lag_s=90.0) == []
        assert fleet.look(1, lag_s=90.0) == [("raised", "coordinator_behind", "coordinator", "critical")]
        assert fleet.look(5) == [("resolved", "coordinator_behind", "coordinator", "critical")]

    def test_a_disk_that_is_nearly_full_is_told(self, desk):
        fleet = desk(min_disk_mb=1e12)
        assert fleet.look(2) == [("raised", "disk_full", "coordinator", "critical")]

    def test_certificates_that_were_not_renewed_are_told(self, desk, clock):
        fleet = desk()
        with fleet.store.transaction():
            fleet.store.certificates.add("d1", serial="1", pem="", issued=0.0, expires=clock.now() + 10 * DAY)
        assert fleet.look(2) == [("raised", "certificate_expiry", "group north", "warning")]

    def test_local_drift_is_for_information_and_broken_data_a_warning(self, desk, clock):
        fleet = desk()
        fleet.coordinator.registry.insight.turn()
        for device, kind in ((fleet.devices[0], "covariate"), (fleet.devices[1], "quality")):
            device.event("drift_alarm", monitor="input", evidence=9.0, threshold=9.0, kind=kind, words="acc_x: up",
                         suspects="acc_x +0.1")  # fmt: skip
        fleet.everybody_reports(monitors=[MonitorState("input", 0.0, 1e5, False, False)])
        clock.advance(HOUR)
        fleet.coordinator.registry.insight.turn()
        assert fleet.look() == [
            ("raised", "drift_local", "group north: data or answers", "warning"),
            ("raised", "drift_local", "group south", "info"),
        ]

    def test_drift_of_the_fleet_is_one_critical_alert_and_not_one_a_device(self, desk, clock):
        fleet = desk()
        fleet.coordinator.registry.insight.turn()
        for device in fleet.devices:
            device.event("drift_alarm", monitor="input", evidence=9.0, threshold=9.0, kind="covariate",
                         words="acc_x: up", suspects="acc_x +0.1")  # fmt: skip
        fleet.everybody_reports(monitors=[MonitorState("input", 0.0, 1e5, False, False)])
        clock.advance(HOUR)
        fleet.coordinator.registry.insight.turn()
        assert fleet.look() == [("raised", "drift_fleet", "episode 1", "critical")]
        (alert,) = fleet.alerts.find()
        assert "acc_x up" in alert.words
        assert "new base" in alert.words


class TestStored:
    def test_a_notice_is_stored_with_its_alert_for_every_sink_that_wants_it(self, desk):
        sinks = {"all": SinkSettings(kind="log", min_severity="info"), "some": SinkSettings(kind="log")}
        fleet = desk(sinks=sinks)
        fleet.devices[1].event("head_rolled_back", to=0, reason="worse")
        fleet.devices[0].event("release_failed", release=7, reason="why")
        fleet.talk()
        fleet.look()
        told = {name: [json.loads(d.body)["alert"]["kind"] for d in fleet.store.alerts.waiting(name, limit=9)]
                for name in sinks}  # fmt: skip
        assert told == {"all": ["rollback", "update_failed"], "some": ["update_failed"]}

    def test_a_crash_at_the_commit_leaves_neither_and_the_next_look_has_both(self, desk):
        class PowerCutError(BaseException):
            pass

        def cut(name):
            if name == "commit:before":
                raise PowerCutError

        fleet = desk()
        fleet.devices[0].event("release_failed", release=7, reason="why")
        fleet.talk()
        set_crash_hook(cut)
        with pytest.raises(PowerCutError):
            fleet.look()
        set_crash_hook(None)
        assert fleet.alerts.find() == []
        assert fleet.store.alerts.waiting("log", limit=9) == []
        assert fleet.look() == [("raised", "update_failed", "release 7", "warning")]
        assert len(fleet.store.alerts.waiting("log", limit=9)) == 1

    def test_what_was_resolved_long_ago_is_forgotten(self, desk, clock):
        fleet = desk(keep_days=10)
        for hour in (0, 11 * 24):
            clock.advance(hour * HOUR)
            fleet.everybody_reports()
            fleet.devices[0].event("release_failed", release=hour + 1, reason="why")
            fleet.talk()
            fleet.look()
            clock.advance(DAY)
            fleet.everybody_reports()
            fleet.look(3)
        assert [alert.cause for alert in fleet.alerts.find()] == [f"release {11 * 24 + 1}"]


class TestOrders:
    @pytest.fixture
    def fleet(self, desk):
        fleet = desk()
        fleet.devices[0].event("release_failed", release=7, reason="why")
        fleet.talk()
        return fleet

    def test_it_is_shown_with_what_to_do(self, fleet):
        fleet.look()
        (alert,) = fleet.alerts.find()
        detail = fleet.alerts.show(alert.id)
        assert detail.todo == RUNBOOK["update_failed"].todo
        assert [d.sink for d in detail.deliveries] == ["log"]
        assert msgspec.json.decode(msgspec.json.encode(detail))["title"]

    def test_a_silence_has_an_end_a_reason_and_is_in_the_audit_log(self, fleet, rows):
        number = fleet.alerts.silence(kind="update_*", for_s=HOUR, reason="we know", actor="me")
        assert fleet.look(3) == []
        assert [s.id for s in fleet.alerts.silences()] == [number]
        fleet.alerts.end_silence(number, actor="me")
        assert fleet.look() == [("raised", "update_failed", "release 7", "warning")]
        assert [row[0] for row in rows("SELECT action FROM audit ORDER BY id")] == ["alerts silenced", "silence ended"]

    @pytest.mark.parametrize(
        "wrong", [{"for_s": 0}, {"for_s": 1e9}, {"reason": " "}, {"kind": "offline"}, {"for_s": float("nan")}]
    )
    def test_a_silence_without_end_or_reason_or_of_nothing_is_refused(self, fleet, wrong):
        with pytest.raises(ConfigError):
            fleet.alerts.silence(**{"for_s": 60.0, "reason": "why", **wrong})

    def test_a_resolved_alert_stays_quiet_until_it_comes_anew(self, fleet):
        fleet.look()
        (alert,) = fleet.alerts.find()
        fleet.alerts.resolve(alert.id, actor="me")
        fleet.devices[2].event("release_failed", release=7, reason="why")
        fleet.talk()
        assert fleet.look(20) == []
        assert fleet.alerts.show(alert.id).alert.closed_by == "me"

    def test_what_there_is_not_is_refused(self, fleet):
        with pytest.raises(UnknownAlertError):
            fleet.alerts.resolve(99)
        with pytest.raises(UnknownAlertError):
            fleet.alerts.end_silence(99)


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"kind": "webhook"},
            {"kind": "webhook", "url": "ftp://example.org/", "secret_file": "s"},
            {"kind": "webhook", "url": "https://example.org/"},
            {"kind": "log", "url": "https://example.org/"},
            {"kind": "mail"},
        ],
    )
    def test_a_sink_that_cannot_work_is_refused(self, wrong):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"sinks": {"a": wrong}}, AlertSettings)
