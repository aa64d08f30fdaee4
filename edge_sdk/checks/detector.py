"""The contract of a `DriftDetector`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.checks.common import require, require_raises, same

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.drift.base import DriftDetector
    from edge_sdk.types import AnyArray, DoubleArray


_ROUNDING = 1e-4
"""What sums and products of some hundred numbers in single precision may differ by."""


def check_detector(
    make: Callable[[], DriftDetector], *, channels: int = 3, rows: int = 2_000, history: int = 0, seed: int = 0
) -> None:
    """Check a `DriftDetector`.

    Args:
        make: Gives a new detector, always the same one, that notices when channels about 0.5 become 1.
        channels: How many it watches.
        rows: Within how many rows of ones it raises the alarm.
        history: Calm rows, 600 at most, that it must have seen before: for a detector without a reference, which
            compares a stream with its own past.
        seed: Of the streams shown to it.

    Raises:
        CheckFailed: A rule is broken.
    """
    rng = np.random.default_rng(seed)
    calm, ones = rng.uniform(0.4, 0.6, (600, channels)), np.ones((rows, channels))
    _check_detector_begins(make(), calm[:10])
    for stream in (calm, np.concatenate([calm[:300], ones, calm[300:]])):
        _check_detector_blocks(make, stream, rng)
    _check_detector_alarm(make, ones, calm, calm[:history])
    _check_detector_restore(make, calm, ones)
    _check_detector_input(make(), calm[:50])


def _check_detector_begins(detector: DriftDetector, block: DoubleArray) -> None:
    require(not detector.drift_detected and not detector.warning, "a new detector raises neither alarm nor warning")
    require(0 <= detector.evidence < detector.threshold, "a new detector's evidence is below its threshold")
    returned: object = detector.update(block)
    require(returned is None, "update() returns None: what it found is told by properties")


def _check_detector_blocks(make: Callable[[], DriftDetector], stream: DoubleArray, rng: np.random.Generator) -> None:
    whole = make()
    shapes = _shapes(whole)
    whole.update(stream)
    cuts = np.sort(rng.integers(len(stream), size=len(stream) // 20))
    parts = {
        "single rows": np.split(stream, len(stream)),
        "blocks of 32 rows": np.split(stream, range(32, len(stream), 32)),
        "blocks of any size, also none": np.split(stream, cuts),
    }
    for name, blocks in parts.items():
        detector = make()
        for block in blocks:
            detector.update(block)
        require(_shapes(detector) == shapes, f"{name}: memory does not grow; state arrays keep shape and type")
        require(
            _similar(detector.state(), whole.state())
            and bool(np.isclose(detector.evidence, whole.evidence, rtol=_ROUNDING))
            and (detector.warning, detector.drift_detected) == (whole.warning, whole.drift_detected),
            f"{name} give the same state as one block",
        )


def _check_detector_alarm(
    make: Callable[[], DriftDetector], ones: DoubleArray, calm: DoubleArray, history: DoubleArray
) -> None:
    detector = make()
    detector.update(history)
    for row in ones:
        detector.update(row[None])
        if detector.drift_detected:
            break
    require(detector.drift_detected, f"the alarm is up within {len(ones)} rows of ones")
    require(detector.warning, "an alarm implies the warning")
    suspects = detector.suspects(2)
    require(len(suspects) <= 2, "suspects(count) names no more than `count` channels")
    require(all(0 <= channel < ones.shape[1] for channel, _ in suspects), "suspects() names channels that exist")
    detector.update(calm)
    require(detector.drift_detected, "a raised alarm is latched: calm rows do not take it down")
    detector.reset()
    require(not detector.drift_detected and not detector.warning, "reset() takes alarm and warning down")
    require(same(detector.state(), make().state()), "reset() forgets all evidence")


def _check_detector_restore(make: Callable[[], DriftDetector], calm: DoubleArray, ones: DoubleArray) -> None:
    goes_on, restored = make(), make()
    for before, after in ((calm[:100], calm[100:]), (ones, calm)):
        goes_on.update(before)
        state = goes_on.state()
        kept = {key: array.copy() for key, array in state.items()}
        restored.restore(state)
        for block in np.array_split(after, 7):
            goes_on.update(block)
            restored.update(block)
        require(same(state, kept), "what state() gave does not change with later updates")
        require(
            same(restored.state(), goes_on.state())
            and restored.evidence == goes_on.evidence
            and (restored.warning, restored.drift_detected) == (goes_on.warning, goes_on.drift_detected),
            "restore(state()) continues exactly",
        )


def _check_detector_input(detector: DriftDetector, block: DoubleArray) -> None:
    detector.update(block)
    before = {key: array.copy() for key, array in detector.state().items()}
    given = block.copy()
    detector.update(block[:0])
    require(same(detector.state(), before), "an empty block changes nothing")
    wrong = {
        "another number of channels": np.full((4, block.shape[1] + 1), 0.5),
        "a single row without its dimension": block[0],
        **{f"a value of {v}": np.where(np.arange(len(block))[:, None] == 7, v, block) for v in (-0.01, 1.01, np.nan)},
    }
    for name, rows in wrong.items():
        require_raises(ValueError, lambda rows=rows: detector.update(rows), f"{name} is refused")  # type: ignore[misc]
        require(same(detector.state(), before), f"{name} leaves the state as it was")
    detector.update(block)
    require(np.array_equal(block, given), "update() leaves its block as it was")


def _shapes(detector: DriftDetector) -> dict[str, object]:
    return {key: (array.shape, array.dtype) for key, array in detector.state().items()}


def _similar(first: dict[str, AnyArray], second: dict[str, AnyArray]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].shape == second[key].shape and np.allclose(first[key], second[key], rtol=_ROUNDING) for key in first
    )
