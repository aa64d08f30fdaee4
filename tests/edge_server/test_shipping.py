"""Rollouts over the registry and its database: holding, collisions, labels, late devices, gates, strategies."""

import itertools
import sqlite3

import msgspec
import numpy as np
import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.messages import MetricSummary, ShadowTally, cohort, from_places
from edge_server.errors import ReleaseError, RolloutError
from edge_server.plan import Gate, RolloutRules
from edge_server.records import CandidateRecord
from edge_server.store_metrics import need_ln
from tests.edge_server.conftest import desired, live

QUICK = RolloutRules(stages=(25, 100), soak_s=20.0, timeout_s=600.0, min_labelled=100, max_accuracy_drop=0.05)


@pytest.fixture
def audit(rows):
    return lambda: [tuple(row) for row in rows("SELECT actor, action FROM audit ORDER BY id")]


@pytest.fixture
def ship(coordinator, checkpoint, fleet):
    """Pushes releases 2, 3, ... and lets the devices hear of it."""
    numbers = itertools.count(2)

    def push(rules=QUICK, **options):
        folder = checkpoint(next(numbers))
        number = coordinator.registry.push(folder, plan=rules, actor="ann", **options)
        coordinator.pump()
        for device in fleet:
            device.receive()
        return number

    return push


def state_of(coordinator, number):
    return coordinator.registry.rollout(number).state


class TestHolding:
    def test_every_stage_waits_for_its_approval(self, coordinator, fleet, clock, settle, ship, audit, broker):
        number = ship(msgspec.structs.replace(QUICK, approval="each"))
        live(coordinator, fleet, clock, settle, turns=5)
        assert all(device.release == 1 for device in fleet)
        assert "approve stage 1" in state_of(coordinator, number).waits
        coordinator.registry.approve(number, reason="looks good", actor="bea")
        live(coordinator, fleet, clock, settle, turns=8)
        assert sum(device.release == 2 for device in fleet) == 2
        assert "approve stage 2" in state_of(coordinator, number).waits
        coordinator.registry.approve(number, actor="bea")
        live(coordinator, fleet, clock, settle, turns=8)
        assert state_of(coordinator, number).status == "completed"
        assert audit()[-3:] == [
            ("bea", "rollout approved"), ("bea", "rollout approved"), ("coordinator", "rollout completed"),
        ]  # fmt: skip

    def test_paused_it_tells_nobody_else_and_resumed_it_goes_on(self, coordinator, fleet, clock, settle, ship, broker):
        number = ship()
        live(coordinator, fleet, clock, settle)
        coordinator.registry.pause(number, reason="a look", actor="ann")
        live(coordinator, fleet, clock, settle, turns=8)
        assert sum(device.release == 2 for device in fleet) == 2, "who runs it keeps it"
        assert all(device.desired.candidate is None for device in fleet)
        coordinator.registry.resume(number, actor="ann")
        live(coordinator, fleet, clock, settle, turns=8)
        assert state_of(coordinator, number).status == "completed"

    def test_what_cannot_be_done_now_is_refused(self, coordinator, ship):
        number = ship()
        for act in (coordinator.registry.approve, coordinator.registry.resume):
            with pytest.raises(RolloutError):
                act(number)
        coordinator.registry.pause(number)
        with pytest.raises(RolloutError, match="paused already"):
            coordinator.registry.pause(number)
        coordinator.registry.abort(number)
        with pytest.raises(RolloutError, match="rolling_back"):
            coordinator.registry.resume(number)

    def test_only_so_many_are_told_at_once(self, coordinator, fleet, clock, settle, ship, broker):
        plan = msgspec.structs.replace(QUICK, stages=(100,), max_parallel=3, min_labelled=0)
        number = ship(plan)
        started = set()
        for _ in range(4):
            told = from_places(desired(broker).parts[0].devices)
            assert len(told) <= 3
            started |= {device.name for device in fleet if cohort("default-2", device.name) in told}
            live(coordinator, fleet, clock, settle)
        assert len(started) == len(fleet)
        live(coordinator, fleet, clock, settle, turns=4)
        assert state_of(coordinator, number).status == "completed"


class TestCollisions:
    def test_a_second_rollout_is_queued_where_that_is_set(
        self, make_coordinator, make_device, clock, settle, checkpoint
    ):
        coordinator = make_coordinator(collisions="queue")
        coordinator.push(checkpoint(1))
        first = coordinator.push(checkpoint(2), plan=QUICK)
        second = coordinator.push(checkpoint(3), plan=msgspec.structs.replace(QUICK, strategy="ab", on_small="warn"))
        third = coordinator.push(checkpoint(4), plan=QUICK)
        coordinator.advance()
        power = state_of(coordinator, second).power
        assert [state_of(coordinator, n).status for n in (first, second, third)] == ["running", "queued", "queued"]
        assert f"rollout {second} to end" in state_of(coordinator, third).waits
        coordinator.abort(first)
        coordinator.advance()
        coordinator.advance()
        assert [state_of(coordinator, n).status for n in (first, second, third)] == ["rolled_back", "running", "queued"]
        assert state_of(coordinator, second).power == power is not None
        coordinator.abort(third)
        assert state_of(coordinator, third).status == "rolled_back"

    def test_a_release_that_lost_is_pushed_only_with_a_reason(self, coordinator, fleet, checkpoint, audit, rows):
        from edge_sdk.manifest import digest_of

        folder = checkpoint(2)
        record = CandidateRecord(
            digest=digest_of((folder / "manifest.json").read_bytes()), name="digits", release=2, champion=1,
            verdict="lost", reason="9 of 200 rows won, 40 lost", built=0.0, report={},
        )  # fmt: skip
        with coordinator.registry.store.transaction():
            coordinator.registry.store.candidates.save(record)
        with pytest.raises(ReleaseError, match=r"lost against release 1 .* 40 lost"):
            coordinator.registry.push(folder)
        number = coordinator.registry.push(folder, actor="ann", force="the old one is illegal now")
        assert state_of(coordinator, number).status == "running"
        assert "the old one is illegal now" in rows("SELECT detail FROM audit ORDER BY id DESC LIMIT 1")[0][0]


class TestLabels:
    NORTH = msgspec.structs.replace(QUICK, where="site=north", stages=(50, 100))

    @pytest.fixture
    def label(self, coordinator):
        def label(devices, site):
            for device in devices:
                coordinator.registry.label(device.name, {"site": site}, actor="ann")

        return label

    def test_only_devices_with_the_labels_get_it_and_those_that_are_given_them_later(
        self, coordinator, fleet, clock, settle, ship, label, broker
    ):
        north, others = fleet[:4], fleet[4:]
        label(north, "north")
        number = ship(self.NORTH)
        live(coordinator, fleet, clock, settle, turns=2)
        assert sum(device.release == 2 for device in north) == 2
        live(coordinator, fleet, clock, settle, turns=10)
        assert state_of(coordinator, number).status == "completed"
        assert [device.release for device in fleet] == [2] * 4 + [1] * 4
        assert desired(broker).base.release == 1
        revision = coordinator.desired_revision()
        live(coordinator, fleet, clock, settle, turns=3)
        assert coordinator.desired_revision() == revision, "nobody has to be told anew"
        label(others[:1], "north")
        live(coordinator, fleet, clock, settle, turns=3)
        assert [device.release for device in fleet] == [2] * 5 + [1] * 3

    def test_when_the_base_is_as_new_nothing_is_left_of_it(
        self, coordinator, fleet, clock, settle, ship, label, broker
    ):
        label(fleet[:4], "north")
        ship(self.NORTH)
        live(coordinator, fleet, clock, settle, turns=14)
        assert len(desired(broker).parts) == 1
        number = ship()
        live(coordinator, fleet, clock, settle, turns=14)
        assert state_of(coordinator, number).status == "completed", state_of(coordinator, number)
        assert (desired(broker).base.release, desired(broker).parts) == (3, [])
        assert all(device.release == 3 for device in fleet)

    def test_rollouts_for_different_devices_go_side_by_side_and_others_collide(
        self, coordinator, fleet, clock, settle, ship, label
    ):
        label(fleet[:4], "north")
        label(fleet[4:], "south")
        first = ship(self.NORTH)
        second = ship(msgspec.structs.replace(self.NORTH, where="site=south"))
        live(coordinator, fleet, clock, settle)
        assert [device.release for device in fleet].count(2) == 2
        assert [device.release for device in fleet].count(3) == 2
        with pytest.raises(RolloutError, match="busy"):
            ship(msgspec.structs.replace(self.NORTH, where="site in (south, east)"))
        with pytest.raises(RolloutError, match="busy"):
            ship()
        live(coordinator, fleet, clock, settle, turns=14)
        assert [state_of(coordinator, number).status for number in (first, second)] == ["completed"] * 2
        assert [device.release for device in fleet] == [2] * 4 + [3] * 4

    @pytest.mark.parametrize("where", ["release=1", "site=north and not mode=adapt", "site=", "(site"])
    def test_a_query_that_is_none_or_that_moves_is_refused(self, ship, where):
        with pytest.raises(ConfigError, match=r"where|label query"):
            ship(msgspec.structs.replace(QUICK, where=where))


class TestLate:
    def test_a_device_that_was_away_through_it_all_comes_back_to_the_right_release(
        self, coordinator, fleet, clock, settle, ship
    ):
        """Releases 2 (withdrawn), 3 (completed) and 4 (on its way) went by."""
        gone, rest = fleet[0], fleet[1:]
        bad = ship()
        live(coordinator, rest, clock, settle)
        coordinator.abort(bad)
        clock.advance(7200.0)  # it is not waited for
        live(coordinator, rest, clock, settle, turns=3)
        good = ship()
        gone.desired = None
        live(coordinator, rest, clock, settle, turns=12)
        assert state_of(coordinator, good).status == "completed"
        ship(msgspec.structs.replace(QUICK, stages=("1 devices", 100), timeout_s=30 * 86_400.0))
        clock.advance(21 * 86_400.0)
        gone.connect()
        coordinator.pump()
        gone.receive()
        live(coordinator, [gone], clock, settle, turns=2)
        told = {device.name for device in fleet if cohort("default-4", device.name)
                in from_places(gone.desired.parts[0].devices)}  # fmt: skip
        assert gone.release == (4 if gone.name in told else 3)

    def test_a_canary_that_is_away_when_it_is_withdrawn_leaves_it_when_it_is_back(
        self, coordinator, fleet, clock, settle, ship
    ):
        number = ship()
        live(coordinator, fleet, clock, settle)
        canary = next(device for device in fleet if device.release == 2)
        rest = [device for device in fleet if device is not canary]
        coordinator.abort(number)
        clock.advance(700.0)
        live(coordinator, rest, clock, settle, turns=2)
        assert state_of(coordinator, number).status == "rolled_back"
        assert canary.name in state_of(coordinator, number).reason
        canary.receive()
        live(coordinator, [canary], clock, settle)
        assert canary.release == 1


class TestGates:
    """What the store makes of reports, events and summaries, to the halt."""

    def run(self, coordinator, fleet, clock, settle, *, turns, put):
        for _ in range(turns):
            for device in fleet:
                device.obey()
            start = clock.now()
            clock.advance(10.0)
            for device in fleet:
                put(device, start)
            settle(fleet)
            coordinator.advance()
            for device in fleet:
                device.receive()

    @pytest.mark.parametrize(
        ("metric", "event"), [("crashes", "crashed"), ("rollbacks", "head_rolled_back"), ("drift", "drift_alarm")]
    )
    @pytest.mark.parametrize("bad", [False, True])
    def test_events_halt_it(self, coordinator, fleet, clock, settle, ship, metric, event, bad):
        rules = msgspec.structs.replace(
            QUICK, soak_s=400.0, min_labelled=0, gates=(Gate(metric=metric, margin=1.0, min_sample=5),)
        )
        number = ship(rules)

        def put(device, start):
            device.report(start=start)
            if device.release == 2 and bad:
                device.event(event, reason="x")

        self.run(coordinator, fleet, clock, settle, turns=25, put=put)
        state = state_of(coordinator, number)
        assert (state.status != "running") is bad
        if bad:
            assert f"{metric} by report on release 2" in state.reason

    @pytest.mark.parametrize("metric", ["p50_ms", "p99_ms"])
    @pytest.mark.parametrize(("slower", "halts"), [(1.0, False), (1.2, False), (3.0, True)])
    def test_latencies_of_reports_halt_it_within_minutes(
        self, coordinator, fleet, clock, settle, ship, metric, slower, halts
    ):
        rules = msgspec.structs.replace(
            QUICK, soak_s=400.0, min_labelled=0, gates=(Gate(metric=metric, margin=0.5, min_sample=20),)
        )
        rng = np.random.default_rng(5)

        def put(device, start):
            ms = rng.lognormal(1.0, 0.1) * (slower if device.release == 2 else 1.0)
            device.report(start=start, **{metric: ms})

        self.run(coordinator, fleet, clock, settle, turns=12, put=put)
        number = ship(rules)
        began = clock.now()
        self.run(coordinator, fleet, clock, settle, turns=25, put=put)
        state = state_of(coordinator, number)
        assert (state.status != "running") is halts, state.gates
        if halts:
            assert f"{metric} on release 2 is" in state.reason
            halted = next(step.time for step in state.history if step.status == "rolling_back")
            assert halted - began <= 150.0, "of reports every ten seconds"

    def test_latencies_are_judged_where_sqlite_knows_no_logarithm(self, coordinator, make_device, settle):
        device = make_device("a")
        device.report(p99_ms=2.5)
        settle([device])
        conn = coordinator.registry.store.conn
        own = conn.execute("SELECT ln(p99_ms), ln(0) FROM reports").fetchone()

        class Plain:
            """As a connection of an SQLite without mathematical functions."""

            def execute(self, sql):
                raise sqlite3.OperationalError("no such function: ln")

            def create_function(self, *arguments, **more):
                conn.create_function(*arguments, **more)

        need_ln(Plain())
        assert conn.execute("SELECT ln(p99_ms), ln(0) FROM reports").fetchone() == pytest.approx(own)

    @pytest.mark.parametrize("bad", [False, True])
    def test_summaries_halt_it(self, coordinator, fleet, clock, settle, ship, summary, bad):
        rules = msgspec.structs.replace(
            QUICK, soak_s=400.0, min_labelled=0, gates=(Gate(metric="metric:clicks", margin=0.05, min_sample=500),)
        )

        def put(device, start):
            device.report(start=start)
            clicks = 0.2 if bad and device.release == 2 else 0.5
            spread = (clicks * (1 - clicks)) ** 0.5
            metrics = [MetricSummary("clicks", 500, clicks, spread, 0.0, 1.0, b"", b"")]
            device.put(summary(start=start, end=clock.now(), release=device.release, metrics=metrics))

        self.run(coordinator, fleet, clock, settle, turns=4, put=put)
        number = ship(rules)
        self.run(coordinator, fleet, clock, settle, turns=8, put=put)
        state = state_of(coordinator, number)
        assert (state.status != "running") is bad, state.gates
        if bad:
            assert "on release 2" in state.reason

    def test_a_gate_whose_metric_nobody_reports_times_out_and_says_so(self, coordinator, fleet, clock, settle, ship):
        number = ship(msgspec.structs.replace(QUICK, timeout_s=100.0, gates=(Gate(metric="metric:clicks"),)))
        live(coordinator, fleet, clock, settle, turns=12)
        assert "0 of 50 values for metric:clicks" in state_of(coordinator, number).reason


class TestShadow:
    RULES = RolloutRules(
        strategy="shadow", stages=(100,), shadow_s=30.0, soak_s=10.0, timeout_s=600.0, min_labelled=50,
        max_disagreement=0.2,
    )  # fmt: skip

    def run(self, coordinator, fleet, clock, settle, *, turns, disagreed=5, won=2, lost=2):
        for turn in range(1, turns + 1):
            for device in fleet:
                device.obey()
            start = clock.now()
            clock.advance(10.0)
            for device in fleet:
                tally = ShadowTally(device.shadows, 100 * turn, disagreed * turn, 50 * turn, won * turn, lost * turn, 0)
                device.report(start=start, shadow=[tally] if device.shadows else [])
            settle(fleet)
            coordinator.advance()
            for device in fleet:
                device.receive()

    def test_it_runs_in_shadow_and_then_serves(self, coordinator, fleet, clock, settle, ship):
        number = ship(self.RULES)
        assert state_of(coordinator, number).shadowing
        self.run(coordinator, fleet, clock, settle, turns=3)
        assert all((device.release, device.shadows) == (1, 2) for device in fleet)
        self.run(coordinator, fleet, clock, settle, turns=8)
        assert all((device.release, device.shadows) == (2, 0) for device in fleet)
        assert state_of(coordinator, number).status == "completed"

    @pytest.mark.parametrize("worse", [{"disagreed": 60}, {"lost": 20}])
    def test_a_bad_one_is_dropped_without_having_served(self, coordinator, fleet, clock, settle, ship, worse):
        number = ship(self.RULES)
        self.run(coordinator, fleet, clock, settle, turns=6, **worse)
        state = state_of(coordinator, number)
        assert state.status == "rolled_back"
        assert "in shadow" in state.reason
        assert all((device.release, device.shadows) == (1, 0) for device in fleet)


class TestAb:
    def test_too_few_labels_are_refused_or_told_beforehand(self, coordinator, fleet, ship):
        rules = RolloutRules(strategy="ab", effect=0.005, timeout_s=100.0, soak_s=0.0, stages=(100,))
        with pytest.raises(RolloutError, match=r"to see a gain of 0.5% .* labelled predictions are wanted"):
            ship(rules)
        number = ship(msgspec.structs.replace(rules, on_small="warn"))
        assert "labelled predictions are wanted" in state_of(coordinator, number).history[0].reason

    def test_what_is_better_is_completed_and_what_is_not_is_withdrawn(self, coordinator, fleet, clock, settle, ship):
        rules = RolloutRules(strategy="ab", effect=0.05, timeout_s=400.0, stages=(100,), soak_s=10.0, on_small="warn")
        held_out = None
        for accuracy, status in ((0.9, "rolled_back"), (1.0, "completed")):
            number = ship(rules)
            plan = coordinator.registry.rollout(number).plan
            held_out = [device for device in fleet if plan.in_control(device.name)]
            assert 0 < len(held_out) < len(fleet)
            for _ in range(42):
                for device in fleet:
                    device.accuracy = accuracy if device.release == plan.release else 0.9
                if state_of(coordinator, number).status == "running":
                    assert not any(device.release == plan.release for device in held_out)
                live(coordinator, fleet, clock, settle)
            assert state_of(coordinator, number).status == status, state_of(coordinator, number).reason
        assert all(device.release == 3 for device in fleet), "the control group gets it, too"

    def test_it_needs_something_to_compare_with(self, coordinator, checkpoint):
        with pytest.raises(RolloutError, match="nothing to compare with"):
            coordinator.push(checkpoint(1), plan=RolloutRules(strategy="ab"))


class TestModes:
    def test_a_group_keeps_its_mode_also_of_devices_that_come_later(
        self, coordinator, make_device, clock, settle, tmp_path, rows
    ):
        registry = coordinator.registry
        for name in ("a", "b", "c"):
            registry.enrol(name, group="lab" if name != "c" else "default", out=tmp_path / name, actor="ann")
        first = make_device("a", group="lab")
        make_device("c")
        coordinator.pump()
        assert registry.modes.set("lab", "shadow", actor="ann") == 1
        assert registry.modes.keep() == 0, "it was told"
        late = make_device("b", group="lab")
        coordinator.pump()
        assert registry.modes.keep() == 1
        late.state(mode="shadow")
        first.state(mode="shadow")
        coordinator.pump()
        clock.advance(90_000.0)
        assert registry.modes.keep() == 0, "they are in it"
        told = rows("SELECT device, args, actor FROM commands ORDER BY issued, device")
        assert told == [("a", '{"mode":"shadow"}', "coordinator"), ("b", '{"mode":"shadow"}', "coordinator")]

    def test_a_device_that_did_not_follow_is_told_again_after_a_day(self, coordinator, make_device, clock, tmp_path):
        registry = coordinator.registry
        registry.enrol("a", group="lab", out=tmp_path / "a", actor="ann")
        make_device("a", group="lab")
        coordinator.pump()
        assert registry.modes.set("lab", "monitor", actor="ann") == 1
        clock.advance(90_000.0)
        assert registry.modes.keep() == 1
        registry.modes.set("lab", "", actor="ann")
        clock.advance(90_000.0)
        assert registry.modes.keep() == 0


def test_a_plan_no_stage_of_which_can_pass_is_refused_and_one_from_before_can_be_read(coordinator, ship, rows):
    with pytest.raises(ConfigError, match="timeout_s must be above soak_s"):
        ship(RolloutRules(timeout_s=60.0, soak_s=60.0))
    number = ship()
    store = coordinator.registry.store
    with store.transaction():
        store.execute("UPDATE rollouts SET plan = json_set(plan, '$.soak_s', 9e9) WHERE id = ?", (number,))
    assert coordinator.registry.rollout(number).plan.soak_s == 9e9


class TestRevokedDevices:
    def test_nobody_waits_for_them_and_they_are_not_counted(self, coordinator, fleet, clock, settle, ship):
        gone, *others = fleet
        coordinator.registry.identities.revoke(gone.name, actor="ann")
        assert coordinator.registry.fleet().devices == len(others)
        assert coordinator.registry.fleet().online == len(others)
        number = ship(msgspec.structs.replace(QUICK, stages=(100,), min_labelled=0))
        live(coordinator, others, clock, settle, turns=8)
        assert state_of(coordinator, number).status == "completed"
        assert gone.release == 1
