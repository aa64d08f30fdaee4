"""The filter against wrong labels: what it finds, what it spares, and that drift is not mistaken for errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.learn.clean import suspects
from edge_sdk.learn.ridge import Sums, one_hot, predict, standardise

SEEDS = range(5)


def gaussian(seed, *, fresh=600, replay=1_000, width=48, shares=(0.2,) * 5, separation=6.0, shift=3.0):
    """Classes with unit variance, means about `separation` apart, and fresh rows that all moved by `shift`."""
    rng = np.random.default_rng(seed)
    classes = len(shares)
    means = rng.normal(size=(classes, width)) * separation / np.sqrt(2 * width)
    y, replay_y = (rng.choice(classes, n, p=shares) for n in (fresh, replay))
    drift = rng.normal(size=width)
    x = means[y] + rng.normal(size=(fresh, width)) + shift * drift / np.linalg.norm(drift)
    replay_x = means[replay_y] + rng.normal(size=(replay, width))
    return rng, x.astype(np.float32), y, replay_x.astype(np.float32), replay_y


def flip(rng, y, share):
    bad = rng.random(len(y)) < share
    return np.where(bad, (y + rng.integers(1, y.max() + 1, len(y))) % (y.max() + 1), y), bad


def find(x, y, replay_x, replay_y, *, task="classification", max_share=0.5, weights=None):
    weights = np.ones(len(x), np.float32) if weights is None else weights
    return suspects(
        x, y, weights, task=task, max_share=max_share, replay_features=replay_x, replay_targets=replay_y
    )  # fmt: skip


def rates(flagged, bad):
    """Share of the wrong and of the right labels that are suspect."""
    return flagged[bad].mean(), flagged[~bad].mean()


# ---- what is found


@pytest.mark.parametrize("replay", [0, 1_000])
def test_most_wrong_labels_are_found_and_few_right_ones_suspected_under_drift(replay):
    found, spared = [], []
    for seed in SEEDS:
        rng, x, y, replay_x, replay_y = gaussian(seed, replay=replay)
        given, bad = flip(rng, y, 0.2)
        hit, false = rates(find(x, given, replay_x, replay_y), bad)
        found.append(hit)
        spared.append(false)
    assert np.mean(found) > 0.75
    assert min(found) > 0.65
    assert np.mean(spared) < 0.02


@pytest.mark.parametrize("shift", [0.0, 3.0, 8.0])
def test_right_labels_are_not_suspected_under_drift(shift):
    for seed in SEEDS:
        _, x, y, replay_x, replay_y = gaussian(seed, shift=shift)
        assert find(x, y, replay_x, replay_y).mean() < 0.015


def test_labels_that_say_nothing_about_the_sample_are_not_suspected():
    for seed in SEEDS:
        _, x, y, replay_x, replay_y = gaussian(seed, shares=(0.5, 0.5), separation=0.0)
        assert find(x, y, replay_x, replay_y).mean() < 0.02


@pytest.mark.parametrize("change", ["renamed to a new label", "merged into another", "exchanged with another"])
def test_a_label_that_means_something_else_in_all_fresh_rows_is_not_filtered(change):
    for seed in SEEDS:
        _, x, y, replay_x, replay_y = gaussian(seed, shares=(0.4, 0.3, 0.15, 0.15), replay=3_000)
        given = {
            "renamed to a new label": np.where(y == 0, 4, y),
            "merged into another": np.where(y == 2, 1, y),
            "exchanged with another": np.choose(y, [2, 1, 0, 3]),
        }[change]
        for weight in (1.0, 0.1):
            flagged = find(x, given, replay_x, replay_y, weights=np.full(len(x), weight, np.float32))
            assert flagged.mean() < 0.03
            assert flagged[given != y].mean() < 0.03


@pytest.mark.parametrize("rows", [10, 20, 40])
def test_the_first_rows_of_a_new_label_are_kept(rows):
    lost = []
    for seed in SEEDS:
        shares = np.array([120, 120, 120, 120, rows]) / (480 + rows)
        _, x, y, replay_x, replay_y = gaussian(seed, fresh=480 + rows, shares=shares, separation=7.0)
        old = replay_y < 4
        lost.append(find(x, y, replay_x[old], replay_y[old])[y == 4].mean())
    assert np.mean(lost) < 0.05


def test_labels_of_a_sample_are_judged_one_by_one():
    """Multi-label: what is present adds up in the features."""
    found, spared, clean = [], [], []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        parts = rng.normal(size=(6, 48)) * 8 / np.sqrt(96)
        present, replay_y = ((rng.random((n, 6)) < 0.25).astype(np.int64) for n in (500, 800))
        x, replay_x = ((y @ parts + rng.normal(size=(len(y), 48))).astype(np.float32) for y in (present, replay_y))
        x += 0.3
        bad = rng.random(500) < 0.2
        given = present.copy()
        given[bad, rng.integers(6, size=bad.sum())] ^= 1
        hit, false = rates(find(x, given, replay_x, replay_y, task="multilabel"), bad)
        found.append(hit)
        spared.append(false)
        clean.append(find(x, present, replay_x, replay_y, task="multilabel").mean())
    assert np.mean(found) > 0.75
    assert np.mean(spared) < 0.03
    assert np.mean(clean) < 0.03


def test_values_far_from_what_the_others_say_are_found():
    """Regression: one value in ten is off by ten standard deviations of its noise; the relation itself has drifted."""
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        slope, replay_x, x = rng.normal(size=(20, 2)), rng.normal(size=(800, 20)), rng.normal(size=(500, 20))
        y = x @ (1.5 * slope) + 0.3 * rng.normal(size=(500, 2))
        bad = rng.random(500) < 0.1
        given = y + np.where(bad, rng.choice([-1, 1], 500), 0)[:, None] * [10.0, 0.0]
        replay = replay_x.astype(np.float32), replay_x @ slope
        hit, false = rates(find(x.astype(np.float32), given, *replay, task="regression"), bad)
        assert hit > 0.9
        assert false < 0.03
        assert find(x.astype(np.float32), y, *replay, task="regression").mean() < 0.03


def test_a_constant_target_is_nobodys_error():
    _, x, _, replay_x, _ = gaussian(0)
    given, old = np.full((len(x), 1), 3.0), np.full((len(replay_x), 1), 3.0)
    assert not find(x, given, replay_x, old, task="regression").any()


# ---- what is spared


def test_no_more_than_the_share_are_suspect_and_the_strongest_contradictions_go_first():
    rng, x, y, replay_x, replay_y = gaussian(0)
    given, bad = flip(rng, y, 0.2)
    all_of_them, some = (find(x, given, replay_x, replay_y, max_share=share) for share in (0.5, 0.05))
    assert some.sum() == 30 < all_of_them.sum()
    assert not (some & ~all_of_them).any()
    assert bad[some].all()
    assert not find(x, given, replay_x, replay_y, max_share=0.0).any()


def test_complementary_labels_and_labels_without_weight_neither_vote_nor_are_judged():
    rng, x, y, replay_x, replay_y = gaussian(0)
    given, bad = flip(rng, y, 0.2)
    silent = rng.random(len(y)) < 0.5
    wrong = np.where(silent, (y + 1) % 5, given)
    weights = np.where(silent, rng.choice([-1.0, 0.0], len(y)), 1.0).astype(np.float32)
    flagged = find(x, wrong, replay_x, replay_y, weights=weights)
    assert not flagged[silent].any()
    assert (flagged[~silent] == find(x[~silent], given[~silent], replay_x, replay_y)).all()
    assert flagged[bad & ~silent].mean() > 0.65


@settings(max_examples=40)
@given(
    n=st.integers(0, 60), m=st.integers(0, 20), width=st.integers(1, 4), share=st.floats(0, 1), seed=st.integers(0, 99),
    task=st.sampled_from(["classification", "multilabel", "regression"]),
)  # fmt: skip
def test_the_rules_hold_for_any_rows(n, m, width, share, seed, task):
    rng = np.random.default_rng(seed)
    x, replay_x = (rng.integers(0, 3, (rows, 4)).astype(np.float32) for rows in (n, m))
    shape = (lambda rows: (rows,)) if task == "classification" else (lambda rows: (rows, width))
    values = width if task == "classification" else 2
    y, replay_y = (rng.integers(0, values, shape(rows)) for rows in (n, m))
    flagged = find(x, y, replay_x, replay_y, task=task, max_share=share)
    assert flagged.shape == (n,)
    assert flagged.sum() <= share * n
    assert n >= 10 or not flagged.any()
    if task == "classification":
        for label in np.unique(y):
            rows = y == label
            assert flagged[rows].sum() <= rows.sum() / 2 if rows.sum() >= 10 else not flagged[rows].any()


# ---- the ridge beneath


def test_ridge_finds_a_line_and_its_sums_add_and_subtract(rng):
    x = standardise(rng.normal(3.0, 5.0, (400, 3)).astype(np.float32))
    y = (x @ [[1.0], [-2.0], [0.0]] + 7).astype(np.float32)
    weights = rng.random(400).astype(np.float32)
    whole, first, rest = (
        Sums.of(x[rows], y[rows], weights[rows]) for rows in (slice(None), slice(100), slice(100, None))
    )
    assert (first + rest).solve() == pytest.approx(whole.solve(), abs=1e-4)
    assert (whole - rest).solve() == pytest.approx(first.solve(), abs=1e-3)
    assert np.corrcoef(predict(whole.solve(), x)[:, 0], y[:, 0])[0, 1] > 0.999
    assert predict(whole.solve(), x).mean() == pytest.approx(7, abs=0.1)


def test_rows_of_no_weight_change_nothing(rng):
    x, y = rng.normal(size=(50, 3)).astype(np.float32), rng.normal(size=(50, 1)).astype(np.float32)
    weights = (np.arange(50) < 25).astype(np.float32)
    assert Sums.of(x, y, weights).solve() == pytest.approx(Sums.of(x[:25], y[:25], weights[:25]).solve(), abs=1e-5)


def test_a_feature_that_never_changes_is_no_feature():
    z = standardise(np.array([[1, 5], [3, 5]], dtype=np.float32))
    assert z.tolist() == [[-1, 0], [1, 0]]
    assert one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
