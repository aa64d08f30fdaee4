"""The contract of a `Learner`, and jobs to hold one to it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk.checks.common import require, require_raises, same
from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError, EmptyBufferError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob, Rows
from edge_sdk.learn.ewc import fisher_diagonal, grown_like
from edge_sdk.learn.moments import Moments, fresh_mass
from edge_sdk.learn.slda import closed_form
from edge_sdk.manifest import LatentSpec

if TYPE_CHECKING:
    from edge_sdk.learn.base import Learner
    from edge_sdk.types import AnyArray, FloatArray, Task


def check_learner(learner: Learner, *, seed: int = 0) -> None:
    """Check a `Learner` on small jobs of every task, and of heads with and without a hidden layer.

    Args:
        learner: The learner.
        seed: Of the jobs.

    Raises:
        CheckFailed: A rule is broken.
    """
    for task, hidden in _LEARNED:
        job, judge = example_job(task, hidden=hidden, seed=seed)
        before = _job_arrays(job)
        for array in before.values():
            array.setflags(write=False)
        kept = {name: array.copy() for name, array in before.items()}
        chance = np.random.get_state()  # noqa: NPY002 - the global generator is what must not move
        _check_learner_learns(learner, job, judge)
        _check_learner_is_pure(learner, job)
        _check_learner_between(learner, job)
        _check_learner_edges(learner, job)
        require(same(_job_arrays(job), kept), "the job is only read")
        require(
            _same_chance(chance, np.random.get_state()),  # noqa: NPY002
            "chance comes from the job's seed: numpy's global generator is left alone",
        )


_LEARNED: tuple[tuple[Task, int], ...] = (
    ("classification", 0),
    ("classification", 24),
    ("multilabel", 0),
    ("multilabel", 24),
    ("regression", 0),
    ("regression", 24),
)


class _Interrupted(Exception):  # noqa: N818 - nothing has gone wrong
    """What stops a learner between two micro-batches."""


def _check_learner_learns(learner: Learner, job: LearnJob, judge: Rows) -> None:
    challenger = _challenger(learner, job)
    was, now = (_mistakes(head, judge, job) for head in (job.champion, challenger))
    require(
        now < was,
        f"the challenger does better than the champion on rows like the fresh ones: of {job.task} the error is "
        f"{now:.3g}, the champion's {was:.3g}",
    )


def _mistakes(head: Head, rows: Rows, job: LearnJob) -> float:
    """Share of wrong labels, or mean squared error."""
    outputs = head.logits(dequantize(rows.latents, job.latent))
    if job.task == "regression":
        return float(((outputs - rows.targets) ** 2).mean())
    wrong = outputs.argmax(axis=1) != rows.targets if job.task == "classification" else (outputs > 0) != rows.targets
    return float(wrong.mean())


def _check_learner_is_pure(learner: Learner, job: LearnJob) -> None:
    first, second = (_challenger(learner, job).to_bytes() for _ in range(2))
    require(first == second, "the same job gives the same bytes")
    weights = (np.arange(len(job.fresh)) % 5 > 0).astype(np.float32)
    without = _weighed(job, weights)
    other = np.where(weights[:, None] > 0, job.fresh.latents, 255 - job.fresh.latents)
    require(
        _challenger(learner, replace(without, fresh=replace(without.fresh, latents=other))).to_bytes()
        == _challenger(learner, without).to_bytes(),
        "a row of weight 0 has no influence",
    )


def _same_chance(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _check_learner_between(learner: Learner, job: LearnJob) -> None:
    def interrupt() -> None:
        raise _Interrupted

    require_raises(
        _Interrupted, lambda: learner(job, between=interrupt), "`between` is called, and what it raises is let through"
    )


def _check_learner_edges(learner: Learner, job: LearnJob) -> None:
    job = replace(job, config=LearnConfig(passes=2))
    count = len(job.fresh)
    nothing, zeros = job.fresh.take(np.zeros(0, np.int64)), np.zeros(count, np.float32)
    for rule, refused in {
        "a job without fresh rows is refused": replace(job, fresh=nothing, fresh_mass=zeros[:0]),
        "a job whose fresh rows all weigh 0 is refused": _weighed(job, zeros),
    }.items():
        require_raises(EmptyBufferError, partial(learner, refused), rule)
    unknown = replace(job, moments=Moments.none(job.moments.labels, len(job.moments.x)))
    dead = replace(job.fresh, latents=np.full_like(job.fresh.latents, job.latent.zero_point))
    zero = job.base.hidden(dequantize(dead.latents, job.latent))
    still = replace(job, moments=Moments.of(zero, dead.targets, dead.weights, job.moments.labels))
    free = replace(job, fisher={key: np.zeros_like(value) for key, value in job.fisher.items()})
    edges = {
        "an empty buffer": replace(job, replay=nothing),
        "one fresh row": replace(job, fresh=job.fresh.take(np.arange(1)), fresh_mass=job.fresh_mass[:1]),
        "no moments": unknown,
        "no moments and an empty buffer": replace(unknown, replay=nothing),
        "features that are all 0": replace(still, fresh=dead, replay=dead),
        "features that were all 0": still,
        "a seed of many digits": replace(job, seed=2**80),
        "nothing of importance": replace(free, config=LearnConfig(ewc_lambda=1e300, passes=2)),
    }
    for strength in (0, 1e6, 1e300):
        edges[f"ewc_lambda={strength:g}"] = replace(job, config=LearnConfig(ewc_lambda=strength, passes=2))
    if job.task == "classification":
        edges["labels that do not apply"] = _weighed(job, np.where(np.arange(count) % 4, 1, -1).astype(np.float32))
    for edge, changed in edges.items():
        _challenger(learner, changed, edge)
    for rate in (1e3, 1e30, 1e300):
        with suppress(DivergedError):
            _challenger(learner, replace(job, config=LearnConfig(learning_rate=rate, passes=2)), f"{rate=:g}")
    if job.task == "classification":
        _check_learner_label_without_rows(learner, job)


def _weighed(job: LearnJob, weights: FloatArray) -> LearnJob:
    """The job with other weights of its fresh rows."""
    mass = fresh_mass(job.moments, job.fresh.targets, weights, job.task)
    return replace(job, fresh=replace(job.fresh, weights=weights), fresh_mass=mass)


def _check_learner_label_without_rows(learner: Learner, job: LearnJob) -> None:
    labels = (*job.champion.labels, "never seen")
    champion = job.champion.grown(labels)
    grown = replace(
        job,
        champion=champion,
        base=job.base.grown(labels),
        anchor=grown_like(job.anchor, champion.weights),
        fisher=grown_like(job.fisher, champion.weights),
        moments=job.moments.aligned(labels),
    )
    challenger = _challenger(learner, grown, "a label without rows")
    said = challenger.predict(dequantize(job.fresh.latents, job.latent))
    require(not (said == len(labels) - 1).any(), "a label that no row has is not predicted")


def _challenger(learner: Learner, job: LearnJob, edge: str = "") -> Head:
    """What the learner makes of a job, once its form is seen to be right."""
    where = f" ({edge})" if edge else ""
    try:
        challenger, result = learner(job)
    except ValueError as error:
        require("read-only" not in str(error), f"the job is only read{where}: {error}")
        raise
    champion = job.champion
    require(
        challenger.labels == champion.labels, f"the challenger has the champion's labels in the champion's order{where}"
    )
    require(
        {key: (w.shape, w.dtype) for key, w in challenger.weights.items()}
        == {key: (w.shape, w.dtype) for key, w in champion.weights.items()},
        f"the challenger's weights have the champion's names, shapes and types{where}",
    )
    require(
        all(np.isfinite(w).all() for w in challenger.weights.values()), f"the challenger's weights are finite{where}"
    )
    require(not result.error, f"a result that comes with a challenger tells of no error{where}")
    require(
        bool(np.isfinite([result.first_loss, result.last_loss, result.seconds]).all()),
        f"the result's numbers are finite{where}",
    )
    return challenger


def example_job(task: Task = "classification", *, hidden: int = 0, seed: int = 0) -> tuple[LearnJob, Rows]:
    """A small job to try a learner on: the fresh rows are seen through another sensor, and one label is new.

    Args:
        task: Classification of eight labels, of which the factory's rows have seven; five labels at a time; or two
            values.
        hidden: Width of a hidden layer; 0: a linear head.
        seed: Of the job.

    Returns:
        The job, with 96 fresh and 64 replayed rows, and 200 more like the fresh ones.
    """
    rng = np.random.default_rng(seed)
    dim, count = 16, {"classification": 8, "multilabel": 5}.get(task, 2)
    latent = LatentSpec(dim=dim, scale=1 / 32, zero_point=128)
    centres, mixing = rng.normal(0, 30, (count, dim)), rng.normal(0, dim**-0.5, (dim, count))
    shift = 20 * np.linalg.pinv(mixing).sum(axis=0)  # every value rises by one standard deviation

    def rows(number: int, *, known: int = count, moved: bool = True) -> Rows:
        said = rng.integers(known, size=number)
        x = rng.normal(0, 20, (number, dim)) + (centres[said] if task == "classification" else 0)
        values = x @ mixing / 20 + rng.normal(0, 0.1, (number, count))
        multiple: AnyArray = (values > 0 if task == "multilabel" else values).astype(np.float32)
        latents = np.clip(np.round(latent.zero_point + x + moved * shift), 0, 255).astype(np.uint8)
        return Rows(latents, said if task == "classification" else multiple, np.ones(number, np.float32))

    factory = rows(400, known=count - 1 if task == "classification" else count, moved=False)
    labels = tuple(f"label {i}" for i in range(count))
    widths = (dim, hidden, count) if hidden else (dim, count)
    weights: dict[str, FloatArray] = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = np.zeros(outputs, np.float32)
    start = Head(weights, labels)
    features = dequantize(factory.latents, latent)
    moments = Moments.of(start.hidden(features), factory.targets, factory.weights, labels)
    fitted = closed_form(moments, task)
    doubt = 4 if task == "classification" else 1  # the closed form is surer than what is trained
    champion = start.with_last((fitted.w / doubt).astype(np.float32), (fitted.b / doubt).astype(np.float32))
    fresh = rows(96)
    return LearnJob(
        champion=champion,
        base=champion,
        anchor=champion.weights,
        fisher=fisher_diagonal(champion, features, task=task),
        fresh=fresh,
        replay=factory.take(np.arange(64)),
        moments=moments,
        fresh_mass=fresh_mass(moments, fresh.targets, fresh.weights, task),
        latent=latent,
        task=task,
        config=LearnConfig(passes=12, ewc_lambda=1),
        seed=seed,
    ), rows(200)


def _job_arrays(job: LearnJob) -> dict[str, AnyArray]:
    moments = vars(job.moments)
    parts: dict[str, dict[str, Any]] = {
        "champion": job.champion.weights, "base": job.base.weights, "anchor": job.anchor, "fisher": job.fisher,
        "fresh": vars(job.fresh), "replay": vars(job.replay),
        "moments": {key: moments[key] for key in ("x", "xx", "y", "xy")}, "": {"fresh_mass": job.fresh_mass},
    }  # fmt: skip
    return {f"{part} {key}": value for part, values in parts.items() for key, value in values.items()}
