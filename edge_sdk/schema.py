"""What an input must look like and how it becomes what the network takes: one path for training and for serving.

`check` takes what the app gives (an array, or a row of named values) to a checked array in the app's own units, which
is also what the input monitors watch. `apply` runs the declared preprocessing on it. Both are numpy alone.
"""

from __future__ import annotations

import math
import reprlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property, lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from edge_sdk.errors import DtypeError, InputError, NonFiniteError, RangeError, ShapeError
from edge_sdk.types import AnyArray, FloatArray

_KINDS = "fiu"  # float, int, unsigned: what casts to float32 without surprise
_INTEGERS = "iu"
_REAL = (float, np.floating)
_CONTAINERS = (bytes, Mapping, list, tuple, AbstractSet, np.ndarray)
"""What cannot be one value of a row; its text would pass for an unseen category."""
ANY = -1
"""In a shape: any size of at least one."""
MOST_BUCKETS = 2**24
"""Codes are held as float32, which tells no more whole numbers apart."""

Step = Callable[[AnyArray], AnyArray]
"""One operation on a batch."""


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One value of a tabular row, and the number that stands for it.

    A number stands for itself, a category for its place in `values` (an unseen one is -1), a text for the CRC-32 of
    its UTF-8 bytes modulo `buckets`. What is missing (None, NaN, an empty string, no such key) is NaN.
    """

    name: str
    kind: Literal["number", "category", "text"] = "number"
    values: list[str] = []
    """Of a category, in the order in which the model was trained."""
    buckets: int = 0
    """Of a text."""
    low: float | None = None
    """Smallest number that can be right, in the app's units."""
    high: float | None = None

    def __post_init__(self) -> None:
        """Check that kind and details fit.

        Raises:
            ValueError: They do not.
        """
        if self.kind == "category" and (not self.values or len(set(self.values)) != len(self.values)):
            raise ValueError(f"column {self.name!r}: a category needs its values, each once")
        if self.kind == "text" and not 2 <= self.buckets <= MOST_BUCKETS:
            raise ValueError(f"column {self.name!r}: a text needs 2 to {MOST_BUCKETS} buckets, got {self.buckets}")
        if self.kind != "category" and self.values:
            raise ValueError(f"column {self.name!r}: only a category has values")
        if self.kind != "text" and self.buckets:
            raise ValueError(f"column {self.name!r}: only a text has buckets")
        if self.kind != "number" and (self.low is not None or self.high is not None):
            raise ValueError(f"column {self.name!r}: only a number has a range")
        _check_range(f"column {self.name!r}", self.low, self.high)

    @property
    def size(self) -> int:
        """How many codes there are; 0 for a number."""
        return len(self.values) if self.kind == "category" else self.buckets

    def encode(self, value: Any) -> float:
        """The number that stands for a value.

        Raises:
            DtypeError: A number column got something else, or a category or text more than one value.
            InputError: A text is not UTF-8.
        """
        if isinstance(value, str):
            if not value:
                return math.nan
        elif isinstance(value, _REAL):
            if math.isnan(value):
                return math.nan
        elif value is None:
            return math.nan
        elif not isinstance(value, int) and isinstance(value, _CONTAINERS):  # last: it takes longest
            raise DtypeError(f"column {self.name!r}: expected a {self.kind}, got {reprlib.repr(value)}")
        if self.kind == "category":
            return float(self._places.get(str(value), -1))
        try:
            return float(zlib.crc32(str(value).encode()) % self.buckets) if self.kind == "text" else float(value)
        except UnicodeEncodeError as error:
            raise InputError(f"column {self.name!r}: the text is not UTF-8") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise DtypeError(f"column {self.name!r}: expected a number, got {reprlib.repr(value)}") from error

    @property
    def _places(self) -> dict[str, int]:
        return _places(tuple(self.values))


class _Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class Impute(_Op, frozen=True, tag="impute"):
    """NaN becomes a number: one for all values, or one for each of the last dimension (None: must not be missing)."""

    values: list[float | None]


class OneHot(_Op, frozen=True, tag="one_hot"):
    """The named category and text columns become one column for each code; what has no code is all zeros."""

    columns: list[str]


class Scale(_Op, frozen=True, tag="scale"):
    """(x - mean) / std, with one number for all values, or one for each place along `axis` of a sample."""

    mean: list[float]
    std: list[float]
    axis: int = -1
    """Of one sample, without the batch: 0 for the channels of an image [C, H, W]."""


class Resize(_Op, frozen=True, tag="resize"):
    """An image to height x width: linear interpolation, averaging where it shrinks."""

    height: int
    width: int
    layout: Literal["chw", "hwc", "hw"] = "chw"


class Window(_Op, frozen=True, tag="window"):
    """The latest `length` steps of a recording [T, ...], every `stride`-th one; a short one is padded at its front."""

    length: int
    stride: int = 1
    pad: Literal["zero", "edge"] = "edge"


class Permute(_Op, frozen=True, tag="permute"):
    """The dimensions of a sample in another order: [2, 0, 1] makes [C, H, W] of [H, W, C]."""

    order: list[int]


Op = Impute | OneHot | Scale | Resize | Window | Permute


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The input contract of a model: one sample, without the batch dimension."""

    shape: list[int]
    """As the app gives it; -1 for any size."""
    name: str = "input"
    dtype: Literal["float32", "int32", "int64", "uint8"] = "float32"
    """What the network takes. Whatever numpy casts to it without loss may be given."""
    low: float | None = None
    """Smallest value that can be right, in the units the app gives; None: any."""
    high: float | None = None
    columns: list[Column] = []
    """Names and kinds of the values of a tabular row, whose shape is [len(columns)]; empty for anything else."""
    preprocess: list[Op] = []

    def __post_init__(self) -> None:
        """Check that shape, columns and preprocessing fit each other.

        Raises:
            ValueError: They do not.
        """
        if any(size < 1 and size != ANY for size in self.shape):
            raise ValueError(f"input {self.name!r}: sizes are 1 or more, or {ANY} for any, got {self.shape}")
        _check_range(f"input {self.name!r}", self.low, self.high)
        names = [column.name for column in self.columns]
        if names and self.shape != [len(names)]:
            raise ValueError(f"input {self.name!r}: {len(names)} columns make shape {[len(names)]}, not {self.shape}")
        if len(set(names)) != len(names):
            raise ValueError(f"input {self.name!r}: column names must differ")
        if self.dtype != "float32" and (any(not isinstance(op, Window | Permute) for op in self.preprocess) or names):
            raise ValueError(f"input {self.name!r}: numbers of type {self.dtype} can only be windowed and permuted")
        self._compiled  # noqa: B018 - a preprocessing that cannot work is found here

    # ---- what the app gives

    def check(self, x: Any) -> AnyArray:
        """One sample, in the app's units, as an array of the contract's dtype.

        Args:
            x: An array of `shape`; for a tabular input also a mapping of column names to values, or values in order.

        Raises:
            DtypeError, ShapeError, NonFiniteError, RangeError: What is wrong with it, and what was expected.
        """
        if self.columns and not _is_numeric(x):
            x = self._row(x)
        given = x if isinstance(x, np.ndarray) else self._as_array(x)
        if not self._fits(given.shape):
            raise ShapeError(f"input {self.name!r}: expected shape {self._expected()}, got {given.shape}")
        return self._checked(given)

    def check_batch(self, x: Any) -> AnyArray:
        """Samples stacked in the first dimension, or a list of rows, as [N, ...]. Errors as in `check`."""
        if self.columns and not _is_numeric(x):
            if isinstance(x, str | bytes) or not isinstance(x, Sequence | np.ndarray) or _is_scalar(x):
                raise ShapeError(f"input {self.name!r}: expected a list of rows, got {type(x).__name__}")
            x = self._rows(x)
        given = self._as_array(x)
        if given.ndim == 0 or given.shape[0] == 0:
            raise ShapeError(f"a batch needs at least one sample; got shape {given.shape}")
        if not self._fits(given.shape[1:]):
            raise ShapeError(f"input {self.name!r}: expected shape (N, {str(self._expected())[1:]}, got {given.shape}")
        return self._checked(given)

    # ---- what the network takes

    def apply(self, x: AnyArray) -> AnyArray:
        """The declared preprocessing: checked samples [N, ...] to what the network takes, [N, ...] and contiguous."""
        for step in self._compiled[0]:
            x = step(x)
        return np.ascontiguousarray(x)

    @property
    def model_shape(self) -> list[int]:
        """Shape of one sample as the network takes it; -1 for any size."""
        return list(self._compiled[1])

    @cached_property
    def imputes(self) -> bool:
        """Whether values may be missing."""
        return any(isinstance(op, Impute) for op in self.preprocess)

    # ---- inside

    @cached_property
    def _compiled(self) -> tuple[list[Step], tuple[int, ...]]:
        steps: list[Step] = []
        shape, columns = tuple(self.shape), list(self.columns)
        for i, op in enumerate(self.preprocess):
            try:
                if isinstance(op, Impute) and None in op.values:
                    _check_in_place(self.preprocess[:i])
                step, shape = _compile(op, shape, columns)
            except ValueError as error:
                raise ValueError(f"input {self.name!r}: {error}") from error
            steps.append(step)
        return steps, shape

    @cached_property
    def _fixed(self) -> tuple[int, ...] | None:
        return None if ANY in self.shape else tuple(self.shape)

    def _expected(self) -> tuple[int | str, ...]:
        return tuple("any" if size == ANY else size for size in self.shape)

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if self._fixed is not None:
            return shape == self._fixed
        return len(shape) == len(self.shape) and all(
            size >= 1 and wanted in (size, ANY) for size, wanted in zip(shape, self.shape, strict=True)
        )

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        if self._dtype.kind != "f":
            return low, high
        with np.errstate(over="ignore"):  # rounded as the values are: the limit itself is allowed
            return float(np.float32(low)), float(np.float32(high))

    @cached_property
    def _column_bounds(self) -> tuple[FloatArray, FloatArray] | None:
        if all(column.low is None and column.high is None for column in self.columns):
            return None
        low = [-math.inf if column.low is None else column.low for column in self.columns]
        high = [math.inf if column.high is None else column.high for column in self.columns]
        return _float32(low), _float32(high)

    @cached_property
    def _must_not_miss(self) -> AnyArray | None:
        """Where NaN is not allowed although other places are imputed; bool, as wide as the last dimension."""
        for op in self.preprocess:
            if isinstance(op, Impute):
                return np.array([value is None for value in op.values]) if None in op.values else None
        return None

    def _rows(self, rows: Sequence[Any] | AnyArray) -> FloatArray:
        """Rows as the numbers that stand for them, float32 [N, columns]; errors say which row."""
        codes = []
        for i, row in enumerate(rows):
            try:
                codes.append(self._row(row))
            except InputError as error:
                if len(rows) == 1:
                    raise
                raise type(error)(f"row {i}: {error}") from error
        return np.stack(codes) if codes else np.empty((0,), np.float32)

    def _row(self, row: Any) -> FloatArray:
        """A row of values as the numbers that stand for them, float32 [columns]; an array holds them already."""
        if _is_numeric(row) and row.shape == (len(self.columns),):
            return _float32(row)
        if isinstance(row, Mapping):
            if unknown := row.keys() - {column.name for column in self.columns}:
                raise ShapeError(f"input {self.name!r} has no column {', '.join(sorted(map(repr, unknown)))}")
            values = [row.get(column.name) for column in self.columns]
        else:
            single = isinstance(row, str | bytes) or not isinstance(row, Sequence | np.ndarray) or _is_scalar(row)
            values = [row] if single else list(row)
            if len(values) != len(self.columns):
                raise ShapeError(
                    f"input {self.name!r}: expected {len(self.columns)} values in a row, got {len(values)}"
                )
        return _float32([column.encode(value) for column, value in zip(self.columns, values, strict=True)])

    def _as_array(self, x: Any) -> AnyArray:
        try:
            array = np.asarray(x)
        except (ValueError, TypeError) as error:
            raise InputError(f"input {self.name!r} is not an array: {error}") from error
        if array.dtype.kind not in _KINDS:
            raise DtypeError(f"input {self.name!r}: expected numbers, got dtype {array.dtype}")
        return array

    def _checked(self, given: AnyArray) -> AnyArray:
        dtype = self._dtype
        if given.dtype != dtype:
            given = self._cast(given, dtype)
        # two reductions tell all that can be wrong: NaN comes through both, infinity through one
        least, most = np.minimum.reduce(given, axis=None).item(), np.maximum.reduce(given, axis=None).item()
        low, high = self._bounds
        if not (low <= least and most <= high and most - least < math.inf):
            self._refuse(given, low, high)
        if self._column_bounds is not None:
            self._check_columns(given, *self._column_bounds)
        return given

    def _cast(self, given: AnyArray, dtype: np.dtype[Any]) -> AnyArray:
        kind = given.dtype.kind
        if kind not in (_KINDS if self.dtype == "float32" else _INTEGERS):
            wanted = "numbers (float32)" if self.dtype == "float32" else f"whole numbers ({self.dtype})"
            raise DtypeError(f"input {self.name!r}: expected {wanted}, got dtype {given.dtype}")
        if self.dtype == "float32":
            return _float32(given)
        cast = given.astype(dtype)
        if not np.array_equal(cast, given):
            raise RangeError(f"input {self.name!r}: values from {given.min()} to {given.max()} do not fit {self.dtype}")
        return cast

    def _refuse(self, given: AnyArray, low: float, high: float) -> None:
        """Say what is wrong, if missing values do not explain it."""
        bad = np.isinf(given) if self.imputes else ~np.isfinite(given)
        if self._must_not_miss is not None:
            bad |= np.isnan(given) & self._must_not_miss
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise NonFiniteError(f"input {self.name!r}: {given[where]} at {self._place(where, given)}; "
                                 "impute or drop the sample")  # fmt: skip
        known = given[~np.isnan(given)]
        if not known.size:
            return
        least, most = known.min().item(), known.max().item()
        if not (low <= least and most <= high):
            form = "g" if known.dtype.kind == "f" else "d"  # of whole numbers the last digit counts
            raise RangeError(
                f"input {self.name!r}: values from {least:{form}} to {most:{form}}, "
                f"allowed {self.low} to {self.high}; is the unit right?"
            )

    def _check_columns(self, given: AnyArray, low: FloatArray, high: FloatArray) -> None:
        outside = (given < low) | (given > high)  # NaN is neither
        if outside.any():
            where = tuple(int(i) for i in np.argwhere(outside)[0])
            column = self.columns[where[-1]]
            raise RangeError(
                f"input {self.name!r}: {self._place(where, given)} is {given[where]:g}, allowed {column.low} to "
                f"{column.high}; is the unit right?"
            )

    def _place(self, where: tuple[int, ...], given: AnyArray) -> str:
        """An element of a sample or batch in words."""
        if not self.columns:
            return str(where)
        of_row = f" of row {where[0]}" if given.ndim > 1 and len(given) > 1 else ""
        return f"column {self.columns[where[-1]].name!r}{of_row}"


def _is_numeric(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in _KINDS


def _is_scalar(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.ndim == 0


def _float32(values: Sequence[float] | AnyArray) -> FloatArray:
    """A copy; what is too large becomes infinity, which is refused with its place."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32)


def _check_range(what: str, low: float | None, high: float | None) -> None:
    if (low is not None and math.isnan(low)) or (high is not None and math.isnan(high)):
        raise ValueError(f"{what}: a limit is a number, got low {low} and high {high}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{what}: nothing is both at least {low} and at most {high}; exchange low and high")


def _check_in_place(before: Sequence[Op]) -> None:
    """Whether a value's place is still the one that it has in what the app gives.

    Raises:
        ValueError: It is not, so an `Impute` could not say of what the app gives which values must not be missing.
    """
    if moved := [type(op).__name__ for op in before if not isinstance(op, Impute | Scale)]:
        raise ValueError(f"impute: with a value that must not be missing (null) it comes before {moved[0]}")


@lru_cache(maxsize=64)
def _places(values: tuple[str, ...]) -> dict[str, int]:
    return {value: i for i, value in enumerate(values)}


# ---- preprocessing, compiled once for each contract


def _compile(op: Op, shape: tuple[int, ...], columns: list[Column]) -> tuple[Step, tuple[int, ...]]:
    """An operation as a function on batches, and the shape of a sample after it. Updates `columns` as it goes."""
    if columns and isinstance(op, Resize | Window | Permute):
        raise ValueError(f"{type(op).__name__.lower()}: a tabular row can be imputed, one-hot encoded and scaled")
    match op:
        case Impute():
            return _impute(op, shape), shape
        case OneHot():
            return _one_hot(op, shape, columns)
        case Scale():
            return _scale(op, shape), shape
        case Resize():
            return _resize(op, shape)
        case Window():
            return _window(op, shape)
        case Permute():
            if sorted(op.order) != list(range(len(shape))):
                raise ValueError(f"permute: {op.order} is no order of the dimensions of {list(shape)}")
            order = (0, *(i + 1 for i in op.order))
            return lambda x: x.transpose(order), tuple(shape[i] for i in op.order)


def _impute(op: Impute, shape: tuple[int, ...]) -> Step:
    if len(op.values) != 1 and (not shape or len(op.values) != shape[-1]):
        raise ValueError(f"impute: {len(op.values)} values do not fit shape {list(shape)}")
    values = _float32([0.0 if value is None else value for value in op.values])
    if not np.isfinite(values).all():
        raise ValueError(f"impute: what stands for a missing value must be finite, got {op.values}")
    return lambda x: np.where(np.isnan(x), values, x)


def _one_hot(op: OneHot, shape: tuple[int, ...], columns: list[Column]) -> tuple[Step, tuple[int, ...]]:
    names = [column.name for column in columns]
    if not names or shape != (len(names),):
        raise ValueError("one_hot: it needs a tabular row, whose columns the contract names")
    sizes = {}
    for name in op.columns:
        if name not in names or not columns[names.index(name)].size:
            raise ValueError(f"one_hot: {name!r} is no category or text column")
        sizes[names.index(name)] = columns[names.index(name)].size

    def step(x: AnyArray) -> AnyArray:
        parts = []
        for i in range(x.shape[1]):
            part = x[:, i : i + 1]
            parts.append((part == np.arange(sizes[i])).astype(np.float32) if i in sizes else part)
        return np.concatenate(parts, axis=1)

    width = sum(sizes.get(i, 1) for i in range(len(names)))
    columns[:] = [
        Column(f"{column.name}={k}" if i in sizes else column.name, "number" if i in sizes else column.kind,
               [] if i in sizes else column.values, 0 if i in sizes else column.buckets)
        for i, column in enumerate(columns)
        for k in range(sizes.get(i, 1))
    ]  # fmt: skip
    return step, (width,)


def _scale(op: Scale, shape: tuple[int, ...]) -> Step:
    mean, std = _float32(op.mean), _float32(op.std)
    if not (mean.size and std.size):
        raise ValueError("scale: mean and std need at least one number each")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError("scale: mean and std must be finite, std above 0")
    if mean.size == 1 == std.size:
        mean, std = mean.reshape(()), std.reshape(())
    else:
        axis = op.axis if op.axis >= 0 else len(shape) + op.axis
        if not 0 <= axis < len(shape):
            raise ValueError(f"scale: shape {list(shape)} has no axis {op.axis}")
        along = [1] * axis + [-1] + [1] * (len(shape) - axis - 1)
        mean, std = (v.reshape(along) if v.size > 1 else v.reshape(()) for v in (mean, std))
        if any(v.size not in (1, shape[axis]) for v in (mean, std)):
            raise ValueError(f"scale: {mean.size} means and {std.size} stds do not fit axis {op.axis} of {list(shape)}")

    def step(x: AnyArray) -> AnyArray:
        scaled = np.subtract(x, mean, dtype=np.float32)
        scaled /= std
        return scaled

    return step


def _resize(op: Resize, shape: tuple[int, ...]) -> tuple[Step, tuple[int, ...]]:
    if len(shape) != len(op.layout) or min(op.height, op.width) < 1:
        raise ValueError(f"resize: layout {op.layout} with size {op.height} x {op.width} does not fit {list(shape)}")
    at = op.layout.index("h")
    last = op.layout == "hwc"

    def step(x: AnyArray) -> AnyArray:
        if x.shape[at + 1 : at + 3] == (op.height, op.width):
            return x
        rows = interpolation(x.shape[at + 1], op.height)
        columns = interpolation(x.shape[at + 2], op.width)
        planes = np.moveaxis(x, -1, 1) if last else x
        # plane by plane, not as one product over the batch: a sample's last digit must not depend on its neighbours
        resized: FloatArray = np.matmul(np.matmul(rows, planes.astype(np.float32, copy=False)), columns.T)
        return np.moveaxis(resized, 1, -1) if last else resized

    return step, (*shape[:at], op.height, op.width, *shape[at + 2 :])


@lru_cache(maxsize=32)
def interpolation(source: int, target: int) -> FloatArray:
    """Weights float32 [target, source] of linear interpolation along one axis; each row sums to 1.

    Pixel centres lie at halves. Where the axis shrinks the triangle is widened by the factor, so that every source
    pixel counts (what imaging libraries call antialiasing).
    """
    scale = source / target
    reach = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs((np.arange(source) + 0.5)[None, :] - centres[:, None])
    weights = np.maximum(0.0, 1.0 - distance / reach)
    result: FloatArray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    result.setflags(write=False)
    return result


def _window(op: Window, shape: tuple[int, ...]) -> tuple[Step, tuple[int, ...]]:
    if not shape or op.length < 1 or op.stride < 1:
        raise ValueError(f"window: length {op.length} and stride {op.stride} do not fit {list(shape)}")

    def step(x: AnyArray) -> AnyArray:
        latest = x[:, ::-1][:, :: op.stride][:, : op.length][:, ::-1]
        missing = op.length - latest.shape[1]
        if missing <= 0:
            return latest
        front = np.repeat(latest[:, :1], missing, axis=1) if op.pad == "edge" else np.zeros_like(
            latest, shape=(len(x), missing, *x.shape[2:])
        )  # fmt: skip
        return np.concatenate([front, latest], axis=1)

    return step, (op.length, *shape[1:])
