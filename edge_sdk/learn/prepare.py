"""Which of the fresh rows are learned from: the window, the labels that can be trusted, a part that stands for all.

Runs where the learner runs: on wide latents it takes seconds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_sdk.head import dequantize
from edge_sdk.learn.base import LearnJob, Rows
from edge_sdk.learn.clean import suspects
from edge_sdk.learn.select import dynamic_window, fixed_window, representative
from edge_sdk.types import IndexArray

_MIN_WINDOW = 60


def prepare(job: LearnJob) -> tuple[LearnJob, list[int]]:
    """The job with the fresh rows that are to be learned from.

    Args:
        job: With all fresh rows, oldest first.

    Returns:
        The job to give to a learner, and the positions of the rows whose label contradicts what the others say: they
        should be forgotten.
    """
    config = job.config
    kept = _window(job)
    wrong: list[int] = []
    if config.filter_share and len(kept):
        fresh = job.fresh.take(kept)
        found = suspects(
            job.base.hidden(dequantize(fresh.latents, job.latent)),
            fresh.targets,
            fresh.weights,
            task=job.task,
            max_share=config.filter_share,
            replay_features=job.base.hidden(dequantize(job.replay.latents, job.latent)),
            replay_targets=job.replay.targets,
        )
        wrong, kept = kept[found].tolist(), kept[~found]
    weights = np.ones(len(kept), np.float32)
    if len(kept) > config.max_rows:
        rows, weights = representative(job.fresh.latents[kept], _strata(job, kept), config.max_rows)
        kept = kept[rows]
    fresh = job.fresh.take(kept)
    fresh = Rows(fresh.latents, fresh.targets, (fresh.weights * weights).astype(np.float32))
    return replace(job, fresh=fresh, fresh_mass=(job.fresh_mass[kept] * weights).astype(np.float32)), wrong


def _window(job: LearnJob) -> IndexArray:
    config, count = job.config, len(job.fresh)
    order = np.arange(count, dtype=np.float64)  # as good as the times: rows come oldest first
    match config.window:
        case "fixed":
            return fixed_window(order, config.window_rows)
        case "dynamic":
            features = job.base.hidden(dequantize(job.fresh.latents, job.latent))
            return dynamic_window(
                features,
                job.fresh.targets,
                job.fresh.weights,
                order,
                task=job.task,
                min_rows=min(_MIN_WINDOW, config.window_rows),
                max_rows=config.window_rows,
            )
        case _:
            return np.arange(count)


def _strata(job: LearnJob, kept: IndexArray) -> IndexArray:
    """Rows that should stay as frequent as they are: of a label, or of a set of labels."""
    targets = job.fresh.targets[kept]
    match job.task:
        case "classification":
            return targets.astype(np.int64)
        case "multilabel":
            sets: IndexArray = np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
            return sets
        case _:
            return np.zeros(len(kept), dtype=np.int64)
