"""Detectors of the river library behind `DriftDetector`: ADWIN and HDDM-W, one for each channel. Extra `river`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from edge_sdk.drift.base import DriftDetector
from edge_sdk.errors import MissingExtraError
from edge_sdk.types import AnyArray, DoubleArray

_RECENT = 0.97
_PICKLED = 8_192
"""Bytes for one of river's objects; ADWIN's takes about 4 kB after 2**32 rows."""


class RiverDetector(DriftDetector):
    """A river detector for each channel; the alarm is raised when any of them tells of a change.

    They take the past of the stream for their reference, and promise no run length: try their settings on normal data
    (`edge drift replay`). Each row costs a call for each channel, and the state takes 8 kB for each.

    Args:
        channels: How many there are.
        make: Gives a new detector of river's, which has `update` and `drift_detected`.
    """

    def __init__(self, channels: int, make: Callable[[], Any]) -> None:
        if channels < 1:
            raise ValueError(f"at least one channel is needed, got {channels}")
        self._channels, self._make = channels, make
        self._detectors = [make() for _ in range(channels)]
        self._fired: DoubleArray = np.zeros(channels)
        self._recent: DoubleArray = np.zeros(channels)
        self._total: DoubleArray = np.zeros(channels)
        self._rows, self._warned = 0, False

    def update(self, block: DoubleArray) -> None:
        """Fold rows, float64 [N, K] in [0, 1]."""
        block = np.asarray(block, dtype=np.float64)
        if block.ndim != 2 or block.shape[1] != self._channels:
            raise ValueError(f"expected rows of {self._channels} channels, got shape {block.shape}")
        if block.size and not (block.min() >= 0 and block.max() <= 1):
            raise ValueError(f"channels lie in [0, 1], got {block.min()} to {block.max()}")
        fired, recent, total = self._fired.copy(), self._recent, self._total
        for row in block:
            for i, (detector, value) in enumerate(zip(self._detectors, row.tolist(), strict=True)):
                detector.update(value)
                if detector.drift_detected:
                    fired[i] += 1
                self._warned |= detector.drift_detected or getattr(detector, "warning_detected", False)
            recent = _RECENT * recent + (1 - _RECENT) * row if self._rows else row
            total = total + row
            self._rows += 1
        self._fired, self._recent, self._total = fired, recent, total

    @property
    def evidence(self) -> float:
        """Changes that the channel with most of them told of since the last reset."""
        return float(self._fired.max())

    @property
    def threshold(self) -> float:
        """One change."""
        return 1.0

    @property
    def warning(self) -> bool:
        """Whether any channel has told of a change, or warned of one where it knows warnings, since the last reset."""
        return self._warned

    @property
    def drift_detected(self) -> bool:
        """Whether any channel has told of a change since the last reset."""
        return self.evidence >= 1

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Channels that told of most changes, with their recent mean less that of all rows since the last reset."""
        shift = self._recent - self._total / max(1, self._rows)
        order = np.lexsort((-np.abs(shift), -self._fired))[:count]
        return [(int(i), float(shift[i])) for i in order]

    def reset(self) -> None:
        """Start anew."""
        self._detectors = [self._make() for _ in range(self._channels)]
        self._fired, self._recent, self._total = (np.zeros(self._channels) for _ in range(3))
        self._rows, self._warned = 0, False

    def state(self) -> dict[str, AnyArray]:
        """River's objects, pickled, as bytes; and what was seen."""
        pickled = b"".join(pickle.dumps(detector).ljust(_PICKLED, b"\0") for detector in self._detectors)
        return {
            "river": np.frombuffer(pickled, dtype=np.uint8).reshape(self._channels, _PICKLED),
            "fired": self._fired,
            "recent": self._recent,
            "total": self._total,
            "scalars": np.array([self._rows, self._warned], dtype=np.float64),
        }

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`, which is unpickled: only from where nobody else can write."""
        if any(state[key].shape != array.shape for key, array in self.state().items()):
            raise ValueError(f"state of {len(state['fired'])} channels for a detector of {self._channels}")
        # river's objects have no other state; what fills up the bytes is not read
        self._detectors = [pickle.loads(row.tobytes()) for row in state["river"]]  # noqa: S301
        self._fired, self._recent, self._total = (state[key].copy() for key in ("fired", "recent", "total"))
        rows, warned = state["scalars"]
        self._rows, self._warned = int(rows), bool(warned)


class ADWINDetector(RiverDetector):
    """Adaptive windowing: any change of a channel's mean against its own past.

    Args:
        channels: How many there are.
        delta: Significance; each channel gets its share (Bonferroni).

    Raises:
        MissingExtraError: river is not installed.

    Source:
        Bifet & Gavalda 2007, "Learning from time-changing data with adaptive windowing",
        doi:10.1137/1.9781611972771.42.
    """

    def __init__(self, channels: int, *, delta: float = 0.002) -> None:
        try:
            from river.drift import ADWIN  # noqa: PLC0415 - behind an extra
        except ImportError as error:
            raise MissingExtraError("ADWIN", "river") from error
        super().__init__(channels, partial(ADWIN, delta=delta / max(1, channels)))


class HDDMWDetector(RiverDetector):
    """Weighted moving averages under McDiarmid's bound: errors that grow, or also ones that shrink.

    Args:
        channels: How many there are.
        confidence: Of the alarm; each channel gets its share (Bonferroni). That of the warning is five times as large.
        sides: "both", or "up" for channels such as errors, where only more is bad.

    Raises:
        MissingExtraError: river is not installed.

    Source:
        Frias-Blanco et al. 2015, "Online and non-parametric drift detection methods based on Hoeffding's bounds",
        doi:10.1109/TKDE.2014.2345382.
    """

    def __init__(self, channels: int, *, confidence: float = 0.001, sides: str = "up") -> None:
        if sides not in ("both", "up"):
            raise ValueError(f'sides is "both" or "up", got {sides!r}')
        try:
            from river.drift.binary import HDDMW  # noqa: PLC0415 - behind an extra
        except ImportError as error:
            raise MissingExtraError("HDDM-W", "river") from error
        share = confidence / max(1, channels)
        make = partial(HDDMW, drift_confidence=share, warning_confidence=5 * share, two_sided_test=sides == "both")
        super().__init__(channels, make)
