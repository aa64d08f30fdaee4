"""Which range of values the 256 steps of eight bits stand for, taken from samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, ValueInfoProto

from edge_quantize.errors import CalibrationWarning, DataError
from edge_quantize.graph import CHUNK
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.manifest import LatentSpec
from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

MIN_ROWS = 16
ENOUGH_ROWS = 100
MAX_SATURATED = 0.01
"""Share of values beyond the latent's range, above that of the calibration rows, from which on a warning is given.

Of fresh rows of the same kind, the largest of K rows is exceeded by 1 in K + 1, even if all values of a row rise
together: one in a hundred at 100 rows, one in five hundred at 512. A higher share means rows of another kind.
"""

Feeds = AnyArray | Mapping[str, AnyArray] | Sequence[Mapping[str, AnyArray]]
"""Samples for a graph. An array [N, ...] for a graph of one input. By input name, arrays of N rows; where an array has
one dimension more than the input, it holds one whole input a call (a state [N, layers, 1, hidden]), and a scalar is
the same in every call. Or one mapping a call, exactly as the graph takes it."""

_BINS = 2048
_MAX_VALUES = 1 << 22
_CHUNK_BYTES = 64_000_000


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How activation ranges are found."""

    method: Literal["minmax", "percentile", "entropy"] = "minmax"
    percentile: float = 99.99
    """With method "percentile": the share of values, in percent, that the range covers."""
    max_rows: int = 512
    """At most so many calibration rows are used, drawn at random."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A number is out of range.
        """
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (50, 100], got {self.percentile}")
        if self.max_rows < MIN_ROWS:
            raise ValueError(f"max_rows must be at least {MIN_ROWS}, got {self.max_rows}")


def calibration_rows(
    x: AnyArray,
    *,
    max_rows: int,
    rng: np.random.Generator,
    y: AnyArray | None = None,
    spec: InputSpec | None = None,
    held_out: AnyArray | None = None,
) -> AnyArray:
    """The rows to calibrate on: all of them, or a sample of `max_rows`, in their order.

    Args:
        x: [N, ...].
        max_rows: Most rows taken.
        rng: Draws the sample; the same state gives the same rows.
        y: Labels, int [N] or, for several labels a row, bool [N, C]. The sample keeps their shares, and every
            label is in it while there are rows for all.
        spec: Whose smallest and largest value the rows are held against.
        held_out: Rows [M, ...] that are not calibrated on: a channel that is constant there as well is no fault.

    Raises:
        DataError: Fewer than 16 rows.

    Warns:
        CalibrationWarning: Fewer than 100 rows; missing values, constant channels or values that the input
            contract excludes among the rows taken; more labels than rows.
    """
    if len(x) < MIN_ROWS:
        raise DataError(f"calibration: at least {MIN_ROWS} rows are needed, got {len(x)}")
    if len(x) < ENOUGH_ROWS:
        _warn(f"calibration on {len(x)} rows; with fewer than {ENOUGH_ROWS} the ranges may be too narrow")
    if len(x) > max_rows:
        if y is not None and (labels := int(_flags(y).any(axis=0).sum())) > max_rows:
            _warn(f"calibration on {max_rows} rows cannot show all {labels} labels; raise max_rows")
        x = x[np.sort(rng.choice(len(x), max_rows, replace=False) if y is None else stratified(y, max_rows, rng))]
    _check_rows(x, spec, held_out)
    return x


def latent_range(features: FloatArray, config: Calibration) -> LatentSpec:
    """Scale and zero point of the latent.

    Zero is always inside the range, so that it has an exact code: after a ReLU most values are zero.

    Args:
        features: float32 [N, D], the trunk's output in float.
        config: By extremes, by percentiles or by entropy.

    Raises:
        DataError: The features are constant or not finite.
    """
    low, high = float(features.min()), float(features.max())
    if config.method == "percentile":
        low, high = (float(v) for v in np.percentile(features, [100 - config.percentile, config.percentile]))
    elif config.method == "entropy" and 0 < (top := max(-low, high)) < np.inf:
        limit = entropy_limit(_histogram(features, top), top, one_sided=low >= 0 or high <= 0)
        low, high = max(low, -limit), min(high, limit)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    if not np.isfinite(scale) or scale <= 0:
        raise DataError(f"calibration: the latent runs from {low} to {high}; the network is dead on these rows")
    zero_point = int(np.clip(np.rint(-low / float(scale)), 0, 255))
    return LatentSpec(dim=features.shape[1], scale=float(scale), zero_point=zero_point)


def saturated_share(features: FloatArray, latent: LatentSpec) -> float:
    """Share of the values other than zero that lie beyond the latent's range; zero always has its code."""
    codes = features[features != 0] / np.float32(latent.scale) + latent.zero_point
    return float(((codes < -0.5) | (codes > 255.5)).mean()) if codes.size else 0.0


def check_saturation(latent: LatentSpec, calibrated: FloatArray, held_out: FloatArray) -> None:
    """Say so if rows that were not calibrated on leave the latent's range.

    Args:
        latent: The range.
        calibrated: float32 [N, D], the trunk's output on the calibration rows.
        held_out: float32 [M, D], its output on other rows.

    Warns:
        CalibrationWarning: One value in a hundred saturates, over what does on the calibration rows.
    """
    share, usual = saturated_share(held_out, latent), saturated_share(calibrated, latent)
    if share - usual > MAX_SATURATED:
        low = -latent.zero_point * latent.scale
        _warn(
            f"calibration: {share:.1%} of the latent's values lie outside its range ({low:.4g} to "
            f"{low + 255 * latent.scale:.4g}) on rows that were not calibrated on, {usual:.1%} on those that were; "
            f"calibrate on rows like the ones the model will see"
        )


def check_inputs(calibrated: Mapping[str, AnyArray], held_out: Mapping[str, AnyArray]) -> None:
    """Say so if inputs leave the range of those that were calibrated on, by input name.

    Warns:
        CalibrationWarning: One value in a hundred of an input lies outside.
    """
    for name, seen in calibrated.items():
        other = np.asarray(held_out.get(name, seen))
        if np.asarray(seen).dtype.kind != "f" or not other.size:
            continue
        low, high = np.nanmin(seen), np.nanmax(seen)
        if (share := float(((other < low) | (other > high)).mean())) > MAX_SATURATED:
            _warn(
                f"calibration: {share:.1%} of input {name!r} lies outside {low:.4g} to {high:.4g} on rows that "
                f"were not calibrated on; calibrate on rows like the ones the model will see"
            )


class Probe:
    """A graph whose inner tensors can be read.

    Runs without graph optimization, which would merge the tensors away, on one thread.

    Args:
        model: The graph; not changed.
        tensors: Names of what to read, of nodes at the top level.

    Raises:
        RuntimeUnavailableError: The engine refuses the graph.
    """

    def __init__(self, model: ModelProto, tensors: Sequence[str]) -> None:
        self.tensors = list(tensors)
        opened = ModelProto()
        opened.CopyFrom(model)
        del opened.graph.output[:]
        opened.graph.output.extend(ValueInfoProto(name=name) for name in self.tensors)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._model = model
        try:
            self._session = ort.InferenceSession(
                opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the engine's exceptions share no base class of their own
            raise RuntimeUnavailableError(f"ONNX Runtime refuses {model.graph.name!r}: {error}") from error

    def run(self, x: Feeds, *, share: int = 1) -> Iterator[dict[str, AnyArray]]:
        """The tensors by name, call after call, with so many rows a call that they take about 64 MB.

        Args:
            x: The samples.
            share: Take `share` times as much, to go in step with a probe that reads so much less.

        Raises:
            DataError: An input is missing.
            RuntimeUnavailableError: The engine fails.
        """
        rows = 1
        if isinstance(x, np.ndarray | Mapping):
            first = self._call(next(calls(self._model, x, rows=1)))
            rows = int(np.clip(share * _CHUNK_BYTES // max(1, sum(value.nbytes for value in first.values())), 1, CHUNK))
        for feed in calls(self._model, x, rows=rows):
            yield self._call(feed)

    def _call(self, feed: dict[str, AnyArray]) -> dict[str, AnyArray]:
        try:
            return dict(zip(self.tensors, self._session.run(self.tensors, feed), strict=True))
        except Exception as error:  # see above
            raise RuntimeUnavailableError(f"ONNX Runtime fails on {self._model.graph.name!r}: {error}") from error


class Activations:
    """What the activations of a graph look like on the calibration rows.

    Every method of calibration is served by one pass for the extremes and one for histograms of |value|, of a
    fixed number of bins; at no time are the activations of more than some rows in memory.

    Args:
        model: A float graph with its inner shapes inferred.
        x: The calibration rows.

    Source:
        ONNX Runtime's own calibrators keep every activation of every row, and let histograms grow without bound.
    """

    def __init__(self, model: ModelProto, x: Feeds) -> None:
        self._model, self._x = model, x
        graph = model.graph
        types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
        made = [name for node in graph.node for name in node.output]
        self._inner = [name for name in made if types.get(name) == TensorProto.FLOAT]
        self._inputs = [value.name for value in _inputs(model) if value.type.tensor_type.elem_type == TensorProto.FLOAT]

    def ranges(self, config: Calibration) -> dict[str, tuple[float, float]]:
        """Smallest and largest value to be represented, by tensor.

        Raises:
            DataError: A tensor is not finite on these rows, or an input is missing.
            RuntimeUnavailableError: The engine refuses the graph or fails.
        """
        if config.method == "minmax":
            return self.extremes
        found = {}
        for name, (low, high) in self.extremes.items():
            limit = top = max(-low, high)
            if top > 0 and config.method == "percentile":
                limit = percentile_limit(*self.histograms[name], top, config.percentile)
            elif top > 0:
                limit = entropy_limit(self.histograms[name][0], top, one_sided=low >= 0 or high <= 0)
            found[name] = (max(low, -limit), min(high, limit))
        return found

    @cached_property
    def extremes(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of each float tensor."""
        found: dict[str, tuple[float, float]] = {}
        self._sizes: dict[str, int] = {}
        for name, value in self._values():
            if not value.size:
                continue
            low, high = float(value.min()), float(value.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(f"calibration: tensor {name!r} runs from {low} to {high}; it must be finite")
            before = found.get(name, (low, high))
            found[name] = (min(low, before[0]), max(high, before[1]))
            self._sizes[name] = self._sizes.get(name, 0) + value.size
        return found

    @cached_property
    def histograms(self) -> dict[str, tuple[DoubleArray, int]]:
        """Of each tensor, counts of |value| other than zero in 2048 bins up to the largest, and of zeros.

        At most some four million values of each tensor count, evenly taken.
        """
        found: dict[str, tuple[DoubleArray, int]] = {}
        for name, value in self._values():
            if name not in self.extremes:
                continue
            top = max(abs(v) for v in self.extremes[name])
            taken = value.ravel()[:: self._sizes[name] // _MAX_VALUES | 1]  # odd: not the same channel each time
            counts, zeros = found.get(name, (np.zeros(_BINS), 0))
            if top > 0:
                counts = counts + _histogram(taken, top)
            found[name] = (counts, zeros + int((taken == 0).sum()))
        return found

    def _values(self) -> Iterator[tuple[str, AnyArray]]:
        for feed in calls(self._model, self._x, rows=CHUNK):
            yield from ((name, feed[name]) for name in self._inputs)
        for values in Probe(self._model, self._inner).run(self._x):
            yield from values.items()


def percentile_limit(counts: DoubleArray, zeros: int, top: float, percentile: float) -> float:
    """The size of value that `percentile` % of all values do not exceed, to the width of a bin."""
    share = (zeros + np.cumsum(counts)) / (zeros + counts.sum())
    return float(top * (np.searchsorted(share, percentile / 100) + 1) / len(counts)) if share[0] < 1 else top


def entropy_limit(counts: DoubleArray, top: float, *, one_sided: bool) -> float:
    """The size of value to clip at, so that eight bits tell least wrong about the distribution of values.

    Args:
        counts: Histogram of |value| other than zero (zero is exact in every range), from 0 to `top`.
        top: The largest value.
        one_sided: No value is below zero, or none above: all 256 levels serve one side.

    Source:
        Migacz 2017, "8-bit inference with TensorRT", GTC session S7310.
    """
    levels = 256 if one_sided else 128
    divergences, ends = [], range(levels, len(counts) + 1, 8)
    for end in ends:
        kept, present = counts[:end], counts[:end] > 0
        clipped = kept.copy()
        clipped[-1] += counts[end:].sum()
        level = np.arange(end) * levels // end
        mass, cells = np.bincount(level, kept, levels), np.bincount(level, present, levels)
        coarse = np.where(present, mass[level] / np.maximum(cells[level], 1), 0)
        p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1)
        some = p > 0
        divergences.append(float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum()))
    # of equal ones the widest: nothing is clipped for no gain
    best = max(i for i, value in enumerate(divergences) if value <= min(divergences))
    return top * ends[best] / len(counts)


def calls(model: ModelProto, x: Feeds, *, rows: int) -> Iterator[dict[str, AnyArray]]:
    """What the graph is fed, call after call: views of at most `rows` rows, or as its fixed batch demands.

    Raises:
        DataError: An input is missing, or the inputs have different numbers of rows.
    """
    inputs = _inputs(model)
    if isinstance(x, np.ndarray):
        if len(inputs) != 1:
            raise DataError(f"the network has inputs {', '.join(v.name for v in inputs)}; give one array for each")
        x = {inputs[0].name: x}
    if not isinstance(x, Mapping):
        yield from (_typed(call, inputs) for call in x)
        return
    given = _typed(x, inputs)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inputs}
    fixed = {v.name: v.type.tensor_type.shape.dim[0].dim_value for v in inputs if ranks[v.name]}
    stacked = {name for name, array in given.items() if array.ndim == ranks[name] + 1}
    in_rows = {name for name, array in given.items() if array.ndim and name not in stacked}
    counts = {len(given[name]) for name in stacked | in_rows}
    if len(counts) != 1:
        raise DataError(f"the inputs have {sorted(counts)} rows; each needs as many as the others")
    count = counts.pop()
    step = 1 if stacked else max((fixed[name] for name in in_rows), default=0) or rows
    for start in range(0, count, step):
        if start + step > count and any(fixed[name] > 1 for name in in_rows):
            return  # too few rows are left for a fixed batch
        yield {
            name: array[start] if name in stacked else array[start : start + step] if name in in_rows else array
            for name, array in given.items()
        }


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def _typed(feed: Mapping[str, AnyArray], inputs: list[ValueInfoProto]) -> dict[str, AnyArray]:
    if missing := [value.name for value in inputs if value.name not in feed]:
        raise DataError(f"calibration rows lack input {', '.join(missing)}; given are {', '.join(feed) or 'none'}")
    types = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in inputs}
    return {name: np.asarray(feed[name], dtype) for name, dtype in types.items()}


def _histogram(values: AnyArray, top: float) -> DoubleArray:
    sizes = np.abs(values[values != 0])
    bins = np.minimum((sizes * (_BINS / top)).astype(np.int64), _BINS - 1)
    return np.bincount(bins, minlength=_BINS).astype(np.float64)


def stratified(y: AnyArray, count: int, rng: np.random.Generator) -> AnyArray:
    """Positions of `count` rows: first one of each label, then such that the labels keep their shares."""
    shuffled = rng.permutation(len(y))
    flags = _flags(y)[shuffled]
    sizes = flags.sum(axis=0)
    rank = np.cumsum(flags, axis=0)
    first = (flags & (rank == 1)).any(axis=1)
    # how far along its rarest label a row stands; rows without any label stand anywhere
    along = np.where(flags, rank / np.maximum(sizes, 1), np.inf).min(axis=1)
    along = np.where(np.isinf(along), rng.random(len(y)), along)
    return shuffled[np.argsort(np.where(first, -1, along), kind="stable")[:count]]


def _flags(y: AnyArray) -> AnyArray:
    """Which labels each row bears, bool [N, C]."""
    y = np.asarray(y)
    flags: AnyArray = y.astype(bool) if y.ndim == 2 else y[:, None] == np.unique(y)
    return flags


def _check_rows(x: AnyArray, spec: InputSpec | None, held_out: AnyArray | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a channel without any value
        low, high = (np.atleast_1d(edge(_by_channel(x), axis=1)) for edge in (np.nanmin, np.nanmax))
    declared = spec is not None and spec.imputes  # the contract says that values may be missing
    if missing := float(np.isnan(x).mean()) if x.dtype.kind == "f" and not declared else 0.0:
        _warn(f"calibration: {missing:.1%} of the values are missing (NaN); is that so where the model will run?")
    dead = ~(low < high)
    if held_out is not None:
        dead &= (_by_channel(held_out) != low[:, None]).any(axis=1)
    if len(x) > 1 and dead.any():
        names = [column.name for column in spec.columns] if spec is not None else []
        which = [names[i] if i < len(names) else str(i) for i in np.flatnonzero(dead)]
        more = f" and {len(which) - 5} more" if len(which) > 5 else ""
        _warn(f"calibration: channel {', '.join(which[:5])}{more} never changes; calibrate on rows where it does")
    if spec is not None and (beyond := float(_beyond(x, spec).mean())):
        _warn(f"calibration: {beyond:.1%} of the values lie outside what the input contract allows; is the unit right?")


def _beyond(x: AnyArray, spec: InputSpec) -> AnyArray:
    """Where a value, bool as `x`, is below the smallest or above the largest that the contract allows."""
    limits = [(spec.low, spec.high), *((column.low, column.high) for column in spec.columns)]
    low, high = (np.array([np.nan if v is None else v for v in side]) for side in zip(*limits, strict=True))
    outside: AnyArray = (x < low[0]) | (x > high[0])
    if spec.columns:
        outside |= (x < low[1:]) | (x > high[1:])
    return outside


def _by_channel(x: AnyArray) -> AnyArray:
    """[channels, values]. Of three and more dimensions, the channels are the shorter of the second and the last."""
    axis = 1 if x.ndim > 1 and x.shape[1] <= x.shape[-1] else x.ndim - 1
    moved = np.moveaxis(x, axis, 0) if x.ndim > 1 else x[None]
    return moved.reshape(len(moved), -1)


def _warn(message: str) -> None:
    warnings.warn(message, CalibrationWarning, stacklevel=3)
