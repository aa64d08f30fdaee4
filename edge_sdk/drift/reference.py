"""What the monitors compare with: how inputs, outputs and accuracy looked when all was well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.drift.features import input_features
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.stats import entropy
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

BINS = 64
MIN_ROWS = 200


@dataclass(frozen=True)
class Reference:
    """Channels in [0, 1] and their means.

    Attributes:
        edges: float32 [F, 63]: quantiles of each input feature, which turn a value into its rank.
        input_mean: float64 [F]: mean rank of each feature; near 0.5, less exact where values repeat.
        input_std: float64 [F].
        output_mean: float64 [2 + C]: confidence, entropy, and the probability of each label.
        output_std: float64 [2 + C].
        accuracy: Share of right labels on rows held out.
        rows: How many rows inputs and outputs were taken from.
        labelled: How many rows the accuracy was taken from.
    """

    edges: FloatArray
    input_mean: DoubleArray
    input_std: DoubleArray
    output_mean: DoubleArray
    output_std: DoubleArray
    accuracy: float
    rows: int
    labelled: int

    @classmethod
    def build(cls, x: FloatArray, probabilities: FloatArray, correct: AnyArray) -> Reference:
        """Take the reference from rows that were not trained on.

        Args:
            x: float32 [N, ...], checked inputs before preprocessing.
            probabilities: float32 [N, C], what the served model says of them.
            correct: bool [M], whether the label was right, for the rows whose label is known.

        Raises:
            ValueError: Fewer than 200 rows: the monitors would take chance for drift.
        """
        if len(x) < MIN_ROWS:
            raise ValueError(f"a reference needs at least {MIN_ROWS} rows, got {len(x)}")
        features = input_features(x)
        edges = np.quantile(features, np.arange(1, BINS) / BINS, axis=0).T.astype(np.float32)
        inputs, outputs = input_channels(features, edges), output_channels(probabilities)
        return cls(
            edges=np.ascontiguousarray(edges),
            input_mean=inputs.mean(axis=0),
            input_std=inputs.std(axis=0),
            output_mean=outputs.mean(axis=0),
            output_std=outputs.std(axis=0),
            accuracy=float(np.mean(correct)) if len(correct) else float("nan"),
            rows=len(x),
            labelled=len(correct),
        )

    def to_bytes(self) -> bytes:
        """As .npz."""
        return npz_bytes(dict(self.__dict__))

    @classmethod
    def load(cls, source: Path | bytes) -> Reference:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: The file is damaged or lacks a field.
        """
        arrays = load_npz(source)
        try:
            return cls(
                edges=arrays["edges"],
                input_mean=arrays["input_mean"],
                input_std=arrays["input_std"],
                output_mean=arrays["output_mean"],
                output_std=arrays["output_std"],
                accuracy=float(arrays["accuracy"].item()),
                rows=int(arrays["rows"].item()),
                labelled=int(arrays["labelled"].item()),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"the monitor reference is damaged: {error}") from error


def input_channels(features: FloatArray, edges: FloatArray) -> DoubleArray:
    """Features float32 [N, F] as mid-ranks within the reference, float64 [N, F] in [0, 1].

    A value between two quantiles gets their middle; one that repeats in the reference gets the middle of its run.
    """
    channels = np.empty(features.shape, dtype=np.float64)
    for i in range(features.shape[1]):
        left = np.searchsorted(edges[i], features[:, i], side="left")
        right = np.searchsorted(edges[i], features[:, i], side="right")
        channels[:, i] = (left + right + 1) / (2 * (edges.shape[1] + 1))
    return channels


def output_channels(probabilities: FloatArray) -> DoubleArray:
    """Probabilities float32 [N, C] as monitored channels, float64 [N, 2 + C] in [0, 1]."""
    p = np.asarray(probabilities, dtype=np.float64)
    channels = np.concatenate([p.max(axis=1, keepdims=True), entropy(p)[:, None], p], axis=1)
    result: DoubleArray = np.clip(channels, 0.0, 1.0)
    return result


def output_names(labels: tuple[str, ...]) -> list[str]:
    """What `output_channels` gives, in order."""
    return ["confidence", "entropy", *(f"probability of {label!r}" for label in labels)]
