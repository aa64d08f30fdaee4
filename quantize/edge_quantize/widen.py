"""A layer of random features between latent and head, so that learning in closed form can bend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import ConfigError
from edge_sdk.head import Head, Weights, dequantize
from edge_sdk.learn.base import LearnJob, Rows
from edge_sdk.learn.hybrid import train_hybrid
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import LatentSpec
from edge_sdk.types import AnyArray, LatentArray, Task

_OFFSET = 0.5
"""Spread of the random thresholds, in that of the projections: a feature is on for some rows and off for others."""
_ROWS_A_FEATURE = 4
_PART = 2048


def widened(
    head: Head,
    latents: LatentArray,
    targets: AnyArray,
    *,
    latent: LatentSpec,
    task: Task,
    features: int,
    seed: int = 0,
) -> Head:
    """The head with a first layer of `features` random ReLUs, and a last layer fitted to what they put out.

    A device learns the last layer alone. What moments say of random features of a latent is more than what they say of
    the latent itself: on Fashion-MNIST a discriminant on 632 of them beats the best linear head on the latent, with no
    row kept (`benchmarks/forgetting.md`). The price is 4 bytes for each of D x features weights and features² / 2
    moments, and as many multiplications in serving.

    Args:
        head: Linear; its labels are kept.
        latents: uint8 [N, D], of the rows it was trained on.
        targets: int64 [N], uint8 [N, C] or standardised float32 [N, T].
        latent: How they are quantized.
        task: What the targets are.
        features: Width of the layer; at most a quarter of the rows.
        seed: Draws the layer.

    Raises:
        ConfigError: The head is not linear, or there are too few rows for so many features.

    Source:
        McDonnell, Gong, Parvaneh, Abbasnejad & van den Hengel 2023, "RanPAC: random projections and pre-trained models
        for continual learning", arXiv:2307.02251; Rahimi & Recht 2008, "Weighted sums of random kitchen sinks".
    """
    if head.depth != 1:
        raise ConfigError(f"random features go before a linear head; this one has {head.depth} layers")
    if features < 1 or features * _ROWS_A_FEATURE > len(latents):
        raise ConfigError(
            f"{len(latents)} training rows allow for 1 to {len(latents) // _ROWS_A_FEATURE} random features, "
            f"got {features}"
        )
    rng = np.random.default_rng(seed)
    x = dequantize(latents, latent)
    mean, scale = x.mean(axis=0), max(float(x.std()), 1e-6)
    first = (rng.normal(size=(x.shape[1], features)) / (scale * np.sqrt(x.shape[1]))).astype(np.float32)
    threshold = (_OFFSET * rng.normal(size=features) - mean @ first).astype(np.float32)
    outputs = len(head.labels)
    weights: Weights = {
        "W0": first,
        "b0": threshold,
        "W1": np.zeros((features, outputs), np.float32),
        "b1": np.zeros(outputs, np.float32),
    }
    return _fitted(Head(weights, head.labels), latents, targets, latent, task, seed)


def _fitted(head: Head, latents: LatentArray, targets: AnyArray, latent: LatentSpec, task: Task, seed: int) -> Head:
    """The last layer as a device would learn it from all these rows."""
    moments = Moments.none(head.labels, head.weights["b0"].size)
    for start in range(0, len(latents), _PART):
        part = slice(start, start + _PART)
        features = head.hidden(dequantize(latents[part], latent))
        moments += Moments.of(features, targets[part], np.ones(len(features)), head.labels)
    rows = Rows(latents, targets, np.ones(len(latents), np.float32))
    none = rows.take(np.zeros(0, np.int64))
    job = LearnJob(
        champion=head, base=head, anchor=head.weights, fisher=head.weights, fresh=rows, replay=none, moments=moments,
        fresh_mass=np.zeros(len(latents), np.float32),  # the moments know them
        latent=latent, task=task, config=LearnConfig(), seed=seed,
    )  # fmt: skip
    return replace(train_hybrid(job)[0], labels=head.labels)
