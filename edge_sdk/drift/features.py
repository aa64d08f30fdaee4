"""Few numbers that describe an input, for the input monitor."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from edge_sdk.types import AnyArray, FloatArray

MAX_FEATURES = 64
MAX_THUMBNAIL = 4096
_GRID = 4
_MISSING = np.float32(-1e38)
"""Stands for a missing value (NaN) of a row: it ranks below all others, so that a change of their share is seen."""


def input_features(x: FloatArray) -> FloatArray:
    """Summaries of each sample: float32 [N, ...] to float32 [N, F], F <= 64.

    Rows of up to 62 values stand for themselves, with their mean and spread. Of images and windows the means of a
    4 x 4 grid over the last two dimensions are taken, with mean, spread, and mean step between neighbours. Where a
    value is missing (NaN), means are of the others.
    """
    n = len(x)
    missing = np.isnan(x)
    if some := bool(missing.any()):
        x = _filled(x, missing)
    flat = x.reshape(n, math.prod(x.shape[1:]))
    overall = [flat.mean(axis=1), flat.std(axis=1)]
    if x.ndim <= 2:
        if flat.shape[1] > MAX_FEATURES - 2:
            values = _pooled(flat, MAX_FEATURES - 2)
        else:
            values = np.where(missing.reshape(flat.shape), _MISSING, flat) if some else flat
        columns = list(values.T)
    else:
        planes = x.reshape(n, math.prod(x.shape[1:-2]), x.shape[-2], x.shape[-1]).mean(axis=1)
        rows = np.stack([part.mean(axis=1) for part in np.array_split(planes, min(_GRID, planes.shape[1]), axis=1)], 1)
        grid = np.stack([part.mean(axis=2) for part in np.array_split(rows, min(_GRID, rows.shape[2]), axis=2)], 2)
        columns = list(grid.reshape(n, math.prod(grid.shape[1:])).T)
        overall += [_mean_step(planes, axis) for axis in (1, 2)]
    return np.stack([*columns, *overall], axis=1).astype(np.float32)


def _filled(x: FloatArray, missing: AnyArray) -> FloatArray:
    """Each sample with the mean of its known values for those that are missing; 0 if none is known."""
    axes = tuple(range(1, x.ndim))
    known = np.where(missing, np.float32(0), x)
    count = np.maximum(1, (~missing).sum(axis=axes, keepdims=True))
    filled: FloatArray = np.where(missing, known.sum(axis=axes, keepdims=True) / count, x).astype(np.float32)
    return filled


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
        sizes = range(1, MAX_THUMBNAIL + 1)
        limit = max(1, bisect_right(sizes, MAX_THUMBNAIL, key=lambda k: math.prod(_within(d, k) for d in shape)))
        self._sizes = [_within(d, limit) for d in shape]
        self._fixed = all(d > 0 for d in shape)
        self._steps = (slice(None), *(_spread(d, size) for d, size in zip(shape, self._sizes, strict=True)))

    def __call__(self, x: AnyArray) -> FloatArray:
        """Samples [N, ...] to float32 [N, ...] of at most 4096 values each."""
        if self._fixed:
            return np.array(x[self._steps], dtype=np.float32, order="C")
        places = [
            np.linspace(0, d - 1, size).astype(np.int64) for d, size in zip(x.shape[1:], self._sizes, strict=True)
        ]
        return np.ascontiguousarray(x[np.ix_(np.arange(len(x)), *places)], dtype=np.float32)


def _spread(size: int, most: int) -> slice:
    """At most so many evenly spaced places, as far from one end as from the other; all if the size is not known."""
    if size < 0:
        return slice(None)
    step = -(-size // most)  # rounded up: rounded down, the values would all come from one end
    return slice((size - 1) % step // 2, None, step)


def _within(size: int, limit: int) -> int:
    return limit if size < 0 else min(size, limit)


OUTPUT_SUMMARY = ("mean", "spread", "least", "most", "values")
"""What is watched of a raw model's first output."""


def summarize_output(output: AnyArray) -> FloatArray:
    """Few numbers that describe one output, whatever its shape: float32 [5], see `OUTPUT_SUMMARY`.

    Of one that is empty (a detector that found nothing) or text, only how many values there are.
    """
    if not output.size or output.dtype.kind not in "fiub":
        return np.array([0, 0, 0, 0, output.size], dtype=np.float32)
    values = output.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity come through, and are refused in serving
        summary = [values.mean(), values.std(), values.min(), values.max(), float(values.size)]
        return np.array(summary, dtype=np.float32)
