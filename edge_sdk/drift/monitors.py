"""The device's monitors together: inputs, outputs and accuracy against one reference, under one alarm budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edge_sdk.drift.base import DriftDetector
from edge_sdk.drift.edetector import EDetector
from edge_sdk.drift.features import input_features
from edge_sdk.drift.reference import Reference, output_channels, output_names, rank_channels
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.stats import wilson_interval
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

NAMES = ("input", "output", "accuracy")
_Z = 3.0
"""How many standard errors of the reference the band forgives."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One monitor's alarm, in words.

    Attributes:
        monitor: "input", "output" or "accuracy".
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

    Three monitors share the budget, so each has three times the run length.

    Args:
        reference: What is normal; from the checkpoint.
        labels: The labels of the served model, for names.
        run_length: Predictions between two false alarms of all monitors together.
        rereference_rows: Live rows that make a new reference.
    """

    def __init__(
        self, reference: Reference, labels: tuple[str, ...], *, run_length: float, rereference_rows: int
    ) -> None:
        self._run_length = run_length * len(NAMES)
        self._rereference_rows = rereference_rows
        self._labels = labels
        self._collected: list[tuple[DoubleArray, DoubleArray]] = []
        self._collected_labels: list[AnyArray] = []
        self.collecting: set[str] = set()
        """Monitors that are learning what is normal now, and raise no alarm meanwhile."""
        self._use(reference)

    def _use(self, reference: Reference) -> None:
        self.reference = reference
        rows, length = reference.rows, self._run_length
        self.detectors: dict[str, DriftDetector] = {
            "input": EDetector(reference.input_mean, _slack(reference.input_std, rows), run_length=length),
            "output": EDetector(reference.output_mean, _slack(reference.output_std, rows), run_length=length),
        }
        accuracy = reference.accuracy if math.isfinite(reference.accuracy) else 0.5
        low, _ = wilson_interval(round(accuracy * reference.labelled), reference.labelled, z=_Z)
        self.detectors["accuracy"] = EDetector(
            np.array([1 - accuracy]), np.array([accuracy - low]), run_length=self._run_length, sides="up"
        )

    def fold(self, x: FloatArray, scores: FloatArray) -> None:
        """Fold predictions: thumbnails of inputs float32 [N, ...], scores float32 [N, C], oldest first.

        Rows of a model with other labels than the present one's are left to the caller to drop.
        """
        inputs = rank_channels(input_features(x), self.reference.edges)
        outputs = output_channels(scores, self.reference.output_edges, self.reference.task)
        if "output" in self.collecting:
            self._collected.append((inputs, outputs))
            if sum(len(rows) for rows, _ in self._collected) >= self._rereference_rows:
                self._adopt_rows()
            return
        self.detectors["input"].update(inputs)
        self.detectors["output"].update(outputs)

    def fold_labels(self, correct: AnyArray) -> None:
        """Fold whether labelled predictions were right: bool [N], in the order in which the labels came."""
        if "accuracy" in self.collecting:
            self._collected_labels.append(np.asarray(correct, dtype=bool))
            if sum(map(len, self._collected_labels)) >= self._rereference_rows // 3:
                self._adopt_labels()
            return
        self.detectors["accuracy"].update(1.0 - np.asarray(correct, dtype=np.float64)[:, None])

    def rereference(self, labels: tuple[str, ...], reference: Reference | None = None) -> None:
        """Start anew after a promotion or a new base: the next live rows show what is normal now.

        Args:
            labels: The labels of the model that serves from now on.
            reference: A new base's own reference, whose input ranks are used from now on; None keeps the present one.
        """
        self._labels = labels
        self._collected, self._collected_labels = [], []
        base = reference or self.reference
        width = len(output_names(labels, base.task))
        if len(base.output_mean) != width:
            base = replace(base, output_mean=np.full(width, 0.5), output_std=np.full(width, 0.5))
        self._use(base)
        self.collecting = set(NAMES)

    def alarms(self) -> list[Alarm]:
        """The alarms that are up."""
        return [self._describe(name) for name in NAMES if self.detectors[name].drift_detected]

    def warnings(self) -> list[str]:
        """The monitors at or above their warning level."""
        return [name for name in NAMES if self.detectors[name].warning]

    def to_bytes(self) -> bytes:
        """All evidence and the reference in use, as .npz."""
        arrays: dict[str, AnyArray] = {"reference": np.frombuffer(self.reference.to_bytes(), dtype=np.uint8)}
        for name, detector in self.detectors.items():
            arrays |= {f"{name}.{key}": value for key, value in detector.state().items()}
        arrays["labels"] = np.array(self._labels, dtype=np.str_)
        arrays["collecting"] = np.array(sorted(self.collecting), dtype=np.str_)
        if self._collected:
            arrays["rows.input"] = np.concatenate([rows for rows, _ in self._collected])
            arrays["rows.output"] = np.concatenate([rows for _, rows in self._collected])
        if self._collected_labels:
            arrays["rows.correct"] = np.concatenate(self._collected_labels)
        return npz_bytes(arrays)

    def restore(self, data: bytes) -> None:
        """Continue from what `to_bytes` gave: a restart does not reset evidence.

        Raises:
            IntegrityError: The state is damaged.
        """
        arrays = load_npz(data)
        before = dict(self.__dict__)
        try:
            self._take(arrays)
        except (KeyError, ValueError, IntegrityError) as error:
            self.__dict__.update(before)
            raise IntegrityError(f"the monitors' state is damaged: {error!r}") from error

    def _take(self, arrays: dict[str, AnyArray]) -> None:
        self._labels = tuple(str(label) for label in arrays["labels"])
        self._use(Reference.load(arrays["reference"].tobytes()))
        for name, detector in self.detectors.items():
            detector.restore({key: arrays[f"{name}.{key}"] for key in ("m", "recent", "scalars")})
        self.collecting = {str(name) for name in arrays["collecting"]}
        self._collected = [(arrays["rows.input"], arrays["rows.output"])] if "rows.input" in arrays else []
        self._collected_labels = [arrays["rows.correct"]] if "rows.correct" in arrays else []

    def _adopt_rows(self) -> None:
        inputs = np.concatenate([rows for rows, _ in self._collected])
        outputs = np.concatenate([rows for _, rows in self._collected])
        self._collected = []
        self.collecting -= {"input", "output"}
        accuracy = self.detectors["accuracy"]
        self._use(
            replace(
                self.reference,
                input_mean=inputs.mean(axis=0),
                input_std=inputs.std(axis=0),
                output_mean=outputs.mean(axis=0),
                output_std=outputs.std(axis=0),
                rows=len(inputs),
            )
        )
        self.detectors["accuracy"] = accuracy

    def _adopt_labels(self) -> None:
        correct = np.concatenate(self._collected_labels)
        self._collected_labels = []
        self.collecting -= {"accuracy"}
        kept = {name: self.detectors[name] for name in ("input", "output")}
        self._use(replace(self.reference, accuracy=float(correct.mean()), labelled=len(correct)))
        self.detectors |= kept

    def _describe(self, name: str) -> Alarm:
        detector = self.detectors[name]
        names = {
            "input": input_names(self.reference),
            "output": output_names(self._labels, self.reference.task),
            "accuracy": ["error rate"],
        }
        suspects = tuple((names[name][i], round(shift, 3)) for i, shift in detector.suspects())
        return Alarm(name, detector.evidence, detector.threshold, suspects)


def _slack(std: DoubleArray, rows: int) -> DoubleArray:
    """What a mean over so many rows does not know.

    The second term, which soon vanishes, is for what is rarer than one row in `rows`: its spread is then badly known.

    Source:
        The shape of the bound in Maurer & Pontil 2009, "Empirical Bernstein bounds", arXiv:0907.3740, theorem 4.
    """
    rows = max(1, rows)
    slack: DoubleArray = _Z * (std / math.sqrt(rows) + 1 / rows)
    return slack


def input_names(reference: Reference) -> list[str]:
    """Names of the input channels: features are numbered, in the order of `input_features`."""
    return [f"feature {i}" for i in range(len(reference.input_mean))]
