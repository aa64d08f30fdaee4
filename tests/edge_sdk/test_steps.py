"""The test of whole windows: the contract, its false alarms, what it sees at once, and the two detectors as one."""

import math

import numpy as np
import pytest

from edge_sdk.checks import check_detector
from edge_sdk.drift.both import Both
from edge_sdk.drift.edetector import EDetector
from edge_sdk.drift.steps import LEVELS, WINDOW, StepDetector, binned, cuts_of, levels_of
from edge_sdk.drift.watched import Watched


def make(rng=None, channels=3, *, run_length=10_000.0, rows=1000):
    """Of a reference like the calm rows of `check_detector`, uniform in 0.4 to 0.6, or in 0 to 1 with `rng`."""
    known = rng.random((rows, channels)) if rng else np.tile(np.linspace(0.4, 0.6, rows)[:, None], (1, channels))
    return StepDetector(levels_of(known), rows=rows, run_length=run_length)


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_the_test_of_windows_keeps_the_contract(channels):
    check_detector(lambda: make(channels=channels), channels=channels, rows=WINDOW)


@pytest.mark.parametrize("tested", [False, True])
def test_two_detectors_as_one_keep_the_contract(tested):
    def both():
        means = EDetector(np.full(3, 0.5), np.full(3, 0.05), run_length=2_000.0, stride=8)
        return Both(means, make() if tested else None, channels=3, spread=False)

    check_detector(both)


def test_suspects_are_those_of_the_detector_that_raised_the_alarm(rng):
    def both():
        means = EDetector(np.full(4, 0.5), np.full(4, 0.05), run_length=1e9)
        return Both(means, make(rng, 2), channels=2, spread=True)

    jump, spreads = both(), both()
    rows = rng.random((WINDOW, 2))
    rows[:, 1] **= 4
    jump.update(rows)
    assert (jump.steps.drift_detected, jump.means.drift_detected) == (True, False)
    assert jump.suspects()[0][0] == 1
    for _ in range(60):
        rows = rng.random((WINDOW, 2))
        rows[:, 0] = 0.5 + 0.75 * (rows[:, 0] - 0.5)
        spreads.update(rows)
    assert (spreads.steps.drift_detected, spreads.means.drift_detected) == (False, True)
    assert spreads.suspects()[0][0] == 2


def test_false_alarms_keep_their_budget_for_an_estimated_reference():
    run_length, runs, rows = 1_000, 40, 4_000
    found = 0
    for seed in range(runs):
        rng = np.random.default_rng([3, seed])
        detector = make(rng, 12, run_length=float(run_length))
        for _ in range(rows // WINDOW):
            detector.update(rng.random((WINDOW, 12)))
            if detector.drift_detected:
                found += 1
                detector.reset()
    assert found <= runs * rows / run_length


def test_values_that_repeat_do_not_raise_false_alarms(rng):
    known = rng.integers(0, 3, (1000, 8)) / 4
    detector = StepDetector(levels_of(known), rows=1000, run_length=10_000.0)
    detector.update(rng.integers(0, 3, (4_000, 8)) / 4)
    assert not detector.drift_detected


@pytest.mark.parametrize(
    "change",
    [lambda x: x**4, lambda x: 0.5 + 0.1 * (x - 0.5), lambda x: np.where(x < 0.5, 0.0, 1.0)],
    ids=["place", "narrower", "to the ends"],
)
def test_one_window_shows_a_large_change_of_any_kind_and_which_channel_it_is_in(rng, change):
    detector = make(rng, 6)
    detector.update(rng.random((10 * WINDOW, 6)))
    assert not detector.drift_detected
    rows = rng.random((WINDOW, 6))
    rows[:, 4] = change(rows[:, 4])
    detector.update(rows)
    assert detector.drift_detected
    channel, shift = detector.suspects()[0]
    assert channel == 4
    assert shift == pytest.approx(rows[:, 4].mean() - 0.5, abs=0.05)


def test_a_smaller_change_shows_in_two_windows_together(rng):
    one = make(rng, 4, run_length=1_000.0)
    one.update(rng.random((WINDOW, 4)))
    raised = []
    for _ in range(2):
        rows = rng.random((WINDOW, 4))
        rows[:, 1] = np.linspace(0, 1, WINDOW) ** 2.0
        one.update(rows)
        raised.append(one.drift_detected)
    assert raised == [False, True]


def test_cuts_show_what_happens_where_a_channel_crowds(rng):
    """Confidences above 0.97 as a rule: equal parts of 0 to 1 would put nearly all into the last one."""
    known = 1 - 0.01 * rng.random((1000, 2)) ** 3
    plain = StepDetector(levels_of(known), rows=1000, run_length=10_000.0)
    cuts = cuts_of(known)
    cut = StepDetector(levels_of(known, cuts), rows=1000, run_length=10_000.0, cuts=cuts)
    for detector in (plain, cut):
        detector.update(1 - 0.01 * rng.random((20 * WINDOW, 2)) ** 3)
        assert not detector.drift_detected
        detector.update(1 - 0.01 * rng.random((WINDOW, 2)))
    assert not plain.drift_detected
    assert cut.drift_detected


def test_an_ignored_channel_raises_no_alarm(rng):
    detector = make(rng, 3)
    detector.ignored = np.array([False, True, False])
    rows = rng.random((WINDOW, 3))
    rows[:, 1] = 1.0
    detector.update(rows)
    assert not detector.drift_detected
    assert detector.suspects()[0][0] != 1


def test_one_row_in_two_is_taken_and_a_window_begins_when_that_changes(rng):
    detector = make(rng, 2)
    detector.update(np.ones((20, 2)))
    detector.take(2)
    detector.update(np.ones((2 * WINDOW - 2, 2)))
    assert not detector.drift_detected
    detector.update(np.ones((2, 2)))
    assert detector.drift_detected


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        (np.zeros((2, 7)), {}, "31 levels"),
        (np.zeros((0, LEVELS)), {}, "31 levels"),
        (np.full((2, LEVELS), 1.5), {}, "shares"),
        (np.zeros((2, LEVELS)), {"cuts": np.zeros((3, LEVELS))}, "cuts of shape"),
        (np.zeros((2, LEVELS)), {"rows": 0}, "at least one row"),
        (np.zeros((2, LEVELS)), {"run_length": math.inf}, "run length"),
    ],
)
def test_bad_arguments_are_refused(levels, options, message):
    with pytest.raises(ValueError, match=message):
        StepDetector(levels, **{"rows": 100, "run_length": 1_000.0, **options})


def test_a_state_of_other_channels_or_of_an_impossible_window_is_refused(rng):
    detector = make(rng, 2)
    with pytest.raises(ValueError, match="detector of 2"):
        detector.restore(make(rng, 3).state())
    state = detector.state()
    state["scalars"][0] = WINDOW
    with pytest.raises(ValueError, match="rows in a window"):
        detector.restore(state)


def test_levels_and_bins_tell_the_same(rng):
    rows = rng.integers(0, 65, (500, 3)) / 64
    equal = np.tile(np.arange(1, LEVELS + 1) / (LEVELS + 1), (3, 1)).astype(np.float32)
    assert np.array_equal(binned(rows), binned(rows, equal))
    assert np.allclose(np.cumsum(binned(rows), axis=1)[:, :-1] / 500, levels_of(rows), atol=1e-3)


def test_a_watched_jump_is_seen_in_the_block_after_it_and_stays_up_until_it_is_over(rng):
    def watched():
        known = rng.random((1000, 4))
        return Watched(
            known.mean(axis=0), known.std(axis=0), rows=1000, run_length=1e5,
            levels=levels_of(known), step_run_length=2e4,
        )  # fmt: skip

    monitor = watched()
    for _ in range(40):
        monitor.fold(rng.random((WINDOW, 4)))
    assert not monitor.detector.drift_detected
    monitor.fold(rng.random((WINDOW, 4)) ** 5)
    assert monitor.detector.drift_detected
    assert monitor.detector.quiet_rows == 0
    assert monitor.detector.evidence >= monitor.detector.threshold
    for _ in range(4):
        monitor.fold(rng.random((WINDOW, 4)) ** 5)
        assert monitor.detector.quiet_rows == 0


def test_what_was_adopted_is_what_windows_are_tested_against(rng):
    known = rng.random((1000, 2))
    monitor = Watched(
        known.mean(axis=0), known.std(axis=0), rows=1000, run_length=1e5, levels=levels_of(known), step_run_length=2e4
    )
    for _ in range(20):
        monitor.collect(rng.random((WINDOW, 2)) ** 3)
    monitor.adopt()
    for _ in range(20):
        monitor.fold(rng.random((WINDOW, 2)) ** 3)
    assert not monitor.detector.drift_detected
    monitor.fold(rng.random((WINDOW, 2)))
    monitor.fold(rng.random((WINDOW, 2)))
    assert monitor.detector.drift_detected
