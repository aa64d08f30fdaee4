"""How the model does: an alarm on delayed labels, and running scores of it by class and slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from edge_sdk.drift.edetector import EDetector, OverEDetector
from edge_sdk.stats import wilson_interval
from edge_sdk.types import AnyArray, BoolArray, DoubleArray, Task

_Z = 2.0
"""How many standard errors of the reference the band forgives. Measured with references of 200 and 1000 rows: at most
0.1 false alarms in a run length of 10 000 rows, and 0.33 in one of 100 000; with 1.5 they were 0.3 and 2."""
_BINS = 10
_MAX_CLASSES = 1024
_MAX_SLICED_CLASSES = 64
"""With more labels there are no scores by class, within slices and at all: 32 slices of 64 labels take 26 kB."""
_OTHER = "other"
_MAX_NAME = 64
_PREFIX = "prequential."
_FEW = 4
"""Numbers in a tally before those of the classes."""


class PerformanceMonitor(OverEDetector):
    """Raises an alarm when the error rate leaves what it was on labelled reference rows, for worse or for better.

    Its one channel is the error: 1 for a wrong answer and 0 for a right one. For a regression whose reference knows its
    losses it is the loss, clipped at `loss_scale` and divided by it. The band is as wide as the farther end of the
    reference's Wilson interval at two standard errors: a variable in [0, 1] varies at most as much as a yes or no of
    the same mean.

    Args:
        accuracy: Share of right answers in the reference; NaN: unknown, then no alarm is ever raised.
        labelled: Rows of the reference whose truth was known.
        run_length: Labelled rows between two false alarms.
        labels: Of the model, in the order of its outputs; for `prequential`.
        task: What the outputs mean.
        loss_scale: Of a regression: 0.95 quantile of the reference's losses; NaN: right and wrong are watched instead.
        loss_mean: Mean of the clipped and divided losses of the reference, in [0, 1]; NaN as above.

    Example:
        >>> monitor = PerformanceMonitor(0.9, 1000, run_length=1000.0, labels=("a", "b"))
        >>> monitor.update_rows(np.zeros(60, dtype=bool))
        >>> monitor.drift_detected
        True
    """

    def __init__(
        self,
        accuracy: float,
        labelled: int,
        *,
        run_length: float,
        labels: Sequence[str] = (),
        task: Task = "classification",
        loss_scale: float = math.nan,
        loss_mean: float = math.nan,
    ) -> None:
        self._scale = loss_scale if task == "regression" and math.isfinite(loss_scale + loss_mean) else math.nan
        error = 1 - accuracy if math.isnan(self._scale) else loss_mean
        known = labelled if math.isfinite(error) else 0
        low, high = wilson_interval(round(error * known) if known else 0, known, z=_Z)
        # a band wider than the range is one that no mean can leave
        mean, slack = (error, max(high - error, error - low)) if known else (0.5, 1.0)
        self._detector = EDetector(np.array([mean]), np.array([slack]), run_length=run_length)
        self.prequential = Prequential(labels, task=task)
        """Running scores; they outlive `reset`, and have no part in the alarm."""

    def update_rows(
        self,
        right: AnyArray,
        *,
        losses: AnyArray | None = None,
        truths: AnyArray | None = None,
        said: AnyArray | None = None,
        confidence: AnyArray | None = None,
        slices: Sequence[str] = (),
    ) -> None:
        """Fold labelled predictions, in the order in which the labels came.

        Args:
            right: bool [N].
            losses: float [N] >= 0, of a regression, in the unit of `loss_scale`; what is not finite counts as large.
            truths: As in `Prequential.update`, like all below.
            said: What was predicted.
            confidence: Of each answer.
            slices: Of each row.

        Raises:
            ValueError: Lengths differ, or losses are missing; nothing was folded.
        """
        right = np.asarray(right, dtype=np.bool_)
        errors = 1.0 - right
        if not math.isnan(self._scale):
            if losses is None:
                raise ValueError("a regression that is judged by its losses needs them with every row")
            errors = _clipped(np.asarray(losses, dtype=np.float64), self._scale)
        self.prequential.update(right, losses=losses, truths=truths, said=said, confidence=confidence, slices=slices)
        self.update(errors[:, None])

    def update(self, block: DoubleArray) -> None:
        """Fold errors, float64 [N, 1] in [0, 1]; the running scores hear of `update_rows` alone."""
        self._detector.update(block)

    def reset(self) -> None:
        """Forget the evidence and take the alarm down; the running scores stay."""
        self._detector.reset()

    def state(self) -> dict[str, AnyArray]:
        """Evidence and running scores."""
        return self._detector.state() | {_PREFIX + key: array for key, array in self.prequential.state().items()}

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from `state`."""
        self._detector.restore({key: array for key, array in state.items() if not key.startswith(_PREFIX)})
        self.prequential.restore(
            {key.removeprefix(_PREFIX): array for key, array in state.items() if key.startswith(_PREFIX)}
        )


def _clipped(losses: DoubleArray, scale: float) -> DoubleArray:
    """Losses by their scale, at most 1; with a scale of 0 whatever is a loss is a full one."""
    clipped = np.clip(losses, 0, scale) / scale if scale > 0 else np.where(losses > 0, 1.0, losses)
    full: DoubleArray = np.where(np.isnan(losses), 1.0, clipped)
    return full


def clipped_mean(losses: AnyArray, scale: float) -> float:
    """What `PerformanceMonitor` takes as `loss_mean`: of losses float [N] >= 0, N > 0."""
    return float(_clipped(np.asarray(losses, dtype=np.float64), scale).mean())


class Prequential:
    """Running scores of a stream of labelled predictions in which old rows fade: test, then maybe train.

    Accuracy, precision, recall and F1 over all rows, by class and by slice, and the expected calibration error. A
    slice fades with its own rows, so that a rare one is not forgotten between two of them. Memory is bounded: of more
    than `max_slices` slices at a time, the others count together as "other".

    Args:
        labels: Of the model, in the order of its outputs.
        task: What the outputs mean.
        fading: Weight of a row relative to the one after it; 0.999 looks back over about 1000.
        max_slices: Most slices with scores of their own.

    Source:
        Gama, Sebastião & Rodrigues 2013, "On evaluating stream learning algorithms", doi:10.1007/s10994-012-5320-9.

    Example:
        >>> scores = Prequential(("no", "yes"))
        >>> scores.update(np.array([True, False]), truths=np.array([1, 0]), said=np.array([1, 1]))
        >>> scores.scores()["classes"]["yes"]["recall"]
        1.0
    """

    def __init__(
        self, labels: Sequence[str], *, task: Task = "classification", fading: float = 0.999, max_slices: int = 32
    ) -> None:
        if not 0 < fading < 1:
            raise ValueError(f"fading lies between 0 and 1, got {fading}")
        self._labels, self._task = tuple(labels), task
        self._fading, self._max_slices = fading, max_slices
        classes = len(self._labels) if task in ("classification", "multilabel") else 0
        self._classes = classes if classes <= _MAX_CLASSES else 0
        self._width = _width(classes) if classes <= _MAX_SLICED_CLASSES else _width(0)
        self._all: DoubleArray = np.zeros(_width(self._classes))
        self._gaps: DoubleArray = np.zeros(_BINS + 1)
        self._slices: dict[str, DoubleArray] = {}
        self._seen: dict[str, int] = {}
        self._rows = 0

    def update(
        self,
        right: AnyArray,
        *,
        losses: AnyArray | None = None,
        truths: AnyArray | None = None,
        said: AnyArray | None = None,
        confidence: AnyArray | None = None,
        slices: Sequence[str] = (),
    ) -> None:
        """Add rows, oldest first.

        Args:
            right: bool [N].
            losses: float [N], of a regression; what is not finite is left out.
            truths: int64 [N], number of the true label, -1 for one that the model does not know; multi-label: bool
                [N, C]. Without these and `said` there are no scores by class.
            said: The same of the prediction.
            confidence: float [N] in [0, 1], how sure the model was to be right; NaN: not told.
            slices: The app's names for the part of the world each row is from, "" for none; or nothing at all.

        Raises:
            ValueError: Lengths differ; nothing was added.
        """
        right = np.asarray(right, dtype=np.bool_)
        given = {"losses": losses, "truths": truths, "said": said, "confidence": confidence, "slices": slices or None}
        for name, values in given.items():
            if values is not None and len(values) != len(right):
                raise ValueError(f"{len(values)} {name} for {len(right)} rows")
        rows = self._tallied(right, losses, truths, said)
        self._all = self._faded(self._all, rows)
        if confidence is not None:
            self._calibrate(np.asarray(confidence, dtype=np.float64), right)
        names = np.array([name[:_MAX_NAME] for name in slices], dtype=np.str_)
        for name in filter(None, dict.fromkeys(map(str, names))):
            which = np.flatnonzero(names == name)
            kept = self._kept(name)
            before = self._slices.get(kept, np.zeros(self._width))
            self._slices[kept] = self._faded(before, rows[which, : self._width])
            self._seen[kept] = self._rows + int(which[-1])
        self._rows += len(right)

    def _tallied(
        self, right: BoolArray, losses: AnyArray | None, truths: AnyArray | None, said: AnyArray | None
    ) -> DoubleArray:
        """What each row adds to the tallies, float64 [N, 4 + 3 C]: see `_told`."""
        rows = np.zeros((len(right), _width(self._classes)))
        rows[:, 0], rows[:, 1] = 1, right
        if losses is not None:
            loss = np.asarray(losses, dtype=np.float64)
            rows[:, 2] = np.isfinite(loss)
            rows[:, 3] = np.where(rows[:, 2] > 0, loss, 0)
        if truths is not None and said is not None and self._classes:
            true, predicted = (self._members(labels) for labels in (truths, said))
            rows[:, _FEW:] = np.concatenate([true & predicted, true, predicted], axis=1)
        return rows

    def _members(self, labels: AnyArray) -> BoolArray:
        """Which classes each row is of; bool [N, C]."""
        if self._task == "multilabel":
            return np.asarray(labels, dtype=np.bool_)
        members: BoolArray = np.asarray(labels)[:, None] == np.arange(self._classes)
        return members

    def _faded(self, before: DoubleArray, rows: DoubleArray) -> DoubleArray:
        after: DoubleArray = before * self._fading ** len(rows) + self._weights(len(rows)) @ rows
        return after

    def _weights(self, rows: int) -> DoubleArray:
        weights: DoubleArray = np.power(self._fading, np.arange(rows - 1, -1, -1.0))
        return weights

    def _calibrate(self, confidence: DoubleArray, right: BoolArray) -> None:
        told = np.isfinite(confidence)
        p = confidence[told]
        bins = np.clip((p * _BINS).astype(np.int64), 0, _BINS - 1)
        rows = np.zeros((len(p), _BINS + 1))
        rows[np.arange(len(p)), bins] = p - right[told]
        rows[:, _BINS] = 1
        self._gaps = self._faded(self._gaps, rows)

    def _kept(self, name: str) -> str:
        """Under which name a slice counts: one that has long been silent must make room, or it counts as "other"."""
        if name in self._slices or len(self._slices) < self._max_slices:
            return name
        silent = min(self._seen, key=lambda other: self._seen[other])
        if self._rows - self._seen[silent] <= 1 / (1 - self._fading):
            return _OTHER
        del self._slices[silent], self._seen[silent]
        return name

    def scores(self) -> dict[str, Any]:
        """All scores, as plain numbers; None where nothing is known.

        Returns:
            `rows`: how many the scores rest on, faded ones counted less; `accuracy`; `loss` (mean, of a regression);
            `precision`, `recall`, `f1`: means over the classes that came; `classes`: the three by label, with `rows`;
            `calibration_error`: expected, over ten bins; `slices`: all but the last two by slice. Slices' names are for
            the device alone.
        """
        error = _ratio(float(np.abs(self._gaps[:_BINS]).sum()), self._gaps[_BINS])
        slices = {name: _told(tally, self._labels) for name, tally in self._slices.items()}
        return {**_told(self._all, self._labels), "calibration_error": error, "slices": slices}

    def state(self) -> dict[str, AnyArray]:
        """All that `restore` needs, as plain arrays."""
        return {
            "all": self._all,
            "gaps": self._gaps,
            "slices": np.array(list(self._slices.values())).reshape(-1, self._width),
            "names": np.frombuffer(msgspec.msgpack.encode(list(self._slices)), dtype=np.uint8),
            "seen": np.array([*self._seen.values(), self._rows], dtype=np.int64),
        }

    def restore(self, state: dict[str, AnyArray]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: It is the state of scores of other labels.
        """
        try:
            names = msgspec.msgpack.decode(state["names"].tobytes(), type=list[str])
        except msgspec.MsgspecError as error:
            raise ValueError(f"the names of slices cannot be read: {error}") from error
        shapes = {"slices": (len(names), self._width), "seen": (len(names) + 1,)}
        shapes |= {"all": self._all.shape, "gaps": self._gaps.shape}
        if {key: state[key].shape for key in shapes} != shapes:
            raise ValueError(f"the state is of other scores than those of {len(self._labels)} labels")
        self._all, self._gaps = state["all"].copy(), state["gaps"].copy()
        self._slices = dict(zip(names, state["slices"].copy(), strict=True))
        *seen, self._rows = (int(row) for row in state["seen"])
        self._seen = dict(zip(names, seen, strict=True))


def _width(classes: int) -> int:
    return _FEW + 3 * classes


def _told(tally: DoubleArray, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of a tally: rows, right ones, rows with a loss, their loss; and by class hits, true and predicted ones."""
    rows, right, with_loss, loss = (float(v) for v in tally[:_FEW])
    hits, true, said = tally[_FEW:].reshape(3, -1)
    classes = {
        label: {
            "rows": float(t),
            "precision": _ratio(h, s),
            "recall": _ratio(h, t),
            "f1": _ratio(2 * h, t + s),
        }
        for label, h, t, s in zip(labels, hits, true, said, strict=False)
        if t + s > 0
    }
    means = {key: _mean([each[key] for each in classes.values()]) for key in ("precision", "recall", "f1")}
    return {"rows": rows, "accuracy": _ratio(right, rows), "loss": _ratio(loss, with_loss), **means, "classes": classes}


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
