"""Limits suggested from normal rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_sdk.drift.limits import suggest
from edge_sdk.schema import Column

RUN_LENGTH = 100_000.0


def limits_of(rows, **options):
    column = Column("x", **options)
    return suggest(np.asarray(rows, np.float32)[:, None], [column], run_length=RUN_LENGTH)[0]


@given(
    arrays.arrays(
        np.float32, st.integers(200, 400), elements=st.floats(-1e6, 1e6, width=32) | st.just(np.float32("nan"))
    )
)
def test_what_was_seen_lies_within_what_is_suggested(values):
    found = limits_of(values)
    known = values[~np.isnan(values)]
    if found.column.low is not None:
        assert found.column.low <= known.min()
        assert found.column.high >= known.max()
    assert found.most_missing >= 0
    assert found.frozen_rows == 0 or found.frozen_rows > found.longest


@pytest.mark.parametrize("draw", ["normal", "exponential", "uniform", "standard_t"])
def test_fresh_normal_rows_break_a_range_about_as_rarely_as_the_budget_says(draw, rng):
    def sample(count):
        return rng.standard_t(4, count) if draw == "standard_t" else getattr(rng, draw)(size=count)

    column = limits_of(sample(3000)).column
    fresh = sample(1_000_000)
    broken = ((fresh < column.low) | (fresh > column.high)).mean()
    assert broken * RUN_LENGTH <= 15  # a guess far beyond what was seen; without it there would be 30


def test_an_end_at_which_values_pile_up_is_a_limit_of_the_sensor(rng):
    column = limits_of(np.clip(rng.normal(0, 1, 2000), -1.5, 1.5)).column
    assert (column.low, column.high) == (-1.5, 1.5)


def test_what_is_never_below_zero_but_near_it_is_not_expected_below_zero(rng):
    assert limits_of(rng.exponential(1, 2000)).column.low == 0
    assert limits_of(100 + rng.exponential(1, 2000)).column.low < 100


def test_what_never_changed_gets_no_range_and_no_frozen_length():
    found = limits_of(np.full(500, 7.0))
    assert (found.column.low, found.column.high, found.frozen_rows) == (None, None, 0)
    assert limits_of(np.full(500, np.nan)).missing == 1


def test_the_rarer_equal_neighbours_are_the_shorter_a_frozen_sensor_takes_to_see(rng):
    coarse, fine = limits_of(rng.integers(0, 2, 2000)), limits_of(rng.integers(0, 50, 2000))
    assert 2 < fine.frozen_rows < coarse.frozen_rows < 60


def test_more_missing_is_allowed_where_more_was_missing(rng):
    values = rng.normal(0, 1, 2000)
    never = limits_of(values)
    often = limits_of(np.where(rng.random(2000) < 0.1, np.nan, values))
    assert never.most_missing < 10
    assert 25 < often.most_missing < 128


def test_a_category_has_its_values_and_no_range():
    found = limits_of([0, 1, 1, 2] * 100, kind="category", values=["a", "b", "c"])
    assert (found.column.low, found.column.values, found.middle) == (None, ["a", "b", "c"], 1.0)
