"""Streams whose drift is known: what they draw, when they change, and that the seed decides all of it."""

import dataclasses
import math
import typing

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import streams
from edge_sdk.schema import InputSpec
from edge_sdk.streams import (
    EFFECTS,
    HOUR_S,
    Drift,
    DriftingStream,
    Pool,
    ScriptedStream,
    World,
    blur,
    brightness,
    contrast,
    darkening,
    missing,
    noise,
    occlusion,
    offset,
    on_sensors,
    pixelate,
    rotation,
    spikes,
    stuck,
    unchanged,
    unit_change,
)

IMAGES = (5, 1, 8, 8)


@pytest.fixture
def images(rng):
    return rng.random(IMAGES).astype(np.float32)


@pytest.fixture
def pool():
    """The value of a sample is its label."""
    y = np.arange(60, dtype=np.int64) % 6
    return Pool(np.broadcast_to(y[:, None, None, None], (60, 1, 4, 4)).astype(np.float32).copy(), y)


@pytest.mark.parametrize(
    "transform",
    [
        unchanged,
        rotation(33),
        darkening(0.4),
        noise(0.1),
        brightness(0.3),
        contrast(2),
        blur(0.8),
        occlusion(0.3),
        pixelate(3),
        stuck(0.2),
        spikes(0, 0.1),
    ],
)
def test_transforms_keep_shape_and_type_and_their_input(images, rng, transform):
    before = images.copy()
    result = transform(images, rng)
    assert result.shape == IMAGES
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.max() <= 1
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3), (360, 0)])
@pytest.mark.parametrize("size", [7, 8])
def test_rotation_by_right_angles_moves_pixels_exactly(rng, degrees, turns, size):
    images = rng.random((3, 2, size, size)).astype(np.float32)
    expected = np.rot90(images, turns, axes=(2, 3))
    np.testing.assert_allclose(rotation(degrees)(images, rng), expected, atol=1e-5)


def test_rotation_keeps_the_centre_and_fills_with_zero(rng):
    images = np.ones((1, 1, 9, 9), np.float32)
    turned = rotation(45)(images, rng)[0, 0]
    np.testing.assert_allclose(turned[2:7, 2:7], 1, atol=1e-6)
    assert turned[0, 0] == 0
    there_and_back = rotation(-20)(rotation(20)(images, rng), rng)[0, 0]
    np.testing.assert_allclose(there_and_back[3:6, 3:6], 1, atol=1e-5)


def test_rotation_leaves_no_pixel_outside_the_range_of_the_image(rng):
    for degrees in range(0, 180, 7):
        turned = rotation(degrees)(np.ones((1, 1, 8, 8), np.float32), rng)
        assert turned.min() >= 0
        assert turned.max() <= 1


def test_rotation_treats_every_image_and_channel_alike(images, rng):
    whole = rotation(25)(images, rng)
    for i in range(len(images)):
        np.testing.assert_array_equal(rotation(25)(images[i : i + 1], rng)[0], whole[i])


def test_darkening_multiplies(images, rng):
    np.testing.assert_allclose(darkening(0.25)(images, rng), images / 4, rtol=1e-6)


def test_noise_has_its_spread_and_stays_in_range(rng):
    grey = np.full((200, 1, 8, 8), 0.5, np.float32)
    assert noise(0.1)(grey, rng).std() == pytest.approx(0.1, rel=0.03)
    wide = noise(5.0, low=-1.0, high=2.0)(grey, rng)
    assert (wide.min(), wide.max()) == (-1, 2)


def test_a_pool_can_be_narrowed_to_labels(pool):
    narrow = pool.only({1, 4})
    assert set(narrow.y) == {1, 4}
    assert len(narrow.y) == 20
    np.testing.assert_array_equal(narrow.x[:, 0, 0, 0], narrow.y)


def stream(pool, *, seed=0, **options):
    return DriftingStream(
        pool, rng=np.random.default_rng(seed), **{"base_labels": {0, 1, 2}, "drift_at": 10.0, **options}
    )


def test_inputs_change_from_the_drift_on(pool):
    drifting = stream(pool, transform=darkening(0.5))
    x, y = drifting.draw(50, 9.999)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)
    x, y = drifting.draw(50, 10.0)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y / 2)
    assert drifting.drifts


def test_new_labels_appear_with_the_drift_in_their_share(pool):
    drifting = stream(pool, new_labels=frozenset({4, 5}), new_share=0.3)
    assert set(drifting.draw(500, 9)[1]) == {0, 1, 2}
    x, y = drifting.draw(2_000, 11)
    assert set(y) == {0, 1, 2, 4, 5}
    assert np.isin(y, [4, 5]).mean() == pytest.approx(0.3, abs=0.04)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)
    assert drifting.drifts


def test_a_clean_stream_never_changes(pool):
    clean = stream(pool)
    assert not clean.drifts
    x, y = clean.draw(300, 1e9)
    assert set(y) == {0, 1, 2}
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)


def test_draws_do_not_touch_the_pool(pool):
    before = pool.x.copy()
    x, y = stream(pool, transform=darkening(0.5)).draw(40, 20)
    x[:], y[:] = -1, -1
    np.testing.assert_array_equal(pool.x, before)
    assert pool.y.min() == 0


@pytest.mark.parametrize("new_labels", [frozenset(), frozenset({5})])
def test_the_seed_decides_every_draw(pool, new_labels):
    def draws(seed):
        one = stream(pool, seed=seed, transform=noise(0.1, high=9.0), new_labels=new_labels)
        return [part.tobytes() for time in (1, 10, 20) for part in one.draw(30, time)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_two_streams_with_one_seed_draw_the_same_samples_whatever_the_transform(pool):
    clean, dark = stream(pool), stream(pool, transform=darkening(0.5))
    for time in (5, 15, 25):
        np.testing.assert_array_equal(clean.draw(20, time)[1], dark.draw(20, time)[1])


# ---- corruptions of images


def test_brightness_adds_and_loses_what_is_brighter_than_white(images, rng):
    np.testing.assert_allclose(brightness(0.25)(images, rng), np.minimum(images + 0.25, 1), rtol=1e-6)


def test_contrast_keeps_the_mean_of_each_image(rng):
    images = rng.uniform(0.3, 0.7, (4, 1, 8, 8)).astype(np.float32)
    flat = contrast(0.5)(images, rng)
    np.testing.assert_allclose(flat.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(flat.std((1, 2, 3)), images.std((1, 2, 3)) / 2, rtol=1e-5)


def test_blur_keeps_even_areas_and_spreads_a_point_evenly(rng):
    even = np.full((1, 1, 6, 6), 0.4, np.float32)
    np.testing.assert_allclose(blur(1.5)(even, rng), even, atol=1e-6)
    point = np.zeros((1, 1, 15, 15), np.float32)
    point[0, 0, 7, 7] = 1
    spread = blur(1.2)(point, rng)[0, 0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(spread, spread.T, atol=1e-7)
    np.testing.assert_allclose(spread, spread[::-1], atol=1e-7)
    assert spread[7, 7] / spread[7, 8] == pytest.approx(math.exp(0.5 / 1.2**2), rel=1e-4)


def test_occlusion_covers_its_share_elsewhere_in_each_image(rng):
    covered = occlusion(0.25)(np.ones((300, 1, 8, 8), np.float32), rng)
    assert (covered == 0).mean() == 0.25
    assert len({image.tobytes() for image in covered}) > 10


def test_pixelate_makes_even_blocks_with_the_same_mean(rng):
    images = rng.random((3, 1, 7, 7)).astype(np.float32)
    coarse = pixelate(3)(images, rng)
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
        block = coarse[:, 0, rows, 3:6]
        np.testing.assert_allclose(block.std((1, 2)), 0, atol=1e-7)
        np.testing.assert_allclose(block.mean((1, 2)), images[:, 0, rows, 3:6].mean((1, 2)), atol=1e-6)


# ---- sensors


def test_sensors_can_be_shifted_and_change_their_unit(rng):
    x = np.array([[20.0, 100.0]], np.float32)
    np.testing.assert_allclose(unit_change(1.8, 32)(x, rng), [[68, 212]], rtol=1e-6)
    np.testing.assert_allclose(offset(-3)(x, rng), [[17, 97]])


def test_spikes_and_gaps_come_in_their_share(rng):
    x = np.zeros((2_000, 10), np.float32)
    jumped = spikes(7, 0.1)(x, rng)
    assert set(np.unique(jumped)) == {-7, 0, 7}
    assert (jumped > 0).mean() == pytest.approx(0.05, abs=0.01)
    assert (jumped < 0).mean() == pytest.approx(0.05, abs=0.01)
    assert np.isnan(missing(0.3)(x, rng)).mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("axis", "shape"), [(-1, (5, 4)), (0, (5, 4, 9)), (-1, (5, 9, 4)), (0, (5, 4, 3, 3))])
def test_only_the_named_sensors_are_hit(rng, axis, shape):
    x = rng.random(shape).astype(np.float32)
    before = x.copy()
    hit = on_sensors(stuck(9.0), [1, 3], axis=axis)(x, rng)
    channels = np.moveaxis(hit, 1 if axis == 0 else -1, 0)
    assert (channels[[1, 3]] == 9).all()
    np.testing.assert_array_equal(channels[[0, 2]], np.moveaxis(x, 1 if axis == 0 else -1, 0)[[0, 2]])
    np.testing.assert_array_equal(x, before)


# ---- courses


def extents(hours, **options):
    drift = Drift(effect="noise", **options)
    return [drift.extent(hour * HOUR_S) for hour in hours]


def test_a_sudden_drift_is_there_from_its_beginning_to_its_end():
    assert extents([0, 9.99, 10, 19.99, 20], at_h=10, until_h=20) == [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)]


def test_a_gradual_drift_changes_more_samples_and_an_incremental_one_changes_them_more():
    assert extents([10, 12, 20, 99], at_h=10, over_h=8, course="gradual") == [(0, 0), (0.25, 1), (1, 1), (1, 1)]
    assert extents([10, 12, 20, 99], at_h=10, over_h=8, course="incremental") == [(0, 0), (1, 0.25), (1, 1), (1, 1)]


def test_a_recurring_drift_comes_back_and_a_seasonal_one_swings():
    there = extents([9, 10, 12.9, 13, 21.9, 22, 24.9, 25], at_h=10, period_h=12, active=0.25, course="recurring")
    assert [share for share, _ in there] == [0, 1, 1, 0, 0, 1, 1, 0]
    swing = extents([10, 13, 16, 22], at_h=10, period_h=12, course="seasonal")
    assert [strength for _, strength in swing] == pytest.approx([0, 0.5, 1, 0])


def test_onsets_tell_when_a_drift_begins_and_comes_back():
    assert Drift(effect="noise", at_h=5).onsets(10 * HOUR_S) == [5 * HOUR_S]
    assert Drift(effect="noise", at_h=50).onsets(10 * HOUR_S) == []
    again = Drift(effect="noise", course="recurring", at_h=5, period_h=10, until_h=30)
    assert again.onsets(100 * HOUR_S) == [5 * HOUR_S, 15 * HOUR_S, 25 * HOUR_S]


@given(
    st.sampled_from(typing.get_args(streams.Course)), st.floats(0, 200), st.floats(0, 100), st.floats(0.01, 100),
    st.floats(0.01, 1),
)  # fmt: skip
def test_an_extent_is_a_share_and_a_strength_and_nothing_before_the_beginning(course, hour, at_h, length, active):
    drift = Drift(effect="noise", course=course, at_h=at_h, over_h=length, period_h=length, active=active)
    share, strength = drift.extent(hour * HOUR_S)
    assert 0 <= share <= 1
    assert 0 <= strength <= 1
    assert (share == 0) == (strength == 0)
    assert hour >= at_h or share == 0
    assert drift.acts(hour * HOUR_S) == (share > 0)


# ---- drifts


def test_the_table_holds_every_effect():
    assert list(EFFECTS) == list(typing.get_args(streams.EffectName))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"effect": "labels"}, "needs `labels`"),
        ({"effect": "labels", "labels": {"a": 0.7, "b": 0.7}}, "at most 1"),
        ({"effect": "swap", "cycle": ("a",)}, "needs `cycle`"),
        ({"effect": "swap", "cycle": ("a", "a")}, "different"),
        ({"effect": "swap", "cycle": ("a", "b"), "size": 2.0}, "no `size`"),
        ({"effect": "rotation", "columns": ("a",)}, "no `columns`"),
        ({"effect": "noise", "labels": {"a": 0.1}}, "no `labels`"),
        ({"effect": "noise", "size": -1.0}, "lies outside"),
        ({"effect": "noise", "size": math.nan}, "lies outside"),
        ({"effect": "noise", "at_h": 5.0, "until_h": 5.0}, "not after"),
    ],
)
def test_a_drift_whose_details_do_not_fit_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Drift(**options)
    with pytest.raises(msgspec.ValidationError, match=says):
        msgspec.convert(options, Drift)


# ---- scripted streams


@pytest.fixture
def world(rng):
    """Images; three labels; the value of the upper left pixel is the label / 10."""
    y = np.arange(90, dtype=np.int64) % 3
    x = rng.random((90, 1, 8, 8)).astype(np.float32)
    x[:, 0, 0, 0] = y / 10
    parts = [Pool(x[i : i + 30], y[i : i + 30], (y[i : i + 30], (y[i : i + 30] + 1) % 3)) for i in (0, 30, 60)]
    return World("made", *parts, ("a", "b", "c"), InputSpec(shape=[1, 8, 8], low=0.0, high=1.0), ("grey",), axis=0)


@pytest.fixture
def rows(rng):
    """Rows of three columns without bounds."""
    x, y = rng.normal(0, 1, (200, 3)).astype(np.float32), np.arange(200, dtype=np.int64) % 2
    pool = Pool(x, y)
    return World("rows", pool, pool, pool, ("no", "yes"), InputSpec(shape=[3]), ("t", "u", "v"))


def measured(world):
    """The same world, but what is true of a sample is a number: its label, and three times that."""

    def pool(part):
        y, *others = (np.stack([y, 3.0 * y], axis=1) for y in (part.y, *part.others))
        return Pool(part.x, y, tuple(others))

    parts = {name: pool(getattr(world, name)) for name in ("factory", "pool", "score")}
    return dataclasses.replace(world, **parts, labels=(), targets=("one", "three"))


def fitting(world, effect):
    return measured(world) if EFFECTS[effect].truths == "numbers" else world


def script(world, *drifts, seed=0, **options):
    return ScriptedStream(world, rng=np.random.default_rng(seed), drifts=drifts, **options)


EXAMPLES = {
    "labels": {"labels": {"c": 0.5}},
    "swap": {"cycle": ("a", "b")},
}


def example(effect, **options):
    return Drift(effect=effect, **EXAMPLES.get(effect, {}), **options)


@pytest.mark.parametrize("course", typing.get_args(streams.Course))
@pytest.mark.parametrize("effect", EFFECTS)
def test_every_effect_in_every_course_is_decided_by_the_seed(world, effect, course):
    def drawn(seed):
        stream = script(fitting(world, effect), example(effect, course=course, at_h=1, over_h=4, period_h=6), seed=seed)
        return [part for hour in range(8) for part in stream.draw(7, hour * HOUR_S)]

    first, second = drawn(1), drawn(1)
    for a, b in zip(first, second, strict=True):
        assert a.dtype in (np.float32, np.int64, np.float64)
        assert a.tobytes() == b.tobytes()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, drawn(2), strict=True))
    for x in first[::2]:
        assert x.shape == (7, 1, 8, 8)
        assert np.nanmin(x) >= 0
        assert np.nanmax(x) <= 1


@pytest.mark.parametrize("effect", EFFECTS)
def test_nothing_is_changed_before_the_beginning_and_something_after_it(world, effect):
    world = fitting(world, effect)
    clean, changed = script(world), script(world, example(effect, at_h=5))
    for part, other in zip(clean.draw(200, 4 * HOUR_S), changed.draw(200, 4 * HOUR_S), strict=True):
        np.testing.assert_array_equal(part, other)
    before, after = clean.draw(200, 6 * HOUR_S), changed.draw(200, 6 * HOUR_S)
    kind = EFFECTS[effect].kind
    assert (before[1] != after[1]).any() == (kind != "covariate")
    assert (before[0].tobytes() != after[0].tobytes()) == (kind != "concept")


def test_drifts_of_inputs_and_concepts_leave_the_choice_of_samples_alone(world):
    clean = script(world)
    busy = script(
        world, Drift(effect="noise", size=0.5), Drift(effect="occlusion"), Drift(effect="swap", cycle=("a", "b"))
    )
    for hour in range(5):
        _, y = clean.draw(20, hour * HOUR_S)
        _, seen = busy.draw(20, hour * HOUR_S)
        np.testing.assert_array_equal(np.array([1, 0, 2])[y], seen)


def test_a_gradual_drift_leaves_the_other_samples_as_they_are(world):
    clean, changed = script(world), script(world, Drift(effect="darkening", size=0.5, course="gradual", over_h=10))
    x, _ = clean.draw(2_000, 3 * HOUR_S)
    seen, _ = changed.draw(2_000, 3 * HOUR_S)
    same = (x == seen).all((1, 2, 3))
    assert same.mean() == pytest.approx(0.7, abs=0.04)
    np.testing.assert_allclose(seen[~same], x[~same] / 2, rtol=1e-6)


def test_an_incremental_drift_goes_through_all_sizes(world):
    clean, changed = script(world), script(world, Drift(effect="darkening", size=0.5, course="incremental", over_h=10))
    for hour, factor in ((0, 1), (4, 0.8), (10, 0.5), (50, 0.5)):
        np.testing.assert_allclose(
            changed.draw(5, hour * HOUR_S)[0], clean.draw(5, hour * HOUR_S)[0] * np.float32(factor), rtol=1e-6
        )


def test_a_change_that_knows_no_half_measures_comes_to_more_and_more_samples(rows):
    changed = script(rows, Drift(effect="dead", columns=("u",), course="incremental", over_h=10))
    x, _ = changed.draw(3_000, 4 * HOUR_S)
    assert (x[:, 1] == 0).mean() == pytest.approx(0.4, abs=0.03)
    assert (x[:, [0, 2]] != 0).all()


def test_a_stuck_sensor_reads_what_it_once_read_for_ever(rows):
    changed = script(rows, Drift(effect="stuck", columns=("v", "t")))
    values = np.unique(np.concatenate([changed.draw(40, hour * HOUR_S)[0][:, [0, 2]] for hour in range(4)]), axis=0)
    assert len(values) == 1
    assert values[0] in rows.pool.x[:, [0, 2]]
    fixed = script(rows, Drift(effect="stuck", columns=("t",), size=4.5)).draw(9, 0)[0]
    assert (fixed[:, 0] == 4.5).all()


def test_labels_come_as_often_as_the_script_says(world):
    stream = script(world, Drift(effect="labels", labels={"c": 0.4}, course="incremental", at_h=10, over_h=10),
                    labels=("a", "b"))  # fmt: skip
    np.testing.assert_allclose(stream.shares(0), [0.5, 0.5, 0])
    np.testing.assert_allclose(stream.shares(15 * HOUR_S), [0.4, 0.4, 0.2])
    np.testing.assert_allclose(stream.shares(90 * HOUR_S), [0.3, 0.3, 0.4])
    _, y = stream.draw(6_000, 90 * HOUR_S)
    np.testing.assert_allclose(np.bincount(y) / 6_000, [0.3, 0.3, 0.4], atol=0.03)
    assert set(stream.draw(500, 0)[1]) == {0, 1}


@hypothesis.example(shares={"a": 0.0, "b": 0.0, "c": 5e-324}, hour=11.0, few=False)
@given(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1 / 3)), st.floats(0, 60), st.booleans())
def test_shares_of_labels_always_add_up(shares, hour, few):
    pool = Pool(np.zeros((6, 2), np.float32), np.arange(6, dtype=np.int64) % 3)
    world = World("made", pool, pool, pool, tuple("abc"), InputSpec(shape=[2]))
    drifts = [Drift(effect="labels", labels=shares, course="gradual", at_h=10, over_h=30)] if shares else []
    found = script(world, *drifts, labels=("a", "b") if few else None).shares(hour * HOUR_S)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)


def test_another_relation_gives_the_same_samples_other_labels(world):
    clean, changed = script(world), script(world, Drift(effect="relation", variant=1))
    (x, y), (same, other) = clean.draw(50, 0), changed.draw(50, 0)
    np.testing.assert_array_equal(x, same)
    np.testing.assert_array_equal((y + 1) % 3, other)


def test_numbers_grow_with_a_shift_by_the_spread_of_each_target(world):
    world = measured(world)
    wandering = Drift(effect="shift", size=2, course="incremental", at_h=10, over_h=10)
    for hour, grown in ((0, 0), (15, 1), (20, 2), (90, 2)):
        (x, y), (same, clean) = (script(world, *drifts).draw(50, hour * HOUR_S) for drifts in ([wandering], []))
        np.testing.assert_array_equal(x, same)
        np.testing.assert_allclose(y - clean, np.broadcast_to(grown * world.pool.y.std(axis=0), (50, 2)))


def test_numbers_change_for_a_share_of_the_samples_and_follow_other_relations(world):
    world = measured(world)
    half = script(world, Drift(effect="shift", course="gradual", at_h=0, over_h=10)).draw(400, 5 * HOUR_S)[1]
    clean = script(world).draw(400, 5 * HOUR_S)[1]
    assert (half != clean).any(axis=1).mean() == pytest.approx(0.5, abs=0.1)
    other = script(world, Drift(effect="relation", variant=1)).draw(400, HOUR_S)[1]
    np.testing.assert_array_equal(other[:, 0], (clean[:, 0] + 1) % 3)
    x, y = script(world).view(world.score, 0)
    np.testing.assert_array_equal(y, world.score.y)
    assert len(x) == 30


@pytest.mark.parametrize("effect", ["labels", "swap"])
def test_effects_on_labels_mean_nothing_to_numbers(world, effect):
    with pytest.raises(ValueError, match=rf"drift\[0\]: effect '{effect}' is for labels; .* numbers \(one, three\)"):
        script(measured(world), example(effect))


def test_a_view_shows_held_out_samples_as_they_look_then_and_draws_nothing(world):
    stream = script(world, Drift(effect="noise", size=0.2, at_h=5), labels=("a", "b"))
    x, y = stream.view(world.score, 0)
    assert set(y) == {0, 1}
    np.testing.assert_array_equal(x, world.score.only({0, 1}).x)
    seen, _ = stream.view(world.score, 6 * HOUR_S)
    assert seen.tobytes() == stream.view(world.score, 6 * HOUR_S)[0].tobytes() != x.tobytes()
    np.testing.assert_array_equal(stream.draw(5, 0)[1], script(world, labels=("a", "b")).draw(5, 0)[1])


@pytest.mark.parametrize("truths", ["labels", "numbers"])
@pytest.mark.parametrize("drifts", [True, False])
def test_a_script_never_touches_the_world(world, truths, drifts):
    world = measured(world) if truths == "numbers" else world
    before = world.pool.x.tobytes(), world.pool.y.tobytes()
    effects = [name for name, effect in EFFECTS.items() if effect.truths in ("", truths) and name != "labels"]
    stream = script(world, *(example(effect) for effect in effects if drifts))
    x, y = stream.draw(60, 0)
    x[:], y[:] = 0, 0
    stream.view(world.pool, 0)[0][:] = 0
    assert (world.pool.x.tobytes(), world.pool.y.tobytes()) == before


@pytest.mark.parametrize(
    ("drift", "says"),
    [
        (Drift(effect="rotation"), "images"),
        (Drift(effect="offset", columns=("w",)), r"drift\[1\]: no column 'w'; the data have t, u, v"),
        (Drift(effect="swap", cycle=("no", "maybe")), "no label 'maybe'; the data have no, yes"),
        (Drift(effect="labels", labels={"maybe": 0.1}), "no label 'maybe'"),
        (Drift(effect="relation"), "no relation 1; rows has none"),
        (
            Drift(effect="shift"),
            r"drift\[1\]: effect 'shift' is for numbers; the truths of rows are labels \(no, yes\)",
        ),
    ],
)
def test_a_drift_that_does_not_fit_the_world_is_refused_by_its_number(rows, drift, says):
    with pytest.raises(ValueError, match=says):
        script(rows, Drift(effect="noise"), drift)


def test_labels_that_the_data_do_not_have_are_refused(rows):
    with pytest.raises(ValueError, match="no label 'maybe'"):
        script(rows, labels=("maybe",))
