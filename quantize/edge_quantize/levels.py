"""What can be done with a network: the adapt level of any ONNX graph, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from edge_quantize.dense import all_nodes, describe, tensor_shape
from edge_quantize.graph import MIN_OPSET, Cut, find_cuts, split
from edge_quantize.rewrite import opset_of
from edge_sdk.errors import EdgeError

Level = Literal["head", "none"]

_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ALREADY_INT8 = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger")


@dataclass(frozen=True)
class TensorFacts:
    """An input or output.

    Attributes:
        name: As in the graph.
        dtype: As numpy calls it; "" if it is no tensor.
        shape: Sizes, or names of open dimensions ("" for unnamed); None if the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        sizes = "unknown shape" if self.shape is None else f"[{', '.join(str(dim or '?') for dim in self.shape)}]"
        return f"{self.name} {self.dtype} {sizes}"


@dataclass(frozen=True)
class Assessment:
    """Facts about a graph. Encodes as JSON with msgspec.

    Attributes:
        level: "head": trunk and trainable head; "none": served whole, without learning.
        reason: A sentence: where it is cut, or what stands against it.
        cut: The tensor that the automatic choice cuts at; "" for level none.
        cuts: Every place between dense layers at the end, usable or not, first one first.
        activation: What `split` leaves out after the logits: "softmax", "log_softmax", "sigmoid" or "".
        inputs: What goes in.
        outputs: What comes out.
        opset: Of the standard operators.
        ops: How many nodes of each operator, those inside control flow too, most frequent first.
        parameters: Numbers stored as weights.
        size_bytes: The graph with its weights as a file.
        float_ops: Operators that INT8 leaves in float, with their counts.
        not_quantizable: Why INT8 is impossible; "" if it is possible.
    """

    level: Level
    reason: str
    cut: str
    cuts: tuple[Cut, ...]
    activation: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    opset: int
    ops: dict[str, int]
    parameters: int
    size_bytes: int
    float_ops: dict[str, int]
    not_quantizable: str

    def lines(self) -> list[str]:
        """The facts for people, one a line."""
        rows = [("adapt", f"{self.level}: {self.reason}")]
        rows += [("input", str(value)) for value in self.inputs]
        rows += [("output", str(value)) for value in self.outputs]
        rows += [("cut", self._cut_line(cut)) for cut in self.cuts]
        if self.activation:
            rows.append(("activation", f"{self.activation} at the end; the head puts out logits"))
        rows += [
            ("weights", f"{self.parameters:,} numbers, {self.size_bytes:,} bytes, opset {self.opset}"),
            ("operators", ", ".join(f"{kind} {count}" for kind, count in self.ops.items())),
            ("int8", f"impossible: {self.not_quantizable}" if self.not_quantizable else "possible"),
        ]
        if self.float_ops and not self.not_quantizable:
            rows.append(("in float", ", ".join(f"{kind} {count}" for kind, count in self.float_ops.items())))
        return [f"{name:10}  {text}" for name, text in rows]

    def _cut_line(self, cut: Cut) -> str:
        note = "  <- automatic" if cut.tensor == self.cut else f"  ({cut.obstacle})" if cut.obstacle else ""
        layers = "layer" if cut.dense_layers == 1 else "layers"
        return (
            f"{cut.tensor}: {cut.latent} values, head of {cut.dense_layers} dense {layers}, "
            f"{cut.parameters:,} parameters{note}"
        )


def assess(model: ModelProto) -> Assessment:
    """Which adapt level applies to a graph, and why. No graph is refused: what cannot be split is level none.

    The level is found by splitting, which runs the trunk with 1, 2 and 7 random rows.

    Args:
        model: As `graph.load_onnx` or `export.export_onnx` gives it.
    """
    level: Level = "head"
    cut = activation = ""
    try:
        parts = split(model)
    except EdgeError as error:
        level, reason = "none", " ".join(str(error).split())
    else:
        cut, activation = parts.cut, parts.activation
        count = len(parts.weights) // 2
        reason = (
            f"cut at {cut!r} into a trunk with {parts.latent_dim} latent values and a head of {count} dense "
            f"{'layer' if count == 1 else 'layers'} with {parts.outputs} outputs"
        )
    nodes = list(all_nodes(model.graph))
    stored = _stored(model, nodes)
    known = {*QDQRegistry, *QLinearOpsRegistry, "Constant"}
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    return Assessment(
        level=level,
        reason=reason,
        cut=cut,
        cuts=find_cuts(model),
        activation=activation,
        inputs=tuple(_facts(value) for value in model.graph.input),
        outputs=tuple(_facts(value) for value in model.graph.output),
        opset=opset_of(model),
        ops=dict(ops.most_common()),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in stored if _is_weight(tensor)),
        size_bytes=model.ByteSize(),
        float_ops={kind: count for kind, count in ops.most_common() if kind not in known},
        not_quantizable=_not_quantizable(model, nodes),
    )


def _facts(value: ValueInfoProto) -> TensorFacts:
    kind = value.type.tensor_type.elem_type
    dtype = "" if kind == TensorProto.UNDEFINED else str(helper.tensor_dtype_to_np_dtype(kind))
    shape = tensor_shape(value)
    return TensorFacts(value.name, dtype, None if shape is None else tuple(shape))


def _stored(model: ModelProto, nodes: list[NodeProto]) -> list[TensorProto]:
    tensors = list(model.graph.initializer)
    for node in nodes:
        for attribute in node.attribute:
            tensors += [attribute.t] if node.op_type == "Constant" and attribute.name == "value" else []
            for inner in (attribute.g, *attribute.graphs):
                tensors += inner.initializer
    return tensors


def _is_weight(tensor: TensorProto) -> bool:
    """Not what graphs store as shapes and axes, which are whole numbers of 64 bits."""
    return bool(tensor.data_type not in (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING))


def _not_quantizable(model: ModelProto, nodes: list[NodeProto]) -> str:
    done = next((node for node in nodes if node.op_type in _ALREADY_INT8), None)
    if done is not None:
        return f"the graph is quantized already, see {describe(done)}"
    if opset_of(model) < MIN_OPSET:
        return f"opset {opset_of(model)} has no scales for each channel ({MIN_OPSET} does) and cannot be raised"
    if any(tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for tensor in model.graph.initializer):
        return "the weights are in half precision; export the network in float32"
    fixed = {tensor.name for tensor in model.graph.initializer}
    fixed.update(node.output[0] for node in model.graph.node if node.op_type in ("Constant", "Transpose", "Identity"))
    if any(node.op_type in _WITH_WEIGHTS and fixed.intersection(node.input[1:2]) for node in model.graph.node):
        return ""
    inside = next((node for node in model.graph.node if node.op_type in ("If", "Loop", "Scan")), None)
    if inside is not None and any(node.op_type in _WITH_WEIGHTS for node in nodes):
        return f"the layers with weights lie inside {describe(inside)}"
    return (
        f"it has no {', '.join(_WITH_WEIGHTS[:-1])} or {_WITH_WEIGHTS[-1]} with fixed weights at the top of the graph"
    )
