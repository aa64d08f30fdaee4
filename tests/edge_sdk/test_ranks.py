"""Ranks within a reference: exact, between 0 and 1, and the bins that go with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge_sdk.drift.ranks import rank_channels, ranked, with_spread

FEW = st.integers(-3, 3).map(float)
"""Few values, so that many repeat."""


def by_search(features, edges):
    """Twice the mid-rank, one column at a time."""
    columns = [
        np.searchsorted(edges[i], features[:, i], side="left") + np.searchsorted(edges[i], features[:, i], side="right")
        for i in range(features.shape[1])
    ]
    return np.stack(columns, axis=1) + 1


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FEW),
    arrays(np.float32, 63, elements=FEW),
)
def test_ranks_are_the_exact_middles_of_runs_of_equal_quantiles(features, quantiles):
    edges = np.sort(np.stack([np.roll(quantiles, i) for i in range(features.shape[1])]), axis=1)
    ranks, bins = ranked(features, edges)
    np.testing.assert_array_equal(ranks, by_search(features, edges) / 128)
    np.testing.assert_array_equal(bins, np.floor(64 * ranks))
    assert ranks.dtype == np.float64
    assert bins.dtype == np.uint8


@given(arrays(np.float32, (33, 2), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_any_value_has_a_rank_and_a_bin(features):
    edges = np.tile(np.linspace(-1, 1, 63, dtype=np.float32), (2, 1))
    ranks, bins = ranked(features, edges)
    assert ranks.min() > 0
    assert ranks.max() < 1
    assert bins.max() <= 63


def test_a_missing_value_ranks_below_all_others():
    edges = np.linspace(-1, 1, 63, dtype=np.float32)[None]
    ranks, bins = ranked(np.array([[np.nan], [-np.inf], [0.0], [np.inf]], np.float32), edges)
    np.testing.assert_array_equal(ranks[:, 0], [1 / 128, 1 / 128, 64 / 128, 127 / 128])
    np.testing.assert_array_equal(bins[:, 0], [0, 0, 32, 63])


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 100])
def test_rows_are_ranked_alike_in_any_number_and_order(rng, rows):
    features = np.asfortranarray(rng.normal(size=(rows, 5)).astype(np.float32))
    edges = np.sort(rng.normal(size=(5, 63)).astype(np.float32), axis=1)
    ranks, bins = ranked(features, edges)
    assert ranks.shape == bins.shape == (rows, 5)
    for i in range(rows):
        one = ranked(features[i : i + 1], edges)
        np.testing.assert_array_equal(one[0][0], ranks[i])
        np.testing.assert_array_equal(one[1][0], bins[i])
    np.testing.assert_array_equal(rank_channels(features, edges), ranks)


def test_no_features_give_no_ranks():
    ranks, bins = ranked(np.zeros((4, 0), np.float32), np.zeros((0, 63), np.float32))
    assert ranks.shape == bins.shape == (4, 0)


def test_a_feature_that_spreads_moves_the_distances_alone(rng):
    edges = np.quantile(rng.normal(size=4_000), np.arange(1, 64) / 64).astype(np.float32)[None]
    usual, wide = (
        with_spread(rank_channels(rng.normal(0, scale, (4_000, 1)).astype(np.float32), edges)) for scale in (1, 2)
    )
    assert usual.shape == (4_000, 2)
    assert usual.min() >= 0
    assert usual.max() <= 1
    assert usual.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.03)
    assert wide.mean(axis=0) == pytest.approx([0.5, 0.69], abs=0.03)
