"""All monitors together: one budget, a new reference after a change, evidence that survives a restart."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.drift.monitors import NAMES, DriftMonitors
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import IntegrityError
from edge_sdk.files import pack_arrays, unpack_arrays

LABELS = ("a", "b", "c")
ELEVEN = tuple("abcdefghijk")


def inputs(rng, count, *, shift=0.0, spread=1.0, missing=0.0):
    x = rng.normal(shift, spread, (count, 4)).astype(np.float32)
    x[rng.random(x.shape) < missing] = np.nan
    return x


def latents(rng, count, *, bright=0):
    return (rng.integers(0, 100, (count, 16)) + bright).astype(np.uint8)


def outputs(rng, count, *, favour=0, labels=3):
    weights = np.ones(labels)
    weights[favour] += 2
    return rng.dirichlet(weights, count).astype(np.float32)


def outcomes(rng, count, *, accuracy=0.9):
    return rng.random(count) < accuracy


@pytest.fixture
def reference(rng):
    return Reference.build(
        inputs(rng, 2_000), outputs(rng, 2_000), outcomes(rng, 2_000), names=["x1", "x2", "x3", "x4"],
        latents=latents(rng, 2_000),
    )  # fmt: skip


@pytest.fixture
def plain(rng):
    """Monitors of a table: there is no model."""
    reference = Reference.from_rows(inputs(rng, 1_000), ["x1", "x2", "x3", "x4"])
    return DriftMonitors(reference, (), run_length=2_000.0, rereference_rows=300)


@pytest.fixture
def monitors(reference):
    return make(reference)


def make(reference, *, labels=LABELS, run_length=2_000.0, rereference_rows=300):
    return DriftMonitors(reference, labels, run_length=run_length, rereference_rows=rereference_rows)


def fold(monitors, rng, count, *, favour=0, labels=3, bright=0, **change):
    """A block of predictions."""
    x, p = inputs(rng, count, **change), outputs(rng, count, favour=favour, labels=labels)
    monitors.fold(x, p, latents(rng, count, bright=bright))


def live(monitors, rng, blocks=10, *, accuracy=0.9, **change):
    """Blocks of 32 predictions, 10 of each labelled."""
    for _ in range(blocks):
        fold(monitors, rng, 32, **change)
        monitors.fold_labels(outcomes(rng, 10, accuracy=accuracy))


def names(alarms):
    return [alarm.monitor for alarm in alarms]


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
        monitors = make(Reference.build(x, draw(rows), outcomes(rng, 300)), labels=ELEVEN, run_length=run_length)
        count = 0
        while count < 4 * run_length and not monitors.detectors["output"].drift_detected:
            monitors.fold(x[:40], draw(40))
            count += 40
        lengths.append(count)
    assert sum(length < run_length for length in lengths) <= 0.1 * runs


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


def test_the_monitors_share_the_budget(monitors, plain):
    assert list(monitors.detectors) == list(NAMES)
    assert list(plain.detectors) == ["input", "quality"]
    for each in (monitors, plain):
        bounded = sum(1 / detector.threshold for detector in each.detectors.values())
        tests = [watched.detector.steps for watched in each.watched.values() if watched.detector.steps is not None]
        assert bounded == pytest.approx(1 / 2_000)
        assert sum(1 / test.threshold for test in tests) == pytest.approx((0.9 if each is monitors else 0.55) / 2_000)


@pytest.mark.parametrize(
    ("change", "monitor", "suspect", "kind"),
    [
        ({"shift": 1.0}, "input", "x", "covariate"),
        ({"spread": 2.5}, "input", "spread of x", "covariate"),
        ({"missing": 0.3}, "quality", ": missing", "quality"),
        ({"favour": 1}, "output", "probability of 'b'", "covariate"),
        ({"bright": 40}, "latent", "latent projection", "covariate"),
        ({"accuracy": 0.5}, "accuracy", "error rate", "concept"),
    ],
    ids=["input", "spread", "quality", "output", "latent", "accuracy"],
)
def test_a_change_is_seen_by_its_monitor_which_names_it(monitors, rng, change, monitor, suspect, kind):
    live(monitors, rng, 20)
    assert monitors.alarms() == []
    assert monitors.diagnosis() is None
    live(monitors, rng, 30, **change)
    alarm = next(alarm for alarm in monitors.alarms() if alarm.monitor == monitor)
    assert monitor in monitors.warnings()
    assert alarm.threshold == 10_000
    assert any(suspect in name for name, _ in alarm.suspects)
    assert monitors.diagnosis().kind == kind
    assert monitors.diagnosis().words


def test_accuracy_that_rises_is_told_as_an_improvement(reference, rng):
    monitors = make(replace(reference, accuracy=0.6))
    live(monitors, rng, 60, accuracy=1.0)
    assert names(monitors.alarms()) == ["accuracy"]
    assert monitors.improved
    worse = make(replace(reference, accuracy=0.6))
    live(worse, rng, 60, accuracy=0.2)
    assert names(worse.alarms()) == ["accuracy"]
    assert not worse.improved


def test_after_a_rereference_the_new_normal_is_learned_and_departures_from_it_raise_alarms_again(monitors, rng):
    shifted = {"shift": 0.4, "favour": 1, "accuracy": 0.5, "bright": 40}
    live(monitors, rng, 30, **shifted)
    assert {"latent", "output", "accuracy"} <= set(names(monitors.alarms()))

    monitors.rereference(LABELS)
    assert monitors.collecting == {"input", "latent", "output", "accuracy"}
    assert set(names(monitors.alarms())) <= {"quality"}
    live(monitors, rng, 9, **shifted)
    assert monitors.collecting == {"input", "latent", "output", "accuracy"}
    live(monitors, rng, 1, **shifted)
    assert monitors.collecting == set()

    live(monitors, rng, 20, **shifted)
    assert set(names(monitors.alarms())) <= {"quality"}
    live(monitors, rng, 60, favour=2, accuracy=0.05)
    assert {"input", "latent", "output", "accuracy"} <= set(names(monitors.alarms()))


def test_rows_and_labels_are_adopted_independently(monitors, rng):
    monitors.rereference(LABELS)
    for _ in range(10):
        fold(monitors, rng, 32)
    assert monitors.collecting == {"accuracy"}
    monitors.fold_labels(outcomes(rng, 100))
    assert monitors.collecting == set()


def test_collecting_keeps_sums_and_no_rows(monitors, rng):
    monitors.rereference(LABELS)
    sizes = set()
    for _ in range(9):
        live(monitors, rng, 1, shift=1.0, favour=2, accuracy=0.0)
        assert set(names(monitors.alarms())) <= {"quality"}
        sizes.add(len(monitors.to_bytes()))
    assert max(sizes) - min(sizes) < 4_000  # counts take more digits


def test_monitors_grow_with_the_labels(monitors, rng):
    monitors.rereference((*LABELS, "d"))
    live(monitors, rng, 12, labels=4)
    assert monitors.collecting == set()
    assert len(monitors.watched["output"].mean) == 6
    live(monitors, rng, 20, labels=4, favour=3)
    alarm = next(alarm for alarm in monitors.alarms() if alarm.monitor == "output")
    assert "probability of 'd'" in dict(alarm.suspects)


def test_an_alarm_is_cleared_once_it_has_been_quiet_for_long(monitors, rng):
    cleared = []
    for block in range(160):
        live(monitors, rng, 1, favour=1 if block < 100 else 0)
        if names(monitors.alarms()) == ["output"] and monitors.clear(640):
            cleared.append(block)
    (block,) = cleared  # not while the change lasts, and once it is over
    assert 119 <= block <= 135
    assert monitors.alarms() == []


def test_accuracy_is_estimated_without_labels_unless_something_is_not_as_it_was(monitors, rng):
    assert monitors.estimate() == (None, "too few predictions")
    live(monitors, rng, 20)
    value, why = monitors.estimate()
    assert (value, why) == (pytest.approx(0.9, abs=0.05), "")
    live(monitors, rng, 20, shift=1.0)
    assert monitors.estimate()[0] is None
    assert monitors.estimate()[1].endswith("is not as it was")


def test_running_scores_outlive_a_rereference_with_the_same_labels(monitors, rng):
    live(monitors, rng, 20)
    assert monitors.accuracy == pytest.approx(0.9, abs=0.08)
    monitors.rereference(LABELS)
    assert monitors.accuracy == pytest.approx(0.9, abs=0.08)


def test_season_of_the_day_is_learned_and_taken_out(rng):
    reference = Reference.build(inputs(rng, 1_000), outputs(rng, 1_000), outcomes(rng, 300))
    known, blind = make(reference, run_length=5_000.0), make(reference, run_length=5_000.0)
    raised = {"known": 0, "blind": 0}
    for block in range(6 * 45):
        times = (block * 32 + np.arange(32)) * 60.0
        x = inputs(rng, 32) + 0.5 * np.sin(times / 86_400 * 2 * np.pi)[:, None].astype(np.float32)
        p = outputs(rng, 32)
        known.fold(x, p, None, times)
        blind.fold(x, p)
        if block >= 3 * 45:
            for name, each in {"known": known, "blind": blind}.items():
                raised[name] += "input" in names(each.alarms())
                if "input" in names(each.alarms()):
                    each.detectors["input"].reset()
        elif block == 3 * 45 - 1:
            known.detectors["input"].reset()
    assert raised["known"] <= 1 < raised["blind"]


def assert_same_state(one, other):
    first, second = unpack_arrays(one.to_bytes()), unpack_arrays(other.to_bytes())
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


@pytest.mark.parametrize("moment", ["quiet", "alarmed", "collecting", "half collected", "adopted"])
def test_a_restart_continues_exactly(monitors, reference, rng, moment):
    live(monitors, rng, 8, shift=1.0 if moment == "alarmed" else 0.1)
    if moment in ("collecting", "half collected", "adopted"):
        monitors.rereference((*LABELS, "d"))
    labels = 3 if moment in ("quiet", "alarmed") else 4
    live(monitors, rng, {"half collected": 7, "adopted": 14}.get(moment, 0), labels=labels)
    if moment == "half collected":
        monitors.fold_labels(outcomes(rng, 40))

    restored = make(reference)
    restored.restore(monitors.to_bytes())

    assert restored.collecting == monitors.collecting
    assert_same_state(restored, monitors)
    for number in range(12):
        rows = [np.random.default_rng([number, part]) for part in (1, 1)]
        for each, own in zip((monitors, restored), rows, strict=True):
            live(each, own, 1, shift=0.4, labels=labels)
    assert_same_state(restored, monitors)
    assert restored.alarms() == monitors.alarms()
    assert restored.warnings() == monitors.warnings()


def damaged(data, how):
    arrays = unpack_arrays(data)
    if how == "cut off":
        return data[:-100]
    if how == "another width":
        arrays["output.detector.m"] = arrays["output.detector.m"][:, :-1]
    elif how == "other numbers":
        arrays["accuracy.scalars"] = np.zeros(9)
    elif how == "another reference":
        arrays["reference"] = np.zeros(16, np.uint8)
    else:
        del arrays[how]
    return pack_arrays(arrays)


@pytest.mark.parametrize(
    "how", ["cut off", "input.detector.m", "reference", "labels", "another width", "other numbers", "another reference"]
)
def test_a_damaged_state_is_refused_and_the_monitors_go_on_as_they_were(monitors, rng, how):
    live(monitors, rng, 4)
    before = monitors.to_bytes()
    with pytest.raises(IntegrityError):
        monitors.restore(damaged(before, how))
    assert monitors.to_bytes() == before


def test_state_stays_small_over_many_rows(rng):
    reference = Reference.from_rows(rng.normal(size=(300, 64)).astype(np.float32), [f"x{i}" for i in range(64)])
    monitors = DriftMonitors(reference, (), run_length=1e5, rereference_rows=300)
    none = np.zeros((32, 0), np.float32)
    monitors.fold(rng.normal(size=(32, 64)).astype(np.float32), none)
    size = len(monitors.to_bytes())
    for _ in range(200):
        monitors.fold(rng.normal(size=(32, 64)).astype(np.float32), none)
    assert len(monitors.to_bytes()) < size + 600
    assert size <= 72_000
    assert len(pack_arrays(monitors.watched["input"].state())) < 56_000
