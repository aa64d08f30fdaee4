"""Gradient steps on all layers of the head, replay in every batch, EWC as a proximal step."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError
from edge_sdk.head import Head, Weights, dequantize, layer_inputs, logits
from edge_sdk.learn.base import Between, LearnJob, LearnResult, nothing_between
from edge_sdk.learn.ewc import backward, proximal_step
from edge_sdk.learn.loss import loss_and_delta
from edge_sdk.types import AnyArray, FloatArray, IndexArray, Task

_BALANCED_BATCH = 64
_BALANCED_RATE = 0.2
"""Of the learning rate, in the balanced passes: they put right, and should not learn anew."""


@np.errstate(over="ignore", invalid="ignore")  # what overflows is found by the checks for non-finite numbers
def train_sgd(job: LearnJob, *, between: Between = nothing_between) -> tuple[Head, LearnResult]:
    """Train a challenger from the champion.

    Each micro-batch holds fresh rows and replayed ones; the step on their mean loss is followed by the EWC proximal
    step, so that no strength of the penalty can make it diverge.

    Args:
        job: Champion, anchor, Fisher information, rows and settings.
        between: Called before each micro-batch.

    Returns:
        The challenger, and how it came about.

    Raises:
        EmptyBufferError: The job has no fresh rows that count.
        DivergedError: Loss or weights became non-finite.
    """
    job = job.counted()
    config, rng, started = job.config, np.random.default_rng(job.seed), time.process_time()
    rows = job.fresh + job.replay
    x = dequantize(rows.latents, job.latent)
    rate = step_size(x[: len(job.fresh)], config, job.task)
    weights = job.champion.weights
    velocity = {key: np.zeros_like(value) for key, value in weights.items()}
    losses: list[float] = []
    for drawn, factor in batches(rows.targets, len(job.fresh), job.task, config, rng):
        between()
        loss, gradients = loss_and_gradients(
            weights, x[drawn], rows.targets[drawn], rows.weights[drawn], task=job.task, config=config
        )
        if not np.isfinite(loss):
            raise DivergedError(f"the loss became {loss} after {len(losses)} steps; a lower learning rate may help")
        losses.append(loss)
        pace = np.float32(factor * rate)
        velocity = {key: config.momentum * value - pace * gradients[key] for key, value in velocity.items()}
        weights = {key: value + velocity[key] for key, value in weights.items()}
        if config.ewc_lambda:
            weights = proximal_step(weights, job.anchor, job.fisher, strength=factor * rate * config.ewc_lambda)
        if not all(np.isfinite(value).all() for value in weights.values()):
            raise DivergedError(f"weights became non-finite after {len(losses)} steps; a lower learning rate may help")
    return Head(weights, job.champion.labels), LearnResult(
        steps=len(losses),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-8:])),
        seconds=time.process_time() - started,
    )


def step_size(fresh: FloatArray, config: LearnConfig, task: Task) -> float:
    """The learning rate for these features [N, D].

    Plain SGD depends on the scale of its inputs, so a step is taken as if their mean square were one. The curvature of
    a square is twice that of cross-entropy at its most.
    """
    rate = config.learning_rate / max(1.0, float((fresh**2).sum(axis=1).mean()))
    return rate / 2 if task == "regression" else rate


def batches(
    targets: AnyArray, fresh: int, task: Task, config: LearnConfig, rng: np.random.Generator
) -> Iterator[tuple[IndexArray, float]]:
    """The rows of every micro-batch, and how much of the learning rate it gets.

    In each pass every fresh row comes once, and each batch is filled up with replayed rows drawn at random. In the
    balanced passes at the end all rows are drawn so that each label comes as often (without labels: each row).

    Args:
        targets: Of all rows, the fresh ones first.
        fresh: How many of them are fresh.
        task: What the targets are.
        config: Batch mix and passes.
        rng: Source of chance.
    """
    replay = len(targets) - fresh
    for _ in range(config.passes):
        order = rng.permutation(fresh)
        for start in range(0, fresh, config.new_per_batch):
            new = order[start : start + config.new_per_batch]
            old = fresh + rng.integers(replay, size=config.replayed_per_batch if replay else 0)
            yield np.concatenate([new, old]), 1.0
    if not config.balanced_passes:
        return
    chance = 1 / np.bincount(targets)[targets] if task == "classification" else np.ones(len(targets))
    cumulated = np.cumsum(chance)
    for _ in range(config.balanced_passes * -(-fresh // _BALANCED_BATCH)):
        yield np.searchsorted(cumulated, rng.random(_BALANCED_BATCH) * cumulated[-1]), _BALANCED_RATE


def loss_and_gradients(
    weights: Weights, x: FloatArray, targets: AnyArray, row_weights: FloatArray, *, task: Task, config: LearnConfig
) -> tuple[float, Weights]:
    """Mean loss of a batch and its gradient by each weight. x: float32 [N, D]; targets and weights as in `Rows`."""
    inputs = layer_inputs(weights, x)
    loss, delta = loss_and_delta(logits(weights, inputs[-1]), targets, row_weights, task=task, config=config)
    gradients = {}
    for i, (given, gradient) in enumerate(backward(weights, inputs, delta)):
        gradients[f"W{i}"] = given.T @ gradient
        gradients[f"b{i}"] = gradient.sum(axis=0)
    return loss, gradients
