"""Which labels are asked for: the choice of rows, and the budget of requests."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.ask import LabelRequest, Request, Requests, choose_requests, uncertainty
from edge_sdk.config import FeedbackConfig
from edge_sdk.head import softmax

DAY = 86_400.0


def choose(latents, known, count, *, task="regression", probabilities=None, times=None, ids=None):
    latents = np.asarray(latents, dtype=np.uint8)
    n = len(latents)
    return choose_requests(
        latents,
        np.zeros((n, 0), np.float32) if probabilities is None else np.asarray(probabilities, dtype=np.float32),
        [f"{i:04}" for i in range(n)] if ids is None else ids,
        np.zeros(n) if times is None else np.asarray(times, dtype=np.float64),
        np.asarray(known, dtype=np.uint8).reshape(-1, latents.shape[1]),
        task=task,
        count=count,
    )


# ---- uncertainty


def test_uncertainty_is_entropy_by_that_of_a_guess():
    p = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]], dtype=np.float32)
    assert uncertainty(p, "classification") == pytest.approx([0, 1, np.log(2) / np.log(3)], abs=1e-6)
    assert uncertainty(p[:, :1], "classification").max() <= 1


def test_uncertainty_of_many_labels_is_that_of_the_least_certain():
    p = np.array([[0, 1, 0], [0.01, 0.5, 0.99], [0.9, 0.9, 0.9]], dtype=np.float32)
    assert uncertainty(p, "multilabel") == pytest.approx([0, 1, 0.469], abs=1e-3)


def test_without_probabilities_nothing_is_certain():
    assert uncertainty(np.zeros((3, 0), np.float32), "regression").tolist() == [1, 1, 1]


# ---- the choice


def test_the_uncertain_row_is_chosen_among_equals_and_the_far_one_among_the_uncertain():
    latents = [[10, 0], [0, 10], [14, 14]]
    sure, unsure = [0.99, 0.01], [0.5, 0.5]
    assert choose(latents[:2], [[0, 0]], 1, task="classification", probabilities=[sure, unsure]) == [1]
    assert choose(latents[:2], [[0, 0]], 1, task="multilabel", probabilities=[[0.5, 0.5], [0.0, 1.0]]) == [0]
    assert choose(latents, [[0, 0]], 1, task="classification", probabilities=[unsure] * 3) == [2]


def test_rows_that_are_known_or_chosen_already_are_not_asked_for():
    latents = [[0, 0], [90, 0], [90, 0], [0, 90]]
    assert sorted(choose(latents, [[0, 0]], 4)) in ([1, 3], [2, 3])
    assert choose(latents, latents, 4) == []


def test_choosing_nothing_and_from_nothing():
    assert choose([[0, 0]], [], 0) == []
    assert choose(np.zeros((0, 2)), [], 5) == []
    assert choose([[7, 7]], [], 5) == [0]


def test_an_outlier_is_asked_for_after_the_clusters(rng):
    latents = np.concatenate([rng.normal(c, 4, (40, 2)) for c in ((60, 60), (60, 200), (200, 60))] + [[[255, 255]]])
    chosen = choose(latents.clip(0, 255), rng.normal(60, 4, (20, 2)), 3)
    assert 120 not in chosen[:2]
    assert {row // 40 for row in chosen[:2]} == {1, 2}


@given(
    n=st.integers(1, 40), known=st.integers(0, 10), count=st.integers(0, 50), seed=st.integers(0, 9_999),
    task=st.sampled_from(["classification", "multilabel", "regression"]),
)  # fmt: skip
def test_the_choice_is_distinct_bounded_and_independent_of_the_order_of_rows(n, known, count, seed, task):
    rng = np.random.default_rng(seed)
    latents, times = rng.integers(0, 4, (n, 3)), rng.integers(0, 3, n)
    probabilities, ids = rng.dirichlet(np.ones(4), n), [f"{i:04}" for i in range(n)]
    known_latents = rng.integers(0, 4, (known, 3))
    chosen = choose(latents, known_latents, count, task=task, probabilities=probabilities, times=times)
    assert len(chosen) == len(set(chosen)) <= min(count, n)
    assert len(np.unique(latents[chosen], axis=0)) == len(chosen)
    order = rng.permutation(n)
    again = choose(
        latents[order], known_latents, count, task=task, probabilities=probabilities[order], times=times[order],
        ids=[ids[i] for i in order],
    )  # fmt: skip
    assert [order[i] for i in again] == chosen


def test_of_too_many_rows_the_newest_are_candidates(rng):
    latents = rng.integers(0, 256, (5_000, 8))
    times = rng.permutation(5_000)
    chosen = choose(latents, latents[:3_000], 50, times=times)
    assert len(chosen) == 50
    assert times[chosen].min() >= 3_000


def clusters(rng):
    """Known rows of four clusters; a stream with a rare fifth, a new and rare sixth, and outliers; even test rows."""
    means = rng.normal(size=(6, 48)) * 6 / np.sqrt(96)

    def draw(n, p):
        y = rng.choice(6, n, p=p)
        return means[y] + rng.normal(size=(n, 48)), y

    known, stream, test = (
        draw(n, p)
        for n, p in (
            (60, [0.35, 0.3, 0.2, 0.15, 0, 0]),
            (1_000, [0.33, 0.3, 0.2, 0.12, 0.03, 0.02]),
            (600, [1 / 6] * 6),
        )
    )
    outliers = rng.random(1_000) < 0.05
    stream[0][outliers] += 2.5 * rng.normal(size=(outliers.sum(), 48))
    return [((128 + 20 * x).clip(0, 255).astype(np.uint8), y) for x, y in (known, stream, test)]


def class_means(latents, labels):
    return np.stack([latents[labels == c].mean(axis=0) if (labels == c).any() else np.full(48, 1e4) for c in range(6)])


def scores(latents, means):
    return -((latents.astype(np.float64)[:, None] - means) ** 2).sum(axis=2) / (2 * 20**2)


def balanced_accuracy(rows, known, stream, test):
    means = class_means(*(np.concatenate([a, b[rows]]) for a, b in zip(known, stream, strict=True)))
    right = scores(test[0], means).argmax(axis=1) == test[1]
    return np.mean([right[test[1] == c].mean() for c in range(6)])


@pytest.mark.parametrize(("task", "gain"), [("classification", 0.12), ("regression", 0.08)])
def test_forty_chosen_rows_teach_more_than_forty_at_random(task, gain):
    """Nearest class mean on what was known and what was asked for. Regression: without probabilities to go by."""
    chosen, drawn = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        known, stream, test = clusters(rng)
        probabilities = softmax(scores(stream[0], class_means(*known))[:, :4].astype(np.float32))
        rows = choose(stream[0], known[0], 40, task=task, probabilities=probabilities, times=np.arange(1_000))
        chosen.append(balanced_accuracy(rows, known, stream, test))
        drawn.append(balanced_accuracy(rng.permutation(1_000)[:40], known, stream, test))
    assert np.mean(chosen) > np.mean(drawn) + gain


# ---- the budget


def config(per_day=3, ttl_s=DAY):
    return FeedbackConfig(requests_per_day=per_day, request_ttl_s=ttl_s)


def test_requests_wait_until_they_are_answered_or_expire():
    requests = Requests().ask(["a", "b", "c"], 100.0, config())
    assert requests.open(100.0, config()) == [Request(name, 100.0) for name in "abc"]
    requests = requests.answered(["b", "never asked"])
    assert [each.id for each in requests.open(200.0, config())] == ["a", "c"]
    requests, expired = requests.expire(99.0 + DAY, config())
    assert expired == []
    assert requests.open(100.0 + DAY, config()) == []
    requests, expired = requests.expire(100.0 + DAY, config())
    assert expired == ["a", "c"]
    assert requests.expire(101.0 + DAY, config()) == (Requests(), [])


def test_what_was_answered_or_has_expired_counts_for_the_rest_of_its_day():
    short = config(per_day=2, ttl_s=10.0)
    requests = Requests().ask(["a", "b"], 0.0, short).answered(["a"])
    requests, expired = requests.expire(10.0, short)
    assert expired == ["b"]
    assert requests.left(DAY, short) == 0
    assert requests.left(DAY + 1, short) == 2
    assert requests.expire(DAY + 1, short)[0] == Requests()


def test_a_request_that_outlives_its_day_waits_on_and_costs_no_more():
    patient = config(per_day=2, ttl_s=3 * DAY)
    requests, _ = Requests().ask(["a", "b"], 0.0, patient).expire(2 * DAY, patient)
    assert len(requests.open(2 * DAY, patient)) == 2
    assert requests.left(2 * DAY, patient) == 2


def test_what_waits_is_not_asked_for_twice_and_too_much_is_refused():
    requests = Requests().ask(["a", "b"], 0.0, config())
    assert requests.ask(["a", "a", "b"], 1.0, config()) == requests
    assert requests.ask(["a", "c", "c"], 1.0, config()).left(1.0, config()) == 0
    with pytest.raises(ValueError, match="2 labels are more than the 1"):
        requests.ask(["c", "d"], 1.0, config())
    with pytest.raises(ValueError, match="more than the 0"):
        Requests().ask(["a"], 0.0, config(per_day=0))


def test_the_state_is_bounded_whatever_the_budget():
    endless = config(per_day=1_000_000, ttl_s=1e9)
    requests = Requests().ask([str(i) for i in range(1_000)], 0.0, endless)
    assert requests.left(0.0, endless) == 0
    assert requests.left(10 * DAY, endless) == 0
    assert requests.answered(["7"]).expire(10 * DAY, endless)[0].left(10 * DAY, endless) == 1


@given(
    steps=st.lists(st.tuples(st.integers(-50_000, 90_000), st.integers(0, 4)), max_size=40),
    per_day=st.integers(0, 6),
    ttl_s=st.integers(1, 200_000),
)
def test_no_24_hours_see_more_than_the_budget_and_a_clock_set_back_delays_by_a_day_at_most(steps, per_day, ttl_s):
    """Steps of the clock, forwards and back, and how many are wanted. The true time does not go back."""
    settings, requests, now, true, times, number = config(per_day, ttl_s), Requests(), 0.0, 0.0, [], 0
    for step, wanted in steps:
        now, true = now + step, true + max(0, step)
        requests, expired = requests.expire(now, settings)
        assert not {*expired} & {each.id for each in requests.open(now, settings)}
        count = min(wanted, requests.left(now, settings))
        requests = requests.ask([f"{number + i}" for i in range(count)], now, settings)
        number += count
        times += [true] * count
    assert all(late - early > DAY for early, late in zip(times, times[per_day:], strict=False))
    assert requests.expire(now, settings)[0].left(now + DAY + 1, settings) == per_day


def test_requests_survive_a_restart_and_label_requests_can_be_sent():
    requests = Requests().ask(["a", "b"], 0.0, config()).answered(["a"])
    assert msgspec.json.decode(msgspec.json.encode(requests), type=Requests) == requests
    request = LabelRequest("a", "cat", 0.5, 10.0)
    assert msgspec.json.decode(msgspec.json.encode(request), type=LabelRequest) == request
