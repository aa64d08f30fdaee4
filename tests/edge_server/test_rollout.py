import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_sdk.messages import THRESHOLD_ALL, Offer, cohort
from edge_server.rollout import (
    DeviceMetrics,
    RolloutPlan,
    RolloutRules,
    RolloutState,
    advance,
    begin,
    desired,
    failure,
    halt,
    stage_size,
    stage_threshold,
)

PLAN = RolloutPlan(release=2, stages=(20, 100), soak_s=60.0, timeout_s=1000.0, min_labelled=100, max_accuracy_drop=0.05)


def fleet(count=10, on=0, **changes):
    """Devices in the order of the cohort, the first `on` of them on the candidate."""
    names = sorted((f"d{i}" for i in range(count)), key=lambda name: cohort(PLAN.salt, name))
    return [DeviceMetrics(device=name, on_candidate=i < on, switched=i < on, **changes) for i, name in enumerate(names)]


def scored(entries, before, after, *, labelled=200):
    return [
        msgspec.structs.replace(
            entry,
            labelled=labelled,
            correct=round(labelled * after),
            labelled_before=labelled,
            correct_before=round(labelled * before),
        )
        for entry in entries
    ]


def running(metrics, now=0.0):
    return begin(PLAN, metrics, has_base=True, now=now)


class TestRules:
    @pytest.mark.parametrize(
        "rules",
        [
            {"stages": ()},
            {"stages": (50,)},
            {"stages": (50, 10, 100)},
            {"stages": (0, 100)},
            {"stages": (10, 110)},
            {"soak_s": -1.0},
            {"soak_s": float("nan")},
            {"timeout_s": 0.0},
            {"max_accuracy_drop": 1.5},
            {"max_failures": -1},
        ],
    )
    def test_rules_out_of_range_are_refused(self, rules):
        with pytest.raises(ValueError, match="must "):
            RolloutRules(**rules)

    def test_a_plan_and_a_state_survive_being_written_down(self):
        state = halt(running(fleet()), "why", 5.0)
        assert msgspec.json.decode(msgspec.json.encode(PLAN), type=RolloutPlan) == PLAN
        assert msgspec.json.decode(msgspec.json.encode(state), type=RolloutState) == state


class TestStages:
    @pytest.mark.parametrize(("devices", "size"), [(0, 0), (1, 1), (4, 1), (5, 1), (6, 2), (100, 20)])
    def test_a_stage_has_at_least_one_device_and_never_more_than_its_share_rounded_up(self, devices, size):
        assert stage_size(PLAN, 0, devices) == size

    def test_the_threshold_includes_exactly_the_stage(self):
        metrics = fleet(10)
        threshold = stage_threshold(PLAN, 0, metrics)
        assert [cohort(PLAN.salt, entry.device) < threshold for entry in metrics] == [True] * 2 + [False] * 8

    def test_the_last_stage_includes_all(self):
        assert stage_threshold(PLAN, 1, fleet(3)) == THRESHOLD_ALL

    def test_devices_that_run_it_keep_their_place_when_others_join_before_them(self):
        metrics = fleet(10)
        first, second, third = metrics[:3]
        took_it = [msgspec.structs.replace(entry, on_candidate=True) for entry in (second, third)]
        threshold = stage_threshold(PLAN, 0, [first, *took_it, *metrics[3:]])
        assert threshold <= cohort(PLAN.salt, first.device)

    def test_a_group_without_a_base_gets_the_release_at_once(self):
        state = begin(PLAN, fleet(), has_base=False, now=0.0)
        assert state.status == "completed"

    def test_it_soaks_and_gathers_labels_before_the_next_stage(self):
        state = running(fleet())
        on = scored(fleet(on=2), 0.9, 0.9, labelled=0)
        state = advance(state, PLAN, on, 10.0)
        assert (state.stage, state.soaking_since) == (0, 10.0)
        enough = scored(fleet(on=2), 0.9, 0.9, labelled=50)
        assert advance(state, PLAN, enough, 60.0).stage == 0, "it has not soaked"
        assert advance(state, PLAN, on, 80.0).stage == 0, "there are no labels"
        state = advance(state, PLAN, enough, 80.0)
        assert (state.stage, state.threshold) == (1, THRESHOLD_ALL)

    def test_it_goes_through_all_stages_to_completion(self):
        enough = scored(fleet(on=2), 0.9, 0.9, labelled=50)
        state = advance(running(fleet()), PLAN, enough, 1.0)
        state = advance(state, PLAN, enough, 70.0)
        assert (state.stage, state.stage_started, state.soaking_since) == (1, 70.0, None)
        all_on = scored(fleet(on=10), 0.9, 0.9, labelled=20)
        state = advance(advance(state, PLAN, all_on, 80.0), PLAN, all_on, 200.0)
        assert state.status == "completed"
        assert [step.status for step in state.history] == ["running", "running", "completed"]

    def test_an_unreachable_device_holds_nobody_up(self):
        plan = msgspec.structs.replace(PLAN, min_labelled=0, soak_s=0.0)
        metrics = fleet(on=1)
        metrics[1] = msgspec.structs.replace(metrics[1], reachable=False)
        assert advance(running(metrics), plan, metrics, 1.0).stage == 1

    def test_a_stage_in_which_nobody_runs_it_does_not_pass(self):
        plan = msgspec.structs.replace(PLAN, min_labelled=0, soak_s=0.0)
        metrics = fleet(on=0, reachable=False)
        assert advance(running(metrics), plan, metrics, 1.0).stage == 0

    def test_a_tolerated_failure_holds_nobody_up(self):
        plan = msgspec.structs.replace(PLAN, min_labelled=0, soak_s=0.0, max_failures=1)
        metrics = fleet(on=1)
        metrics[1] = msgspec.structs.replace(metrics[1], failed=True)
        assert advance(running(metrics), plan, metrics, 1.0).stage == 1

    def test_a_stage_that_does_not_pass_in_time_is_halted_and_says_what_lacked(self):
        state = advance(running(fleet()), PLAN, fleet(on=1), 1000.0)
        assert state.status == "rolling_back"
        assert "1 reachable devices do not run it" in state.reason
        assert "0 of 100 labelled" in state.reason


class TestGates:
    @pytest.mark.parametrize("what", ["failed", "rolled_back"])
    def test_devices_that_do_not_keep_it_halt_it(self, what):
        metrics = fleet(on=1)
        metrics[1] = msgspec.structs.replace(metrics[1], **{what: True})
        state = advance(running(metrics), PLAN, metrics, 1.0)
        assert state.status == "rolling_back"
        assert state.threshold == 0
        assert metrics[1].device in state.reason

    def test_errors_halt_it(self):
        metrics = fleet(on=2, predictions=100, errors=50)
        assert "100 of 300 predictions on release 2 failed" in failure(PLAN, metrics)

    def test_errors_of_other_devices_do_not(self):
        assert failure(PLAN, fleet(on=0, predictions=100, errors=50)) is None

    def test_a_loss_of_accuracy_halts_it_and_the_reason_has_the_numbers(self):
        metrics = scored(fleet(on=2)[:2], 0.9, 0.6) + scored(fleet()[2:], 0.9, 0.9)
        reason = failure(PLAN, metrics)
        assert "accuracy on release 2 is 60.0%" in reason
        assert "400 labelled, 2 devices" in reason
        assert "before 90.0%" in reason
        assert "control changed by +0.0%" in reason

    def test_a_loss_that_everybody_has_is_not_blamed_on_it(self):
        metrics = scored(fleet(on=2)[:2], 0.9, 0.6) + scored(fleet()[2:], 0.9, 0.6)
        assert failure(PLAN, metrics) is None

    def test_a_fleet_that_gets_better_does_not_raise_the_bar(self):
        metrics = scored(fleet(on=2)[:2], 0.8, 0.8) + scored(fleet()[2:], 0.6, 0.9)
        assert failure(PLAN, metrics) is None

    def test_a_loss_within_what_is_tolerated_passes(self):
        assert failure(PLAN, scored(fleet(on=2), 0.9, 0.87)) is None

    def test_in_the_last_stage_the_earlier_devices_are_the_control_group(self):
        earlier = [msgspec.structs.replace(entry, switched=False) for entry in fleet(on=10)[:2]]
        later = scored(fleet(on=10)[2:], 0.9, 0.6)
        assert failure(PLAN, scored(earlier, 0.9, 0.6) + later) is None
        assert "control changed by -10.0%" in failure(PLAN, scored(earlier, 0.9, 0.8) + later)

    def test_too_few_labels_decide_nothing(self):
        assert failure(PLAN, scored(fleet(on=2)[:2], 0.9, 0.0, labelled=40)) is None

    def test_a_change_of_mix_is_no_change(self):
        good, bad = fleet(on=2)[:2]
        metrics = [
            msgspec.structs.replace(good, labelled=100, correct=99, labelled_before=1000, correct_before=990),
            msgspec.structs.replace(bad, labelled=1000, correct=500, labelled_before=100, correct_before=50),
        ]
        assert failure(PLAN, metrics) is None


class TestRollback:
    def test_it_ends_when_nobody_reports_the_release(self):
        state = halt(running(fleet()), "bad", 5.0)
        assert advance(state, PLAN, fleet(on=1), 6.0) == state
        ended = advance(state, PLAN, fleet(on=0), 7.0)
        assert (ended.status, ended.reason) == ("rolled_back", "bad")

    def test_it_ends_in_time_and_names_those_that_did_not_leave(self):
        state = halt(running(fleet()), "bad", 5.0)
        ended = advance(state, PLAN, fleet(on=1), 1005.0)
        assert ended.status == "rolled_back"
        assert fleet(on=1)[0].device in ended.reason

    def test_what_has_ended_does_not_change(self):
        state = advance(halt(running(fleet()), "bad", 5.0), PLAN, fleet(), 7.0)
        assert advance(state, PLAN, fleet(on=10), 9999.0) is state


class TestDesired:
    def test_a_candidate_is_offered_only_below_a_threshold(self):
        base, candidate = Offer(1, "a" * 64, 10), Offer(2, "b" * 64, 10)
        common = {"revision": 3, "base": base, "candidate": candidate, "salt": "x"}
        during = desired(**common, threshold=7, revoked=[])
        assert (during.candidate, during.threshold, during.salt) == (candidate, 7, "x")
        after = desired(**common, threshold=0, revoked=[2, 1])
        assert (after.candidate, after.threshold, after.salt, after.revoked) == (None, 0, "", [1, 2])


class Fleet(RuleBasedStateMachine):
    """Devices that install, fail, report, vanish and join in any order, and a coordinator that restarts."""

    @initialize(
        count=st.integers(0, 12),
        stages=st.sampled_from([(100,), (10, 100), (1, 50, 100)]),
        max_failures=st.integers(0, 2),
        min_labelled=st.sampled_from([0, 50]),
    )
    def start(self, count, stages, max_failures, min_labelled):
        self.plan = RolloutPlan(
            release=2,
            stages=stages,
            soak_s=20.0,
            timeout_s=300.0,
            min_labelled=min_labelled,
            max_failures=max_failures,
        )
        self.devices = {f"d{i}": DeviceMetrics(device=f"d{i}") for i in range(count)}
        self.now = 0.0
        self.halted = False
        self.state = begin(self.plan, self.metrics, has_base=True, now=0.0)

    @property
    def metrics(self):
        return list(self.devices.values())

    def change(self, name, **changes):
        self.devices[name] = msgspec.structs.replace(self.devices[name], **changes)

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), fails=st.booleans())
    def device_obeys(self, data, fails):
        name = data.draw(st.sampled_from(sorted(self.devices)))
        device = self.devices[name]
        if self.state.status in ("rolling_back", "rolled_back"):
            self.change(name, on_candidate=False)
        elif cohort(self.plan.salt, name) < self.state.threshold and not device.has_failed:
            self.change(name, on_candidate=not fails, switched=not fails, failed=fails)

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), labelled=st.integers(0, 200), accuracy=st.sampled_from([0.9, 0.3]))
    def device_reports(self, data, labelled, accuracy):
        name = data.draw(st.sampled_from(sorted(self.devices)))
        correct = round(labelled * accuracy)
        self.change(name, labelled=labelled, correct=correct, labelled_before=100, correct_before=90)

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), reachable=st.booleans())
    def device_vanishes_or_returns(self, data, reachable):
        self.change(data.draw(st.sampled_from(sorted(self.devices))), reachable=reachable)

    @rule(number=st.integers(100, 999))
    def device_joins(self, number):
        self.devices.setdefault(f"d{number}", DeviceMetrics(device=f"d{number}"))
        self.step(0.0)  # it is registered before it can be told anything

    @rule(seconds=st.floats(0.0, 120.0))
    def step(self, seconds):
        self.now += seconds
        before, failed = self.state, failure(self.plan, self.metrics)
        self.state = advance(before, self.plan, self.metrics, self.now)
        if before.status == "running" and failed:
            assert self.state.status == "rolling_back", "never forward past a failed gate"
        assert self.state.stage in (before.stage, before.stage + 1)
        if self.state.stage > before.stage:
            assert before.status == self.state.status == "running"

    @rule()
    def coordinator_restarts(self):
        self.state = msgspec.json.decode(msgspec.json.encode(self.state), type=RolloutState)

    @precondition(lambda self: self.state.status == "running")
    @rule()
    def operator_aborts(self):
        self.state = halt(self.state, "aborted", self.now)

    @invariant()
    def never_more_devices_than_the_stage_allows(self):
        if self.state.status != "running":
            return
        reached = [
            entry
            for entry in self.metrics
            if entry.on_candidate or cohort(self.plan.salt, entry.device) < self.state.threshold
        ]
        assert len(reached) <= stage_size(self.plan, self.state.stage, len(self.devices))

    @invariant()
    def what_was_halted_never_completes(self):
        self.halted = self.halted or self.state.status == "rolling_back"
        assert not (self.halted and self.state.status in ("running", "completed"))
        if self.halted:
            assert self.state.threshold == 0

    def teardown(self):
        if not hasattr(self, "plan"):
            return
        for _ in range(2 + len(self.plan.stages)):
            self.step(self.plan.timeout_s)
        assert not self.state.is_active, "it always ends"


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
