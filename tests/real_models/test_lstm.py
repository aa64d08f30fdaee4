"""A small LSTM served one time step at a time: its state goes in and comes out."""

import models
import numpy as np
import pytest
import torch

from edge_quantize.data import Dataset
from edge_quantize.export import export_onnx
from edge_quantize.graph import canonical_bytes
from edge_quantize.levels import assess
from edge_quantize.pack import pack_whole
from edge_sdk.manifest import StateSpec, verify_checkpoint
from edge_sdk.schema import InputSpec

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def net():
    return models.small_lstm()


@pytest.fixture(scope="module")
def graph(net):
    state = np.zeros((1, 2, models.LSTM_WIDTH), np.float32)
    return export_onnx(
        net,
        [np.zeros((2, models.MOTION_SHAPE[0]), np.float32), state, state],
        input_names=["sample", "hidden", "cell"],
        output_names=["probabilities", "next_hidden", "next_cell"],
        batch_axes={"hidden": 1, "cell": 1},
    )


def stepwise(session, windows):
    """Probabilities [N, 4] after the last step of windows [N, 6, T]."""
    state = [np.zeros((1, len(windows), models.LSTM_WIDTH), np.float32)] * 2
    for t in range(windows.shape[2]):
        probabilities, *state = session.run(None, {"sample": windows[:, :, t], "hidden": state[0], "cell": state[1]})
    return probabilities


def test_level_is_none_because_of_the_state(graph):
    found = assess(graph)
    assert found.level == "none"
    assert "'hidden', 'cell'" in found.reason


def test_export_keeps_batch_free_and_steps_equal_torch_on_whole_windows(net, graph, open_session):
    windows = models.basic_motions().test_x[:50]
    with torch.no_grad():
        expected = net.whole(torch.from_numpy(windows)).softmax(1).numpy()
    session = open_session(graph)
    together = stepwise(session, windows)
    alone = np.concatenate([stepwise(session, windows[i : i + 1]) for i in range(5)])
    assert np.allclose(together, expected, atol=1e-5)
    assert np.allclose(alone, expected[:5], atol=1e-5)


def test_it_knows_the_activities(graph, open_session):
    motions = models.basic_motions()
    said = stepwise(open_session(graph), motions.test_x).argmax(1)
    assert (said == motions.test_y).mean() >= 0.9


def test_device_follows_a_recording_sample_by_sample(net, graph, make_device, tmp_path):
    motions, folder = models.basic_motions(), tmp_path / "lstm-1"
    samples, rows = motions.test_x[:, :, 0], [1, models.LSTM_WIDTH]
    pack_whole(
        folder, fp32=canonical_bytes(graph), int8=None, data=Dataset(None, None, samples, motions.test_y),
        input_spec=InputSpec(shape=[6], name="sample", low=-60, high=60), name="motion-lstm", release=1,
        created="2026-01-01T00:00:00Z", task="classification", labels=models.MOTIONS,
        state=[
            StateSpec("hidden", "next_hidden", [1, *rows]),
            StateSpec("cell", "next_cell", [1, *rows]),
        ],
    )  # fmt: skip
    assert verify_checkpoint(folder).adapt == "none"
    device = make_device(checkpoint=folder, variant="auto")
    for window, y in list(zip(motions.test_x, motions.test_y, strict=True))[::60]:
        state = None
        for sample in window.T:
            prediction = device.predict(sample, state=state)
            state = prediction.state
        with torch.no_grad():
            expected = net.whole(torch.from_numpy(window[None])).softmax(1).numpy()[0]
        assert set(state) == {"hidden", "cell"}
        assert np.allclose(prediction.probabilities, expected, atol=1e-5)
        assert prediction.label == models.MOTIONS[expected.argmax()]
        assert expected.argmax() == y
