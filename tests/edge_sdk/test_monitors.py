"""All monitors together: one budget, a new reference after a change, evidence that survives a restart."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.drift.monitors import NAMES, DriftMonitors, input_names
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes

LABELS = ("a", "b", "c")


def inputs(rng, count, *, shift=0.0):
    return rng.normal(shift, 1.0, (count, 4)).astype(np.float32)


def outputs(rng, count, *, favour=0, labels=3):
    weights = np.ones(labels)
    weights[favour] += 2
    return rng.dirichlet(weights, count).astype(np.float32)


def outcomes(rng, count, *, accuracy=0.9):
    return rng.random(count) < accuracy


@pytest.fixture
def reference(rng):
    return Reference.build(inputs(rng, 1_000), outputs(rng, 1_000), outcomes(rng, 300))


@pytest.fixture
def monitors(reference):
    return make(reference)


def make(reference, *, run_length=2_000.0, rereference_rows=300):
    return DriftMonitors(reference, LABELS, run_length=run_length, rereference_rows=rereference_rows)


def live(monitors, rng, blocks=10, *, shift=0.0, favour=0, accuracy=0.9, labels=3):
    """Blocks of 32 predictions, 10 of each labelled."""
    for _ in range(blocks):
        monitors.fold(inputs(rng, 32, shift=shift), outputs(rng, 32, favour=favour, labels=labels))
        monitors.fold_labels(outcomes(rng, 10, accuracy=accuracy))


def names(alarms):
    return [alarm.monitor for alarm in alarms]


def test_the_monitors_share_the_budget(monitors):
    assert set(monitors.detectors) == set(NAMES)
    assert sum(1 / detector.threshold for detector in monitors.detectors.values()) == pytest.approx(1 / 2_000)


def test_false_alarms_of_all_monitors_together_keep_the_budget():
    """Every run has its own reference, and a label that comes with one row in a hundred."""
    run_length, runs = 600, 40
    lengths = []
    for seed in range(runs):
        rng = np.random.default_rng([5, seed])

        def draw(count, rng=rng):
            return np.eye(3, dtype=np.float32)[rng.choice(3, count, p=[0.7, 0.29, 0.01])]

        reference = Reference.build(inputs(rng, 300), draw(300), outcomes(rng, 300))
        monitors = make(reference, run_length=run_length)
        rows = 0
        while rows < 4 * run_length and not monitors.alarms():
            monitors.fold(inputs(rng, 32), draw(32))
            monitors.fold_labels(outcomes(rng, 32))
            rows += 32
        lengths.append(rows)
    assert np.mean(lengths) >= run_length


@pytest.mark.parametrize("rows", [200, 300])
def test_labels_that_the_reference_never_saw_keep_the_budget(rows):
    """Ten labels of one row in a hundred each: a short reference lacks some, and thinks others rarer than they are."""
    run_length, runs = 600, 60
    lengths = []
    for seed in range(runs):
        rng = np.random.default_rng([rows, seed])

        def draw(count, rng=rng):
            return np.eye(11, dtype=np.float32)[rng.choice(11, count, p=[0.9] + [0.01] * 10)]

        x = np.zeros((rows, 4), np.float32)
        monitors = make(Reference.build(x, draw(rows), outcomes(rng, 300)), run_length=run_length)
        count = 0
        while count < 4 * run_length and not monitors.detectors["output"].drift_detected:
            monitors.fold(x[:40], draw(40))
            count += 40
        lengths.append(count)
    assert sum(length < run_length for length in lengths) <= 0.1 * runs


@pytest.mark.parametrize(
    ("change", "monitor", "suspect"),
    [
        ({"shift": 1.0}, "input", "feature "),
        ({"favour": 1}, "output", "probability of 'b'"),
        ({"accuracy": 0.5}, "accuracy", "error rate"),
    ],
    ids=NAMES,
)
def test_a_change_is_seen_by_its_monitor_which_names_it(monitors, rng, change, monitor, suspect):
    live(monitors, rng, 20)
    assert monitors.alarms() == []
    live(monitors, rng, 20, **change)
    (alarm,) = monitors.alarms()
    assert alarm.monitor == monitor
    assert monitor in monitors.warnings()
    assert alarm.evidence >= alarm.threshold == 6_000
    assert any(name.startswith(suspect) and shift > 0 for name, shift in alarm.suspects)


def test_better_accuracy_is_no_alarm(monitors, rng):
    live(monitors, rng, 60, accuracy=1.0)
    assert monitors.alarms() == []


def test_without_a_known_accuracy_the_accuracy_monitor_stays_calm(reference, rng):
    monitors = make(replace(reference, accuracy=math.nan, labelled=0))
    live(monitors, rng, 30, accuracy=0.3)
    assert monitors.alarms() == []


def test_nothing_to_fold_changes_nothing(monitors, rng):
    live(monitors, rng, 3)
    before = monitors.to_bytes()
    monitors.fold(inputs(rng, 0), outputs(rng, 0))
    monitors.fold_labels(np.zeros(0, dtype=bool))
    assert monitors.to_bytes() == before


def test_after_a_rereference_the_new_normal_is_learned_and_departures_from_it_raise_alarms_again(monitors, rng):
    live(monitors, rng, 20, shift=1.0, favour=1, accuracy=0.5)
    assert names(monitors.alarms()) == list(NAMES)

    monitors.rereference(LABELS)
    assert monitors.collecting == set(NAMES)
    assert monitors.alarms() == []
    live(monitors, rng, 9, shift=1.0, favour=1, accuracy=0.6)
    assert monitors.collecting == {"input", "output", "accuracy"}
    live(monitors, rng, 1, shift=1.0, favour=1, accuracy=0.6)
    assert monitors.collecting == set()
    assert monitors.reference.rows == 320
    assert monitors.reference.labelled == 100

    live(monitors, rng, 20, shift=1.0, favour=1, accuracy=0.6)
    assert monitors.alarms() == []
    live(monitors, rng, 40, shift=0.0, favour=2, accuracy=0.1)
    assert names(monitors.alarms()) == list(NAMES)


def test_rows_and_labels_are_adopted_independently(monitors, rng):
    monitors.rereference(LABELS)
    for _ in range(10):
        monitors.fold(inputs(rng, 32), outputs(rng, 32))
    assert monitors.collecting == {"accuracy"}
    assert monitors.detectors["input"].evidence == 0
    monitors.fold(inputs(rng, 32), outputs(rng, 32))
    evidence = monitors.detectors["input"].evidence
    assert evidence > 0
    monitors.fold_labels(outcomes(rng, 100))
    assert monitors.collecting == set()
    assert monitors.detectors["input"].evidence == evidence


def test_collecting_is_bounded_and_raises_no_alarm(monitors, rng):
    monitors.rereference(LABELS)
    sizes = []
    for _ in range(9):
        live(monitors, rng, 1, shift=3.0, favour=2, accuracy=0.0)
        assert monitors.alarms() == []
        sizes.append(len(monitors.to_bytes()))
    live(monitors, rng, 1)
    assert len(monitors.to_bytes()) < sizes[-1]


def test_monitors_grow_with_the_labels(monitors, rng):
    grown = (*LABELS, "d")
    monitors.rereference(grown)
    live(monitors, rng, 12, labels=4)
    assert monitors.collecting == set()
    assert len(monitors.reference.output_mean) == 6
    live(monitors, rng, 20, labels=4, favour=3)
    (alarm,) = monitors.alarms()
    assert alarm.monitor == "output"
    assert "probability of 'd'" in dict(alarm.suspects)


def test_a_new_bases_reference_is_taken_over(monitors, rng):
    other = Reference.build(inputs(rng, 500, shift=2.0), outputs(rng, 500, labels=5), outcomes(rng, 300))
    monitors.rereference(tuple("abcde"), other)
    np.testing.assert_array_equal(monitors.reference.edges, other.edges)
    live(monitors, rng, 20, shift=2.0, labels=5)
    assert monitors.collecting == set()
    assert monitors.alarms() == []


@pytest.mark.parametrize("moment", ["quiet", "alarmed", "collecting", "half collected", "adopted"])
def test_a_restart_continues_exactly(monitors, reference, rng, moment):
    live(monitors, rng, 8, shift=1.0 if moment == "alarmed" else 0.1)
    if moment in ("collecting", "half collected", "adopted"):
        monitors.rereference((*LABELS, "d"))
    labels = 3 if moment in ("quiet", "alarmed") else 4
    live(monitors, rng, {"half collected": 7, "adopted": 14}.get(moment, 0), labels=labels)
    if moment == "half collected":
        monitors.fold_labels(outcomes(rng, 40))
        assert monitors.collecting == {"input", "output"}

    restored = make(reference)
    restored.restore(monitors.to_bytes())

    assert restored.collecting == monitors.collecting
    assert restored.to_bytes() == monitors.to_bytes()
    for _ in range(12):
        x, p, correct = inputs(rng, 32, shift=0.4), outputs(rng, 32, labels=labels), outcomes(rng, 10)
        for each in (monitors, restored):
            each.fold(x, p)
            each.fold_labels(correct)
    assert restored.to_bytes() == monitors.to_bytes()
    assert restored.alarms() == monitors.alarms()
    assert restored.warnings() == monitors.warnings()


def damaged(data, how):
    arrays = load_npz(data)
    if how == "cut off":
        return data[:-100]
    if how == "another width":
        arrays["output.m"] = arrays["output.m"][:-1]
    elif how == "other numbers":
        arrays["accuracy.scalars"] = np.zeros(5)
    else:
        del arrays[how]
    return npz_bytes(arrays)


@pytest.mark.parametrize("how", ["cut off", "input.m", "reference", "labels", "another width", "other numbers"])
def test_a_damaged_state_is_refused_and_the_monitors_go_on_as_they_were(monitors, rng, how):
    live(monitors, rng, 4)
    before = monitors.to_bytes()
    with pytest.raises(IntegrityError):
        monitors.restore(damaged(before, how))
    assert monitors.to_bytes() == before


def test_state_stays_small_over_many_rows(rng):
    reference = Reference.build(
        rng.normal(size=(300, 62)).astype(np.float32), outputs(rng, 300, labels=10), outcomes(rng, 300)
    )
    monitors = DriftMonitors(reference, tuple("abcdefghij"), run_length=1e5, rereference_rows=300)
    monitors.fold(rng.normal(size=(32, 62)).astype(np.float32), outputs(rng, 32, labels=10))
    size = len(monitors.to_bytes())
    for _ in range(200):
        monitors.fold(rng.normal(size=(32, 62)).astype(np.float32), outputs(rng, 32, labels=10))
    assert len(monitors.to_bytes()) == size <= 72_000


def test_every_input_channel_has_a_name(reference):
    assert input_names(reference) == [f"feature {i}" for i in range(4)]
