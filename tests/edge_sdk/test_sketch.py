"""The quantile sketch: its error is bounded, its size too, and adding sketches is counting all values."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.sketch import ACCURACY, MAX_BUCKETS, QuantileSketch

VALUES = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 100.0)), max_size=60)
WIDE = st.lists(st.one_of(st.just(0.0), st.floats(0, 1e300)), max_size=60)


def sketch_of(values):
    sketch = QuantileSketch()
    sketch.add(np.array(values, dtype=np.float64))
    return sketch


@given(VALUES.filter(bool), st.floats(0, 1))
def test_a_quantile_is_within_its_relative_error(values, q):
    exact = np.quantile(values, q, method="lower")
    assert sketch_of(values).quantile(q) == pytest.approx(exact, rel=ACCURACY + 1e-9, abs=0)


@given(WIDE, WIDE, WIDE)
def test_sketches_added_in_any_order_are_the_sketch_of_all_values(a, b, c):
    merged = sketch_of(c)
    for part in (a, b):
        merged.merge(sketch_of(part))
    assert merged.to_wire() == sketch_of(a + b + c).to_wire()
    assert merged.count == len(a + b + c)


def test_values_of_any_range_take_bounded_room_and_high_quantiles_stay_exact(rng):
    values = 10 ** rng.uniform(-8, 200, 20_000)
    whole, parts = sketch_of(values), QuantileSketch()
    for part in np.split(values, 20):
        parts.merge(sketch_of(part))
    assert parts.to_wire() == whole.to_wire()
    assert len(whole.to_wire()[0]) == MAX_BUCKETS
    assert whole.count == len(values)
    assert whole.quantile(1.0) == pytest.approx(values.max(), rel=ACCURACY + 1e-9)


def test_latencies_take_a_few_hundred_bytes(rng):
    latencies = rng.lognormal(0.5, 0.3, 100_000)
    sketch = sketch_of(latencies)
    assert len(json.dumps(sketch.to_wire())) < 1_000
    for q in (0.5, 0.95, 0.99):
        assert sketch.quantile(q) == pytest.approx(np.quantile(latencies, q), rel=0.021)


@given(WIDE)
def test_what_is_written_is_read_again(values):
    sketch = sketch_of(values)
    again = QuantileSketch.from_wire(*json.loads(json.dumps(sketch.to_wire())))
    assert again.to_wire() == sketch.to_wire()
    assert again.quantile(0.9) == sketch.quantile(0.9)


@pytest.mark.parametrize(
    "wire",
    [
        ([1], [], 0), ([1, 1], [1, 1], 0), ([2, 1], [1, 1], 0), ([1], [0], 0), ([1], [-1], 0), ([], [], -1),
        ([10**6], [1], 0), ([1], [2**60], 0), (list(range(MAX_BUCKETS + 1)), [1] * (MAX_BUCKETS + 1), 0),
    ],
)  # fmt: skip
def test_what_no_sketch_wrote_is_refused(wire):
    with pytest.raises(ValueError, match=r"a sketch|a bucket"):
        QuantileSketch.from_wire(*wire)


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
def test_what_is_no_amount_is_refused_and_nothing_is_counted(value):
    sketch = sketch_of([1.0])
    with pytest.raises(ValueError, match="values of 0 or more"):
        sketch.add(np.array([2.0, value]))
    assert sketch.count == 1


def test_an_empty_sketch_tells_nothing_and_a_quantile_is_a_share():
    assert QuantileSketch().quantile(0.5) == 0.0
    assert QuantileSketch().to_wire() == ([], [], 0)
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        QuantileSketch().quantile(95)
