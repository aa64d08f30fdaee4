"""Find the dense layers at the end of a graph, with their weights as plain matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from edge_sdk.types import FloatArray

ACTIVATIONS = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid"}
"""Last nodes that are left out of a head, which puts out logits."""

_SAME_ROWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Dense:
    """One dense layer: `source` [N, in] times w [in, out] plus b [out], all float32."""

    source: str
    w: FloatArray
    b: FloatArray


@dataclass(frozen=True)
class DenseEnd:
    """How a graph ends.

    Attributes:
        layers: The unbroken run of dense layers with ReLU between them at the end, first layer first.
        activation: What stands after the last of them: "softmax", "log_softmax", "sigmoid" or "".
        obstacle: Without layers, a sentence about what stands there instead.
    """

    layers: tuple[Dense, ...]
    activation: str
    obstacle: str


class _NotDenseError(Exception):
    """The walk from the output backwards met something else than a dense layer; the message says what."""


def dense_end(model: ModelProto) -> DenseEnd:
    """The dense layers at the end of a graph's first output.

    A layer is a Gemm, or a MatMul with fixed weights, with whatever can be folded into it: a bias added on
    either side, factors, a BatchNormalization. What leaves rows as they are (Identity, Dropout, a Reshape,
    Flatten or Squeeze from [N, C] to [N, C]) may stand anywhere between.

    Args:
        model: With the shapes that inference finds.
    """
    graph = _Graph(model)
    output = model.graph.output[0].name
    tensor = graph.behind(output)
    activation = graph.activation(tensor)
    if activation:
        tensor = graph.producers[tensor].input[0]
    layers: list[Dense] = []
    while True:
        try:
            layers.insert(0, graph.layer(tensor))
        except _NotDenseError as error:
            if not layers:
                before = f" before its {activation}" if activation else ""
                return DenseEnd((), "", f"the output {output!r} ends{before} in {error}")
            break
        relu = graph.producers.get(graph.behind(layers[0].source))
        if relu is None or relu.op_type != "Relu":
            break
        tensor = relu.input[0]
    return DenseEnd(tuple(layers), activation, "")


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, those inside If, Loop and Scan too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def describe(node: NodeProto) -> str:
    """The node as a person finds it: "Conv 'stem'", or by what it puts out when it has no name."""
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{kind} {node.name!r}" if node.name else f"{kind} (unnamed, puts out {node.output[0]!r})"


def tensor_shape(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """Sizes or names of the dimensions ("" for an unnamed one); None if not even their number is known."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim]


class _Graph:
    """What the walk looks up."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.producers = {name: node for node in graph.node for name in node.output}
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        known = (*graph.input, *graph.value_info, *graph.output)
        self._shapes = {value.name: tensor_shape(value) for value in known}
        self._opset = next((entry.version for entry in model.opset_import if not entry.domain), 1)

    def layer(self, tensor: str) -> Dense:
        """The dense layer that puts out `tensor`.

        Raises:
            _NotDenseError: There is none.
        """
        factor: npt.NDArray[np.float64] = np.ones(1)
        offset: npt.NDArray[np.float64] = np.zeros(1)
        while True:
            tensor = self.behind(tensor)
            node = self.producers.get(tensor)
            if node is None:
                raise _NotDenseError(f"the input {tensor!r} itself, without a dense layer between")
            if node.op_type in ("Gemm", "MatMul") and not node.domain:
                source, w, b = self._product(node)
                if max(factor.size, offset.size) not in (1, w.shape[1]):
                    raise _NotDenseError(f"{describe(node)}, followed by constants that change its width")
                bias = np.broadcast_to(b * factor + offset, (w.shape[1],))
                return Dense(source, np.ascontiguousarray(w * factor, np.float32), np.array(bias, np.float32))
            step = self._affine(node)
            if step is None:
                raise _NotDenseError(f"{describe(node)}, not in a dense layer (Gemm or MatMul with fixed weights)")
            tensor, inner_factor, inner_offset = step
            factor, offset = inner_factor * factor, inner_offset * factor + offset

    def behind(self, tensor: str) -> str:
        """The tensor from which `tensor` differs in name and batch-wise shape alone."""
        while (node := self.producers.get(tensor)) is not None and self._keeps_rows(node):
            tensor = node.input[0]
        return tensor

    def activation(self, tensor: str) -> str:
        node = self.producers.get(tensor)
        if node is None or node.op_type not in ACTIVATIONS:
            return ""
        shape = self._shapes.get(node.input[0])
        if shape is not None and len(shape) != 2:
            return ""
        axis = _attribute(node, "axis", -1 if self._opset >= 13 else 1)
        return ACTIVATIONS[node.op_type] if node.op_type == "Sigmoid" or axis in (1, -1) else ""

    def _keeps_rows(self, node: NodeProto) -> bool:
        if node.op_type == "Identity":
            return True
        if node.op_type == "Dropout":
            training = self._constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            return training is None or not training.any()
        if node.op_type not in _SAME_ROWS:
            return False
        before, after = self._shapes.get(node.input[0]), self._shapes.get(node.output[0])
        if before is None or after is None or len(before) != 2 or not isinstance(before[1], int):
            return False
        # [N, C] to [N, C], or [N, 1] to [N]: the number of values fixes the rest
        return after[1:] == before[1:] or (len(after) == 1 and before[1] == 1)

    def _product(self, node: NodeProto) -> tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        source, shape = node.input[0], self._shapes.get(node.input[0])
        w = self._constant(node.input[1])
        b: npt.NDArray[Any] | None = np.zeros(1)
        if len(node.input) > 2 and node.input[2]:
            b = self._constant(node.input[2])
        if w is None or b is None:
            raise _NotDenseError(f"{describe(node)}, whose weights are computed, not fixed")
        if w.dtype != np.float32:
            raise _NotDenseError(f"{describe(node)} with {w.dtype} weights; export the network in float32")
        if node.op_type == "MatMul" and (w.ndim != 2 or (shape is not None and len(shape) != 2)):
            sizes = "" if shape is None else f" {shape}"
            raise _NotDenseError(
                f"{describe(node)} on a {len(shape or w.shape)}-D tensor{sizes}, and a head takes one vector a row: "
                "average or flatten the positions before the last layers"
            )
        if _attribute(node, "transA", 0):
            before = self.producers.get(source)
            if before is None or before.op_type != "Transpose" or _attribute(before, "perm", [1, 0]) != [1, 0]:
                raise _NotDenseError(
                    f"{describe(node)}, which reads its input transposed (transA = 1): rows must come first"
                )
            source = before.input[0]
        if _attribute(node, "transB", 0):
            w = w.T
        if b.size not in (1, w.shape[1]) or (b.ndim and b.shape[-1] != b.size):
            raise _NotDenseError(f"{describe(node)} with a bias of its own for each row, of shape {b.shape}")
        return (
            source,
            w.astype(np.float64) * _attribute(node, "alpha", 1.0),
            b.reshape(-1).astype(np.float64) * _attribute(node, "beta", 1.0),
        )

    def _affine(self, node: NodeProto) -> tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """What the node multiplies and then adds, the same for each row; None if it does anything else."""
        one, zero = np.ones(1), np.zeros(1)
        if node.op_type == "BatchNormalization" and not _attribute(node, "training_mode", 0):
            values = [self._constant(name) for name in node.input[1:5]]
            if any(value is None for value in values):
                return None
            scale, shift, mean, variance = (np.asarray(value, np.float64) for value in values)
            factor = scale / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
            return node.input[0], factor, shift - mean * factor
        if node.op_type not in ("Add", "Sub", "Mul", "Div"):
            return None
        right, left = self._row(node.input[1]), self._row(node.input[0])
        if right is not None:
            pair = {"Add": (one, right), "Sub": (one, -right), "Mul": (right, zero)}.get(node.op_type)
            return node.input[0], *(pair or (1 / right, zero))
        if left is not None and node.op_type != "Div":
            pair = {"Add": (one, left), "Sub": (-one, left)}.get(node.op_type, (left, zero))
            return node.input[1], *pair
        return None

    def _row(self, name: str) -> npt.NDArray[np.float64] | None:
        """A constant that is one number, or one for each column."""
        value = self._constant(name)
        if value is None or value.ndim > 2 or (value.ndim and value.shape[-1] != value.size):
            return None
        return value.reshape(-1).astype(np.float64)

    def _constant(self, name: str) -> npt.NDArray[Any] | None:
        if name in self._tensors:
            return np.asarray(numpy_helper.to_array(self._tensors[name]))
        node = self.producers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            value = _attribute(node, "value", None)
            return None if value is None else np.asarray(numpy_helper.to_array(value))
        if node.op_type not in ("Identity", "Transpose") or (inner := self._constant(node.input[0])) is None:
            return None
        return inner if node.op_type == "Identity" else inner.transpose(_attribute(node, "perm", None))


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
