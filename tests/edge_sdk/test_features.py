"""What the monitors keep of inputs and outputs: small copies, and few numbers that have names."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.drift.features import (
    MAX_FEATURES,
    MAX_THUMBNAIL,
    OUTPUT_SUMMARY,
    Thumbnail,
    feature_names,
    input_features,
    names_of,
    summarize_output,
)
from edge_sdk.schema import Column, InputSpec

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


# ---- features


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((), 1),
        ((1,), 1),
        ((64,), 64),
        ((65,), 64),
        ((1000,), 64),
        ((1, 8, 8), 16 + 4),
        ((8, 8), 16 + 4),
        ((3, 32, 48), 16 + 2 * 3 + 4),
        ((32, 48, 3), 16 + 2 * 3 + 4),
        ((64, 8, 8), 16 + 2 * 16 + 4),
        ((2, 3, 8, 8), 16 + 2 * 6 + 4),
        ((6, 100), 16 + 2 * 6 + 3),
        ((100, 6), 16 + 2 * 6 + 3),
        ((1, 100), 4 + 3),
        ((1, 1, 100), 4 + 4),
        ((1, 1, 1), 1 + 4),
        ((1, 1), 1 + 4),
    ],
    ids=str,
)
def test_features_of_rows_images_and_windows_are_bounded_and_named(rng, shape, count):
    x = rng.normal(size=(5, *shape)).astype(np.float32)
    features = input_features(x)
    assert features.shape == (5, count)
    assert count <= MAX_FEATURES
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert len(set(names_of(shape))) == count
    np.testing.assert_array_equal(input_features(x[2:3])[0], features[2])


@given(st.lists(st.integers(1, 40), max_size=4))
def test_every_feature_of_any_input_has_a_name(shape):
    features = input_features(np.ones((2, *shape), np.float32))
    assert features.shape[1] == len(names_of(shape)) == len(set(names_of(shape))) <= MAX_FEATURES


def test_features_of_a_row_are_its_values():
    x = np.array([[1.0, np.nan, 6.0]], np.float32)
    np.testing.assert_array_equal(input_features(x), x)
    assert names_of((3,)) == ("value 1", "value 2", "value 3")
    assert names_of((2,), ["age", "height"]) == ("age", "height")


def test_features_of_a_wide_row_are_means_of_neighbours():
    x = np.arange(130.0, dtype=np.float32)[None]
    np.testing.assert_allclose(input_features(x)[0, [0, 1, 63]], [1, 4, 128.5])
    assert names_of((130,))[0] == "mean of value 1 to value 3"
    assert names_of((130,))[63] == "mean of value 129 to value 130"


def test_features_of_an_image_are_a_grid_mean_spread_and_steps():
    image = np.repeat(np.repeat(np.arange(16.0).reshape(4, 4), 2, axis=0), 2, axis=1)[None, None].astype(np.float32)
    features = dict(zip(names_of((1, 8, 8)), input_features(image)[0], strict=True))
    assert features["region row 1 of 4, column 1 of 4"] == 0
    assert features["region row 2 of 4, column 3 of 4"] == 6
    assert features["mean of the image"] == 7.5
    assert features["spread of the image"] == pytest.approx(image.std())
    assert features["mean step between rows of the image"] == pytest.approx(12 / 7)
    assert features["mean step between columns of the image"] == pytest.approx(3 / 7)


def test_channels_of_an_image_are_found_first_or_last(rng):
    x = rng.random((4, 3, 32, 48), dtype=np.float32)
    x[:, 1] *= 2
    features = dict(zip(names_of((3, 32, 48)), input_features(x).T, strict=True))
    np.testing.assert_allclose(features["channel 2 mean"], x[:, 1].mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(features["channel 2 spread"], x[:, 1].std(axis=(1, 2)), rtol=1e-4)
    assert names_of((3, 32, 48)) == names_of((32, 48, 3))
    np.testing.assert_allclose(input_features(x), input_features(x.transpose(0, 2, 3, 1)), rtol=1e-4)


def test_features_of_a_window_are_by_channel_and_part_of_time(rng):
    x = rng.random((4, 6, 100), dtype=np.float32)
    features = dict(zip(names_of((6, 100)), input_features(x).T, strict=True))
    np.testing.assert_allclose(features["channel 5, part 4 of 4"], x[:, 4, 75:].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(features["channels 1-2, part 1 of 4"], x[:, :2, :25].mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(features["channel 3 spread"], x[:, 2].std(axis=1), rtol=1e-4)
    assert "mean step in time of the window" in features
    np.testing.assert_allclose(input_features(x), input_features(x.transpose(0, 2, 1)), rtol=1e-4)


def test_a_frozen_sensor_of_a_window_has_no_spread(rng):
    x = rng.random((2, 3, 50), dtype=np.float32)
    x[1, 2] = 0.7
    spread = input_features(x)[:, names_of((3, 50)).index("channel 3 spread")]
    assert spread[1] < 1e-6 < spread[0]


def test_noise_and_darkness_move_features(rng):
    images = rng.random((50, 1, 8, 8)).astype(np.float32)
    smooth = input_features(np.broadcast_to(images.mean(axis=(2, 3), keepdims=True), images.shape))
    assert (input_features(images)[:, -1] > smooth[:, -1]).all()
    assert (input_features(images * 0.5)[:, 16] < input_features(images)[:, 16]).all()


def test_names_come_from_the_contract():
    columns = [Column("acc_x"), Column("site", kind="category", values=["a", "b"])]
    assert feature_names(InputSpec(shape=[2], columns=columns)) == ("acc_x", "site")


@pytest.mark.parametrize(
    "shape", [[], [6], [5000], [3, -1, -1], [-1, -1, 3], [-1, 7], [3, 224, 200], [9, 600]], ids=str
)
def test_names_are_of_what_the_thumbnail_shows(rng, shape):
    x = rng.random((2, *(70 if size < 0 else size for size in shape)), dtype=np.float32)
    thumbnail = Thumbnail(shape)
    assert thumbnail.shape == thumbnail(x).shape[1:]
    assert len(feature_names(InputSpec(shape=shape))) == input_features(thumbnail(x)).shape[1]


# ---- features where values are missing


def test_a_missing_value_of_a_row_stays_missing():
    x = np.float32([[1, np.nan, 3], [np.nan] * 3])
    np.testing.assert_array_equal(input_features(x), x)


@pytest.mark.parametrize("shape", [(100,), (4, 30), (1, 8, 8), (3, 9, 9)], ids=str)
def test_missing_values_leave_other_rows_as_they_are(rng, shape):
    x = rng.normal(size=(5, *shape)).astype(np.float32)
    whole = input_features(x)
    x[1][rng.random(shape) < 0.3] = np.nan
    features = input_features(x)
    np.testing.assert_allclose(features[[0, 2, 3, 4]], whole[[0, 2, 3, 4]], rtol=1e-5)
    np.testing.assert_array_equal(input_features(x[1:2])[0], features[1])


def test_features_of_an_image_are_of_the_values_that_are_known(rng):
    x = rng.random((1, 3, 8, 8), dtype=np.float32)
    x[0, 1] = np.nan  # a dead channel
    x[0, :, :2, :2] = np.nan  # a dead corner
    features = dict(zip(names_of((3, 8, 8)), input_features(x)[0], strict=True))
    missing = {name for name, value in features.items() if np.isnan(value)}
    assert missing == {"channel 2 mean", "channel 2 spread", "region row 1 of 4, column 1 of 4"}
    assert features["mean of the image"] == pytest.approx(np.nanmean(x), rel=1e-5)
    assert features["channel 1 spread"] == pytest.approx(np.nanstd(x[0, 0]), rel=1e-4)


def test_nothing_is_known_of_an_image_that_is_missing():
    assert np.isnan(input_features(np.full((2, 1, 8, 8), np.nan, np.float32))).all()


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
