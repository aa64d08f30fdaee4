"""One ONNX file of trunk and learned head: it says exactly what the device says."""

import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main
from edge_sdk.errors import IntegrityError, MissingExtraError
from edge_sdk.fuse import fuse
from edge_sdk.head import Head
from edge_sdk.installed import from_checkpoint, from_home, load
from edge_sdk.manifest import FileEntry, HeadSpec, LatentSpec, Manifest, TargetSpec
from edge_sdk.runtime import HeadSession, OnnxRuntime
from edge_sdk.schema import InputSpec, Scale
from edge_sdk.selftest import Choice, write_choice
from edge_sdk.slots import Slots

DIM = 6
SPEC = InputSpec(shape=[4], preprocess=[Scale([1.0], [2.0])])
FILES = {name: FileEntry(0, "0" * 64) for name in ("trunk.int8.onnx", "trunk.fp32.onnx")}
ENDS = {
    "classification": "probabilities = Softmax <axis = -1> (logits)",
    "multilabel": "probabilities = Sigmoid(logits)",
    "regression": "values = Identity(logits)",
}


def numbers(array):
    return ", ".join(repr(float(v)) for v in np.asarray(array).ravel())


@pytest.fixture
def make(tmp_path, rng):
    """Writes trunks and a head whose names clash, as in a checkpoint: `make("multilabel", hidden=5)`."""

    def write(task="classification", *, hidden=0, trunk_name="W0", ir_version=10):
        labels = ["a", "b", "c"]
        form = f'<ir_version: {ir_version}, opset_import: ["" : 20]>'
        quantize = "<float latent_scale = {0.05}, uint8 latent_zero_point = {100}"
        for variant in ("int8", "fp32"):
            weights = rng.normal(size=(4, DIM)).astype(np.float32)
            model = onnx.parser.parse_model(
                f"""{form} g (float[batch, 4] x) => (uint8[batch, {DIM}] latent)
                {quantize}, float[4, {DIM}] {trunk_name} = {{{numbers(weights)}}}> {{
                    logits = MatMul(x, {trunk_name})
                    latent = QuantizeLinear(logits, latent_scale, latent_zero_point)
                }}"""
            )
            onnx.save(model, tmp_path / f"trunk.{variant}.onnx")
        widths = [DIM, *([hidden] if hidden else []), 3]
        weights = {}
        for i, (before, after) in enumerate(pairwise(widths)):
            weights[f"W{i}"] = rng.normal(size=(before, after)).astype(np.float32)
            weights[f"b{i}"] = rng.normal(size=after).astype(np.float32)
        kept = ", ".join(
            f"float[{','.join(map(str, value.shape))}] {name} = {{{numbers(value)}}}" for name, value in weights.items()
        )
        first = "relu_0 = Relu(h0)\n logits = Gemm(relu_0, W1, b1)" if hidden else "logits = Identity(h0)"
        said = "values" if task == "regression" else "probabilities"
        head = onnx.parser.parse_model(
            f"""{form} h (uint8[batch, {DIM}] latent) => (float[batch, classes] logits, float[batch, classes] {said})
            {quantize}, {kept}> {{
                features = DequantizeLinear(latent, latent_scale, latent_zero_point)
                h0 = Gemm(features, W0, b0)
                {first}
                {ENDS[task]}
            }}"""
        )
        onnx.save(head, tmp_path / "head.onnx")
        manifest = Manifest(
            name="made", release=4, created="", task=task, labels=labels, input=SPEC, latent=LatentSpec(DIM, 0.05, 100),
            head=HeadSpec([hidden] if hidden else []), files=FILES,
            targets=[TargetSpec(0, 1, 1)] * 3 if task == "regression" else [],
            thresholds=[0.5] * 3 if task == "multilabel" else [],
        )  # fmt: skip
        return tmp_path, manifest, Head(weights, tuple(labels))

    return write


def session(data):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def learned(head, rng, labels=()):
    """The head with other weights, and further labels."""
    head = head.grown([*head.labels, *labels])
    return Head(
        {name: w + rng.normal(size=w.shape).astype(np.float32) / 8 for name, w in head.weights.items()}, head.labels
    )


def in_two_sessions(folder, head, variant, x):
    """What the device says."""
    latents = OnnxRuntime(folder, variant=variant).latents(x)
    return latents, HeadSession(folder / "head.onnx", head).run(latents)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("variant", ["int8", "fp32"])
def test_one_file_says_what_two_sessions_say_bit_for_bit(make, rng, task, hidden, variant):
    folder, manifest, head = make(task, hidden=hidden)
    head = learned(head, rng, ["d", "e"] if task == "classification" else [])
    fused = session(fuse(folder, manifest, head, variant, latent=True))
    said = "values" if task == "regression" else "probabilities"
    assert [(o.name, o.shape[1]) for o in fused.get_outputs()][1] == ("latent", DIM)
    for size in (1, 2, 7, 32, 100):
        x = rng.normal(size=(size, 4)).astype(np.float32)
        latents, scores = in_two_sessions(folder, head, variant, x)
        found = fused.run([said, "latent"], {"x": x})
        assert np.array_equal(found[0], scores)
        assert np.array_equal(found[1], latents)
    assert found[0].shape == (100, len(head.labels))


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["int8", "fp32"])
def test_a_real_checkpoint_with_a_learned_and_grown_head_is_fused_bit_for_bit(checkpoint, digits, rng, variant):
    def use(slots, version, chosen):
        assert chosen == variant
        folder, manifest = slots.folder(version), slots.manifest(version)
        head = learned(slots.head(version), rng, ["8", "9"])
        fused = session(fuse(folder, manifest, head, chosen))
        (given,) = fused.get_inputs()
        for size in (1, 3, 16, 32, 33, 200):
            x = manifest.input.apply(manifest.input.check_batch(digits.life.x[:size]))
            scores = in_two_sessions(folder, head, chosen, x)[1]
            assert np.array_equal(fused.run(["probabilities"], {given.name: x})[0], scores)
        assert scores.shape == (200, 10)

    from_checkpoint(checkpoint, variant, use)


def test_the_metadata_say_what_an_app_needs(make, rng):
    folder, manifest, head = make()
    head = learned(head, rng, ["größer"])
    fused = session(fuse(folder, manifest, head, "int8", number=12))
    assert [o.name for o in fused.get_outputs()] == ["probabilities"]
    facts = fused.get_modelmeta().custom_metadata_map
    assert json.loads(facts.pop("labels")) == ["a", "b", "c", "größer"]
    assert json.loads(facts.pop("input"))["preprocess"] == [
        {"op": "scale", "mean": [1.0], "std": [2.0], "axis": -1},
    ]  # fmt: skip
    assert facts == {"name": "made", "task": "classification", "release": "4", "head": "12", "variant": "int8"}


def test_the_same_inputs_give_the_same_bytes_and_others_do_not(make, rng):
    folder, manifest, head = make()
    assert fuse(folder, manifest, head, "int8") == fuse(folder, manifest, head, "int8")
    assert fuse(folder, manifest, head, "int8") != fuse(folder, manifest, head, "fp32")
    assert fuse(folder, manifest, head, "int8") != fuse(folder, manifest, learned(head, rng), "int8")


@pytest.mark.parametrize("name", ["probabilities", "head_W0", "latent_dim"])
def test_names_inside_the_trunk_may_be_those_of_the_output_or_the_head(make, rng, name):
    folder, manifest, head = make(trunk_name=name, ir_version=8)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    found = session(fuse(folder, manifest, head, "fp32")).run(["probabilities"], {"x": x})[0]
    assert np.array_equal(found, in_two_sessions(folder, head, "fp32", x)[1])


def test_a_model_that_is_served_whole_is_given_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "model.fp32.onnx").write_bytes(b"the model")
    entry = {"model.fp32.onnx": FileEntry(9, "0" * 64)}
    manifest = Manifest(
        name="whole", release=1, created="", adapt="none", task="raw", labels=[], input=SPEC, files=entry
    )
    assert fuse(tmp_path, manifest, None, "fp32") == b"the model"
    with pytest.raises(IntegrityError, match=r"comes in \['fp32'\] alone"):
        fuse(tmp_path, manifest, None, "int8")


def test_files_that_do_not_fit_each_other_are_refused(make, rng):
    folder, manifest, head = make(hidden=5)
    with pytest.raises(IntegrityError, match="is not served without a head"):
        fuse(folder, manifest, None, "int8")
    shutil.copy(folder / "head.onnx", folder / "kept.onnx")
    make(hidden=0)
    with pytest.raises(IntegrityError, match=r"head\.onnx has no initializers W1, b1"):
        fuse(folder, manifest, head, "int8")
    shutil.copy(folder / "kept.onnx", folder / "head.onnx")
    shutil.copy(folder / "kept.onnx", folder / "trunk.int8.onnx")
    with pytest.raises(IntegrityError, match="not the latent"):
        fuse(folder, manifest, head, "int8")
    (folder / "trunk.int8.onnx").write_bytes(b"rubbish")
    with pytest.raises(IntegrityError, match=r"trunk\.int8\.onnx is not a readable ONNX model"):
        fuse(folder, manifest, head, "int8")


def test_a_base_install_names_the_extra(make, monkeypatch):
    folder, manifest, head = make()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[export\]'"):
        fuse(folder, manifest, head, "int8")


# ---- the command


def edge(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.torch
def test_what_a_running_device_has_learned_is_exported(tmp_path, make_device, digits, rng):
    device = make_device(variant="fp32")
    slots = device._slots
    slots.promote(slots.write_head(slots.pointer.current.slot, learned(slots.head(slots.pointer.current), rng, ["8"])))
    device.step()
    device.step()
    out = tmp_path / "model.onnx"
    result = edge("export", "--home", tmp_path / "device", "--variant", "fp32", "--output", out)
    assert result.exit_code == 0, result.output
    fused, x = session(out.read_bytes()), digits.life.x[:20]
    facts = fused.get_modelmeta().custom_metadata_map
    assert (facts["release"], facts["head"], facts["variant"]) == ("1", "1", "fp32")
    served = from_home(tmp_path / "device", "fp32", load)
    given = fused.get_inputs()[0].name
    expected = served.run(served.manifest.input.check_batch(x)).scores
    assert np.array_equal(fused.run(["probabilities"], {given: served.manifest.input.apply(x)})[0], expected)
    said = [device.predict(sample) for sample in x]
    labels = json.loads(facts["labels"])
    assert labels == list(said[0].labels)
    assert [labels[i] for i in expected.argmax(1)] == [one.label for one in said]


@pytest.mark.torch
def test_the_variant_that_the_device_says_it_serves_is_exported(tmp_path, make_device):
    make_device().stop()
    slots = Slots(tmp_path / "device" / "slots")
    for variant in ("int8", "fp32"):
        write_choice(slots.folder(slots.pointer.current), Choice(variant, "as configured"))
        assert edge("export", "--home", tmp_path / "device", "--output", tmp_path / "model.onnx").exit_code == 0
        facts = session((tmp_path / "model.onnx").read_bytes()).get_modelmeta().custom_metadata_map
        assert facts["variant"] == variant


@pytest.mark.torch
def test_a_checkpoint_folder_is_exported_with_its_own_head(tmp_path, checkpoint):
    out = tmp_path / "model.onnx"
    assert edge("export", "--checkpoint", checkpoint, "--variant", "int8", "--latent", "--output", out).exit_code == 0
    assert [o.name for o in session(out.read_bytes()).get_outputs()] == ["probabilities", "latent"]


def test_an_output_that_is_no_onnx_file_is_a_usage_error(tmp_path):
    for name in ("model.pt", "none/model.onnx"):
        result = edge("export", "--home", tmp_path, "--output", tmp_path / name)
        assert result.exit_code == 2
        assert "expected a name ending in .onnx" in result.output
