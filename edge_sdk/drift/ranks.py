"""Features as ranks within a reference: channels in [0, 1] whatever the unit, and bins to count."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_sdk.types import DoubleArray, FloatArray

_ROWS = 32
"""So many at once: the comparisons of these with all edges stay in the cache."""


def ranked(features: FloatArray, edges: FloatArray) -> tuple[DoubleArray, NDArray[np.uint8]]:
    """Mid-ranks of features within the reference, and the bins they fall into.

    A value between two quantiles gets their middle; one that repeats in the reference gets the middle of its run. A
    missing value (NaN) ranks below all others, so that a change of their share is seen.

    Args:
        features: float32 [N, F].
        edges: float32 [F, E], ascending in each row; E <= 127.

    Returns:
        Ranks, float64 [N, F] in [0, 1]; bins, uint8 [N, F] in 0..E: bin i holds the ranks in [i, i + 1) / (E + 1).
    """
    rows, width = features.shape
    bins = edges.shape[1] + 1
    # [E, rows * F], so that each comparison runs over one long row
    tiled = np.repeat(edges.T[:, None, :], min(rows, _ROWS), axis=1).reshape(bins - 1, -1)
    sums = np.empty(features.size, dtype=np.uint8)
    values = np.ascontiguousarray(features).ravel()
    for start in range(0, len(values), max(1, tiled.shape[1])):
        part = values[start : start + tiled.shape[1]]
        below = tiled[:, : len(part)]
        sums[start : start + len(part)] = _count(below < part) + _count(below <= part)
    sums += np.uint8(1)  # twice the rank, in bins
    twice = sums.reshape(rows, width)
    return twice / (2.0 * bins), twice >> np.uint8(1)


def rank_channels(features: FloatArray, edges: FloatArray) -> DoubleArray:
    """The ranks of `ranked` alone."""
    return ranked(features, edges)[0]


def with_spread(ranks: DoubleArray) -> DoubleArray:
    """Ranks, float64 [N, F], and after them their distances from the middle, |2 rank - 1|: float64 [N, 2 F].

    The mean rank of a feature that only spreads or shrinks stays where it is; the mean distance does not.
    """
    return np.concatenate([ranks, np.abs(2 * ranks - 1)], axis=1)


def _count(flags: NDArray[np.bool_]) -> NDArray[np.uint8]:
    counts: NDArray[np.uint8] = np.add.reduce(flags.view(np.uint8), axis=0, dtype=np.uint8)
    return counts
