"""The edges of a graph that is served whole: inputs that never change, and what the task makes of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_quantize.graph import OPSET
from edge_sdk.errors import ConfigError
from edge_sdk.manifest import StateSpec, TargetSpec
from edge_sdk.types import AnyArray


def answer_of(model: ModelProto, carried: Sequence[StateSpec]) -> Any:
    """The first output that is no state.

    Raises:
        ConfigError: There is none.
    """
    states = {state.output for state in carried}
    for value in model.graph.output:
        if value.name not in states:
            return value
    raise ConfigError(f"the graph puts out {', '.join(sorted(states))} alone, which are declared as its state")


def fix_inputs(model: ModelProto, values: Mapping[str, Any]) -> ModelProto:
    """The graph with some inputs turned into constants.

    Raises:
        ConfigError: There is no such input.
    """
    fixed = ModelProto()
    fixed.CopyFrom(model)
    inputs = {value.name: value for value in fixed.graph.input}
    for name, value in values.items():
        if name not in inputs:
            raise ConfigError(f"cannot fix {name!r}: the graph's inputs are {', '.join(inputs)}")
        dtype = helper.tensor_dtype_to_np_dtype(inputs[name].type.tensor_type.elem_type)
        fixed.graph.input.remove(inputs[name])
        fixed.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
    return fixed


def activated(model: ModelProto, kind: str, *, carried: Sequence[StateSpec] = ()) -> ModelProto:
    """The graph with Softmax or Sigmoid behind its answer, which is called "probabilities" then."""
    options: dict[str, Any] = {"axis": 1} if kind == "Softmax" else {}
    return _ended(model, carried, "probabilities", {}, lambda source, result: [
        helper.make_node(kind, [source], [result], name=result, **options)
    ])  # fmt: skip


def in_units(model: ModelProto, targets: Sequence[TargetSpec], *, carried: Sequence[StateSpec] = ()) -> ModelProto:
    """The graph with standardised numbers taken back to the targets' units, in an output called "values"."""
    columns = {f"target_{name}": np.array([getattr(t, name) for t in targets], np.float32) for name in ("std", "mean")}
    return _ended(model, carried, "values", columns, lambda source, result: [
        helper.make_node("Mul", [source, "target_std"], ["values_scaled"], name="values_scaled"),
        helper.make_node("Add", ["values_scaled", "target_mean"], [result], name=result),
    ])  # fmt: skip


def _ended(
    model: ModelProto,
    carried: Sequence[StateSpec],
    name: str,
    stored: Mapping[str, AnyArray],
    nodes: Callable[[str, str], list[NodeProto]],
) -> ModelProto:
    """The graph with nodes behind its answer, whose result takes the answer's place among the outputs."""
    ended = ModelProto()
    ended.CopyFrom(model)
    answer, graph = answer_of(ended, carried), ended.graph
    taken = {part for node in graph.node for part in (*node.input, *node.output)}
    while name in taken:
        name += "_"
    place = [value.name for value in graph.output].index(answer.name)
    shape = [dim.dim_param or dim.dim_value or None for dim in answer.type.tensor_type.shape.dim]
    outputs = list(graph.output)
    outputs[place] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph.node.extend(nodes(answer.name, name))
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in stored.items())
    del graph.output[:]
    graph.output.extend(outputs)
    if not any(opset.domain == "" for opset in ended.opset_import):
        ended.opset_import.append(helper.make_opsetid("", OPSET))
    return ended
