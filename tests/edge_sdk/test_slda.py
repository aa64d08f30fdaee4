"""Streaming discriminant analysis against the textbook, and what it must bear."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.checks import example_job
from edge_sdk.errors import DivergedError, EmptyBufferError
from edge_sdk.head import dequantize, softmax
from edge_sdk.learn.moments import Moments
from edge_sdk.learn.slda import closed_form, train_slda

LABELS = tuple("abcd")


def gauss(rng, counts=(60, 60, 60, 60), width=6):
    """Rows of correlated normal distributions around one centre a label."""
    y = np.repeat(np.arange(len(counts)), counts)
    mixing = rng.normal(size=(width, width))
    return rng.normal(0, 2, (len(counts), width))[y] + rng.normal(size=(len(y), width)) @ mixing, y


def moments_of(x, y, w=None, labels=LABELS):
    return Moments.of(x, y, np.ones(len(x)) if w is None else w, labels)


def shrunk(covariance, rows):
    width = len(covariance)
    share = 1e-3 + 0.05 * width / (width + rows)
    return (1 - share) * covariance + share * np.trace(covariance) / width * np.eye(width), share


def scores_of(found, x):
    return x @ found.w + found.b


def centred(scores):
    return scores - scores.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("counts", [(60, 60, 60, 60), (200, 40, 9, 3)])
def test_slda_equals_the_textbook_computed_from_rows(rng, counts):
    """Log densities of normal distributions with one covariance and equal priors."""
    x, y = gauss(rng, counts)
    means = np.stack([x[y == k].mean(axis=0) for k in range(4)])
    within = (x - means[y]).T @ (x - means[y]) / len(x)
    inverse = np.linalg.inv(shrunk(within, len(x))[0])
    distances = np.stack([np.einsum("nf,fg,ng->n", x - m, inverse, x - m) for m in means], axis=1)
    found = scores_of(closed_form(moments_of(x, y), "classification"), x)
    np.testing.assert_allclose(centred(found), centred(-0.5 * distances), atol=1e-8)


def test_slda_equals_scikit_learns_discriminant_analysis(rng):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = gauss(rng)
    share = shrunk(np.eye(x.shape[1]), len(x))[1]
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share, priors=np.full(4, 0.25)).fit(x, y)
    found = scores_of(closed_form(moments_of(x, y), "classification"), x)
    np.testing.assert_allclose(softmax(found), reference.predict_proba(x), atol=1e-6)


@given(seed=st.integers(0, 2**32), parts=st.integers(1, 6))
def test_neither_order_nor_partition_of_the_rows_matters(seed, parts):
    rng = np.random.default_rng(seed)
    x, y = gauss(rng, (20, 20, 20, 20))
    order = rng.permutation(len(x))
    total = Moments.none(LABELS, x.shape[1])
    for rows in np.array_split(order, parts):
        total = total + moments_of(x[rows], y[rows])
    whole, streamed = closed_form(moments_of(x, y), "classification"), closed_form(total, "classification")
    np.testing.assert_allclose(scores_of(streamed, x), scores_of(whole, x), atol=1e-6)


def test_whitened_features_have_the_identity_as_covariance(rng):
    y = np.arange(8_000) % 4
    x = rng.normal(0, 2, (4, 6))[y] + rng.normal(size=(8_000, 6)) * [1, 1, 2, 2, 3, 3]
    found = closed_form(moments_of(x, y), "classification")
    z = (x - found.mean) @ found.whitening
    within = np.mean([np.cov(z[y == k].T) for k in range(4)], axis=0)
    np.testing.assert_allclose(within, np.eye(x.shape[1]), atol=0.05)


@given(seed=st.integers(0, 2**32), size=st.sampled_from([1.0, 1e2, 1e4]))
def test_a_label_without_rows_is_never_the_likeliest(seed, size):
    rng = np.random.default_rng(seed)
    x, y = gauss(rng, (20, 20, 20))
    found = closed_form(moments_of(x, y), "classification")
    anywhere = rng.normal(0, size, (200, x.shape[1]))
    assert (scores_of(found, anywhere).argmax(axis=1) != 3).all()


def test_what_subtraction_leaves_of_a_label_is_no_label(rng):
    x, y = gauss(rng)
    w = rng.uniform(0.5, 2, len(x))
    gone = y == 3
    rest = moments_of(x, y, w) - moments_of(x[gone], y[gone], w[gone])
    found, plain = (
        closed_form(moments, "classification") for moments in (rest, moments_of(x[~gone], y[~gone], w[~gone]))
    )
    np.testing.assert_allclose(scores_of(found, x), scores_of(plain, x), atol=1e-6)


def test_least_squares_equals_lstsq_with_many_rows(rng):
    x = rng.normal(2, 1, (20_000, 5))
    y = (x @ rng.normal(size=(5, 4)) + 3 + rng.normal(size=(20_000, 4))).astype(np.float32)
    found = closed_form(moments_of(x, y), "regression")
    expected = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    np.testing.assert_allclose(found.w, expected[:-1], atol=0.01)
    np.testing.assert_allclose(found.b, expected[-1], atol=0.03)


def test_each_of_several_labels_gets_the_textbooks_discriminant_with_its_prior(rng):
    x, y = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)), np.zeros((500, 4), np.float32)
    y[:, 0] = x @ rng.normal(size=6) + rng.normal(size=500) > 0
    y[:, 1] = x @ rng.normal(size=6) + rng.normal(size=500) > 3
    y[:, 2] = rng.random(500) < 0.02
    found = closed_form(moments_of(x, y), "multilabel")
    scale = np.trace(np.cov(x.T, bias=True)) / 6
    for k in range(3):
        on, off = x[y[:, k] == 1], x[y[:, k] == 0]
        share = len(on) / len(x)
        within = share * np.cov(on.T, bias=True) + (1 - share) * np.cov(off.T, bias=True)
        _, s = shrunk(within, len(x))
        metric = (1 - s) * within + s * scale * np.eye(6)
        w = np.linalg.solve(metric, on.mean(axis=0) - off.mean(axis=0))
        b = np.log(share / (1 - share)) - 0.5 * (on.mean(axis=0) + off.mean(axis=0)) @ w
        np.testing.assert_allclose(found.w[:, k], w, rtol=1e-6)
        assert found.b[k] == pytest.approx(b, rel=1e-6)
    assert (found.w[:, 3] == 0).all()  # never seen
    assert found.b[3] < -6
    right = ((scores_of(found, x) > 0) == y).mean(axis=0)
    assert (right > [0.75, 0.85, 0.95, 0.99]).all()


def test_a_label_that_all_rows_have_is_certain():
    x, y = np.arange(20.0)[:, None], np.ones((20, 2), np.float32)
    y[:10, 1] = 0
    found = closed_form(Moments.load(moments_of(x, y, np.full(20, 0.3), ("always", "half")).to_bytes()), "multilabel")
    assert found.w[0, 0] == 0
    assert found.b[0] > 6
    assert ((scores_of(found, x)[:, 1] > 0) == y[:, 1]).all()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_features_that_never_vary_are_borne(task, value):
    x = np.full((12, 3), value)
    y = np.arange(12) % 4 if task == "classification" else np.eye(4, dtype=np.float32)[np.arange(12) % 4]
    found = closed_form(moments_of(x, y), task)
    for part in (found.w, found.b, found.mean, found.whitening):
        assert np.isfinite(part).all()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_moments_of_nothing_or_of_no_numbers_are_refused(task, rng):
    with pytest.raises(EmptyBufferError, match="of no rows"):
        closed_form(Moments.none(LABELS, 3), task)
    some = moments_of(*gauss(rng))
    with pytest.raises(EmptyBufferError, match="of no rows"):
        closed_form(some - some, task)
    with pytest.raises(DivergedError, match="not finite"):
        closed_form(replace(some, xy=np.full_like(some.xy, np.nan)), task)


# ---- the learner


@pytest.mark.parametrize("hidden", [0, 24])
def test_only_the_last_layer_is_learned_and_the_buffer_is_not_needed(hidden):
    job, _ = example_job(hidden=hidden)
    head, _ = train_slda(job)
    without, _ = train_slda(replace(job, replay=job.replay.take(np.zeros(0, np.int64))))
    assert head.to_bytes() == without.to_bytes()
    for i in range(job.base.depth - 1):
        np.testing.assert_array_equal(head.weights[f"W{i}"], job.base.weights[f"W{i}"])


def test_a_new_label_is_learned_from_20_rows():
    for seed in range(5):
        job, judge = example_job(seed=seed)
        new = len(job.base.labels) - 1
        rows = np.flatnonzero(job.fresh.targets == new)[:20]
        few = replace(job, fresh=job.fresh.take(rows), fresh_mass=job.fresh_mass[rows])
        features = dequantize(judge.latents, job.latent)
        before, after = (head.predict(features) == judge.targets for head in (job.champion, train_slda(few)[0]))
        assert not before[judge.targets == new].any()
        assert after[judge.targets == new].mean() > 0.9
        assert after[judge.targets != new].mean() > before[judge.targets != new].mean() - 0.05
