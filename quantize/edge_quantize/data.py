"""The rows a checkpoint is made from, checked once at the door."""

from __future__ import annotations

import csv
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_quantize.errors import DataError, LeakageWarning
from edge_sdk.drift.reference import MIN_ROWS
from edge_sdk.errors import InputError, IntegrityError, ShapeError
from edge_sdk.files import load_npz
from edge_sdk.rows import need_parquet
from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, Task

Rows = Any
"""Samples: an array [N, ...] or a list of dict rows; after `checked` an array."""
Targets = Any
"""Truth for each row: see `Dataset`; after `checked` an array, or None for task "raw"."""

MAX_SLICE_VALUES = 64
"""A column with more values than that does not slice the rows, it names them."""
_SLICE = "slice_"
_INPUT = "x."


class DataFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How files of rows are read. Arrays (.npz, .npy) need none of it."""

    target: list[str] = []
    """Columns of a table with the truth: one with names of labels (classification), a 0/1 column for each label
    (multi-label), a number for each target (regression). Empty: the columns named as labels or targets."""
    slices: list[str] = []
    """Columns of the held-out table whose values part its rows for the figures, as "site"."""


@dataclass(frozen=True)
class Dataset:
    """Labelled rows in the app's units, before the declared preprocessing.

    Attributes:
        train_x: [N, ...], or a list of dict rows: what the head was trained on; Fisher information, factory
            memory and moments come from it. None for a model that does not learn.
        train_y: Classification: int [N], positions in the label list, or the labels' names. Multi-label: 0 or 1
            [N, C]. Regression: float [N, T], or [N] for one target, in the targets' units. Raw: None.
        holdout_x: [M, ...], M >= 200: rows nobody trained on; metrics, self-test and monitor reference come from it.
        holdout_y: As `train_y`.
        calibration_x: [K, ...]: what activation ranges are taken from; None takes a sample of `train_x`.
        validation_x: [V, ...]: what recipes are chosen by. Choosing by held-out rows would make the figures of the
            chosen one too good.
        validation_y: As `train_y`.
        slices: Parts of the held-out rows to report apart, by name: bool [M], or a value for each row.
    """

    train_x: Rows
    train_y: Targets
    holdout_x: Rows
    holdout_y: Targets
    calibration_x: Rows = None
    validation_x: Rows = None
    validation_y: Targets = None
    slices: Mapping[str, Any] = field(default_factory=dict)

    def checked(
        self,
        spec: InputSpec | Sequence[InputSpec],
        labels: Sequence[str],
        *,
        task: Task = "classification",
        learns: bool = True,
        min_holdout: int = MIN_ROWS,
    ) -> Dataset:
        """The same rows as arrays, or a clear refusal.

        Args:
            spec: What one sample must look like; several for a model with several inputs, whose rows are mappings.
            labels: Names of the labels, or of the regression's targets.
            task: What the truth means.
            learns: Whether the model learns on the device, and needs rows of every label for it.
            min_holdout: Fewest held-out rows.

        Returns:
            x as `spec.check_batch` gives it; y int64 [N] (classification), int64 [N, C] (multi-label), float32
            [N, T] (regression), None (raw); slices as bool [M], one for each value of a column, sorted by name.

        Raises:
            DataError: Names split, row and column of a value that is wrong, or what is missing.

        Warns:
            LeakageWarning: Held-out rows are among the training, validation or calibration rows.
        """
        if learns and self.train_x is None:
            raise DataError("train: a model that learns on the device needs the rows its head was trained on")
        splits: dict[str, Any] = {}
        for split, x, y in (
            ("train", self.train_x, self.train_y),
            ("holdout", self.holdout_x, self.holdout_y),
            ("validation", self.validation_x, self.validation_y),
        ):
            if x is None and y is not None:
                raise DataError(f"{split}: there is truth, but there are no rows it is about")
            if isinstance(x, Mapping):  # before its length is taken for a number of rows
                raise DataError(
                    f"{split}: rows of several inputs or columns are a list with a mapping for each, not one mapping"
                )
            splits[f"{split}_x"] = x
            splits[f"{split}_y"] = None if x is None else checked_y(split, y, len(x), labels, task=task)
        if learns:
            _check_every_label(splits["train_y"], labels, task)
        if self.holdout_x is None or len(self.holdout_x) < min_holdout:
            found = 0 if self.holdout_x is None else len(self.holdout_x)
            raise DataError(f"holdout: a monitor reference needs at least {min_holdout} rows, got {found}")
        splits["calibration_x"] = self.calibration_x
        for name in ("train_x", "holdout_x", "validation_x", "calibration_x"):
            if splits[name] is not None:
                splits[name] = checked_x(name.removesuffix("_x"), splits[name], spec)
        slices = checked_slices(self.slices, len(splits["holdout_x"]))
        checked = replace(self, **splits, slices=slices)
        for split, shared in checked.leaks().items():
            warnings.warn(
                f"{shared} of {len(checked.holdout_x)} held-out rows are also among the {split} rows, byte for byte; "
                "figures on them are too good: part the rows anew",
                LeakageWarning,
                stacklevel=2,
            )
        return checked

    def leaks(self) -> dict[str, int]:
        """How many held-out rows are also in another split, by split; only those with any. On checked rows."""
        held_out = [_key(row) for row in self.holdout_x]
        shared = {}
        for split, x in (
            ("train", self.train_x),
            ("validation", self.validation_x),
            ("calibration", self.calibration_x),
        ):
            seen = set() if x is None else {_key(row) for row in x}
            if count := sum(key in seen for key in held_out):
                shared[split] = count
        return shared

    @classmethod
    def load(
        cls,
        train: Path | None,
        holdout: Path,
        calibration: Path | None = None,
        *,
        validation: Path | None = None,
        spec: InputSpec | None = None,
        labels: Sequence[str] = (),
        task: Task = "classification",
        form: DataFormat | None = None,
    ) -> Dataset:
        """Read files: .npz, pairs of .npy, .csv or .parquet.

        An .npz holds the arrays `x` and `y`, and may hold `slice_site` and the like for the held-out rows; of a model
        with several inputs, `x.NAME` for each instead of `x`. Of a pair
        NAME_x.npy is given and NAME_y.npy lies beside it. A table has a header; its columns are taken by the names
        of the contract's columns, or, where that names none, all but truth and slices in their order.

        Args:
            train: Training rows; None for a model that does not learn.
            holdout: Rows nobody trained on.
            calibration: x alone.
            validation: Rows to choose recipes by.
            spec: Needed for tables.
            labels: Needed for tables: names of labels or targets.
            task: What the truth means; raw rows have none.
            form: Which columns of a table are what.

        Raises:
            DataError: A file is missing, unreadable, or lacks an array or a column.
            MissingExtraError: A .parquet file without pyarrow.
        """
        reader = _Reader(spec, labels, task, form or DataFormat())
        train_x, train_y, _ = reader.read(train) if train is not None else (None, None, {})
        holdout_x, holdout_y, slices = reader.read(holdout, sliced=True)
        calibration_x = None if calibration is None else reader.read(calibration, truth=False)[0]
        validation_x, validation_y, _ = reader.read(validation) if validation is not None else (None, None, {})
        return cls(train_x, train_y, holdout_x, holdout_y, calibration_x, validation_x, validation_y, slices)


# ---- checks


def checked_x(split: str, x: Rows, spec: InputSpec | Sequence[InputSpec]) -> Rows:
    """Samples as the contract gives them: an array [N, ...], or dict rows of arrays where there are several inputs.

    Raises:
        DataError: Names split, row and column.
    """
    if not isinstance(spec, InputSpec):
        return _checked_dicts(split, x, spec)
    try:
        return spec.check_batch(x)
    except InputError as error:
        if isinstance(error, ShapeError) and isinstance(x, np.ndarray):  # wrong for all rows alike
            raise DataError(f"{split}: {error}") from error
        for i, row in enumerate(x):
            try:
                spec.check(row)
            except InputError as why:
                raise DataError(f"{split}: row {i}: {why}") from why
        raise DataError(f"{split}: {error}") from error


def _checked_dicts(split: str, x: Rows, specs: Sequence[InputSpec]) -> list[dict[str, AnyArray]]:
    names = [spec.name for spec in specs]
    rows = []
    for i, row in enumerate(x):
        if not isinstance(row, Mapping) or set(row) != set(names):
            raise DataError(f"{split}: row {i}: expected a mapping with inputs {', '.join(map(repr, names))}")
        try:
            rows.append({spec.name: spec.check(row[spec.name]) for spec in specs})
        except InputError as error:
            raise DataError(f"{split}: row {i}: {error}") from error
    if not rows:
        raise DataError(f"{split}: there are no rows")
    return rows


def checked_y(split: str, y: Targets, rows: int, labels: Sequence[str], *, task: Task = "classification") -> Targets:
    """Truth in the form that `Dataset.checked` describes.

    Raises:
        DataError: Names split, row and column.
    """
    if task == "raw":
        if y is not None:
            raise DataError(f'{split}: task "raw" knows no truth, leave y out; or name the task the outputs serve')
        return None
    if y is None:
        raise DataError(f"{split}: task {task!r} needs y, the truth for each of {rows} rows")
    try:
        array = np.asarray(y)
    except ValueError as error:
        raise DataError(f"{split}: y is not an array: {error}") from error
    if task == "classification":
        return _checked_labels(split, array, rows, labels)
    if task == "regression" and array.ndim == 1 and len(labels) == 1:
        array = array[:, None]
    what = "a 0 or 1 for each label" if task == "multilabel" else "a number for each target"
    if array.shape != (rows, len(labels)) or array.dtype.kind not in "fiub":
        raise DataError(f"{split}: y must hold {what}, shape {(rows, len(labels))}, got {array.dtype} {array.shape}")
    bad = ~np.isin(array, (0, 1)) if task == "multilabel" else ~np.isfinite(array)
    if bad.any():
        i, j = (int(k) for k in np.argwhere(bad)[0])
        raise DataError(f"{split}: row {i}: {labels[j]!r} is {array[i, j]}, expected {what.partition(' for')[0]}")
    return array.astype(np.int64 if task == "multilabel" else np.float32)


def _checked_labels(split: str, y: AnyArray, rows: int, labels: Sequence[str]) -> AnyArray:
    if y.dtype.kind in "UO" and y.shape == (rows,):
        places = {label: i for i, label in enumerate(labels)}
        for i, label in enumerate(y.tolist()):
            if label not in places:
                raise DataError(f"{split}: row {i}: {label!r} is none of the labels {', '.join(map(repr, labels))}")
        return np.array([places[label] for label in y.tolist()], dtype=np.int64)
    if y.dtype.kind not in "iu" or y.shape != (rows,):
        raise DataError(f"{split}: y must be one integer for each of {rows} rows, got {y.dtype} {y.shape}")
    if rows and not 0 <= y.min() <= y.max() < len(labels):
        i = int(np.flatnonzero((y < 0) | (y >= len(labels)))[0])
        raise DataError(
            f"{split}: y runs from {y.min()} to {y.max()}, there are {len(labels)} labels (from 0); see row {i}"
        )
    return y.astype(np.int64)


def _check_every_label(y: AnyArray, labels: Sequence[str], task: Task) -> None:
    if task == "classification":
        missing = [label for i, label in enumerate(labels) if i not in y]
    elif task == "multilabel":
        missing = [label for i, label in enumerate(labels) if not y[:, i].any()]
    else:
        missing = []
    if missing:
        raise DataError(f"train: no rows with label {', '.join(map(repr, missing))}; each needs factory memory")


def checked_slices(slices: Mapping[str, Any], rows: int) -> dict[str, AnyArray]:
    """Each as bool [rows]; a column of values becomes one for each value, "name=value".

    Raises:
        DataError: One has another number of rows, numbers with fractions, or too many values.
    """
    checked: dict[str, AnyArray] = {}
    for name in sorted(slices):
        values = np.asarray(slices[name])
        if values.shape != (rows,):
            raise DataError(f"slice {name!r}: expected a value for each of {rows} held-out rows, got {values.shape}")
        if values.dtype.kind == "b":
            checked[name] = values
            continue
        if values.dtype.kind not in "iuUO":
            raise DataError(f"slice {name!r}: {values.dtype} values cannot name slices; give text, integers or bool")
        texts = np.array([str(value) for value in values], dtype=np.str_)
        found = np.unique(texts)
        if len(found) > MAX_SLICE_VALUES:
            raise DataError(
                f"slice {name!r} has {len(found)} values, at most {MAX_SLICE_VALUES} make slices; group them"
            )
        checked |= {f"{name}={value}": texts == value for value in found}
    return checked


def _key(row: Any) -> bytes:
    """Equal exactly for rows of equal bytes."""
    parts = [row[name] for name in sorted(row)] if isinstance(row, Mapping) else [row]
    data = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return hashlib.blake2b(data, digest_size=16).digest()


# ---- files


@dataclass(frozen=True)
class _Reader:
    spec: InputSpec | None
    labels: Sequence[str]
    task: Task
    form: DataFormat

    def read(self, path: Path, *, truth: bool = True, sliced: bool = False) -> tuple[Rows, Targets, dict[str, Any]]:
        """x, y and slices of a file."""
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        truth = truth and self.task != "raw"
        match path.suffix.lower():
            case ".npz":
                return _npz(path, truth=truth)
            case ".npy":
                return _npy_pair(path, truth=truth)
            case ".csv":
                return self._table(path, list(_csv_rows(path)), truth=truth, sliced=sliced)
            case ".parquet":
                return self._table(path, _parquet_rows(path), truth=truth, sliced=sliced)
        raise DataError(f"{path}: expected a file ending in .npz, _x.npy, .csv or .parquet")

    def _table(
        self, path: Path, rows: list[dict[str, Any]], *, truth: bool, sliced: bool
    ) -> tuple[Rows, Targets, dict[str, Any]]:
        if self.spec is None:
            raise DataError(f"{path}: a table needs the input contract, which names its columns")
        if not rows:
            raise DataError(f"{path} has no rows")
        targets = list(self.form.target) or ([] if self.task == "classification" else list(self.labels))
        if truth and not targets:
            raise DataError(f"{path}: say which column holds the labels")
        if truth and self.task == "classification" and len(targets) > 1:
            raise DataError(f"{path}: one column holds the labels, got {', '.join(map(repr, targets))}")
        names = [column.name for column in self.spec.columns] or [
            name for name in rows[0] if name not in (*targets, *self.form.slices)
        ]
        wanted = [*names, *(targets if truth else []), *(self.form.slices if sliced else [])]
        if missing := [name for name in wanted if name not in rows[0]]:
            raise DataError(
                f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, rows[0]))}"
            )
        x: Rows = [{name: row[name] for name in names} for row in rows]
        if not self.spec.columns:
            x = _numbers(path, rows, names).astype(np.float32).reshape(len(rows), *_sizes(self.spec, len(names), path))
        y: Targets = None
        if truth and self.task == "classification":
            y = np.array([str(row[targets[0]]) for row in rows], dtype=np.str_)
        elif truth:
            y = _numbers(path, rows, targets)
        return x, y, {name: np.array([str(row[name]) for row in rows]) for name in self.form.slices if sliced}


def _sizes(spec: InputSpec, columns: int, path: Path) -> list[int]:
    if -1 in spec.shape or int(np.prod(spec.shape)) != columns:
        raise DataError(f"{path} has {columns} columns of values, the model takes shape {spec.shape}")
    return spec.shape


def _numbers(path: Path, rows: list[dict[str, Any]], names: Sequence[str]) -> AnyArray:
    numbers = np.empty((len(rows), len(names)))
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            try:
                numbers[i, j] = np.nan if row[name] in ("", None) else float(row[name])
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}: row {i}: {name!r} is {row[name]!r}, expected a number") from error
    return numbers


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.reader(file)
            header = next(table, [])
            if repeated := [name for i, name in enumerate(header) if name in header[:i]]:
                raise DataError(f"{path} has column {repeated[0]!r} more than once")
            for i, cells in enumerate(row for row in table if row):
                if len(cells) != len(header):
                    raise DataError(f"{path}: row {i}: {len(cells)} fields where the header has {len(header)}")
                yield dict(zip(header, cells, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not readable CSV in UTF-8: {error}") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    parquet, arrow = need_parquet("reading Parquet")
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} is not readable Parquet: {error}") from error
    return rows


def _npz(path: Path, *, truth: bool) -> tuple[Rows, Targets, dict[str, Any]]:
    try:
        arrays: dict[str, Any] = dict(load_npz(path))
    except IntegrityError as error:
        raise DataError(str(error)) from error
    inputs = {name.removeprefix(_INPUT): array for name, array in arrays.items() if name.startswith(_INPUT)}
    if len({len(array) for array in inputs.values()}) > 1:
        raise DataError(f"{path}: {', '.join(_INPUT + name for name in inputs)} must have the same number of rows")
    if inputs:
        rows = len(next(iter(inputs.values())))
        arrays["x"] = [{name: array[i] for name, array in inputs.items()} for i in range(rows)]
    if missing := [name for name in ("x", *(["y"] if truth else [])) if name not in arrays]:
        raise DataError(f"{path} has no array {' or '.join(missing)}; it has {', '.join(sorted(arrays)) or 'none'}")
    slices = {name.removeprefix(_SLICE): array for name, array in arrays.items() if name.startswith(_SLICE)}
    return arrays["x"], arrays["y"] if truth else None, slices


def _npy_pair(path: Path, *, truth: bool) -> tuple[AnyArray, Targets, dict[str, Any]]:
    if not path.stem.endswith("_x") and truth:
        raise DataError(f"{path}: name the samples NAME_x.npy, with their truth beside them in NAME_y.npy")
    return _npy(path), _npy(path.with_name(path.stem.removesuffix("_x") + "_y.npy")) if truth else None, {}


def _npy(path: Path) -> AnyArray:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        array: AnyArray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy file of plain numbers: {error}") from error
    return array
