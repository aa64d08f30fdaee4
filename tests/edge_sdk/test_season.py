"""Seasons: learned where they are, the shape only, and taken out; nothing is taken out where there is none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.drift.edetector import EDetector
from edge_sdk.drift.season import Season

DAY = 86_400.0
BEGIN = 19_700 * DAY


def times_of(days, *, a_day=240, begin=BEGIN):
    return begin + np.arange(round(days * a_day)) / a_day * DAY


def rows_of(rng, times, *, hours=0.0, weekend=0.0, channels=3, noise=0.1, level=0.5):
    """Channels of one season: a wave over the day, and weekends apart."""
    wave = hours * np.sin(times / DAY * 2 * np.pi) + weekend * ((times // DAY) % 7 < 2)
    return level + wave[:, None] + rng.uniform(-noise, noise, (len(times), channels))


def fed(block, times, size=32):
    season = Season(block.shape[1])
    for begin in range(0, len(times), size):
        season.learn(block[begin : begin + size], times[begin : begin + size])
    return season


def hourly_spread(block, times):
    """Standard deviation of the means by hour of the day."""
    hours = (times // 3_600).astype(int) % 24
    return np.std([block[hours == hour].mean() for hour in np.unique(hours)])


def test_a_daily_wave_is_taken_out_after_two_whole_days(rng):
    times = times_of(2.1)
    season = fed(rows_of(rng, times, hours=0.2), times)
    assert season.established
    later = times_of(1, begin=times[-1])
    block = rows_of(rng, later, hours=0.2)
    adjusted = season.adjust(block, later)
    assert hourly_spread(block, later) > 0.13
    assert hourly_spread(adjusted, later) < 0.03
    assert adjusted.mean() == pytest.approx(0.5, abs=0.02)
    assert (season.slack > 0).all()
    assert (season.slack < 0.05).all()


@pytest.mark.parametrize("hours", [0.0, 0.1])
def test_a_season_raises_no_alarm_once_it_is_known_and_a_shift_still_does(rng, hours):
    times = times_of(9, a_day=480)
    block = rows_of(rng, times, hours=hours)
    block[times >= BEGIN + 8 * DAY, 1] += 0.05
    known = rows_of(rng, times, hours=hours)
    slack = 2 * known.std(0) / 1_000**0.5
    season, detector = Season(3), EDetector(known.mean(0), slack, run_length=10_000.0, stride=8)
    for begin in range(0, len(times), 32):
        rows, when = block[begin : begin + 32], times[begin : begin + 32]
        detector.refit(known.mean(0), slack + season.slack)
        detector.update(season.adjust(rows, when))
        season.learn(rows, when)
        if when[0] < BEGIN + 2.1 * DAY:
            detector.reset()
        assert not detector.drift_detected or when[-1] >= BEGIN + 8 * DAY
    assert detector.drift_detected
    assert detector.suspects(1)[0][0] == 1


@pytest.mark.parametrize("days", [0.5, 1.0, 1.9])
def test_less_than_two_whole_days_establish_nothing(rng, days):
    times = times_of(days)
    block = rows_of(rng, times, hours=0.2)
    season = fed(block, times)
    assert not season.established
    np.testing.assert_array_equal(season.adjust(block, times), block)
    np.testing.assert_array_equal(season.slack, np.zeros(3))


@pytest.mark.parametrize("seed", range(5))
def test_no_season_is_found_where_there_is_none(seed):
    rng = np.random.default_rng(seed)
    times = times_of(30)
    assert not fed(rows_of(rng, times, channels=64), times).established


def test_only_channels_with_a_season_are_adjusted(rng):
    times = times_of(5)
    block = rows_of(rng, times, hours=0.2)
    block[:, 1] = rng.uniform(0.4, 0.6, len(times))
    season = fed(block, times)
    np.testing.assert_array_equal(season.adjust(block, times)[:, 1], block[:, 1])
    assert season.slack[1] == 0
    assert season.slack[0] > 0


@pytest.mark.parametrize(("weeks", "found"), [(1.9, False), (4.1, True)])
def test_weekends_are_taken_out_after_weeks(rng, weeks, found):
    times = times_of(7 * weeks, a_day=100)
    season = fed(rows_of(rng, times, weekend=0.2), times)
    assert season.established == found
    later = times_of(7, a_day=100, begin=times[-1])
    adjusted = season.adjust(rows_of(rng, later, weekend=0.2), later)
    weekend = (later // DAY) % 7 < 2
    gap = adjusted[weekend].mean() - adjusted[~weekend].mean()
    assert abs(gap - (0.0 if found else 0.2)) < 0.03


def test_the_level_is_never_learned(rng):
    """A level that rises from day to day stays in the adjusted rows in full."""
    times = times_of(10)
    drift = 0.02 * (times - times[0]) / DAY
    season = fed(rows_of(rng, times, hours=0.1, level=0.3) + drift[:, None], times)
    assert season.established
    later = times_of(1, begin=times[-1])
    for level in (0.3, 0.7):
        assert season.adjust(rows_of(rng, later, hours=0.1, level=level), later).mean() == pytest.approx(
            level, abs=0.02
        )


def test_a_jump_after_the_season_is_known_stays_in_full(rng):
    times = times_of(6)
    block = rows_of(rng, times, hours=0.1, level=0.4)
    block[times >= BEGIN + 4.5 * DAY] += 0.3
    season = fed(block, times)
    assert hourly_spread(season.adjust(block, times)[times < BEGIN + 4 * DAY], times[times < BEGIN + 4 * DAY]) < 0.04
    after = times >= BEGIN + 5 * DAY
    assert season.adjust(block, times)[after].mean() == pytest.approx(0.7, abs=0.02)


def test_days_with_few_hours_do_not_count(rng):
    times = times_of(20)
    times = times[(times < BEGIN + DAY) | ((times // 3_600) % 24 < 6)]
    assert not fed(rows_of(rng, times, hours=0.2), times).established


def test_a_device_that_works_ten_hours_a_day_has_a_season_too(rng):
    times = times_of(4.1)
    times = times[((times // 3_600) % 24 >= 7) & ((times // 3_600) % 24 < 17)]
    block = rows_of(rng, times, hours=0.2)
    season = fed(block, times)
    assert season.established
    assert hourly_spread(season.adjust(block, times), times) < 0.03


@pytest.mark.parametrize("jump", [-400 * DAY, 400 * DAY, -3_600.0, 3 * DAY + 5_000])
def test_a_clock_that_is_set_breaks_nothing(rng, jump):
    first = times_of(3.3)
    times = np.concatenate([first, times_of(3.3, begin=first[-1] + jump)])
    block = rows_of(rng, times, hours=0.2)
    season = fed(block, times)
    assert season.established
    assert hourly_spread(season.adjust(block, times)[-240:], times[-240:]) < 0.04


@given(st.lists(st.integers(0, 400), max_size=10))
def test_one_block_or_many_give_the_same_effects_and_memory_does_not_grow(sizes):
    rng = np.random.default_rng(0)
    times = times_of(sum(sizes) / 100, a_day=100)
    block = rows_of(rng, times, hours=0.2)
    whole, parts = fed(block, times, size=max(1, len(times))), Season(3)
    shapes = {key: (array.shape, array.dtype) for key, array in parts.state().items()}
    for rows, when in zip(np.split(block, np.cumsum(sizes)), np.split(times, np.cumsum(sizes)), strict=True):
        parts.learn(rows, when)
    # effects of hours are taken out before days are learned, so these differ by what a block then knew
    for key in (key for key in whole.state() if key.startswith("hours")):
        np.testing.assert_allclose(parts.state()[key], whole.state()[key], rtol=1e-3, atol=1e-5)
    assert {key: (array.shape, array.dtype) for key, array in parts.state().items()} == shapes


@given(st.floats(0, 1), st.floats(0, 2e9))
def test_adjusted_rows_lie_between_0_and_1(value, time):
    times = times_of(4)
    season = fed(rows_of(np.random.default_rng(0), times, hours=0.3), times)
    adjusted = season.adjust(np.full((1, 3), value), np.array([time]))
    assert ((adjusted >= 0) & (adjusted <= 1)).all()


def test_a_restored_season_goes_on_exactly(rng):
    times = times_of(9)
    block = rows_of(rng, times, hours=0.2)
    goes_on, restored = fed(block[:1_000], times[:1_000]), Season(3)
    state = goes_on.state()
    before = {key: array.copy() for key, array in state.items()}
    restored.restore(state)
    for season in (goes_on, restored):
        season.learn(block[1_000:], times[1_000:])
    np.testing.assert_array_equal(goes_on.adjust(block, times), restored.adjust(block, times))
    np.testing.assert_array_equal(goes_on.slack, restored.slack)
    for key, array in state.items():
        np.testing.assert_array_equal(before[key], array)


def test_the_state_of_another_season_is_refused():
    with pytest.raises(ValueError, match="channels than 3"):
        Season(3).restore(Season(4).state())


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Season(0)


@pytest.mark.parametrize(
    ("block", "times"),
    [(np.zeros((2, 4)), np.zeros(2)), (np.zeros((2, 3)), np.zeros(3)), (np.zeros((2, 3)), np.array([0, np.nan]))],
)
def test_rows_without_their_times_are_refused(block, times):
    for use in (Season(3).learn, Season(3).adjust):
        with pytest.raises(ValueError, match="times"):
            use(block, times)
