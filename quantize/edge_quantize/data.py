"""The rows a checkpoint is made from, checked once at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_quantize.errors import DataError
from edge_sdk.drift.reference import MIN_ROWS
from edge_sdk.errors import InputError, IntegrityError
from edge_sdk.files import load_npz
from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, FloatArray, IndexArray


@dataclass(frozen=True)
class Dataset:
    """Labelled rows in the app's units, before the declared preprocessing.

    Attributes:
        train_x: float32 [N, ...]: what the head was trained on; Fisher information and factory
            memory come from it.
        train_y: int64 [N], positions in the label list.
        holdout_x: float32 [M, ...], M >= 200: rows nobody trained on; metrics, self-test and monitor
            reference come from it.
        holdout_y: int64 [M].
        calibration_x: float32 [K, ...]: what activation ranges are taken from; None takes a sample
            of `train_x`.
    """

    train_x: AnyArray
    train_y: AnyArray
    holdout_x: AnyArray
    holdout_y: AnyArray
    calibration_x: AnyArray | None = None

    def checked(self, spec: InputSpec, labels: Sequence[str]) -> Dataset:
        """The same rows as float32 and int64, or a clear refusal.

        Raises:
            DataError: A split has wrong shapes, non-finite values or labels outside the list; a label has no
                training row; there are too few held-out rows for a monitor reference.
        """
        train_y = _checked_y("train", self.train_y, len(self.train_x), labels)
        holdout_y = _checked_y("holdout", self.holdout_y, len(self.holdout_x), labels)
        if missing := [label for i, label in enumerate(labels) if i not in train_y]:
            raise DataError(f"train: no rows with label {', '.join(map(repr, missing))}; each needs factory memory")
        if len(holdout_y) < MIN_ROWS:
            raise DataError(f"holdout: a monitor reference needs at least {MIN_ROWS} rows, got {len(holdout_y)}")
        return Dataset(
            train_x=_checked_x("train", self.train_x, spec),
            train_y=train_y,
            holdout_x=_checked_x("holdout", self.holdout_x, spec),
            holdout_y=holdout_y,
            calibration_x=None if self.calibration_x is None else _checked_x("calibration", self.calibration_x, spec),
        )

    @classmethod
    def load(cls, train: Path, holdout: Path, calibration: Path | None = None) -> Dataset:
        """Read .npz files with the arrays `x` and `y` (calibration: `x` alone).

        Raises:
            DataError: A file is missing, unreadable, or lacks an array.
        """
        train_x, train_y = _arrays(train, "x", "y")
        holdout_x, holdout_y = _arrays(holdout, "x", "y")
        calibration_x = None if calibration is None else _arrays(calibration, "x")[0]
        return cls(train_x, train_y, holdout_x, holdout_y, calibration_x)


def _checked_x(split: str, x: AnyArray, spec: InputSpec) -> FloatArray:
    try:
        return spec.check_batch(x)
    except InputError as error:
        raise DataError(f"{split}: {error}") from error


def _checked_y(split: str, y: AnyArray, rows: int, labels: Sequence[str]) -> IndexArray:
    y = np.asarray(y)
    if y.dtype.kind not in "iu" or y.shape != (rows,):
        raise DataError(f"{split}: y must be one integer for each of {rows} rows, got {y.dtype} {y.shape}")
    if rows and not 0 <= y.min() <= y.max() < len(labels):
        raise DataError(f"{split}: y runs from {y.min()} to {y.max()}, there are {len(labels)} labels (from 0)")
    return y.astype(np.int64)


def _arrays(path: Path, *names: str) -> list[AnyArray]:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        arrays = load_npz(path)
    except IntegrityError as error:
        raise DataError(str(error)) from error
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"{path} has no array {' or '.join(missing)}; it has {', '.join(sorted(arrays)) or 'none'}")
    return [arrays[name] for name in names]
