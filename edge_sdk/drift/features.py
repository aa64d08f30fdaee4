"""Few numbers that describe an input, for the input monitor."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.types import FloatArray

MAX_FEATURES = 64
_GRID = 4


def input_features(x: FloatArray) -> FloatArray:
    """Summaries of each sample: float32 [N, ...] to float32 [N, F], F <= 64.

    Rows of up to 62 values stand for themselves, with their mean and spread. Of images and windows the means of a
    4 x 4 grid over the last two dimensions are taken, with mean, spread, and mean step between neighbours.
    """
    n = len(x)
    flat = x.reshape(n, math.prod(x.shape[1:]))
    overall = [flat.mean(axis=1), flat.std(axis=1)]
    if x.ndim <= 2:
        values = flat if flat.shape[1] <= MAX_FEATURES - 2 else _pooled(flat, MAX_FEATURES - 2)
        columns = list(values.T)
    else:
        planes = x.reshape(n, math.prod(x.shape[1:-2]), x.shape[-2], x.shape[-1]).mean(axis=1)
        rows = np.stack([part.mean(axis=1) for part in np.array_split(planes, min(_GRID, planes.shape[1]), axis=1)], 1)
        grid = np.stack([part.mean(axis=2) for part in np.array_split(rows, min(_GRID, rows.shape[2]), axis=2)], 2)
        columns = list(grid.reshape(n, math.prod(grid.shape[1:])).T)
        overall += [_mean_step(planes, axis) for axis in (1, 2)]
    return np.stack([*columns, *overall], axis=1).astype(np.float32)


def _mean_step(planes: FloatArray, axis: int) -> FloatArray:
    if planes.shape[axis] == 1:  # one channel or one step has no neighbours
        return np.zeros(len(planes), np.float32)
    steps: FloatArray = np.abs(np.diff(planes, axis=axis)).mean(axis=(1, 2))
    return steps


def _pooled(flat: FloatArray, width: int) -> FloatArray:
    return np.stack([part.mean(axis=1) for part in np.array_split(flat, width, axis=1)], axis=1)
