"""When the device learns: every reason, every obstacle, and what is said about it."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_sdk.config import DeviceConfig, PolicyConfig, ResourceConfig
from edge_sdk.errors import ConfigError
from edge_sdk.policy import DAY_S, LEARNER_MB, ResourceState, Signals, Spent, check_policy, decide, obstacle, spend

CONFIG = PolicyConfig(
    min_fresh_rows=50,
    volume_rows=500,
    accuracy_target=0.8,
    calibration_target=0.1,
    schedule_s=1_000.0,
    cooldown_s=100.0,
    triggers=(*PolicyConfig().triggers, ("new_label",)),
)
CALM = Signals(alarms=(), fresh_rows=50, accuracy=0.9, calibration=0.05, since_last_s=500.0, demand="")
ALARMED = replace(CALM, alarms=("output",))
LIMITS = ResourceConfig(max_cpu_load=0.9)
NOON = 20_000 * DAY_S + DAY_S / 2


def against(state=ResourceState(), spent=Spent(), limits=LIMITS, now=NOON, **flags):  # noqa: B008 - frozen
    return obstacle(state, spent, now, limits, **flags)


# ---- what calls for it


@pytest.mark.parametrize(
    ("change", "reason", "triggers"),
    [
        ({"alarms": ("input",)}, "input drift", ("drift",)),
        ({"alarms": ("input", "accuracy")}, "input drift; accuracy drift", ("drift",)),
        ({"accuracy": 0.79}, "accuracy 0.790 below 0.8", ("accuracy",)),
        ({"calibration": 0.101}, "calibration error 0.101 above 0.1", ("calibration",)),
        ({"fresh_rows": 500}, "500 new labelled rows", ("volume",)),
        ({"new_labels": 1}, "1 new label", ("new_label",)),
        ({"new_labels": 3}, "3 new labels", ("new_label",)),
        ({"since_last_s": 1_000.0}, "schedule", ("schedule",)),
        ({"since_last_s": None}, "schedule", ("schedule",)),
        ({"demand": "on demand"}, "on demand", ("demand",)),
        (
            {"alarms": ("output",), "accuracy": 0.5, "demand": "on demand"},
            "output drift; accuracy 0.500 below 0.8; on demand",
            ("drift", "accuracy", "demand"),
        ),
    ],
)
def test_each_reason_alone_is_enough_and_is_told(change, reason, triggers):
    decision = decide(replace(CALM, **change), "", CONFIG)
    assert decision.learn
    assert decision.wanted
    assert decision.reason == reason
    assert decision.triggers == triggers


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"accuracy": 0.8},
        {"accuracy": None},
        {"calibration": 0.1},
        {"calibration": None},
        {"fresh_rows": 499},
        {"since_last_s": 999.0},
        {"fresh_rows": 0},
    ],
)
def test_without_a_reason_nothing_is_wanted(change):
    decision = decide(replace(CALM, **change), "", CONFIG)
    assert not decision.learn
    assert not decision.wanted
    assert decision.reason == "nothing calls for it"
    assert decision.triggers == ()


@pytest.mark.parametrize("alarms", [(), ("output",)])
@pytest.mark.parametrize("accuracy", [None, 0.0])
@pytest.mark.parametrize("calibration", [None, 1.0])
def test_targets_and_schedules_that_are_not_set_are_no_reason(alarms, accuracy, calibration):
    signals = replace(CALM, alarms=alarms, accuracy=accuracy, calibration=calibration, since_last_s=None)
    assert decide(signals, "", PolicyConfig(min_fresh_rows=50)).wanted == bool(alarms)


def test_a_schedule_without_anything_new_waits_silently():
    assert not decide(replace(CALM, fresh_rows=0, since_last_s=None), "", CONFIG).wanted


def test_a_schedule_is_not_due_the_moment_learning_ended():
    config = PolicyConfig(min_fresh_rows=50, schedule_s=1_000.0, cooldown_s=0.0)
    assert not decide(replace(CALM, since_last_s=0.0), "", config).wanted


def test_a_new_label_alone_is_no_reason_by_default():
    assert not decide(replace(CALM, new_labels=1), "", PolicyConfig()).wanted


def test_triggers_of_one_list_must_all_call_and_any_list_is_enough():
    config = msgspec.structs.replace(CONFIG, triggers=(("drift", "volume"), ("drift", "accuracy"), ("schedule",)))
    assert not decide(ALARMED, "", config).wanted
    assert not decide(replace(CALM, fresh_rows=500, accuracy=0.5), "", config).wanted
    both = decide(replace(ALARMED, fresh_rows=500), "", config)
    assert both.learn
    assert both.reason == "output drift; 500 new labelled rows"
    assert both.triggers == ("drift", "volume")
    assert decide(replace(CALM, since_last_s=None), "", config).triggers == ("schedule",)


def test_a_trigger_that_is_not_listed_is_no_reason_and_a_demand_needs_none():
    config = msgspec.structs.replace(CONFIG, triggers=())
    loud = replace(ALARMED, fresh_rows=500, accuracy=0.0, calibration=1.0, since_last_s=None)
    assert not decide(loud, "", config).wanted
    assert decide(replace(loud, demand="on demand"), "", config).reason == "on demand"


@pytest.mark.parametrize("demand", ["", "on demand"])
def test_too_few_new_rows_are_never_learned_from(demand):
    decision = decide(replace(ALARMED, fresh_rows=49, demand=demand), "", CONFIG)
    assert not decision.learn
    assert decision.wanted
    assert decision.reason.endswith("waits for 50 new labelled rows, has 49")
    assert decision.reason.startswith("output drift")


def test_the_cool_down_is_kept_unless_somebody_asks():
    early = decide(replace(ALARMED, since_last_s=99.9), "", CONFIG)
    assert early.reason == "output drift: waits for cool-down of 100 s"
    assert not early.learn
    assert decide(replace(ALARMED, since_last_s=100.0), "", CONFIG).learn
    assert decide(replace(ALARMED, since_last_s=None), "", CONFIG).learn
    assert decide(replace(ALARMED, since_last_s=0.0, demand="on demand"), "", CONFIG).learn


@pytest.mark.parametrize("demand", ["", "on demand"])
def test_an_obstacle_makes_learning_wait_even_on_demand_and_is_told(demand):
    decision = decide(replace(ALARMED, demand=demand), "85 °C, learning stops at 80", CONFIG)
    assert not decision.learn
    assert decision.wanted
    assert decision.reason.endswith(": waits for 85 °C, learning stops at 80")
    assert "drift" in decision.triggers


# ---- what stands against it


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"battery": 0.29, "on_mains": False}, "battery at 29%, learning needs 30%"),
        ({"temperature_c": 85.1}, "85 °C, learning stops at 85"),
        ({"free_mb": 63.9}, "64 MB free, learning needs 64"),
        ({"cpu_load": 0.91}, "load of 0.91, learning stops at 0.90"),
    ],
)
def test_each_obstacle_is_told_with_value_and_limit(state, said):
    assert against(ResourceState(**state)) == said


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"battery": 0.05, "on_mains": True},
        {"battery": 0.05},
        {"battery": 0.3, "on_mains": False},
        {"on_mains": False},
        {"temperature_c": 85.0, "free_mb": 64.0, "cpu_load": 0.9},
    ],
    ids=str,
)
def test_what_is_unknown_or_sufficient_forbids_nothing(state):
    assert against(ResourceState(**state)) == ""


def test_mains_can_be_required():
    limits = ResourceConfig(require_mains=True)
    assert against(ResourceState(battery=1.0, on_mains=False), limits=limits) == "on battery, learning needs mains"
    assert against(ResourceState(on_mains=True), limits=limits) == ""
    assert against(limits=limits) == ""


@pytest.mark.parametrize(
    ("name", "stops", "stays", "goes_on"),
    [
        ("battery", 0.29, 0.34, 0.36),
        ("temperature_c", 85.5, 82.5, 82.0),
        ("free_mb", 63.0, 70.0, 71.0),
        ("cpu_load", 0.95, 0.85, 0.79),
    ],
)
def test_learning_that_waits_goes_on_only_with_a_margin(name, stops, stays, goes_on):
    state = ResourceState(on_mains=False)
    assert against(replace(state, **{name: stops}))
    assert against(replace(state, **{name: stays})) == ""
    assert against(replace(state, **{name: stays}), waiting=True)
    assert against(replace(state, **{name: goes_on}), waiting=True) == ""


def test_margins_never_ask_for_what_cannot_be():
    full = ResourceState(battery=1.0, on_mains=False, cpu_load=0.01)
    assert against(full, limits=ResourceConfig(min_battery=1.0, max_cpu_load=0.05), waiting=True) == ""


def test_the_learner_itself_is_no_reason_to_stop_learning():
    busy = ResourceState(cpu_load=1.3, cores=2, free_mb=64 - LEARNER_MB)
    assert against(busy)
    assert against(busy, learning=True) == ""
    assert against(replace(busy, cpu_load=1.41), learning=True) == "load of 0.91, learning stops at 0.90"
    assert against(replace(busy, free_mb=20), learning=True) == "20 MB free, learning needs 24"
    paused = replace(busy, free_mb=50)
    assert "load of 1.30" in against(paused, learning=True, waiting=True)  # it does not work, the load is others'
    assert against(replace(paused, cpu_load=0.5), learning=True, waiting=True) == ""


@pytest.mark.parametrize(
    ("hours", "quiet", "open_"),
    [
        ("22:00-06:30", (22 * 60, 23 * 60 + 59, 0, 6 * 60 + 29), (6 * 60 + 30, 21 * 60 + 59)),
        ("08:00-17:00", (8 * 60, 16 * 60 + 59), (7 * 60 + 59, 17 * 60, 0)),
    ],
)
def test_nothing_is_learned_in_quiet_hours(hours, quiet, open_):
    limits = ResourceConfig(quiet_hours=("12:00-12:01", hours))
    for minute in quiet:
        said = f"quiet hours {hours}, it is {minute // 60:02}:{minute % 60:02}"
        assert against(ResourceState(local_minute=minute), limits=limits) == said
    for minute in open_:
        assert against(ResourceState(local_minute=minute), limits=limits) == ""
    assert against(ResourceState(), limits=limits) == ""


@pytest.mark.parametrize("text", ["", "22-6", "22:00", "9:00-10:00", "24:00-01:00", "01:60-02:00", "03:00-03:00", "x"])
def test_quiet_hours_of_another_form_are_refused_by_name(text):
    limits = ResourceConfig(quiet_hours=("01:00-02:00", text))
    with pytest.raises(ConfigError, match=rf'resources.quiet_hours: {text!r} is not of the form "HH:MM-HH:MM"'):
        check_policy(DeviceConfig(resources=limits))
    with pytest.raises(ConfigError):
        against(limits=limits)


def test_an_empty_list_of_triggers_is_refused_and_the_defaults_are_not():
    check_policy(DeviceConfig(resources=ResourceConfig(quiet_hours=("22:00-06:30",))))
    with pytest.raises(ConfigError, match=r"policy\.triggers: one of its lists is empty"):
        check_policy(DeviceConfig(policy=PolicyConfig(triggers=(("drift",), ()))))


# ---- what a day allows


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"seconds_per_day": 10.0}, "10 of 10 s of learning today"),
        ({"joules_per_day": 20.0}, "20 of 20 J of learning today"),
        ({"flash_bytes_per_day": 300}, "300 of 300 bytes written today"),
    ],
)
def test_a_used_up_budget_is_an_obstacle_until_the_next_day(limits, said):
    limits = ResourceConfig(**limits)
    spent = spend(Spent(), NOON, watts=2.0, seconds=9.9, flash_bytes=299)
    assert against(spent=spent, limits=limits) == ""
    spent = spend(spent, NOON + 1, watts=2.0, seconds=0.1, flash_bytes=1)
    assert against(spent=spent, limits=limits) == said
    assert against(spent=spent, limits=LIMITS) == ""
    assert against(spent=spent, limits=limits, now=NOON + DAY_S / 2) == ""
    assert spend(spent, NOON + DAY_S, watts=1.0).seconds == 0


def test_a_clock_that_was_set_back_gives_no_second_budget():
    spent = spend(Spent(), NOON, watts=1.0, seconds=5.0)
    for now in (0.0, NOON, NOON - DAY_S, NOON, 0.0, NOON + 1):  # a board that wakes up in 1970, twice
        spent = spend(spent, now, watts=1.0)
        assert spent.seconds == 5.0
    assert spend(spent, NOON + DAY_S, watts=1.0).seconds == 0.0


def test_a_clock_that_was_years_ahead_does_not_block_learning_for_years():
    spent = spend(Spent(), NOON + 9_000 * DAY_S, watts=1.0, seconds=5.0)
    spent = spend(spent, NOON, watts=1.0)
    assert spent.seconds == 5.0
    assert spend(spent, NOON + DAY_S, watts=1.0).seconds == 0.0


@given(st.lists(st.tuples(st.floats(0, 40 * DAY_S), st.floats(0, 100)), max_size=30))
def test_a_day_never_counts_more_than_was_spent_nor_less_than_the_last_job(jobs):
    spent, total = Spent(), 0.0
    for now, seconds in jobs:
        spent, total = spend(spent, now, watts=3.0, seconds=seconds), total + seconds
        assert spent.day == int(now // DAY_S) <= spent.latest
        assert seconds <= spent.seconds <= total + 1e-6
        assert spent.joules == pytest.approx(3 * spent.seconds)


# ---- all of it over time

JOB_S = 30.0
POLICY = PolicyConfig(min_fresh_rows=20, volume_rows=60, cooldown_s=500.0, triggers=(("drift",), ("volume",)))
TIGHT = ResourceConfig(
    seconds_per_day=50.0, joules_per_day=140.0, flash_bytes_per_day=2_000, quiet_hours=("23:00-01:00",)
)


class Life(RuleBasedStateMachine):
    """A device whose days pass, in steps: what it decides, and what its learning takes."""

    def __init__(self):
        super().__init__()
        self.now, self.ended, self.rows, self.demand = NOON, None, 0, ""
        self.alarms, self.battery, self.warm = (), 1.0, 40.0
        self.spent, self.said, self.by_day = Spent(), "", {}
        self.decision = None

    @rule(alarms=st.sampled_from([(), ("input",), ("input", "output")]))
    def alarms_change(self, alarms):
        self.alarms = alarms

    @rule(battery=st.sampled_from([0.2, 0.32, 0.9]), warm=st.sampled_from([40.0, 84.0, 90.0]))
    def the_machine_changes(self, battery, warm):
        self.battery, self.warm = battery, warm

    @rule()
    def somebody_asks(self):
        self.demand = "on demand"

    @rule(
        seconds=st.sampled_from([1.0, 500.0, 5_000.0]),
        rows=st.integers(0, 60),
        cpu_s=st.floats(JOB_S / 2, JOB_S),
        written=st.integers(0, 1_000),
    )
    def time_passes(self, seconds, rows, cpu_s, written):
        self.now, self.rows = self.now + seconds, self.rows + rows
        state = ResourceState(
            battery=self.battery, on_mains=False, temperature_c=self.warm, local_minute=int(self.now % DAY_S // 60)
        )
        self.said = obstacle(state, self.spent, self.now, TIGHT, waiting=bool(self.said))
        since = None if self.ended is None else self.now - self.ended
        signals = Signals(self.alarms, self.rows, None, None, since, self.demand)
        self.decision = decision = decide(signals, self.said, POLICY)
        if not decision.learn:
            return
        assert decision.triggers
        assert self.rows >= POLICY.min_fresh_rows
        assert self.demand or since is None or since >= POLICY.cooldown_s
        assert self.battery >= TIGHT.min_battery
        assert self.warm <= TIGHT.max_temperature_c
        assert 60 <= state.local_minute < 23 * 60
        self.spent = spend(self.spent, self.now, watts=TIGHT.watts, seconds=cpu_s, flash_bytes=written)
        day = self.by_day.setdefault(int(self.now // DAY_S), [0.0, 0])
        day[0] += cpu_s
        day[1] += written
        self.ended, self.rows, self.demand = self.now, 0, ""

    @invariant()
    def a_decision_says_why(self):
        decision = self.decision
        if decision is None:
            return
        assert decision.wanted == bool(decision.triggers)
        if decision.wanted and not decision.learn:
            assert ": waits for " in decision.reason
            assert not decision.reason.endswith(": waits for ")
        assert not (decision.learn and self.said)

    @invariant()
    def budgets_are_exceeded_by_one_job_at_most(self):
        for seconds, written in self.by_day.values():
            assert seconds < TIGHT.seconds_per_day + JOB_S
            assert seconds * TIGHT.watts < TIGHT.joules_per_day + JOB_S * TIGHT.watts
            assert written < TIGHT.flash_bytes_per_day + 1_000


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
