"""The torch learner: the contract, the numpy learner's weights, and penalties of one's own."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from edge_sdk.checks import check_learner, example_job
from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError
from edge_sdk.head import dequantize
from edge_sdk.learn.base import load_learner, nothing_between
from edge_sdk.learn.loss import loss_and_delta
from edge_sdk.learn.sgd import train_sgd
from edge_sdk.learn.torch_learner import logits, mean_loss, train_torch

pytestmark = pytest.mark.torch
TASKS = ("classification", "multilabel", "regression")


def set_config(job, **settings):
    return replace(job, config=msgspec.structs.replace(job.config, **settings))


def test_torch_learner_keeps_the_contract():
    assert load_learner("torch") is train_torch
    check_learner(train_torch)


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"ewc_lambda": 0},
        {"ewc_lambda": 100, "momentum": 0},
        {"ewc_lambda": 1, "label_smoothing": 0.1, "loss": "huber", "huber_delta": 0.5},
    ],
    ids=["plain", "ewc", "smoothed or robust"],
)
def test_numpy_and_torch_agree_to_1e_5_over_50_steps_from_the_same_seed(task, hidden, settings):
    job, _ = example_job(task, hidden=hidden, seed=7)
    job = set_config(job, passes=4, balanced_passes=1, **settings)
    weights = np.where(np.arange(len(job.fresh)) % 5, 1, -1 if task == "classification" else 0.5).astype(np.float32)
    job = replace(job, fresh=replace(job.fresh, weights=weights))
    (expected, known), (found, result) = train_sgd(job), train_torch(job)
    assert result.steps == known.steps == 50
    for key, value in expected.weights.items():
        moved = np.abs(value - job.champion.weights[key]).max()
        assert moved > 1e-4
        np.testing.assert_allclose(found.weights[key], value, atol=1e-5 * np.abs(value).max())
    np.testing.assert_allclose(
        [result.first_loss, result.last_loss], [known.first_loss, known.last_loss], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("task", TASKS)
def test_losses_and_their_gradients_agree(task, size, rng):
    outputs = size * rng.normal(size=(20, 4)).astype(np.float32)
    y = rng.integers(4, size=20) if task == "classification" else (rng.random((20, 4)) > 0.5).astype(np.float32)
    signs = (-1, 0.5, 2) if task == "classification" else (1, 0.5, 2)
    weights = rng.choice(signs, size=20).astype(np.float32)
    for config in (LearnConfig(), LearnConfig(label_smoothing=0.2, loss="huber")):
        expected, delta = loss_and_delta(outputs, y, weights, task=task, config=config)
        given = torch.tensor(outputs, requires_grad=True)
        loss = mean_loss(given, torch.from_numpy(y), torch.from_numpy(weights), task=task, config=config)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(given.grad.numpy(), delta, atol=1e-6)


def test_threads_and_torchs_chance_are_left_as_found():
    job, _ = example_job()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        seen = set()
        train_torch(job, between=lambda: seen.add(torch.get_num_threads()))
        with pytest.raises(DivergedError):
            train_torch(set_config(job, learning_rate=1e300))
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_penalty_with_chance_in_it_follows_the_jobs_seed():
    job, _ = example_job()

    def noisy(weights):
        return (weights["W0"] * torch.randn(weights["W0"].shape)).sum()

    heads = [train_torch(replace(job, seed=seed), penalty=noisy)[0].to_bytes() for seed in (1, 1, 2)]
    assert heads[0] == heads[1] != heads[2]


def distilled(job, *, between=nothing_between):
    """The example of the module's documentation."""
    x = torch.from_numpy(dequantize(job.replay.latents, job.latent))
    before = logits({key: torch.tensor(value) for key, value in job.champion.weights.items()}, x).softmax(dim=1)

    def penalty(weights):
        return torch.nn.functional.cross_entropy(logits(weights, x), before)

    return train_torch(job, between=between, penalty=penalty)


def test_a_penalty_of_ones_own_changes_what_is_learned():
    """Distillation keeps the outputs for replayed rows nearer to the champion's."""
    job, _ = example_job(hidden=24)
    job = set_config(job, replayed_per_batch=0, ewc_lambda=0)
    x = dequantize(job.replay.latents, job.latent)
    before = job.champion.predict(x)
    plain, held = ((head.predict(x) == before).mean() for head in (train_torch(job)[0], distilled(job)[0]))
    assert held > plain
    assert held > 0.9


def test_a_penalty_that_is_not_finite_ends_the_learning():
    job, _ = example_job()
    with pytest.raises(DivergedError, match="the loss became"):
        train_torch(job, penalty=lambda weights: weights["W0"].sum() * torch.nan)
