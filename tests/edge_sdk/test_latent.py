"""Cosine features of the latent: bounded channels that see what means of single values do not."""

import numpy as np
import pytest

from edge_sdk.drift.latent import MAX_DIM, PROJECTIONS, LatentChannels, latent_names


def codes(rng, count, *, dim=64, shift=0.0, spread=20.0):
    return np.clip(rng.normal(100 + shift, spread, (count, dim)), 0, 255).astype(np.uint8)


@pytest.fixture
def latent(rng):
    return LatentChannels.build(codes(rng, 500))


def test_channels_lie_between_zero_and_one_for_any_latent(latent, rng):
    for latents in (codes(rng, 50), np.zeros((2, 64), np.uint8), np.full((2, 64), 255, np.uint8)):
        channels = latent.channels(latents)
        assert channels.shape == (len(latents), PROJECTIONS) == (len(latents), len(latent_names()))
        assert channels.dtype == np.float64
        assert channels.min() >= 0
        assert channels.max() <= 1


def test_rows_of_a_block_are_treated_as_alone(latent, rng):
    latents = codes(rng, 40)
    alone = np.concatenate([latent.channels(row[None]) for row in latents])
    np.testing.assert_array_equal(latent.channels(latents), alone)


def test_the_same_width_gives_the_same_projections(latent, rng):
    np.testing.assert_array_equal(LatentChannels.build(codes(rng, 300)).signs, latent.signs)
    ones = np.unpackbits(latent.signs).mean()
    assert 0.45 < ones < 0.55


@pytest.mark.parametrize("change", [{"shift": 4.0}, {"spread": 30.0}], ids=["place", "spread"])
def test_a_change_of_place_or_of_spread_moves_means(latent, rng, change):
    calm, moved = latent.channels(codes(rng, 4000)), latent.channels(codes(rng, 4000, **change))
    error = np.hypot(calm.std(axis=0), moved.std(axis=0)) / 4000**0.5
    assert (np.abs(moved.mean(axis=0) - calm.mean(axis=0)) / error).max() > 6


def test_a_mixture_in_other_shares_moves_means(rng):
    """Two classes about a common middle: what one gains the other loses, and the mean of most values stays."""
    centres = np.where(rng.random((2, 64)) < 0.5, -15, 15) * np.array([[1], [-1]])

    def draw(share, count=3000):
        chosen = (rng.random(count) < share).astype(int)
        return np.clip(rng.normal(100 + centres[chosen], 15), 0, 255).astype(np.uint8)

    latent = LatentChannels.build(draw(0.5))
    shift = latent.channels(draw(0.8)).mean(axis=0) - latent.channels(draw(0.5)).mean(axis=0)
    assert np.abs(shift).max() > 0.05


def test_a_latent_that_never_moves_is_watched_all_the_same():
    still = LatentChannels.build(np.full((300, 8), 7, np.uint8))
    channels = still.channels(np.full((5, 8), 7, np.uint8))
    assert np.isfinite(channels).all()
    assert np.ptp(channels, axis=0).max() == 0
    assert np.abs(still.channels(np.full((5, 8), 8, np.uint8)) - channels).max() > 0.1


def test_another_width_is_refused(latent):
    with pytest.raises(ValueError, match="width 64"):
        latent.channels(np.zeros((3, 65), np.uint8))
    with pytest.raises(ValueError, match="12001"):
        LatentChannels.build(np.zeros((2, MAX_DIM + 1), np.uint8))


def test_the_widest_latent_takes_48_kb():
    latent = LatentChannels.build(np.zeros((2, MAX_DIM), np.uint8))
    assert sum(array.nbytes for array in (latent.signs, latent.scale, latent.phase)) <= 48_256
