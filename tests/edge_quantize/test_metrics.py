"""Figures and their intervals against numbers worked out by hand, from papers, and by repetition."""

import math

import numpy as np
import pytest

from edge_quantize.metrics import (
    Accuracy,
    Terms,
    bootstrap,
    error_ratio,
    mcnemar_p,
    paired_difference,
    regression_score,
    round_quantiles,
    sqnr_db,
)
from edge_sdk.manifest import LatentSpec, Manifest, TargetSpec
from edge_sdk.schema import InputSpec
from edge_sdk.tasks import rows_right

PETS = Terms("classification", ("cat", "dog"))
TAGS = Terms("multilabel", ("red", "round", "wet"), thresholds=(0.5, 0.5, 0.8))
LOADS = Terms("regression", ("load", "heat"), tolerances=(0.5, 2.0))


def pairs(both, first, second, neither):
    """Rows of which so many are right with both variants, the first alone, the second alone, none."""
    one = np.repeat([True, True, False, False], (both, first, second, neither))
    return one, np.repeat([True, False, True, False], (both, first, second, neither))


def test_accuracy_of_a_label_is_the_share_of_its_rows_that_are_found():
    outputs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], np.float32)
    truth = np.array([0, 0, 1, 1])
    score = PETS.score(outputs, truth)
    assert (score.rows, score.accuracy.value) == (4, 0.75)
    cat, dog = PETS.by_label(outputs, truth).values()
    assert (cat.accuracy.value, cat.rows, cat.precision.value, cat.precision.rows) == (1.0, 2, 2 / 3, 3)
    assert (dog.accuracy.value, dog.recall, dog.precision.value) == (0.5, None, 1.0)


def test_multilabel_row_is_right_when_every_label_is_and_each_has_its_own_threshold():
    outputs = np.array([[0.6, 0.4, 0.79], [0.6, 0.6, 0.81], [0.1, 0.5, 0.9]], np.float32)
    truth = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 1]])
    assert TAGS.correct(outputs, truth).tolist() == [True, False, True]
    score = TAGS.score(outputs, truth)
    assert score.accuracy.value == pytest.approx(2 / 3)
    assert score.hamming.value == pytest.approx(1 / 9)
    by_label = TAGS.by_label(outputs, truth)
    assert by_label["round"].accuracy.value == pytest.approx(2 / 3)
    assert by_label["round"].precision.value == 0.5
    assert (by_label["round"].recall.value, by_label["round"].recall.rows) == (1.0, 1)


def test_regression_is_right_within_tolerance_and_scored_target_by_target():
    outputs = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 33.0]], np.float32)
    truth = np.array([[1.5, 10.0], [2.0, 18.0], [3.0, 30.0]], np.float32)
    assert LOADS.correct(outputs, truth).tolist() == [True, True, False]
    score = LOADS.score(outputs, truth)
    assert score.rmse is None  # two units do not add
    load, heat = LOADS.by_label(outputs, truth).values()
    assert load.rmse.value == pytest.approx(math.sqrt(0.25 / 3))
    assert load.mae.value == pytest.approx(0.5 / 3)
    assert load.accuracy.value == 1.0
    assert heat.rmse.value == pytest.approx(math.sqrt((4 + 9) / 3))
    # around the mean 58/3: 784/9 + 16/9 + 1024/9
    assert heat.r2.value == pytest.approx(1 - 13 / (1824 / 9))
    assert score.r2.value == pytest.approx((load.r2.value + heat.r2.value) / 2)


def test_r2_keeps_its_digits_far_from_zero_and_is_absent_where_nothing_varies():
    truth = np.array([[1e6], [1e6 + 1], [1e6 + 2]])
    score = regression_score(truth + np.array([[0.5], [-0.5], [0.5]]), truth, Accuracy.of(np.ones(3, bool)))
    assert score.r2.value == pytest.approx(1 - 0.75 / 2)
    assert regression_score(truth, np.ones((3, 1)), Accuracy.of(np.ones(3, bool))).r2 is None


def test_variants_say_the_same_by_the_tasks_own_measure():
    a, b = np.array([[0.6, 0.4], [0.4, 0.6]]), np.array([[0.9, 0.1], [0.6, 0.4]])
    assert PETS.same(a, b).tolist() == [True, False]
    first, second = np.array([[0.6, 0.4, 0.7]]), np.array([[0.9, 0.4, 0.85]])
    assert TAGS.same(first, second).tolist() == [False]
    assert LOADS.same(np.array([[1.0, 5.0], [1.0, 5.0]]), np.array([[1.5, 7.0], [1.6, 5.0]])).tolist() == [True, False]


def test_devices_and_comparisons_agree_on_what_is_right(rng):
    plain = {"name": "n", "release": 1, "created": "", "input": InputSpec([2]), "latent": LatentSpec(4), "files": {}}
    outputs = rng.random((50, 3)).astype(np.float32)
    cases = [
        (Manifest(labels=["a", "b", "c"], **plain), rng.integers(0, 3, 50)),
        (Manifest(labels=["a", "b", "c"], task="multilabel", thresholds=[0.5, 0.2, 0.9], **plain),
         (outputs > [0.4, 0.2, 0.9]).astype(np.int64)),
        (Manifest(labels=["a", "b", "c"], task="regression", targets=[TargetSpec(0, 1, 0.4)] * 3, **plain),
         rng.random((50, 3)).astype(np.float32)),
    ]  # fmt: skip
    for manifest, truth in cases:
        judged = Terms.of(manifest).correct(outputs, truth)
        assert np.array_equal(judged, rows_right(outputs, truth, manifest)), manifest.task
        assert 0 < judged.sum() < 50


def test_raw_outputs_have_no_right_and_wrong():
    with pytest.raises(ValueError, match="raw"):
        Terms("raw", ()).correct(np.zeros((1, 1)), np.zeros(1))


def test_slices_without_rows_are_left_out():
    outputs, truth = np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1])
    slices = {"first": np.array([True, False]), "none": np.zeros(2, bool)}
    scores = PETS.by_slice(outputs, truth, slices)
    assert {name: score.accuracy.value for name, score in scores.items()} == {"first": 1.0}


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # as in the paper's table of examples
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((0, 0, 0, 54), -0.0664, 0.0664),
    ],
)
def test_paired_interval_is_the_one_of_the_paper(counts, low, high):
    found = paired_difference(*pairs(*counts))
    assert found.value == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (found.first_only, found.second_only) == counts[1:3]


def test_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference(np.ones(0, bool), np.ones(0, bool))


def test_swapping_the_variants_turns_the_interval_round():
    one, other = pairs(50, 9, 3, 8)
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.p_value == back.p_value


def test_mcnemar_counts_tosses_of_a_fair_coin():
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(3, 3) == 1.0
    assert mcnemar_p(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_p(1, 5) == pytest.approx(2 * 7 / 64)
    assert 0 < mcnemar_p(3000, 3300) < 1e-3


def test_intervals_cover_the_truth_about_as_often_as_they_say(rng):
    rows, rounds = 150, 300
    covered = dict.fromkeys(("share", "difference", "rmse", "ratio"), 0)
    for _ in range(rounds):
        first = rng.random(rows) < 0.9
        second = np.where(rng.random(rows) < 0.8, first, rng.random(rows) < 0.6)
        share, difference = Accuracy.of(first), paired_difference(first, second)
        covered["share"] += share.low <= 0.9 <= share.high
        covered["difference"] += difference.low <= 0.9 - (0.8 * 0.9 + 0.2 * 0.6) <= difference.high
        truth = rng.normal(size=(rows, 1))
        shared = rng.normal(size=(rows, 1))
        one, other = truth + shared, truth + shared + rng.normal(size=(rows, 1))
        rmse = regression_score(one, truth, share).rmse
        covered["rmse"] += rmse.low <= 1 <= rmse.high
        ratio = error_ratio(one, other, truth)
        covered["ratio"] += ratio.low <= 1 / math.sqrt(2) <= ratio.high
    # three standard errors below the nominal 95 %; score intervals of pairs err to the wide side
    assert min(covered.values()) >= 0.91 * rounds, covered
    assert max(covered["share"], covered["rmse"], covered["ratio"]) <= 0.99 * rounds, covered


def test_bootstrap_gives_the_same_interval_again_whatever_the_chunk(monkeypatch, rng):
    moments = rng.normal(size=(70, 2))
    whole = bootstrap(moments, lambda m: m[:, 0] - m[:, 1])
    monkeypatch.setattr("edge_quantize.metrics._PICKS", 70 * 130)
    assert bootstrap(moments, lambda m: m[:, 0] - m[:, 1]) == whole
    assert bootstrap(moments[:0], lambda m: m[:, 0]) is None


def test_error_ratio_of_an_error_twice_as_large_is_two(rng):
    truth = rng.normal(size=(40, 2)) * [1, 1000]
    error = rng.normal(size=(40, 2)) * [1, 1000]
    found = error_ratio(truth + 2 * error, truth + error, truth)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert error_ratio(truth + error, truth, truth) is None
    assert error_ratio(truth, truth + error, np.ones((40, 2))) is None


def test_sqnr_counts_decibels():
    signal = np.array([10.0, -10.0])
    assert sqnr_db(signal, signal + 1) == pytest.approx(20)
    assert sqnr_db(signal, signal + 0.1) == pytest.approx(40)
    assert sqnr_db(signal, signal) is None
    assert sqnr_db(np.zeros(2), signal) is None
    assert sqnr_db(np.array([200], np.uint8), np.array([201], np.uint8)) == pytest.approx(46.02, abs=0.01)


def test_a_disturbed_round_does_not_move_the_median_of_rounds():
    quiet, disturbed = [1.0, 2.0, 3.0], [100.0, 200.0, 300.0]
    assert round_quantiles([quiet, disturbed, quiet], (0.5, 1.0)) == [2.0, 3.0]
    with pytest.raises(ValueError, match="every round"):
        round_quantiles([quiet, []], (0.5,))
