"""The default learner: streaming discriminant analysis, refined on the rows there are.

The closed form from moments forgets nothing and needs no row, but knows only means and one covariance. Gradient steps
on fresh and replayed rows learn what these miss. They are taken in the closed form's own metric, where every direction
has the same scale, and a proximal step pulls back to it, so that a few rows change little and many change much.

Source:
    Hayes & Kanan 2020, arXiv:1909.01520 (the closed form); Parikh & Boyd 2014, doi:10.1561/2400000003 (the proximal
    step); Guo et al. 2017, arXiv:1706.04599 (the temperature).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from edge_sdk.errors import DivergedError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import Between, LearnJob, LearnResult, nothing_between
from edge_sdk.learn.loss import loss_and_delta
from edge_sdk.learn.moments import Moments
from edge_sdk.learn.sgd import train_sgd
from edge_sdk.learn.slda import ClosedForm, closed_form, with_last_layer
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, Task

_BATCH = 128
_HOLD_OUT = 5
"""Every fifth row of each group finds the temperature."""
_MIN_HELD = 20
_WORSE, _WORSE_BY = 1.5, 0.05
"""A closed form that errs more than so many times the checkpoint's head, and so much, is none to start from."""
_TEMPERATURES = np.geomspace(0.5, 16.0, 41)


@dataclass(frozen=True)
class _Problem:
    """Rows to refine on.

    Attributes:
        x: float32 [N, F], features.
        targets: As in `Rows`.
        signs: float32 [N], 1, or -1 for a label that does not apply.
        chance: float64 [N], of being drawn; sums to 1.
        size: How many rows that amounts to: a group of few rows makes it small; 0 leaves the closed form as it is.
    """

    x: FloatArray
    targets: AnyArray
    signs: FloatArray
    chance: DoubleArray
    size: float


@np.errstate(over="ignore", invalid="ignore")  # what overflows is found by the checks for non-finite numbers
def train_hybrid(job: LearnJob, *, between: Between = nothing_between) -> tuple[Head, LearnResult]:
    """Train the last layer of a challenger; hidden layers are the checkpoint's own.

    The rows are drawn so that all labels come equally often, and within a label fresh and replayed rows alike. How
    many steps are taken follows from the number of rows, so that a small buffer is not learned by heart.

    Where the closed form cannot stand for what is known (fewer rows than features, or much worse than the checkpoint's
    head on the replayed rows), the job is `train_sgd`'s; the result says so.

    Raises:
        EmptyBufferError: The job has no fresh rows that count.
        DivergedError: Loss or weights became non-finite.
    """
    job = job.counted()
    started = time.process_time()
    between()
    rng = np.random.default_rng(job.seed)
    fresh, old = (job.base.hidden(dequantize(rows.latents, job.latent)) for rows in (job.fresh, job.replay))
    if unsuited := _unsuited(job, old):
        head, result = train_sgd(job, between=between)
        return head, msgspec.structs.replace(result, note=unsuited)
    x = np.concatenate([fresh, old])
    targets = np.concatenate([job.fresh.targets, job.replay.targets])
    weights = np.concatenate([job.fresh.weights, job.replay.weights])
    mass = np.concatenate([job.fresh_mass, np.zeros(len(old), np.float32)])
    groups = _groups(targets, len(fresh), job)
    refines = _complete(targets[weights > 0], job)

    def start(rows: AnyArray, temperature: float) -> ClosedForm:
        found = closed_form(job.moments + Moments.of(x[rows], targets[rows], mass[rows], job.moments.labels), job.task)
        return replace(found, w=found.w / temperature, b=found.b / temperature)

    def refined(begin: ClosedForm, rows: AnyArray) -> tuple[DoubleArray, DoubleArray, list[float]]:
        chance, size = _chance(groups[rows], weights[rows])
        signs = np.sign(weights[rows]).astype(np.float32)
        problem = _Problem(x[rows], targets[rows], signs, chance, size if refines else 0.0)
        return _refine(begin, problem, job, rng, between)

    def held_out(w: DoubleArray, b: DoubleArray) -> tuple[float, float]:
        return _temperature((x[judged] @ w + b).astype(np.float32), targets[judged], groups[judged], job)

    before = after = 1.0
    held = _held_out(groups, rng)
    if int((held[: len(fresh)] & (weights[: len(fresh)] > 0)).sum()) >= _MIN_HELD:
        rest, judged = np.flatnonzero(~held), held & (weights > 0)
        trial = start(rest, 1.0)
        before, plain = held_out(trial.w, trial.b)  # one that is too sure of itself has no gradient to learn by
        after, better = held_out(*refined(start(rest, before), rest)[:2])
        if better > plain and job.task != "classification":  # rows drawn by label are not learned by heart so soon
            refines, after = False, 1.0
    everything = np.arange(len(x))
    w, b, losses = refined(start(everything, before), everything)
    return with_last_layer(job, w / after, b / after), LearnResult(
        steps=len(losses),
        first_loss=losses[0] if losses else 0.0,
        last_loss=float(np.mean(losses[-8:])) if losses else 0.0,
        seconds=time.process_time() - started,
    )


def _unsuited(job: LearnJob, features: FloatArray) -> str:
    """Why the closed form cannot stand for what is known; "" if it can. features: of the replayed rows."""
    width = features.shape[1]
    if job.moments.rows < width:
        return f"trained by sgd: moments of {job.moments.rows:.0f} rows say too little of {width} features"
    kept = job.replay.weights > 0
    if kept.sum() < _MIN_HELD:
        return ""
    x, targets = features[kept], job.replay.targets[kept]
    found, last = closed_form(job.moments, job.task), job.base.depth - 1
    own = _error(x @ found.w + found.b, targets, job.task)
    base = _error(x @ job.base.weights[f"W{last}"] + job.base.weights[f"b{last}"], targets, job.task)
    if own > _WORSE * base + _WORSE_BY:
        return (
            f"trained by sgd: the closed form errs by {own:.3f} on replayed rows, the checkpoint's head by {base:.3f}"
        )
    return ""


def _error(outputs: AnyArray, targets: AnyArray, task: Task) -> float:
    """Share of wrong labels, or mean squared error of a regression."""
    match task:
        case "classification":
            return float((outputs.argmax(axis=1) != targets).mean())
        case "multilabel":
            return float(((outputs > 0) != (targets > 0.5)).mean())
        case _:
            return float(((outputs - targets) ** 2).mean())


def _complete(targets: AnyArray, job: LearnJob) -> bool:
    """Whether every known label has rows: without, it would be unlearned, and the closed form has to do."""
    if job.task == "regression":
        return True
    count = len(job.moments.labels)
    present = np.bincount(targets, minlength=count) if job.task == "classification" else targets.sum(axis=0)
    return not (job.moments.known & (present == 0)).any()


def _groups(targets: AnyArray, fresh: int, job: LearnJob) -> AnyArray:
    """int64 [N]: rows that should count alike share a number: fresh or replayed, and of a classification the label."""
    is_fresh = (np.arange(len(targets)) < fresh).astype(np.int64)
    groups: AnyArray = is_fresh if job.task != "classification" else 2 * targets + is_fresh
    return groups


def _chance(groups: AnyArray, weights: FloatArray) -> tuple[DoubleArray, float]:
    """Of each row to be drawn, and how many rows that amounts to.

    Rows that say which label does not apply are of no label: they are drawn as often as a row of mean chance.
    """
    positive = np.maximum(weights, 0)
    size = np.bincount(groups, positive, minlength=groups.max() // 2 * 2 + 2)  # replayed and fresh of each label
    label_parts = (size.reshape(-1, 2) > 0).sum(axis=1)
    labels = int((label_parts > 0).sum())
    chance = np.zeros(len(weights))
    drawn = positive > 0
    chance[drawn] = positive[drawn] / (size[groups[drawn]] * label_parts[groups[drawn] // 2])
    chance[~drawn] = -weights[~drawn] * max(labels, 1) / max(float(positive.sum()), 1.0)
    present = size[size > 0]
    amount = len(present) / (1 / present).sum() * labels if labels else np.abs(weights).sum()
    return chance / chance.sum(), float(amount)


def _refine(
    start: ClosedForm, rows: _Problem, job: LearnJob, rng: np.random.Generator, between: Between
) -> tuple[DoubleArray, DoubleArray, list[float]]:
    """Gradient steps from the closed form, in its metric; w, b, and the loss at each step."""
    config = job.config
    steps = int(config.passes * rows.size / _BATCH)
    if not steps:
        return start.w, start.b, []
    z = ((rows.x - start.mean) @ start.whitening).astype(np.float32)
    v0 = np.linalg.solve(start.whitening, start.w).astype(np.float32)
    a0 = (start.b + start.mean @ start.w).astype(np.float32)
    v, a, speed_v, speed_a = v0, a0, np.zeros_like(v0), np.zeros_like(a0)
    top = config.learning_rate / max(1.0, float((z**2).sum(axis=1).mean()))
    if job.task == "regression":
        top /= 2  # the curvature of a square is twice that of cross-entropy, at its most
    cumulated = np.cumsum(rows.chance)
    losses = []
    for step in range(steps):
        between()
        drawn = np.searchsorted(cumulated, rng.random(_BATCH) * cumulated[-1])
        x = z[drawn]
        loss, delta = loss_and_delta(x @ v + a, rows.targets[drawn], rows.signs[drawn], task=job.task, config=config)
        if not np.isfinite(loss):
            raise DivergedError(f"the loss became {loss} after {step} steps")
        losses.append(loss)
        rate = np.float32(top * (1 - step / steps))
        speed_v = config.momentum * speed_v - rate * (x.T @ delta)
        speed_a = config.momentum * speed_a - rate * delta.sum(axis=0)
        pull = rate * np.float32(config.anchor_rows / rows.size)
        v = (v + speed_v + pull * v0) / (1 + pull)
        a = (a + speed_a + pull * a0) / (1 + pull)
    w = start.whitening @ v.astype(np.float64)
    return w, a - start.mean @ w, losses


def _held_out(groups: AnyArray, rng: np.random.Generator) -> AnyArray:
    """Every fifth row of each group, at random; bool [N]."""
    held = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        held[rows[: len(rows) // _HOLD_OUT]] = True
    return held


def _temperature(logits: FloatArray, targets: AnyArray, groups: AnyArray, job: LearnJob) -> tuple[float, float]:
    """What the logits must be divided by to be as sure as they are right, on rows they were not trained on.

    Returns:
        The temperature (1 for a regression), and the mean loss at it.
    """
    plain = msgspec.structs.replace(job.config, label_smoothing=0.0) if job.config.label_smoothing else job.config
    chance, _ = _chance(groups, np.ones(len(groups), np.float32))
    weights = (chance * len(chance)).astype(np.float32)
    tried = np.ones(1) if job.task == "regression" else _TEMPERATURES
    losses = [loss_and_delta(logits / np.float32(t), targets, weights, task=job.task, config=plain)[0] for t in tried]
    best = int(np.argmin(losses))
    return float(tried[best]), losses[best]
