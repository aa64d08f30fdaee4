"""The losses of the three tasks, and their gradients at the head's outputs."""

from __future__ import annotations

import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.head import sigmoid
from edge_sdk.types import AnyArray, FloatArray, Task


def loss_and_delta(
    logits: FloatArray, targets: AnyArray, weights: FloatArray, *, task: Task, config: LearnConfig
) -> tuple[float, FloatArray]:
    """Mean loss of a batch, and its gradient by each output.

    Cross-entropy (classification), the sum of each label's cross-entropy (multi-label), half the squared error or
    Huber's loss (regression, in standard deviations). A row of negative weight says that its label does *not* apply:
    its loss is -log(1 - p).

    Args:
        logits: float32 [N, C], the head's outputs.
        targets: As in `edge_sdk.learn.base.Rows`.
        weights: float32 [N].
        task: What the outputs mean.
        config: Label smoothing, and the loss of a regression.

    Returns:
        The loss, and float32 [N, C].

    Source:
        Szegedy et al. 2016, arXiv:1512.00567, section 7 (label smoothing); Huber 1964, doi:10.1214/aoms/1177703732;
        Kim et al. 2019, "NLNL", arXiv:1908.07387 (labels that do not apply).
    """
    count = np.float32(max(1, len(logits)))
    match task:
        case "multilabel":
            p = sigmoid(logits)
            wanted = targets * np.float32(1 - config.label_smoothing) + np.float32(config.label_smoothing / 2)
            losses = (np.logaddexp(0, logits) - wanted * logits).sum(axis=1)
            delta = p - wanted
        case "regression":
            error = logits - targets
            bound = np.float32(config.huber_delta if config.loss == "huber" else np.inf)
            delta = np.clip(error, -bound, bound)
            losses = (delta * (error - delta / 2)).sum(axis=1)
        case _:
            never = (weights < 0) & (logits.shape[1] > 1)  # an only label cannot but apply
            losses, delta = _cross_entropy(logits, targets, never, config.label_smoothing)
    scale = np.abs(weights) / count
    return float(losses @ scale), (delta * scale[:, None]).astype(np.float32)


def _cross_entropy(
    logits: FloatArray, targets: AnyArray, never: AnyArray, smoothing: float
) -> tuple[FloatArray, FloatArray]:
    rows, classes = np.arange(len(targets)), logits.shape[1]
    total = _log_sum(logits)
    log_p = logits - total
    p = np.exp(log_p)
    delta = p - np.float32(smoothing / classes)
    delta[rows, targets] -= np.float32(1 - smoothing)
    losses = -(1 - smoothing) * log_p[rows, targets]
    if smoothing:
        losses = losses - smoothing * log_p.mean(axis=1)
    if never.any():
        # -log(1 - p) from the other labels' logits: 1 - p itself rounds to 0 where the model is sure
        others = logits.copy()
        others[rows, targets] = -np.inf
        rest = _log_sum(others)
        said = p[rows, targets]
        away = -said[:, None] * np.exp(others - rest)
        away[rows, targets] = said
        delta = np.where(never[:, None], away, delta)
        losses = np.where(never, (total - rest)[:, 0], losses)
    return losses, delta


def _log_sum(logits: FloatArray) -> FloatArray:
    """Logarithm of the sum of exponentials of each row; [N, 1]."""
    top = logits.max(axis=1, keepdims=True)
    result: FloatArray = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return result
