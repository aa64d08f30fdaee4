"""A layer of random features before the head: what it makes learnable in closed form, and what it refuses."""

import numpy as np
import pytest

from edge_quantize.widen import widened
from edge_sdk.errors import ConfigError
from edge_sdk.head import Head, dequantize
from edge_sdk.manifest import LatentSpec

LATENT = LatentSpec(dim=2, scale=1 / 128, zero_point=128)
LINEAR = Head({"W0": np.zeros((2, 2), np.float32), "b0": np.zeros(2, np.float32)}, ("in", "out"))


def circle(rng, count):
    """Latents uint8 [N, 2], and whether they lie outside a circle: no line parts them."""
    latents = rng.integers(0, 256, (count, 2), dtype=np.uint8)
    return latents, (np.hypot(*dequantize(latents, LATENT).T) > 0.75).astype(np.int64)


def right(head, latents, y):
    return float(np.mean(head.predict(dequantize(latents, LATENT)) == y))


def wide(rng, *, features=64, rows=1_000, **more):
    latents, y = circle(rng, rows)
    return widened(LINEAR, latents, y, latent=LATENT, task="classification", features=features, **more)


def test_random_features_part_what_no_line_can(rng):
    head = wide(rng)
    assert (head.depth, head.weights["W0"].shape, head.labels) == (2, (2, 64), ("in", "out"))
    assert right(head, *circle(rng, 2_000)) > 0.95
    assert right(wide(rng, features=1), *circle(rng, 2_000)) < 0.75


def test_same_seed_gives_the_same_head_and_another_seed_another_layer():
    first, second, other = (wide(np.random.default_rng(0), seed=seed) for seed in (3, 3, 4))
    assert first.to_bytes() == second.to_bytes()
    assert not np.allclose(first.weights["W0"], other.weights["W0"])


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_every_task_can_be_widened(rng, task):
    latents, y = circle(rng, 1_000)
    targets = np.stack([y, 1 - y], axis=1).astype(np.uint8 if task == "multilabel" else np.float32)
    head = widened(LINEAR, latents, targets, latent=LATENT, task=task, features=64)
    said = head.logits(dequantize(latents, LATENT))
    cut = 0.0 if task == "multilabel" else 0.5
    assert np.mean((said > cut) == (targets > 0.5)) > 0.95


@pytest.mark.parametrize(("features", "rows"), [(0, 100), (26, 100), (-1, 100)])
def test_more_features_than_a_quarter_of_the_rows_are_refused(rng, features, rows):
    with pytest.raises(ConfigError, match=f"100 training rows allow for 1 to 25 random features, got {features}"):
        wide(rng, features=features, rows=rows)


def test_head_with_hidden_layers_is_not_widened(rng):
    head = wide(rng)
    with pytest.raises(ConfigError, match="this one has 2 layers"):
        widened(head, *circle(rng, 100), latent=LATENT, task="classification", features=8)


def test_latents_that_never_vary_give_a_finite_head():
    latents, y = np.full((100, 2), 7, np.uint8), np.arange(100) % 2
    head = widened(LINEAR, latents, y, latent=LATENT, task="classification", features=8)
    assert all(np.isfinite(value).all() for value in head.weights.values())
