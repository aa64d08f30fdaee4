"""Change a graph without changing what it computes, and prove it by running both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from edge_quantize.dense import all_nodes, tensor_shape
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.runtime import new_session

Feeds = Mapping[str, npt.NDArray[Any]]

_SIZES = (32, 224, 1024)
"""Tried in this order for dimensions that the graph leaves open beside the batch."""
_TOLERANCE = 1e-3
"""Of two float results, relative to the largest value."""


def session_of(model: ModelProto, name: str = "model.onnx") -> Any:
    """An ONNX Runtime session for a graph in memory.

    Args:
        model: The graph.
        name: What the engine's messages shall call it.

    Raises:
        RuntimeUnavailableError: The engine refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(model.SerializeToString())
        return new_session(path)


def sample_feeds(model: ModelProto, rows: int, *, size: int = _SIZES[0]) -> dict[str, npt.NDArray[Any]] | None:
    """Random inputs, the same for every call: normal floats, whole numbers 0 and 1.

    Args:
        model: The graph.
        rows: Size of the first dimension, and of any other with the same name.
        size: Of every other open dimension.

    Returns:
        One array an input; None if an input is no tensor of numbers or has an unknown rank.
    """
    rng = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[Any]] = {}
    batch = {(tensor_shape(value) or [""])[0] for value in model.graph.input} - {""}
    for value in model.graph.input:
        shape, kind = tensor_shape(value), value.type.tensor_type.elem_type
        if shape is None or kind in (TensorProto.UNDEFINED, TensorProto.STRING):
            return None
        sizes = [
            dim if isinstance(dim, int) else rows if dim in batch or not i else size for i, dim in enumerate(shape)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        numbers = rng.normal(size=sizes) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, sizes)
        feeds[value.name] = np.asarray(numbers, dtype)
    return feeds


def run_rows(model: ModelProto, batches: tuple[int, ...]) -> list[list[npt.NDArray[Any]]]:
    """Every output on random inputs, for each batch size; open dimensions get the first size that runs.

    Raises:
        RuntimeUnavailableError: The graph runs with none; the message is the engine's.
    """
    session = session_of(model)
    failure: Exception | None = None
    for size in _SIZES if _has_open_dimensions(model) else _SIZES[:1]:
        try:
            return [session.run(None, sample_feeds(model, rows, size=size) or {}) for rows in batches]
        except Exception as error:  # noqa: BLE001 - the engine's exceptions share no base class of their own
            failure = error
    raise RuntimeUnavailableError(f"ONNX Runtime fails: {failure}")


def close(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two results are the same but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not np.issubdtype(a.dtype, np.floating):
        return bool(np.array_equal(a, b))
    largest = float(np.abs(b, where=np.isfinite(b), out=np.zeros(b.shape)).max(initial=0))
    return bool(np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * min(1.0, largest), equal_nan=True))


def opset_of(model: ModelProto) -> int:
    """Version of the standard operators the graph uses; 0 if it names none."""
    return next((int(entry.version) for entry in model.opset_import if not entry.domain), 0)


def at_opset(model: ModelProto, opset: int) -> ModelProto | None:
    """The graph in another opset; None if the converter cannot, or if the result computes something else."""
    if opset_of(model) == opset:
        return model
    try:
        converted: ModelProto = version_converter.convert_version(model, opset)
        before, after = run_rows(model, (2,)), run_rows(converted, (2,))
    except Exception:  # noqa: BLE001 - the converter raises whatever its C++ asserts
        return None
    return converted if all(close(a, b) for a, b in zip(after[0], before[0], strict=True)) else None


def up_to(model: ModelProto, tensor: str) -> ModelProto:
    """The part of the graph that computes `tensor`, its only output; inputs stay."""
    graph = model.graph
    needed = {tensor}
    nodes: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.insert(0, node)
            needed.update(_reads(node))
    output = next((v for v in (*graph.value_info, *graph.output, *graph.input) if v.name == tensor), None)
    part = helper.make_graph(
        nodes,
        graph.name,
        graph.input,
        [output or helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None)],
        [value for value in graph.initializer if value.name in needed],
        sparse_initializer=[value for value in graph.sparse_initializer if value.values.name in needed],
    )
    result = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    result.functions.extend(model.functions)
    return result


def with_free_batch(model: ModelProto, name: str) -> ModelProto:
    """Free a batch dimension that the file fixes at 1, if the rows then come out as one by one.

    Reshapes that spell the 1 out copy the dimension instead. Two and three random rows must give what each
    gives alone, and must differ from each other, for otherwise nothing would be proven.

    Args:
        model: All its inputs have 1 as their first dimension, otherwise it is returned as it is.
        name: What the dimension is called from then on.

    Returns:
        The freed graph, or the given one.
    """
    shapes = [tensor_shape(value) for value in model.graph.input]
    if not shapes or not all(shape and shape[0] == 1 for shape in shapes):
        return model
    freed = _freed(model, name)
    try:
        alone = session_of(model)
        together = session_of(freed)
        proven = False
        for rows in (2, 3):
            feeds = sample_feeds(freed, rows) or {}
            single = [alone.run(None, {k: v[i : i + 1] for k, v in feeds.items()}) for i in range(rows)]
            for got, parts in zip(together.run(None, feeds), zip(*single, strict=True), strict=True):
                if not close(got, np.concatenate(parts)):
                    return model
                proven |= not close(parts[0], parts[1])
    except Exception:  # noqa: BLE001 - an engine that fails with more rows has answered the question
        return model
    return freed if proven else model


def _freed(model: ModelProto, name: str) -> ModelProto:
    shapes = {value.name: tensor_shape(value) for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    shapes.update({value.name: tensor_shape(value) for value in model.graph.input})
    freed = ModelProto()
    freed.CopyFrom(model)
    graph = freed.graph
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        if (tensor_shape(value) or [0])[0] == 1:
            value.type.tensor_type.shape.dim[0].dim_param = name
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    fixed.update(
        {
            node.output[0]: numpy_helper.to_array(attribute.t)
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
    )
    for i, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[1] not in fixed or (shapes.get(node.input[0]) or [0])[0] != 1:
            continue
        target = fixed[node.input[1]].copy()
        if target.size > 1 and target[0] == 1:
            target[0] = 0  # in ONNX: as the input has it
            graph.initializer.append(numpy_helper.from_array(target, f"{name}_free_shape_{i}"))
            node.input[1] = f"{name}_free_shape_{i}"
    return freed


def _reads(node: NodeProto) -> set[str]:
    """The node's inputs, and what graphs inside it take from around them."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(name for inner in all_nodes(graph) for name in inner.input)
            names.update(value.name for value in graph.output)
    return names - {""}


def _has_open_dimensions(model: ModelProto) -> bool:
    return any(isinstance(dim, str) for value in model.graph.input for dim in (tensor_shape(value) or [])[1:])
