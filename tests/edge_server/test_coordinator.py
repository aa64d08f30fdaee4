import sqlite3
from contextlib import closing

import pytest
from sqlite_utils import Database as Tables

from edge_sdk.errors import ConfigError, DiskFullError, IntegrityError, StoreError
from edge_sdk.files import set_crash_hook
from edge_sdk.messages import cohort, from_places
from edge_server.errors import ReleaseError, RolloutError, UnknownRolloutError
from edge_server.plan import RolloutPlan, RolloutRules
from edge_server.registry import Registry
from edge_server.schema import STEPS
from edge_server.settings import RetentionSettings, Settings
from edge_server.store import Store
from tests.edge_server.conftest import desired, live

QUICK = RolloutRules(stages=(25, 100), soak_s=20.0, timeout_s=600.0, min_labelled=100, max_accuracy_drop=0.05)


@pytest.fixture
def crash():
    yield set_crash_hook
    set_crash_hook(None)


class TestIngest:
    def test_what_was_committed_is_acknowledged_once_a_device(self, coordinator, make_device):
        device = make_device("a")
        for _ in range(3):
            device.report()
        device.send()
        assert coordinator.pump() == 4, "the birth and three reports"
        assert len(device.transport.receive()) == 1

    def test_lost_acknowledgements_do_not_store_twice(self, coordinator, make_device, rows):
        device = make_device("a")
        device.report()
        for _ in range(3):
            device.send()
            coordinator.pump()
        assert rows("SELECT count(*) FROM reports") == [(1,)]
        device.receive()
        assert device.rows == []

    @pytest.mark.parametrize("at", ["commit:before", "commit:after"])
    def test_a_crash_around_the_commit_loses_nothing(self, make_coordinator, make_device, crash, rows, at):
        class PowerCutError(BaseException):
            pass

        def cut(name):
            if name == at:
                raise PowerCutError

        first = make_coordinator()
        device = make_device("a")
        first.pump()
        device.report()
        device.event("boot")
        device.send()
        crash(cut)
        with pytest.raises(PowerCutError):
            first.pump()
        crash(None)
        device.receive()
        assert len(device.rows) == 2, "nothing was acknowledged"
        first.close()

        second = make_coordinator()
        device.send()
        second.pump()
        device.receive()
        assert device.rows == []
        assert rows("SELECT count(*) FROM reports") == [(1,)]
        assert rows("SELECT count(*) FROM events") == [(1,)]

    def test_what_another_process_changed_counts_from_the_next_turn(self, coordinator, make_device, rows, tmp_path):
        device = make_device("a")
        device.report()
        device.send()
        coordinator.pump()
        other = Store(tmp_path / "home" / "coordinator.db", durable=False)
        with other.transaction():
            other.execute("UPDATE positions SET last_seq = 5")
            other.devices.add("b", group="default", credential="x", now=0.0)
            other.devices.revoke("b", now=1.0)
        other.close()
        device.receive()
        device.report()
        device.send()  # as number 2, which the other process has taken in already
        stranger = make_device("b")
        stranger.report()
        stranger.send()
        coordinator.pump()
        assert rows("SELECT device, seq FROM reports") == [("a", 1)]
        assert coordinator.registry.fleet().counters["duplicate"] == 1
        assert coordinator.registry.fleet().counters["revoked_device"] >= 1

    def test_what_a_revoked_device_said_before_is_not_held_against_the_broker(
        self, make_coordinator, make_device, caplog
    ):
        first = make_coordinator()
        device = make_device("a")
        first.pump()
        first.registry.identities.revoke("a", actor="ann")
        first.close()
        second = make_coordinator()
        second.pump()  # the retained state comes again
        assert "lets it in" not in caplog.text
        device.report()
        device.send()
        second.pump()
        assert "1 messages not understood or of unknown devices; last: a was revoked" in caplog.text
        assert second.registry.fleet().counters["revoked_device"] == 1

    def test_reports_are_added_up_and_deleted_in_its_turns(self, make_coordinator, make_device, rows, clock):
        coordinator = make_coordinator(retention=RetentionSettings(reports_days=1.0))
        device = make_device("a")
        for _ in range(2):
            device.report()
            device.send()
            coordinator.step()
            device.receive()
            clock.advance(2 * 86_400)
        coordinator.step()
        assert rows("SELECT seq FROM reports") == [(2,)], "the newest says where the next one goes"
        assert rows("SELECT sum(reports) FROM rollups WHERE span = 86400") == [(2,)]

    def test_a_full_disk_stores_and_acknowledges_nothing_and_goes_on_later(self, coordinator, make_device, monkeypatch):
        device = make_device("a")
        coordinator.pump()
        device.report()
        device.send()
        store = coordinator.registry.store

        def full(_turn):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(store.ingest, "write", full)
            with pytest.raises(DiskFullError):
                coordinator.pump()
        device.receive()
        assert len(device.rows) == 1
        device.send()
        coordinator.pump()
        device.receive()
        assert device.rows == []

    def test_summaries_are_stored_and_read_back_and_each_version_in_an_hour_keeps_its_own(
        self, coordinator, make_device, summary, settle
    ):
        device = make_device("a")
        hour = 3600.0 * 5
        told = [
            summary(start=hour - 600, end=hour + 60, rows=10, release=1),
            summary(start=hour + 60, end=hour + 1800, rows=20, release=2),
            summary(start=hour + 1800, end=hour + 3000, rows=30, release=2, head=1),
            summary(start=hour + 3000, end=hour + 3600, rows=40, release=2, head=1),
        ]
        for message in told:
            device.put(message)
        settle([device])
        store = coordinator.registry.store
        assert store.reports.summaries("a") == told[::-1]
        assert store.reports.summaries("a", limit=1) == [told[3]]
        assert store.reports.summaries("b") == []
        assert coordinator.registry.device("a").release == 0, "as its state says, not its summary"

    def test_a_database_of_one_summary_an_hour_keeps_what_it_has(self, tmp_path):
        path = tmp_path / "old.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            for step in STEPS[:3]:
                step(Tables(database))
            database.execute("PRAGMA user_version = 3")
            database.execute(
                "INSERT INTO summaries (device, hour, received, body) VALUES ('a', 5, 1.0, x'00'), ('a', 6, 2.0, x'01')"
            )
        store = Store(path)
        assert store.read("SELECT device, hour, start FROM summaries ORDER BY hour") == [("a", 5, 0.0), ("a", 6, 0.0)]
        store.close()

    def test_summaries_are_kept_for_a_bounded_time(self, coordinator, make_device, summary, settle, clock, rows):
        device = make_device("a")
        device.put(summary(end=3600.0 * 100_000))  # a clock that was far ahead
        for hour in range(800):
            device.put(summary(end=3600.0 * hour))
            if hour % 50 == 0:
                settle([device])
                clock.advance(60.0)
        settle([device])
        hours = [hour for (hour,) in rows("SELECT hour FROM summaries ORDER BY hour")]
        assert hours == list(range(56, 800))

    def test_unknown_devices_are_turned_away_and_visible(self, make_coordinator, make_device):
        coordinator = make_coordinator(accept_unknown=False)
        device = make_device("stranger")
        device.report()
        device.send()
        coordinator.pump()
        device.receive()
        assert len(device.rows) == 1, "nothing was acknowledged"
        assert coordinator.devices() == []
        assert coordinator.registry.fleet().unknown_devices == {"stranger": 2}

    def test_a_device_that_joins_by_itself_brings_its_group(self, coordinator, make_device):
        make_device("a", group="lab")
        coordinator.pump()
        (record,) = coordinator.devices()
        assert (record.group, record.enrolled, record.online, record.health) == ("lab", False, True, "ok")

    def test_the_group_of_an_enrolled_device_is_not_its_own_to_change(self, coordinator, make_device, tmp_path):
        coordinator.registry.enrol("a", group="lab", out=tmp_path / "a.json", actor="test")
        make_device("a", group="default")
        coordinator.pump()
        assert coordinator.registry.device("a").group == "lab"

    def test_malformed_messages_are_counted_and_harm_nobody(self, coordinator, make_device):
        device = make_device("a")
        device.transport.publish("edge/d/a/up/report", b"\x01rubbish")
        device.report()
        device.send()
        coordinator.pump()
        device.receive()
        assert device.rows == []
        assert coordinator.registry.fleet().counters["malformed"] == 1

    def test_a_new_outbox_of_the_same_device_begins_anew(self, coordinator, make_device, rows):
        old = make_device("a", store_id="old")
        old.report()
        old.send()
        new = make_device("a", store_id="new")
        new.report()
        new.send()
        coordinator.pump()
        assert rows("SELECT store_id, last_seq FROM positions ORDER BY 1") == [("new", 1), ("old", 1)]

    def test_gaps_are_kept(self, coordinator, make_device, rows):
        device = make_device("a")
        for _ in range(4):
            device.report()
        device.drop(2, 3)
        device.send()
        coordinator.pump()
        device.receive()
        assert device.rows == []
        assert rows("SELECT first, last, source FROM gaps") == [(2, 3, "device")]

    def test_a_device_that_is_lost_is_shown_as_offline(self, coordinator, make_device):
        device = make_device("a")
        device.state(online=False, reason="lost")
        coordinator.pump()
        assert coordinator.registry.device("a").health == "offline"


class TestPush:
    def test_the_first_release_is_the_base_of_all_at_once(self, coordinator, broker, checkpoint, clock):
        number = coordinator.push(checkpoint(1))
        assert coordinator.registry.rollout(number).state.status == "completed"
        message = desired(broker)
        assert (message.base.release, message.candidate, message.revision) == (1, None, clock.now())
        assert coordinator.desired_revision() == clock.now(), "so a coordinator that begins anew goes on above it"
        assert coordinator.desired_revision("nobody") == 0

    def test_an_older_release_is_refused(self, coordinator, checkpoint):
        coordinator.push(checkpoint(5))
        with pytest.raises(ReleaseError, match="release 4 is older than 5"):
            coordinator.push(checkpoint(4), group="other")

    def test_other_content_under_a_known_number_is_refused(self, coordinator, checkpoint):
        coordinator.push(checkpoint(5))
        with pytest.raises(ReleaseError, match="other content"):
            coordinator.push(checkpoint(5, trunk=b"another"), group="other")

    def test_a_group_does_not_get_the_same_release_twice(self, coordinator, checkpoint):
        folder = checkpoint(5)
        coordinator.push(folder)
        with pytest.raises(ReleaseError, match="had release 5 already"):
            coordinator.push(folder)
        assert coordinator.push(folder, group="other") == 2

    def test_a_second_push_to_a_busy_group_is_refused_and_leaves_no_trace(self, coordinator, checkpoint):
        coordinator.push(checkpoint(1))
        coordinator.push(checkpoint(2))
        with pytest.raises(RolloutError, match="busy with rollout 2 of release 2"):
            coordinator.push(checkpoint(3))
        assert [release.release for release in coordinator.registry.releases()] == [2, 1]

    def test_a_damaged_checkpoint_is_refused(self, coordinator, checkpoint):
        folder = checkpoint(1)
        (folder / "head.onnx").write_bytes(b"x")
        with pytest.raises(IntegrityError):
            coordinator.push(folder)
        assert coordinator.rollouts() == []

    def test_a_group_that_cannot_stand_in_a_topic_is_refused(self, coordinator, checkpoint):
        with pytest.raises(ConfigError, match="group"):
            coordinator.push(checkpoint(1), group="a/b")

    def test_a_plan_for_something_else_is_refused(self, coordinator, checkpoint):
        with pytest.raises(RolloutError, match="the plan is for release 7"):
            coordinator.push(checkpoint(1), plan=RolloutPlan(release=7))
        assert coordinator.push(checkpoint(2), plan=RolloutPlan(release=2)) == 1

    def test_devices_fetch_manifest_and_files_in_blocks(self, coordinator, make_device, broker, checkpoint):
        folder = checkpoint(1, trunk=bytes(200_000))
        coordinator.push(folder)
        offer = desired(broker).base
        devices = [make_device("a"), make_device("b")]
        coordinator.pump()
        for device in devices:
            device.ask(offer.digest, offer.size)
        assert coordinator.pump() == 3, "two requests, one block"
        for device in devices:
            device.receive()
            assert device.blocks[offer.digest, 0] == (folder / "manifest.json").read_bytes()

    def test_a_turn_sends_no_more_blocks_than_the_setting(self, make_coordinator, make_device, broker, checkpoint):
        coordinator = make_coordinator(blocks_per_turn=1)
        coordinator.push(checkpoint(1, trunk=bytes(200_000)))
        device = make_device("a")
        coordinator.pump()
        digest = next(
            path.name for path in coordinator.registry.blobs._folder.iterdir() if path.stat().st_size == 200_000
        )
        device.ask(digest, 200_000)
        assert [coordinator.pump() for _ in range(5)] == [2, 1, 1, 1, 0]


class TestRollouts:
    def test_a_good_release_reaches_all_in_stages(self, coordinator, fleet, clock, settle, checkpoint, broker):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        (part,) = desired(broker).parts
        assert (part.offer.release, len(from_places(part.devices)), part.shadow_s) == (2, 2, 0.0)
        for device in fleet:
            device.receive()
        live(coordinator, fleet, clock, settle)
        assert sum(device.release == 2 for device in fleet) == 2
        live(coordinator, fleet, clock, settle, turns=8)
        assert all(device.release == 2 for device in fleet)
        assert coordinator.registry.rollout(number).state.status == "completed"
        message = desired(broker)
        assert (message.base.release, message.candidate, message.revoked) == (2, None, [])

    def test_a_bad_release_is_halted_at_the_canary_and_everybody_goes_back(
        self, coordinator, fleet, clock, settle, checkpoint, broker
    ):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        for device in fleet:
            device.receive()
        live(coordinator, fleet, clock, settle)
        for device in fleet:
            device.accuracy = 0.4 if device.release == 2 else 0.9
        live(coordinator, fleet, clock, settle)
        state = coordinator.registry.rollout(number).state
        assert state.status == "rolling_back"
        assert "accuracy on release 2" in state.reason
        assert desired(broker).revoked == [2]
        assert desired(broker).candidate is None
        live(coordinator, fleet, clock, settle, turns=2)
        assert all(device.release == 1 for device in fleet)
        assert coordinator.registry.rollout(number).state.status == "rolled_back"
        assert coordinator.push(checkpoint(3), plan=QUICK) == number + 1

    def test_drift_of_the_whole_fleet_is_not_blamed_on_the_release(self, coordinator, fleet, clock, settle, checkpoint):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        for device in fleet:
            device.receive()
            device.accuracy = 0.6
        live(coordinator, fleet, clock, settle, turns=8)
        state = coordinator.registry.rollout(number).state
        assert state.status == "completed", state.reason

    def test_a_release_that_devices_cannot_install_is_halted(self, coordinator, fleet, clock, settle, checkpoint):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        for device in fleet:
            device.receive()
            device.keeps_release = False
        live(coordinator, fleet, clock, settle)
        state = coordinator.registry.rollout(number).state
        assert state.status in ("rolling_back", "rolled_back")
        assert "failed to install" in state.reason

    def test_a_device_that_failed_and_then_managed_is_no_failure(self, coordinator, fleet, clock, settle, checkpoint):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        for device in fleet:
            device.receive()
            device.obey()
        canary = next(device for device in fleet if device.release == 2)
        canary.rows.clear()
        canary.seq -= 1
        canary.event("release_failed", release=2, reason="hash")
        canary.event("release_activated", release=2, previous=1, carried=True)
        settle(fleet)
        coordinator.advance()
        assert coordinator.registry.rollout(number).state.status == "running"

    def test_pump_never_moves_a_rollout(self, coordinator, fleet, clock, settle, checkpoint):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        before = coordinator.registry.rollout(number).state
        clock.advance(1e6)
        fleet[0].report()
        settle(fleet)
        assert coordinator.registry.rollout(number).state == before

    def test_step_advances_only_when_it_is_due(self, make_coordinator, clock, checkpoint, make_device):
        coordinator = make_coordinator()
        coordinator.push(checkpoint(1))
        coordinator.step()
        number = coordinator.push(checkpoint(2), plan=RolloutRules(timeout_s=1.0, soak_s=0.0))
        clock.advance(9.0)
        coordinator.step()
        assert coordinator.registry.rollout(number).state.status == "running"
        clock.advance(1.0)
        coordinator.step()
        assert coordinator.registry.rollout(number).state.status == "rolling_back"

    def test_a_rollout_goes_on_after_a_restart(self, make_coordinator, fleet, clock, settle, checkpoint, coordinator):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        before = coordinator.registry.rollout(number)
        coordinator.close()
        assert make_coordinator().registry.rollout(number) == before

    def test_the_order_of_messages_does_not_change_a_decision(
        self, make_coordinator, make_device, clock, checkpoint, tmp_path
    ):
        states = []
        for reverse in (False, True):
            coordinator = make_coordinator(home=tmp_path / f"home-{reverse}")
            coordinator.push(checkpoint(1) if not reverse else tmp_path / "checkpoint-1-5")
            devices = [make_device(name, store_id=f"s{reverse}") for name in ("a", "b", "c", "d")]
            plan = RolloutRules(stages=(100,), soak_s=0.0, min_labelled=10)
            for device in devices:
                device.release = 1
                device.report()
            for device in reversed(devices) if reverse else devices:
                device.send()
            coordinator.pump()
            number = coordinator.push(checkpoint(2) if not reverse else tmp_path / "checkpoint-2-5", plan=plan)
            for i, device in enumerate(devices):
                device.release, device.accuracy = 2, 0.9 - 0.1 * i
                device.report()
            for device in reversed(devices) if reverse else devices:
                device.send()
            coordinator.pump()
            coordinator.advance()
            states.append(coordinator.registry.rollout(number).state)
            coordinator.close()
        assert states[0] == states[1]
        assert states[0].status == "rolling_back"

    def test_an_abort_takes_the_release_back(self, coordinator, fleet, clock, settle, checkpoint, broker):
        number = coordinator.push(checkpoint(2), plan=QUICK)
        for device in fleet:
            device.receive()
        live(coordinator, fleet, clock, settle)
        coordinator.abort(number, reason="wrong labels")
        assert desired(broker).revoked == [2]
        for device in fleet:
            device.receive()
        live(coordinator, fleet, clock, settle, turns=2)
        state = coordinator.registry.rollout(number).state
        assert (state.status, state.reason) == ("rolled_back", "aborted: wrong labels")
        with pytest.raises(RolloutError, match="only a running one"):
            coordinator.abort(number)
        with pytest.raises(UnknownRolloutError, match="no rollout 99"):
            coordinator.abort(99)


class TestPublishing:
    def test_desired_is_published_once_the_connection_is_there(self, make_coordinator, broker, checkpoint):
        broker.stop()
        coordinator = make_coordinator()
        coordinator.push(checkpoint(1))
        coordinator.pump()
        assert broker.retained("edge/g/+/desired") == []
        broker.start()
        coordinator.pump()
        assert desired(broker).base.release == 1

    def test_desired_is_published_again_after_a_reconnect(self, coordinator, broker, checkpoint):
        coordinator.push(checkpoint(1))
        broker.stop()
        broker._retained.clear()
        broker.start()
        coordinator.pump()
        assert desired(broker).base.release == 1

    def test_a_turn_without_changes_publishes_nothing(self, coordinator, make_device, checkpoint):
        coordinator.push(checkpoint(1))
        device = make_device("a")
        device.transport.receive()
        coordinator.step()
        coordinator.advance()
        assert device.transport.receive() == []

    def test_orders_of_another_process_are_carried_out(
        self, coordinator, broker, tmp_path, clock, checkpoint, make_device
    ):
        with closing(Registry(tmp_path / "home", settings=Settings(), clock=clock)) as command_line:
            command_line.push(checkpoint(1))
            coordinator.step()
            assert desired(broker).base.release == 1
            number = command_line.push(checkpoint(2))
            coordinator.step()
            assert desired(broker).parts[0].devices == b"", "there is no device yet"
            device = make_device("a")
            device.report()
            device.send()
            clock.advance(10.0)
            coordinator.step()
            assert from_places(desired(broker).parts[0].devices) == [cohort("default-2", "a")]
            command_line.abort(number, actor="cli")
            coordinator.step()
            assert desired(broker).revoked == [2]

    def test_revisions_grow_over_restarts(self, make_coordinator, checkpoint):
        first = make_coordinator()
        first.push(checkpoint(1))
        first_revision = first.desired_revision()
        first.close()
        second = make_coordinator()
        second.push(checkpoint(2))
        second.abort(2)
        assert second.desired_revision() == first_revision + 3, "the clock stood still"


class TestStore:
    def test_a_database_of_a_newer_version_is_refused(self, make_coordinator, tmp_path):
        make_coordinator().close()
        with closing(sqlite3.connect(tmp_path / "home" / "coordinator.db")) as database:
            database.execute("PRAGMA user_version = 99")
        with pytest.raises(StoreError, match="update the SDK"):
            make_coordinator()

    def test_a_file_that_is_no_database_is_refused(self, make_coordinator, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "coordinator.db").write_text("what is this? " * 100)
        with pytest.raises(StoreError, match="cannot be opened"):
            make_coordinator()

    def test_commits_are_flushed_unless_a_simulation_says_otherwise(self, make_coordinator):
        def synchronous(coordinator):
            return coordinator.registry.store.read("PRAGMA synchronous")[0][0]

        assert synchronous(make_coordinator(durable=True)) == 2
        assert synchronous(make_coordinator(durable=False)) == 1

    def test_who_did_what_is_kept(self, coordinator, checkpoint, rows):
        coordinator.push(checkpoint(1))
        coordinator.push(checkpoint(2))
        coordinator.abort(2, reason="no")
        actions = rows("SELECT actor, action, detail FROM audit ORDER BY id")
        assert actions[-1] == ("library", "rollout aborted", '{"rollout":2,"stage":1,"reason":"no"}')
        assert len(actions) == 3

    def test_events_are_found_by_device_and_name_and_paged(self, coordinator, make_device):
        for name in ("a", "b"):
            device = make_device(name)
            device.event("boot")
            device.event("drift_alarm", monitor="inputs", evidence=12.5)
            device.send()
        coordinator.pump()
        assert [event.name for event in coordinator.events(device="a")] == ["drift_alarm", "boot"]
        alarms = coordinator.events(name="drift_alarm")
        assert [event.device for event in alarms] == ["b", "a"]
        assert alarms[0].detail == {"monitor": "inputs", "evidence": 12.5}
        assert len(coordinator.events(before=alarms[0].id, limit=2)) == 2

    def test_the_last_labelled_report_gives_the_accuracy(self, coordinator, make_device):
        device = make_device("a")
        device.report(labelled=50, predictions=70)
        device.report(labelled=0, predictions=30, errors=2)
        device.send()
        coordinator.pump()
        record = coordinator.registry.device("a")
        assert (record.accuracy, record.predictions, record.health) == (0.9, 30, "degraded")


def test_a_coordinator_that_was_away_counts_nobody_online_until_told(make_coordinator, make_device):
    first = make_coordinator()
    device = make_device("a")
    first.pump()
    assert [record.online for record in first.devices()] == [True]
    first.close()
    device.transport.close()
    second = make_coordinator()
    assert [record.online for record in second.devices()] == [False]
    second.pump()
    assert [record.online for record in second.devices()] == [True], "the broker has kept the birth"
