"""Which range of values the 256 steps of a uint8 stand for, taken from samples."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import msgspec
import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from edge_quantize.errors import CalibrationWarning, DataError
from edge_quantize.graph import chunks
from edge_sdk.manifest import LatentSpec
from edge_sdk.types import FloatArray

MIN_ROWS = 16
ENOUGH_ROWS = 100


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How activation ranges are found."""

    method: Literal["minmax", "percentile"] = "minmax"
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


class ArrayReader(CalibrationDataReader):  # type: ignore[misc]  # the engine's package has no types
    """Calibration rows in the form that ONNX Runtime's quantizer reads."""

    def __init__(self, x: FloatArray, *, input_name: str) -> None:
        self._batches = iter([{input_name: part} for part in chunks(x)])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name; None at the end."""
        return next(self._batches, None)


def calibration_rows(x: FloatArray, *, max_rows: int, rng: np.random.Generator) -> FloatArray:
    """The rows to calibrate on: all of them, or a random `max_rows`.

    Raises:
        DataError: Fewer than 16 rows.

    Warns:
        CalibrationWarning: Fewer than 100 rows.
    """
    if len(x) < MIN_ROWS:
        raise DataError(f"calibration: at least {MIN_ROWS} rows are needed, got {len(x)}")
    if len(x) < ENOUGH_ROWS:
        warnings.warn(
            f"calibration on {len(x)} rows; with fewer than {ENOUGH_ROWS} the ranges may be too narrow",
            CalibrationWarning,
            stacklevel=2,
        )
    if len(x) <= max_rows:
        return x
    return x[np.sort(rng.choice(len(x), max_rows, replace=False))]


def latent_range(features: FloatArray, config: Calibration) -> LatentSpec:
    """Scale and zero point of the latent.

    Zero is always inside the range, so that it has an exact code: after a ReLU most values are zero.

    Args:
        features: float32 [N, D], the trunk's output in float.
        config: By extremes or by percentiles.

    Raises:
        DataError: The features are constant or not finite.
    """
    low, high = float(features.min()), float(features.max())
    if config.method == "percentile":
        low, high = (float(v) for v in np.percentile(features, [100 - config.percentile, config.percentile]))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    if not np.isfinite(scale) or scale <= 0:
        raise DataError(f"calibration: the latent runs from {low} to {high}; the network is dead on these rows")
    zero_point = int(np.clip(np.rint(-low / float(scale)), 0, 255))
    return LatentSpec(dim=features.shape[1], scale=float(scale), zero_point=zero_point)
