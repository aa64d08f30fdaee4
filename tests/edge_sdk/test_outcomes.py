"""What a model makes of rows whose truth is known: losses, right or wrong, and whose error it is."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import LabelError
from edge_sdk.manifest import Manifest, TargetSpec
from edge_sdk.outcomes import group_names, members, outcomes
from edge_sdk.schema import InputSpec
from edge_sdk.stats import calibration_error
from edge_sdk.tasks import is_right, present_labels, stored_labels, stored_values


def manifest_of(task, labels, **fields):
    return Manifest(
        name="m", release=1, created="", task=task, labels=labels, input=InputSpec(shape=[1]), files={}, **fields
    )


CLASSES = manifest_of("classification", ["a", "b", "c"])
TAGS = manifest_of("multilabel", ["a", "b", "c"], thresholds=[0.5, 0.3, 0.7])
PLACE = manifest_of("regression", ["x", "y"], targets=[TargetSpec(0, 1, 0.5), TargetSpec(0, 9, 2)])
EXACT = manifest_of("regression", ["x"], targets=[TargetSpec(0, 1, 0.0)])
RAW = manifest_of("raw", [], adapt="none")


def floats(rows):
    return np.array(rows, dtype=np.float32)


# ---- classification


def test_a_wrong_row_is_an_error_of_its_label_and_of_the_one_it_was_taken_for():
    scores = floats([[0.75, 0.25, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1]])
    made = outcomes(scores, ["a", "b", "c"], ["a", "b", "c", "new"], ["a", "b", "c", "new"], CLASSES)
    assert made.right.tolist() == [True, False, False, False]
    assert made.losses.tolist() == [0, 1, 1, 1]
    assert made.errors.tolist() == [
        [False, False, False, False],
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
    ]
    assert made.confidence.tolist() == [0.75, 0.75, 0.5, 1.0]
    assert (made.losses.dtype, made.confidence.dtype) == (np.float64, np.float64)


def test_heads_with_other_labels_are_compared_by_name():
    truths = ["a", "d"]
    groups = group_names(truths, ["a", "b", "d"], CLASSES)
    assert groups == ("a", "d")
    before = outcomes(floats([[1, 0], [0, 1]]), ["a", "b"], truths, groups, CLASSES)
    after = outcomes(floats([[0, 0, 1], [1, 0, 0]]), ["d", "b", "a"], truths, groups, CLASSES)
    assert before.right.tolist() == [True, False]
    assert before.errors.tolist() == [[False, False], [False, True]], "b is no group: only the row's own label is hurt"
    assert after.right.tolist() == [True, True]
    assert members(truths, groups, CLASSES).tolist() == [[True, False], [False, True]]


# ---- multi-label


def test_the_loss_of_a_multi_label_row_is_the_share_of_labels_that_are_wrong():
    scores = floats([[0.9, 0.4, 0.6], [0.9, 0.2, 0.6], [0.1, 0.1, 0.1]])
    truths = ['["a", "b"]', '["b"]', "[]"]
    made = outcomes(scores, TAGS.labels, truths, TAGS.labels, TAGS)
    assert made.losses == pytest.approx([0, 2 / 3, 0])
    assert made.right.tolist() == [True, False, True]
    assert made.errors.tolist() == [[False] * 3, [True, True, False], [False] * 3]
    # of what was said of each label: present from its threshold on, absent below
    assert made.confidence == pytest.approx([(0.9 + 0.4 + 0.4) / 3, (0.9 + 0.8 + 0.4) / 3, 0.9])


def test_a_label_that_a_multi_label_head_does_not_know_is_absent_to_it():
    truths = ['["d", "a"]', '["c"]']
    groups = group_names(truths, ["a", "b", "c"], TAGS)
    assert groups == ("a", "b", "c", "d")
    small = outcomes(floats([[0.9, 0.9], [0.1, 0.1]]), ["c", "a"], truths, groups, TAGS)
    assert small.errors.tolist() == [[False, False, True, True], [False, False, True, False]]
    grown = outcomes(floats([[0.9, 0, 0, 0.6], [0, 0, 0.8, 0.4]]), ["a", "b", "c", "d"], truths, groups, TAGS)
    assert grown.right.tolist() == [True, True], "a label that the manifest does not know counts from one half on"
    assert members(truths, groups, TAGS).tolist() == [[True, False, False, True], [False, False, True, False]]


# ---- regression


def test_the_loss_of_a_regression_is_half_at_the_tolerance_and_grows_beyond_it():
    truths = [stored_values([1.0, 10.0])] * 4
    made = outcomes(floats([[1, 10], [1.5, 12], [1.25, 16], [1e30, 10]]), PLACE.labels, truths, PLACE.labels, PLACE)
    assert made.losses == pytest.approx([0, 0.5, (0.2 + 0.9) / 2, 0.5])
    assert made.right.tolist() == [True, True, False, False]
    assert made.errors.tolist() == [[False, False], [False, False], [False, True], [True, False]]
    assert np.isnan(made.confidence).all()
    assert members(truths, PLACE.labels, PLACE).all()
    assert group_names(truths, PLACE.labels, PLACE) == ("x", "y")


def test_values_that_are_not_finite_are_wholly_wrong():
    scores = floats([[np.nan, 0], [np.inf, 0], [-np.inf, 0]])
    made = outcomes(scores, PLACE.labels, ["[0, 0]"] * 3, PLACE.labels, PLACE)
    assert made.losses.tolist() == [0.5] * 3
    assert made.errors.tolist() == [[True, False]] * 3


def test_without_tolerance_only_the_exact_value_is_right():
    made = outcomes(floats([[2], [2.000001]]), ["x"], ["[2.0]", "[2.0]"], ["x"], EXACT)
    assert made.losses.tolist() == [0, 1]
    assert made.right.tolist() == [True, False]


# ---- all tasks


@pytest.mark.parametrize("manifest", [CLASSES, TAGS, PLACE], ids=lambda m: m.task)
def test_no_rows_have_no_outcomes(manifest):
    groups = group_names([], manifest.labels, manifest)
    made = outcomes(np.zeros((0, len(manifest.labels)), np.float32), manifest.labels, [], groups, manifest)
    assert made.errors.shape == members([], groups, manifest).shape == (0, len(groups))
    assert len(made.losses) == len(made.right) == len(made.confidence) == 0


def test_a_raw_model_has_no_truths():
    with pytest.raises(LabelError, match="task=raw"):
        outcomes(np.zeros((0, 0), np.float32), [], [], [], RAW)


def test_scores_that_do_not_belong_to_the_truths_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(2, 3\)"):
        outcomes(floats([[1, 0, 0]]), CLASSES.labels, ["a", "b"], ["a"], CLASSES)


UNIT = st.floats(0, 1, width=32)
SCORES = st.integers(0, 12).flatmap(lambda n: hnp.arrays(np.float32, (n, 3), elements=UNIT))


@given(SCORES, st.data())
def test_outcomes_of_labels_agree_with_each_other_and_with_what_right_means(scores, data):
    truths = data.draw(st.lists(st.sampled_from([*CLASSES.labels, "d"]), min_size=len(scores), max_size=len(scores)))
    sets = [stored_labels([label for label in TAGS.labels if label <= truth]) for truth in truths]
    groups = group_names(truths, CLASSES.labels, CLASSES)
    made = outcomes(scores, CLASSES.labels, truths, groups, CLASSES)
    assert made.losses.tolist() == (~made.right).tolist()
    assert made.errors[~made.right].any(axis=1).all()
    assert not made.errors[made.right].any()
    made = outcomes(scores, TAGS.labels, sets, TAGS.labels, TAGS)
    said = [stored_labels(present_labels(row, TAGS.labels, TAGS.thresholds)) for row in scores]
    assert made.right.tolist() == [is_right(a, b, TAGS) for a, b in zip(said, sets, strict=True)]
    assert ((made.losses == 0) == made.right).all()
    assert made.losses == pytest.approx(made.errors.mean(axis=1))
    assert 0 <= calibration_error(made.confidence, 1 - made.losses) <= 1


@given(
    st.integers(0, 12).flatmap(lambda n: hnp.arrays(np.float32, (2, n, 2), elements=st.floats(-1000, 1000, width=32)))
)
def test_outcomes_of_values_agree_with_each_other_and_with_what_right_means(drawn):
    scores, true = drawn
    truths = [stored_values(row) for row in true]
    made = outcomes(scores, PLACE.labels, truths, PLACE.labels, PLACE)
    assert made.right.tolist() == [
        is_right(stored_values(row), truth, PLACE) for row, truth in zip(scores, truths, strict=True)
    ]
    assert ((made.losses >= 0) & (made.losses <= 1)).all()
    assert (made.losses[made.right] <= 0.5 + 1e-12).all()
    off = np.abs(scores - np.array([json.loads(truth) for truth in truths]).reshape(scores.shape))
    doubled = outcomes((true + 2 * (scores - true)).astype(np.float32), PLACE.labels, truths, PLACE.labels, PLACE)
    assert (doubled.losses >= made.losses - 1e-3).all(), "farther off is never better"
    assert (made.errors == (off > [0.5, 2])).all()
