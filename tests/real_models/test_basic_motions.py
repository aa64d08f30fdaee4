"""An MLP and a 1-D conv net on aeon's BasicMotions; see `models.basic_motions` for how it is split and enlarged."""

from dataclasses import dataclass

import models
import numpy as np
import pytest

from edge_quantize.build import build_checkpoint
from edge_quantize.compare import compare_variants
from edge_quantize.data import Dataset
from edge_quantize.export import export_onnx
from edge_quantize.graph import split
from edge_quantize.levels import assess
from edge_quantize.quantize import Trunks
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, Manifest, verify_checkpoint
from edge_sdk.schema import InputSpec

pytestmark = pytest.mark.torch
NETS = {"mlp": models.motion_mlp, "conv": models.motion_conv}
SPEC = InputSpec(shape=list(models.MOTION_SHAPE), name="motion", low=-60, high=60)


@dataclass(frozen=True)
class Packed:
    """A checkpoint and what it was made from."""

    folder: object
    manifest: Manifest
    graph: object


@pytest.fixture(scope="module")
def motions():
    return models.basic_motions()


@pytest.fixture(scope="module", params=NETS)
def packed(request, motions, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "motions-1"
    net = NETS[request.param]()
    data = Dataset(motions.train_x, motions.train_y, motions.test_x, motions.test_y)
    build_checkpoint(
        net, data, labels=models.MOTIONS, name="motions", release=1, target=folder, created="2026-01-01T00:00:00Z",
        input_spec=SPEC,
    )  # fmt: skip
    return Packed(folder, verify_checkpoint(folder), export_onnx(net, motions.train_x[:2]))


def test_no_recording_is_both_trained_and_tested_on(motions):
    assert not set(motions.train_recording) & set(motions.test_recording)
    assert len(set(motions.train_recording)) == len(set(motions.test_recording)) == 40
    assert np.bincount(motions.train_y).min() >= 40
    assert len(motions.test_y) >= 200


def test_training_gives_the_same_network_every_time():
    first, second = models.motion_conv(), models.motion_conv()
    for name, value in first.state_dict().items():
        assert np.array_equal(value.numpy(), second.state_dict()[name].numpy()), name


def test_level_is_head_with_a_small_latent(packed):
    found = assess(packed.graph)
    assert found.level == "head", found.reason
    parts = split(packed.graph)
    assert parts.latent_dim == packed.manifest.latent.dim <= 128
    assert parts.outputs == len(models.MOTIONS)


def test_trunk_and_head_equal_the_fused_graph_bit_for_bit(packed, motions, assert_fused_equals_parts):
    trunks = Trunks.of_checkpoint(packed.folder, packed.manifest)
    assert_fused_equals_parts(trunks, Head.load(packed.folder / HEAD_NPZ), motions.test_x)


def test_int8_is_as_right_as_float_on_recordings_not_seen(packed, motions):
    result = compare_variants(packed.folder, motions.test_x, motions.test_y, repeats=5)
    assert result.fp32.accuracy.value >= 0.9
    assert result.int8.accuracy.value >= result.fp32.accuracy.value - 0.02
    assert result.agreement >= 0.97


def test_device_serves_it_and_says_the_activity(packed, motions, make_device):
    device = make_device(checkpoint=packed.folder)
    rows = range(0, len(motions.test_x), 11)
    said = [device.predict(motions.test_x[i]) for i in rows]
    assert np.mean([p.label == models.MOTIONS[motions.test_y[i]] for p, i in zip(said, rows, strict=True)]) >= 0.9
    batch = device.predict_batch(motions.test_x[:: rows.step])
    assert [p.label for p in batch] == [p.label for p in said]


def test_device_learns_the_activities_of_a_watch_worn_upside_down(packed, motions, make_device):
    """Two axes of each sensor change sign. What is learned on twenty recordings is scored on the other twenty."""
    turned = (motions.test_x * np.array([-1, -1, 1, -1, -1, 1], np.float32)[:, None]).astype(np.float32)
    names = np.array(models.MOTIONS)[motions.test_y]
    first = np.isin(motions.test_recording, np.unique(motions.test_recording)[::2])
    device = make_device(checkpoint=packed.folder)
    before = device.evaluate(turned[~first], list(names[~first]))
    device.learn(turned[first], list(names[first]))
    device.learn_now()
    for _ in range(4):
        device.step()
    assert before < 0.9
    assert device.evaluate(turned[~first], list(names[~first])) >= before + 0.05
    assert device.evaluate(motions.test_x, list(names)) >= 0.85
