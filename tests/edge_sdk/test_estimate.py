"""Accuracy estimated from confidences: monotone, bounded, and exact on the rows it was fitted to."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.drift.estimate import MAX_STEPS, estimate, fit_confidence

ROWS = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=300)


@given(ROWS)
def test_the_table_rises_is_bounded_and_keeps_the_mean(rows):
    confidence, right = np.array([c for c, _ in rows]), np.array([r for _, r in rows])
    table = fit_confidence(confidence, right)
    assert table.shape[0] == 2
    assert table.shape[1] <= MAX_STEPS
    assert (np.diff(table, axis=1) > 0).all()
    assert table[1].min() >= 0
    assert table[1].max() <= 1
    assert estimate(table, confidence) == pytest.approx(right.mean(), abs=1e-6)


def test_neighbours_that_violate_the_order_are_pooled():
    table = fit_confidence(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, True, False, True]))
    np.testing.assert_allclose(table, [[0.1, 0.2, 0.4], [0, 0.5, 1]])


def test_overconfidence_is_corrected(rng):
    confidence = rng.uniform(0.5, 1.0, 20_000)
    table = fit_confidence(confidence, rng.random(20_000) < confidence - 0.2)
    assert estimate(table, np.full(10, 0.9)) == pytest.approx(0.7, abs=0.06)
    live = rng.uniform(0.5, 0.7, 5_000)
    assert estimate(table, live) == pytest.approx(0.4, abs=0.03)


def test_confidences_beyond_the_table_take_its_ends():
    table = fit_confidence(np.array([0.4, 0.6]), np.array([False, True]))
    assert estimate(table, np.array([0.0, 1.0])) == 0.5


def test_nothing_is_known_without_confidences():
    table = fit_confidence(np.array([0.4, 0.6]), np.array([False, True]))
    assert math.isnan(estimate(table, np.array([])))
    assert math.isnan(estimate(table, np.array([np.nan])))
    assert estimate(table, np.array([np.nan, 0.7])) == 1
