"""Elastic weight consolidation, with a test for each mistake known from other implementations of it."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import EmptyBufferError, IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, layer_inputs, softmax
from edge_sdk.learn.ewc import (
    Importance,
    backward,
    consolidate,
    fisher_diagonal,
    grown_like,
    penalty,
    proximal_step,
)


def flatten(weights):
    """All weights in one vector, by name."""
    return np.concatenate([weights[key].ravel() for key in sorted(weights)])


def make_head(rng, *widths):
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(size=(inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=outputs).astype(np.float32)
    return Head(weights, tuple(str(i) for i in range(widths[-1])))


@pytest.fixture(params=[(5, 3), (5, 6, 4)], ids=["linear", "one hidden layer"])
def head(request, rng):
    return make_head(rng, *request.param)


@pytest.fixture
def features(rng):
    return rng.normal(size=(40, 5)).astype(np.float32)


def log_likelihood(head, x, label):
    logits = head.logits(x[None].astype(np.float64))[0]
    return logits[label] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def moved(weights, rng, size=0.1):
    return {key: value + rng.normal(scale=size, size=value.shape).astype(np.float32) for key, value in weights.items()}


def test_penalty_is_zero_at_the_anchor_and_positive_off_it(head, features, rng):
    fisher = fisher_diagonal(head, features)
    assert penalty(head.weights, head.weights, fisher, ewc_lambda=1e6) == 0.0
    for key in head.weights:
        off = {**head.weights, key: head.weights[key] + np.float32(0.01)}
        assert penalty(off, head.weights, fisher, ewc_lambda=1.0) > 0


def test_penalty_is_the_formula(head, features, rng):
    fisher = fisher_diagonal(head, features)
    weights = moved(head.weights, rng)
    expected = 0.5 * 7 * (flatten(fisher) * (flatten(weights) - flatten(head.weights)) ** 2).sum()
    assert penalty(weights, head.weights, fisher, ewc_lambda=7.0) == pytest.approx(expected, rel=1e-5)
    assert penalty(weights, head.weights, fisher, ewc_lambda=0.0) == 0.0


def test_fisher_equals_the_analytic_value_for_a_logistic_head(rng):
    """For softmax regression F[W_jk] = E[x_j**2 p_k (1 - p_k)] and F[b_k] = E[p_k (1 - p_k)]."""
    head = make_head(rng, 4, 3)
    x = rng.normal(size=(100, 4)).astype(np.float32)
    p = softmax(head.logits(x)).astype(np.float64)
    fisher = fisher_diagonal(head, x)
    np.testing.assert_allclose(fisher["W0"], (x.astype(float) ** 2).T @ (p * (1 - p)) / 100, rtol=1e-4)
    np.testing.assert_allclose(fisher["b0"], (p * (1 - p)).mean(axis=0), rtol=1e-4)


def test_fisher_pass_changes_nothing(head, features):
    weights = {key: value.copy() for key, value in head.weights.items()}
    seen = features.copy()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    fisher = fisher_diagonal(head, features)
    for key, value in weights.items():
        np.testing.assert_array_equal(head.weights[key], value)
        assert not np.shares_memory(fisher[key], head.weights[key])
    np.testing.assert_array_equal(features, seen)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_gradients_are_squared_per_sample_not_after_averaging(head, features):
    """Against a loop over samples and labels that differentiates the log-likelihood numerically."""
    features = features[:8]
    step = 1e-5
    expected = {key: np.zeros(value.shape) for key, value in head.weights.items()}
    for x in features:
        probabilities = softmax(head.logits(x[None]))[0]
        for label, probability in enumerate(probabilities):
            for key, value in head.weights.items():
                for index in np.ndindex(value.shape):
                    sides = []
                    for sign in (1, -1):
                        nudged = {name: array.astype(np.float64) for name, array in head.weights.items()}
                        nudged[key][index] += sign * step
                        sides.append(log_likelihood(Head(nudged, head.labels), x, label))
                    slope = (sides[0] - sides[1]) / (2 * step)
                    expected[key][index] += probability * slope**2 / len(features)
    fisher = fisher_diagonal(head, features)
    for key, value in expected.items():
        np.testing.assert_allclose(fisher[key], value, rtol=2e-3, atol=1e-6)


def test_fisher_is_the_mean_over_samples_and_does_not_depend_on_their_order(head, features, rng):
    whole = fisher_diagonal(head, features)
    shuffled = fisher_diagonal(head, rng.permutation(features))
    each = [fisher_diagonal(head, row[None]) for row in features]
    for key, value in whole.items():
        assert value.shape == head.weights[key].shape
        assert value.dtype == np.float32
        assert (value >= 0).all()
        np.testing.assert_allclose(shuffled[key], value, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(np.mean([one[key] for one in each], axis=0), value, rtol=1e-4, atol=1e-8)


def test_fisher_of_no_samples_is_refused(head):
    with pytest.raises(EmptyBufferError, match="at least one sample"):
        fisher_diagonal(head, np.zeros((0, 5), np.float32))


def test_backward_gives_the_gradient_of_the_loss(head, features):
    targets = np.arange(len(features)) % len(head.labels)
    delta = softmax(head.logits(features))
    delta[np.arange(len(features)), targets] -= 1
    step = 1e-5
    pairs = backward(head.weights, layer_inputs(head.weights, features), delta)
    for i, (inputs, gradient) in enumerate(pairs):
        for index in [(0, 0), (2, 1)]:
            sides = []
            for sign in (1, -1):
                nudged = {name: array.astype(np.float64) for name, array in head.weights.items()}
                nudged[f"W{i}"][index] += sign * step
                other = Head(nudged, head.labels)
                sides.append(-sum(log_likelihood(other, x, y) for x, y in zip(features, targets, strict=True)))
            slope = (sides[0] - sides[1]) / (2 * step)
            assert (inputs.T @ gradient)[index] == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("ewc_lambda", [0, 1, 1e2, 1e4, 1e6])
def test_proximal_step_never_diverges(head, features, rng, ewc_lambda):
    fisher = fisher_diagonal(head, features)
    start = weights = moved(head.weights, rng, size=1.0)
    distance = np.abs(flatten(start) - flatten(head.weights))
    for _ in range(100):
        weights = proximal_step(weights, head.weights, fisher, strength=0.1 * ewc_lambda)
        now = np.abs(flatten(weights) - flatten(head.weights))
        assert (now <= distance + 1e-5).all()
        distance = now
    assert np.isfinite(flatten(weights)).all()
    if ewc_lambda == 0:
        np.testing.assert_array_equal(flatten(weights), flatten(start))
    for value in weights.values():
        assert value.dtype == np.float32


def test_proximal_step_of_huge_strength_lands_on_the_anchor_where_weights_matter(head, rng):
    fisher = {key: np.ones_like(value) for key, value in head.weights.items()}
    fisher["b0"] = np.zeros_like(fisher["b0"])
    start = moved(head.weights, rng, size=1.0)
    weights = proximal_step(start, head.weights, fisher, strength=1e9)
    np.testing.assert_allclose(weights["W0"], head.weights["W0"], atol=1e-5)
    np.testing.assert_array_equal(weights["b0"], start["b0"])


@pytest.mark.parametrize("strength", [1e30, 1e300, np.inf])
def test_a_strength_beyond_single_precision_is_still_a_step_to_the_anchor(head, rng, strength):
    fisher = {key: np.full_like(value, 1e20) for key, value in head.weights.items()}
    fisher["b0"] = np.zeros_like(fisher["b0"])
    start = moved(head.weights, rng, size=1.0)
    weights = proximal_step(start, head.weights, fisher, strength=strength)
    np.testing.assert_allclose(weights["W0"], head.weights["W0"], atol=1e-5)
    np.testing.assert_array_equal(weights["b0"], start["b0"])


@given(value=st.floats(-10, 10), anchor=st.floats(-10, 10), importance=st.floats(0, 100), strength=st.floats(0, 1e4))
def test_proximal_step_solves_its_problem(value, anchor, importance, strength):
    """At the solution w the gradient (w - v) + strength F (w - anchor) is zero, up to float32."""

    def weights(number):
        return {"W0": np.array([[number]], np.float32)}

    w = float(proximal_step(weights(value), weights(anchor), weights(importance), strength=strength)["W0"][0, 0])
    pull = strength * importance
    assert (w - value) + pull * (w - anchor) == pytest.approx(0, abs=1e-4 * (1 + pull))


def test_proximal_step_leaves_its_arguments_alone(head, features, rng):
    fisher = fisher_diagonal(head, features)
    weights = moved(head.weights, rng)
    before = flatten(weights), flatten(head.weights), flatten(fisher)
    proximal_step(weights, head.weights, fisher, strength=3.0)
    for array, after in zip(before, (weights, head.weights, fisher), strict=True):
        np.testing.assert_array_equal(array, flatten(after))


def test_grown_like_pads_with_zeros(head, features):
    fisher = fisher_diagonal(head, features)
    grown = head.grown([*head.labels, "new 1", "new 2"])
    padded = grown_like(fisher, grown.weights)
    for key, value in padded.items():
        assert value.shape == grown.weights[key].shape
        assert value.dtype == np.float32
        old = tuple(slice(0, size) for size in fisher[key].shape)
        np.testing.assert_array_equal(value[old], fisher[key])
        assert value.sum() == pytest.approx(fisher[key].sum())


def test_new_outputs_are_free_to_move(head, features, rng):
    grown = head.grown([*head.labels, "new"])
    fisher = grown_like(fisher_diagonal(head, features), grown.weights)
    weights = moved(grown.weights, rng)
    after = proximal_step(weights, grown.weights, fisher, strength=1e6)
    last = f"W{head.depth - 1}"
    np.testing.assert_array_equal(after[last][:, -1], weights[last][:, -1])


# ---- after an experience has been learned


def importance_of(seed, widths=(3, 4, 2), *, sparse=False):
    rng = np.random.default_rng(seed)
    weights = make_head(rng, *widths).weights
    fisher = {key: rng.exponential(size=value.shape).astype(np.float32) for key, value in weights.items()}
    if sparse:
        fisher = {key: value * (rng.random(value.shape) < 0.5) for key, value in fisher.items()}
    return Importance(weights, fisher)


def exact(weights, importance):
    # in double precision: the constant would drown the difference
    return penalty(
        {key: value.astype(np.float64) for key, value in weights.items()},
        {key: value.astype(np.float64) for key, value in importance.anchor.items()},
        {key: value.astype(np.float64) for key, value in importance.fisher.items()},
        ewc_lambda=3.0,
    )


@given(seed=st.integers(0, 2**32), experiences=st.integers(1, 4))
def test_offline_consolidation_equals_the_sum_of_the_separate_penalties_up_to_a_constant(seed, experiences):
    parts = [importance_of(seed + i, sparse=True) for i in range(experiences + 1)]
    known = parts[0]
    for part in parts[1:]:
        known = consolidate(known, part.anchor, part.fisher, mode="offline", decay=0.5)
    rng = np.random.default_rng(seed)
    gaps = []
    for _ in range(4):
        weights = moved(parts[0].anchor, rng, size=2.0)
        gaps.append(sum(exact(weights, part) for part in parts) - exact(weights, known))
    assert np.ptp(gaps) < 1e-4 * (1 + max(gaps))
    assert min(gaps) > -1e-4  # the constant: how far the anchors are apart


def test_what_no_experience_depends_on_is_anchored_where_it_was_last():
    known, new = importance_of(1), importance_of(2)
    nothing = {key: np.zeros_like(value) for key, value in known.fisher.items()}
    merged = consolidate(Importance(known.anchor, nothing), new.anchor, nothing, mode="offline", decay=1.0)
    for key, value in new.anchor.items():
        np.testing.assert_array_equal(merged.anchor[key], value)
    tiny = {key: np.full_like(value, 1e-38) for key, value in known.fisher.items()}
    merged = consolidate(Importance(known.anchor, tiny), new.anchor, tiny, mode="offline", decay=1.0)
    for key, value in new.anchor.items():
        np.testing.assert_allclose(merged.anchor[key], (value + known.anchor[key]) / 2, rtol=1e-4, atol=1e-5)


def test_online_consolidation_with_decay_1_sums_the_fisher_information_around_the_latest_weights():
    known, new, last = importance_of(1), importance_of(2), importance_of(3)
    for part in (new, last):
        known = consolidate(known, part.anchor, part.fisher, mode="online", decay=1.0)
    for key, value in last.fisher.items():
        np.testing.assert_allclose(known.fisher[key], importance_of(1).fisher[key] + new.fisher[key] + value, rtol=1e-6)
        np.testing.assert_array_equal(known.anchor[key], last.anchor[key])


def test_older_fisher_information_fades_online():
    known, new = importance_of(1), importance_of(2)
    found = consolidate(known, new.anchor, new.fisher, mode="online", decay=0.25)
    for key, value in found.fisher.items():
        np.testing.assert_allclose(value, 0.25 * known.fisher[key] + new.fisher[key], rtol=1e-6)


@pytest.mark.parametrize("mode", ["checkpoint", "offline", "online"])
def test_consolidation_grows_with_the_head_and_changes_no_argument(mode):
    known, new = importance_of(1), importance_of(2, widths=(3, 4, 5))
    before = flatten(known.anchor), flatten(known.fisher), flatten(new.anchor), flatten(new.fisher)
    found = consolidate(known, new.anchor, new.fisher, mode=mode, decay=0.5)
    after = flatten(known.anchor), flatten(known.fisher), flatten(new.anchor), flatten(new.fisher)
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)
    for part in (found.anchor, found.fisher):
        assert {key: (v.shape, v.dtype) for key, v in part.items()} == {
            key: (v.shape, v.dtype) for key, v in new.anchor.items()
        }
    grown = found.fisher["W1"][:, 2:]
    np.testing.assert_array_equal(grown, 0 if mode == "checkpoint" else new.fisher["W1"][:, 2:])
    if mode == "checkpoint":
        np.testing.assert_array_equal(found.anchor["W0"], known.anchor["W0"])


def test_importance_survives_saving(tmp_path):
    importance = importance_of(1)
    path = tmp_path / "importance.npz"
    path.write_bytes(importance.to_bytes())
    for source in (path, path.read_bytes()):
        loaded = Importance.load(source)
        for name in ("anchor", "fisher"):
            for key, value in getattr(importance, name).items():
                np.testing.assert_array_equal(getattr(loaded, name)[key], value, strict=True)
        assert loaded.to_bytes() == importance.to_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays.pop("anchor.W0"),
        lambda arrays: arrays.update({"W0": arrays["anchor.W0"]}),
        lambda arrays: arrays.update({"fisher.W0": arrays["fisher.W0"][:-1]}),
        lambda arrays: arrays.update({"fisher.W0": -arrays["fisher.W0"]}),
        lambda arrays: arrays.update({"anchor.b0": arrays["anchor.b0"] * np.nan}),
        lambda arrays: arrays.update({"anchor.b0": np.array(["a", "b", "c", "d"])}),
    ],
)
def test_damaged_importance_is_refused(damage):
    arrays = load_npz(importance_of(1).to_bytes())
    damage(arrays)
    with pytest.raises(IntegrityError):
        Importance.load(npz_bytes(arrays))


# ---- other tasks than classification


def slopes(head, x, output, step=1e-5):
    """Numerical gradient of one logit of one sample by every weight."""
    found = {key: np.zeros(value.shape) for key, value in head.weights.items()}
    for key, value in head.weights.items():
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                nudged = {name: array.astype(np.float64) for name, array in head.weights.items()}
                nudged[key][index] += sign * step
                sides.append(Head(nudged, head.labels).logits(x[None].astype(np.float64))[0, output])
            found[key][index] = (sides[0] - sides[1]) / (2 * step)
    return found


def probability(logit, label_applies):
    return 1 / (1 + np.exp(-logit if label_applies else logit))


def test_multi_label_fisher_is_the_expected_square_of_each_samples_gradient(head, features):
    """Over all combinations of labels that the model thinks possible, each with its probability."""
    features, count = features[:4], len(head.labels)
    expected = {key: np.zeros(value.shape) for key, value in head.weights.items()}
    for x in features:
        logits = head.logits(x[None].astype(np.float64))[0]
        by_output = [slopes(head, x, k) for k in range(count)]
        for applied in product((0, 1), repeat=count):
            chance = np.prod([probability(logit, y) for logit, y in zip(logits, applied, strict=True)])
            for key in expected:
                # d log p(y) / d logit = y - p
                gradient = sum((y - probability(logits[k], 1)) * by_output[k][key] for k, y in enumerate(applied))
                expected[key] += chance * gradient**2 / len(features)
    fisher = fisher_diagonal(head, features, task="multilabel")
    for key, value in expected.items():
        np.testing.assert_allclose(fisher[key], value, rtol=2e-3, atol=1e-6)


def test_regression_fisher_is_the_expected_square_of_each_samples_gradient(head, features):
    """With unit variance, d log p(y) / d value = y - value, whose square is 1 in the mean, each output on its own."""
    features = features[:4]
    expected = {key: np.zeros(value.shape) for key, value in head.weights.items()}
    for x in features:
        for k in range(len(head.labels)):
            for key, slope in slopes(head, x, k).items():
                expected[key] += slope**2 / len(features)
    fisher = fisher_diagonal(head, features, task="regression")
    for key, value in expected.items():
        np.testing.assert_allclose(fisher[key], value, rtol=2e-3, atol=1e-6)


def test_fisher_of_linear_heads_is_the_formula(rng):
    head = make_head(rng, 4, 3)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    p = 1 / (1 + np.exp(-head.logits(x).astype(np.float64)))
    tossed = fisher_diagonal(head, x, task="multilabel")
    np.testing.assert_allclose(tossed["W0"], (x.astype(float) ** 2).T @ (p * (1 - p)) / 50, rtol=1e-4)
    np.testing.assert_allclose(tossed["b0"], (p * (1 - p)).mean(axis=0), rtol=1e-4)
    gauss = fisher_diagonal(head, x, task="regression")
    np.testing.assert_allclose(gauss["W0"], np.repeat((x**2).mean(axis=0)[:, None], 3, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(gauss["b0"], [1, 1, 1])


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_fisher_is_finite_where_the_model_is_certain(head, features, task):
    certain = Head({key: value * 1000 for key, value in head.weights.items()}, head.labels)
    for value in fisher_diagonal(certain, features, task=task).values():
        assert np.isfinite(value).all()
        assert (value >= 0).all()
