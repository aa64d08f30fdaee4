"""Which fresh rows a learner is given: newest, trusted, or a part that stands for all."""

import numpy as np
import pytest

from edge_sdk.config import LearnConfig
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob, Rows
from edge_sdk.learn.moments import Moments
from edge_sdk.learn.prepare import prepare
from edge_sdk.manifest import LatentSpec

SPEC = LatentSpec(dim=4, scale=0.02, zero_point=128)
TASKS = ["classification", "multilabel", "regression"]


def rows(count, task="classification", *, seed=0, flip=()):
    """Rows around one of three centres; `flip`: positions whose target is another's."""
    rng = np.random.default_rng(seed)
    things = np.arange(count) % 3
    values = rng.normal(0, 0.2, (count, 4))
    values[np.arange(count), things] += 1.0
    latents = np.clip(np.round(values / SPEC.scale + SPEC.zero_point), 0, 255).astype(np.uint8)
    things = np.where(np.isin(np.arange(count), list(flip)), (things + 1) % 3, things)
    match task:
        case "classification":
            targets = things.astype(np.int64)
        case "multilabel":
            targets = np.eye(3, dtype=np.float32)[things]
        case _:
            targets = np.stack([things == i for i in range(3)], axis=1) * np.float32(2)
    return Rows(latents, targets, rng.uniform(0.5, 1, count).astype(np.float32))


def job(fresh, task="classification", **config):
    base = Head({"W0": np.eye(4, 3, dtype=np.float32), "b0": np.zeros(3, np.float32)}, ("a", "b", "c"))
    replay = rows(30, task, seed=9)
    known = Moments.of(dequantize(replay.latents, SPEC), replay.targets, replay.weights, base.labels)
    mass = np.arange(len(fresh), dtype=np.float32) + 1
    return LearnJob(
        base, base, base.weights, base.weights, fresh, replay, known, mass, SPEC, task, LearnConfig(**config), seed=0
    )


def positions(given, chosen):
    """Where the chosen rows lie in the job; latents differ."""
    place = {row.tobytes(): i for i, row in enumerate(given.fresh.latents)}
    return [place[row.tobytes()] for row in chosen.fresh.latents]


@pytest.mark.parametrize("task", TASKS)
def test_all_rows_are_learned_from_unless_something_else_is_asked_for(task):
    given = job(rows(50, task), task)
    chosen, wrong = prepare(given)
    assert wrong == []
    for part in ("latents", "targets", "weights"):
        np.testing.assert_array_equal(getattr(chosen.fresh, part), getattr(given.fresh, part))
    np.testing.assert_array_equal(chosen.fresh_mass, given.fresh_mass)


@pytest.mark.parametrize(("window_rows", "kept"), [(20, range(30, 50)), (50, range(50)), (80, range(50))])
def test_a_fixed_window_holds_the_newest_rows(window_rows, kept):
    given = job(rows(50), window="fixed", window_rows=window_rows)
    chosen, _ = prepare(given)
    assert positions(given, chosen) == list(kept)
    assert chosen.fresh_mass.tolist() == [i + 1 for i in kept]


def test_a_dynamic_window_leaves_out_what_no_longer_holds():
    given = job(rows(400, flip=range(200)), window="dynamic")
    chosen, _ = prepare(given)
    first, *_, last = positions(given, chosen)
    assert last == 399
    assert 150 <= first <= 340
    same = job(rows(400), window="dynamic")
    assert len(prepare(same)[0].fresh) == 400
    assert len(prepare(job(rows(400), window="dynamic", window_rows=30))[0].fresh) == 30


@pytest.mark.parametrize("task", TASKS)
def test_wrong_rows_are_named_by_their_place_in_the_job_also_behind_a_window(task):
    flipped = {3, 161, 205, 250, 280}
    given = job(rows(300, task, flip=flipped), task, filter_share=0.2, window="fixed", window_rows=150)
    chosen, wrong = prepare(given)
    assert set(wrong) >= flipped - {3}
    assert len(wrong) <= 8
    assert positions(given, chosen) == [i for i in range(150, 300) if i not in wrong]


def test_no_more_rows_are_wrong_than_may_be():
    given = job(rows(90, flip=[10, 20, 30, 40]), filter_share=0.03)
    assert len(prepare(given)[1]) == 2


@pytest.mark.parametrize("task", TASKS)
def test_a_part_stands_for_all_rows_and_its_weights_multiply(task):
    fresh = rows(90, task)
    given = job(fresh, task, max_rows=30)
    chosen, _ = prepare(given)
    assert len(chosen.fresh) <= 30
    kept = positions(given, chosen)
    assert kept == sorted(kept)
    times = chosen.fresh.weights / fresh.weights[kept]
    assert times.min() >= 1
    assert times.sum() == pytest.approx(90)
    np.testing.assert_allclose(chosen.fresh_mass, given.fresh_mass[kept] * times, rtol=1e-5)
    if task == "classification":
        assert np.bincount(chosen.fresh.targets, times).tolist() == pytest.approx([30, 30, 30])


def test_what_a_negative_label_says_stays_negative():
    fresh = rows(90)
    fresh = Rows(fresh.latents, fresh.targets, np.where(np.arange(90) % 2, -1.0, 1.0).astype(np.float32))
    chosen, wrong = prepare(job(fresh, max_rows=30, filter_share=0.3))
    assert set(np.sign(chosen.fresh.weights)) == {-1.0, 1.0}
    assert all(fresh.weights[i] > 0 for i in wrong)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows_or_none_are_no_special_case(count):
    chosen, wrong = prepare(job(rows(count), filter_share=0.5, window="dynamic", max_rows=5))
    assert (len(chosen.fresh), wrong) == (count, [])


@pytest.mark.parametrize("task", TASKS)
def test_the_job_is_only_read_and_the_same_job_gives_the_same_rows(task):
    options = {"filter_share": 0.2, "window": "dynamic", "window_rows": 200, "max_rows": 50}
    given = job(rows(300, task, flip=[250, 260]), task, **options)
    before = [part.copy() for part in (given.fresh.latents, given.fresh.targets, given.fresh.weights, given.fresh_mass)]
    first, wrong = prepare(given)
    second, again = prepare(given)
    assert wrong == again
    for part in ("latents", "targets", "weights"):
        np.testing.assert_array_equal(getattr(first.fresh, part), getattr(second.fresh, part))
    for old, new in zip(before, (*vars(given.fresh).values(), given.fresh_mass), strict=True):
        np.testing.assert_array_equal(old, new)
    for part in ("champion", "base", "anchor", "fisher", "replay", "moments", "seed", "config"):
        assert getattr(first, part) is getattr(given, part)
