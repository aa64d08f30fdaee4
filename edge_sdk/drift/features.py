"""Few numbers that describe an input, for the input monitor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_sdk.types import AnyArray, FloatArray

MAX_FEATURES = 64
MAX_THUMBNAIL = 4096
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


class Thumbnail:
    """What the monitors keep of each input: the input itself, or evenly spaced values of a large one.

    The same for a reference and in serving. Copies, so that the app may use its array again.

    Args:
        shape: Of one sample; -1 for any size.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        limit = next(k for k in range(MAX_THUMBNAIL, 0, -1) if math.prod(_within(d, k) for d in shape) <= MAX_THUMBNAIL)
        self._sizes = [_within(d, limit) for d in shape]
        self._fixed = all(d > 0 for d in shape)
        self._steps = (
            slice(None),
            *(slice(0, size * (d // size), d // size) for d, size in zip(shape, self._sizes, strict=True)),
        )

    def __call__(self, x: AnyArray) -> FloatArray:
        """Samples [N, ...] to float32 [N, ...] of at most 4096 values each."""
        if self._fixed:
            return np.array(x[self._steps], dtype=np.float32, order="C")
        places = [
            np.linspace(0, d - 1, size).astype(np.int64) for d, size in zip(x.shape[1:], self._sizes, strict=True)
        ]
        return np.ascontiguousarray(x[np.ix_(np.arange(len(x)), *places)], dtype=np.float32)


def _within(size: int, limit: int) -> int:
    return limit if size < 0 else min(size, limit)


OUTPUT_SUMMARY = ("mean", "spread", "least", "most", "values")
"""What is watched of a raw model's first output."""


def summarize_output(output: AnyArray) -> FloatArray:
    """Few numbers that describe one output, whatever its shape: float32 [5], see `OUTPUT_SUMMARY`."""
    if not output.size:  # a detector that found nothing
        return np.zeros(len(OUTPUT_SUMMARY), dtype=np.float32)
    values = output.astype(np.float64, copy=False)
    summary = [values.mean(), values.std(), values.min(), values.max(), float(values.size)]
    return np.array(summary, dtype=np.float32)
