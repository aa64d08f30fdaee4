"""Elastic weight consolidation: which weights matter to what is known, and a step that holds on to them.

Source:
    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", doi:10.1073/pnas.1611835114.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_sdk.errors import EmptyBufferError, IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, Weights, layer_inputs, sigmoid, softmax
from edge_sdk.types import FloatArray, Task

_MOST = 1e30
"""Strength that single precision can hold: infinity times no importance is not a number."""
_FIRM = 1e8
"""Pull beyond which a weight is on its anchor as far as single precision can tell."""


@dataclass(frozen=True)
class Importance:
    """What elastic weight consolidation holds on to.

    Attributes:
        anchor: Weights, as they were when the Fisher information was taken.
        fisher: Diagonal Fisher information, same names and shapes, all >= 0.
    """

    anchor: Weights
    fisher: Weights

    def to_bytes(self) -> bytes:
        """As .npz."""
        parts = {"anchor": self.anchor, "fisher": self.fisher}
        return npz_bytes({f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()})

    @classmethod
    def load(cls, source: Path | bytes) -> Importance:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: It is damaged.
        """
        parts: dict[str, Weights] = {"anchor": {}, "fisher": {}}
        for name, value in load_npz(source).items():
            part, _, key = name.partition(".")
            if part not in parts:
                raise IntegrityError(f"{name} is neither anchor nor Fisher information")
            if value.dtype.kind != "f" or not np.isfinite(value).all() or (part == "fisher" and (value < 0).any()):
                raise IntegrityError(f"{name} holds something else than finite numbers, or importance below 0")
            parts[part][key] = value.astype(np.float32)
        anchor, fisher = ({key: value.shape for key, value in values.items()} for values in parts.values())
        if anchor != fisher:
            raise IntegrityError("anchor and Fisher information are not of the same weights")
        return cls(**parts)


def consolidate(
    known: Importance,
    weights: Weights,
    fisher: Weights,
    *,
    mode: Literal["checkpoint", "offline", "online"],
    decay: float,
) -> Importance:
    """What to hold on to after another experience has been learned.

    Offline, every experience keeps an anchor of its own. The sum of their quadratic penalties is, up to a constant, one
    quadratic penalty: with the sum of the Fisher information around the mean of the anchors that it weighs. So the
    memory needed does not grow. Online, the latest weights are the anchor and older Fisher information fades.

    Args:
        known: So far.
        weights: Of the head that has been learned, with at least the outputs of `known`.
        fisher: Its Fisher information on the new experience.
        mode: "checkpoint" holds on to `known` alone.
        decay: Of older Fisher information (online).

    Source:
        Kirkpatrick et al. 2017 (offline: one penalty a task); Schwarz et al. 2018, "Progress & Compress",
        arXiv:1805.06370, section 3.2 (online).
    """
    anchor, importance = grown_like(known.anchor, weights), grown_like(known.fisher, weights)
    if mode == "checkpoint":
        return Importance(anchor, importance)
    if mode == "online":
        return Importance(dict(weights), {key: np.float32(decay) * importance[key] + fisher[key] for key in weights})
    total = {key: importance[key] + fisher[key] for key in weights}
    mean = {}
    for key, value in weights.items():
        # what nothing depends on follows the latest weights
        share = np.divide(fisher[key], total[key], out=np.ones_like(value), where=total[key] > 0)
        mean[key] = (1 - share) * anchor[key] + share * value
    return Importance(mean, total)


def backward(weights: Weights, inputs: list[FloatArray], delta: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
    """Each layer's input and the gradient at its output, for the loss gradient `delta` at the logits.

    Args:
        weights: Of the head.
        inputs: What each layer was given, from `edge_sdk.head.layer_inputs`.
        delta: float32 [N, C], gradient of each sample's loss by its logits.

    Returns:
        One (input [N, in], gradient [N, out]) a layer: a sample's weight gradient is their outer product.
    """
    last = len(inputs) - 1
    pairs: list[tuple[FloatArray, FloatArray]] = [(inputs[last], delta)]
    for i in range(last, 0, -1):
        delta = (delta @ weights[f"W{i}"].T) * (inputs[i] > 0)
        pairs.insert(0, (inputs[i - 1], delta))
    return pairs


def fisher_diagonal(head: Head, features: FloatArray, *, task: Task = "classification") -> Weights:
    """Diagonal Fisher information of the head at its weights, exact over the model's own output distribution.

    For each sample and each label, the gradient of the log-likelihood is squared (per sample, before averaging) and
    weighted with the probability that the model gives the label. A dense layer's sample gradient is an outer product,
    so its square is the outer product of the squares and no sample's gradient is ever stored. The head is only read.

    The outputs of a multi-label head are independent coin tosses of variance p (1 - p), those of a regression
    independent Gaussians of variance 1 (its targets are standardised): there the gradients of the outputs do not mix.

    Args:
        head: The head.
        features: float32 [N, D] in model units: samples of what is to be kept.
        task: What its outputs mean.

    Returns:
        One float32 array for each weight, same name and shape, all >= 0.

    Raises:
        EmptyBufferError: No samples.
    """
    if not len(features):
        raise EmptyBufferError("Fisher information needs at least one sample")
    inputs = layer_inputs(head.weights, features)
    logits = head.logits(features)
    probabilities = softmax(logits) if task == "classification" else sigmoid(logits)
    total = {key: np.zeros(value.shape, np.float64) for key, value in head.weights.items()}
    for label in range(len(head.labels)):
        p = probabilities[:, label : label + 1]
        delta, weight = (-probabilities, p) if task == "classification" else (np.zeros_like(logits), p * (1 - p))
        delta[:, label] += 1
        if task == "regression":
            weight = np.ones_like(p)
        for i, (given, gradient) in enumerate(backward(head.weights, inputs, delta)):
            squared = gradient**2 * weight
            total[f"W{i}"] += (given**2).T @ squared
            total[f"b{i}"] += squared.sum(axis=0)
    return {key: (value / len(features)).astype(np.float32) for key, value in total.items()}


def penalty(weights: Weights, anchor: Weights, fisher: Weights, *, ewc_lambda: float) -> float:
    """lambda/2 * sum F (w - anchor)**2: zero at the anchor, positive off it wherever the Fisher information is."""
    total = sum(float((fisher[key] * (weights[key] - anchor[key]) ** 2).sum()) for key in weights)
    return 0.5 * ewc_lambda * total


def proximal_step(weights: Weights, anchor: Weights, fisher: Weights, *, strength: float) -> Weights:
    """Move the weights towards the anchor by an implicit step on the EWC penalty.

    Solves argmin_w |w - v|**2 / 2 + strength/2 * F (w - anchor)**2 exactly, so it is stable for every strength >= 0,
    where a step along the penalty's gradient diverges as soon as strength * F exceeds 2.

    Args:
        weights: The weights after the step on the data loss.
        anchor: Where the Fisher information was taken.
        fisher: Diagonal Fisher information, >= 0.
        strength: Learning rate times lambda.

    Source:
        Parikh & Boyd 2014, "Proximal algorithms", section 6.1.1 (quadratic functions), doi:10.1561/2400000003.
    """
    result, strong = {}, np.float32(min(strength, _MOST))
    for key, value in weights.items():
        with np.errstate(over="ignore"):
            pull = np.minimum(strong * fisher[key], _FIRM)
        result[key] = (value + pull * anchor[key]) / (1 + pull)
    return result


def grown_like(weights: Weights, template: Weights) -> Weights:
    """Arrays padded with zeros at their end to the shapes of `template`: new outputs carry no importance yet."""
    result = {}
    for key, value in weights.items():
        pad = [(0, t - s) for s, t in zip(value.shape, template[key].shape, strict=True)]
        result[key] = np.pad(value, pad)
    return result
