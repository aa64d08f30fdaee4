import calendar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_sdk.messages import cohort
from edge_server.gates import DeviceMetrics, Sums, share
from edge_server.plan import Gate, RolloutPlan, opens_at
from edge_server.rollout import (
    RolloutState,
    advance,
    allowed,
    approve,
    awaits_approval,
    begin,
    failure,
    halt,
    pause,
    queue,
    resume,
)

PLAN = RolloutPlan(release=2, stages=(20, 100), soak_s=60.0, timeout_s=1000.0, min_labelled=100, max_accuracy_drop=0.05)
HEALTH = msgspec.structs.replace(PLAN, min_labelled=0, soak_s=0.0)
NOON = float(calendar.timegm((2026, 11, 21, 12, 0, 0)))


def fleet(count=10, on=0, plan=PLAN, **changes):
    """Devices in the order of the cohort, the first `on` of them on the candidate."""
    names = sorted((f"d{i}" for i in range(count)), key=lambda name: cohort(plan.salt, name))
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


def changed(entries, which, **changes):
    return [msgspec.structs.replace(entry, **changes) if i in which else entry for i, entry in enumerate(entries)]


def running(metrics, now=0.0, plan=PLAN):
    return begin(plan, metrics, has_base=True, now=now)


class TestStages:
    def test_a_state_survives_being_written_down(self):
        metrics = scored(fleet(on=2), 0.9, 0.9)
        for state in (halt(running(fleet()), "why", 5.0), advance(running(fleet()), PLAN, metrics, 5.0)):
            assert msgspec.json.decode(msgspec.json.encode(state), type=RolloutState) == state

    def test_the_first_in_the_order_are_told(self):
        metrics = fleet()
        assert running(metrics).offered == (metrics[0].device, metrics[1].device)

    def test_the_last_stage_is_for_everyone(self):
        state = running(fleet(3), plan=msgspec.structs.replace(PLAN, stages=(100,)))
        assert (state.everyone, state.offered) == (True, ())

    def test_devices_that_run_it_keep_their_place_when_others_join_before_them(self):
        metrics = fleet(10)
        took_it = changed(metrics, (1, 2), on_candidate=True)
        assert running(took_it).offered == ()

    def test_who_was_told_stays_told_when_others_join_before_them(self):
        metrics = fleet(10)
        state = running(metrics[1:])
        told = state.told
        state = advance(state, PLAN, metrics, 1.0)
        assert (state.told, state.offered) == (told, told)

    def test_a_group_without_a_base_gets_the_release_at_once(self):
        assert begin(PLAN, fleet(), has_base=False, now=0.0).status == "completed"
        some = msgspec.structs.replace(PLAN, where="site=north")
        assert begin(some, fleet(), has_base=False, now=0.0).status == "running", "the others get nothing"

    def test_it_soaks_and_gathers_labels_before_the_next_stage(self):
        state = running(fleet())
        on = scored(fleet(on=2), 0.9, 0.9, labelled=0)
        state = advance(state, PLAN, on, 10.0)
        assert (state.stage, state.soaking_since) == (0, 10.0)
        enough = scored(fleet(on=2), 0.9, 0.9, labelled=50)
        assert advance(state, PLAN, enough, 60.0).stage == 0, "it has not soaked"
        assert advance(state, PLAN, on, 80.0).stage == 0, "there are no labels"
        state = advance(state, PLAN, enough, 80.0)
        assert (state.stage, state.everyone) == (1, True)

    def test_it_goes_through_all_stages_to_completion(self):
        enough = scored(fleet(on=2), 0.9, 0.9, labelled=50)
        state = advance(running(fleet()), PLAN, enough, 1.0)
        state = advance(state, PLAN, enough, 70.0)
        assert (state.stage, state.stage_started, state.soaking_since) == (1, 70.0, None)
        all_on = scored(fleet(on=10), 0.9, 0.9, labelled=20)
        state = advance(advance(state, PLAN, all_on, 80.0), PLAN, all_on, 200.0)
        assert (state.status, state.waits) == ("completed", "")
        assert [step.status for step in state.history] == ["running", "running", "completed"]

    def test_an_unreachable_device_holds_nobody_up(self):
        state = running(fleet(), plan=HEALTH)
        assert advance(state, HEALTH, changed(fleet(on=1), (1,), reachable=False), 1.0).stage == 1

    def test_a_device_that_is_away_is_told_once_it_is_back(self):
        metrics = changed(fleet(), (0,), reachable=False)
        state = running(metrics)
        assert state.told == (metrics[1].device, metrics[2].device)
        later = msgspec.structs.replace(PLAN, stages=("2 devices", "5 devices", 100))
        state = advance(msgspec.structs.replace(state, stage=1), later, fleet(), 1.0)
        assert metrics[0].device in state.told

    def test_a_stage_in_which_nobody_runs_it_does_not_pass(self):
        metrics = fleet(on=0, reachable=False)
        assert advance(running(metrics, plan=HEALTH), HEALTH, metrics, 1.0).stage == 0

    def test_a_tolerated_failure_holds_nobody_up(self):
        plan = msgspec.structs.replace(HEALTH, max_failures=1)
        metrics = changed(fleet(on=1), (1,), failed=True)
        assert advance(running(metrics, plan=plan), plan, metrics, 1.0).stage == 1

    def test_a_stage_that_does_not_pass_in_time_is_halted_and_says_what_lacked(self):
        state = advance(running(fleet()), PLAN, fleet(on=1), 1000.0)
        assert state.status == "rolling_back"
        assert "1 reachable devices do not run it" in state.reason
        assert "0 of 100 labelled" in state.reason

    def test_devices_without_the_labels_of_the_plan_are_not_told(self):
        plan = msgspec.structs.replace(PLAN, stages=(100,), where="site=north")
        state = running(changed(fleet(plan=plan), range(6), eligible=False), plan=plan)
        assert (len(state.told), state.everyone) == (4, False)

    def test_devices_that_are_held_out_are_not_told_before_it_is_completed(self):
        plan = msgspec.structs.replace(PLAN, stages=(100,), control_percent=50)
        state = running(fleet(40), plan=plan)
        assert state.told
        assert not any(plan.in_control(name) for name in state.told)
        assert len(state.told) == sum(not plan.in_control(f"d{i}") for i in range(40))

    def test_an_ab_test_must_be_shown_better_in_its_last_stage_only(self):
        plan = msgspec.structs.replace(PLAN, strategy="ab")
        names = [entry.device for entry in fleet(40, plan=plan)]
        treated = [i for i, name in enumerate(names) if not plan.in_control(name)]
        few = changed(scored(fleet(40, plan=plan), 0.9, 0.9), treated[:5], on_candidate=True, switched=True)
        state = advance(advance(running(fleet(40, plan=plan), plan=plan), plan, few, 1.0), plan, few, 70.0)
        assert state.stage == 1
        half = changed(scored(fleet(40, plan=plan), 0.9, 0.9), treated, on_candidate=True, switched=True)
        state = advance(advance(state, plan, half, 80.0), plan, half, 200.0)
        assert (state.status, state.stage) == ("running", 1), "it is as good as before, and no better"


class TestDownloads:
    PLAN = msgspec.structs.replace(HEALTH, stages=(100,), max_parallel=2)

    def test_only_so_many_are_told_at_once_and_the_next_as_they_finish(self):
        metrics = fleet(5)
        state = running(metrics, plan=self.PLAN)
        assert state.offered == (metrics[0].device, metrics[1].device)
        state = advance(state, self.PLAN, changed(metrics, (1,), on_candidate=True), 1.0)
        assert state.offered == (metrics[0].device, metrics[2].device)
        failed = changed(changed(metrics, (1,), on_candidate=True), (0,), failed=True)
        tolerant = msgspec.structs.replace(self.PLAN, max_failures=1)
        state = advance(state, tolerant, failed, 2.0)
        assert state.offered == (metrics[2].device, metrics[3].device)

    def test_a_device_that_goes_away_gives_its_place_up_and_gets_it_back(self):
        metrics = fleet(4)
        state = running(metrics, plan=self.PLAN)
        away = changed(metrics, (0,), reachable=False)
        state = advance(state, self.PLAN, away, 1.0)
        assert state.offered == (metrics[1].device, metrics[2].device)
        done = changed(metrics, (1, 2), on_candidate=True)
        state = advance(state, self.PLAN, done, 2.0)
        assert set(state.offered) == {metrics[0].device, metrics[3].device}

    def test_a_message_is_not_made_anew_when_nobody_else_is_to_be_told(self):
        metrics = fleet(2)
        state = running(metrics, plan=self.PLAN)
        assert advance(state, self.PLAN, changed(metrics, (0,), on_candidate=True), 1.0).offered == state.offered


class TestHolding:
    def test_a_paused_rollout_tells_nobody_and_goes_on_when_it_is_resumed(self):
        state = pause(running(fleet()), "a look first", 5.0)
        assert (state.offered, state.everyone) == ((), False)
        on = fleet(on=2)
        state = advance(state, HEALTH, on, 5000.0)
        assert (state.status, state.stage, state.offered) == ("running", 0, ())
        assert "resume" in state.waits
        state = advance(resume(state, 6000.0), HEALTH, on, 6000.0)
        assert (state.stage, state.everyone) == (1, True), "the time in between does not count"

    def test_a_paused_rollout_is_still_halted_by_a_gate(self):
        state = pause(running(fleet()), "a look first", 5.0)
        assert advance(state, PLAN, changed(fleet(on=1), (1,), failed=True), 6.0).status == "rolling_back"

    @pytest.mark.parametrize(("approval", "stage"), [("each", 0), ("last", 1)])
    def test_a_stage_waits_for_its_approval(self, approval, stage):
        plan = msgspec.structs.replace(HEALTH, approval=approval)
        on, now = fleet(on=2), 0.0
        state = running(fleet(), plan=plan)
        for _ in range(stage):
            state = advance(state, plan, on, now := now + 1.0)
        for _ in range(3):
            state = advance(state, plan, on, now := now + 1000.0)
            assert (state.stage, state.offered, state.everyone) == (stage, (), False)
            assert awaits_approval(state, plan)
            assert f"approve stage {stage + 1}" in state.waits
        state = advance(approve(state, "approved", now), plan, on, now)
        assert not awaits_approval(state, plan) or state.stage == stage + 1
        assert state.status in ("running", "completed")

    def test_outside_its_hours_it_tells_nobody(self):
        plan = msgspec.structs.replace(PLAN, hours=("22:00-04:00",))
        state = running(fleet(), now=NOON, plan=plan)
        assert state.offered == ()
        assert "2026-11-21 22:00 UTC" in state.waits
        state = advance(state, plan, fleet(), NOON + 10 * 3600)
        assert len(state.offered) == 2
        state = advance(state, plan, fleet(on=1), NOON + 16 * 3600)
        assert state.offered == (), "who has not begun waits for the next night"
        assert state.status == "running", "hours in which nothing may be done do not count for the time-out"

    def test_a_queued_rollout_waits_for_the_one_before(self):
        state = queue(7, 5.0)
        assert advance(state, PLAN, fleet(on=10), 1e9) is state
        assert "rollout 7" in state.waits
        assert halt(state, "aborted", 6.0).status == "rolled_back"


class TestShadow:
    PLAN = RolloutPlan(
        release=2, strategy="shadow", stages=(100,), shadow_s=100.0, soak_s=0.0, timeout_s=1000.0, min_labelled=50,
        max_disagreement=0.2,
    )  # fmt: skip

    def shadowing(self, count=4, *, disagreed=50, won=5, lost=5, **changes):
        values = {
            "disagreement": (share(1000, disagreed), Sums()),
            "accuracy": (Sums(100, won - lost, won + lost), Sums()),
        }
        return [DeviceMetrics(device=f"d{i}", in_shadow=True, values=values, **changes) for i in range(count)]

    def test_it_runs_in_shadow_first_and_then_in_stages(self):
        waiting = [DeviceMetrics(device=f"d{i}") for i in range(4)]
        state = running(waiting, plan=self.PLAN)
        assert (state.shadowing, sorted(state.offered)) == (True, ["d0", "d1", "d2", "d3"])
        state = advance(state, self.PLAN, self.shadowing(), 10.0)
        assert "in shadow until" in state.waits
        state = advance(state, self.PLAN, self.shadowing(), 111.0)
        assert (state.shadowing, state.stage, state.everyone) == (False, 0, True)

    def test_it_is_dropped_if_it_disagrees_too_much_or_is_less_often_right(self):
        state = running(self.shadowing(), plan=self.PLAN)
        much = advance(state, self.PLAN, self.shadowing(disagreed=500), 10.0)
        assert (much.status, "differs on 50.0%" in much.reason) == ("rolling_back", True)
        wrong = advance(state, self.PLAN, self.shadowing(lost=40), 10.0)
        assert (wrong.status, "right -35.0% more often" in wrong.reason) == ("rolling_back", True)
        assert advance(wrong, self.PLAN, self.shadowing(), 11.0).status == "rolled_back"

    def test_who_is_in_shadow_stays_there_while_others_are_told_and_while_it_is_held(self):
        plan = msgspec.structs.replace(self.PLAN, max_parallel=2)
        state = running([DeviceMetrics(device=f"d{i}") for i in range(4)], plan=plan)
        first = set(state.offered)
        metrics = [msgspec.structs.replace(entry, in_shadow=entry.device in first) for entry in self.shadowing()]
        state = advance(state, plan, metrics, 10.0)
        assert set(state.offered) == {f"d{i}" for i in range(4)}
        state = advance(pause(state, "a look", 11.0), plan, metrics, 12.0)
        assert set(state.offered) == first
        state = advance(resume(state, 20.0), plan, metrics, 20.0)
        assert set(state.offered) == {f"d{i}" for i in range(4)}

    def test_without_labels_it_does_not_leave_the_shadow(self):
        state = running(self.shadowing(), plan=self.PLAN)
        unlabelled = [
            msgspec.structs.replace(entry, values={"disagreement": (share(1000, 10), Sums())})
            for entry in self.shadowing()
        ]
        state = advance(advance(state, self.PLAN, unlabelled, 10.0), self.PLAN, unlabelled, 500.0)
        assert (state.shadowing, "0 of 50 labelled predictions" in state.waits) == (True, True)
        assert advance(state, self.PLAN, unlabelled, 1000.0).status == "rolling_back"


class TestRollback:
    @pytest.mark.parametrize("what", ["failed", "rolled_back"])
    def test_devices_that_do_not_keep_it_halt_it(self, what):
        metrics = changed(fleet(on=1), (1,), **{what: True})
        state = advance(running(metrics), PLAN, metrics, 1.0)
        assert (state.status, state.offered, state.everyone) == ("rolling_back", (), False)
        assert metrics[1].device in state.reason

    def test_it_ends_when_nobody_reports_the_release(self):
        state = halt(running(fleet()), "bad", 5.0)
        assert advance(state, PLAN, fleet(on=1), 6.0).status == "rolling_back"
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


class Fleet(RuleBasedStateMachine):
    """Devices that install, fail, report, vanish and join in any order, people who act, a coordinator that restarts."""

    @initialize(
        count=st.integers(0, 12),
        stages=st.sampled_from([(100,), (10, 100), ("2 devices", 50, 100)]),
        max_failures=st.integers(0, 2),
        min_labelled=st.sampled_from([0, 50]),
        max_parallel=st.sampled_from([0, 1, 3]),
        approval=st.sampled_from(["none", "none", "each", "last"]),
        hours=st.sampled_from([(), (), ("00:00-12:00",), ("06:00-23:00",)]),
        control_percent=st.sampled_from([0, 0, 40]),
        where=st.sampled_from(["", "", "site=north"]),
        strategy=st.sampled_from(["canary", "shadow"]),
        gates=st.sampled_from([(), (Gate(metric="crashes", margin=1.0, min_sample=2),)]),
    )
    def start(self, count, gates, **rules):
        self.plan = RolloutPlan(
            release=2, soak_s=20.0, shadow_s=30.0, timeout_s=300.0, gates=gates, shadow_percent=50, **rules
        )
        self.devices = {f"d{i}": self.new(f"d{i}", i) for i in range(count)}
        self.now = 0.0
        self.halted = False
        self.state = begin(self.plan, self.metrics, has_base=True, now=0.0)

    def new(self, name, number):
        return DeviceMetrics(device=name, eligible=not self.plan.where or number % 3 > 0)

    @property
    def metrics(self):
        return list(self.devices.values())

    @property
    def pool(self):
        return [d for d in self.metrics if d.eligible and not self.plan.in_control(d.device)]

    def change(self, name, **changes):
        self.devices[name] = msgspec.structs.replace(self.devices[name], **changes)

    def told(self, name):
        return self.state.everyone or cohort(self.plan.salt, name) in {
            cohort(self.plan.salt, other) for other in self.state.offered
        }

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), fails=st.integers(0, 5))
    def device_obeys(self, data, fails):
        name = data.draw(st.sampled_from(sorted(self.devices)))
        device = self.devices[name]
        if self.state.status in ("rolling_back", "rolled_back"):
            self.change(name, on_candidate=False, in_shadow=False)
        elif self.told(name) and not device.has_failed and device.reachable:
            if self.state.shadowing:
                self.change(name, in_shadow=fails != 0, failed=fails == 0)
            else:
                self.change(name, on_candidate=fails != 0, switched=fails != 0, failed=fails == 0, in_shadow=False)

    @precondition(lambda self: self.devices)
    @rule(
        data=st.data(),
        labelled=st.integers(0, 200),
        accuracy=st.sampled_from([0.9, 0.9, 0.3]),
        crashes=st.integers(0, 1),
    )
    def device_reports(self, data, labelled, accuracy, crashes):
        name = data.draw(st.sampled_from(sorted(self.devices)))
        correct = round(labelled * accuracy)
        self.change(
            name, labelled=labelled, correct=correct, labelled_before=100, correct_before=90, reports=5, seconds=1500.0,
            values={"crashes": (Sums(5, crashes, crashes), Sums())},
        )  # fmt: skip
        if self.state.shadowing:
            lost = labelled - correct
            pairs = (Sums(labelled, -lost, lost), Sums())
            self.change(name, values={"accuracy": pairs, "disagreement": (share(labelled, lost), Sums())})

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), reachable=st.booleans())
    def device_vanishes_or_returns(self, data, reachable):
        self.change(data.draw(st.sampled_from(sorted(self.devices))), reachable=reachable)

    @rule(number=st.integers(100, 999))
    def device_joins(self, number):
        self.devices.setdefault(f"d{number}", self.new(f"d{number}", number))
        self.step(0.0)  # it is registered before it can be told anything

    @rule(seconds=st.floats(0.0, 120.0))
    def step(self, seconds):
        self.now += seconds
        before = self.state
        failed = failure(self.plan, self.metrics, shadowing=before.shadowing)
        waited = awaits_approval(before, self.plan)
        self.state = advance(before, self.plan, self.metrics, self.now)
        if before.status == "running" and failed:
            assert self.state.status == "rolling_back", "never forward past a failed gate"
        went_on = (self.state.stage, not self.state.shadowing) > (before.stage, not before.shadowing)
        assert self.state.stage in (before.stage, before.stage + 1)
        if went_on or self.state.status == "completed" != before.status:
            assert before.status == "running"
            assert not before.paused, "a pause holds"
            assert not waited, "an approval that is needed is waited for"
            assert opens_at(self.plan, self.now) == self.now, "outside its hours nothing goes on"
        closed = opens_at(self.plan, self.now) > self.now
        if before.status == self.state.status == "running" and (before.paused or waited or closed):
            assert all(self.devices[name].in_shadow for name in self.state.offered), "who is in shadow stays there"
            assert self.state.shadowing or not self.state.offered
            assert not self.state.everyone

    @rule(hours=st.sampled_from([1.0, 13.0]))
    def time_passes(self, hours):
        self.step(hours * 3600.0)

    @rule()
    def coordinator_restarts(self):
        self.state = msgspec.json.decode(msgspec.json.encode(self.state), type=RolloutState)

    @precondition(lambda self: self.state.status == "running")
    @rule()
    def operator_aborts(self):
        self.state = halt(self.state, "aborted", self.now)

    @precondition(lambda self: self.state.status == "running" and not self.state.paused)
    @rule()
    def operator_pauses(self):
        self.state = pause(self.state, "paused", self.now)

    @precondition(lambda self: self.state.paused)
    @rule()
    def operator_resumes(self):
        self.state = resume(self.state, self.now)

    @precondition(lambda self: awaits_approval(self.state, self.plan))
    @rule()
    def operator_approves(self):
        self.state = approve(self.state, "approved", self.now)

    @invariant()
    def never_more_devices_than_the_stage_allows(self):
        if self.state.status != "running" or self.state.everyone:
            return
        at_work = {d.device for d in self.pool if (d.in_shadow if self.state.shadowing else d.on_candidate)}
        at_work |= {name for name in self.devices if self.told(name)}
        assert len(at_work) <= allowed(self.plan, self.state, len(self.pool))

    @invariant()
    def never_more_downloads_than_the_limit(self):
        if self.plan.max_parallel:
            doing = [d for d in self.metrics if self.told(d.device) and not d.has_failed]
            done = [d for d in doing if (d.in_shadow if self.state.shadowing else d.on_candidate)]
            assert len(doing) - len(done) <= self.plan.max_parallel

    @invariant()
    def nobody_is_told_whom_it_is_not_for(self):
        if self.state.status == "running":
            allowed_names = {d.device for d in self.pool}
            assert all(name in allowed_names for name in self.state.offered)
            assert not (self.state.everyone and (self.plan.where or self.plan.held_out or self.plan.max_parallel))

    @invariant()
    def what_was_halted_never_completes_and_tells_nobody(self):
        self.halted = self.halted or self.state.status == "rolling_back"
        assert not (self.halted and self.state.status in ("running", "completed"))
        if self.halted:
            assert not self.state.offered
            assert not self.state.everyone

    @invariant()
    def it_says_what_it_waits_for(self):
        assert bool(self.state.waits) == self.state.is_active

    def teardown(self):
        if not hasattr(self, "plan"):
            return
        if self.state.paused:
            self.state = resume(self.state, self.now)
        for _ in range(6 + 4 * len(self.plan.stages)):
            if awaits_approval(self.state, self.plan):
                self.state = approve(self.state, "approved", self.now)
            self.step(0.0)
            self.step(self.plan.timeout_s)
            if self.plan.hours:
                self.step(opens_at(self.plan, self.now) - self.now)
        assert not self.state.is_active, "it always ends"


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
