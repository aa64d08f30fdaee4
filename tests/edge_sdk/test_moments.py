"""Moments: sums that add up, and come back from disk."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.learn.moments import Moments, fresh_mass

LABELS = ("a", "b", "c")


def rows(seed, count, width=4):
    """Whole numbers, whose sums are exact."""
    rng = np.random.default_rng(seed)
    return rng.integers(-50, 50, (count, width)), rng.integers(3, size=count), rng.integers(0, 4, count)


def same(first, second):
    assert first.labels == second.labels
    assert (first.rows, first.mass) == (second.rows, second.mass)
    for name in ("x", "xx", "y", "xy"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_moments_are_weighted_sums():
    x, y, w = rows(0, 30)
    found = Moments.of(x, y, w, LABELS)
    assert (found.rows, found.mass) == ((w > 0).sum(), w.sum())
    one_hot = np.eye(3)[y]
    np.testing.assert_array_equal(found.x, sum(w[i] * x[i] for i in range(30)))
    np.testing.assert_array_equal(found.xx, sum(w[i] * np.outer(x[i], x[i]) for i in range(30)))
    np.testing.assert_array_equal(found.y, sum(w[i] * one_hot[i] for i in range(30)))
    np.testing.assert_array_equal(found.xy, sum(w[i] * np.outer(x[i], one_hot[i]) for i in range(30)))


def test_several_targets_at_a_time_are_summed_as_they_are(rng):
    x, y, w = rng.normal(size=(9, 4)), rng.normal(size=(9, 3)).astype(np.float32), np.ones(9)
    found = Moments.of(x, y, w, LABELS)
    np.testing.assert_allclose(found.y, y.sum(axis=0))
    np.testing.assert_allclose(found.xy, x.T @ y)


@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), cut=st.integers(0, 40))
def test_moments_of_parts_add_up_and_subtract_exactly_in_any_order(seed, count, cut):
    x, y, w = rows(seed, count)
    whole = Moments.of(x, y, w, LABELS)
    first, second = Moments.of(x[:cut], y[:cut], w[:cut], LABELS), Moments.of(x[cut:], y[cut:], w[cut:], LABELS)
    same(first + second, whole)
    same(second + first, whole)
    same(whole - second, first)
    same(whole + Moments.none(LABELS, 4), whole)
    order = np.random.default_rng(seed).permutation(count)
    same(Moments.of(x[order], y[order], w[order], LABELS), whole)


@pytest.mark.parametrize("sign", [-1, 1])
def test_absorbing_is_adding_or_subtracting_in_the_same_arrays(sign):
    first, second = Moments.of(*rows(1, 20), LABELS), Moments.of(*rows(2, 10), LABELS)
    expected = first + second if sign > 0 else first - second
    absorbed = first.absorb(second, sign=sign)
    same(absorbed, expected)
    assert absorbed.xx is first.xx
    with pytest.raises(ValueError, match="aligned"):
        first.absorb(second.aligned((*LABELS, "d")))


def test_moments_of_many_wide_rows_are_summed_in_parts(rng):
    x, y, w = rng.normal(size=(700, 600)).astype(np.float32), rng.integers(0, 3, 700), rng.uniform(0, 2, 700)
    found, wide = Moments.of(x, y, w, LABELS), x.astype(np.float64)
    np.testing.assert_allclose(found.xx, (wide * w[:, None]).T @ wide, atol=1e-9)
    np.testing.assert_allclose(found.x, w @ wide, atol=1e-9)
    np.testing.assert_allclose(found.xy, (wide * w[:, None]).T @ np.eye(3)[y], atol=1e-9)


def test_a_row_of_weight_2_equals_two_rows():
    x, y, w = rows(1, 10)
    doubled, twice = Moments.of(x, y, 2 * w, LABELS), Moments.of(x, y, w, LABELS) + Moments.of(x, y, w, LABELS)
    for name in ("mass", "x", "xx", "y", "xy"):
        np.testing.assert_array_equal(getattr(doubled, name), getattr(twice, name))


def test_faded_rows_count_less_and_are_still_as_many():
    found = Moments.of(*rows(2, 10), LABELS)
    faded = found.faded(0.5)
    assert (faded.rows, faded.mass) == (found.rows, found.mass / 2)
    np.testing.assert_array_equal(2 * faded.xx, found.xx)
    np.testing.assert_array_equal(2 * faded.xy, found.xy)


def test_labels_are_grown_and_put_in_another_order():
    x, y, w = rows(3, 30)
    found = Moments.of(x, y, w, LABELS)
    grown = found.aligned(("c", "new", "a", "b"))
    place = np.array([2, 3, 0])  # of a, b and c
    same(grown, Moments.of(x, place[y], w, ("c", "new", "a", "b")))
    assert not grown.y[1]
    same(grown.aligned(LABELS), found)  # what has no rows may go
    with pytest.raises(ValueError, match="the moments know 'b'"):
        found.aligned(("a", "c"))


def test_moments_of_different_labels_do_not_add_up():
    found = Moments.of(*rows(3, 30), LABELS)
    with pytest.raises(ValueError, match="aligned"):
        found + found.aligned((*LABELS, "d"))


def test_what_rounding_leaves_of_a_label_is_not_taken_for_rows(rng):
    x, y = rng.normal(size=(300, 4)), np.repeat([0, 1, 2], 100)
    w = rng.uniform(0.1, 3, 300)
    whole = Moments.load(Moments.of(x, y, w, LABELS).to_bytes())
    rest = whole - Moments.of(x[200:], y[200:], w[200:], LABELS)
    assert rest.y[2] != 0
    assert rest.known.tolist() == [True, True, False]
    assert rest.aligned(("a", "b")).labels == ("a", "b")
    assert not (whole - whole).known.any()


# ---- on disk


def test_moments_survive_saving_in_single_precision(rng, tmp_path):
    found = Moments.of(rng.normal(3, 1, (50, 6)), rng.integers(3, size=50), rng.random(50), LABELS)
    path = tmp_path / "moments.npz"
    path.write_bytes(found.to_bytes())
    for source in (path, path.read_bytes()):
        loaded = Moments.load(source)
        assert (loaded.labels, loaded.rows, loaded.mass) == (found.labels, found.rows, found.mass)
        for name in ("x", "xx", "y", "xy"):
            np.testing.assert_allclose(getattr(loaded, name), getattr(found, name), rtol=1e-6)
            assert getattr(loaded, name).dtype == np.float64
        np.testing.assert_array_equal(loaded.xx, loaded.xx.T)
        assert loaded.to_bytes() == found.to_bytes()
    stored = sum(value.nbytes for key, value in found.arrays().items() if key != "size")
    assert stored == 4 * (6 * 7 // 2 + 6 * (3 + 1) + 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays.pop("xx"),
        lambda arrays: arrays.pop("labels"),
        lambda arrays: arrays.update(labels=np.array("a")),
        lambda arrays: arrays.update(labels=np.array(["a", "b"])),
        lambda arrays: arrays.update(xx=arrays["xx"][:-1]),
        lambda arrays: arrays.update(xx=arrays["xx"][:1]),
        lambda arrays: arrays.update(x=arrays["x"][None]),
        lambda arrays: arrays.update(x=np.float32(3)),
        lambda arrays: arrays.update(y=arrays["y"][:-1]),
        lambda arrays: arrays.update(xy=arrays["xy"].T),
        lambda arrays: arrays.update(xy=arrays["xy"] * np.nan),
        lambda arrays: arrays.update(size=np.array([1.0, np.inf])),
        lambda arrays: arrays.update(size=np.array([1.0])),
        lambda arrays: arrays.update(y=np.array(["x", "y", "z"])),
    ],
)
def test_damaged_moments_are_refused(damage):
    arrays = load_npz(Moments.of(*rows(4, 20), LABELS).to_bytes())
    damage(arrays)
    with pytest.raises(IntegrityError):
        Moments.load(npz_bytes(arrays))


def test_a_file_that_is_cut_short_is_refused():
    with pytest.raises(IntegrityError):
        Moments.load(Moments.of(*rows(4, 20), LABELS).to_bytes()[:200])


# ---- what fresh rows add


def factory(*counts):
    y = np.repeat(np.arange(len(counts)), counts)
    return Moments.of(np.zeros((len(y), 2)), y, np.ones(len(y)), LABELS[: len(counts)])


def test_each_labels_fresh_rows_together_count_as_one_of_the_factorys_labels():
    y = np.array([0] * 30 + [1] * 10)
    mass = fresh_mass(factory(100, 300), y, np.ones(40, np.float32), "classification")
    assert mass.dtype == np.float32
    assert mass[:30].sum() == pytest.approx(200)
    assert mass[30:].sum() == pytest.approx(200)


def test_weights_share_a_labels_mass_and_labels_that_do_not_apply_have_none():
    weights = np.array([1, 3, -1, 0], np.float32)
    mass = fresh_mass(factory(40, 40), np.zeros(4, np.int64), weights, "classification")
    np.testing.assert_allclose(mass, [10, 30, 0, 0])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_handful_does_not_move_what_rests_on_thousands(task):
    y = np.zeros(2, np.int64) if task == "classification" else np.zeros((2, 2), np.float32)
    mass = fresh_mass(factory(5_000, 5_000), y, np.array([1, 0.5], np.float32), task)
    np.testing.assert_allclose(mass, [100, 50])


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_without_classes_all_fresh_rows_count_as_much_as_the_factorys(task):
    known = Moments.of(np.zeros((60, 2)), np.zeros((60, 3)), np.ones(60), LABELS)
    mass = fresh_mass(known, np.zeros((20, 3), np.float32), np.ones(20, np.float32), task)
    assert mass.sum() == pytest.approx(60)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_without_a_factory_fresh_rows_count_as_they_are_many(task):
    y = np.zeros(20, np.int64) if task == "classification" else np.zeros((20, 3), np.float32)
    mass = fresh_mass(Moments.none(LABELS, 2), y, np.ones(20, np.float32), task)
    np.testing.assert_allclose(mass, 1)
    assert fresh_mass(Moments.none(LABELS, 2), y[:0], np.ones(0, np.float32), task).shape == (0,)
