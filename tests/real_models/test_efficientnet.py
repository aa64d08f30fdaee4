"""EfficientNet-Lite0 with its ImageNet weights.

Photos of scikit-image have no ImageNet labels: FP32's own first choice is what INT8 is compared with. Ranges are
calibrated on photos that no test crop comes from.
"""

from collections import Counter

import models
import numpy as np
import onnx
import pytest

from edge_quantize.data import Dataset
from edge_quantize.export import check_parity
from edge_quantize.levels import assess
from edge_quantize.pack import pack_checkpoint
from edge_quantize.quantize import quantize_whole
from edge_sdk.head import Head, dequantize
from edge_sdk.manifest import TRUNK_FP32, TRUNK_INT8, verify_checkpoint
from edge_sdk.schema import InputSpec
from edge_sdk.stats import wilson_interval

pytestmark = pytest.mark.torch
ESPRESSO, CATS = 967, range(281, 286)


def agreement(logits, reference):
    """Share of rows with the same first choice, and its 95 % confidence interval."""
    same = logits.argmax(1) == reference.argmax(1)
    return float(same.mean()), *wilson_interval(int(same.sum()), len(same))


def test_no_photo_is_both_calibrated_and_tested_on():
    assert not set(models.PHOTOS["calibration"]) & set(models.PHOTOS["test"])
    assert all(len(photos) >= 8 for photos in models.PHOTOS.values())


def test_crops_are_the_same_in_every_run_and_differ_from_each_other():
    crops = models.photo_crops("test", 24)
    assert crops.shape == (24, 3, 224, 224)
    assert crops.dtype == np.float32
    assert -1 <= crops.min() < crops.max() <= 1
    assert np.array_equal(crops, models.photo_crops("test", 24))
    assert len({crop.tobytes() for crop in crops}) == 24


def test_weights_know_a_cat_and_a_cup_of_espresso(lite0):
    names = models.photo_labels()
    guesses, photos = lite0.fp32_logits.argmax(1), models.photo_numbers("test", len(lite0.crops))
    assert np.mean(np.isin(guesses[photos == names.index("chelsea")], CATS)) > 0.9
    assert np.mean(guesses[photos == names.index("coffee")] == ESPRESSO) > 0.9


def test_split_cuts_at_the_pooled_features_and_computes_what_torch_does(lite0):
    assert (lite0.parts.latent_dim, lite0.parts.outputs) == (1280, 1000)
    assert set(lite0.parts.weights) == {"W0", "b0"}
    check_parity(models.efficientnet(), lite0.parts, lite0.crops[:16])


def test_level_is_head(lite0):
    found = assess(lite0.graph)
    assert found.level == "head", found.reason
    assert found.cut == lite0.parts.cut
    assert not found.not_quantizable


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_trunk_and_head_equal_the_fused_graph_bit_for_bit(lite0, assert_fused_equals_parts, method):
    batches = (1, 7, 32) if method == "minmax" else (1, 7)
    assert_fused_equals_parts(lite0.trunks[method], lite0.head, lite0.crops[:32], batches=batches)


def test_every_layer_but_the_pooling_computes_in_integers(lite0, open_session, tmp_path):
    path = tmp_path / "optimized.onnx"
    open_session(lite0.trunks["minmax"].int8, optimized_model_filepath=str(path))
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert ops["QLinearConv"] == 49
    assert ops["QLinearAdd"] == 9
    assert not {"Conv", "FusedConv", "Clip", "Add"} & set(ops)
    assert ops["DequantizeLinear"] <= 1


def test_int8_takes_at_most_29_percent_of_the_bytes(lite0):
    for trunks in lite0.trunks.values():
        assert len(trunks.int8) <= 0.29 * len(trunks.fp32)


def test_int8_with_its_dense_layer_is_as_small_and_agrees(lite0, run_rows):
    whole = quantize_whole(lite0.graph, models.photo_crops("calibration", 32))
    assert len(whole) <= 0.29 * lite0.graph.ByteSize()
    share, low, high = agreement(run_rows(whole, lite0.crops[:256]), lite0.fp32_logits[:256])
    assert share >= 0.75, (low, high)


def test_fp32_with_a_latent_of_eight_bits_still_says_what_the_network_says(lite0, run_rows):
    share, _, _ = agreement(run_rows(lite0.graph, lite0.crops[:128]), lite0.fp32_logits[:128])
    assert share >= 0.95


def test_every_recipe_agrees_with_float_and_the_default_as_well_as_the_best(lite0):
    assert len(lite0.crops) >= 500
    found = {method: agreement(lite0.logits(method), lite0.fp32_logits) for method in lite0.trunks}
    assert all(share >= 0.78 for share, _, _ in found.values()), found
    best = max(found.values())
    assert found["minmax"][2] >= best[1], found  # the intervals overlap
    assert found["minmax"][0] >= best[1], found


def test_where_float_is_sure_int8_agrees(lite0):
    """Most disagreements are near ties: bricks, gravel and the moon are no ImageNet objects."""
    ranked = np.sort(lite0.fp32_logits, axis=1)
    margin = ranked[:, -1] - ranked[:, -2]
    sure = margin >= np.median(margin)
    share, _, _ = agreement(lite0.logits("minmax")[sure], lite0.fp32_logits[sure])
    assert share >= 0.92


def test_device_serves_it_with_a_head_of_its_own_and_learns_a_new_label(lite0, run_rows, make_device, tmp_path):
    """Which of eight photos a crop is from: true labels, but held-out crops are of the photos trained on."""
    trunks, labels, folder = lite0.trunks["minmax"], models.photo_labels(), tmp_path / "photos-1"
    train, held_out = models.photo_crops("test", 320, seed=2), models.photo_crops("test", 200, seed=3)
    train_y, held_out_y = (models.photo_numbers("test", len(crops)) for crops in (train, held_out))
    head = Head(models.dense_layer(dequantize(run_rows(trunks.int8, train), trunks.latent), train_y), tuple(labels))
    pack_checkpoint(
        folder, trunks=trunks, head=head, data=Dataset(train, train_y, held_out, held_out_y), name="photos", release=1,
        created="2026-01-01T00:00:00Z", input_spec=InputSpec(shape=[3, 224, 224], name="photo", low=-1, high=1),
    )  # fmt: skip
    manifest = verify_checkpoint(folder)
    assert manifest.latent.dim == 1280
    assert manifest.files[TRUNK_INT8].size <= 0.29 * manifest.files[TRUNK_FP32].size
    device = make_device(checkpoint=folder)
    said = [device.predict(crop).label for crop in held_out[:40]]
    assert np.mean([label == labels[i % 8] for i, label in enumerate(said)]) >= 0.9

    dahlias = models.photo_crops("calibration", 640, seed=4)[7::8]
    device.learn(dahlias[:60], ["dahlia"] * 60)
    device.learn_now()
    for _ in range(4):
        device.step()
    assert "dahlia" in device.labels
    assert device.evaluate(dahlias[60:], ["dahlia"] * 20) >= 0.8
    assert device.evaluate(held_out[:80], [labels[y] for y in held_out_y[:80]]) >= 0.9
