"""What the monitors compare with: how inputs, outputs and accuracy looked when all was well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge_sdk.drift.features import OUTPUT_SUMMARY, input_features
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.stats import entropy
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, Task

BINS = 64
MIN_ROWS = 200
_WITH_PROBABILITIES: tuple[Task, ...] = ("classification", "multilabel")


@dataclass(frozen=True)
class Reference:
    """Channels in [0, 1] and their means.

    Attributes:
        task: What the outputs mean.
        edges: float32 [F, 63]: quantiles of each input feature, which turn a value into its rank.
        input_mean: float64 [F]: mean rank of each feature; near 0.5, less exact where values repeat.
        input_std: float64 [F].
        output_edges: float32 [K, 63]: the same of each output that is no probability; [0, 63] otherwise.
        output_mean: float64 [K]: of the channels that `output_names` names.
        output_std: float64 [K].
        accuracy: Share of right labels on rows held out.
        rows: How many rows inputs and outputs were taken from.
        labelled: How many rows the accuracy was taken from.
    """

    task: Task
    edges: FloatArray
    input_mean: DoubleArray
    input_std: DoubleArray
    output_edges: FloatArray
    output_mean: DoubleArray
    output_std: DoubleArray
    accuracy: float
    rows: int
    labelled: int

    @classmethod
    def build(cls, x: FloatArray, scores: FloatArray, correct: AnyArray, *, task: Task = "classification") -> Reference:
        """Take the reference from rows that were not trained on.

        Args:
            x: float32 [N, ...], thumbnails of checked inputs before preprocessing.
            scores: float32 [N, C], what the served model says of them: probabilities, values, or output summaries.
            correct: bool [M], whether the answer was right, for the rows whose truth is known.
            task: What the scores are.

        Raises:
            ValueError: Fewer than 200 rows: the monitors would take chance for drift.
        """
        if len(x) < MIN_ROWS:
            raise ValueError(f"a reference needs at least {MIN_ROWS} rows, got {len(x)}")
        features = input_features(x)
        edges = _edges(features)
        output_edges = np.zeros((0, BINS - 1), np.float32) if task in _WITH_PROBABILITIES else _edges(scores)
        inputs, outputs = rank_channels(features, edges), output_channels(scores, output_edges, task)
        return cls(
            task=task,
            edges=edges,
            input_mean=inputs.mean(axis=0),
            input_std=inputs.std(axis=0),
            output_edges=output_edges,
            output_mean=outputs.mean(axis=0),
            output_std=outputs.std(axis=0),
            accuracy=float(np.mean(correct)) if len(correct) else float("nan"),
            rows=len(x),
            labelled=len(correct),
        )

    def to_bytes(self) -> bytes:
        """As .npz."""
        return npz_bytes({**self.__dict__, "task": np.array(self.task)})

    @classmethod
    def load(cls, source: Path | bytes) -> Reference:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: The file is damaged or lacks a field.
        """
        arrays = load_npz(source)
        try:
            return cls(
                task=msgspec.convert(str(arrays["task"]), Task),
                edges=arrays["edges"],
                input_mean=arrays["input_mean"],
                input_std=arrays["input_std"],
                output_edges=arrays["output_edges"],
                output_mean=arrays["output_mean"],
                output_std=arrays["output_std"],
                accuracy=float(arrays["accuracy"].item()),
                rows=int(arrays["rows"].item()),
                labelled=int(arrays["labelled"].item()),
            )
        except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
            raise IntegrityError(f"the monitor reference is damaged: {error}") from error


def _edges(values: FloatArray) -> FloatArray:
    """Quantiles of each column, float32 [columns, 63]."""
    edges = np.quantile(values, np.arange(1, BINS) / BINS, axis=0).T
    return np.ascontiguousarray(edges, dtype=np.float32)


def rank_channels(features: FloatArray, edges: FloatArray) -> DoubleArray:
    """Features float32 [N, F] as mid-ranks within the reference, float64 [N, F] in [0, 1].

    A value between two quantiles gets their middle; one that repeats in the reference gets the middle of its run.
    """
    channels = np.empty(features.shape, dtype=np.float64)
    for i in range(features.shape[1]):
        left = np.searchsorted(edges[i], features[:, i], side="left")
        right = np.searchsorted(edges[i], features[:, i], side="right")
        channels[:, i] = (left + right + 1) / (2 * (edges.shape[1] + 1))
    return channels


def output_channels(scores: FloatArray, edges: FloatArray, task: Task) -> DoubleArray:
    """What the model said, float32 [N, C], as monitored channels, float64 [N, K] in [0, 1].

    Probabilities are channels themselves, with the confidence and the entropy of the answer (multi-label: means over
    the labels); values and summaries become ranks within the reference.
    """
    if task not in _WITH_PROBABILITIES:
        return rank_channels(scores, edges)
    p = np.asarray(scores, dtype=np.float64)
    if task == "classification":
        confidence, doubt = p.max(axis=1), entropy(p)
    else:
        pairs = np.stack([p, 1 - p], axis=2).reshape(-1, 2)
        confidence, doubt = (v.reshape(p.shape).mean(axis=1) for v in (pairs.max(axis=1), entropy(pairs)))
    result: DoubleArray = np.clip(np.concatenate([confidence[:, None], doubt[:, None], p], axis=1), 0.0, 1.0)
    return result


def output_names(labels: tuple[str, ...], task: Task) -> list[str]:
    """What `output_channels` gives, in order."""
    if task == "regression":
        return list(labels)
    if task == "raw":
        return [f"output {name}" for name in OUTPUT_SUMMARY]
    return ["confidence", "entropy", *(f"probability of {label!r}" for label in labels)]
