"""Labelling functions: the vote, what happens when one fails, and the weights that known truths give."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.labelling import LabellingFunction, LabellingFunctions


def says(answer):
    return lambda _: answer


def rules(*answers, weights=None, min_share=0.5):
    weights = weights or [1.0] * len(answers)
    functions = [LabellingFunction(f"f{i}", says(a), w) for i, (a, w) in enumerate(zip(answers, weights, strict=True))]
    return LabellingFunctions(functions, min_share=min_share)


def test_the_label_with_most_weight_wins_and_says_how_much_it_had():
    vote = rules("cat", "dog", "cat", None, weights=[1.0, 1.5, 1.0, 9.0]).vote("x")
    assert vote.label == "cat"
    assert vote.confidence == pytest.approx(2 / 3.5)
    assert vote.votes == {"f0": "cat", "f1": "dog", "f2": "cat"}


@pytest.mark.parametrize(
    "answers",
    [(), (None, None), ("cat", "dog"), ("cat", "cat", "dog", "dog", "owl"), ("cat", "cat", "dog", "owl", "fox")],
    ids=["no function", "all abstain", "tie", "tie of the first two", "too small a share"],
)
def test_there_is_no_label_without_a_clear_vote(answers):
    assert rules(*answers).vote("x") is None


def test_a_smaller_share_can_be_enough_and_a_larger_one_asked_for():
    assert rules("cat", "cat", "dog", "owl", "fox", min_share=0.4).vote("x").label == "cat"
    assert rules("cat", "cat", "cat", "dog", min_share=0.75).vote("x").label == "cat"
    assert rules("cat", "cat", "cat", "dog", min_share=0.76).vote("x") is None


@given(answers=st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=9), seed=st.integers(0, 99))
def test_the_order_of_the_functions_changes_nothing(answers, seed):
    shuffled = [answers[i] for i in np.random.default_rng(seed).permutation(len(answers))]
    first, second = rules(*answers).vote("x"), rules(*shuffled).vote("x")
    assert (first and (first.label, first.confidence)) == (second and (second.label, second.confidence))


def test_a_function_that_fails_abstains_is_counted_and_logged_once_without_the_sample(caplog):
    def broken(x):
        raise ValueError(x)

    labeller = LabellingFunctions(
        [LabellingFunction("broken", broken), LabellingFunction("odd", says(3)), LabellingFunction("fine", says("cat"))]
    )
    with caplog.at_level(logging.WARNING, logger="edge_sdk.labelling"):
        votes = [labeller.vote("secret sample") for _ in range(5)]
    assert all(vote.label == "cat" and vote.confidence == 1.0 for vote in votes)
    assert labeller.failures == {"broken": 5, "odd": 5}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "broken raised ValueError" in caplog.text
    assert "odd gave a int that is no label" in caplog.text
    assert "secret" not in caplog.text


def test_an_empty_label_is_a_failure_not_a_vote():
    labeller = rules("")
    assert labeller.vote("x") is None
    assert labeller.failures == {"f0": 1}


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_finite_and_positive(weight):
    with pytest.raises(ValueError, match="weight of f"):
        LabellingFunction("f", says("cat"), weight)


def test_names_are_given_and_unique_and_the_share_is_one():
    with pytest.raises(ValueError, match="needs a name"):
        LabellingFunction("", says("cat"))
    with pytest.raises(ValueError, match="two labelling functions are called 'f'"):
        LabellingFunctions([LabellingFunction("f", says("cat")), LabellingFunction("f", says("dog"))])
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="min_share"):
            LabellingFunctions([], min_share=share)


# ---- weights from known truths


def noisy(accuracy, coverage, labels, seed):
    """A function of (number, truth) that is right with this chance, and says the same when asked again."""

    def function(sample):
        number, truth = sample
        rng = np.random.default_rng([seed, number])
        if rng.random() > coverage:
            return None
        return truth if rng.random() < accuracy else str(rng.choice([label for label in labels if label != truth]))

    return function


def test_weights_are_the_log_odds_of_accuracy_above_chance():
    truths = ["a", "b"] * 50
    right = LabellingFunction("right", lambda x: x[1] if x[0] < 75 else "ab"[x[1] == "a"])
    weighted = LabellingFunctions([right]).weighted([*enumerate(truths)], truths)
    accuracy = (75 + 1) / (100 + 2)
    assert weighted.functions[0].weight == pytest.approx(math.log(accuracy / (1 - accuracy)))
    assert weighted.functions[0].function is right.function


def test_functions_no_better_than_chance_or_that_never_vote_are_left_out():
    labels = "abcd"
    truths = list(np.random.default_rng(0).choice(list(labels), 400))
    labeller = LabellingFunctions(
        [
            LabellingFunction("good", noisy(0.8, 0.5, labels, 1)),
            LabellingFunction("fair", noisy(0.5, 0.5, labels, 2)),
            LabellingFunction("bad", noisy(0.1, 1.0, labels, 3)),
            LabellingFunction("silent", says(None)),
        ],
        min_share=0.4,
    )
    weighted = labeller.weighted([*enumerate(truths)], truths)
    assert [rule.name for rule in weighted.functions] == ["good", "fair"]
    good, fair = (rule.weight for rule in weighted.functions)
    assert good == pytest.approx(math.log(0.8 / 0.2) + math.log(3), abs=0.5)
    assert fair == pytest.approx(math.log(3), abs=0.4)
    assert weighted.min_share == 0.4


def test_a_weighted_vote_is_right_more_often_than_an_even_one():
    labels, rng = "abc", np.random.default_rng(5)
    truths = [str(label) for label in rng.choice(list(labels), 800)]
    samples = [*enumerate(truths)]
    labeller = LabellingFunctions(
        [LabellingFunction(f"f{i}", noisy(p, 0.9, labels, i)) for i, p in enumerate((0.9, 0.45, 0.45, 0.4, 0.4))],
        min_share=0.0,
    )
    weighted = labeller.weighted(samples[:300], truths[:300])

    def accuracy(rules):
        votes = [rules.vote(sample) for sample in samples[300:]]
        return np.mean([vote is not None and vote.label == t for vote, t in zip(votes, truths[300:], strict=True)])

    assert accuracy(weighted) > accuracy(labeller) + 0.1


@pytest.mark.parametrize(("samples", "truths"), [([1, 2], ["a"]), ([], []), ([1, 2], ["a", "a"])])
def test_weights_need_a_truth_for_each_sample_and_two_labels(samples, truths):
    with pytest.raises(ValueError, match="one truth for each sample and two labels"):
        rules("a").weighted(samples, truths)
