"""The gradient learner: its gradients, its batches and its steps."""

from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.checks import example_job
from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.loss import loss_and_delta
from edge_sdk.learn.sgd import batches, loss_and_gradients, step_size, train_sgd

TASKS = ("classification", "multilabel", "regression")


def make_head(rng, *widths):
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=outputs).astype(np.float32)
    return Head(weights, tuple(str(i) for i in range(widths[-1])))


def set_config(job, **settings):
    return replace(job, config=msgspec.structs.replace(job.config, **settings))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("widths", [(5, 3), (5, 6, 4), (5, 7, 6, 4)], ids=str)
def test_gradients_equal_finite_differences(rng, widths, task):
    weights = {key: value.astype(np.float64) for key, value in make_head(rng, *widths).weights.items()}
    x, row_weights = rng.normal(size=(9, 5)), rng.uniform(0.5, 2, 9)
    y = rng.integers(widths[-1], size=9) if task == "classification" else (rng.random((9, widths[-1])) > 0.5) * 1.0

    def loss(weights):
        return loss_and_gradients(weights, x, y, row_weights, task=task, config=LearnConfig(label_smoothing=0.1))

    _, gradients = loss(weights)
    step = 1e-6
    for key, value in weights.items():
        slopes = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                nudged = {name: array.copy() for name, array in weights.items()}
                nudged[key][index] += sign * step
                sides.append(loss(nudged)[0])
            slopes[index] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(gradients[key], slopes, atol=1e-5)


@given(
    fresh=st.integers(1, 60),
    replay=st.integers(0, 30),
    new=st.integers(1, 20),
    replayed=st.integers(0, 20),
    passes=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_a_pass_shows_every_fresh_row_once_and_fills_each_batch_with_replayed_rows(
    fresh, replay, new, replayed, passes, seed
):
    config = LearnConfig(new_per_batch=new, replayed_per_batch=replayed, passes=passes)
    targets = np.zeros(fresh + replay, np.int64)
    drawn = list(batches(targets, fresh, "classification", config, np.random.default_rng(seed)))
    assert len(drawn) == passes * -(-fresh // new)
    assert sorted(np.concatenate([rows[rows < fresh] for rows, _ in drawn])) == sorted(list(range(fresh)) * passes)
    for rows, factor in drawn:
        assert 1 <= (rows < fresh).sum() <= new
        assert (rows >= fresh).sum() == (replayed if replay else 0)
        assert (rows < fresh + replay).all()
        assert factor == 1


def test_balanced_passes_draw_every_label_alike_at_a_fifth_of_the_rate(rng):
    targets = np.repeat([0, 1, 2], [900, 90, 10])
    config = LearnConfig(passes=1, balanced_passes=20)
    factors = [factor for _, factor in batches(targets, 600, "classification", config, rng)]
    drawn = np.concatenate(
        [rows for rows, factor in batches(targets, 600, "classification", config, rng) if factor < 1]
    )
    assert set(factors) == {1.0, 0.2}
    assert len(drawn) == 20 * 10 * 64
    np.testing.assert_allclose(np.bincount(targets[drawn]) / len(drawn), 1 / 3, atol=0.02)
    values = rng.normal(size=(1_000, 2))
    drawn = np.concatenate([rows for rows, factor in batches(values, 600, "regression", config, rng) if factor < 1])
    assert np.bincount(drawn, minlength=1_000).min() >= 1
    assert drawn.max() < 1_000


def test_the_step_size_follows_the_scale_of_the_features(rng):
    x, config = rng.normal(size=(50, 20)).astype(np.float32), LearnConfig(learning_rate=0.5)
    size = step_size(x, config, "classification")
    assert size == pytest.approx(0.5 / (x**2).sum(axis=1).mean())
    assert step_size(10 * x, config, "classification") == pytest.approx(size / 100)
    assert step_size(x, config, "regression") == pytest.approx(size / 2)
    assert step_size(1e-3 * x, config, "multilabel") == 0.5  # small features ask for no larger steps


def mean_loss(head, rows, job):
    outputs = head.logits(dequantize(rows.latents, job.latent))
    return loss_and_delta(outputs, rows.targets, rows.weights, task=job.task, config=job.config)[0]


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_falls_on_all_that_is_shown(task, hidden):
    job, _ = example_job(task, hidden=hidden)
    head, result = train_sgd(set_config(job, ewc_lambda=0, passes=24, balanced_passes=2))
    assert result.steps == 24 * 12 + 2 * 2
    before, after = (
        mean_loss(h, job.fresh, job) + 7 * mean_loss(h, job.replay, job) for h in (job.champion, head)
    )  # as the batches mix them
    assert after < 0.9 * before


def test_training_starts_from_the_champion_and_not_from_the_base():
    job, _ = example_job()
    trained, _ = train_sgd(job)
    again = replace(job, champion=trained)
    moved, still = train_sgd(again)[1], train_sgd(job)[1]
    assert moved.first_loss < still.first_loss


@pytest.mark.parametrize("task", TASKS)
def test_ewc_holds_the_weights_the_nearer_to_their_anchor_the_stronger_it_is(task):
    job, _ = example_job(task, hidden=24)
    distances = []
    for strength in (0, 1, 1e2, 1e4, 1e6):
        head, result = train_sgd(set_config(job, ewc_lambda=strength))
        assert np.isfinite(result.last_loss)
        distances.append(sum(float((job.fisher[k] * (v - job.anchor[k]) ** 2).sum()) for k, v in head.weights.items()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 * distances[0]


@pytest.mark.parametrize("ewc_lambda", [0, 10])
@pytest.mark.parametrize("rate", [1e3, 1e10, 1e38, 1e300])
def test_any_learning_rate_gives_a_finite_head_or_diverges(rate, ewc_lambda):
    """ReLU units may die instead: what comes of it is finite, and the gate's to refuse."""
    for hidden in (0, 24):
        job, _ = example_job(hidden=hidden)
        try:
            challenger, result = train_sgd(set_config(job, learning_rate=rate, ewc_lambda=ewc_lambda))
        except DivergedError:
            continue
        assert np.isfinite(result.last_loss)
        assert all(np.isfinite(value).all() for value in challenger.weights.values())


@pytest.mark.parametrize("rate", [1e42, 1e300])
def test_an_absurd_learning_rate_is_one_error_that_says_what_may_help(rate):
    with pytest.raises(DivergedError, match=r"became .* a lower learning rate may help"):
        train_sgd(set_config(example_job()[0], learning_rate=rate, ewc_lambda=0))


def test_another_seed_gives_another_challenger():
    job, _ = example_job()
    assert train_sgd(job)[0].to_bytes() != train_sgd(replace(job, seed=4))[0].to_bytes()


def test_between_is_called_before_each_step():
    job, _ = example_job()
    calls = []
    _, result = train_sgd(job, between=lambda: calls.append(1))
    assert len(calls) == result.steps
