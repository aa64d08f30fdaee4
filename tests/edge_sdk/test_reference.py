"""What the monitors compare with: ranks within the reference, what raw features were like, a file that keeps it."""

from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.drift.estimate import estimate
from edge_sdk.drift.features import input_features, names_of
from edge_sdk.drift.ranks import rank_channels
from edge_sdk.drift.reference import BINS, MIN_ROWS, Reference, output_channels, output_names
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes

NO_EDGES = np.zeros((0, 63), np.float32)


@pytest.fixture
def rows(rng):
    return rng.normal(size=(400, 6)).astype(np.float32)


@pytest.fixture
def probabilities(rng):
    return rng.dirichlet([1.0, 2.0, 3.0], size=400).astype(np.float32)


@pytest.fixture
def reference(rows, probabilities):
    return Reference.build(rows, probabilities, np.arange(100) % 10 > 0)


def test_ranks_of_the_reference_itself_are_uniform(rows):
    features = input_features(rows)
    edges = np.quantile(features, np.arange(1, BINS) / BINS, axis=0).T.astype(np.float32)
    channels = rank_channels(features, edges)
    assert channels.min() > 0
    assert channels.max() < 1
    np.testing.assert_allclose(channels.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(channels.std(axis=0), 12**-0.5, atol=0.01)


def test_mid_ranks_of_repeated_values_are_the_middle_of_their_run():
    edges = np.array([[0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]], np.float32)  # 8 bins
    values = np.array([[-1.0], [0.0], [0.5], [1.0], [2.0], [3.0]], np.float32)
    expected = np.array([[0.5], [2.0], [3.5], [4.0], [6.0], [7.5]]) / 8
    np.testing.assert_allclose(rank_channels(values, edges), expected)


def test_ranks_grow_with_the_value(rng, reference):
    column = np.sort(rng.normal(size=200)).astype(np.float32)
    features = np.repeat(column[:, None], reference.edges.shape[0], axis=1)
    assert (np.diff(rank_channels(features, reference.edges), axis=0) >= 0).all()


def test_output_channels_are_confidence_entropy_and_each_probability():
    p = np.array([[1.0, 0.0], [0.5, 0.5]], np.float32)
    np.testing.assert_allclose(
        output_channels(p, NO_EDGES, "classification"), [[1, 0, 1, 0], [0.5, 1, 0.5, 0.5]], atol=1e-9
    )
    assert output_names(("cat", "dog"), "classification") == [
        "confidence",
        "entropy",
        "probability of 'cat'",
        "probability of 'dog'",
    ]


def test_channels_stay_between_zero_and_one(probabilities, rng):
    channels = output_channels(probabilities, NO_EDGES, "classification")
    assert channels.min() >= 0
    assert channels.max() <= 1
    assert channels.shape == (400, 5)


def test_a_reference_describes_its_rows(rows, probabilities, reference):
    assert reference.edges.shape == (6, BINS - 1)
    np.testing.assert_allclose(reference.input_mean, 0.5, atol=0.02)
    np.testing.assert_allclose(reference.output_mean[2:], probabilities.mean(axis=0), rtol=1e-5)
    assert reference.output_std.shape == (5,)
    assert (reference.accuracy, reference.rows, reference.labelled) == (0.9, 400, 100)


def test_too_few_rows_are_refused(rows, probabilities):
    with pytest.raises(ValueError, match="at least 200 rows, got 199"):
        Reference.build(rows[: MIN_ROWS - 1], probabilities[: MIN_ROWS - 1], np.array([True]))
    Reference.build(rows[:MIN_ROWS], probabilities[:MIN_ROWS], np.array([True]))


def test_without_labels_the_accuracy_is_unknown(rows, probabilities):
    reference = Reference.build(rows, probabilities, np.array([], dtype=bool))
    assert np.isnan(reference.accuracy)
    assert reference.labelled == 0
    assert np.isnan(Reference.load(reference.to_bytes()).accuracy)


def test_a_reference_survives_saving(reference, tmp_path):
    path = tmp_path / "reference.npz"
    path.write_bytes(reference.to_bytes())
    for source in (path, reference.to_bytes()):
        loaded = Reference.load(source)
        for name, value in vars(reference).items():
            np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.to_bytes() == reference.to_bytes()
    assert isinstance(loaded.rows, int)


@pytest.mark.parametrize("field", ["edges", "names", "low", "input_mean", "output_std", "accuracy", "rows"])
def test_a_reference_that_lacks_a_field_is_refused(reference, field):
    arrays = load_npz(reference.to_bytes())
    del arrays[field]
    with pytest.raises(IntegrityError, match="reference is damaged"):
        Reference.load(npz_bytes(arrays))


def test_a_field_of_another_form_is_refused(reference):
    arrays = {**load_npz(reference.to_bytes()), "rows": np.array(["many"])}
    with pytest.raises(IntegrityError, match="reference is damaged"):
        Reference.load(npz_bytes(arrays))
    with pytest.raises(IntegrityError):
        Reference.load(reference.to_bytes()[:-40])


@pytest.mark.parametrize("field", ["edges", "names", "input_std", "missing", "output_mean", "latent_std"])
def test_a_reference_whose_fields_do_not_fit_each_other_is_refused(full, field):
    arrays = load_npz(full.to_bytes())
    arrays[field] = arrays[field][:-1]
    with pytest.raises(IntegrityError, match="do not fit each other"):
        Reference.load(npz_bytes(arrays))


# ---- what raw features were like


def test_features_are_described_in_their_own_unit():
    x = np.array([[20.0, 1.0], [22.0, np.nan], [22.0, 3.0], [24.0, np.nan]] * 50, np.float32)
    reference = Reference.from_rows(x, ["temperature", "load"])
    assert reference.names == ("temperature", "load")
    np.testing.assert_allclose(reference.feature_mean, [22, 2])
    np.testing.assert_allclose(reference.feature_std, [np.sqrt(2), 1], rtol=1e-6)
    np.testing.assert_array_equal(reference.low, [20, 1])
    np.testing.assert_array_equal(reference.high, [24, 3])
    np.testing.assert_array_equal(reference.missing, [0, 0.5])
    np.testing.assert_allclose(reference.repeats, [50 / 199, 0])
    assert np.isnan(Reference.from_rows(x, ["temperature", "load"], ordered=False).repeats).all()


def test_a_column_that_is_always_missing_has_no_range_but_is_watched():
    x = np.full((200, 1), np.nan, np.float32)
    reference = Reference.from_rows(x, ["gone"])
    assert np.isnan([reference.low, reference.high]).all()
    assert np.isfinite(reference.edges).all()
    back = rank_channels(np.ones((10, 1), np.float32), reference.edges)
    assert back.mean() > reference.input_mean[0] + 0.3


def test_categories_are_kept_if_they_are_few():
    x = np.zeros((200, 3), np.float32)
    reference = Reference.from_rows(x, ["a", "b", "c"], categories={"a": [2, 0, 1, 1], "c": range(65)})
    np.testing.assert_array_equal(reference.values, [[0, 1, 2], [np.nan] * 3, [np.nan] * 3])
    assert Reference.from_rows(x, ["a", "b", "c"]).values.shape == (3, 1)
    with pytest.raises(ValueError, match="no feature is called d"):
        Reference.from_rows(x, ["a", "b", "c"], categories={"d": [1]})


def test_a_reference_of_a_table_watches_inputs_alone(rows):
    reference = Reference.from_rows(rows, [f"sensor {i}" for i in range(6)])
    assert (reference.output_mean.size, reference.labelled, reference.latent) == (0, 0, None)
    assert Reference.load(reference.to_bytes()).to_bytes() == reference.to_bytes()
    with pytest.raises(ValueError, match="2 names for 6 features"):
        Reference.from_rows(rows, ["a", "b"])
    with pytest.raises(ValueError, match="at least 200 rows, got 150"):
        Reference.from_rows(rows[:150], ["a"] * 6)


def test_features_without_names_are_numbered(rows, probabilities, reference):
    assert reference.names == names_of((6,))
    assert Reference.build(rows, probabilities, np.array([]), names="uvwxyz").names == tuple("uvwxyz")


def test_few_rows_are_used_with_a_caveat(rows, probabilities):
    few = Reference.build(rows[:250], probabilities[:250], np.array([]))
    assert "250 rows" in few.caveat
    assert "2.0 times" in few.caveat
    many = Reference.build(np.tile(rows, (3, 1)), np.tile(probabilities, (3, 1)), np.array([]))
    assert many.caveat == ""


def test_the_digest_tells_references_apart(rows, probabilities, reference):
    assert len(reference.digest) == 16
    assert Reference.load(reference.to_bytes()).digest == reference.digest
    moved = Reference.build(rows + np.float32(0.1), probabilities, np.array([]))
    renamed = Reference.build(rows, probabilities, np.array([]), names="uvwxyz")
    assert len({reference.digest, moved.digest, renamed.digest}) == 3


# ---- what may be absent: latent, classes, confidence table, loss


@pytest.fixture
def full(rows, probabilities, rng):
    latents = rng.integers(0, 256, (400, 20), dtype=np.uint8)
    return Reference.build(rows, probabilities, np.arange(400) % 10 > 0, latents=latents)


OPTIONAL = ("latent", "class_", "confidence_table", "loss_")


def test_a_reference_without_the_optional_parts_still_loads(full):
    arrays = {name: array for name, array in load_npz(full.to_bytes()).items() if not name.startswith(OPTIONAL)}
    bare = Reference.load(npz_bytes(arrays))
    assert bare.latent is None
    assert (bare.latent_mean.size, bare.class_share.size, bare.class_means.size) == (0, 0, 0)
    assert bare.confidence_table.shape == (2, 0)
    assert np.isnan(bare.loss_scale)
    assert Reference.load(bare.to_bytes()).to_bytes() == bare.to_bytes()


def test_the_latent_survives_saving(full, rng):
    latents = rng.integers(0, 256, (5, 20), dtype=np.uint8)
    loaded = Reference.load(full.to_bytes())
    np.testing.assert_array_equal(loaded.latent.channels(latents), full.latent.channels(latents))
    assert loaded.to_bytes() == full.to_bytes()


def test_classes_are_described_by_the_rows_of_which_they_were_predicted(full, rows, probabilities):
    chosen = probabilities.argmax(axis=1)
    np.testing.assert_allclose(full.class_share, np.bincount(chosen, minlength=3) / 400)
    assert full.class_means.shape == (3, 6 + 5 + 32)
    ranks = rank_channels(rows, full.edges)
    np.testing.assert_allclose(full.class_means[1, :6], ranks[chosen == 1].mean(axis=0), rtol=1e-5)
    whole = full.class_share @ full.class_means
    np.testing.assert_allclose(whole, [*full.input_mean, *full.output_mean, *full.latent_mean], rtol=1e-5)


def test_a_class_that_was_never_predicted_has_the_mean_of_all(rows):
    scores = np.tile(np.float32([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0]]), (200, 1))
    reference = Reference.build(rows, scores, np.array([]))
    assert reference.class_share[2] == 0
    np.testing.assert_allclose(reference.class_means[2, :6], reference.input_mean, rtol=1e-6)


def test_too_many_classes_are_not_described(rows, rng):
    reference = Reference.build(rows, rng.dirichlet(np.ones(65), 400).astype(np.float32), np.array([]))
    assert reference.class_share.size == reference.class_means.size == 0


def test_the_confidence_table_gives_the_accuracy_of_the_reference(full, probabilities):
    assert estimate(full.confidence_table, probabilities.max(axis=1)) == pytest.approx(full.accuracy, abs=1e-6)


def test_the_scale_of_a_regressions_loss_is_kept(rows, rng):
    losses = rng.exponential(size=400)
    reference = Reference.build(rows, rng.random((400, 1)), np.array([]), task="regression", losses=losses)
    scale = np.quantile(losses, 0.95)
    assert reference.loss_scale == pytest.approx(scale)
    assert reference.loss_mean == pytest.approx(np.minimum(losses / scale, 1).mean())
    loaded = Reference.load(reference.to_bytes())
    assert (loaded.loss_scale, loaded.loss_mean) == (reference.loss_scale, reference.loss_mean)


def test_a_reference_of_64_features_and_a_latent_of_128_is_small(rng):
    latents = rng.integers(0, 256, (300, 128), dtype=np.uint8)
    scores = rng.dirichlet(np.ones(10), 300).astype(np.float32)
    x = rng.normal(size=(300, 64)).astype(np.float32)
    assert len(Reference.build(x, scores, np.ones(300, bool), latents=latents).to_bytes()) <= 43_000


# ---- inputs with missing values


def test_a_column_with_missing_values_is_still_watched(rng, probabilities):
    """One NaN would otherwise make every quantile of its column NaN, and the monitor blind to it for good."""

    def rows_with(share, shift=0.0, count=400):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        x[:, 1] += shift
        x[rng.random(count) < share, 1] = np.nan
        return x

    reference = Reference.build(rows_with(0.3), probabilities, np.array([True]))
    assert np.isfinite(reference.edges).all()
    assert reference.input_std[1] > 0.2

    def shift_of(x):
        return rank_channels(input_features(x), reference.edges).mean(axis=0)[1] - reference.input_mean[1]

    assert abs(shift_of(rows_with(0.3, count=4000))) < 0.05
    assert shift_of(rows_with(0.3, shift=2.0)) > 0.15
    assert shift_of(rows_with(0.9)) < -0.15  # more are missing than before


# ---- other tasks than classification


def test_outputs_of_a_multi_label_model_are_means_over_labels_and_each_probability():
    p = np.array([[1.0, 0.0, 1.0], [0.5, 0.5, 0.5], [0.9, 0.5, 0.2]], np.float32)
    channels = output_channels(p, NO_EDGES, "multilabel")
    np.testing.assert_allclose(channels[:, 0], [1, 0.5, (0.9 + 0.5 + 0.8) / 3], rtol=1e-6)
    doubt = [-(q * np.log2(q) + (1 - q) * np.log2(1 - q)) for q in (0.9, 0.5, 0.2)]
    np.testing.assert_allclose(channels[:, 1], [0, 1, np.mean(doubt)], atol=1e-6)
    np.testing.assert_allclose(channels[:, 2:], p)
    assert output_names(("a", "b", "c"), "multilabel")[:3] == ["confidence", "entropy", "probability of 'a'"]


@pytest.mark.parametrize(
    ("task", "labels", "width"),
    [("regression", ("x", "y"), 2), ("raw", (), 5), ("multilabel", ("a", "b", "c", "d"), 4)],
)
def test_a_reference_of_any_task_describes_its_rows_and_survives_saving(rows, rng, task, labels, width):
    scores = rng.random((400, width)).astype(np.float32)
    reference = Reference.build(rows, scores, np.array([True, False]), task=task)
    channels = output_channels(scores, reference.output_edges, task)
    assert channels.shape == (400, len(output_names(labels, task)))
    assert channels.min() >= 0
    assert channels.max() <= 1
    np.testing.assert_allclose(reference.output_mean, channels.mean(axis=0))
    np.testing.assert_allclose(reference.output_std, channels.std(axis=0))
    assert reference.output_edges.shape == ((0 if task == "multilabel" else width), BINS - 1)
    loaded = Reference.load(reference.to_bytes())
    assert loaded.task == task
    for name, value in vars(reference).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_values_are_watched_by_rank_whatever_their_unit(rows, rng, scale):
    values = (rng.normal(size=(400, 1)) * scale).astype(np.float32)
    reference = Reference.build(rows, values, np.array([]), task="regression")
    np.testing.assert_allclose(reference.output_mean, 0.5, atol=0.01)
    moved = output_channels(values + np.float32(scale), reference.output_edges, "regression")
    assert moved.mean() > 0.7


def test_an_output_that_never_changes_stands_in_the_middle_until_it_does(rows):
    scores = np.tile(np.float32([1, 0, 1, 1, 100]), (400, 1))
    reference = Reference.build(rows, scores, np.array([]), task="raw")
    np.testing.assert_array_equal(reference.output_mean, [0.5] * 5)
    np.testing.assert_array_equal(reference.output_std, [0] * 5)
    more = output_channels(scores + np.float32([0, 0, 0, 0, 1]), reference.output_edges, "raw")
    assert (more[:, 4] > 0.9).all()
    np.testing.assert_array_equal(more[:, :4], 0.5)


def test_an_unknown_task_is_refused(reference):
    arrays = {**load_npz(reference.to_bytes()), "task": np.array("divination")}
    with pytest.raises(IntegrityError, match="reference is damaged"):
        Reference.load(npz_bytes(arrays))


def test_devices_of_a_process_share_a_reference_and_its_table_of_edges(rows, tmp_path):
    reference = Reference.from_rows(rows, names_of(rows.shape[1:]))
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path in paths:
        path.write_bytes(reference.to_bytes())
    first, second = (Reference.load(path) for path in paths)
    assert first is second
    assert replace(first, accuracy=0.5).ranker is reference.ranker


def test_an_unreadable_reference_is_named(tmp_path):
    with pytest.raises(IntegrityError, match=r"gone\.npz"):
        Reference.load(tmp_path / "gone.npz")
