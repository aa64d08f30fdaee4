"""The trunk in INT8 and in float, with the same uint8 latent; and the head's graph."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from edge_quantize.calibrate import (
    Activations,
    Calibration,
    Feeds,
    calls,
    check_inputs,
    check_saturation,
    latent_range,
)
from edge_quantize.errors import ExportError
from edge_quantize.graph import BATCH, CHUNK, IR_VERSION, LATENT, OPSET, canonical_bytes, run
from edge_sdk.head import Head
from edge_sdk.manifest import TRUNK_FP32, TRUNK_INT8, LatentSpec, Manifest, TargetSpec
from edge_sdk.types import AnyArray, FloatArray

_OPS = sorted({*QDQRegistry, *QLinearOpsRegistry})
_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PER_CHANNEL_OPSET = 13
"""The first in which QuantizeLinear knows an axis."""


class QuantRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network becomes INT8. Weights are int8 always, activations static."""

    activation: Literal["uint8", "int8"] = "uint8"
    """uint8 is the fast one on x86-64; some ARM and accelerator kernels want int8."""
    per_channel: bool = True
    """One weight scale for each output channel, or one for the layer."""
    calibration: Calibration = Calibration()
    layers: Literal["all", "heavy"] = "all"
    """All that ONNX Runtime can quantize, or convolutions and matrix products alone: nine tenths of the gain, and
    right in networks whose other activations have long tails."""
    float_nodes: tuple[str, ...] = ()
    """Names of nodes that stay in float."""
    reduce_range: bool = False
    """Weights of seven bits, for x86-64 without VNNI, where products of eight saturate."""

    @property
    def name(self) -> str:
        """In a few words, for tables."""
        words = [self.activation, "per channel" if self.per_channel else "per tensor", self.calibration.method]
        words += ["heavy layers only"] if self.layers == "heavy" else []
        words += ["7-bit weights"] if self.reduce_range else []
        words += [f"{len(self.float_nodes)} in float"] if self.float_nodes else []
        return ", ".join(words)


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


class Quantizer:
    """One network and its calibration rows, to be quantized by one recipe or many.

    What the rows say about the activations is measured once and serves every recipe. Not thread-safe.

    Args:
        model: A float graph; not changed.
        x: Calibration rows.

    Raises:
        ExportError: The graph's shapes contradict each other, or its opset cannot be brought to 13.
    """

    def __init__(self, model: ModelProto, x: Feeds) -> None:
        self.x = x
        try:
            # shapes alone: the exporter has folded what can be, and the optimizer's result varies by machine
            self.model = onnx.shape_inference.infer_shapes(named(_at_least_opset(model)))
        except Exception as error:  # the converter raises classes of many kinds
            raise ExportError(f"{model.graph.name!r} cannot be prepared for quantization: {error}") from error
        self._activations = Activations(self.model, x)

    @cached_property
    def features(self) -> FloatArray:
        """A trunk's output in float, float32 [N, D], on the calibration rows."""
        return run(self.model, np.asarray(self.x, np.float32))

    def graph(self, recipe: QuantRecipe) -> ModelProto:
        """The network with QuantizeLinear and DequantizeLinear around everything that can be quantized.

        Raises:
            DataError: An activation is not finite on the calibration rows, or an input is missing.
            ExportError: ONNX Runtime cannot quantize the graph, or the recipe names nodes that it has not.
            RuntimeUnavailableError: The engine refuses the float graph.
        """
        nodes = {node.name for node in self.model.graph.node}
        if unknown := [name for name in recipe.float_nodes if name not in nodes]:
            raise ExportError(f"float_nodes: the graph has no node {', '.join(map(repr, unknown))}")
        ranges = {
            name: (np.array(low, np.float32), np.array(high, np.float32))
            for name, (low, high) in sorted(self._activations.ranges(recipe.calibration).items())
        }
        copy = ModelProto()
        copy.CopyFrom(self.model)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                quantizer = QDQQuantizer(
                    copy,
                    recipe.per_channel,
                    recipe.reduce_range,
                    QuantType.QInt8,
                    {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}[recipe.activation],
                    TensorsData(CalibrationMethod.MinMax, ranges),
                    [],
                    list(recipe.float_nodes),
                    _OPS if recipe.layers == "all" else list(_HEAVY),
                    {},
                )
                quantizer.quantize_model()
                quantizer.model.topological_sort()
        except Exception as error:  # the quantizer raises classes of many libraries
            raise ExportError(f"ONNX Runtime cannot quantize {self.model.graph.name!r}: {error}") from error
        quantized: ModelProto = quantizer.model.model
        return quantized

    def trunk(self, recipe: QuantRecipe) -> ModelProto:
        """As `graph`, without the last pair, where the latent's own QuantizeLinear comes."""
        return _without_last_pair(self.graph(recipe))

    def trunks(self, recipe: QuantRecipe) -> Trunks:
        """Both variants of a trunk, which end in the same QuantizeLinear. Errors as in `quantize_trunk`."""
        latent = latent_range(self.features, recipe.calibration)
        return Trunks(_with_latent(self.trunk(recipe), latent), _with_latent(self.model, latent), latent)

    def whole(self, recipe: QuantRecipe) -> bytes:
        """The network with its own inputs and outputs. Errors as in `quantize_whole`."""
        quantized = _with_float_outputs(self.graph(recipe), self.model)
        if not any(node.op_type == "QuantizeLinear" for node in quantized.graph.node):
            ops = ", ".join(sorted({node.op_type for node in self.model.graph.node}))
            raise ExportError(f"nothing in the network can be quantized, it consists of {ops}; serve it in float")
        return canonical_bytes(quantized)


def quantize_trunk(
    trunk: ModelProto,
    x: FloatArray,
    config: QuantRecipe | Calibration | None = None,
    *,
    held_out: FloatArray | None = None,
) -> Trunks:
    """Quantize a trunk to INT8, and let both variants end in the same QuantizeLinear.

    Static QDQ: by default uint8 activations, int8 weights, one scale for each output channel.

    Args:
        trunk: A graph from one input to a float32 [N, D] output.
        x: Calibration rows float32 [N, ...], as the network takes them.
        config: The recipe, or how ranges are found with everything else by default.
        held_out: Rows [M, ...] that are not calibrated on, to see whether the ranges hold for them.

    Raises:
        DataError: The trunk's output is constant or not finite on these rows.
        ExportError: ONNX Runtime cannot quantize the graph.
        RuntimeUnavailableError: The engine refuses the graph.

    Warns:
        CalibrationWarning: The held-out rows leave the latent's range.
    """
    recipe = config if isinstance(config, QuantRecipe) else QuantRecipe(calibration=config or Calibration())
    quantizer = Quantizer(trunk, x)
    trunks = quantizer.trunks(recipe)
    if held_out is not None:
        check_saturation(trunks.latent, quantizer.features, run(quantizer.model, held_out))
    return trunks


def quantize_whole(
    model: ModelProto, x: Feeds, recipe: QuantRecipe | None = None, *, held_out: Feeds | None = None
) -> bytes:
    """Quantize a network that is served whole; inputs and outputs keep their names, types and shapes.

    Args:
        model: Any float graph.
        x: Calibration rows: an array for one input, by input name for several, or one mapping a call for a
            recurrent network, whose states are then calibrated with what is given; see `calibrate.Feeds`.
        recipe: None takes the default.
        held_out: Rows in the same form that are not calibrated on, to see whether the ranges hold for them.

    Raises:
        DataError: An activation is not finite on these rows, or an input is missing.
        ExportError: ONNX Runtime cannot quantize the graph, or finds nothing to quantize in it.
        RuntimeUnavailableError: The engine refuses the graph.

    Warns:
        CalibrationWarning: The held-out rows leave the range of the inputs.
    """
    if held_out is not None:
        check_inputs(_joined(model, x), _joined(model, held_out))
    return Quantizer(model, x).whole(recipe or QuantRecipe())


def named(model: ModelProto) -> ModelProto:
    """A copy in which every node has a name of its own, so that a recipe can speak of it."""
    copy = ModelProto()
    copy.CopyFrom(model)
    taken: set[str] = set()
    for i, node in enumerate(copy.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{i}"
        taken.add(node.name)
    return copy


def head_graph(
    head: Head, latent: LatentSpec, *, task: str = "classification", targets: Sequence[TargetSpec] = ()
) -> bytes:
    """`head.onnx`: uint8 latent [N, D] to "logits" and what the task makes of them, batch and class count free.

    Its initializers have the names of the head's weights, so that learned ones, also with more classes,
    replace them when a session is built.

    Args:
        head: The dense layers.
        latent: How the trunk's output is read.
        task: "classification" and "multilabel" put out "probabilities" [N, C], by softmax or one by one;
            "regression" puts out "values" [N, T] in the targets' units.
        targets: For regression, one for each output: value = logit * std + mean.

    Raises:
        ValueError: The task is none of these, or there is not one target for each output.
    """
    if task not in ("classification", "multilabel", "regression"):
        raise ValueError(f"a head serves classification, multilabel or regression, not {task!r}")
    if task == "regression" and len(targets) != len(head.labels):
        raise ValueError(f"regression needs one target for each of {len(head.labels)} outputs, got {len(targets)}")
    result = "values" if task == "regression" else "probabilities"
    initializers = [numpy_helper.from_array(head.weights[name], name) for name in sorted(head.weights)]
    initializers += _scale_and_zero_point(latent)
    nodes = [helper.make_node("DequantizeLinear", [LATENT, "latent_scale", "latent_zero_point"], ["x0"])]
    for i in range(head.depth):
        last = i == head.depth - 1
        nodes.append(helper.make_node("Gemm", [f"x{i}", f"W{i}", f"b{i}"], ["logits" if last else f"dense{i}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"dense{i}"], [f"x{i + 1}"]))
    if task == "regression":
        for name in ("mean", "std"):
            column = np.array([getattr(target, name) for target in targets], np.float32)
            initializers.append(numpy_helper.from_array(column, f"target_{name}"))
        nodes.append(helper.make_node("Mul", ["logits", "target_std"], ["scaled"]))
        nodes.append(helper.make_node("Add", ["scaled", "target_mean"], [result]))
    elif task == "multilabel":
        nodes.append(helper.make_node("Sigmoid", ["logits"], [result]))
    else:
        nodes.append(helper.make_node("Softmax", ["logits"], [result], axis=-1))
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info(LATENT, TensorProto.UINT8, [BATCH, latent.dim])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [BATCH, "classes"]) for n in ("logits", result)],
        initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    return canonical_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION))


def _at_least_opset(model: ModelProto) -> ModelProto:
    version = next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), OPSET)
    if version >= _PER_CHANNEL_OPSET:
        return model
    return onnx.version_converter.convert_version(model, _PER_CHANNEL_OPSET)


def _joined(model: ModelProto, x: Feeds) -> dict[str, AnyArray]:
    parts = list(calls(model, x, rows=CHUNK))
    return {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}


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


def _with_float_outputs(model: ModelProto, original: ModelProto) -> ModelProto:
    """Take the QuantizeLinear-DequantizeLinear pairs off the outputs, whose values nobody reads in eight bits.

    A pair stays where it also stands for a ReLU or Clip that the quantizer took out, or where an inner node reads it.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    before = {name: node.op_type for node in original.graph.node for name in node.output}
    read = {name for node in model.graph.node for name in node.input}
    for output in model.graph.output:
        last = producers.get(output.name)
        if last is None or last.op_type != "DequantizeLinear" or output.name in read:
            continue
        first = producers.get(last.input[0])
        if first is None or first.op_type != "QuantizeLinear":
            continue
        source = producers.get(first.input[0])
        if source is None or source.op_type != before[output.name]:
            continue
        plain = first.input[0]
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [output.name if name == plain else name for name in names]
        model.graph.node.remove(last)
        model.graph.node.remove(first)
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
