"""Which of the fresh rows are learned from: windows, and rows that stand for many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.learn.ridge import Sums, one_hot, predict, standardise
from edge_sdk.learn.select import dynamic_window, fixed_window, representative

SEEDS = range(10)


def stream(seed, *, rows=2_000, new_rows=0, change="none", classes=4, width=32):
    """Gaussian classes; of the newest rows the labels are exchanged, or the inputs moved. In the order of time."""
    rng = np.random.default_rng(seed)
    means, y = rng.normal(size=(classes, width)) * 5 / np.sqrt(2 * width), rng.integers(classes, size=rows)
    x = means[y] + rng.normal(size=(rows, width))
    new = np.arange(rows) >= rows - new_rows
    if change == "labels":
        y = np.where(new, (y + 1) % classes, y)
    if change == "two labels":
        y = np.where(new & (y < 2), 1 - y, y)
    return x.astype(np.float32), y, np.arange(rows, dtype=np.float64)


def window(x, y, times, *, task="classification", min_rows=60, max_rows=5_000, weights=None):
    weights = np.ones(len(x), np.float32) if weights is None else weights
    return dynamic_window(x, y, weights, times, task=task, min_rows=min_rows, max_rows=max_rows)


# ---- a fixed window


@given(times=st.lists(st.integers(0, 5), max_size=30), rows=st.integers(0, 40))
def test_a_fixed_window_has_the_newest_rows_oldest_first(times, rows):
    chosen = fixed_window(np.array(times, dtype=np.float64), rows)
    assert len(chosen) == min(rows, len(times))
    key = sorted((time, position) for position, time in enumerate(times))
    assert chosen.tolist() == [position for _, position in key[len(times) - len(chosen) :]]


# ---- a dynamic one


@pytest.mark.parametrize("new_rows", [100, 300, 700])
@pytest.mark.parametrize("change", ["labels", "two labels"])
def test_after_a_sudden_change_the_window_is_about_what_came_since(change, new_rows):
    lengths = [len(window(*stream(seed, new_rows=new_rows, change=change))) for seed in SEEDS]
    assert 0.6 * new_rows <= np.median(lengths) <= 1.15 * new_rows
    assert max(lengths) <= 1.5 * new_rows


@pytest.mark.parametrize(("classes", "width"), [(4, 32), (6, 128), (2, 64)])
def test_on_a_stationary_stream_the_window_is_nearly_everything(classes, width):
    lengths = [len(window(*stream(seed, classes=classes, width=width))) for seed in SEEDS]
    assert np.median(lengths) == 2_000
    assert np.mean(lengths) > 1_600


def test_values_and_sets_of_labels_choose_a_window_as_well(rng):
    x, times = rng.normal(size=(1_000, 16)).astype(np.float32), np.arange(1_000.0)
    slope = rng.normal(size=(16, 2))
    turned = np.where(times[:, None] >= 700, -1, 1) * (x @ slope)
    for y, task in ((turned, "regression"), ((turned > 0).astype(np.int64), "multilabel")):
        assert 180 <= len(window(x, y, times, task=task)) <= 345
    assert len(window(x, (x @ slope)[:, 0:1], times, task="regression")) > 900


def test_the_window_follows_time_not_position_and_its_limits(rng):
    x, y, times = stream(0, new_rows=300, change="labels")
    order = rng.permutation(2_000)
    expected = window(x, y, times)
    assert (order[window(x[order], y[order], times[order])] == expected).all()
    assert (expected == np.arange(2_000 - len(expected), 2_000)).all()
    assert len(window(x, y, times, max_rows=150)) == 150
    assert len(window(x, y, times, min_rows=1_500)) >= 1_500
    assert len(window(x[:40], y[:40], times[:40])) == 40
    assert len(window(x[:0], y[:0], times[:0])) == 0


def test_rows_without_weight_have_no_say():
    x, y, times = stream(0, new_rows=300, change="labels")
    weights = (times < 1_700).astype(np.float32)
    assert len(window(x, y, times, weights=weights)) == 2_000
    assert len(window(x, y, times, weights=np.where(times < 1_900, 1, -1).astype(np.float32))) == 2_000
    mixed = np.where(np.arange(2_000) % 3, 1, -1).astype(np.float32)
    assert len(window(x, np.where(mixed > 0, y, 0), times, weights=mixed)) <= 345


# ---- rows that stand for many


def skewed(seed, rows=3_000, classes=5):
    """Labels from frequent to rare, two Gaussian clusters each, as uint8."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes, 2, 32)) * 5 / 8
    y = rng.choice(classes, rows, p=np.array([50, 25, 15, 7, 3]) / 100)
    x = means[y, (rng.random(rows) < 0.3).astype(int)] + rng.normal(size=(rows, 32))
    return (128 + 20 * x).clip(0, 255).astype(np.uint8), y


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    count=st.integers(5, 90),
    seed=st.integers(0, 99),
)
def test_weights_restore_how_often_each_label_came(labels, count, seed):
    labels = np.array(labels)
    latents = np.random.default_rng(seed).integers(0, 3, (len(labels), 2), dtype=np.uint8)
    rows, weights = representative(latents, labels, count)
    assert len(rows) == min(count, len(labels))
    assert (np.diff(rows) > 0).all()
    assert weights.dtype == np.float32
    assert (weights >= 1).all()
    for label in set(labels.tolist()):
        assert weights[labels[rows] == label].sum() == pytest.approx((labels == label).sum(), rel=1e-5)


def test_places_are_shared_evenly_and_rare_labels_keep_all_rows():
    latents, labels = skewed(0)
    rows, weights = representative(latents, labels, 600)
    counts, kept = np.bincount(labels), np.bincount(labels[rows])
    assert kept[4] == counts[4]
    assert kept[:4].max() - kept[:4].min() <= 10
    assert (weights[labels[rows] == 4] == 1).all()


def test_each_run_of_time_is_represented():
    latents, labels = np.zeros((2_048, 1), dtype=np.uint8), np.zeros(2_048, dtype=np.int64)
    rows, _ = representative(latents, labels, 400)
    assert np.bincount(rows // 512).tolist() == [100] * 4


def test_the_mean_of_each_label_is_kept_closer_than_by_chance():
    ratios = []
    for seed in range(5):
        latents, labels = skewed(seed)
        rows, _ = representative(latents, labels, 300)
        for label in range(4):
            own = latents[labels == label].astype(float)
            chosen = latents[rows][labels[rows] == label].astype(float)
            drawn = np.random.default_rng(seed).permutation(own)[: len(chosen)]
            ratios.append(np.linalg.norm(chosen.mean(0) - own.mean(0)) / np.linalg.norm(drawn.mean(0) - own.mean(0)))
    assert max(ratios) < 0.5


def test_representative_rows_teach_more_than_as_many_at_random():
    """Share of each label that a ridge gets right, even over labels."""

    def right(latents, labels, rows, weights):
        x = standardise(latents.astype(np.float32))
        model = Sums.of(x[rows], one_hot(labels[rows], 5), np.asarray(weights, dtype=np.float32)).solve()
        hit = predict(model, x).argmax(axis=1) == labels
        return np.mean([hit[labels == label].mean() for label in range(5)])

    chosen, drawn = [], []
    for seed in range(8):
        latents, labels = skewed(seed)
        chosen.append(right(latents, labels, *representative(latents, labels, 200)))
        drawn.append(right(latents, labels, np.random.default_rng(seed).permutation(3_000)[:200], np.ones(200)))
    assert np.mean(chosen) > np.mean(drawn) + 0.01


def test_fewer_places_than_labels_are_refused():
    with pytest.raises(ValueError, match="2 rows cannot stand for 3 labels"):
        representative(np.zeros((9, 2), np.uint8), np.arange(9) % 3, 2)
