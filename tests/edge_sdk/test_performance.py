"""Alarms on delayed labels, and running scores by class and slice."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.checks import check_detector
from edge_sdk.drift.performance import PerformanceMonitor, Prequential, clipped_mean
from edge_sdk.stats import calibration_error

LABELS = ("a", "b", "c")


def monitor(accuracy=0.9, labelled=1_000, *, run_length=1_000.0, labels=LABELS, **options):
    return PerformanceMonitor(accuracy, labelled, run_length=run_length, labels=labels, **options)


def rows_until_alarm(detector, errors, most=4_000):
    """How many rows of that error rate raise the alarm; None if they do not."""
    rng = np.random.default_rng(3)
    for row in range(1, most + 1):
        detector.update_rows(rng.random(1) >= errors)
        if detector.drift_detected:
            return row
    return None


# ---- the alarm


def test_the_monitor_keeps_the_contract_of_a_detector():
    check_detector(lambda: monitor(0.5, 10_000), channels=1)


@pytest.mark.parametrize("accuracy", [0.6, 0.9, 0.99])
def test_as_many_errors_as_in_the_reference_keep_the_budget(accuracy):
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        detector = monitor(float((rng.random(1_000) < accuracy).mean()))
        detector.update_rows(rng.random(1_000) < accuracy)
        alarms += detector.drift_detected
    assert alarms <= 8  # in 20 run lengths, of references that chance made


def test_more_errors_and_fewer_errors_both_raise_the_alarm():
    assert rows_until_alarm(monitor(0.7), 0.6) < 150
    assert rows_until_alarm(monitor(0.6, 5_000), 0.05) < 150


def test_a_small_reference_is_forgiven_more():
    """Of a dozen rows nothing is known that an error rate of 30 % would contradict."""
    assert rows_until_alarm(monitor(0.9, 12), 0.3, most=1_000) is None
    assert rows_until_alarm(monitor(0.9, 2_000), 0.3) < 200


@pytest.mark.parametrize(("accuracy", "labelled"), [(math.nan, 0), (0.9, 0), (math.nan, 500)])
@pytest.mark.parametrize("errors", [0.0, 1.0])
def test_without_labelled_reference_rows_no_alarm_is_ever_raised(accuracy, labelled, errors):
    detector = monitor(accuracy, labelled)
    detector.update_rows(np.full(3_000, errors == 0))
    assert not detector.warning


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_a_reference_without_exception_is_a_reference(accuracy):
    detector = monitor(accuracy)
    detector.update_rows(np.full(900, accuracy == 1))
    assert not detector.drift_detected
    detector.update_rows(np.full(200, accuracy == 0))
    assert detector.drift_detected


def test_the_shift_is_told_from_the_accuracy_of_the_reference():
    detector = monitor(1.0, 200)
    detector.update_rows(np.zeros(400, dtype=bool))
    ((channel, shift),) = detector.suspects()
    assert channel == 0
    assert shift == pytest.approx(1.0, abs=1e-3)


# ---- regression


def regression(rng, scale=1.0, rows=1_000):
    return np.abs(rng.normal(0, scale, rows))


def test_losses_that_grow_raise_the_alarm_where_right_and_wrong_do_not_change(rng):
    reference = regression(rng)
    scale = float(np.quantile(reference, 0.95))
    loss_mean = clipped_mean(reference, scale)
    detector = monitor(0.9, 1_000, task="regression", labels=("t",), loss_scale=scale, loss_mean=loss_mean)
    detector.update_rows(np.ones(800, dtype=bool), losses=regression(rng, rows=800))
    assert not detector.drift_detected
    detector.update_rows(np.ones(200, dtype=bool), losses=regression(rng, 3.0, rows=200))
    assert detector.drift_detected
    assert detector.suspects()[0][1] > 0.1


def test_one_enormous_loss_is_no_alarm(rng):
    detector = monitor(task="regression", labels=("t",), loss_scale=1.0, loss_mean=0.3)
    detector.update_rows(np.zeros(3, dtype=bool), losses=np.array([1e300, np.inf, np.nan]))
    assert not detector.warning
    assert math.isfinite(detector.evidence)


def test_a_regression_whose_reference_knows_no_losses_is_judged_by_right_and_wrong():
    detector = monitor(task="regression", labels=("t",))
    detector.update_rows(np.zeros(200, dtype=bool))
    assert detector.drift_detected


def test_losses_of_a_perfect_reference_are_all_or_nothing():
    assert clipped_mean(np.array([0.0, 0.0, 5.0, math.nan]), 0.0) == 0.5
    assert clipped_mean(np.array([0.0, 1.0, 2.0, 4.0]), 2.0) == 0.625


def test_missing_losses_are_refused_and_nothing_is_folded():
    detector = monitor(task="regression", labels=("t",), loss_scale=1.0, loss_mean=0.3)
    with pytest.raises(ValueError, match="needs them"):
        detector.update_rows(np.ones(5, dtype=bool))
    assert detector.prequential.scores()["rows"] == 0


# ---- running scores


def brute(truths, said, weights):
    """Accuracy, and precision, recall and F1 by class, by definition."""
    classes = {}
    for i, label in enumerate(LABELS):
        hit, true, told = ((weights * mask).sum() for mask in ((truths == i) & (said == i), truths == i, said == i))
        if true + told:
            classes[label] = (hit / told if told else None, hit / true if true else None, 2 * hit / (true + told))
    return (weights * (truths == said)).sum() / weights.sum(), classes


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 50))
def test_scores_are_those_of_the_definition_with_fading_weights(seed, rows, step):
    rng = np.random.default_rng(seed)
    truths, said = rng.integers(0, 3, rows), rng.integers(0, 3, rows)
    prequential = Prequential(LABELS, fading=0.98)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        prequential.update(truths[part] == said[part], truths=truths[part], said=said[part])
    weights = 0.98 ** np.arange(rows - 1, -1, -1)
    accuracy, classes = brute(truths, said, weights)
    scores = prequential.scores()
    assert scores["rows"] == pytest.approx(weights.sum())
    assert scores["accuracy"] == pytest.approx(accuracy)
    assert scores["classes"].keys() == classes.keys()
    for label, told in scores["classes"].items():
        assert (told["precision"], told["recall"], told["f1"]) == pytest.approx(classes[label])
    assert scores["f1"] == pytest.approx(np.mean([told["f1"] for told in scores["classes"].values()]))


def test_scores_follow_the_present():
    prequential = Prequential(LABELS, fading=0.99)
    prequential.update(np.ones(5_000, dtype=bool))
    prequential.update(np.zeros(500, dtype=bool))
    assert prequential.scores()["accuracy"] < 0.01
    assert prequential.scores()["rows"] == pytest.approx(100, rel=0.01)


def test_calibration_error_is_that_of_the_definition(rng):
    confidence, right = rng.random(500), rng.random(500) < 0.5
    prequential = Prequential(LABELS, fading=1 - 1e-9)
    prequential.update(right[:200], confidence=confidence[:200])
    prequential.update(right[200:], confidence=confidence[200:])
    prequential.update(np.ones(3, dtype=bool), confidence=np.full(3, np.nan))
    assert prequential.scores()["calibration_error"] == pytest.approx(calibration_error(confidence, right), rel=1e-4)


def test_each_slice_has_scores_of_its_own_and_fades_with_its_own_rows():
    prequential = Prequential(LABELS, fading=0.9)
    prequential.update(np.zeros(4, dtype=bool), slices=["night"] * 4)
    prequential.update(np.ones(500, dtype=bool), slices=["day"] * 499 + [""])
    slices = prequential.scores()["slices"]
    assert set(slices) == {"night", "day"}
    assert slices["night"]["accuracy"] == 0
    assert slices["night"]["rows"] == pytest.approx(sum(0.9**i for i in range(4)))
    assert slices["day"]["accuracy"] == 1


def test_precision_and_recall_are_told_by_slice():
    prequential = Prequential(LABELS)
    truths, said = np.array([0, 0, 1]), np.array([0, 1, 1])
    prequential.update(truths == said, truths=truths, said=said, slices=["yard", "hall", "yard"])
    assert prequential.scores()["slices"]["yard"]["f1"] == 1
    assert prequential.scores()["slices"]["hall"]["classes"]["a"]["recall"] == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=300))
def test_slices_are_bounded_whatever_comes_and_no_row_is_counted_twice(rows):
    prequential = Prequential(LABELS, max_slices=4, fading=0.9)
    for number, right in rows:
        prequential.update(np.array([right]), slices=[f"slice {number}"])
    slices = prequential.scores()["slices"]
    assert len(slices) <= 5
    assert sum(told["rows"] for told in slices.values()) <= len(rows)
    assert len(prequential.state()["slices"]) <= 5


def test_a_slice_that_fell_silent_gives_way_to_a_new_one():
    prequential = Prequential(LABELS, max_slices=2, fading=0.9)
    prequential.update(np.ones(2, dtype=bool), slices=["old", "busy"])
    prequential.update(np.ones(20, dtype=bool), slices=["busy"] * 20)
    prequential.update(np.zeros(2, dtype=bool), slices=["new", "newer"])
    assert set(prequential.scores()["slices"]) == {"busy", "new", "other"}


def test_each_label_of_a_multi_label_model_is_scored():
    truths = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=bool)
    said = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]], dtype=bool)
    prequential = Prequential(LABELS, task="multilabel", fading=1 - 1e-12)
    prequential.update((truths == said).all(axis=1), truths=truths, said=said)
    scores = prequential.scores()
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["classes"]["a"]["f1"] == pytest.approx(1)
    assert scores["classes"]["b"]["precision"] == pytest.approx(1 / 2)
    assert scores["classes"]["c"]["recall"] == pytest.approx(1 / 2)


def test_a_label_that_the_model_does_not_know_is_an_error_of_what_was_said():
    prequential = Prequential(LABELS)
    prequential.update(np.array([False]), truths=np.array([-1]), said=np.array([1]))
    scores = prequential.scores()
    assert set(scores["classes"]) == {"b"}
    assert scores["classes"]["b"]["precision"] == 0


def test_losses_of_a_regression_are_averaged_and_those_that_are_not_finite_left_out():
    prequential = Prequential(("t",), task="regression")
    prequential.update(np.array([True, False, True]), losses=np.array([1.0, np.inf, 1.0]))
    assert prequential.scores()["loss"] == pytest.approx(1.0)
    assert prequential.scores()["classes"] == {}


def test_nothing_is_known_before_the_first_row():
    scores = Prequential(LABELS).scores()
    assert scores["rows"] == 0
    assert {scores[key] for key in ("accuracy", "loss", "precision", "f1", "calibration_error")} == {None}
    assert scores["slices"] == {}


def test_scores_go_on_after_a_restart_exactly(rng):
    def feed(detector):
        truths, said = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
        detector.update_rows(
            truths == said,
            truths=truths,
            said=said,
            confidence=rng.random(40),
            slices=[f"s{i}" for i in rng.integers(0, 40, 40)],
        )

    goes_on, restored = monitor(), monitor()
    feed(goes_on)
    restored.restore(goes_on.state())
    assert restored.prequential.scores() == goes_on.prequential.scores()
    chance = rng.bit_generator.state
    feed(goes_on)
    rng.bit_generator.state = chance
    feed(restored)
    assert restored.prequential.scores() == goes_on.prequential.scores()
    assert restored.evidence == goes_on.evidence


def test_the_scores_outlive_the_alarm():
    detector = monitor()
    detector.update_rows(np.zeros(100, dtype=bool))
    detector.reset()
    assert detector.prequential.scores()["accuracy"] == 0


@pytest.mark.parametrize("labels", [("a",), tuple("abcd")])
def test_the_state_of_other_labels_is_refused(labels):
    with pytest.raises(ValueError, match="other scores"):
        Prequential(LABELS).restore(Prequential(labels).state())


def test_a_damaged_state_is_refused_and_changes_nothing():
    prequential = Prequential(LABELS)
    prequential.update(np.ones(3, dtype=bool), slices=["x"] * 3)
    state, before = prequential.state(), prequential.scores()
    for damage in ({"names": state["names"][:-1]}, {"seen": state["seen"][:1]}, {"gaps": np.zeros(3)}):
        with pytest.raises(ValueError):
            prequential.restore({**state, **damage})
    assert prequential.scores() == before


@pytest.mark.parametrize("name", ["truths", "said", "confidence", "losses"])
def test_arrays_of_another_length_are_refused_and_nothing_is_added(name):
    prequential = Prequential(LABELS)
    with pytest.raises(ValueError, match=f"2 {name} for 3 rows"):
        prequential.update(np.ones(3, dtype=bool), **{name: np.zeros(2)})
    with pytest.raises(ValueError, match="1 slices for 3 rows"):
        prequential.update(np.ones(3, dtype=bool), slices=["x"])
    assert prequential.scores()["rows"] == 0


def test_state_stays_small_and_flat(rng):
    detector = PerformanceMonitor(0.9, 500, run_length=1e4, labels=[f"label {i}" for i in range(64)])
    sizes = []
    for _ in range(6):
        truths = rng.integers(0, 64, 500)
        names = [f"slice {i}" for i in rng.integers(0, 500, 500)]
        detector.update_rows(truths == 0, truths=truths, said=np.zeros(500, np.int64), slices=names)
        sizes.append(sum(array.nbytes for array in detector.state().values()))
    assert max(sizes) < 72_000
    assert max(sizes) - min(sizes) < 100  # names differ in length


@pytest.mark.parametrize("fading", [0.0, 1.0, -1.0, 2.0])
def test_impossible_fading_is_refused(fading):
    with pytest.raises(ValueError, match="fading"):
        Prequential(LABELS, fading=fading)
