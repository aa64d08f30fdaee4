"""Carrying a personal head over to a new base."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.config import DeviceConfig
from edge_sdk.head import Head
from edge_sdk.learn.ewc import Importance
from edge_sdk.rebase import Right, choose_head, choose_version, with_importance_of, with_labels_of


def make_head(labels, *, seed=0, hidden=(), dim=6):
    rng = np.random.default_rng(seed)
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise((dim, *hidden, len(labels)))):
        weights[f"W{i}"] = rng.normal(size=(inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=outputs).astype(np.float32)
    return Head(weights, tuple(labels))


def scores(head, features):
    """Logits by label."""
    return dict(zip(head.labels, head.logits(features).T, strict=True))


@pytest.fixture
def features(rng):
    return rng.normal(size=(50, 6)).astype(np.float32)


def named(head, features):
    return [head.labels[i] for i in head.predict(features)]


def right_on(features, truths):
    """Whether a head is right on each row."""
    return lambda head: np.array([a == b for a, b in zip(named(head, features), truths, strict=True)], dtype=np.bool_)


def test_without_judge_rows_the_personal_head_is_kept():
    shipped, personal = make_head("abc", seed=1), make_head("abc", seed=2)
    rebase = choose_head(shipped, personal, right_on(np.zeros((0, 6), np.float32), []))
    assert rebase.head.to_bytes() == personal.to_bytes()
    assert rebase.reason == "kept: there are no judge rows to compare on"


def test_the_better_head_on_the_judge_rows_is_taken_with_the_numbers_told(features):
    shipped, personal = make_head("abc", seed=1), make_head("abc", seed=2)
    kept = choose_head(shipped, personal, right_on(features, named(personal, features)))
    assert kept.head.to_bytes() == personal.to_bytes()
    assert kept.reason.startswith("kept: personal head 1.000, shipped head 0.")
    assert kept.reason.endswith(" on 50 rows")
    dropped = choose_head(shipped, personal, right_on(features, named(shipped, features)))
    assert dropped.head is None
    assert dropped.reason.startswith("dropped: personal head 0.")


def test_a_tie_keeps_what_was_learned(features):
    personal = make_head("abc", seed=2)
    assert choose_head(make_head("abc", seed=2), personal, right_on(features, ["c"] * 50)).head is not None


def test_labels_that_a_head_does_not_know_count_against_it(features):
    shipped, personal = make_head("ab", seed=1), make_head("abn", seed=2)
    rebase = choose_head(shipped, personal, right_on(features, ["n"] * 50))
    assert rebase.head is not None
    assert "shipped head 0.000" in rebase.reason


@pytest.mark.parametrize("hidden", [(), (5,)], ids=["linear", "one hidden layer"])
def test_the_carried_head_gives_what_it_knew_the_same_scores_in_the_new_order(features, hidden):
    shipped, personal = make_head("cdab", seed=1, hidden=hidden), make_head("abcn", seed=2, hidden=hidden)
    carried = with_labels_of(personal, shipped)
    assert carried.labels == ("c", "d", "a", "b", "n")
    before, after = scores(personal, features), scores(carried, features)
    for label in personal.labels:
        np.testing.assert_allclose(after[label], before[label], rtol=1e-5, atol=1e-5)


def test_a_label_that_only_the_base_knows_is_taken_from_it_if_both_are_linear(features):
    shipped, personal = make_head("abcd", seed=1), make_head("abn", seed=2)
    carried = scores(with_labels_of(personal, shipped), features)
    for label in "cd":
        np.testing.assert_allclose(carried[label], scores(shipped, features)[label], rtol=1e-5, atol=1e-5)


def test_with_hidden_layers_a_label_that_only_the_base_knows_starts_unlikely(features):
    shipped, personal = make_head("abc", seed=1, hidden=(5,)), make_head("ab", seed=2, hidden=(5,))
    carried = with_labels_of(personal, shipped)
    assert carried.labels == ("a", "b", "c")
    assert (carried.weights["W1"][:, 2] == 0).all()
    assert carried.weights["b1"][2] < personal.weights["b1"].min()


def test_heads_of_different_depth_can_be_rebased(features):
    shipped, personal = make_head("abc", seed=1, hidden=(9,)), make_head("ab", seed=2)
    carried = with_labels_of(personal, shipped)
    assert carried.labels == ("a", "b", "c")
    assert carried.depth == 1
    assert set(named(carried, features)) <= {"a", "b", "c"}


@settings(deadline=None)
@given(
    shipped=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6, unique=True),
    personal=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6, unique=True),
)
def test_the_carried_head_knows_every_label_once_those_of_the_base_first(shipped, personal):
    base, own = make_head(shipped, seed=1), make_head(personal, seed=2)
    before = base.to_bytes(), own.to_bytes()
    carried = with_labels_of(own, base)
    assert carried.labels[: len(shipped)] == tuple(shipped)
    assert sorted(carried.labels) == sorted({*shipped, *personal})
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    for label, values in scores(own, x).items():
        np.testing.assert_allclose(scores(carried, x)[label], values, rtol=1e-5, atol=1e-5)
    assert (base.to_bytes(), own.to_bytes()) == before


# ---- another trunk


def rights(old, shipped, personal, *, factory=(1.0, 1.0), rows=100):
    def right(share, count=rows):
        return np.arange(count) < round(share * count)

    return Right(right(old), right(1.0), right(shipped), right(personal), right(factory[0]), right(factory[1]))


@pytest.mark.parametrize(
    ("right", "outcome", "reason"),
    [
        (rights(0.9, 0.6, 0.88), "personal", "kept: head trained here 0.880, shipped head 0.600 on 100 rows"),
        (rights(0.9, 0.9, 0.88), "shipped", "dropped: head trained here 0.880"),
        (rights(0.9, 0.6, 0.88, factory=(0.9, 0.8)), "personal", "kept"),
        (rights(0.9, 0.8, 0.88, factory=(0.9, 0.8)), "shipped", "dropped: it forgets 0.100 of accuracy on factory"),
        (rights(0.9, 0.3, 0.4), "stay", "both heads do worse than the release in use: at best 0.400, before 0.900"),
        (rights(0.9, 0.3, 0.85), "personal", "kept"),
        (rights(0.9, 0.85, 0.3), "shipped", "dropped"),
        (rights(0.9, 0.5, 0.6, rows=4), "personal", "kept"),
    ],
)
def test_of_three_versions_the_one_that_the_judge_rows_speak_for_is_chosen(right, outcome, reason):
    settled = choose_version(right, DeviceConfig())
    assert settled.outcome == outcome
    assert settled.reason.startswith(reason)


def test_only_rows_that_passed_both_trunks_keep_a_release_out():
    right = rights(0.9, 0.3, 0.4)
    none = np.zeros(100, bool)
    assert choose_version(right._replace(old=np.zeros(0, bool), exact=none), DeviceConfig()).outcome == "personal"


def test_without_judge_rows_the_base_serves_as_shipped():
    settled = choose_version(rights(0.0, 0.0, 0.0, rows=0), DeviceConfig())
    assert settled == ("shipped", "dropped: there are no judge rows to compare on")


def test_what_ewc_held_on_to_is_merged_with_what_the_new_base_came_with():
    personal, shipped = make_head("ba", seed=1), make_head("abc", seed=2)
    carried = with_labels_of(personal, shipped)
    ones = {key: np.ones_like(value) for key, value in shipped.weights.items()}
    known = Importance(personal.weights, {key: 3 * np.ones_like(value) for key, value in personal.weights.items()})
    merged = with_importance_of(known, personal, Importance(shipped.weights, ones), carried)
    np.testing.assert_allclose(merged.fisher["b0"], [4, 4, 1])
    expected = 0.25 * shipped.weights["W0"][:, :2] + 0.75 * personal.weights["W0"][:, ::-1]
    np.testing.assert_allclose(merged.anchor["W0"][:, :2], expected, rtol=1e-5)
    np.testing.assert_allclose(merged.anchor["W0"][:, 2], shipped.weights["W0"][:, 2], rtol=1e-5)
