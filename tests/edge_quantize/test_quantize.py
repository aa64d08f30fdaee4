import functools
import hashlib
import os
import subprocess
import sys
from typing import NamedTuple

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_quantize import (
    Calibration,
    CalibrationWarning,
    ExportError,
    encode,
    export_onnx,
    quantize_trunk,
    split,
)
from edge_quantize.compare import predict
from edge_quantize.graph import run
from edge_quantize.metrics import sqnr_db
from edge_quantize.quantize import QuantRecipe, head_graph, named, quantize_whole
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.head import Head, dequantize, softmax
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, TRUNK_FP32, TRUNK_INT8, LatentSpec
from edge_sdk.runtime import HeadSession

pytestmark = pytest.mark.torch


def one_thread(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", ["pooled", "flattened", "averaged", "deep_head", "mlp"])
def test_two_sessions_equal_the_fused_graph_bit_for_bit(build, digits, spec, tmp_path, kind):
    folder = tmp_path / kind
    build(folder, kind)
    head = onnx.compose.add_prefix(onnx.load(folder / HEAD_ONNX), "head_")
    for variant, name in (("int8", TRUNK_INT8), ("fp32", TRUNK_FP32)):
        fused = onnx.compose.merge_models(onnx.load(folder / name), head, io_map=[("latent", "head_latent")])
        session = one_thread(fused)
        for batch in (1, 7, 32):
            x = digits.holdout_x[:batch]
            split = predict(folder, encode(folder, x, spec=spec, variant=variant))
            whole = session.run(["head_probabilities"], {"input": spec.apply(x)})[0]
            assert np.array_equal(split, whole), (variant, batch)


@pytest.mark.parametrize(
    ("kind", "calibration"),
    [
        ("pooled", Calibration()),
        ("pooled", Calibration(method="percentile")),
        ("flattened", Calibration()),
        ("mlp", Calibration()),
    ],
)
def test_int8_is_nearly_as_right_as_float(build, tmp_path, digits, capsys, kind, calibration):
    result = build(tmp_path / kind, kind, quantization=QuantRecipe(calibration=calibration)).comparison
    assert result.fp32.accuracy.value > 0.9
    assert result.int8.accuracy.value >= result.fp32.accuracy.value - 0.02
    assert result.agreement >= 0.97
    assert result.int8.size_bytes < result.fp32.size_bytes or kind == "mlp"
    assert capsys.readouterr().out == ""


def test_both_trunks_end_in_the_same_quantize_linear(base):
    ends = []
    for name in (TRUNK_INT8, TRUNK_FP32):
        graph = onnx.load(base.folder / name).graph
        node = graph.node[-1]
        values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        assert (node.op_type, list(node.output)) == ("QuantizeLinear", ["latent"])
        assert [output.name for output in graph.output] == ["latent"]
        dims = graph.output[0].type.tensor_type.shape.dim
        assert (dims[0].dim_param, dims[1].dim_value) == ("batch", base.manifest.latent.dim)
        ends.append((values[node.input[1]].item(), values[node.input[2]].item()))
    assert ends[0] == ends[1] == (base.manifest.latent.scale, base.manifest.latent.zero_point)


def test_int8_trunk_has_uint8_activations_and_int8_weights_per_channel(base):
    graph = onnx.load(base.folder / TRUNK_INT8).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: value for name, value in values.items() if name.endswith("weight_quantized")}
    assert len(weights) == 3
    for name, value in weights.items():
        assert value.dtype == np.int8
        assert values[name.replace("_quantized", "_scale")].shape == (value.shape[0],)
    assert values["input_zero_point"].dtype == np.uint8


def test_latents_do_not_depend_on_the_batch(base, spec):
    x = base.data.holdout_x[:40]
    whole = encode(base.folder, x, spec=spec)
    assert whole.dtype == np.uint8
    assert np.array_equal(whole, np.concatenate([encode(base.folder, row[None], spec=spec) for row in x]))


@pytest.mark.parametrize("kind", ["pooled", "deep_head"])
def test_head_graph_serves_the_heads_weights_and_more_classes(build, digits, spec, tmp_path, capfd, kind):
    folder = tmp_path / kind
    manifest = build(folder, kind).manifest
    latents = encode(folder, digits.holdout_x[:20], spec=spec)
    head = Head.load(folder / HEAD_NPZ)
    before = HeadSession(folder / HEAD_ONNX, head).run(latents)
    expected = softmax(head.logits(dequantize(latents, manifest.latent)))
    np.testing.assert_allclose(before, expected, atol=1e-6)

    grown = head.grown([*head.labels, "8", "9"])
    after = HeadSession(folder / HEAD_ONNX, grown).run(latents)
    assert after.shape == (20, 10)
    np.testing.assert_allclose(after.sum(axis=1), 1, atol=1e-6)
    assert np.array_equal(after.argmax(1), before.argmax(1))
    assert capfd.readouterr().err == ""


def test_graph_that_onnx_runtime_cannot_run_is_refused():
    domains = '<ir_version: 10, opset_import: ["" : 20, "nobody" : 1]>'
    text = domains + "g (float[N, 4] x) => (float[N, 4] y) { y = nobody.Op(x) }"
    with pytest.raises(RuntimeUnavailableError, match="nobody:Op"):
        quantize_trunk(onnx.parser.parse_model(text), np.zeros((16, 4), np.float32))


class Target(NamedTuple):
    mean: float
    std: float


RECIPES = [
    QuantRecipe(activation="int8"),
    QuantRecipe(per_channel=False),
    QuantRecipe(calibration=Calibration(method="percentile")),
    QuantRecipe(activation="int8", per_channel=False, calibration=Calibration(method="entropy")),
    QuantRecipe(reduce_range=True),
]


def weighted(model, **weights):
    """A graph in ONNX's text form with the weights as initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {model}')
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()
    )
    return model


def conv_trunk():
    """Two convolutions and a pooled output float32 [N, 6]."""
    rng = np.random.default_rng(0)
    return weighted(
        """g (float[batch, 1, 8, 8] input) => (float[batch, 6] features) {
            a = Conv<pads = [1, 1, 1, 1]>(input, w1)
            b = Relu(a)
            c = Conv<pads = [1, 1, 1, 1]>(b, w2)
            d = Relu(c)
            e = GlobalAveragePool(d)
            features = Flatten(e)
        }""",
        w1=rng.normal(size=(4, 1, 3, 3)),
        w2=rng.normal(size=(6, 4, 3, 3)),
    )


def two_heads():
    """Two inputs; an output that is read on, one with ReLU and one without."""
    rng = np.random.default_rng(0)
    return weighted(
        """g (float[batch, 8] x, float[1, batch, 5] state) => (float[batch, 6] values, float[batch, 4] positive,
            float[1, batch, 5] next) {
            a = MatMul(x, w1)
            b = MatMul(state, w2)
            next = Tanh(b)
            axes = Constant<value_ints = [0]>()
            c = Squeeze(next, axes)
            d = Add(a, c)
            values = MatMul(d, w3)
            e = MatMul(d, w4)
            positive = Relu(e)
        }""",
        w1=rng.normal(size=(8, 5)),
        w2=rng.normal(size=(5, 5)),
        w3=rng.normal(size=(5, 6)),
        w4=rng.normal(size=(5, 4)),
    )


def two_heads_rows(rows=60):
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(rows, 8)), "state": np.tanh(rng.normal(size=(rows, 1, 1, 5)))}


def images(rows=64):
    return np.random.default_rng(0).normal(size=(rows, 1, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def parted(trained, digits, spec):
    """A trained network of the given kind, split; one export for each kind."""
    example = spec.apply(digits.train_x[:4])
    return functools.cache(lambda kind: split(export_onnx(trained(kind).eval(), example, input_name="input")))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("kind", ["pooled", "flattened", "averaged", "mlp"])
def test_two_sessions_equal_the_fused_graph_for_every_recipe(parted, digits, spec, kind, recipe):
    x = spec.apply(digits.train_x[:200])
    parts = parted(kind)
    first = next(node.name for node in named(parts.trunk).graph.node if node.op_type in ("Conv", "Gemm", "MatMul"))
    for used in (recipe, msgspec.structs.replace(recipe, float_nodes=(first,))):
        trunks = quantize_trunk(parts.trunk, x, used)
        head = head_graph(Head(parts.weights, tuple("01234567")), trunks.latent)
        fused = onnx.compose.merge_models(
            onnx.load_model_from_string(trunks.int8),
            onnx.compose.add_prefix(onnx.load_model_from_string(head), "head_"),
            io_map=[("latent", "head_latent")],
        )
        whole, trunk = one_thread(fused), one_thread(onnx.load_model_from_string(trunks.int8))
        second = one_thread(onnx.load_model_from_string(head))
        for batch in (1, 7):
            latents = trunk.run(None, {"input": x[:batch]})[0]
            assert latents.dtype == np.uint8
            apart = second.run(["probabilities"], {"latent": latents})[0]
            assert np.array_equal(apart, whole.run(["head_probabilities"], {"input": x[:batch]})[0])


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_same_inputs_give_the_same_bytes(method):
    recipe = QuantRecipe(calibration=Calibration(method=method))
    once, again = (quantize_trunk(conv_trunk(), images(), recipe) for _ in range(2))
    assert once == again
    assert quantize_whole(conv_trunk(), images(), recipe) == quantize_whole(conv_trunk(), images(), recipe)


def test_bytes_do_not_depend_on_the_seed_of_pythons_hashes(tmp_path):
    (tmp_path / "model.onnx").write_bytes(conv_trunk().SerializeToString())
    code = (
        "import hashlib, numpy as np, onnx; from edge_quantize import quantize_trunk\n"
        "x = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)\n"
        "print(hashlib.sha256(quantize_trunk(onnx.load('model.onnx'), x).int8).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {hashlib.sha256(quantize_trunk(conv_trunk(), images()).int8).hexdigest().encode() + b"\n"}


def test_float_nodes_stay_in_float_and_unknown_ones_are_refused():
    nodes = [node.name for node in named(conv_trunk()).graph.node if node.op_type == "Conv"]
    trunks = quantize_trunk(conv_trunk(), images(), QuantRecipe(float_nodes=(nodes[0],)))
    graph = onnx.load_model_from_string(trunks.int8).graph
    stored = {tensor.name for tensor in graph.initializer}
    assert "w1" in stored
    assert "w2_quantized" in stored
    with pytest.raises(ExportError, match="the graph has no node 'nothing'"):
        quantize_trunk(conv_trunk(), images(), QuantRecipe(float_nodes=("nothing",)))


def test_recipe_decides_on_types_and_scales():
    trunks = quantize_trunk(conv_trunk(), images(), QuantRecipe(activation="int8", per_channel=False))
    graph = onnx.load_model_from_string(trunks.int8).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert values["input_zero_point"].dtype == np.int8
    assert values["latent_zero_point"].dtype == np.uint8
    assert values["w2_scale"].shape == ()
    narrow = quantize_trunk(conv_trunk(), images(), QuantRecipe(reduce_range=True))
    values = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(narrow.int8).graph.initializer}
    assert np.abs(values["w2_quantized"].astype(int)).max() == 64


def test_one_scale_a_channel_saves_layers_of_very_different_channels():
    rng = np.random.default_rng(0)
    scales = np.logspace(-3, 0, 8)
    model = weighted(
        """g (float[batch, 8, 8, 8] input) => (float[batch, 8, 6, 6] features) {
            features = Conv<group = 8>(input, depthwise)
        }""",
        depthwise=rng.normal(size=(8, 1, 3, 3)) * scales[:, None, None, None],
    )
    x = (rng.normal(size=(64, 8, 8, 8))).astype(np.float32)

    def db(per_channel):
        quantized = onnx.load_model_from_string(quantize_whole(model, x, QuantRecipe(per_channel=per_channel)))
        right, rounded = run(model, x), run(quantized, x)
        return min(sqnr_db(right[:, i], rounded[:, i]) for i in range(8))

    assert db(per_channel=False) < 10
    assert db(per_channel=True) > 30


def test_held_out_rows_that_saturate_are_warned_of():
    x = images()
    with pytest.warns(CalibrationWarning, match="on rows that were not calibrated on"):
        quantize_trunk(conv_trunk(), x, held_out=x * 10)
    quantize_trunk(conv_trunk(), x, held_out=images(100)[64:])
    with pytest.warns(CalibrationWarning, match="of input 'input' lies outside"):
        quantize_whole(conv_trunk(), x, held_out=x * 10)


@pytest.mark.parametrize("recipe", [QuantRecipe(), *RECIPES], ids=lambda recipe: recipe.name)
def test_whole_network_keeps_its_inputs_outputs_and_nearly_its_values(recipe):
    model, x = two_heads(), two_heads_rows()
    quantized = onnx.load_model_from_string(quantize_whole(model, x, recipe))
    for side in ("input", "output"):
        assert [v.SerializeToString() for v in getattr(quantized.graph, side)] == [
            v.SerializeToString() for v in getattr(model.graph, side)
        ]
    assert any(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
    names = [output.name for output in model.graph.output]
    feed = {"x": x["x"].astype(np.float32), "state": x["state"][:, 0, 0][None].astype(np.float32)}
    right, rounded = (dict(zip(names, one_thread(m).run(names, feed), strict=True)) for m in (model, quantized))
    for name in names:
        assert rounded[name].shape == right[name].shape
        assert sqnr_db(right[name], rounded[name]) > 20, name
    assert rounded["positive"].min() == 0
    # nobody reads `values` in eight bits: it is not rounded to 256 steps
    assert len(np.unique(rounded["values"])) > 256


def test_whole_network_of_which_nothing_can_be_quantized_is_refused():
    model = weighted("g (float[N, 4] x) => (float[N, 4] y) { y = Tanh(x) }")
    with pytest.raises(ExportError, match="nothing in the network can be quantized, it consists of Tanh"):
        quantize_whole(model, np.random.default_rng(0).random((20, 4)).astype(np.float32))


def test_old_graph_is_brought_to_an_opset_with_scales_a_channel():
    rng = np.random.default_rng(0)
    old = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["" : 11]> g (float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y) '
        "{ y = Conv<kernel_shape = [1, 1]>(x, w) }"
    )
    weight = rng.normal(size=(3, 2, 1, 1)).astype(np.float32)
    old.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    x = rng.normal(size=(20, 2, 4, 4)).astype(np.float32)
    quantized = onnx.load_model_from_string(quantize_whole(old, x))
    assert quantized.opset_import[0].version == 13
    assert sqnr_db(run(old, x), run(quantized, x)) > 30


def test_nodes_without_a_name_of_their_own_get_one():
    model = conv_trunk()
    model.graph.node[0].name = model.graph.node[1].name = "same"
    names = [node.name for node in named(model).graph.node]
    assert names[:3] == ["same", "Relu_1", "Conv_2"]
    assert len(set(names)) == len(names)
    assert model.graph.node[1].name == "same"


def heads(task, targets=()):
    rng = np.random.default_rng(0)
    weights = {"W0": rng.normal(size=(6, 3)).astype(np.float32), "b0": rng.normal(size=3).astype(np.float32)}
    latent = LatentSpec(dim=6, scale=0.02, zero_point=10)
    head = Head(weights, ("a", "b", "c"))
    session = one_thread(onnx.load_model_from_string(head_graph(head, latent, task=task, targets=targets)))
    latents = rng.integers(0, 256, (5, 6)).astype(np.uint8)
    logits = dequantize(latents, latent) @ weights["W0"] + weights["b0"]
    return [output.name for output in session.get_outputs()], session.run(None, {"latent": latents}), logits


def test_multilabel_head_puts_out_one_probability_for_each_label():
    names, (given, probabilities), logits = heads("multilabel")
    assert names == ["logits", "probabilities"]
    np.testing.assert_allclose(given, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-5, atol=1e-6)


def test_regression_head_puts_out_values_in_the_targets_units():
    targets = [Target(mean=20.0, std=5.0), Target(mean=-1.0, std=0.1), Target(mean=0.0, std=1.0)]
    names, (given, values), logits = heads("regression", targets)
    assert names == ["logits", "values"]
    np.testing.assert_allclose(given, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values, logits * [5, 0.1, 1] + [20, -1, 0], rtol=1e-5, atol=1e-6)


def test_head_of_unknown_task_or_wrong_targets_is_refused():
    with pytest.raises(ValueError, match="not 'raw'"):
        heads("raw")
    with pytest.raises(ValueError, match="one target for each of 3 outputs, got 1"):
        heads("regression", [Target(0.0, 1.0)])
