"""The default learner: the head in numpy, SGD with momentum, replay in every batch, EWC as a proximal step."""

from __future__ import annotations

import time

import numpy as np

from edge_sdk.errors import DivergedError, EmptyBufferError
from edge_sdk.head import Head, dequantize, softmax
from edge_sdk.learn.base import LearnJob, LearnResult, batch_indices
from edge_sdk.learn.ewc import backward, proximal_step
from edge_sdk.types import FloatArray, IndexArray


@np.errstate(over="ignore", invalid="ignore")  # what overflows is found by the checks for non-finite numbers
def train_head(job: LearnJob) -> tuple[Head, LearnResult]:
    """Train a challenger from the champion.

    Each micro-batch holds fresh rows and replayed ones; the step on their mean cross-entropy is followed by the EWC
    proximal step, so that no strength of the penalty can make it diverge.

    Args:
        job: Champion, anchor, Fisher information, rows and settings.

    Returns:
        The challenger, and how it came about.

    Raises:
        EmptyBufferError: The job has no fresh rows.
        DivergedError: Loss or weights became non-finite.
    """
    if not len(job.fresh_latents):
        raise EmptyBufferError("there are no fresh rows to learn from")
    config = job.config
    rng = np.random.default_rng(job.seed)
    started = time.process_time()
    fresh, replay = dequantize(job.fresh_latents, job.latent), dequantize(job.replay_latents, job.latent)
    # plain SGD depends on the scale of its inputs: a step is taken as if their mean square were one
    rate = config.learning_rate / max(1.0, float((fresh**2).sum(axis=1).mean()))
    head = job.champion
    velocity = {key: np.zeros_like(value) for key, value in head.weights.items()}
    losses: list[float] = []
    for _ in range(config.passes):
        for new, old in batch_indices(len(fresh), len(replay), config, rng):
            x = np.concatenate([fresh[new], replay[old]])
            y = np.concatenate([job.fresh_labels[new], job.replay_labels[old]])
            loss, gradients = loss_and_gradients(head, x, y)
            if not np.isfinite(loss):
                raise DivergedError(f"the loss became {loss} after {len(losses)} steps")
            losses.append(loss)
            weights = {}
            for key, value in head.weights.items():
                velocity[key] = config.momentum * velocity[key] - np.float32(rate) * gradients[key]
                weights[key] = value + velocity[key]
            if config.ewc_lambda:
                weights = proximal_step(weights, job.anchor, job.fisher, strength=rate * config.ewc_lambda)
            if not all(np.isfinite(value).all() for value in weights.values()):
                raise DivergedError(f"weights became non-finite after {len(losses)} steps")
            head = Head(weights, head.labels)
    return head, LearnResult(
        steps=len(losses),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-8:])),
        seconds=time.process_time() - started,
    )


def loss_and_gradients(head: Head, x: FloatArray, y: IndexArray) -> tuple[float, dict[str, FloatArray]]:
    """Mean cross-entropy of a batch and its gradient by each weight. x: float32 [N, D]; y: int64 [N]."""
    probabilities = softmax(head.logits(x))
    rows = np.arange(len(y))
    loss = float(-np.log(np.maximum(probabilities[rows, y], 1e-12)).mean())
    delta = probabilities
    delta[rows, y] -= 1
    delta /= len(y)
    gradients = {}
    for i, (inputs, gradient) in enumerate(backward(head, x, delta)):
        gradients[f"W{i}"] = inputs.T @ gradient
        gradients[f"b{i}"] = gradient.sum(axis=0)
    return loss, gradients
