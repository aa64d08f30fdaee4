"""What the monitors keep of inputs and outputs: small copies, of the same form for every sample."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.drift.features import MAX_THUMBNAIL, OUTPUT_SUMMARY, Thumbnail, input_features, summarize_output

SHAPES = st.lists(st.integers(1, 300), max_size=4)


def numbered(*shape, dtype=np.float32):
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


# ---- thumbnails


@pytest.mark.parametrize("shape", [(), (1,), (6,), (4096,), (64, 64), (1, 8, 8), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_a_small_input_is_kept_whole_as_a_copy(rng, shape, dtype):
    x = rng.integers(0, 255, (3, *shape)).astype(dtype)
    seen = Thumbnail(shape)(x)
    assert seen.dtype == np.float32
    np.testing.assert_array_equal(seen, x)
    assert not np.shares_memory(seen, x)
    x[:] = 0  # the app's array is its own again
    assert seen.any()


@pytest.mark.parametrize("shape", [(3, 224, 224), (-1, 5), (8, 600)], ids=str)
def test_a_large_input_is_copied_as_well(shape):
    x = numbered(2, *(abs(size) for size in shape))
    assert not np.shares_memory(Thumbnail(shape)(x), x)


@given(SHAPES)
def test_a_thumbnail_is_small_and_of_one_shape_for_a_batch_and_its_rows(shape):
    thumbnail = Thumbnail(shape)
    x = np.broadcast_to(np.float32(1), (2, *shape))
    seen = thumbnail(x)
    assert seen[0].size <= MAX_THUMBNAIL
    assert seen.flags.c_contiguous
    assert seen.ndim == x.ndim
    assert thumbnail(x[1:]).shape == (1, *seen.shape[1:])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_the_values_of_a_large_input_come_evenly_from_all_of_it(shape):
    """Not from one corner: each dimension's places are equally far apart, and reach both of its ends."""
    seen = Thumbnail(shape)
    for axis, size in enumerate(shape):
        along = np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        places = np.unique(seen(np.broadcast_to(along, shape)[None]))
        steps = np.unique(np.diff(places))
        assert len(steps) <= 1
        step = int(steps[0]) if len(steps) else size
        assert places[0] < step
        assert size - 1 - places[-1] < step
        assert abs(places[0] - (size - 1 - places[-1])) <= 1


def test_rows_of_a_batch_are_treated_as_alone(rng):
    for shape in ((3, 100, 90), (-1, -1), (-1, 7)):
        thumbnail = Thumbnail(shape)
        x = rng.random((4, *(size if size > 0 else 70 for size in shape)), dtype=np.float32)
        np.testing.assert_array_equal(thumbnail(x), np.concatenate([thumbnail(row[None]) for row in x]))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=2, max_size=5),
    spec=st.sampled_from([[3, -1, -1], [-1, -1, 3], [-1, -1, 1], [1, -1, 8]]),
)
def test_samples_of_any_size_make_thumbnails_of_one_size(sizes, spec):
    thumbnail = Thumbnail(spec)
    shapes = set()
    for pair in sizes:
        rest = iter(pair)
        shape = [next(rest) if size < 0 else size for size in spec]
        seen = thumbnail(numbered(1, *shape))
        assert not np.isnan(seen).any()
        assert (seen.min(), seen.max()) == (0, math.prod(shape) - 1)  # from the first value to the last
        shapes.add(seen.shape)
    assert len(shapes) == 1
    assert math.prod(shapes.pop()) <= MAX_THUMBNAIL


def test_missing_values_stay_missing():
    assert np.isnan(Thumbnail([2])(np.float32([[1, np.nan]]))).tolist() == [[False, True]]


# ---- features where values are missing


def test_a_missing_value_of_a_row_ranks_below_all_others():
    x = np.float32([[1, np.nan, 3], [1, -1e15, 3], [np.nan] * 3])
    features = input_features(x)
    assert np.isfinite(features).all()
    assert features[0, 1] < features[1, 1]
    np.testing.assert_allclose(features[0, [0, 2, 3]], [1, 3, 2])  # the mean is of those that are known
    np.testing.assert_array_equal(features[2, 3:], [0, 0])


@pytest.mark.parametrize("shape", [(100,), (4, 30), (1, 8, 8), (3, 9, 9)], ids=str)
def test_missing_values_leave_features_finite_and_rows_apart(rng, shape):
    x = rng.normal(size=(5, *shape)).astype(np.float32)
    whole = input_features(x)
    x[1][rng.random(shape) < 0.5] = np.nan
    features = input_features(x)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features[[0, 2, 3, 4]], whole[[0, 2, 3, 4]], rtol=1e-6)
    np.testing.assert_allclose(input_features(x[1:2])[0], features[1], rtol=1e-6)


# ---- outputs of any form


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_an_output_is_summed_up_whatever_its_shape(dtype):
    values = np.array([[1, 2], [3, 6]], dtype)
    for shaped in (values, values.ravel(), values[None]):
        np.testing.assert_allclose(summarize_output(shaped), [3, np.std([1, 2, 3, 6]), 1, 6, 4], rtol=1e-6)
    assert len(OUTPUT_SUMMARY) == 5


def test_an_output_may_be_one_number_truth_values_nothing_or_text():
    np.testing.assert_array_equal(summarize_output(np.float32(7)), [7, 0, 7, 7, 1])
    np.testing.assert_array_equal(summarize_output(np.array([True, False])), [0.5, 0.5, 0, 1, 2])
    np.testing.assert_array_equal(summarize_output(np.zeros((0, 4), np.float32)), [0, 0, 0, 0, 0])
    np.testing.assert_array_equal(summarize_output(np.array(["cat", "dog"], object)), [0, 0, 0, 0, 2])
    np.testing.assert_array_equal(summarize_output(np.array(["cat"])), [0, 0, 0, 0, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    assert not np.isfinite(summarize_output(np.float32([1, bad, 2]))).all()


def test_whole_numbers_and_halves_do_not_overflow():
    np.testing.assert_allclose(summarize_output(np.full(1000, 60_000, np.float16)), [60_000, 0, 60_000, 60_000, 1000])
    np.testing.assert_allclose(summarize_output(np.full(9, 200, np.uint8)), [200, 0, 200, 200, 9])
