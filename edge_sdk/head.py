"""The trainable head on the frozen trunk: its weights and its arithmetic, in numpy.

Layers are named W0, b0, W1, b1, …: W is float32 [in, out], b float32 [out]. The same names are initializers of
`head.onnx`, so that learned weights replace them without the onnx package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.errors import IncompatibleError, IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.manifest import LatentSpec
from edge_sdk.types import FloatArray, IndexArray, LatentArray

Weights = dict[str, FloatArray]
"""W0, b0, …: one float32 array each. Functions never change the arrays they are given."""


def dequantize(latents: LatentArray, spec: LatentSpec) -> FloatArray:
    """uint8 [N, D] to float32 [N, D] in model units, exactly as ONNX DequantizeLinear does."""
    return (latents.astype(np.int32) - spec.zero_point).astype(np.float32) * np.float32(spec.scale)


def softmax(logits: FloatArray) -> FloatArray:
    """Row-wise softmax of [N, C]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: FloatArray = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def sigmoid(logits: FloatArray) -> FloatArray:
    """Element-wise logistic function; does not overflow."""
    result: FloatArray = (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
    return result


def layer_inputs(weights: Weights, features: FloatArray) -> list[FloatArray]:
    """What each dense layer is given for features [N, D]; the first is the features themselves."""
    inputs = [features]
    for i in range(len(weights) // 2 - 1):
        inputs.append(np.maximum(inputs[-1] @ weights[f"W{i}"] + weights[f"b{i}"], 0))
    return inputs


def logits(weights: Weights, last_input: FloatArray) -> FloatArray:
    """Scores from what the last layer is given; float32 [N, C]."""
    last = len(weights) // 2 - 1
    result: FloatArray = last_input @ weights[f"W{last}"] + weights[f"b{last}"]
    return result


@dataclass(frozen=True)
class Head:
    """Dense layers with ReLU between them. Immutable; learning returns a new one.

    Attributes:
        weights: W0, b0, … as described in the module.
        labels: One label for each output, in order.
    """

    weights: Weights
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that the layers fit each other.

        Raises:
            IntegrityError: A layer is missing, has the wrong shape or holds non-finite numbers.
        """
        for i in range(self.depth):
            w, b = self.weights.get(f"W{i}"), self.weights.get(f"b{i}")
            if w is None or b is None or w.ndim != 2 or b.shape != (w.shape[1],):
                raise IntegrityError(f"layer {i} of the head is missing or its shapes do not fit")
            if i and w.shape[0] != self.weights[f"W{i - 1}"].shape[1]:
                raise IntegrityError(f"layer {i} of the head takes {w.shape[0]} values, the layer before gives "
                                     f"{self.weights[f'W{i - 1}'].shape[1]}")  # fmt: skip
            if not (np.isfinite(w).all() and np.isfinite(b).all()):
                raise IntegrityError(f"layer {i} of the head holds NaN or infinity")
        if len(self.weights) != 2 * self.depth:
            raise IntegrityError("the head holds an array that belongs to no layer")
        if self.depth == 0 or self.weights[f"b{self.depth - 1}"].shape[0] != len(self.labels):
            raise IntegrityError(
                f"the head's last layer does not have one output for each of {len(self.labels)} labels"
            )

    @property
    def depth(self) -> int:
        """How many dense layers."""
        return len(self.weights) // 2

    @property
    def latent_dim(self) -> int:
        """Width of the latent that goes in."""
        return int(self.weights["W0"].shape[0])

    def logits(self, features: FloatArray) -> FloatArray:
        """Scores before softmax. features: float32 [N, D] in model units; returns float32 [N, C]."""
        return logits(self.weights, layer_inputs(self.weights, features)[-1])

    def hidden(self, features: FloatArray) -> FloatArray:
        """What the last layer is given; float32 [N, F]. Of a linear head the features themselves."""
        return layer_inputs(self.weights, features)[-1]

    def with_last(self, w: FloatArray, b: FloatArray) -> Head:
        """This head with another last layer. w: float32 [F, C]; b: float32 [C]."""
        last = self.depth - 1
        return Head({**self.weights, f"W{last}": w, f"b{last}": b}, self.labels)

    def predict(self, features: FloatArray) -> IndexArray:
        """Index of the best label for each row; int64 [N]."""
        best: IndexArray = self.logits(features).argmax(axis=1)
        return best

    def grown(self, labels: Sequence[str]) -> Head:
        """This head with outputs for further labels, which start unlikely: zero weights, the lowest bias.

        Args:
            labels: All labels; those of this head first and in the same order.

        Raises:
            IncompatibleError: The present labels are not the beginning of `labels`.
        """
        if tuple(labels[: len(self.labels)]) != self.labels:
            raise IncompatibleError("a head grows at its end: its present labels must come first and in order")
        extra = len(labels) - len(self.labels)
        if not extra:
            return self
        last = self.depth - 1
        w, b = self.weights[f"W{last}"], self.weights[f"b{last}"]
        weights = dict(self.weights)
        weights[f"W{last}"] = np.concatenate([w, np.zeros((w.shape[0], extra), np.float32)], axis=1)
        weights[f"b{last}"] = np.concatenate([b, np.full(extra, b.min() - 1.0, np.float32)])
        return Head(weights, tuple(labels))

    def to_bytes(self) -> bytes:
        """The head as .npz."""
        return npz_bytes({**self.weights, "labels": np.array(self.labels, dtype=np.str_)})

    @classmethod
    def load(cls, source: Path | bytes) -> Head:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: The file is damaged or its layers do not fit.
        """
        arrays = load_npz(source)
        if "labels" not in arrays:
            raise IntegrityError("the head has no labels")
        try:
            labels = tuple(str(label) for label in arrays.pop("labels"))
            weights = {key: np.asarray(value, dtype=np.float32) for key, value in arrays.items()}
        except (TypeError, ValueError) as error:
            raise IntegrityError(f"the head is not made of numbers and a list of labels: {error}") from error
        return cls(weights, labels)
