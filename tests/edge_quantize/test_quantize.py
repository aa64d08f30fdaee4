import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_quantize import Calibration, compare_variants, encode, quantize_trunk
from edge_quantize.compare import predict
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.head import Head, dequantize, softmax
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, TRUNK_FP32, TRUNK_INT8
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
    result = build(tmp_path / kind, kind, calibration=calibration).comparison
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


def test_comparison_prints_a_table_and_json(base):
    result = compare_variants(base.folder, base.data.holdout_x, base.data.holdout_y, repeats=20)
    assert result.int8.accuracy.low <= result.int8.accuracy.value <= result.int8.accuracy.high
    assert 0 < result.int8.p50_ms <= result.int8.p95_ms
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines] == ["accuracy", "INT8", "FP32", "443"]
    assert b'"agreement"' in result.to_json()


def test_graph_that_onnx_runtime_cannot_run_is_refused():
    domains = '<ir_version: 10, opset_import: ["" : 20, "nobody" : 1]>'
    text = domains + "g (float[N, 4] x) => (float[N, 4] y) { y = nobody.Op(x) }"
    with pytest.raises(RuntimeUnavailableError, match="nobody:Op"):
        quantize_trunk(onnx.parser.parse_model(text), np.zeros((16, 4), np.float32))
