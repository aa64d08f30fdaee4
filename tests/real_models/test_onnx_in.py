"""ONNX files made by others, served whole: magika (one input of tokens) and silero-vad (explicit state)."""

import models
import numpy as np
import pytest
from magika import Magika

from edge_quantize.data import Dataset
from edge_quantize.graph import canonical_bytes, load_onnx
from edge_quantize.levels import assess
from edge_quantize.pack import pack_whole
from edge_quantize.quantize import QuantRecipe, named, quantize_whole
from edge_sdk.manifest import MODEL_FP32, MODEL_INT8, StateSpec, verify_checkpoint
from edge_sdk.schema import InputSpec

HEAVY = ("Conv", "MatMul")
FRAMES = 240
CREATED = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def files():
    """What is on every machine: files of many kinds out of installed packages."""
    return [path.read_bytes() for path in models.installed_files(320)]


@pytest.fixture(scope="module")
def tokens(files):
    return np.stack([models.magika_tokens(content) for content in files])


@pytest.fixture(scope="module")
def magika():
    return load_onnx(models.magika_onnx())


@pytest.fixture(scope="module")
def own_labels(files):
    """What the package's own interface says about each file."""
    magika = Magika()
    return [str(magika.identify_bytes(content).prediction.dl.label) for content in files]


@pytest.fixture(scope="module")
def int8(magika, tokens):
    """Quantized but for its normalisation, calibrated on every fourth file."""
    graph = named(magika)
    light = tuple(node.name for node in graph.graph.node if node.op_type not in HEAVY)
    return quantize_whole(graph, tokens[::4], QuantRecipe(float_nodes=light))


@pytest.fixture(scope="module")
def held_out(tokens):
    """Positions of the files that nothing was calibrated on."""
    return np.setdiff1d(np.arange(len(tokens)), np.arange(0, len(tokens), 4))


def test_magika_is_served_whole_and_the_reason_names_the_last_node(magika):
    found = assess(magika)
    assert found.level == "none"
    assert "'target_label' ends in Div" in found.reason
    assert [(value.dtype, value.shape[1:]) for value in found.inputs] == [("int32", (2048,))]


def test_magika_says_what_its_own_package_says(magika, tokens, own_labels, run_rows):
    labels = models.magika_labels()
    probabilities = run_rows(magika, tokens)
    assert probabilities.shape == (len(tokens), len(labels))
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert len(set(own_labels)) >= 15
    assert [labels[i] for i in probabilities.argmax(1)] == own_labels


def test_magika_in_int8_agrees_when_normalisation_stays_in_float(magika, int8, tokens, held_out, run_rows):
    x = tokens[held_out]
    assert (run_rows(int8, x).argmax(1) == run_rows(magika, x).argmax(1)).mean() >= 0.95
    assert len(int8) <= 0.29 * models.magika_onnx().stat().st_size


def test_device_serves_magika_and_says_what_its_own_package_says(
    magika, int8, tokens, own_labels, held_out, make_device, tmp_path
):
    labels, folder = models.magika_labels(), tmp_path / "magika-1"
    truth = np.array([labels.index(label) for label in own_labels])
    pack_whole(
        folder, fp32=canonical_bytes(magika), int8=int8, data=Dataset(None, None, tokens[held_out], truth[held_out]),
        input_spec=InputSpec(shape=[2048], name="bytes", dtype="int32", low=0, high=256), name="magika", release=1,
        created=CREATED, task="classification", labels=labels,
    )  # fmt: skip
    manifest = verify_checkpoint(folder)
    assert (manifest.adapt, manifest.task, manifest.learns) == ("none", "classification", False)
    assert {MODEL_FP32, MODEL_INT8} <= set(manifest.files)
    device = make_device(checkpoint=folder, variant="fp32")
    for i in held_out[::10]:
        said = device.predict(tokens[i], id=str(i))
        assert said.label == own_labels[i]
        assert said.probabilities.sum() == pytest.approx(1, abs=1e-5)
        device.observe(str(i), own_labels[i])
    device.step()
    quick = make_device("int8", checkpoint=folder, variant="int8")
    same = [p.label == own_labels[i] for p, i in zip(quick.predict_batch(tokens[held_out]), held_out, strict=True)]
    assert np.mean(same) >= 0.95


def test_silero_is_served_whole_because_it_carries_state():
    found = assess(load_onnx(models.silero_onnx()))
    assert found.level == "none"
    assert "recurrent state" in found.reason
    assert {value.name: value.shape for value in found.inputs} == {"input": (1, 576), "state": (2, 1, 128)}


def test_silero_frame_by_frame_equals_the_whole_recording(open_session):
    audio = models.audio_frames(FRAMES)
    step, whole = (open_session(load_onnx(path)) for path in (models.silero_onnx(), models.silero_sequence_onnx()))
    state, said = np.zeros((2, 1, 128), np.float32), []
    for frame in audio:
        probability, state = step.run(None, {"input": frame[None], "state": state})
        said.append(probability[0, 0])
    start = np.zeros((1, 1, 128), np.float32)
    expected = whole.run(["speech_probs"], {"input": audio, "h": start, "c": start})[0]
    assert np.allclose(said, expected, atol=1e-6)
    assert max(said) > 0.5 > min(said)


def test_device_carries_sileros_state_from_frame_to_frame(make_device, open_session, tmp_path):
    graph, audio, folder = load_onnx(models.silero_onnx()), models.audio_frames(FRAMES), tmp_path / "silero-1"
    pack_whole(
        folder, fp32=canonical_bytes(graph), int8=None, data=Dataset(None, None, audio, None),
        input_spec=InputSpec(shape=[576], name="input", low=-1, high=1), name="silero-vad", release=1, created=CREATED,
        state=[StateSpec("state", "stateN", [2, 1, 128])],
    )  # fmt: skip
    manifest = verify_checkpoint(folder)
    assert (manifest.adapt, manifest.task, manifest.labels) == ("none", "raw", [])
    device = make_device(checkpoint=folder, variant="auto")
    said, state = [], None
    for frame in audio[:60]:
        prediction = device.predict(frame, state=state)
        state = prediction.state
        said.append(float(prediction.outputs["output"][0]))
    start = np.zeros((1, 1, 128), np.float32)
    whole = open_session(load_onnx(models.silero_sequence_onnx()))
    expected = whole.run(["speech_probs"], {"input": audio[:60], "h": start, "c": start})[0]
    assert np.allclose(said, expected, atol=1e-6)
    assert float(device.predict(audio[59]).outputs["output"][0]) != pytest.approx(said[59], abs=1e-3)
