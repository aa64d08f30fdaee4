"""Read an ONNX file from anywhere: whole, in one piece, and without code of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, inliner
from onnx.external_data_helper import ExternalDataInfo

from edge_quantize.dense import all_nodes, describe
from edge_quantize.errors import ExportError
from edge_quantize.rewrite import session_of
from edge_sdk.errors import RuntimeUnavailableError

_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")
"""Operators that ONNX Runtime brings itself."""
_MAX_BYTES = 2**31 - 1
"""What one protobuf message can hold."""
_HALF_BYTES = (TensorProto.INT4, TensorProto.UINT4)


def read_model(path: Path) -> ModelProto:
    """The graph in a file, with the weights that lie beside it, functions expanded.

    Raises:
        ExportError: The file is missing or damaged, its weights lie elsewhere, or it needs operators of others.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path.name} cannot be read: {error.strerror}") from error
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # of protobuf, which has no types
        raise ExportError(f"{path.name} is no ONNX file, or a damaged one: {error}") from error
    if not model.opset_import or not model.graph.node:
        raise ExportError(f"{path.name} is no ONNX file, or an empty one: it holds no graph")
    _name_standard_domain(model)
    _inline_external_data(model, path)
    _refuse_custom_ops(model, path.name)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ExportError(f"{path.name} breaks the rules of ONNX: {_one_line(error)}") from error
    if model.functions:
        model = inliner.inline_local_functions(model)
    _initializers_are_no_inputs(model)
    return model


def check_runs(model: ModelProto, name: str) -> None:
    """Let ONNX Runtime load the graph.

    Raises:
        ExportError: It cannot; the message names the node where the engine does.
    """
    try:
        session_of(model, name)
    except RuntimeUnavailableError as error:
        said = _one_line(error)
        guilty = next((node for node in all_nodes(model.graph) if f"{node.op_type}(" in said), None)
        where = "" if guilty is None or f"'{guilty.name}'" in said else f" at {describe(guilty)}"
        raise ExportError(
            f"ONNX Runtime cannot run {name}{where}: {said}. Export the network with operators and an opset that "
            "this version of ONNX Runtime knows"
        ) from error


def _name_standard_domain(model: ModelProto) -> None:
    """Files may call the standard domain "ai.onnx" instead of ""."""
    for entry in model.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    for node in (*all_nodes(model.graph), *(node for function in model.functions for node in function.node)):
        node.domain = "" if node.domain == "ai.onnx" else node.domain


def _inline_external_data(model: ModelProto, path: Path) -> None:
    size = model.ByteSize()
    for tensor, owner in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = f"{path.name}: tensor {tensor.name!r}{owner}"
        tensor.raw_data = _external_bytes(tensor, path.parent, where)
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
        size += len(tensor.raw_data)
        if size > _MAX_BYTES:
            raise ExportError(f"{path.name} has more than 2 GB of weights; a device cannot serve it")


def _external_bytes(tensor: TensorProto, folder: Path, where: str) -> bytes:
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        raise ExportError(f"{where}: {error}; export the network again") from error
    location = Path(info.location)
    target = (folder / location).resolve()
    if location.is_absolute() or ".." in location.parts or not target.is_relative_to(folder.resolve()):
        raise ExportError(
            f"{where} has its data outside the file's folder, in {info.location!r}; put that file beside the "
            "model (no link) and name it there, or save the model in one piece"
        )
    if not target.is_file():
        raise ExportError(f"{where} has its data in {info.location!r}, which is not there; copy it beside the model")
    offset = info.offset or 0
    with target.open("rb") as file:
        file.seek(offset)
        data = file.read() if info.length is None else file.read(info.length)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    expected = (count + 1) // 2 if tensor.data_type in _HALF_BYTES else count * _item_bytes(tensor.data_type)
    if len(data) != expected:
        raise ExportError(
            f"{where} has {len(data)} bytes of data in {info.location!r} from {offset} on, expected {expected}; "
            "the file is damaged or belongs to another model"
        )
    return data


def _item_bytes(data_type: int) -> int:
    try:
        return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, TypeError, ValueError):
        return 0  # no type of fixed size: whatever is stored does not fit it


def _refuse_custom_ops(model: ModelProto, name: str) -> None:
    functions = {(function.domain, function.name) for function in model.functions}
    for node in (*all_nodes(model.graph), *(node for function in model.functions for node in function.node)):
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in functions:
            raise ExportError(
                f"{name}: {describe(node)} is an operator of the custom domain {node.domain!r}, which needs a library "
                "of its own; devices load none: export the network with standard operators"
            )


def _initializers_are_no_inputs(model: ModelProto) -> None:
    """Old files list weights among the inputs, where a caller could replace them; they become constants."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # before that, each weight had to be an input


def _tensors(model: ModelProto) -> Iterator[tuple[TensorProto, str]]:
    """Every stored tensor, and after it where it belongs, as text."""
    for graph in _graphs(model.graph):
        readers = {name: node for node in reversed(graph.node) for name in node.input}
        for tensor in graph.initializer:
            reader = readers.get(tensor.name)
            yield tensor, "" if reader is None else f" of {describe(reader)}"
    for node in (*all_nodes(model.graph), *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            for tensor in (attribute.t, *attribute.tensors):
                yield tensor, f" of {describe(node)}"


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
