"""ONNX graphs: read one, cut the dense head off, run it, write it so that equal graphs give equal bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from edge_quantize.dense import Dense, DenseEnd, all_nodes, dense_end, describe, tensor_shape
from edge_quantize.errors import ExportError
from edge_quantize.onnx_file import check_runs, read_model
from edge_quantize.rewrite import at_opset, close, opset_of, run_rows, session_of, up_to, with_free_batch
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.head import Weights
from edge_sdk.types import FloatArray

OPSET = 20
MIN_OPSET = 13
"""Before that, weights cannot have one scale for each channel."""
IR_VERSION = 10
BATCH = "batch"
LATENT = "latent"
MAX_LATENT_BYTES = 4096
"""Wider latents would make the replay buffer too large for a device."""
CHUNK = 256

_RECURRENT = ("LSTM", "GRU", "RNN")
DATA_SHAPED = ("NonMaxSuppression", "NonZero", "Unique", "Compress")
"""Operators of which the values, not the shapes, of the inputs decide the shape of the output."""
_STEERED = {"If": 1, "Loop": 2}
"""Control flow, and how many of its first inputs say which way it goes."""
_BATCHES = (1, 2, 7)


@dataclass(frozen=True)
class Split:
    """A network in two parts.

    Attributes:
        trunk: From the network's input to the cut, in float.
        weights: The dense layers after it, W0 [in, out], b0, …, as in `edge_sdk.head`.
        cut: Name of the tensor between the two: float32 [N, D].
        activation: What the network had after its logits and the head has not: "softmax", "log_softmax",
            "sigmoid" or "".
    """

    trunk: ModelProto
    weights: Weights
    cut: str
    activation: str = ""

    @property
    def latent_dim(self) -> int:
        """D, the width of the latent."""
        return int(self.weights["W0"].shape[0])

    @property
    def outputs(self) -> int:
        """How many logits the head puts out."""
        return int(self.weights[f"b{len(self.weights) // 2 - 1}"].shape[0])

    @property
    def task(self) -> str:
        """What the activation says the network is for: "classification", "multilabel", or "" without one."""
        return {"softmax": "classification", "log_softmax": "classification", "sigmoid": "multilabel"}.get(
            self.activation, ""
        )


@dataclass(frozen=True)
class Cut:
    """A place where a network can be split.

    Attributes:
        tensor: Name of the tensor, float32 [N, latent].
        latent: Its width, in values; one byte each in the replay buffer.
        dense_layers: How many follow and become the head.
        parameters: Weights and biases in them.
        obstacle: Why the automatic choice passes it over, or "".
    """

    tensor: str
    latent: int
    dense_layers: int
    parameters: int
    obstacle: str = ""


def load_onnx(path: Path) -> ModelProto:
    """The network in an ONNX file, ready to be split, quantized or served whole.

    Weights stored beside the file come into the graph, functions are expanded, a batch dimension fixed at 1 is
    freed where a run proves that rows do not mix, and an opset too old to quantize is raised where the result
    computes the same. What cannot be freed or raised stays as it is, for `levels.assess` to report.

    Raises:
        ExportError: The file is damaged, has weights outside its folder, needs a library of custom operators,
            or ONNX Runtime cannot run it; the message names the tensor or node and says what to do.
    """
    model = read_model(path)
    model.ir_version = min(model.ir_version, IR_VERSION)
    check_runs(model, path.name)
    if opset_of(model) < MIN_OPSET:
        model = at_opset(model, OPSET) or model
    return with_free_batch(model, BATCH)


def split(model: ModelProto, *, cut: str | None = None) -> Split:
    """Cut a network where only dense layers with ReLU between them follow.

    The automatic cut takes, of all places with weights before them and at most 4096 values, the one with the
    fewest values, and of equally wide ones the last: replay rows and head are then smallest, and what was learned
    before is kept best. An earlier cut leaves more for the head to learn, so it adapts further to inputs that look
    different, for more bytes a row; name it to have it.

    A Softmax, LogSoftmax or Sigmoid at the end is left out, for a head puts out logits; `Split.activation` says so.

    Args:
        model: A network with one input and one output that ends in dense layers.
        cut: The tensor to cut at, which must be the input of one of those dense layers; None chooses.

    Raises:
        ExportError: There is no such place; the message says what was found.
    """
    model, end = _analysed(model)
    cuts = _cuts(model, end)
    start = _named(cuts, cut) if cut is not None else _choose(cuts)
    weights: Weights = {}
    for i, layer in enumerate(end.layers[start:]):
        weights[f"W{i}"], weights[f"b{i}"] = layer.w, layer.b
    trunk = _trunk(model, cuts[start])
    return Split(trunk, weights, cuts[start].tensor, end.activation)


def find_cuts(model: ModelProto) -> tuple[Cut, ...]:
    """Every place where the network could be split by the shape of its graph, first one first; none has been run."""
    try:
        return tuple(_cuts(*_analysed(model)))
    except ExportError:
        return ()


def run(model: ModelProto, x: FloatArray) -> FloatArray:
    """The first output of a network with one input, for float32 [N, ...], on one thread.

    Raises:
        RuntimeUnavailableError: The engine refuses the network or fails.
    """
    session = session_of(model)
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
    for node in graph.node:
        if not node.domain:  # said or left out, it is the standard one
            node.ClearField("domain")
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


def _analysed(model: ModelProto) -> tuple[ModelProto, DenseEnd]:
    """The graph with its shapes, and the dense layers it ends in.

    Raises:
        ExportError: No head can be cut off; the message is a sentence about the graph alone.
    """
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # raises classes of its C++ side
        raise ExportError(f"the shapes inside the graph contradict each other: {error}") from error
    _refuse_state(model)
    _refuse_data_dependent_shapes(model)
    for values, kind in ((model.graph.input, "input"), (model.graph.output, "output")):
        if len(values) != 1:
            names = ", ".join(repr(value.name) for value in values)
            raise ExportError(f"the network has {len(values)} {kind}s ({names}), a trunk has one")
    end = dense_end(model)
    if not end.layers:
        raise ExportError(end.obstacle)
    source = model.graph.input[0]
    shape = tensor_shape(source)
    if shape is not None and (not shape or isinstance(shape[0], int)):
        fixed = f"fixed at {shape[0]}" if shape else "missing"
        raise ExportError(f"the batch dimension of {source.name!r} is {fixed}; export the network with a dynamic batch")
    return model, end


def _refuse_state(model: ModelProto) -> None:
    node = next((node for node in all_nodes(model.graph) if node.op_type in _RECURRENT), None)
    inputs, outputs = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    if node is not None and len(inputs) > 1 and len(outputs) > 1:
        raise ExportError(
            f"the network carries recurrent state from call to call: {describe(node)} with inputs "
            f"{', '.join(map(repr, inputs))} and outputs {', '.join(map(repr, outputs))}"
        )


def _refuse_data_dependent_shapes(model: ModelProto) -> None:
    """Refuse a graph in which what is computed depends on values, not only on shapes."""
    values = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if values.isdisjoint(node.input) and not any(True for _ in _inner(node)):
            continue
        if node.op_type in ("Shape", "Size"):
            continue
        steered = node.op_type in _STEERED and values.intersection(node.input[: _STEERED[node.op_type]])
        output = _first_output_behind(model, node) if node.op_type in DATA_SHAPED or steered else None
        if output is not None and node.op_type == "NonMaxSuppression":
            raise ExportError(
                f"the output {output!r} ends in {describe(node)}: how many rows it has depends on the data"
            )
        if output is not None:
            kind = "control flow that depends on the data" if steered else "data-dependent shape"
            raise ExportError(f"{kind} at {describe(node)} on the way to {output!r}")
        values.update(node.output)


def _inner(node: NodeProto) -> Iterator[NodeProto]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from all_nodes(graph)


def _first_output_behind(model: ModelProto, node: NodeProto) -> str | None:
    for value in model.graph.output:
        if any(set(node.output) & set(part.output) for part in up_to(model, value.name).graph.node):
            return str(value.name)
    return None


def _cuts(model: ModelProto, end: DenseEnd) -> list[Cut]:
    return [
        Cut(
            tensor=layer.source,
            latent=layer.w.shape[0],
            dense_layers=len(end.layers) - i,
            parameters=sum(later.w.size + later.b.size for later in end.layers[i:]),
            obstacle=_obstacle(model, layer),
        )
        for i, layer in enumerate(end.layers)
    ]


def _obstacle(model: ModelProto, layer: Dense) -> str:
    width = layer.w.shape[0]
    if not _has_weights(up_to(model, layer.source)):
        return f"nothing with weights stands before {layer.source!r}, so there would be no trunk"
    if width > MAX_LATENT_BYTES:
        return f"the latent {layer.source!r} would have {width} values ({MAX_LATENT_BYTES} allowed)"
    return ""


def _has_weights(model: ModelProto) -> bool:
    """Whether a matrix or more is stored in the graph."""
    stored = [tensor.dims for tensor in model.graph.initializer]
    for node in all_nodes(model.graph):
        stored += [attribute.t.dims for attribute in node.attribute if node.op_type == "Constant"]
    return any(len(dims) >= 2 for dims in stored)


def _choose(cuts: list[Cut]) -> int:
    usable = [i for i, cut in enumerate(cuts) if not cut.obstacle]
    if not usable:
        raise ExportError("no usable cut: " + "; ".join(cut.obstacle for cut in cuts))
    return min(usable, key=lambda i: (cuts[i].latent, -i))


def _named(cuts: list[Cut], name: str) -> int:
    for i, cut in enumerate(cuts):
        if cut.tensor == name:
            if cut.obstacle and cut.latent <= MAX_LATENT_BYTES:
                raise ExportError(f"cannot cut at {name!r}: {cut.obstacle}")
            return i
    possible = ", ".join(cut.tensor for cut in cuts)
    raise ExportError(f"cannot cut at {name!r}: it feeds no dense layer at the end; possible are {possible}")


def _trunk(model: ModelProto, cut: Cut) -> ModelProto:
    """The graph up to the cut, in OPSET where the converter manages that, run to see that rows stay apart."""
    trunk = up_to(model, cut.tensor)
    trunk.graph.input[0].type.tensor_type.shape.dim[0].dim_param = BATCH
    del trunk.graph.output[:]
    trunk.graph.output.append(helper.make_tensor_value_info(cut.tensor, TensorProto.FLOAT, [BATCH, cut.latent]))
    try:
        results = [outputs[0] for outputs in run_rows(trunk, _BATCHES)]
    except RuntimeUnavailableError as error:
        raise ExportError(f"the part up to {cut.tensor!r} does not run with {_BATCHES} rows: {error}") from error
    for rows, latents in zip(_BATCHES, results, strict=True):
        if latents.shape != (rows, cut.latent) or latents.dtype != np.float32:
            raise ExportError(
                f"the latent {cut.tensor!r} is {latents.dtype} {list(latents.shape)} for {rows} rows, expected "
                f"float32 {[rows, cut.latent]}: the batch is fixed or mixed inside the graph"
            )
        if not close(latents[:1], results[0]):  # the first random row is the same in every batch
            raise ExportError(f"the rows of a batch change each other's latent {cut.tensor!r}; each must stand alone")
    if opset_of(trunk) == OPSET:
        return trunk
    converted = at_opset(trunk, OPSET)
    if converted is None and opset_of(trunk) < MIN_OPSET:
        raise ExportError(
            f"the graph is in opset {opset_of(trunk)} and cannot be brought to {OPSET}; export the network with "
            f"opset {MIN_OPSET} or later"
        )
    return converted or trunk
