"""Evidence that may be read at any time, intervals, and suppression of small cells."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.stats import MeanEProcess, entropy, paired_evidence, suppress_small, wilson_interval

ALPHA = 0.05


def ever_exceeds(values, null_mean, **bounds):
    """Whether someone who looks after every value would ever claim an excess at level ALPHA."""
    process = MeanEProcess(null_mean, **bounds)
    for value in values:
        process.update([value])
        if process.evidence >= 1 / ALPHA:
            return True
    return False


@pytest.mark.parametrize(
    ("draw", "null_mean", "bounds"),
    [
        (lambda rng: rng.random(300) < 0.9, 0.9, {}),
        (lambda rng: rng.random(300) < 0.05, 0.05, {}),
        (lambda rng: rng.beta(0.3, 0.7, 300), 0.3, {}),
        (lambda rng: rng.choice([-1.0, 0.0, 1.0], 300, p=[0.15, 0.7, 0.15]), 0.0, {"low": -1.0, "high": 1.0}),
        (lambda rng: rng.choice([-1.0, 0.0, 1.0], 300, p=[0.08, 0.8, 0.12]), 0.04, {"low": -1.0, "high": 1.0}),
    ],
    ids=["often", "rarely", "skewed", "paired", "paired with a margin"],
)
def test_looking_after_every_value_keeps_false_alarms_below_alpha(rng, draw, null_mean, bounds):
    runs = 400
    alarms = sum(ever_exceeds(draw(rng).astype(float), null_mean, **bounds) for _ in range(runs))
    assert alarms <= ALPHA * runs


def test_a_real_excess_is_found(rng):
    found = sum(ever_exceeds(rng.random(300) < 0.7, 0.5) for _ in range(100))
    assert found >= 99


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
    bets = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
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
