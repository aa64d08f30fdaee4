"""What differs between the tasks: how a truth is stored, and when it agrees with what the model said."""

import json
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import LabelError, UnknownLabelError
from edge_sdk.manifest import Manifest, TargetSpec
from edge_sdk.schema import InputSpec
from edge_sdk.tasks import (
    is_right,
    loss_of,
    present_labels,
    rows_loss,
    rows_right,
    store_truth,
    stored_answer,
    stored_labels,
    stored_values,
)

LABELS = ["Kätzchen", "犬", 'a "b", c']


def manifest_of(task, labels=LABELS, **fields):
    return Manifest(
        name="m", release=1, created="", task=task, labels=labels, input=InputSpec(shape=[1]), files={}, **fields
    )


CLASSES = manifest_of("classification")
TAGS = manifest_of("multilabel", thresholds=[0.5, 0.3, 0.7])
HEIGHT = manifest_of("regression", ["height"], targets=[TargetSpec(1.7, 0.1, 0.05)])
PLACE = manifest_of("regression", ["x", "y"], targets=[TargetSpec(0, 1, 0.25), TargetSpec(0, 9, 2)])
RAW = manifest_of("raw", [], adapt="none")


# ---- stored forms


@pytest.mark.parametrize("label", [*LABELS, "new 🦊", "0", " "])
def test_a_label_is_stored_as_it_is(label):
    assert store_truth(label, CLASSES) == label
    stored = store_truth(np.array([label])[0], CLASSES)  # numpy's own strings
    assert stored == label
    assert type(stored) is str


@pytest.mark.parametrize("truth", [[], (), set(), np.array([], dtype=str), frozenset()], ids=repr)
def test_no_label_may_apply(truth):
    assert store_truth(truth, TAGS) == "[]"


def test_labels_are_stored_once_each_in_the_models_order():
    forms = [["犬", "Kätzchen"], ("Kätzchen", "犬", "犬"), {"犬", "Kätzchen"}, np.array(["犬", "Kätzchen"])]
    assert {store_truth(form, TAGS) for form in forms} == {'["Kätzchen", "犬"]'}
    assert json.loads(store_truth(LABELS, TAGS)) == LABELS
    assert store_truth(LABELS, TAGS) == stored_labels(LABELS)


@pytest.mark.parametrize(
    "truth", [2, 2.0, [2], (2.0,), np.float32(2), np.array(2), np.array([2]), Decimal(2)], ids=repr
)
def test_a_number_is_stored_alike_whatever_holds_it(truth):
    assert store_truth(truth, HEIGHT) == "[2.0]"


def test_several_numbers_are_stored_in_order():
    assert store_truth([1, 2.5], PLACE) == store_truth(np.array([1, 2.5], np.float32), PLACE) == "[1.0, 2.5]"
    assert stored_values(np.array([1, 2.5], np.float32)) == "[1.0, 2.5]"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_survives_its_stored_form(value):
    assert json.loads(store_truth(value, HEIGHT)) == [value]


def test_an_answer_is_stored_in_the_form_of_the_truth():
    scores = np.array([0.6, 0.1, 0.9], np.float32)
    present = present_labels(scores, LABELS, TAGS.thresholds)
    assert stored_answer(scores, LABELS[2], present, "classification") == LABELS[2]
    assert stored_answer(scores, LABELS[2], present, "multilabel") == store_truth([LABELS[0], LABELS[2]], TAGS)
    assert stored_answer(np.array([1, 2.5], np.float32), "", (), "regression") == store_truth([1, 2.5], PLACE)
    assert stored_answer(scores, "", (), "raw") == ""


def test_a_label_is_present_from_its_threshold_on():
    at = np.array([0.5, 0.3, 0.7], np.float32)  # 0.3 and 0.7 are no float32: the threshold is rounded like the output
    assert present_labels(at, LABELS, TAGS.thresholds) == tuple(LABELS)
    assert present_labels(np.nextafter(at, np.float32(0)), LABELS, TAGS.thresholds) == ()


# ---- truths that cannot be


@pytest.mark.parametrize("truth", ["", None, 3, 1.5, ["犬"], b"dog", True, np.array("犬")], ids=repr)
def test_what_is_no_label_is_refused(truth):
    with pytest.raises(UnknownLabelError, match="a label is a non-empty string, got"):
        store_truth(truth, CLASSES)


def test_a_label_that_no_file_can_hold_is_refused():
    with pytest.raises(UnknownLabelError, match="a label is UTF-8"):
        store_truth("\ud800", CLASSES)


@pytest.mark.parametrize(
    "truth",
    ["犬", "", None, 1, 0.5, True, [1, 0, 1], ["犬", 1], [["犬"]], {"犬": 1}, b"dog", np.array("犬"), np.float32(1)],
    ids=repr,
)
def test_what_is_no_list_of_labels_is_refused(truth):
    with pytest.raises(LabelError, match="a multi-label truth is the list of labels that applied, got") as caught:
        store_truth(truth, TAGS)
    assert not isinstance(caught.value, UnknownLabelError)


def test_labels_cannot_be_given_as_something_that_is_read_only_once():
    """It would be empty after the check, and stored as "none applied"."""
    with pytest.raises(LabelError, match="list of labels"):
        store_truth((label for label in LABELS), TAGS)


def test_an_unknown_label_is_named_with_the_known_ones():
    with pytest.raises(UnknownLabelError, match="unknown label 'Vogel'; known: Kätzchen, 犬, "):
        store_truth(["犬", "Vogel"], TAGS)


@pytest.mark.parametrize(
    "truth",
    [None, "2", "high", ["2"], True, [], [1, 2], [[2]], np.array([[2.0]]), {"height": 2}, b"2", 2j, 10**400,
     math.nan, math.inf, [None], object()],
    ids=lambda truth: repr(truth)[:20],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused_with_the_targets(truth):
    with pytest.raises(LabelError, match=r"a truth is one (finite )?number for each of height, got"):
        store_truth(truth, HEIGHT)


@pytest.mark.parametrize("truth", [1.0, [1.0], [1, 2, 3], [1, math.nan], [1, "2"], [1, [2]]], ids=repr)
def test_each_target_needs_its_number(truth):
    with pytest.raises(LabelError, match="for each of x, y, got"):
        store_truth(truth, PLACE)


def test_a_raw_model_has_no_truth():
    with pytest.raises(LabelError, match="m has task=raw: there is no truth"):
        store_truth("犬", RAW)


# ---- one row and many


SCORES = st.floats(0, 1, width=32)
AT_THRESHOLDS = st.sampled_from(np.float32(TAGS.thresholds).tolist())


@given(
    scores=hnp.arrays(np.float32, (5, 3), elements=SCORES), truths=hnp.arrays(np.int64, 5, elements=st.integers(0, 2))
)
def test_rows_of_a_classifier_are_right_one_by_one_and_together(scores, truths):
    alone = [
        is_right(LABELS[row.argmax()], store_truth(LABELS[truth], CLASSES), CLASSES)
        for row, truth in zip(scores, truths, strict=True)
    ]
    assert rows_right(scores, truths, CLASSES).tolist() == alone


@given(
    scores=hnp.arrays(np.float32, (5, 3), elements=SCORES | AT_THRESHOLDS),
    truths=hnp.arrays(np.int64, (5, 3), elements=st.integers(0, 1)),
)
def test_rows_of_a_multi_label_model_are_right_one_by_one_and_together(scores, truths):
    alone = []
    for row, truth in zip(scores, truths, strict=True):
        said = stored_answer(row, "", present_labels(row, LABELS, TAGS.thresholds), "multilabel")
        applied = [label for label, applies in zip(LABELS, truth, strict=True) if applies]
        alone.append(is_right(said, store_truth(applied, TAGS), TAGS))
    assert rows_right(scores, truths, TAGS).tolist() == alone
    assert rows_right(scores, truths.astype(np.float32), TAGS).tolist() == alone


NUMBERS = st.floats(-4, 4, width=32) | st.integers(-16, 16).map(lambda eighths: eighths / 8)


@given(
    scores=hnp.arrays(np.float32, (5, 2), elements=NUMBERS),
    truths=hnp.arrays(np.float64, (5, 2), elements=NUMBERS),
    narrow=st.booleans(),
)
def test_rows_of_a_regression_are_right_one_by_one_and_together(scores, truths, narrow):
    truths = truths.astype(np.float32) if narrow else truths
    alone = [
        is_right(stored_answer(row, "", (), "regression"), store_truth(truth, PLACE), PLACE)
        for row, truth in zip(scores, truths, strict=True)
    ]
    assert rows_right(scores, truths, PLACE).tolist() == alone


def test_every_value_must_lie_within_its_tolerance():
    scores = np.float32([[1.25, 7], [1.25, 7], [1.25, 7]])
    truths = [[1.0, 9.0], [0.99, 7.0], [1.25, 9.01]]
    assert rows_right(scores, truths, PLACE).tolist() == [True, False, False]


def test_a_loss_is_in_spreads_and_the_same_alone_and_together():
    scores, truths = np.float32([[1.25, 7], [0, 0]]), np.array([[1.0, 16.0], [0, 0]])
    np.testing.assert_allclose(rows_loss(scores, truths, PLACE), [(0.25 / 1 + 9 / 9) / 2, 0])
    said = stored_answer(scores[0], "", (), "regression")
    assert loss_of(said, store_truth(truths[0], PLACE), PLACE) == pytest.approx(0.625)
    assert rows_loss(np.float32([[1.8]]), np.array([1.7]), HEIGHT) == pytest.approx([1.0], abs=1e-5)


def test_truths_of_one_target_need_no_second_dimension():
    scores = np.float32([[1.7], [1.8], [1.9]])
    truths = np.array([1.72, 1.5, 1.9])
    assert rows_right(scores, truths, HEIGHT).tolist() == rows_right(scores, truths[:, None], HEIGHT).tolist()
    assert rows_right(scores, truths, HEIGHT).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="reshape"):
        rows_right(scores, truths[:2], HEIGHT)
