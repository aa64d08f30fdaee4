"""Elastic weight consolidation: which weights matter to what is known, and a step that holds on to them.

Source:
    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", doi:10.1073/pnas.1611835114.
"""

from __future__ import annotations

import numpy as np

from edge_sdk.errors import EmptyBufferError
from edge_sdk.head import Head, Weights, sigmoid, softmax
from edge_sdk.types import FloatArray, Task


def backward(head: Head, features: FloatArray, delta: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
    """Each layer's input and the gradient at its output, for the loss gradient `delta` at the logits.

    Args:
        head: The head.
        features: float32 [N, D].
        delta: float32 [N, C], gradient of each sample's loss by its logits.

    Returns:
        One (input [N, in], gradient [N, out]) a layer: a sample's weight gradient is their outer product.
    """
    inputs = [features]
    for i in range(head.depth - 1):
        inputs.append(np.maximum(inputs[-1] @ head.weights[f"W{i}"] + head.weights[f"b{i}"], 0))
    pairs: list[tuple[FloatArray, FloatArray]] = [(inputs[-1], delta)]
    for i in range(head.depth - 1, 0, -1):
        delta = (delta @ head.weights[f"W{i}"].T) * (inputs[i] > 0)
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
    logits = head.logits(features)
    probabilities = softmax(logits) if task == "classification" else sigmoid(logits)
    total = {key: np.zeros(value.shape, np.float64) for key, value in head.weights.items()}
    for label in range(len(head.labels)):
        p = probabilities[:, label : label + 1]
        delta, weight = (-probabilities, p) if task == "classification" else (np.zeros_like(logits), p * (1 - p))
        delta[:, label] += 1
        if task == "regression":
            weight = np.ones_like(p)
        for i, (inputs, gradient) in enumerate(backward(head, features, delta)):
            squared = gradient**2 * weight
            total[f"W{i}"] += (inputs**2).T @ squared
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
    result = {}
    for key, value in weights.items():
        pull = np.float32(strength) * fisher[key]
        result[key] = (value + pull * anchor[key]) / (1 + pull)
    return result


def grown_like(weights: Weights, template: Weights) -> Weights:
    """Arrays padded with zeros at their end to the shapes of `template`: new outputs carry no importance yet."""
    result = {}
    for key, value in weights.items():
        pad = [(0, t - s) for s, t in zip(value.shape, template[key].shape, strict=True)]
        result[key] = np.pad(value, pad)
    return result
