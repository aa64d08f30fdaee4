"""The device's monitors together: inputs, latents, outputs, accuracy against one reference, under one alarm budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_sdk.drift.base import DriftDetector
from edge_sdk.drift.diagnose import Diagnosis, Evidence, Live, diagnose
from edge_sdk.drift.estimate import estimate
from edge_sdk.drift.features import input_features
from edge_sdk.drift.latent import latent_names
from edge_sdk.drift.performance import PerformanceMonitor
from edge_sdk.drift.quality import QualityMonitor
from edge_sdk.drift.reference import Reference, output_channels, output_names
from edge_sdk.drift.steps import LEVELS
from edge_sdk.drift.summary import Summary
from edge_sdk.drift.watched import LOOK_BACK, Watched
from edge_sdk.errors import IntegrityError
from edge_sdk.files import pack_arrays, unpack_arrays
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, LatentArray

NAMES = ("input", "quality", "latent", "output", "accuracy")
_KEPT_ROWS = 128
"""Of raw features, to say in words what has changed; they are never stored."""
_LEAST_LABELS = 50
_STEPS = {"input": 0.55, "output": 0.35}
"""Shares of the alarm budget for the tests of whole windows. The e-detectors together have all of it as well, and stay
far below: a tenth of it was measured (ADR 21)."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One monitor's alarm, in words.

    Attributes:
        monitor: One of `NAMES`.
        evidence: In rows of run length; the alarm was raised at `threshold`.
        threshold: Rows between two false alarms of this monitor.
        suspects: What carried it, strongest first: name and shift of the recent mean, in [-1, 1].
    """

    monitor: str
    evidence: float
    threshold: float
    suspects: tuple[tuple[str, float], ...]


class DriftMonitors:
    """Folds logged rows and labels, keeps the evidence, and learns a new reference when told to.

    The monitors share the budget: of five the e-detector of each has five times the run length, and there are tests
    of whole windows of inputs and of outputs. Which there are depends on what the reference knows: of a table there are
    only `input` and `quality`.

    Args:
        reference: What is normal; from the checkpoint.
        labels: The labels of the served model, for names.
        run_length: Predictions between two false alarms of all monitors together.
        rereference_rows: Live rows that make a new reference.
    """

    def __init__(
        self, reference: Reference, labels: tuple[str, ...], *, run_length: float, rereference_rows: int
    ) -> None:
        self.reference, self._labels = reference, labels
        self._rereference_rows = rereference_rows
        self._widths = {"output": len(output_names(labels, reference.task)) if len(reference.output_mean) else 0}
        modelled = bool(self._widths["output"])
        there = {"latent": reference.latent is not None, "output": modelled, "accuracy": modelled}
        names = [name for name in NAMES if there.get(name, True)]
        self._budget = run_length
        self._run_length = run_length * len(names)
        self._steps = {name: run_length / share for name, share in _STEPS.items()}
        self.watched = {name: self._watch(name) for name in names if name in ("input", "latent", "output")}
        self.quality = QualityMonitor(reference, run_length=self._run_length)
        self.performance = self._judge(reference.accuracy, reference.labelled) if "accuracy" in names else None
        self.collecting: set[str] = set()
        """Monitors that are learning what is normal now, and raise no alarm meanwhile."""
        self._labelled: list[int] = [0, 0]
        self._confidences: FloatArray = np.zeros(0, np.float32)
        self._rows: FloatArray = np.zeros((0, len(reference.names)), np.float32)
        self.summary = Summary(reference.names, reference=reference.digest)

    def _watch(self, name: str) -> Watched:
        r = self.reference
        if name == "input":
            mean, std = np.concatenate([r.input_mean, r.spread_mean]), np.concatenate([r.input_std, r.spread_std])
            return Watched(
                mean, std, rows=r.rows, run_length=self._run_length, spread=True,
                levels=r.input_levels, step_run_length=self._steps["input"],
            )  # fmt: skip
        if name == "latent":
            return Watched(r.latent_mean, r.latent_std, rows=r.rows, run_length=self._run_length)
        mean, std, levels, cuts = r.output_mean, r.output_std, r.output_levels, r.output_cuts
        if len(mean) != self._widths[name]:  # labels were learned since: `rereference` is due
            mean, std = np.full(self._widths[name], 0.5), np.full(self._widths[name], 0.5)
            levels = np.repeat((np.arange(1, LEVELS + 1) / (LEVELS + 1))[None], self._widths[name], axis=0)
            cuts = levels.astype(np.float32)
        return Watched(
            mean, std, rows=r.rows, run_length=self._run_length,
            levels=levels, cuts=cuts, step_run_length=self._steps.get(name, math.inf),
        )  # fmt: skip

    def _judge(self, accuracy: float, labelled: int) -> PerformanceMonitor:
        r = self.reference
        return PerformanceMonitor(
            accuracy, labelled, run_length=self._run_length, labels=self._labels, task=r.task,
            loss_scale=r.loss_scale, loss_mean=r.loss_mean,
        )  # fmt: skip

    @property
    def detectors(self) -> dict[str, DriftDetector]:
        """The detector of each monitor that there is."""
        found: dict[str, DriftDetector | None] = {name: watched.detector for name, watched in self.watched.items()}
        found |= {"quality": self.quality, "accuracy": self.performance}
        return {name: detector for name in NAMES if (detector := found.get(name)) is not None}

    def fold(
        self,
        x: FloatArray,
        scores: FloatArray,
        latents: LatentArray | None = None,
        times: DoubleArray | None = None,
        *,
        said: Sequence[str] = (),
        latency_ms: AnyArray | None = None,
    ) -> None:
        """Fold predictions, oldest first.

        Rows of a model with other labels than the present one's are left to the caller to drop.

        Args:
            x: Thumbnails of inputs, float32 [N, ...].
            scores: float32 [N, C].
            latents: uint8 [N, D]; None: the latent is not watched in this block.
            times: float64 [N], seconds since the epoch; None: seasons are not looked for.
            said: The labels predicted, for the summary.
            latency_ms: For the summary.
        """
        if not len(x):
            return
        r = self.reference
        features = input_features(x)
        ranks, bins = r.ranker(features)
        blocks = {"input": ranks}
        if "output" in self.watched:
            blocks["output"] = output_channels(scores, r.output_edges, r.task)
        if r.latent is not None and latents is not None:
            blocks["latent"] = r.latent.channels(latents)
        for name, block in blocks.items():
            if name not in self.collecting:
                self.watched[name].fold(block, times)
            elif self.watched[name].collect(block, times) >= self._rereference_rows:
                self.watched[name].adopt()
                self.collecting.discard(name)
        self.quality.update(features)
        self._rows = np.concatenate([self._rows, features])[-_KEPT_ROWS:]
        confidence = scores.max(axis=1) if r.task in ("classification", "multilabel") and scores.shape[1] else None
        if confidence is not None:
            self._confidences = np.concatenate([self._confidences, confidence])[-LOOK_BACK:]
        self.summary.add(features, bins, said=said, confidence=confidence, latency_ms=latency_ms)

    def fold_labels(self, correct: AnyArray, **more: Any) -> None:
        """Fold whether labelled predictions were right: bool [N], in the order in which the labels came.

        Args:
            correct: Whether each was right.
            more: As in `PerformanceMonitor.update_rows`.
        """
        performance = self.performance
        if performance is None or not len(correct):
            return
        if "accuracy" not in self.collecting:
            performance.update_rows(correct, **more)
            return
        performance.prequential.update(np.asarray(correct, bool), **more)
        self._labelled = [self._labelled[0] + int(np.sum(correct)), self._labelled[1] + len(correct)]
        if self._labelled[1] >= self._rereference_rows // 3:
            (right, count), self._labelled = self._labelled, [0, 0]
            self.collecting.discard("accuracy")
            self._adopt_accuracy(right / count, count)

    def _adopt_accuracy(self, accuracy: float, labelled: int) -> None:
        """Judge by another accuracy; the running scores go on."""
        before = self.performance
        # what losses were is known of the checkpoint's rows alone: from now on right and wrong are watched
        self.reference = replace(
            self.reference, accuracy=accuracy, labelled=labelled, loss_scale=math.nan, loss_mean=math.nan
        )
        self.performance = self._judge(accuracy, labelled)
        if before is not None:
            self.performance.prequential = before.prequential

    def rereference(self, labels: tuple[str, ...]) -> None:
        """Start anew after a promotion: the next live rows show what is normal now.

        Args:
            labels: The labels of the model that serves from now on.
        """
        grown, self._labels = labels != self._labels, labels
        if "output" in self.watched:
            self._widths["output"] = len(output_names(labels, self.reference.task))
            self.watched["output"] = self._watch("output")
        for name in ("input", "latent"):
            if name in self.watched:
                self.watched[name].start_collecting()
                self.watched[name].detector.reset()
        if self.performance is not None:
            self.performance.reset()
            if grown:
                self.performance = self._judge(self.reference.accuracy, self.reference.labelled)
        self._labelled = [0, 0]
        self.collecting = {name for name in self.detectors if name != "quality"}

    def begin_summary(self, now: float) -> None:
        """Count anew, from now (seconds since the epoch) on."""
        self.summary = Summary(self.reference.names, reference=self.reference.digest, start=now)

    # ---- what they say

    def alarms(self) -> list[Alarm]:
        """The alarms that are up."""
        return [self._describe(name, self.detectors[name]) for name in self.alarming()]

    def alarming(self) -> list[str]:
        """The monitors whose alarm is up."""
        return [name for name, detector in self.detectors.items() if detector.drift_detected]

    def warnings(self) -> list[str]:
        """The monitors at or above their warning level."""
        return [name for name, detector in self.detectors.items() if detector.warning]

    def clear(self, quiet_rows: int) -> list[str]:
        """Take down the alarms whose evidence has been below the warning level for so many rows; their names.

        To be called after each block: a change that lasts keeps raising the evidence anew.
        """
        found: dict[str, Any] = self.detectors
        up = [name for name, detector in found.items() if detector.drift_detected]
        over = [name for name in up if found[name].quiet_rows >= quiet_rows]
        for name in up:
            if name in over:
                found[name].reset()
            elif found[name].evidence >= found[name].threshold:
                found[name].look_again()
        return over

    def diagnosis(self) -> Diagnosis | None:
        """What kind of change it is that raised the alarms, and what carries it; None without alarm."""
        up = self.alarming()
        if not up:
            return None
        recent = {name: watched.recent for name, watched in self.watched.items() if name not in self.collecting}
        evidence = Evidence(
            up,
            LOOK_BACK,
            inputs=recent.get("input"),
            outputs=recent.get("output"),
            latents=recent.get("latent"),
            live=Live.of(self._rows) if len(self._rows) else None,
            findings=self.quality.findings(),
            accuracy=self.accuracy if self.accuracy is not None else math.nan,
        )
        return diagnose(self.reference, evidence, labels=self._labels)

    @property
    def accuracy(self) -> float | None:
        """Running share of right answers among the labelled ones; None below 50 labels."""
        scores = self.scores
        return scores["accuracy"] if scores and (scores["rows"] or 0) >= _LEAST_LABELS else None

    @property
    def scores(self) -> dict[str, Any]:
        """Running scores of labelled predictions, by class and slice: `Prequential.scores`; empty without outputs."""
        return self.performance.prequential.scores() if self.performance is not None else {}

    @property
    def improved(self) -> bool:
        """Whether the accuracy monitor's alarm says that fewer answers are wrong than before."""
        return (
            self.performance is not None
            and self.performance.drift_detected
            and all(shift < 0 for _, shift in self.performance.suspects())
        )

    def estimate(self) -> tuple[float | None, str]:
        """Accuracy as the confidences of the latest answers foretell it, without labels, and why it cannot be told.

        It must never decide about a model. Invalid while inputs, latents or outputs are not as they were.
        """
        table = self.reference.confidence_table
        if not table.shape[1]:
            return None, "the checkpoint has no table of confidences"
        if changed := [name for name in self.warnings() if name != "accuracy"]:
            return None, f"{changed[0]} is not as it was"
        if self.collecting:
            return None, "another head serves than the table is of"
        if len(self._confidences) < _LEAST_LABELS:
            return None, "too few predictions"
        return estimate(table, self._confidences), ""

    def _describe(self, name: str, detector: DriftDetector) -> Alarm:
        names = self._names(name)
        suspects: dict[str, float] = {}
        for i, shift in detector.suspects():
            suspects.setdefault(names[i], round(shift, 3))
        return Alarm(name, max(detector.evidence, detector.threshold), detector.threshold, tuple(suspects.items()))

    def _names(self, monitor: str) -> Sequence[str]:
        match monitor:
            case "input":
                return [*self.reference.names, *(f"spread of {name}" for name in self.reference.names)]
            case "quality":
                return self.quality.names
            case "latent":
                return latent_names()
            case "output":
                return output_names(self._labels, self.reference.task)
            case _:
                return ["error rate"]

    # ---- across restarts

    def to_bytes(self) -> bytes:
        """All evidence and what is normal by now; not the raw rows."""
        states = {**{name: watched.state() for name, watched in self.watched.items()}, "quality": self.quality.state(),
                  "summary": self.summary.state()}  # fmt: skip
        if self.performance is not None:
            states["accuracy"] = self.performance.state()
        arrays: dict[str, AnyArray] = {f"{n}.{key}": v for n, state in states.items() for key, v in state.items()}
        arrays["reference"] = np.frombuffer(self.reference.digest.encode(), np.uint8)
        arrays["labels"] = np.frombuffer("\n".join(self._labels).encode(), np.uint8)
        arrays["collecting"] = np.array([name in self.collecting for name in NAMES])
        arrays["labelled"] = np.array([*self._labelled, self.reference.accuracy, self.reference.labelled])
        return pack_arrays(arrays)

    def restore(self, data: bytes) -> None:
        """Continue from what `to_bytes` gave: a restart does not reset evidence.

        Raises:
            IntegrityError: The state is damaged, or of another reference.
        """
        arrays = unpack_arrays(data)
        try:
            labels = tuple(arrays["labels"].tobytes().decode().split("\n"))
            other = DriftMonitors(
                self.reference, labels if labels != ("",) else (),
                run_length=self._budget, rereference_rows=self._rereference_rows,
            )  # fmt: skip
            other._take(arrays)  # this one is left as it is if that fails
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise IntegrityError(f"the monitors' state is damaged: {error!r}") from error
        self.__dict__.update(other.__dict__)

    def _take(self, arrays: dict[str, AnyArray]) -> None:
        def part(name: str) -> dict[str, AnyArray]:
            return {key.partition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}

        if arrays["reference"].tobytes().decode() != self.reference.digest:
            raise ValueError("it is of another reference")
        right, count, accuracy, labelled = (float(value) for value in arrays["labelled"])
        before = (self.reference.accuracy, self.reference.labelled)
        if self.performance is not None:
            if (accuracy, labelled) != before and not (math.isnan(accuracy) and math.isnan(before[0])):
                self._adopt_accuracy(accuracy, int(labelled))
            self.performance.restore(part("accuracy"))
        for name, watched in self.watched.items():
            watched.restore(part(name))
        self.quality.restore(part("quality"))
        self.summary.restore(part("summary"))
        self._labelled = [int(right), int(count)]
        self.collecting = {name for name, yes in zip(NAMES, arrays["collecting"], strict=True) if yes}
