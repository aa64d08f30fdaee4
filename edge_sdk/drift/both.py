"""Two detectors of the same channels that pass for one."""

from __future__ import annotations

import numpy as np

from edge_sdk.drift.base import DriftDetector
from edge_sdk.drift.edetector import EDetector
from edge_sdk.drift.ranks import with_spread
from edge_sdk.drift.steps import StepDetector
from edge_sdk.types import AnyArray, DoubleArray

_STEPS = "steps_"


class Both(DriftDetector):
    """An e-detector for what is small and lasts, and a test of each window for what is large and sudden.

    Args:
        means: The e-detector; of the channels, and of their distances from the middle if it has twice as many.
        steps: The test; None: there is none.
        channels: K.
    """

    def __init__(self, means: EDetector, steps: StepDetector | None, *, channels: int, spread: bool) -> None:
        self.means, self.steps = means, steps
        self._channels, self._spread = channels, spread

    def update(self, block: DoubleArray) -> None:
        """Fold rows, float64 [N, K] in [0, 1]."""
        block = np.asarray(block, dtype=np.float64)
        if block.ndim != 2 or block.shape[1] != self._channels:
            raise ValueError(f"expected rows of {self._channels} channels, got shape {block.shape}")
        self.means.update(with_spread(block.astype(np.float32)) if self._spread else block)
        if self.steps is not None:
            self.steps.update(block)

    @property
    def _all(self) -> list[EDetector | StepDetector]:
        return [self.means] if self.steps is None else [self.means, self.steps]

    @property
    def _loudest(self) -> EDetector | StepDetector:
        return max(self._all, key=lambda detector: detector.evidence / detector.threshold)

    @property
    def evidence(self) -> float:
        """The larger, by its threshold; in rows of the e-detector's run length."""
        return self._loudest.evidence / self._loudest.threshold * self.threshold

    @property
    def threshold(self) -> float:
        """The e-detector's run length."""
        return self.means.threshold

    @property
    def warning(self) -> bool:
        """Whether either warns."""
        return self.means.warning or (self.steps is not None and self.steps.warning)

    @property
    def drift_detected(self) -> bool:
        """Whether either has raised the alarm."""
        return self.means.drift_detected or (self.steps is not None and self.steps.drift_detected)

    @property
    def quiet_rows(self) -> int:
        """Rows since either last was at or above its warning level."""
        return min(detector.quiet_rows for detector in self._all)

    def suspects(self, count: int = 3) -> list[tuple[int, float]]:
        """Of the one whose alarm is up, or that has the more evidence; distances from the middle count from K on."""
        up = [detector for detector in self._all if detector.drift_detected]
        return (up[0] if len(up) == 1 else self._loudest).suspects(count)

    def look_again(self) -> None:
        """Let the e-detector begin anew, with the alarm still up; the test does so with every window."""
        self.means.look_again()

    def reset(self) -> None:
        """Forget the evidence and take the alarm down."""
        for detector in self._all:
            detector.reset()

    def state(self) -> dict[str, AnyArray]:
        """Evidence so far."""
        steps = self.steps.state() if self.steps is not None else {}
        return self.means.state() | {_STEPS + key: array for key, array in steps.items()}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        self.means.restore({key: array for key, array in state.items() if not key.startswith(_STEPS)})
        if self.steps is not None:
            self.steps.restore(
                {key.removeprefix(_STEPS): array for key, array in state.items() if key.startswith(_STEPS)}
            )
