"""When the device learns: every reason, every obstacle, and what is said about it."""

from dataclasses import replace

import pytest

from edge_sdk.config import PolicyConfig
from edge_sdk.policy import ResourceState, Signals, decide
from edge_sdk.resources import FixedReader, PsutilReader

CONFIG = PolicyConfig(min_fresh_rows=50, volume_rows=500, accuracy_target=0.8, schedule_s=1_000.0, cooldown_s=100.0)
CALM = Signals(alarms=(), fresh_rows=50, accuracy=0.9, since_last_s=500.0, demand="")
ALARMED = replace(CALM, alarms=("output",))
PLENTY = ResourceState()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"alarms": ("input",)}, "input drift"),
        ({"alarms": ("input", "accuracy")}, "input drift; accuracy drift"),
        ({"accuracy": 0.79}, "accuracy 0.790 below 0.8"),
        ({"fresh_rows": 500}, "500 new labelled rows"),
        ({"since_last_s": 1_000.0}, "schedule"),
        ({"since_last_s": None}, "schedule"),
        ({"demand": "on demand"}, "on demand"),
        (
            {"alarms": ("output",), "accuracy": 0.5, "demand": "on demand"},
            "output drift; accuracy 0.500 below 0.8; on demand",
        ),
    ],
)
def test_each_reason_alone_is_enough_and_is_told(change, reason):
    decision = decide(replace(CALM, **change), PLENTY, CONFIG)
    assert decision.learn
    assert decision.wanted
    assert decision.reason == reason


@pytest.mark.parametrize(
    "change",
    [{}, {"accuracy": 0.8}, {"accuracy": None}, {"fresh_rows": 499}, {"since_last_s": 999.0}, {"fresh_rows": 0}],
)
def test_without_a_reason_nothing_is_wanted(change):
    decision = decide(replace(CALM, **change), PLENTY, CONFIG)
    assert not decision.learn
    assert not decision.wanted
    assert decision.reason == "nothing calls for it"


@pytest.mark.parametrize("alarms", [(), ("output",)])
@pytest.mark.parametrize("accuracy", [None, 0.0])
def test_targets_and_schedules_that_are_not_set_are_no_reason(alarms, accuracy):
    signals = replace(CALM, alarms=alarms, accuracy=accuracy, since_last_s=None)
    assert decide(signals, PLENTY, PolicyConfig(min_fresh_rows=50)).wanted == bool(alarms)


def test_a_schedule_without_anything_new_waits_silently():
    assert not decide(replace(CALM, fresh_rows=0, since_last_s=None), PLENTY, CONFIG).wanted


def test_a_schedule_is_not_due_the_moment_learning_ended():
    config = PolicyConfig(min_fresh_rows=50, schedule_s=1_000.0, cooldown_s=0.0)
    assert not decide(replace(CALM, since_last_s=0.0), PLENTY, config).wanted


@pytest.mark.parametrize("demand", ["", "on demand"])
def test_too_few_new_rows_are_never_learned_from(demand):
    decision = decide(replace(ALARMED, fresh_rows=49, demand=demand), PLENTY, CONFIG)
    assert not decision.learn
    assert decision.wanted
    assert decision.reason.endswith("waits for 49 of 50 new labelled rows")
    assert decision.reason.startswith("output drift")


def test_the_cool_down_is_kept_unless_somebody_asks():
    assert (
        decide(replace(ALARMED, since_last_s=99.9), PLENTY, CONFIG).reason
        == "output drift: waits for cool-down of 100 s"
    )
    assert not decide(replace(ALARMED, since_last_s=99.9), PLENTY, CONFIG).learn
    assert decide(replace(ALARMED, since_last_s=100.0), PLENTY, CONFIG).learn
    assert decide(replace(ALARMED, since_last_s=None), PLENTY, CONFIG).learn
    assert decide(replace(ALARMED, since_last_s=0.0, demand="on demand"), PLENTY, CONFIG).learn


@pytest.mark.parametrize(
    ("resources", "obstacle"),
    [
        (ResourceState(battery=0.29, on_mains=False), "battery at 29%, learning needs 30%"),
        (ResourceState(temperature_c=85.1), "85 °C, learning stops at 85"),
        (ResourceState(free_mb=63.9), "64 MB free, learning needs 64"),
    ],
)
def test_each_obstacle_makes_learning_wait_even_on_demand_and_is_told(resources, obstacle):
    for demand in ("", "on demand"):
        decision = decide(replace(ALARMED, demand=demand), resources, CONFIG)
        assert not decision.learn
        assert decision.wanted
        assert decision.reason.endswith(f": waits for {obstacle}")


@pytest.mark.parametrize(
    "resources",
    [
        ResourceState(),
        ResourceState(battery=0.05, on_mains=True),
        ResourceState(battery=0.05),
        ResourceState(battery=0.3, on_mains=False),
        ResourceState(on_mains=False),
        ResourceState(temperature_c=85.0, free_mb=64.0),
    ],
    ids=str,
)
def test_what_is_unknown_or_sufficient_forbids_nothing(resources):
    assert decide(ALARMED, resources, CONFIG).learn


def test_readers_tell_resources():
    state = ResourceState(battery=0.5)
    assert FixedReader(state, rss_mb=12.0).read() is state
    assert FixedReader(state, rss_mb=12.0).rss_mb() == 12.0
    assert FixedReader().read() == ResourceState()
    real = PsutilReader()
    assert real.rss_mb() > 1
    assert real.read().free_mb > 0
