"""Streaming linear discriminant analysis: the last layer in closed form from moments. No buffer, no gradient step.

Source:
    Hayes & Kanan 2020, "Lifelong machine learning with deep streaming linear discriminant analysis",
    arXiv:1909.01520: one mean a class and one covariance for all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from edge_sdk.errors import DivergedError, EmptyBufferError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import Between, LearnJob, LearnResult, nothing_between
from edge_sdk.learn.moments import RESIDUE, Moments
from edge_sdk.types import DoubleArray, Task

_SHRINKAGE = 1e-3
_TINY = 1e-12
_LEAST_ODDS = 1e-3


@dataclass(frozen=True)
class ClosedForm:
    """A last layer, and the metric it was found in.

    Attributes:
        w: float64 [F, C].
        b: float64 [C].
        mean: float64 [F], of the features.
        whitening: float64 [F, F]: (x - mean) @ whitening has the identity as its covariance, within the classes of a
            classification, of all rows otherwise.
    """

    w: DoubleArray
    b: DoubleArray
    mean: DoubleArray
    whitening: DoubleArray


def closed_form(moments: Moments, task: Task) -> ClosedForm:
    """The last layer that follows from moments.

    Classification: linear discriminant analysis with equal priors; a label without rows is never the likeliest.
    Multi-label: a discriminant for each label, with its prior. Regression: least squares. Each covariance is shrunk
    towards a multiple of the identity, the more the fewer rows it rests on.

    Raises:
        EmptyBufferError: The moments are of no rows.
        DivergedError: They are not finite.
    """
    if min(moments.rows, moments.mass) <= 0:
        raise EmptyBufferError("the moments are of no rows: there is nothing to learn from")
    if not (np.isfinite(moments.xx).all() and np.isfinite(moments.xy).all()):
        raise DivergedError("the moments are not finite: features or targets are too large or not numbers")
    match task:
        case "multilabel":
            return _discriminants(moments)
        case "regression":
            return _least_squares(moments)
        case _:
            return _discriminant(moments)


def _discriminant(moments: Moments) -> ClosedForm:
    known = moments.known
    means = np.zeros_like(moments.xy)
    means[:, known] = moments.xy[:, known] / moments.y[known]
    within = (moments.xx - (means * moments.y) @ means.T) / moments.mass
    metric = _shrunk(within, _shrinkage(moments))
    w = np.linalg.solve(metric, means).astype(np.float64)
    b = -0.5 * (means * w).sum(axis=0)
    # the mean of the known labels' scores becomes 0 everywhere: the best is above, and one that is below is never best
    w[:, known] -= w[:, known].mean(axis=1, keepdims=True)
    b[known] -= b[known].mean()
    b[~known] = b[known].min() - 1.0
    return ClosedForm(w, b, means[:, known].mean(axis=1), _whitening(metric))


def _discriminants(moments: Moments) -> ClosedForm:
    mean, share = moments.x / moments.mass, moments.y / moments.mass
    shrinkage = _shrinkage(moments)
    metric = _shrunk(_covariance(moments), shrinkage)
    p = np.clip(share, _LEAST_ODDS, 1 - _LEAST_ODDS)
    w, b = np.zeros_like(moments.xy), np.log(p / (1 - p))
    both = moments.known & (share < 1 - RESIDUE)
    on = moments.xy[:, both] / moments.y[both]
    off = (moments.x[:, None] - moments.xy[:, both]) / (moments.mass - moments.y[both])
    # Total covariance = within + between, and between has rank one: its inverse is taken once, for all labels
    # (Sherman & Morrison 1950, doi:10.1214/aoms/1177729893).
    spread = (1 - shrinkage) * share[both] * (1 - share[both])
    solved = np.linalg.solve(metric, on - off)
    w[:, both] = solved / np.maximum(1 - spread * ((on - off) * solved).sum(axis=0), _TINY)
    b[both] -= 0.5 * ((on + off) * w[:, both]).sum(axis=0)
    return ClosedForm(w, b, mean, _whitening(metric))


def _least_squares(moments: Moments) -> ClosedForm:
    mean, target = moments.x / moments.mass, moments.y / moments.mass
    metric = _shrunk(_covariance(moments), _shrinkage(moments))
    covariance = moments.xy / moments.mass - np.outer(mean, target)
    w = np.linalg.solve(metric, covariance).astype(np.float64)
    return ClosedForm(w, target - mean @ w, mean, _whitening(metric))


def _covariance(moments: Moments) -> DoubleArray:
    mean = moments.x / moments.mass
    covariance: DoubleArray = moments.xx / moments.mass - np.outer(mean, mean)
    return covariance


def _shrinkage(moments: Moments) -> float:
    width = len(moments.x)
    return _SHRINKAGE + 0.05 * width / (width + moments.rows)


def _shrunk(covariance: DoubleArray, shrinkage: float) -> DoubleArray:
    width = len(covariance)
    scale = max(float(np.trace(covariance)) / width, _TINY)  # features that never vary leave nothing to scale by
    shrunk: DoubleArray = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(width)
    return shrunk


def _whitening(metric: DoubleArray) -> DoubleArray:
    values, vectors = np.linalg.eigh(metric)
    whitening: DoubleArray = vectors / np.sqrt(np.maximum(values, values.max() * 1e-9))
    return whitening


def train_slda(job: LearnJob, *, between: Between = nothing_between) -> tuple[Head, LearnResult]:
    """A challenger in closed form from what was known and the fresh rows; the replayed ones are not needed.

    Hidden layers are the checkpoint's own: the moments are sums over what they put out.

    Raises:
        EmptyBufferError: The job has no fresh rows that count.
        DivergedError: The result is not finite.
    """
    job = job.counted()
    started = time.process_time()
    between()
    found = closed_form(job.moments + fresh_moments(job), job.task)
    return with_last_layer(job, found.w, found.b), LearnResult(steps=1, seconds=time.process_time() - started)


def with_last_layer(job: LearnJob, w: DoubleArray, b: DoubleArray) -> Head:
    """The job's base with another last layer. w: float64 [F, C]; b: float64 [C].

    Raises:
        DivergedError: They are not finite in single precision.
    """
    with np.errstate(over="ignore"):
        layer = w.astype(np.float32), b.astype(np.float32)
    if not all(np.isfinite(part).all() for part in layer):
        raise DivergedError("the weights became non-finite; a lower learning rate may help")
    return job.base.with_last(*layer)


def fresh_moments(job: LearnJob) -> Moments:
    """Moments of the job's fresh rows."""
    features = job.base.hidden(dequantize(job.fresh.latents, job.latent))
    return Moments.of(features, job.fresh.targets, job.fresh_mass, job.moments.labels)
