"""Streams whose drift is known: what they draw, when they change, and that the seed decides all of it."""

import numpy as np
import pytest

from edge_sdk.streams import DriftingStream, Pool, darkening, noise, rotation, unchanged

IMAGES = (5, 1, 8, 8)


@pytest.fixture
def images(rng):
    return rng.random(IMAGES).astype(np.float32)


@pytest.fixture
def pool():
    """The value of a sample is its label."""
    y = np.arange(60, dtype=np.int64) % 6
    return Pool(np.broadcast_to(y[:, None, None, None], (60, 1, 4, 4)).astype(np.float32).copy(), y)


@pytest.mark.parametrize("transform", [unchanged, rotation(33), darkening(0.4), noise(0.1)])
def test_transforms_keep_shape_and_type_and_their_input(images, rng, transform):
    before = images.copy()
    result = transform(images, rng)
    assert result.shape == IMAGES
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.max() <= 1
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3), (360, 0)])
@pytest.mark.parametrize("size", [7, 8])
def test_rotation_by_right_angles_moves_pixels_exactly(rng, degrees, turns, size):
    images = rng.random((3, 2, size, size)).astype(np.float32)
    expected = np.rot90(images, turns, axes=(2, 3))
    np.testing.assert_allclose(rotation(degrees)(images, rng), expected, atol=1e-5)


def test_rotation_keeps_the_centre_and_fills_with_zero(rng):
    images = np.ones((1, 1, 9, 9), np.float32)
    turned = rotation(45)(images, rng)[0, 0]
    np.testing.assert_allclose(turned[2:7, 2:7], 1, atol=1e-6)
    assert turned[0, 0] == 0
    there_and_back = rotation(-20)(rotation(20)(images, rng), rng)[0, 0]
    np.testing.assert_allclose(there_and_back[3:6, 3:6], 1, atol=1e-5)


def test_rotation_leaves_no_pixel_outside_the_range_of_the_image(rng):
    for degrees in range(0, 180, 7):
        turned = rotation(degrees)(np.ones((1, 1, 8, 8), np.float32), rng)
        assert turned.min() >= 0
        assert turned.max() <= 1


def test_rotation_treats_every_image_and_channel_alike(images, rng):
    whole = rotation(25)(images, rng)
    for i in range(len(images)):
        np.testing.assert_array_equal(rotation(25)(images[i : i + 1], rng)[0], whole[i])


def test_darkening_multiplies(images, rng):
    np.testing.assert_allclose(darkening(0.25)(images, rng), images / 4, rtol=1e-6)


def test_noise_has_its_spread_and_stays_in_range(rng):
    grey = np.full((200, 1, 8, 8), 0.5, np.float32)
    assert noise(0.1)(grey, rng).std() == pytest.approx(0.1, rel=0.03)
    wide = noise(5.0, low=-1.0, high=2.0)(grey, rng)
    assert (wide.min(), wide.max()) == (-1, 2)


def test_a_pool_can_be_narrowed_to_labels(pool):
    narrow = pool.only({1, 4})
    assert set(narrow.y) == {1, 4}
    assert len(narrow.y) == 20
    np.testing.assert_array_equal(narrow.x[:, 0, 0, 0], narrow.y)


def stream(pool, *, seed=0, **options):
    return DriftingStream(
        pool, rng=np.random.default_rng(seed), **{"base_labels": {0, 1, 2}, "drift_at": 10.0, **options}
    )


def test_inputs_change_from_the_drift_on(pool):
    drifting = stream(pool, transform=darkening(0.5))
    x, y = drifting.draw(50, 9.999)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)
    x, y = drifting.draw(50, 10.0)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y / 2)
    assert drifting.drifts


def test_new_labels_appear_with_the_drift_in_their_share(pool):
    drifting = stream(pool, new_labels=frozenset({4, 5}), new_share=0.3)
    assert set(drifting.draw(500, 9)[1]) == {0, 1, 2}
    x, y = drifting.draw(2_000, 11)
    assert set(y) == {0, 1, 2, 4, 5}
    assert np.isin(y, [4, 5]).mean() == pytest.approx(0.3, abs=0.04)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)
    assert drifting.drifts


def test_a_clean_stream_never_changes(pool):
    clean = stream(pool)
    assert not clean.drifts
    x, y = clean.draw(300, 1e9)
    assert set(y) == {0, 1, 2}
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)


def test_draws_do_not_touch_the_pool(pool):
    before = pool.x.copy()
    x, y = stream(pool, transform=darkening(0.5)).draw(40, 20)
    x[:], y[:] = -1, -1
    np.testing.assert_array_equal(pool.x, before)
    assert pool.y.min() == 0


@pytest.mark.parametrize("new_labels", [frozenset(), frozenset({5})])
def test_the_seed_decides_every_draw(pool, new_labels):
    def draws(seed):
        one = stream(pool, seed=seed, transform=noise(0.1, high=9.0), new_labels=new_labels)
        return [part.tobytes() for time in (1, 10, 20) for part in one.draw(30, time)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_two_streams_with_one_seed_draw_the_same_samples_whatever_the_transform(pool):
    clean, dark = stream(pool), stream(pool, transform=darkening(0.5))
    for time in (5, 15, 25):
        np.testing.assert_array_equal(clean.draw(20, time)[1], dark.draw(20, time)[1])
