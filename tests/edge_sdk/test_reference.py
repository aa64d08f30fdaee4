"""What the monitors compare with: features of any input, ranks within the reference, a file that keeps it."""

import numpy as np
import pytest

from edge_sdk.drift.features import MAX_FEATURES, input_features
from edge_sdk.drift.reference import (
    BINS,
    MIN_ROWS,
    Reference,
    output_channels,
    output_names,
    rank_channels,
)
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


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((6,), 6 + 2),
        ((62,), 62 + 2),
        ((63,), 62 + 2),
        ((1000,), 62 + 2),
        ((1, 8, 8), 16 + 4),
        ((3, 32, 48), 16 + 4),
        ((8, 8), 16 + 4),
        ((6, 100), 16 + 4),
        ((1, 100), 4 + 4),
        ((100, 1), 4 + 4),
        ((1, 1, 1), 1 + 4),
        ((1,), 1 + 2),
    ],
    ids=str,
)
def test_features_of_rows_images_and_windows(rng, shape, count):
    x = rng.normal(size=(5, *shape)).astype(np.float32)
    features = input_features(x)
    assert features.shape == (5, count)
    assert count <= MAX_FEATURES
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(input_features(x[2:3])[0], features[2])


def test_features_of_a_row_are_its_values_mean_and_spread():
    features = input_features(np.array([[1.0, 2.0, 6.0]], np.float32))
    np.testing.assert_allclose(features, [[1, 2, 6, 3, np.std([1, 2, 6])]], rtol=1e-6)


def test_features_of_an_image_are_a_grid_mean_spread_and_steps():
    image = np.repeat(np.repeat(np.arange(16.0).reshape(4, 4), 2, axis=0), 2, axis=1)[None, None].astype(np.float32)
    features = input_features(image)[0]
    np.testing.assert_allclose(features[:16], np.arange(16))
    np.testing.assert_allclose(features[16:], [7.5, image.std(), 12 / 7, 3 / 7], rtol=1e-5)


def test_noise_and_darkness_move_features(rng):
    images = rng.random((50, 1, 8, 8)).astype(np.float32)
    smooth = input_features(np.broadcast_to(images.mean(axis=(2, 3), keepdims=True), images.shape))
    assert (input_features(images)[:, -1] > smooth[:, -1]).all()
    assert (input_features(images * 0.5)[:, 16] < input_features(images)[:, 16]).all()


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
    assert reference.edges.shape == (8, BINS - 1)
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


@pytest.mark.parametrize("field", ["edges", "input_mean", "output_std", "accuracy", "rows"])
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
