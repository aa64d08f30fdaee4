"""ONNX graphs: cut the dense head off, run a graph, write it so that equal graphs give equal bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from edge_quantize.errors import ExportError
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.head import Weights
from edge_sdk.runtime import new_session
from edge_sdk.types import FloatArray

OPSET = 20
IR_VERSION = 10
BATCH = "batch"
LATENT = "latent"
MAX_LATENT_BYTES = 4096
"""Wider latents would make the replay buffer too large for a device."""
CHUNK = 256


@dataclass(frozen=True)
class Split:
    """A network in two parts.

    Attributes:
        trunk: From the network's input to the cut, in float.
        weights: The dense layers after it, W0 [in, out], b0, …, as in `edge_sdk.head`.
        cut: Name of the tensor between the two: float32 [N, D].
    """

    trunk: ModelProto
    weights: Weights
    cut: str

    @property
    def latent_dim(self) -> int:
        """D, the width of the latent."""
        return int(self.weights["W0"].shape[0])

    @property
    def outputs(self) -> int:
        """How many logits the head puts out."""
        return int(self.weights[f"b{len(self.weights) // 2 - 1}"].shape[0])


@dataclass(frozen=True)
class _Dense:
    source: str
    w: FloatArray
    b: FloatArray


def split(model: ModelProto, *, cut: str | None = None) -> Split:
    """Cut a network where only dense layers with ReLU between them follow.

    The automatic cut takes the whole run of dense layers at the end as the head, as long as something with
    weights remains before it (of a plain MLP, the first layer stays in the trunk) and the latent has at most
    4096 values.

    Args:
        model: A network with one input and one output of logits.
        cut: The tensor to cut at, which must be the input of one of those dense layers; None chooses.

    Raises:
        ExportError: There is no such place; the message says what was found.
    """
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise ExportError(
            f"the network must have one input and one output, it has {len(model.graph.input)} and "
            f"{len(model.graph.output)}"
        )
    model = onnx.shape_inference.infer_shapes(model)
    layers = _dense_layers(model)
    if not layers:
        raise ExportError(
            f"the graph ends in {_describe_end(model)}, not in a dense layer (Gemm or MatMul with fixed "
            "weights); only a network that ends in dense layers can be split into trunk and head"
        )
    sources = [layer.source for layer in layers]
    if cut is not None and cut not in sources:
        raise ExportError(
            f"cannot cut at {cut!r}: it feeds no dense layer at the end; possible are {', '.join(sources)}"
        )
    start = sources.index(cut) if cut is not None else _choose(model, layers)
    weights: Weights = {}
    for i, layer in enumerate(layers[start:]):
        weights[f"W{i}"], weights[f"b{i}"] = layer.w, layer.b
    trunk = onnx.utils.Extractor(model).extract_model([model.graph.input[0].name], [sources[start]])
    return Split(trunk, weights, sources[start])


def run(model: ModelProto, x: FloatArray) -> FloatArray:
    """The first output of a network with one input, for float32 [N, ...], on one thread.

    Raises:
        RuntimeUnavailableError: The engine refuses the network or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        session = new_session(path)
    name = session.get_inputs()[0].name
    try:
        return np.concatenate([session.run(None, {name: part})[0] for part in chunks(x)])
    except Exception as error:  # the engine's exceptions share no base class of their own
        raise RuntimeUnavailableError(f"ONNX Runtime fails on {model.graph.name!r}: {error}") from error


def chunks(x: FloatArray) -> Iterator[FloatArray]:
    """Views of at most 256 rows, so that memory stays bounded."""
    for start in range(0, len(x), CHUNK):
        yield x[start : start + CHUNK]


def canonical_bytes(model: ModelProto) -> bytes:
    """The network as a file that depends on what it computes alone.

    Removes what exporters add about themselves: stack traces with paths of the machine, documentation,
    intermediate shapes (the engine infers them again), versions of tools, domains that no node uses.
    """
    clean = ModelProto()
    clean.CopyFrom(model)
    clean.ir_version = IR_VERSION
    clean.producer_name, clean.producer_version = "edge_quantize", ""
    for field in ("domain", "model_version", "doc_string", "metadata_props"):
        clean.ClearField(field)
    graph = clean.graph
    for field in ("value_info", "doc_string", "metadata_props"):
        graph.ClearField(field)
    parts: list[Any] = [*graph.node, *graph.initializer, *graph.input, *graph.output]
    for part in parts:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    used = {node.domain for node in graph.node}
    opsets = [opset for opset in clean.opset_import if opset.domain in used]
    del clean.opset_import[:]
    clean.opset_import.extend(opsets)
    initializers = sorted(graph.initializer, key=lambda tensor: tensor.name)
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    onnx.checker.check_model(clean)
    data: bytes = clean.SerializeToString(deterministic=True)
    return data


def _dense_layers(model: ModelProto) -> list[_Dense]:
    """The unbroken run of dense layers at the end of the graph, first layer first."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    layers: list[_Dense] = []
    tensor = model.graph.output[0].name
    while (layer := _dense_at(tensor, producers, constants)) is not None:
        layers.insert(0, layer)
        relu = producers.get(layer.source)
        # a tensor that is also read elsewhere, a residual say, cannot be inside the head
        if relu is None or relu.op_type != "Relu" or readers[layer.source] > 1 or readers.get(relu.input[0], 0) > 1:
            break
        tensor = relu.input[0]
    return layers


def _dense_at(tensor: str, producers: dict[str, NodeProto], constants: dict[str, Any]) -> _Dense | None:
    """The dense layer that puts out `tensor`, if one does: Gemm, or MatMul with or without Add."""
    node = producers.get(tensor)
    if node is None:
        return None
    if node.op_type == "Gemm" and node.input[1] in constants:
        options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        bias = node.input[2] if len(node.input) > 2 else ""
        if options.get("transA", 0) or (bias and bias not in constants):
            return None
        w = numpy_helper.to_array(constants[node.input[1]])
        w = (w.T if options.get("transB", 0) else w) * np.float32(options.get("alpha", 1.0))
        b = numpy_helper.to_array(constants[bias]) * np.float32(options.get("beta", 1.0)) if bias else np.zeros(1)
        return _dense(node.input[0], w, b)
    if node.op_type == "Add":
        for product, bias in (tuple(node.input), tuple(node.input)[::-1]):
            inner = producers.get(product)
            if bias in constants and inner is not None and inner.op_type == "MatMul" and inner.input[1] in constants:
                w, b = (numpy_helper.to_array(constants[name]) for name in (inner.input[1], bias))
                return _dense(inner.input[0], w, b)
    if node.op_type == "MatMul" and node.input[1] in constants:
        return _dense(node.input[0], numpy_helper.to_array(constants[node.input[1]]), np.zeros(1))
    return None


def _dense(source: str, w: FloatArray, b: Any) -> _Dense | None:
    if w.ndim != 2 or b.size not in (1, w.shape[1]):
        return None
    bias = np.broadcast_to(b.reshape(-1), (w.shape[1],))
    return _Dense(source, np.ascontiguousarray(w, np.float32), np.ascontiguousarray(bias, np.float32))


def _choose(model: ModelProto, layers: list[_Dense]) -> int:
    for i, layer in enumerate(layers):
        if layer.w.shape[0] <= MAX_LATENT_BYTES and _has_weights_before(model, layer.source):
            return i
    found = ", ".join(f"{layer.source!r} ({layer.w.shape[0]} values)" for layer in layers)
    raise ExportError(
        f"no usable cut: dense layers at the end read {found}, but a cut needs a layer with weights before "
        f"it and at most {MAX_LATENT_BYTES} values"
    )


def _has_weights_before(model: ModelProto, tensor: str) -> bool:
    producers = {name: node for node in model.graph.node for name in node.output}
    matrices = {value.name for value in model.graph.initializer if len(value.dims) >= 2}
    pending, seen = [tensor], set()
    while pending:
        node = producers.get(name := pending.pop())
        if node is None or name in seen:
            continue
        seen.add(name)
        if matrices.intersection(node.input):
            return True
        pending.extend(node.input)
    return False


def _describe_end(model: ModelProto) -> str:
    output = model.graph.output[0].name
    node = next((node for node in model.graph.node if output in node.output), None)
    return f"{node.op_type} {node.name!r}" if node is not None else f"its input {output!r}"
