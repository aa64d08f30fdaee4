"""The thinner: independent rows are all kept and correlated ones thinned; a jump of the mean is neither."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.drift.edetector import EDetector
from edge_sdk.drift.thin import Thinner


def thinner(rows, **options):
    made = Thinner(rows.shape[1], **options)
    made.learn(rows)
    return made


def wandering(rng, count, channels, memory):
    """Each value keeps so much of the one before; uniform ranks."""
    noise = rng.normal(size=(count, channels))
    values = noise.copy()
    for i in range(1, count):
        values[i] = memory * values[i - 1] + np.sqrt(1 - memory**2) * noise[i]
    return np.clip(0.5 + values / 6, 0, 1)


@pytest.mark.parametrize("rows", [256, 600, 1_000, 8_000])
@pytest.mark.parametrize("channels", [1, 12, 64])
def test_independent_rows_are_all_kept(rng, channels, rows):
    assert thinner(rng.random((rows, channels))).step == 1


@pytest.mark.parametrize("most", [1, 2, 4, 32])
def test_one_row_in_four_is_kept_until_enough_is_known(rng, most):
    made = Thinner(2, most=most)
    assert made.step == min(4, most)
    made.learn(rng.random((8 * most - 1, 2)))
    assert made.step == min(4, most)


def test_independent_rows_are_all_kept_however_rare_what_they_tell(rng):
    rare = rng.random((2_000, 64)) < np.geomspace(1e-3, 0.3, 64)
    assert thinner(rare.astype(float)).step == 1


@pytest.mark.parametrize(("memory", "steps"), [(0.3, {2}), (0.5, {4}), (0.8, {16}), (0.99, {32})])
def test_rows_are_thinned_until_their_autocorrelation_is_below_a_tenth(rng, memory, steps):
    assert thinner(wandering(rng, 6_000, 12, memory)).step in steps


def test_false_alarms_of_a_thinned_stream_keep_the_budget():
    """From the first row on, with a reference of rows that are as correlated."""
    run_length, runs, alarms = 2_000, 12, {"thinned": 0, "whole": 0}
    for seed in range(runs):
        rows = wandering(np.random.default_rng([19, seed]), 1_000 + run_length, 12, 0.5)
        known, rows = rows[:1_000], rows[1_000:]
        for name in alarms:
            detector = EDetector(known.mean(0), 2 * known.std(0) / 1_000**0.5, run_length=run_length, stride=8)
            made = Thinner(12)
            for block in np.split(rows, range(32, run_length, 32)):
                made.learn(block)
                detector.update(block[made.keep(len(block))] if name == "thinned" else block)
                alarms[name] += detector.drift_detected
                if detector.drift_detected:
                    detector.reset()
    assert alarms["thinned"] <= 1.0 * runs < 3.0 * runs < alarms["whole"]


def test_one_correlated_channel_among_many_is_enough(rng):
    rows = rng.random((3_000, 12))
    rows[:, 5] = wandering(rng, 3_000, 1, 0.8)[:, 0]
    assert thinner(rows).step in (8, 16)


@pytest.mark.parametrize("where", range(600, 800, 20))
def test_a_jump_of_the_mean_leaves_the_step_at_one(rng, where):
    rows = rng.uniform(0.1, 0.4, (1_200, 12))
    rows[where:] += 0.5
    made = thinner(rows[:600])
    for block in np.split(rows[600:], range(32, 600, 32)):
        made.learn(block)
        assert made.step == 1


def test_a_constant_channel_asks_for_nothing(rng):
    rows = np.concatenate([np.full((1_000, 2), 0.3), rng.random((1_000, 2))], axis=1)
    assert thinner(rows).step == 1
    assert thinner(rows[:, :2]).step == 1


def test_the_step_is_no_larger_than_the_most(rng):
    rows = wandering(rng, 3_000, 2, 0.99)
    assert thinner(rows, most=4).step == 4
    assert thinner(rows, most=1).step == 1


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(0, 40))
def test_kept_rows_are_a_step_apart_over_any_blocks(sizes, ahead):
    made = thinner(np.repeat(np.random.default_rng(0).random(500), 4)[:, None])
    made.keep(ahead)
    kept, begin = [], 0
    for size in sizes:
        kept += (begin + np.arange(size)[made.keep(size)]).tolist()
        begin += size
    assert set(np.diff(kept).tolist()) <= {4}
    assert abs(len(kept) - begin / 4) <= 1


@given(st.lists(st.integers(0, 300), max_size=12))
def test_one_block_or_many_give_the_same_estimate_and_memory_does_not_grow(sizes):
    rows = np.random.default_rng(1).random((sum(sizes), 3))
    whole, parts = thinner(rows), Thinner(3)
    shapes = {key: (array.shape, array.dtype) for key, array in parts.state().items()}
    for block in np.split(rows, np.cumsum(sizes)):
        parts.learn(block)
    for key, array in whole.state().items():
        np.testing.assert_allclose(parts.state()[key], array, rtol=1e-4)
        assert shapes[key] == (array.shape, array.dtype)


def test_a_restored_thinner_goes_on_exactly(rng):
    rows = wandering(rng, 3_000, 4, 0.5)
    goes_on, restored = Thinner(4), Thinner(4)
    goes_on.learn(rows[:1_500])
    goes_on.keep(1_499)
    state = goes_on.state()
    before = {key: array.copy() for key, array in state.items()}
    restored.restore(state)
    for each in (goes_on, restored):
        each.learn(rows[1_500:])
    assert goes_on.keep(100) == restored.keep(100)
    for key, array in goes_on.state().items():
        np.testing.assert_array_equal(restored.state()[key], array)
        np.testing.assert_array_equal(before[key], state[key])


def test_the_state_of_another_thinner_is_refused():
    with pytest.raises(ValueError, match="state of 4 channels"):
        Thinner(3).restore(Thinner(4).state())


@pytest.mark.parametrize(("channels", "most"), [(0, 32), (1, 0), (1, 12)])
def test_impossible_settings_are_refused(channels, most):
    with pytest.raises(ValueError, match="power of two"):
        Thinner(channels, most=most)


@pytest.mark.parametrize("block", [np.zeros(3), np.zeros((2, 4))])
def test_rows_of_another_shape_are_refused(block):
    with pytest.raises(ValueError, match="rows of 3 channels"):
        Thinner(3).learn(block)
