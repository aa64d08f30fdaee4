"""The few nouns that every part of the SDK shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
AnyArray = NDArray[Any]

Mode = Literal["monitor", "shadow", "adapt"]
"""How far the device is trusted: watch only, also learn and judge, or also promote."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model said about one sample, and which version of it said so.

    Attributes:
        id: Names the prediction in `observe`; unique on this device.
        label: The most probable label.
        probabilities: float32 [C], in the order of `labels`; sums to 1. Read-only.
        labels: The labels the version knew.
        release: Release number of the base checkpoint.
        head: Number of the personal head on it; 0 is the head the release came with.
        latency_ms: Time spent in `predict`, in milliseconds.
    """

    id: str
    label: str
    probabilities: FloatArray
    labels: tuple[str, ...]
    release: int
    head: int
    latency_ms: float

    @property
    def confidence(self) -> float:
        """Probability of the label, 0 to 1."""
        return float(self.probabilities.max())
