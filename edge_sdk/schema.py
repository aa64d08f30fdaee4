"""What an input must look like, checked the same way in training and in serving."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from edge_sdk.errors import DtypeError, InputError, NonFiniteError, RangeError, ShapeError
from edge_sdk.types import AnyArray, FloatArray

_KINDS = "fiu"  # float, int, unsigned: what casts to float32 without surprise


class Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="scale", tag_field="op"):
    """Preprocessing: (x - mean) / std, element by element or with one number for all."""

    mean: list[float]
    std: list[float]


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The input contract of a model: one sample, without the batch dimension."""

    shape: list[int]
    name: str = "input"
    dtype: Literal["float32"] = "float32"
    low: float | None = None
    """Smallest value that can be right, in the units the app gives; None: any."""
    high: float | None = None
    preprocess: list[Scale] = []

    def check(self, x: Any) -> FloatArray:
        """One sample as float32, ready for preprocessing.

        Raises:
            DtypeError, ShapeError, NonFiniteError, RangeError: What is wrong with it, and what was expected.
        """
        return self._checked(x, tuple(self.shape))

    def check_batch(self, x: Any) -> FloatArray:
        """Samples stacked in the first dimension, as float32 [N, ...]. Errors as in `check`."""
        array = _as_array(x)
        if array.ndim == 0 or array.shape[0] == 0:
            raise ShapeError(f"a batch needs at least one sample; got shape {array.shape}")
        return self._checked(array, (array.shape[0], *self.shape))

    def apply(self, x: FloatArray) -> FloatArray:
        """The declared preprocessing. float32 [N, ...] in, float32 [N, ...] out."""
        for op in self.preprocess:
            mean, std = np.asarray(op.mean, dtype=np.float32), np.asarray(op.std, dtype=np.float32)
            x = np.asarray((x - mean) / std, dtype=np.float32)
        return np.ascontiguousarray(x, dtype=np.float32)

    def _checked(self, x: Any, shape: tuple[int, ...]) -> FloatArray:
        given = _as_array(x)
        if given.shape != shape:
            raise ShapeError(f"input {self.name!r}: expected shape {shape}, got {given.shape}")
        values: FloatArray = np.asarray(given, dtype=np.float32)
        if not np.isfinite(values).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise NonFiniteError(f"input {self.name!r}: {values[where]} at {where}; impute or drop the sample")
        if (self.low is not None and values.min() < self.low) or (self.high is not None and values.max() > self.high):
            raise RangeError(
                f"input {self.name!r}: values from {values.min():g} to {values.max():g}, "
                f"allowed {self.low} to {self.high}; is the unit right?"
            )
        return values


def _as_array(x: Any) -> AnyArray:
    try:
        array = np.asarray(x)
    except (ValueError, TypeError) as error:
        raise InputError(f"the input is not an array: {error}") from error
    if array.dtype.kind not in _KINDS:
        raise DtypeError(f"expected numbers (float32), got dtype {array.dtype}")
    return array
