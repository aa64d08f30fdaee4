"""The trunk in INT8 and in float, with the same uint8 latent; and the head's graph."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from edge_quantize.calibrate import ArrayReader, Calibration, latent_range
from edge_quantize.errors import ExportError
from edge_quantize.graph import BATCH, IR_VERSION, LATENT, OPSET, canonical_bytes, run
from edge_sdk.head import Head
from edge_sdk.manifest import TRUNK_FP32, TRUNK_INT8, LatentSpec, Manifest
from edge_sdk.types import FloatArray

_METHODS = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}


@dataclass(frozen=True)
class Trunks:
    """Both variants of a frozen trunk, as files, and how their latent is read."""

    int8: bytes
    fp32: bytes
    latent: LatentSpec

    @classmethod
    def of_checkpoint(cls, folder: Path, manifest: Manifest) -> Trunks:
        """The trunks of a checkpoint that has been verified."""
        return cls((folder / TRUNK_INT8).read_bytes(), (folder / TRUNK_FP32).read_bytes(), manifest.latent)


def quantize_trunk(trunk: ModelProto, x: FloatArray, config: Calibration | None = None) -> Trunks:
    """Quantize a trunk to INT8, and let both variants end in the same QuantizeLinear.

    Static QDQ: uint8 activations, int8 weights, one scale for each output channel.

    Args:
        trunk: A graph from one input to a float32 [N, D] output.
        x: Calibration rows float32 [N, ...], as the network takes them.
        config: How ranges are found.

    Raises:
        DataError: The trunk's output is constant or not finite on these rows.
        ExportError: ONNX Runtime cannot quantize the graph.
    """
    config = config or Calibration()
    latent = latent_range(run(trunk, x), config)
    int8 = _without_last_pair(_static_qdq(trunk, x, config))
    return Trunks(_with_latent(int8, latent), _with_latent(trunk, latent), latent)


def head_graph(head: Head, latent: LatentSpec) -> bytes:
    """`head.onnx`: uint8 latent [N, D] to "logits" and "probabilities" [N, C], batch and class count free.

    Its initializers have the names of the head's weights, so that learned ones, also with more classes,
    replace them when a session is built.
    """
    initializers = [numpy_helper.from_array(head.weights[name], name) for name in sorted(head.weights)]
    initializers += _scale_and_zero_point(latent)
    nodes = [helper.make_node("DequantizeLinear", [LATENT, "latent_scale", "latent_zero_point"], ["x0"])]
    for i in range(head.depth):
        last = i == head.depth - 1
        nodes.append(helper.make_node("Gemm", [f"x{i}", f"W{i}", f"b{i}"], ["logits" if last else f"dense{i}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"dense{i}"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info(LATENT, TensorProto.UINT8, [BATCH, latent.dim])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [BATCH, "classes"]) for n in ("logits", "probabilities")],
        initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    return canonical_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION))


def _static_qdq(trunk: ModelProto, x: FloatArray, config: Calibration) -> ModelProto:
    progress = io.StringIO()  # the percentile calibrator prints
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(progress):
        prepared, quantized = Path(name) / "prepared.onnx", Path(name) / "quantized.onnx"
        try:
            # shapes alone: the exporter has folded what can be, and the optimizer's result varies by machine
            quant_pre_process(trunk, prepared, skip_optimization=True, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                quantized,
                ArrayReader(x, input_name=trunk.graph.input[0].name),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry}),
                per_channel=True,
                reduce_range=False,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=_METHODS[config.method],
                extra_options={"CalibPercentile": config.percentile} if config.method == "percentile" else {},
            )
        except Exception as error:  # the quantizer raises classes of many libraries
            raise ExportError(f"ONNX Runtime cannot quantize the trunk: {error}") from error
        return onnx.load(quantized)


def _without_last_pair(model: ModelProto) -> ModelProto:
    """Take a QuantizeLinear-DequantizeLinear pair off the end, where the latent's own QuantizeLinear comes.

    Two pairs in a row would round twice, and the engine would merge them in a fused graph but not across two
    sessions, whose results would then differ. A ReLU that the quantizer folded into the pair is kept by the
    latent's own range, which begins at zero wherever a ReLU's output does.
    """
    producers: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output}
    output = model.graph.output[0]
    last = producers[output.name]
    if last.op_type != "DequantizeLinear":
        return model
    before = producers[last.input[0]]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(before.input[0], TensorProto.FLOAT, None))
    model.graph.node.remove(last)
    model.graph.node.remove(before)
    return model


def _with_latent(model: ModelProto, latent: LatentSpec) -> bytes:
    """The graph, ended by the QuantizeLinear that both variants share."""
    ended = ModelProto()
    ended.CopyFrom(model)
    graph = ended.graph
    source = graph.output[0].name
    graph.name = "trunk"
    graph.node.append(
        helper.make_node("QuantizeLinear", [source, "latent_scale", "latent_zero_point"], [LATENT], name=LATENT)
    )
    graph.initializer.extend(_scale_and_zero_point(latent))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(LATENT, TensorProto.UINT8, [BATCH, latent.dim]))
    return canonical_bytes(ended)


def _scale_and_zero_point(latent: LatentSpec) -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.array(latent.scale, np.float32), "latent_scale"),
        numpy_helper.from_array(np.array(latent.zero_point, np.uint8), "latent_zero_point"),
    ]
