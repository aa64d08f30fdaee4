"""The losses and their gradients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.config import LearnConfig
from edge_sdk.head import sigmoid, softmax
from edge_sdk.learn.loss import loss_and_delta

TASKS = ("classification", "multilabel", "regression")


def targets_of(task, rng, rows, outputs):
    if task == "classification":
        return rng.integers(outputs, size=rows)
    values = rng.normal(size=(rows, outputs))
    return (values > 0).astype(np.float32) if task == "multilabel" else values.astype(np.float32)


@given(
    task=st.sampled_from(TASKS),
    seed=st.integers(0, 2**32),
    outputs=st.integers(1, 5),
    size=st.sampled_from([0.1, 1.0, 8.0]),
    config=st.builds(
        LearnConfig, loss=st.sampled_from(["squared", "huber"]), label_smoothing=st.sampled_from([0.0, 0.2])
    ),
)
def test_gradients_equal_finite_differences_for_every_task_and_sign_of_the_weight(task, seed, outputs, size, config):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, size, (6, outputs))
    targets = targets_of(task, rng, 6, outputs)
    weights = np.array([1, -1, 0, 0.5, -2, 3]) if task == "classification" else np.array([1, 1, 0, 0.5, 2, 3])
    weights = weights.astype(np.float32)
    _, delta = loss_and_delta(logits, targets, weights, task=task, config=config)
    slopes, step = np.zeros_like(logits), 1e-6
    for index in np.ndindex(logits.shape):
        nudge = np.zeros_like(logits)
        nudge[index] = step
        up, down = (
            loss_and_delta(moved, targets, weights, task=task, config=config)[0]
            for moved in (logits + nudge, logits - nudge)
        )
        slopes[index] = (up - down) / (2 * step)
    np.testing.assert_allclose(delta, slopes, atol=1e-5)
    assert delta.dtype == np.float32


def test_cross_entropy_is_the_formula(rng):
    logits = rng.normal(size=(7, 4)).astype(np.float32)
    y, ones = rng.integers(4, size=7), np.ones(7, np.float32)
    p = softmax(logits)
    loss, _ = loss_and_delta(logits, y, ones, task="classification", config=LearnConfig())
    assert loss == pytest.approx(-np.log(p[np.arange(7), y]).mean(), rel=1e-5)
    not_this, _ = loss_and_delta(logits, y, -ones, task="classification", config=LearnConfig())
    assert not_this == pytest.approx(-np.log(1 - p[np.arange(7), y]).mean(), rel=1e-5)
    smooth, _ = loss_and_delta(logits, y, ones, task="classification", config=LearnConfig(label_smoothing=0.1))
    assert smooth == pytest.approx(0.9 * loss - 0.1 * np.log(p).mean(), rel=1e-5)


def test_multi_label_loss_is_the_sum_of_each_labels_cross_entropy(rng):
    logits, ones = rng.normal(size=(7, 3)).astype(np.float32), np.ones(7, np.float32)
    y, p = targets_of("multilabel", rng, 7, 3), sigmoid(logits)
    loss, delta = loss_and_delta(logits, y, ones, task="multilabel", config=LearnConfig())
    assert loss == pytest.approx(-(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1).mean(), rel=1e-5)
    np.testing.assert_allclose(delta, (p - y) / 7, atol=1e-6)


def test_hubers_loss_is_the_square_up_to_its_bound_and_a_line_beyond():
    targets, ones = np.zeros((1, 1), np.float32), np.ones(1, np.float32)
    for error, squared, huber in [(0.5, 0.125, 0.125), (2.0, 2.0, 2.0), (-10.0, 50.0, 18.0)]:
        outputs = np.full((1, 1), error, np.float32)
        for loss, expected in (("squared", squared), ("huber", huber)):
            config = LearnConfig(loss=loss, huber_delta=2.0)
            found, delta = loss_and_delta(outputs, targets, ones, task="regression", config=config)
            assert found == pytest.approx(expected)
            assert abs(delta[0, 0]) == pytest.approx(min(abs(error), 2) if loss == "huber" else abs(error))


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_weight_2_counts_as_two_rows(task, rng):
    logits, targets = rng.normal(size=(3, 4)).astype(np.float32), targets_of(task, rng, 3, 4)
    doubled = np.array([2, 1, 1], np.float32)
    loss, delta = loss_and_delta(logits, targets, doubled, task=task, config=LearnConfig())
    rows = [0, 0, 1, 2]
    each, deltas = loss_and_delta(logits[rows], targets[rows], np.ones(4, np.float32), task=task, config=LearnConfig())
    assert 3 * loss == pytest.approx(4 * each, rel=1e-5)
    np.testing.assert_allclose(3 * delta[0], 4 * (deltas[0] + deltas[1]), rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [30, 1e3, 1e6])
def test_a_model_that_is_sure_gives_finite_losses_that_grow_with_its_mistake(task, size, rng):
    logits, targets = size * rng.normal(size=(50, 4)).astype(np.float32), targets_of(task, rng, 50, 4)
    ones, config = np.ones(50, np.float32), LearnConfig(loss="huber")
    signs = (ones, -ones) if task == "classification" else (ones,)
    for weights in signs:
        loss, delta = loss_and_delta(logits, targets, weights, task=task, config=config)
        worse, _ = loss_and_delta(2 * logits, targets, weights, task=task, config=config)
        assert 1.5 * loss < worse < 2.5 * loss
        assert np.abs(delta).max() <= 1 / 50 + 1e-6


@pytest.mark.parametrize("lead", [0.0, 5.0, 20.0, 80.0])
def test_a_label_that_does_not_apply_is_pushed_down_the_more_the_surer_the_model_is_of_it(lead):
    """Up to the full weight: 1 - p rounds to 0 long before the model is put right."""
    logits = np.array([[lead, 0.0, -1.0]], np.float32)
    _, delta = loss_and_delta(
        logits, np.array([0]), np.array([-1], np.float32), task="classification", config=LearnConfig()
    )
    p = softmax(logits)[0]
    rest = softmax(logits[:, 1:])[0]
    np.testing.assert_allclose(delta[0], [p[0], -p[0] * rest[0], -p[0] * rest[1]], rtol=1e-5)
    assert delta.sum() == pytest.approx(0, abs=1e-6)


def test_the_only_label_cannot_but_apply():
    logits, never = np.array([[3.0]], np.float32), np.array([-1], np.float32)
    loss, delta = loss_and_delta(logits, np.array([0]), never, task="classification", config=LearnConfig())
    assert (loss, delta.tolist()) == (0.0, [[0.0]])
