"""What a label is worth: sources, implicit feedback, and the cap on what one source may say in an hour."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.config import FeedbackConfig
from edge_sdk.errors import LabelError
from edge_sdk.feedback import MAX_SOURCES, HourlyCap, check_source, from_reward, source_weight

HOUR = 3_600.0
LATE = 66 * 60.0
"""The longest that a source at its cap waits for a place."""


def capped(labels):
    return FeedbackConfig(max_per_source_hour=labels)


def test_a_source_weighs_what_is_configured_and_others_the_default():
    config = FeedbackConfig(sources={"expert": 1.0, "click": 0.25, "bot": 0.0}, default_weight=0.5)
    weights = [source_weight(source, config) for source in ("expert", "click", "bot", "unheard of", "")]
    assert weights == [1.0, 0.25, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("source", ["", "nurse 2", "Übersetzer", "x" * 64])
def test_short_printable_text_names_a_source(source):
    assert check_source(source) == source


@pytest.mark.parametrize("source", ["x" * 65, "two\nlines", "nul\0", "\ud800", None, 3, b"bytes"])
def test_what_cannot_be_stored_and_shown_names_no_source(source):
    with pytest.raises(LabelError, match="at most 64 printable"):
        check_source(source)


@pytest.mark.parametrize(
    ("reward", "weight"), [(1, 1.0), (0.75, 0.5), (0.5, 0.0), (0.25, -0.5), (0, -1.0), (True, 1.0)]
)
def test_a_reward_confirms_or_denies_the_label_in_proportion(reward, weight):
    assert from_reward("cat", reward) == ("cat", weight)


@pytest.mark.parametrize("reward", [-0.01, 1.01, math.nan, math.inf, None, "good", [1.0]])
def test_a_reward_that_is_no_share_is_refused(reward):
    with pytest.raises(LabelError, match="a reward is a number from 0"):
        from_reward("cat", reward)


# ---- the hourly cap

steps = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 2_000_000)), max_size=120)
"""Sources, and milliseconds since the label before."""


@given(steps=steps, cap=st.integers(1, 8), start=st.integers(0, 2_000_000_000))
def test_no_source_passes_its_cap_in_any_hour(steps, cap, start):
    state, now, admitted = HourlyCap(), start, {"a": [], "b": []}
    for source, milliseconds in steps:
        now += milliseconds
        if state.admit(source, now / 1e3, capped(cap)):
            admitted[source].append(now)
    for times in admitted.values():
        assert all(late - early > HOUR * 1e3 for early, late in zip(times, times[cap:], strict=False))


@given(steps=steps, cap=st.integers(1, 8))
def test_a_source_below_its_cap_is_never_refused(steps, cap):
    state, now, seen = HourlyCap(), 0, []
    for _, milliseconds in steps:
        now += milliseconds
        refused = not state.admit("a", now / 1e3, capped(cap))
        assert refused <= (sum(now - then < LATE * 1e3 for then in seen) >= cap)
        seen += [] if refused else [now]


@given(
    before=st.lists(st.integers(0, 600), max_size=60),
    after=st.lists(st.integers(0, 600), max_size=60),
    back=st.integers(0, 100_000),
    cap=st.integers(1, 8),
)
def test_a_clock_that_is_set_back_costs_at_most_one_wait_and_gives_nothing_away(before, after, back, cap):
    """By the true time, which goes on."""
    state, true, shift, admitted = HourlyCap(), 1_000_000.0, 0, []
    for seconds in [*before, None, *after]:
        if seconds is None:
            shift = back
            continue
        true += seconds
        if state.admit("a", true - shift, capped(cap)):
            admitted.append(true)
    assert all(late - early > HOUR for early, late in zip(admitted, admitted[cap:], strict=False))
    state.admit("a", true - shift, capped(cap))
    assert state.admit("a", true - shift + LATE, capped(cap))


@given(jumps=st.lists(st.integers(-9, 9), max_size=30), cap=st.integers(1, 3))
def test_a_clock_that_trembles_opens_no_hole(jumps, cap):
    state, now, admitted = HourlyCap(), 1_000_000.0, 0
    for jump in jumps:
        now += jump
        admitted += state.admit("a", now, capped(cap))
    assert admitted == min(cap, len(jumps))


def test_without_a_cap_nothing_is_counted():
    state = HourlyCap()
    assert all(state.admit("a", 0.0, capped(0)) for _ in range(100))
    assert state == HourlyCap()


def test_labels_without_a_source_share_one_cap():
    state = HourlyCap()
    assert [state.admit("", 0.0, capped(2)) for _ in range(3)] == [True, True, False]


def test_the_state_stays_small_and_a_flood_of_names_is_refused_until_older_ones_are_forgotten():
    state = HourlyCap()
    admitted = [state.admit(f"bot-{i}", float(i % 3_000), capped(1_000_000)) for i in range(3 * MAX_SOURCES)]
    assert sum(admitted) == MAX_SOURCES == len(state.counts)
    assert state.admit("bot-1", 3_000.0, capped(2))
    assert not state.admit("honest", 3_000.0, capped(2))
    assert state.admit("honest", 3_000.0 + LATE, capped(2))
    assert len(state.counts) == 1
    for hour in range(100):
        state.admit("honest", hour * 360.0, capped(2))
    assert len(state.counts["honest"]) <= 11


def test_the_state_survives_a_restart_and_a_copy_can_be_given_up():
    state, config = HourlyCap(), capped(2)
    assert state.admit("a", 0.0, config)
    tried = state.copy()
    assert tried.admit("a", 10.0, config)
    assert not tried.admit("a", 20.0, config)
    read = msgspec.json.decode(msgspec.json.encode(tried), type=HourlyCap)
    assert read == tried
    assert not read.admit("a", 20.0, config)
    assert state.admit("a", 20.0, config)
