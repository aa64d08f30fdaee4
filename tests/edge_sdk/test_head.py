"""The head: its arithmetic, how it grows, and what it refuses to be."""

from itertools import pairwise

import numpy as np
import pytest

from edge_sdk.errors import IncompatibleError, IntegrityError
from edge_sdk.files import npz_bytes
from edge_sdk.head import Head, dequantize, layer_inputs, logits, sigmoid, softmax
from edge_sdk.manifest import LatentSpec


def make_head(rng, *widths, labels=None):
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(size=(inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=outputs).astype(np.float32)
    return Head(weights, tuple(labels or (str(i) for i in range(widths[-1]))))


def test_dequantize_reads_latents_as_onnx_does():
    latents = np.array([[0, 3, 255]], dtype=np.uint8)
    values = dequantize(latents, LatentSpec(dim=3, scale=0.5, zero_point=3))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-1.5, 0.0, 126.0]])


def test_softmax_is_a_distribution_even_for_huge_logits():
    p = softmax(np.array([[1000.0, 0.0, -1000.0], [1.0, 1.0, 1.0]], np.float32))
    np.testing.assert_allclose(p, [[1, 0, 0], [1 / 3] * 3], atol=1e-6)
    assert p.dtype == np.float32


def test_softmax_does_not_change_with_a_constant_added(rng):
    logits = rng.normal(size=(5, 4))
    np.testing.assert_allclose(softmax(logits), softmax(logits + 7), rtol=1e-9)


def test_logits_of_a_linear_head_and_of_one_with_hidden_layers(rng):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    linear = make_head(rng, 4, 3)
    np.testing.assert_allclose(linear.logits(x), x @ linear.weights["W0"] + linear.weights["b0"])

    deep = make_head(rng, 4, 5, 3)
    hidden = np.maximum(x @ deep.weights["W0"] + deep.weights["b0"], 0)
    expected = hidden @ deep.weights["W1"] + deep.weights["b1"]
    np.testing.assert_allclose(deep.logits(x), expected, rtol=1e-5)
    np.testing.assert_array_equal(deep.predict(x), expected.argmax(axis=1))
    assert (deep.depth, deep.latent_dim, deep.logits(x).dtype) == (2, 4, np.float32)


@pytest.mark.parametrize("widths", [(4, 3), (4, 6, 3), (4, 6, 5, 3)], ids=str)
def test_the_last_layer_can_be_seen_apart_from_those_before_it(rng, widths):
    head, x = make_head(rng, *widths), rng.normal(size=(7, 4)).astype(np.float32)
    inputs = layer_inputs(head.weights, x)
    assert [given.shape for given in inputs] == [(7, width) for width in widths[:-1]]
    np.testing.assert_array_equal(inputs[0], x)
    assert all((given >= 0).all() for given in inputs[1:])
    np.testing.assert_array_equal(head.hidden(x), inputs[-1])
    np.testing.assert_array_equal(logits(head.weights, head.hidden(x)), head.logits(x))


@pytest.mark.parametrize("widths", [(4, 3), (4, 6, 3)], ids=str)
def test_a_head_with_another_last_layer_keeps_the_others_and_leaves_the_old_one_as_it_was(rng, widths):
    head, x = make_head(rng, *widths), rng.normal(size=(7, 4)).astype(np.float32)
    before = {key: value.copy() for key, value in head.weights.items()}
    w, b = rng.normal(size=(widths[-2], 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    other = head.with_last(w, b)
    np.testing.assert_array_equal(other.hidden(x), head.hidden(x))
    np.testing.assert_array_equal(other.logits(x), head.hidden(x) @ w + b)
    assert other.labels == head.labels
    for key, value in before.items():
        np.testing.assert_array_equal(head.weights[key], value)
    with pytest.raises(IntegrityError, match=r"shapes do not fit|one output for each"):
        head.with_last(w[:, :-1], b)


def test_sigmoid_neither_overflows_nor_leaves_its_range():
    p = sigmoid(np.array([[-1e30, -20.0, 0.0, 20.0, 1e30]], np.float32))
    np.testing.assert_allclose(p, [[0, 0, 0.5, 1, 1]], atol=1e-6)
    assert p.dtype == np.float32
    assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("widths", [(4, 3), (4, 6, 3)])
def test_a_grown_head_says_the_same_of_what_it_knew_and_holds_new_labels_unlikely(rng, widths):
    head = make_head(rng, *widths, labels=("a", "b", "c"))
    grown = head.grown(["a", "b", "c", "d", "e"])
    x = rng.normal(size=(20, 4)).astype(np.float32)
    np.testing.assert_array_equal(grown.logits(x)[:, :3], head.logits(x))
    assert grown.labels == ("a", "b", "c", "d", "e")
    last = head.depth - 1
    assert (grown.weights[f"b{last}"][3:] < head.weights[f"b{last}"].min()).all()
    assert not grown.weights[f"W{last}"][:, 3:].any()
    assert grown.logits(x).dtype == np.float32


def test_growing_by_nothing_changes_nothing(rng):
    head = make_head(rng, 4, 3, labels=("a", "b", "c"))
    assert head.grown(("a", "b", "c")) is head


@pytest.mark.parametrize("labels", [["b", "a", "c", "d"], ["a", "b"], ["a", "b", "x", "c"], []])
def test_a_head_grows_only_at_its_end(rng, labels):
    with pytest.raises(IncompatibleError, match="first and in order"):
        make_head(rng, 4, 3, labels=("a", "b", "c")).grown(labels)


def test_growing_leaves_the_head_as_it_was(rng):
    head = make_head(rng, 4, 3, labels=("a", "b", "c"))
    before = {key: value.copy() for key, value in head.weights.items()}
    head.grown(["a", "b", "c", "d"])
    for key, value in before.items():
        np.testing.assert_array_equal(head.weights[key], value)


@pytest.mark.parametrize("labels", [("0", "1", "2"), ("null", "ÿ", "a long label\nwith a line")])
def test_a_head_survives_saving(rng, tmp_path, labels):
    head = make_head(rng, 4, 5, 3, labels=labels)
    path = tmp_path / "head.npz"
    path.write_bytes(head.to_bytes())
    for source in (path, head.to_bytes()):
        loaded = Head.load(source)
        assert loaded.labels == labels
        assert loaded.weights.keys() == head.weights.keys()
        for key, value in head.weights.items():
            np.testing.assert_array_equal(loaded.weights[key], value)
    assert loaded.to_bytes() == head.to_bytes()


W, B = np.zeros((4, 3), np.float32), np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "one output for each"),
        ({"W0": W, "b0": np.zeros(2, np.float32)}, "shapes do not fit"),
        ({"W0": W[0], "b0": B}, "shapes do not fit"),
        ({"W0": W, "b1": B}, "layer 0 of the head is missing"),
        ({"W0": W, "b0": B, "W2": W, "b2": B}, "layer 1 of the head is missing"),
        ({"W0": W, "b0": B, "W1": W, "b1": B}, "layer 1 of the head takes 4 values, the layer before gives 3"),
        ({"W0": W, "b0": B, "W1": np.zeros((3, 2)), "b1": np.zeros(2)}, "one output for each of 3 labels"),
        ({"W0": W + np.nan, "b0": B}, "NaN or infinity"),
        ({"W0": W, "b0": B - np.inf}, "NaN or infinity"),
    ],
)
def test_layers_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(IntegrityError, match=message):
        Head(weights, ("a", "b", "c"))
    with pytest.raises(IntegrityError, match=message):
        Head.load(npz_bytes({**weights, "labels": np.array(["a", "b", "c"])}))


@pytest.mark.parametrize(
    "arrays",
    [
        {"W0": W, "b0": B},
        {"W0": W, "b0": B, "labels": np.array("abc")},
        {"W0": np.full((4, 3), "x"), "b0": B, "labels": np.array(["a", "b", "c"])},
    ],
    ids=["no labels", "labels without a dimension", "weights of text"],
)
def test_a_file_that_is_not_a_head_is_refused(arrays):
    with pytest.raises(IntegrityError):
        Head.load(npz_bytes(arrays))


def test_a_surplus_array_is_refused():
    with pytest.raises(IntegrityError):
        Head({"W0": W, "b0": B, "extra": B}, ("a", "b", "c"))
