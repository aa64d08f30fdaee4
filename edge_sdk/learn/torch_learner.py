"""The gradient learner in torch, for losses that are easier written than differentiated.

The same steps as `edge_sdk.learn.sgd`, with gradients from autograd. A learner of your own can add a penalty to each
step's loss; name it in the configuration as `module:function`:

    def distilled(job, *, between=nothing_between):
        x = torch.from_numpy(dequantize(job.replay.latents, job.latent))
        before = logits({key: torch.tensor(value) for key, value in job.champion.weights.items()}, x).softmax(dim=1)

        def penalty(weights):
            return F.cross_entropy(logits(weights, x), before)

        return train_torch(job, between=between, penalty=penalty)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError, MissingExtraError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import Between, LearnJob, LearnResult, nothing_between
from edge_sdk.learn.ewc import proximal_step
from edge_sdk.learn.sgd import batches, step_size
from edge_sdk.types import Task

try:
    import torch
    from torch import Tensor
    from torch.nn import functional as F  # noqa: N812 - torch's own name for it
except ImportError as error:
    raise MissingExtraError("the torch learner", "train") from error

Tensors = dict[str, Tensor]
"""W0, b0, …: float32, named and shaped as in `edge_sdk.head`."""


@np.errstate(over="ignore", invalid="ignore")  # what overflows is found by the checks for non-finite numbers
def train_torch(
    job: LearnJob, *, between: Between = nothing_between, penalty: Callable[[Tensors], Tensor] | None = None
) -> tuple[Head, LearnResult]:
    """Train a challenger from the champion, as `edge_sdk.learn.sgd.train_sgd` does: to 1e-5 the same weights.

    Runs on the CPU in one thread, with torch's own chance seeded by the job's seed; both are put back at the end.

    Args:
        job: Champion, anchor, Fisher information, rows and settings.
        between: Called before each micro-batch.
        penalty: Of the weights, a scalar added to the mean loss of each micro-batch.

    Returns:
        The challenger, and how it came about.

    Raises:
        EmptyBufferError: The job has no fresh rows that count.
        DivergedError: Loss or weights became non-finite.
    """
    job = job.counted()
    config, started = job.config, time.process_time()
    rows = job.fresh + job.replay
    x = dequantize(rows.latents, job.latent)
    rate = step_size(x[: len(job.fresh)], config, job.task)
    drawing = batches(rows.targets, len(job.fresh), job.task, config, np.random.default_rng(job.seed))
    features, wanted, counts = (torch.from_numpy(part) for part in (x, rows.targets, rows.weights))
    weights = {key: torch.tensor(value, requires_grad=True) for key, value in job.champion.weights.items()}
    velocity = {key: torch.zeros_like(value) for key, value in weights.items()}
    losses: list[float] = []
    with _one_thread_and_seed(job.seed):
        for drawn, factor in drawing:
            between()
            index = torch.from_numpy(drawn)
            loss = mean_loss(
                logits(weights, features[index]), wanted[index], counts[index], task=job.task, config=config
            )
            if penalty is not None:
                loss = loss + penalty(weights)
            if not loss.isfinite():
                raise DivergedError(
                    f"the loss became {loss.item()} after {len(losses)} steps; a lower learning rate may help"
                )
            losses.append(loss.item())
            gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            pace = factor * rate
            velocity = {key: config.momentum * value - pace * gradients[key] for key, value in velocity.items()}
            moved = {key: (value.detach() + velocity[key]).numpy() for key, value in weights.items()}
            if config.ewc_lambda:
                moved = proximal_step(moved, job.anchor, job.fisher, strength=pace * config.ewc_lambda)
            if not all(np.isfinite(value).all() for value in moved.values()):
                raise DivergedError(
                    f"weights became non-finite after {len(losses)} steps; a lower learning rate may help"
                )
            weights = {key: torch.from_numpy(value).requires_grad_() for key, value in moved.items()}
    return Head({key: value.detach().numpy() for key, value in weights.items()}, job.champion.labels), LearnResult(
        steps=len(losses),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-8:])),
        seconds=time.process_time() - started,
    )


def logits(weights: Tensors, x: Tensor) -> Tensor:
    """The head's outputs, float32 [N, C], for features [N, D] in model units; autograd follows the weights."""
    last = len(weights) // 2 - 1
    for i in range(last):
        x = (x @ weights[f"W{i}"] + weights[f"b{i}"]).relu()
    return x @ weights[f"W{last}"] + weights[f"b{last}"]


def mean_loss(outputs: Tensor, targets: Tensor, row_weights: Tensor, *, task: Task, config: LearnConfig) -> Tensor:
    """Mean loss of a batch, as in `edge_sdk.learn.loss.loss_and_delta`; a scalar."""
    smoothing = config.label_smoothing
    match task:
        case "multilabel":
            wanted = targets * (1 - smoothing) + smoothing / 2
            losses = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").sum(dim=1)
        case "regression":
            if config.loss == "huber":
                losses = F.huber_loss(outputs, targets, reduction="none", delta=config.huber_delta).sum(dim=1)
            else:
                losses = F.mse_loss(outputs, targets, reduction="none").sum(dim=1) / 2
        case _:
            losses = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
            never = (row_weights < 0) & (outputs.shape[1] > 1)
            if never.any():
                others = outputs.masked_fill(F.one_hot(targets, outputs.shape[1]).bool(), -torch.inf)
                losses = torch.where(never, outputs.logsumexp(dim=1) - others.logsumexp(dim=1), losses)
    return (losses * row_weights.abs()).mean()


@contextmanager
def _one_thread_and_seed(seed: int) -> Iterator[None]:
    """One thread, whose sums have one order, and a generator of the job's own; what was before comes back."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(1)
            torch.default_generator.manual_seed(seed % 2**63)
            yield
        finally:
            torch.set_num_threads(threads)
