"""The few nouns that every part of the SDK shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
"""float32, any shape; functions state theirs."""
DoubleArray = NDArray[np.float64]
"""float64: statistics are summed in double precision."""
LatentArray = NDArray[np.uint8]
"""uint8 [N, D]: what the trunk puts out and the replay buffer holds."""
IndexArray = NDArray[np.int64]
"""int64 [N]: positions in the label list."""
BoolArray = NDArray[np.bool_]
AnyArray = NDArray[Any]

Task = Literal["classification", "multilabel", "regression", "raw"]
"""What the outputs mean. Raw: as the graph gives them; such a model is served and watched, not learned on."""

Variant = Literal["int8", "fp32"]
"""Which of a checkpoint's two trunks, or whole models."""

Mode = Literal["monitor", "shadow", "adapt"]
"""How far the device is trusted: watch only, also learn and judge, or also promote."""


Truth = str | float | Sequence[str] | Sequence[float] | NDArray[Any]
"""What really was: a label; the labels that applied (multi-label); a number, or one for each target (regression)."""

NO_VALUES: FloatArray = np.zeros(0, dtype=np.float32)
NO_VALUES.setflags(write=False)
NOTHING: Mapping[str, AnyArray] = MappingProxyType({})


class Prediction(msgspec.Struct, frozen=True):
    """What the model said about one sample, and which version of it said so. Arrays are read-only.

    Attributes:
        id: Names the prediction in `observe`; unique on this device.
        label: The most probable label; empty for regression and for a raw model.
        probabilities: float32 [C], in the order of `labels`. Classification: sums to 1. Multi-label: each in [0, 1].
            Otherwise empty.
        labels: The labels the version knew, or the names of the regression's targets.
        release: Release number of the base checkpoint.
        head: Number of the personal head on it; 0 is the head the release came with.
        latency_ms: Time spent in `predict`, in milliseconds; in a batch the share of one sample.
        present: The labels that reached their threshold (multi-label), or the label itself.
        values: float32 [T], in the targets' units (regression); otherwise empty.
        outputs: What a raw model put out, by name and without the batch dimension; otherwise empty.
        state: What a recurrent model carries on: give it to the next `predict`. Otherwise empty.
        holdout: Act as if there were no prediction (`holdout_share`): its label is then free of the model's influence.
    """

    id: str
    label: str
    probabilities: FloatArray
    labels: tuple[str, ...]
    release: int
    head: int
    latency_ms: float
    present: tuple[str, ...] = ()
    values: FloatArray = msgspec.field(default_factory=lambda: NO_VALUES)
    outputs: Mapping[str, AnyArray] = msgspec.field(default_factory=lambda: NOTHING)
    state: Mapping[str, AnyArray] = msgspec.field(default_factory=lambda: NOTHING)
    holdout: bool = False

    @property
    def confidence(self) -> float:
        """Probability of the label, 0 to 1; NaN where there are no probabilities."""
        return float(self.probabilities.max()) if len(self.probabilities) else math.nan

    @property
    def value(self) -> float:
        """The number that a regression with one target predicts.

        Raises:
            ValueError: There is no such number, or more than one.
        """
        if len(self.values) != 1:
            raise ValueError(f"this prediction has {len(self.values)} values; read `values`")
        return float(self.values[0])
