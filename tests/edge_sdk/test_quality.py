"""Broken data: what is missing, out of range, unseen, frozen or in another unit is noticed and told in words."""

import re

import numpy as np
import pytest

from edge_sdk.drift.quality import QualityMonitor, unit_change
from edge_sdk.drift.reference import Reference

NAMES = ("acc_x", "acc_y", "site")
SITES = (0.0, 1.0, 2.0)


def rows(rng, count, **changes):
    x = np.stack([rng.normal(size=count), rng.normal(5, 2, count), rng.choice([0, 1, 2], count)], axis=1)
    for name, values in changes.items():
        x[:, NAMES.index(name)] = values
    return x.astype(np.float32)


def make(rng, *, ordered=True, run_length=10_000.0, **changes):
    reference = Reference.from_rows(rows(rng, 1000, **changes), NAMES, categories={"site": SITES}, ordered=ordered)
    return QualityMonitor(reference, run_length=run_length)


@pytest.fixture
def monitor(rng):
    return make(rng)


def rows_until_alarm(monitor, rng, most=2_000, **changes):
    for count in range(0, most, 8):
        if monitor.drift_detected:
            return count
        monitor.update(rows(rng, 8, **changes))
    return most


@pytest.mark.parametrize(
    ("changes", "within", "words"),
    [
        ({"acc_x": np.nan}, 40, r"acc_x: \d+ % of the values missing \(usually 0 %\)"),
        ({"acc_y": 1000}, 40, r"acc_y: \d+ % of the values outside -?\d.* to \d.* \(usually 0 %\)"),
        ({"site": -1}, 40, r"site: \d+ % of the values of an unseen category \(usually 0 %\)"),
        ({"acc_x": 0.25}, 120, r"acc_x: \d+ % of the values the same as the one before \(usually 0 %\)"),
    ],
    ids=["missing", "out of range", "unseen category", "frozen"],
)
def test_broken_values_raise_an_alarm_at_once_which_says_what_is_wrong(monitor, rng, changes, within, words):
    monitor.update(rows(rng, 320))
    assert not monitor.warning
    assert rows_until_alarm(monitor, rng, **changes) <= within
    finding = monitor.findings()[0]
    assert re.fullmatch(words, f"{finding.feature}: {finding.words}")
    channel, rise = monitor.suspects()[0]
    assert monitor.names[channel].startswith(next(iter(changes)))
    assert rise > 0


def test_a_tenth_of_values_missing_is_noticed(monitor, rng):
    count = 0
    while not monitor.drift_detected and count < 800:
        monitor.update(rows(rng, 8, acc_x=np.where(rng.random(8) < 0.1, np.nan, 0.5 + rng.normal(size=8))))
        count += 8
    assert count < 400


def test_usual_values_raise_no_alarm(rng):
    lengths = []
    for _ in range(20):
        monitor = make(rng, run_length=1_000.0, acc_x=np.where(rng.random(1000) < 0.1, np.nan, rng.normal(size=1000)))
        count = 0
        while not monitor.drift_detected and count < 3_000:
            monitor.update(rows(rng, 30, acc_x=np.where(rng.random(30) < 0.1, np.nan, rng.normal(size=30))))
            count += 30
        lengths.append(count)
    assert np.mean(lengths) >= 1_000


def test_a_frozen_sensor_is_noticed_though_the_reference_has_no_order(rng):
    monitor = make(rng, ordered=False)
    assert "site: the same as the one before" not in monitor.names  # takes few values: it may well repeat
    assert rows_until_alarm(monitor, rng, acc_y=3.5) <= 300
    assert "usually" not in monitor.findings()[0].words


def test_a_value_that_always_was_the_same_may_stay_so(rng):
    monitor = make(rng, acc_x=1.0)
    assert rows_until_alarm(monitor, rng, most=800, acc_x=1.0) == 800
    assert rows_until_alarm(monitor, rng, acc_x=1.5) <= 40


def test_what_was_always_missing_has_no_range(rng):
    monitor = make(rng, acc_x=np.nan)
    assert rows_until_alarm(monitor, rng, most=400, acc_x=np.nan) == 400
    monitor.update(rows(rng, 400))
    assert not monitor.drift_detected


def test_one_block_or_many_give_the_same_state(rng):
    stream = rows(rng, 300)
    stream[100:200, 1] = 3
    stream[150:160, 0] = np.nan
    reference = Reference.from_rows(rows(rng, 1000), NAMES, categories={"site": SITES})
    whole, parts = QualityMonitor(reference, run_length=1e6), QualityMonitor(reference, run_length=1e6)
    whole.update(stream)
    for block in np.split(stream, [0, 1, 50, 97, 150, 151]):
        parts.update(block)
    for key, array in whole.state().items():
        np.testing.assert_allclose(parts.state()[key], array, rtol=1e-4)
    assert whole.drift_detected == parts.drift_detected


def test_evidence_survives_a_restart_and_is_forgotten_on_reset(monitor, rng):
    fresh = {key: array.copy() for key, array in monitor.state().items()}
    monitor.update(rows(rng, 20, acc_x=np.nan))
    assert monitor.drift_detected
    other = make(np.random.default_rng(0))
    other.restore(monitor.state())
    assert other.drift_detected
    assert other.evidence == monitor.evidence
    assert (other.threshold, other.quiet_rows) == (10_000, monitor.quiet_rows)
    monitor.update(rows(rng, 100))
    assert monitor.drift_detected
    monitor.reset()
    for key, array in fresh.items():
        np.testing.assert_array_equal(monitor.state()[key], array)


def test_rows_and_states_of_another_width_are_refused(monitor, rng):
    with pytest.raises(ValueError, match="rows of 3 features"):
        monitor.update(np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="monitor of 3"):
        monitor.restore({**monitor.state(), "last": np.zeros(2, np.float32)})


# ---- units


LEVELS = np.arange(1, 16) / 16


def reference_of(values):
    return Reference.from_rows(np.asarray(values, np.float32)[:, None], ["oven"])


@pytest.mark.parametrize(
    ("draw", "convert", "after", "before"),
    [
        (lambda rng, n: rng.normal(20, 5, n), lambda c: 1.8 * c + 32, "degrees Fahrenheit", "degrees Celsius"),
        (lambda rng, n: rng.normal(68, 9, n), lambda f: (f - 32) / 1.8, "degrees Celsius", "degrees Fahrenheit"),
        (lambda rng, n: rng.normal(20, 5, n), lambda c: c + 273.15, "kelvin", "degrees Celsius"),
        (lambda rng, n: rng.normal(0, 1, n), lambda g: 9.80665 * g, "metres per second squared", "g"),
        (lambda rng, n: rng.gamma(4, 2, n), lambda m: m / 0.3048, "feet", "metres"),
        (lambda rng, n: rng.normal(250, 20, n), lambda k: k / 100, "bar", "kilopascal"),
        (lambda rng, n: rng.normal(2.5, 0.2, n), lambda b: 14.5038 * b, "psi", "bar"),
        (lambda rng, n: rng.uniform(-180, 180, n), np.radians, "radians", "degrees"),
        (lambda rng, n: rng.normal(5, 1, n), lambda v: 1000 * v, "thousandths", "whole units"),
        (lambda rng, n: rng.uniform(0, 1, n), lambda p: 255 * p, "0 to 255", "0 to 1"),
    ],
)  # fmt: skip
def test_a_change_of_unit_is_recognised(rng, draw, convert, after, before):
    live = np.quantile(convert(draw(rng, 200)), LEVELS)
    words = f"oven: values look like {after}, no longer like {before}"
    assert unit_change(reference_of(draw(rng, 1000)), live[None]) == words


@pytest.mark.parametrize(
    "change",
    [lambda v: v, lambda v: v + 5, lambda v: 1.4 * v, lambda v: v + 80],
    ids=["none", "by 5", "by 1.4 times", "by 80"],
)
def test_what_is_no_change_of_unit_is_not_taken_for_one(rng, change):
    live = np.quantile(change(rng.normal(20, 5, 200)), LEVELS)
    assert unit_change(reference_of(rng.normal(20, 5, 1000)), live[None]) is None


def test_a_wider_spread_about_zero_is_no_change_of_unit(rng):
    live = np.quantile(rng.normal(0, 3.28, 200), LEVELS)
    assert unit_change(reference_of(rng.normal(0, 1, 1000)), live[None]) is None


def test_features_without_quantiles_or_spread_are_left_out(rng):
    assert unit_change(reference_of(rng.normal(20, 5, 1000)), np.full((1, 15), np.nan)) is None
    assert unit_change(reference_of(np.ones(200)), np.full((1, 15), 1000.0)) is None
