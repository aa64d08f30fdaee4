"""Few numbers that describe an input, for the input monitor."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, FloatArray

MAX_FEATURES = 64
MAX_THUMBNAIL = 4096
_GRID = 4
_CHANNELS = 16
_FLAT = 4
"""A last dimension of up to so many is the channels of an image [H, W, C]."""


def input_features(x: FloatArray) -> FloatArray:
    """Few numbers that describe each sample: float32 [N, ...] to float32 [N, F], F <= 64. NaN: missing.

    The values of a row stand for themselves; of more than 64, means of neighbours. Of images and windows come the
    means of a 4 x 4 grid of regions, the mean and the spread of each channel (of more than 16, means over neighbours),
    and the mean, spread and mean step between neighbours of all of it. Where values are missing, these are of the
    others. `feature_names` says which is which.
    """
    x = np.asarray(x, dtype=np.float32)
    if x.ndim <= 2:
        rows = x.reshape(len(x), math.prod(x.shape[1:]))
        if rows.shape[1] <= MAX_FEATURES:
            return rows
        with np.errstate(invalid="ignore"):
            return _pooled(rows, 1, _mean_of_known, MAX_FEATURES).astype(np.float32)
    features = _summaries(x, np.mean)
    if not math.isfinite(features.sum()):
        some = np.isnan(x).any(axis=tuple(range(1, x.ndim)))
        with np.errstate(invalid="ignore"):  # the mean of none is NaN, as it should be
            features[some] = _summaries(x[some], _mean_of_known)
    return features


def feature_names(spec: InputSpec) -> tuple[str, ...]:
    """What `input_features` tells of inputs of a contract, in order, in words a person understands.

    Example:
        >>> feature_names(InputSpec(shape=[2], columns=[Column("acc_x"), Column("acc_y")]))
        ('acc_x', 'acc_y')
    """
    shape = Thumbnail(spec.shape).shape
    columns = [column.name for column in spec.columns]
    return names_of(shape, columns if (len(columns),) == shape else ())


def names_of(shape: Sequence[int], columns: Sequence[str] = ()) -> tuple[str, ...]:
    """`feature_names` of samples of a shape.

    Args:
        shape: Of one sample, as `input_features` gets it.
        columns: Names of the values of a row, if they have any.
    """
    if len(shape) <= 1:
        values = columns or [f"value {i + 1}" for i in range(math.prod(shape))]
        width = min(len(values), MAX_FEATURES)
        ends = [*_starts(len(values), width), len(values)]
        return tuple(
            values[first] if last == first + 1 else f"mean of {values[first]} to {values[last - 1]}"
            for first, last in pairwise(ends)
        )
    window, count, sizes = _layout(shape)
    rows, columns_ = (min(_GRID, size) for size in sizes)
    if window:
        groups = [_range("channel", first, last) for first, last in pairwise([*_starts(count, rows), count])]
        regions = [f"{group}, part {j + 1} of {columns_}" for group in groups for j in range(columns_)]
        whole, steps = "window", ["mean step in time of the window"]
    else:
        regions = [
            f"region row {i + 1} of {rows}, column {j + 1} of {columns_}" for i in range(rows) for j in range(columns_)
        ]
        whole = "image"
        steps = ["mean step between rows of the image", "mean step between columns of the image"]
    channels = []
    if count > 1:
        ends = [*_starts(count, min(count, _CHANNELS)), count]
        names = [_range("channel", first, last) for first, last in pairwise(ends)]
        channels = [f"{name} {what}" for what in ("mean", "spread") for name in names]
    return (*regions, *channels, f"mean of the {whole}", f"spread of the {whole}", *steps)


def _range(what: str, first: int, last: int) -> str:
    return f"{what} {first + 1}" if last == first + 1 else f"{what}s {first + 1}-{last}"


def _layout(shape: Sequence[int]) -> tuple[bool, int, tuple[int, int]]:
    """Whether a sample is a window of sensors, how many channels it has, and over which two sizes regions lie.

    Two dimensions of which one is small and much the smaller are channels and time, in either order; others are an
    image. Of three, a last dimension of 1 to 4 is an image's channels.
    """
    if len(shape) == 2:
        few, many = min(shape), max(shape)
        if few <= _CHANNELS and many >= 2 * few:
            return True, few, (few, many)
        return False, 1, (shape[0], shape[1])
    if _channels_last(shape):
        return False, shape[2], (shape[0], shape[1])
    return False, math.prod(shape[:-2]), (shape[-2], shape[-1])


def _channels_last(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[2] <= _FLAT < shape[0]


def _summaries(x: FloatArray, mean: Callable[..., AnyArray]) -> FloatArray:
    """Features of images and windows; `mean(values, axis)` decides about missing values."""
    window, count, sizes = _layout(x.shape[1:])
    if window:  # [N, channels, time]
        plane = values = x if x.shape[1] == count else x.transpose(0, 2, 1)
    elif _channels_last(x.shape[1:]):
        plane, values = mean(x, 3), x.reshape(len(x), -1, count).transpose(0, 2, 1)
    else:
        values = x.reshape(len(x), count, math.prod(sizes))
        plane = (mean(values, 1) if count > 1 else values).reshape(len(x), *sizes)
    parts = [_pooled(_pooled(plane, 1, mean), 2, mean).reshape(len(x), -1)]
    if count > 1:
        middle = mean(values, 2)
        spread = np.sqrt(mean(np.square(values - middle[:, :, None]), 2))
        parts += [_pooled(part, 1, mean, _CHANNELS) for part in (middle, spread)]
    flat = values.reshape(len(x), -1)
    middle = mean(flat, 1)[:, None]
    parts += [middle, np.sqrt(mean(np.square(flat - middle), 1))[:, None]]
    for axis in (2,) if window else (1, 2):
        if plane.shape[axis] > 1:
            parts.append(mean(np.abs(np.diff(plane, axis=axis)).reshape(len(x), -1), 1)[:, None])
        else:  # one row or one column has no neighbours
            parts.append(np.zeros((len(x), 1), np.float32))
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _mean_of_known(values: AnyArray, axis: int) -> AnyArray:
    missing = np.isnan(values)
    result: AnyArray = np.where(missing, np.float32(0), values).sum(axis=axis) / (~missing).sum(axis=axis)
    return result


def _pooled(values: AnyArray, axis: int, mean: Callable[..., AnyArray], most: int = _GRID) -> AnyArray:
    """At most so many means of neighbours along an axis."""
    width = min(most, values.shape[axis])
    return np.stack([mean(part, axis) for part in np.array_split(values, width, axis=axis)], axis=axis)


def _starts(size: int, parts: int) -> list[int]:
    """Where the parts of `np.array_split` begin."""
    each, more = divmod(size, parts)
    return [i * each + min(i, more) for i in range(parts)]


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
        self._given, self._fixed = tuple(shape), all(d > 0 for d in shape)
        self._steps = (slice(None), *(_spread(d, size) for d, size in zip(shape, self._sizes, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, as the monitors see it."""
        if not self._fixed:
            return tuple(self._sizes)
        return tuple(len(range(d)[step]) for d, step in zip(self._given, self._steps[1:], strict=True))

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
