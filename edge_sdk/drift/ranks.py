"""Features as ranks within a reference: channels in [0, 1] whatever the unit, and bins to count."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_sdk.types import AnyArray, DoubleArray, FloatArray

_ROWS = 16
"""So many at once: the comparisons of these with all edges stay in the cache."""


class Ranker:
    """Mid-ranks of features within a reference, and the bins they fall into.

    A value between two quantiles gets their middle; one that repeats in the reference gets the middle of its run. A
    missing value (NaN) ranks below all others, so that a change of their share is seen.

    Args:
        edges: float32 [F, E], ascending in each row; E <= 127.
    """

    def __init__(self, edges: FloatArray) -> None:
        self._bins = edges.shape[1] + 1
        # [E, rows * F], so that each comparison runs over one long row
        self._tiled = np.repeat(edges.T[:, None, :], _ROWS, axis=1).reshape(self._bins - 1, -1)
        # of each edge, how many from it on are equal to it; after the last one there is none
        same = edges[:, :, None] == edges[:, None, :]
        runs = np.triu(same).sum(axis=2, dtype=np.uint8)
        beyond = np.full((len(edges), 1), np.nan, np.float32)
        self._edges = np.concatenate([edges, beyond], axis=1).ravel()
        self._runs = np.concatenate([runs, np.zeros((len(edges), 1), np.uint8)], axis=1).ravel()
        self._offsets = self._bins * np.arange(len(edges))

    def __call__(self, features: FloatArray) -> tuple[DoubleArray, NDArray[np.uint8]]:
        """Rank rows.

        Args:
            features: float32 [N, F].

        Returns:
            Ranks, float64 [N, F] in [0, 1]; bins, uint8 [N, F] in 0..E: bin i holds the ranks in [i, i + 1) / (E + 1).
        """
        values = np.ascontiguousarray(features).ravel()
        below = np.empty(features.size, dtype=np.uint8)
        size = max(1, self._tiled.shape[1])
        for start in range(0, len(values), size):
            part = values[start : start + size]
            below[start : start + size] = _count(self._tiled[:, : len(part)] < part)
        low = below.reshape(features.shape)
        first = self._offsets + low
        twice = np.where(self._edges[first] == features, self._runs[first], np.uint8(0))
        twice += 2 * low + np.uint8(1)  # twice the rank, in bins
        return twice / (2.0 * self._bins), twice >> np.uint8(1)


def ranker_of(edges: FloatArray) -> Ranker:
    """One for all devices of a process that have the same edges: its table takes 4 kB a feature."""
    return _ranker(np.ascontiguousarray(edges, np.float32).tobytes(), edges.shape[0], edges.shape[1])


@lru_cache(maxsize=8)
def _ranker(edges: bytes, features: int, count: int) -> Ranker:
    return Ranker(np.frombuffer(edges, np.float32).reshape(features, count))


def ranked(features: FloatArray, edges: FloatArray) -> tuple[DoubleArray, NDArray[np.uint8]]:
    """What `Ranker` says of rows, for once."""
    return Ranker(edges)(features)


def rank_channels(features: FloatArray, edges: FloatArray) -> DoubleArray:
    """The ranks of `ranked` alone."""
    return ranked(features, edges)[0]


def with_spread(ranks: AnyArray) -> AnyArray:
    """Ranks, float [N, F], and after them their distances from the middle, |2 rank - 1|: the same dtype, [N, 2 F].

    The mean rank of a feature that only spreads or shrinks stays where it is; the mean distance does not.
    """
    return np.concatenate([ranks, np.abs(2 * ranks - 1)], axis=1)


def _count(flags: NDArray[np.bool_]) -> NDArray[np.uint8]:
    counts: NDArray[np.uint8] = np.add.reduce(flags.view(np.uint8), axis=0, dtype=np.uint8)
    return counts
