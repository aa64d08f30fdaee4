"""The default learner: what refining the closed form gains, and what it must not lose."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge_sdk.checks import example_job
from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError
from edge_sdk.head import Head, dequantize, softmax
from edge_sdk.learn.base import LearnJob, Rows
from edge_sdk.learn.hybrid import train_hybrid
from edge_sdk.learn.moments import Moments, fresh_mass
from edge_sdk.learn.sgd import train_sgd
from edge_sdk.learn.slda import train_slda
from edge_sdk.manifest import LatentSpec

LATENT = LatentSpec(dim=8, scale=1 / 32, zero_point=128)


def latents_of(x):
    return np.clip(np.round(x * 32 + 128), 0, 255).astype(np.uint8)


def rows_of(x, targets):
    return Rows(latents_of(x), targets, np.ones(len(x), np.float32))


def job_of(factory, fresh, *, outputs, task="classification", replay=0, **settings):
    """A job on a linear head; the factory's rows are known by their moments, and `replay` of them are kept."""
    labels = tuple(f"label {i}" for i in range(outputs))
    base = Head({"W0": np.zeros((8, outputs), np.float32), "b0": np.zeros(outputs, np.float32)}, labels)
    moments = Moments.of(dequantize(factory.latents, LATENT), factory.targets, factory.weights, labels)
    nothing = {key: np.zeros_like(value) for key, value in base.weights.items()}
    mass = fresh_mass(moments, fresh.targets, fresh.weights, task)
    kept = factory.take(np.arange(replay))
    return LearnJob(
        base, base, base.weights, nothing, fresh, kept, moments, mass, LATENT, task, LearnConfig(**settings), 5
    )


def logits_of(head, rows):
    return head.logits(dequantize(rows.latents, LATENT))


def accuracy(head, rows):
    return (logits_of(head, rows).argmax(axis=1) == rows.targets).mean()


def normals(rng, count, labels, *, centres, spread=0.5):
    y = rng.choice(labels, count)
    return rows_of(centres[y] + rng.normal(0, spread, (count, 8)), y)


@pytest.fixture
def centres(rng):
    return rng.normal(0, 0.8, (6, 8))


def lopsided(rng, count):
    """Two labels; a fifth of the first lies far off on its own side, which moves its mean and not the boundary."""
    y = rng.integers(2, size=count)
    x = rng.normal(0, 0.3, (count, 8))
    x[:, 0] += np.where(y == 1, 0.3, -0.3)
    far = (y == 0) & (rng.random(count) < 0.2)
    x[far, 0] -= 3
    return rows_of(x, y)


def test_refining_improves_on_the_closed_form_with_many_rows_and_changes_the_less_the_fewer_there_are(rng):
    factory, judge = lopsided(rng, 2_000), lopsided(rng, 4_000)
    gains, changes = [], []
    for count in (2, 20, 2_000):
        job = job_of(factory, lopsided(rng, count), outputs=2, replay=count)
        plain, refined = train_slda(job)[0], train_hybrid(job)[0]
        gains.append(accuracy(refined, judge) - accuracy(plain, judge))
        changes.append((logits_of(refined, judge).argmax(axis=1) != logits_of(plain, judge).argmax(axis=1)).mean())
    assert gains[2] > 0.03
    assert changes == sorted(changes)


@pytest.mark.parametrize("fresh_labels", [[5], [1, 2]], ids=["a new label", "known ones"])
def test_where_a_known_label_has_no_rows_the_closed_form_is_kept(rng, centres, fresh_labels):
    factory = normals(rng, 600, range(5), centres=centres)
    job = job_of(factory, normals(rng, 60, fresh_labels, centres=centres), outputs=6)
    (refined, result), (plain, _) = train_hybrid(job), train_slda(job)
    assert result.steps == 0
    temperature = plain.weights["W0"][0, 0] / refined.weights["W0"][0, 0]
    for key, value in plain.weights.items():
        np.testing.assert_allclose(temperature * refined.weights[key], value, rtol=1e-4)
    judge = normals(rng, 500, range(6), centres=centres)
    np.testing.assert_array_equal(logits_of(refined, judge).argmax(axis=1), logits_of(plain, judge).argmax(axis=1))


def test_rows_that_say_which_label_does_not_apply_are_no_rows_of_that_label(rng, centres):
    factory = normals(rng, 600, range(3), centres=centres)
    fresh = normals(rng, 90, range(3), centres=centres)
    fresh = replace(fresh, weights=np.where(fresh.targets == 2, -1, 1).astype(np.float32))
    assert train_hybrid(job_of(factory, fresh, outputs=3))[1].steps == 0


@pytest.mark.parametrize("count", [1, 20, 300])
def test_base_classes_are_never_unlearned_with_an_empty_buffer(rng, centres, count):
    factory = normals(rng, 1_000, range(4), centres=centres)
    old = normals(rng, 2_000, range(4), centres=centres)
    drifted = centres + rng.normal(0, 0.2, centres.shape)
    before = accuracy(train_slda(job_of(factory, factory, outputs=6))[0], old)
    for labels in ([4], [4, 5], [0], range(4), range(6)):
        fresh = normals(rng, count, labels, centres=drifted)
        head, _ = train_hybrid(job_of(factory, fresh, outputs=6))
        assert accuracy(head, old) > before - 0.06, (labels, count)


def test_a_new_label_is_learned_from_20_rows(rng, centres):
    factory = normals(rng, 1_000, range(5), centres=centres)
    fresh = normals(rng, 20, [5], centres=centres)
    for replay in (0, 100):
        head, _ = train_hybrid(job_of(factory, fresh, outputs=6, replay=replay))
        assert accuracy(head, normals(rng, 500, [5], centres=centres)) > 0.85
        assert accuracy(head, normals(rng, 500, range(5), centres=centres)) > 0.85


def calibration_error(head, rows):
    """Mean gap between confidence and accuracy over ten equally filled bins of confidence."""
    p = softmax(logits_of(head, rows))
    order = np.argsort(p.max(axis=1))
    right, confidence = p.argmax(axis=1) == rows.targets, p.max(axis=1)
    return np.mean([abs(right[part].mean() - confidence[part].mean()) for part in np.array_split(order, 10)])


def test_the_temperature_lowers_the_calibration_error(rng, centres):
    """The fresh rows spread more than the factory's, which the covariance of both together understates."""
    factory = normals(rng, 1_000, range(4), centres=centres, spread=0.3)
    fresh, judge = (normals(rng, count, range(4), centres=centres, spread=1.5) for count in (300, 4_000))
    job = job_of(factory, fresh, outputs=4, passes=1)
    plain, tempered = train_slda(job)[0], train_hybrid(job)[0]
    assert calibration_error(tempered, judge) < 0.6 * calibration_error(plain, judge)


def test_a_label_that_does_not_apply_becomes_less_likely(rng, centres):
    factory = normals(rng, 600, range(4), centres=centres, spread=0.8)
    fresh = normals(rng, 200, range(4), centres=centres, spread=0.8)
    disputed = normals(rng, 60, [0], centres=centres[[1]], spread=0.8)  # looks like label 1, and is said not to be
    disputed = replace(disputed, targets=np.ones(60, np.int64), weights=-np.ones(60, np.float32))
    both = Rows(*(np.concatenate(parts) for parts in zip(vars(fresh).values(), vars(disputed).values(), strict=True)))
    for learner in (train_hybrid, train_sgd):
        without, _ = learner(job_of(factory, fresh, outputs=4, replay=200))
        with_them, _ = learner(job_of(factory, both, outputs=4, replay=200))
        before, after = (softmax(logits_of(head, disputed))[:, 1].mean() for head in (without, with_them))
        assert after < before - 0.05


@pytest.mark.parametrize("case", ["too few rows", "moments that err"])
def test_where_moments_cannot_stand_for_what_is_known_gradient_steps_are_taken_and_the_result_says_so(case):
    job, _ = example_job()
    moments = job.moments
    if case == "too few rows":
        job, note = replace(job, moments=Moments.none(moments.labels, len(moments.x))), "moments of 0 rows"
    else:
        job, note = replace(job, moments=replace(moments, xy=0 * moments.xy)), "the closed form errs by"
    head, result = train_hybrid(job)
    assert note in result.note
    assert head.to_bytes() == train_sgd(job)[0].to_bytes()


# ---- other tasks


def linear(rng, count, mixing, *, noise=0.1, shift=0.0):
    x = rng.normal(0, 0.7, (count, 8))
    return rows_of(x + shift, (x @ mixing + rng.normal(0, noise, (count, mixing.shape[1]))).astype(np.float32))


def with_outliers(rng, rows):
    """A tenth of the values are off by twenty deviations to one side."""
    gross = np.arange(len(rows)) % 10 == 0
    return replace(rows, targets=(rows.targets + 20 * gross[:, None]).astype(np.float32))


@pytest.mark.parametrize("learner", [train_hybrid, train_sgd])
def test_hubers_loss_is_less_moved_by_gross_outliers_than_the_square(learner):
    errors = {"squared": [], "huber": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        mixing = rng.normal(0, 0.5, (8, 2))
        factory, fresh, judge = linear(rng, 500, mixing), linear(rng, 600, mixing), linear(rng, 1_000, mixing)
        for loss, found in errors.items():
            job = job_of(factory, with_outliers(rng, fresh), outputs=2, task="regression", loss=loss, huber_delta=0.5)
            found.append(((logits_of(learner(job)[0], judge) - judge.targets) ** 2).mean())
    assert np.mean(errors["huber"]) < 0.7 * np.mean(errors["squared"])


def test_a_regression_follows_a_changed_sensor(rng):
    mixing = rng.normal(0, 0.5, (8, 2))
    factory, judge = linear(rng, 500, mixing), linear(rng, 1_000, mixing, shift=0.5)
    job = job_of(factory, linear(rng, 400, mixing, shift=0.5), outputs=2, task="regression")
    before, after = train_slda(job_of(factory, factory, outputs=2, task="regression"))[0], train_hybrid(job)[0]
    errors = [((logits_of(head, judge) - judge.targets) ** 2).mean() for head in (before, after)]
    assert errors[1] < errors[0] / 5


def present(rows):
    return replace(rows, targets=(rows.targets > 0.3).astype(np.float32))


def test_several_labels_at_a_time_follow_a_shift(rng):
    mixing = rng.normal(0, 0.5, (8, 4))
    factory, judge = present(linear(rng, 500, mixing)), present(linear(rng, 1_000, mixing, shift=0.5))
    known = train_slda(job_of(factory, factory, outputs=4, task="multilabel"))[0]
    job = job_of(factory, present(linear(rng, 300, mixing, shift=0.5)), outputs=4, task="multilabel", replay=100)
    right = [((logits_of(head, judge) > 0) == judge.targets).mean() for head in (known, train_hybrid(job)[0])]
    assert right[1] > right[0] + 0.05


def test_a_known_label_that_no_row_has_is_not_unlearned(rng):
    mixing = rng.normal(0, 0.5, (8, 4))
    factory, fresh = present(linear(rng, 500, mixing)), present(linear(rng, 400, mixing))
    fresh = fresh.take(fresh.targets[:, 2] == 0)
    assert train_hybrid(job_of(factory, fresh, outputs=4, task="multilabel"))[1].steps == 0
    assert train_hybrid(job_of(factory, fresh, outputs=4, task="multilabel", replay=100))[1].steps > 0


# ---- how it works


def test_rows_of_little_weight_are_drawn_seldom(rng, centres):
    """Rows of weight 1e-3 with wrong labels do no harm beside the others."""
    factory, judge = normals(rng, 600, range(4), centres=centres), normals(rng, 1_000, range(4), centres=centres)
    fresh = normals(rng, 400, range(4), centres=centres)
    wrong = np.arange(400) % 2 == 0
    targets = np.where(wrong, (fresh.targets + 1) % 4, fresh.targets)
    right = []
    for weight in (1e-3, 1.0):
        weights = np.where(wrong, weight, 1).astype(np.float32)
        right.append(
            accuracy(train_hybrid(job_of(factory, Rows(fresh.latents, targets, weights), outputs=4))[0], judge)
        )
    assert right[0] > right[1] + 0.02


def test_learning_can_be_interrupted_before_the_closed_form_and_each_step():
    job, _ = example_job("regression")
    calls = []
    _, result = train_hybrid(job, between=lambda: calls.append(1))
    assert len(calls) == 1 + result.steps > 1


def test_chance_is_the_seeds(rng):
    job, _ = example_job("multilabel")
    heads = [train_hybrid(replace(job, seed=seed))[0].to_bytes() for seed in (1, 1, 2)]
    assert heads[0] == heads[1] != heads[2]


def test_an_absurd_learning_rate_is_an_error():
    job, _ = example_job("regression")
    with pytest.raises(DivergedError, match="became"):
        train_hybrid(replace(job, config=msgspec.structs.replace(job.config, learning_rate=1e300)))
