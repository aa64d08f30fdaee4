"""Evidence that may be read at any time, intervals, and suppression of small cells."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.stats import (
    MeanEProcess,
    calibration_error,
    difference_interval,
    entropy,
    paired_evidence,
    suppress_small,
    wilson_interval,
)

ALPHA = 0.05


def evidence_paths(values, null_mean, **bounds):
    """What someone who looks after every value would read: float [R, T] of R runs."""
    process = MeanEProcess(null_mean, **bounds)
    wealth = [np.log1p(bet * (values - null_mean)).cumsum(axis=1) for bet in process._bets]
    return np.exp(np.logaddexp.reduce(wealth)) / len(wealth)


def test_paths_are_what_is_read_after_every_value(rng):
    values = rng.choice([-1.0, 0.0, 0.3, 1.0], 60)
    process, read = MeanEProcess(0.1, low=-1.0), []
    for value in values:
        process.update([value])
        read.append(process.evidence)
    assert evidence_paths(values[None], 0.1, low=-1.0)[0] == pytest.approx(read)


@pytest.mark.parametrize(
    ("draw", "null_mean", "bounds"),
    [
        (lambda rng, shape: rng.random(shape) < 0.9, 0.9, {}),
        (lambda rng, shape: rng.random(shape) < 0.05, 0.05, {}),
        (lambda rng, shape: rng.beta(0.3, 0.7, shape), 0.3, {}),
        (lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], shape, p=[0.15, 0.7, 0.15]), 0.0, {"low": -1.0}),
        (lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], shape, p=[0.08, 0.8, 0.12]), 0.04, {"low": -1.0}),
    ],
    ids=["often", "rarely", "skewed", "paired", "paired with a margin"],
)
def test_looking_after_every_value_keeps_false_alarms_below_alpha(rng, draw, null_mean, bounds):
    paths = evidence_paths(draw(rng, (1_000, 300)), null_mean, **bounds)
    assert (paths.max(axis=1) >= 1 / ALPHA).mean() <= ALPHA


def test_a_real_excess_is_found(rng):
    paths = evidence_paths(rng.random((100, 300)) < 0.7, 0.5)
    assert (paths.max(axis=1) >= 1 / ALPHA).sum() >= 99


def test_a_mean_below_the_bound_never_becomes_evidence(rng):
    process = MeanEProcess(0.5)
    process.update(rng.random(2000) * 0.8)
    assert process.evidence < 1


def test_evidence_does_not_depend_on_how_values_are_portioned(rng):
    values = rng.random(50)
    whole, parts = MeanEProcess(0.4), MeanEProcess(0.4)
    whole.update(values)
    for part in np.array_split(values, 7):
        parts.update(part)
    assert parts.evidence == pytest.approx(whole.evidence)


def test_no_values_are_no_evidence():
    process = MeanEProcess(0.5)
    assert process.evidence == 1.0
    process.update([])
    assert process.evidence == 1.0


def test_evidence_is_the_mean_wealth_of_the_bets():
    process = MeanEProcess(0.5)
    process.update([1.0, 0.0])
    bets = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
    assert process.evidence == pytest.approx(((1 + bets) * (1 - bets)).mean())


def test_overwhelming_evidence_stays_finite():
    process = MeanEProcess(0.5)
    process.update([1.0] * 100_000)
    assert 1e300 < process.evidence < math.inf
    process.update([0.0] * 200_000)
    assert process.evidence < 1e-300


@pytest.mark.parametrize("values", [[1.1], [-0.1], [0.5, 2.0], [math.nan]])
def test_values_out_of_bounds_are_refused(values):
    process = MeanEProcess(0.5)
    with pytest.raises(ValueError, match="must lie in"):
        process.update(values)
    assert process.evidence == 1.0


@pytest.mark.parametrize("null_mean", [0.0, 1.0, -0.5, 2.0])
def test_a_bound_outside_the_range_is_refused(null_mean):
    with pytest.raises(ValueError, match="must lie inside"):
        MeanEProcess(null_mean)


def test_paired_evidence_grows_with_the_difference_and_respects_the_margin():
    better = np.array([1] * 30 + [0] * 65 + [-1] * 5)
    assert paired_evidence(better) > 1 / ALPHA
    assert paired_evidence(better, margin=0.3) < 1
    assert paired_evidence(-better) < 1
    assert paired_evidence(-better, margin=-0.5) > 1 / ALPHA
    assert paired_evidence(np.array([])) == 1.0


def test_wilson_interval_matches_published_values():
    """Newcombe 1998, table I, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_proportion(case):
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= high <= 1
    if trials:
        assert low - 1e-12 <= successes / trials <= high + 1e-12
    else:
        assert (low, high) == (0, 1)


def test_difference_interval_matches_published_values():
    """Newcombe 1998, table II, method 10, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I."""
    assert difference_interval((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval((9, 10), (3, 10)) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    assert difference_interval((5, 56), (0, 29)) == pytest.approx((-0.0381, 0.1926), abs=1e-4)
    assert difference_interval((10, 10), (0, 10)) == pytest.approx((0.6075, 1.0), abs=1e-4)


PROPORTION = st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(PROPORTION, PROPORTION)
def test_the_interval_of_a_difference_is_that_of_the_opposite_mirrored(first, second):
    low, high = difference_interval(first, second)
    assert -1 - 1e-9 <= low <= high <= 1 + 1e-9
    assert difference_interval(second, first) == pytest.approx((-high, -low))
    assert difference_interval((0, 0), (0, 0)) == pytest.approx((-math.sqrt(0.5), math.sqrt(0.5)))


def test_calibration_error_is_the_gap_between_confidence_and_success():
    confidence = np.array([0.95] * 10 + [0.55] * 10 + [0.25] * 20)
    right = np.array([True] * 9 + [False] + [True] * 4 + [False] * 6 + [True] * 5 + [False] * 15)
    assert calibration_error(confidence, right) == pytest.approx((0.05 * 10 + 0.15 * 10 + 0.0 * 20) / 40)
    assert calibration_error(confidence, right, bins=1) == pytest.approx(abs(confidence.mean() - right.mean()))
    assert calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0, "both ends belong to a bin"


def test_rows_without_confidence_are_left_out_of_the_calibration_error():
    confidence, right = np.array([0.75, math.nan, 0.75, math.nan]), np.array([1.0, 0.0, 0.5, 1.0])
    assert calibration_error(confidence, right) == 0
    assert calibration_error(np.full(3, math.nan), np.ones(3)) == 0
    assert calibration_error(np.zeros(0), np.zeros(0, dtype=bool)) == 0


def test_noise_alone_gives_a_small_calibration_error(rng):
    confidence = rng.beta(3, 1, (200, 100))
    errors = [calibration_error(p, draw < p) for p, draw in zip(confidence, rng.random((200, 100)), strict=True)]
    assert 0.05 < np.mean(errors) < 0.12
    many = np.tile(confidence.ravel(), 5)
    assert calibration_error(many, rng.random(len(many)) < many) < 0.01


def test_entropy_is_zero_when_certain_and_one_when_uniform():
    p = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(entropy(p), [0, 1, math.log(2) / math.log(3)], atol=1e-9)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 40), max_size=8), st.integers(1, 20))
def test_no_small_cell_leaves(counts, min_count):
    kept = suppress_small(counts, min_count=min_count)
    assert all(count >= min_count for count in kept.values())
    assert sum(counts.values()) - sum(kept.values()) in range(min_count)


def test_small_cells_are_merged_or_dropped():
    assert suppress_small({"a": 50, "b": 4, "c": 7}, min_count=10) == {"a": 50, "other": 11}
    assert suppress_small({"a": 50, "b": 4}, min_count=10) == {"other": 54}, "the small cell is total minus the rest"
    assert suppress_small({"a": 50, "b": 20, "c": 4}, min_count=10) == {"a": 50, "other": 24}
    assert suppress_small({"a": 4}, min_count=10) == {}
    assert suppress_small({"other": 30, "b": 12, "c": 6, "d": 6}, min_count=10) == {"other": 42, "b": 12}
