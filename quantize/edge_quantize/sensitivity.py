"""Which layers lose most in INT8, measured on samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from xml.sax.saxutils import escape

import msgspec
import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edge_quantize.calibrate import Feeds, Probe, calls
from edge_quantize.errors import DataError
from edge_quantize.metrics import sqnr_db
from edge_quantize.quantize import Quantizer, QuantRecipe
from edge_sdk.types import AnyArray

EXACT_DB = 120.0
"""Shown for no error at all, and for less than float arithmetic itself makes."""
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_RAW = "_QuantizeLinear_Input"
_OWN, _UNWEIGHTED = "own/", "unweighted/"
# ops that pass eight bits on with the scale they came with: they share the range of their input
_PASS = ("MaxPool", "AveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Relu", "Clip")


class LayerSensitivity(msgspec.Struct, frozen=True):
    """What quantization does to one layer.

    Attributes:
        name: The node.
        op: What it does.
        sqnr_db: Signal to quantization noise of its output with everything quantized, in dB: what it and all
            layers before it do. Ends at 120.
        own_db: The same with everything before it in float: what it does alone; the lower, the more harm.
        cause: What makes most of that noise: rounding the "weights", rounding what it reads ("input"), or rounding
            its "output".
        float_nodes: What must stay in float to be rid of it: the layer, and where rounding a tensor is the cause,
            all that put out or read this tensor, as any of them in INT8 would round it again.
        gain_db: How much better the network's output gets with `float_nodes` alone in float; None if not measured.
    """

    name: str
    op: str
    sqnr_db: float
    own_db: float
    cause: str
    float_nodes: tuple[str, ...]
    gain_db: float | None = None


class Sensitivity(msgspec.Struct, frozen=True):
    """Every quantized layer of a network, the most harmed first.

    Attributes:
        recipe: How it was quantized.
        rows: Rows, or calls, it was measured on.
        output_db: Signal to quantization noise of the network's first output, in dB.
        layers: By `gain_db` where it was measured, else by `own_db`.
    """

    recipe: QuantRecipe
    rows: int
    output_db: float
    layers: list[LayerSensitivity]

    def worst(self, count: int) -> tuple[str, ...]:
        """What must stay in float to be rid of the `count` most harmful layers' noise."""
        return tuple(dict.fromkeys(name for layer in self.layers[:count] for name in layer.float_nodes))

    def table(self) -> str:
        """Plain text for a terminal."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}} {'op':14}{'own dB':>8}{'output dB':>11}{'gain dB':>9}  cause"]
        for layer in self.layers:
            gain = "" if layer.gain_db is None else f"{layer.gain_db:+.1f}"
            lines.append(
                f"{layer.name:{width}} {layer.op:14}{layer.own_db:>8.1f}{layer.sqnr_db:>11.1f}{gain:>9}  {layer.cause}"
            )
        return "\n".join([*lines, f"output {self.output_db:.1f} dB on {self.rows} rows; {self.recipe.name}"])

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def plot(self, *, count: int = 30) -> str:
        """The `count` most harmed layers as bars of their own SQNR (short is bad): an SVG to put into a page."""
        shown = self.layers[:count]
        top = max([layer.own_db for layer in shown] + [1.0])
        height = 20 * len(shown) + 40
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" role="img" font-size="12">',
            f"<title>{escape(f'Signal to quantization noise a layer, in dB: {self.recipe.name}')}</title>",
            '<text x="250" y="16" fill="currentColor">noise the layer adds, SQNR in dB (short is bad)</text>',
        ]
        for i, layer in enumerate(shown):
            y, width = 20 * i + 26, 400 * max(layer.own_db, 0.0) / top
            colour = "#c0392b" if layer.own_db < 20 else "#d68910" if layer.own_db < 30 else "#2874a6"
            name = layer.name if len(layer.name) <= 36 else f"{layer.name[:35]}…"
            parts.append(
                f"<g><title>{escape(f'{layer.name} ({layer.op}), {layer.cause}')}</title>"
                f'<text x="244" y="{y + 12}" text-anchor="end" fill="currentColor">{escape(name)}</text>'
                f'<rect x="250" y="{y}" width="{width:.1f}" height="15" fill="{colour}"/>'
                f'<text x="{255 + width:.1f}" y="{y + 12}" fill="currentColor">{layer.own_db:.1f}</text></g>'
            )
        return "\n".join([*parts, "</svg>"])


def sensitivity(
    model: ModelProto, x: Feeds, recipe: QuantRecipe | None = None, *, rows: int = 64, exact: bool = False
) -> Sensitivity:
    """Measure how much each layer of a network suffers from quantization.

    Args:
        model: A float graph.
        x: Calibration rows.
        recipe: None takes the default.
        rows: On how many of the rows, or calls, the layers are measured.
        exact: Also quantize the network once for each layer, with that layer in float.

    Raises:
        DataError: An activation is not finite on these rows, or an input is missing.
        ExportError: ONNX Runtime cannot quantize the graph.
        RuntimeUnavailableError: The engine refuses the graph.
    """
    return measure(Quantizer(model, x), recipe or QuantRecipe(), rows=rows, exact=exact)


def measure(quantizer: Quantizer, recipe: QuantRecipe, *, rows: int = 64, exact: bool = False) -> Sensitivity:
    """As `sensitivity`, on a network whose calibration rows have been measured before."""
    x, count = _some(quantizer, rows)
    quantized = quantizer.graph(recipe)
    layers = _Layers(quantizer.model, quantized)
    noise = layers.noise(x)
    output = quantizer.model.graph.output[0].name
    found = []
    for layer in layers.nodes:
        of = noise[layer.tensor]
        if of.last > of.own / 2:
            cause, group = "output", layers.group(layer, [layer.tensor])
        elif of.activations > of.own / 2:
            cause, group = "input", layers.group(layer, layer.sources or layer.reads)
        else:
            cause, group = "weights", (layer.node.name,)
        found.append(LayerSensitivity(layer.node.name, layer.node.op_type, _db(of.total), _db(of.own), cause, group))
    output_db = _db(noise[output].total) if output in noise else _output_db(quantizer, quantized, x)
    if exact:
        found = [_with_gain(layer, quantizer, recipe, x, output_db) for layer in found]
    found.sort(key=lambda layer: (-layer.gain_db if layer.gain_db is not None else layer.own_db, layer.name))
    return Sensitivity(recipe, count, output_db, found)


@dataclass(frozen=True)
class _Layer:
    """A node, the tensor it puts out, its name before rounding, those it reads, and the layers' outputs behind them."""

    node: NodeProto
    tensor: str
    made: str
    reads: list[str]
    sources: list[str]


@dataclass(frozen=True)
class _Noise:
    """Of a tensor, noise by power of its signal.

    With the whole network in INT8; with its layer alone; so, but its weights in float; by its last rounding alone.
    """

    total: float
    own: float
    activations: float
    last: float


class _Layers:
    """The layers of a quantized graph, and which tensor of the float graph each one puts out."""

    def __init__(self, model: ModelProto, quantized: ModelProto) -> None:
        self._model, self._quantized = model, quantized
        known = {name for node in model.graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
        self._ended = {node.input[0]: node for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
        self._makers: dict[str, NodeProto] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        self._restored: dict[str, str] = {}
        origin: dict[str, str] = {}
        sources: dict[str, list[str]] = {}
        self.nodes: list[_Layer] = []
        for node in quantized.graph.node:
            if node.op_type in _QDQ:
                tensor = origin.get(node.input[0], node.input[0])
                origin[node.output[0]] = tensor
                if node.op_type == "DequantizeLinear":
                    self._restored[tensor] = node.output[0]
                continue
            # what comes from constants is no tensor to be rounded on the way
            reads = [name for name in dict.fromkeys(origin.get(n, n) for n in node.input) if name in known]
            reads += [value.name for value in model.graph.input if value.name in {origin.get(n, n) for n in node.input}]
            for name in reads:
                self._readers.setdefault(name, []).append(node)
            noisy = list(dict.fromkeys(source for name in reads for source in sources.get(name, ())))
            for made in node.output:
                tensor = made.removesuffix(_RAW)
                origin[made], self._makers[tensor], sources[tensor] = tensor, node, noisy
                if tensor in known and made in self._ended:
                    self.nodes.append(_Layer(node, tensor, made, reads, noisy))
                    sources[tensor] = [tensor]

    def noise(self, x: Feeds) -> dict[str, _Noise]:
        """Of each layer's output, in one pass."""
        tensors = [layer.tensor for layer in self.nodes]
        restored = [self._restored[tensor] for tensor in tensors]
        alone = [prefix + layer.made for prefix in (_OWN, _UNWEIGHTED) for layer in self.nodes]
        together = Probe(self._quantized, restored).run(x)
        sums = {tensor: np.zeros(5) for tensor in tensors}
        # both take the same rows, as each is asked for one value or three for each of the same tensors
        for rounded, each in zip(together, Probe(self._alone(), [*tensors, *alone]).run(x, share=3), strict=True):
            for layer, name in zip(self.nodes, restored, strict=True):
                value = each[layer.tensor].astype(np.float64)
                versions = (
                    0.0,
                    rounded[name],
                    self._rounded(layer, each[_OWN + layer.made]),
                    self._rounded(layer, each[_UNWEIGHTED + layer.made]),
                    self._rounded(layer, value),
                )
                sums[layer.tensor] += [np.square(value - version).sum() for version in versions]
        return {
            tensor: _Noise(*(float(noise / max(power, 1e-30)) for noise in noises))
            for tensor, (power, *noises) in sums.items()
        }

    def _alone(self) -> ModelProto:
        """The float graph and beside it each quantized layer, fed from the float graph; once more in float weights."""
        graph = ModelProto()
        graph.CopyFrom(self._model)
        right = {name for node in self._model.graph.node for name in node.output}
        right |= {value.name for value in self._model.graph.input}
        for prefix, source in (
            (_OWN, self._quantized),
            (_UNWEIGHTED, _with_float_weights(self._quantized, self._model)),
        ):
            for tensor in source.graph.initializer:
                graph.graph.initializer.add().CopyFrom(tensor)
                graph.graph.initializer[-1].name = prefix + tensor.name
            for node in source.graph.node:
                copy = graph.graph.node.add()
                copy.CopyFrom(node)
                copy.name = prefix + node.name
                for i, name in enumerate(node.input):
                    plain = name.removesuffix(_RAW)
                    copy.input[i] = plain if plain in right or not name else prefix + name
                copy.output[:] = [prefix + name if name else "" for name in node.output]
        return graph

    def group(self, layer: _Layer, tensors: list[str]) -> tuple[str, ...]:
        """The layer and all that would round the tensors again, through those that pass eight bits on."""
        pending = list(tensors)
        found = dict.fromkeys([layer.node.name, *(self._makers[name].name for name in tensors if name in self._makers)])
        while pending:
            for reader in self._readers.get(pending.pop(), []):
                if reader.name not in found and reader.op_type in _PASS:
                    pending.extend(name.removesuffix(_RAW) for name in reader.output)
                found[reader.name] = None
        names = {node.name for node in self._model.graph.node}
        return tuple(name for name in found if name in names)

    def _rounded(self, layer: _Layer, value: AnyArray) -> AnyArray:
        """What the QuantizeLinear after a layer makes of a value."""
        names = self._ended[layer.made].input[1:3]
        scale, zero = (numpy_helper.to_array(self._constants[name]) for name in names)
        limits = np.iinfo(zero.dtype)
        codes = np.clip(np.rint(value / scale) + zero, limits.min, limits.max)
        restored: AnyArray = (codes - float(zero)) * scale
        return restored


def _with_float_weights(quantized: ModelProto, model: ModelProto) -> ModelProto:
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = {tensor.name for tensor in quantized.graph.initializer}
    changed = ModelProto()
    changed.CopyFrom(quantized)
    for node in changed.graph.node:
        name = node.input[0].removesuffix("_quantized") if node.input else ""
        if node.op_type == "DequantizeLinear" and node.input[0] in constants and name in weights:
            weight = changed.graph.initializer.add()
            weight.CopyFrom(weights[name])
            weight.name = f"{name}_in_float"  # a bias keeps its name behind its DequantizeLinear
            if weight.name in constants:
                changed.graph.initializer.pop()
            constants.add(weight.name)
            node.CopyFrom(helper.make_node("Identity", [weight.name], [node.output[0]], name=node.name))
    return changed


def _with_gain(
    layer: LayerSensitivity, quantizer: Quantizer, recipe: QuantRecipe, x: Feeds, output_db: float
) -> LayerSensitivity:
    nodes = tuple(dict.fromkeys([*recipe.float_nodes, *layer.float_nodes]))
    better = quantizer.graph(msgspec.structs.replace(recipe, float_nodes=nodes))
    return msgspec.structs.replace(layer, gain_db=_output_db(quantizer, better, x) - output_db)


def _output_db(quantizer: Quantizer, quantized: ModelProto, x: Feeds) -> float:
    name = quantizer.model.graph.output[0].name
    pairs = zip(Probe(quantizer.model, [name]).run(x), Probe(quantized, [name]).run(x), strict=True)
    right, rounded = zip(*((a[name].ravel(), b[name].ravel()) for a, b in pairs), strict=True)
    found = sqnr_db(np.concatenate(right), np.concatenate(rounded))
    return EXACT_DB if found is None else min(found, EXACT_DB)


def _some(quantizer: Quantizer, rows: int) -> tuple[Feeds, int]:
    """Rows taken evenly from the calibration rows, and how many."""
    x = quantizer.x
    if isinstance(x, np.ndarray):
        taken = x[:: max(1, len(x) // rows)][:rows]
        return taken, len(taken)
    each = list(islice(calls(quantizer.model, x, rows=1), rows)) if isinstance(x, Mapping) else list(x[:rows])
    if not each:
        raise DataError("sensitivity: there are no calibration rows")
    return each, len(each)


def _db(noise: float) -> float:
    return float(min(-10 * np.log10(max(noise, 1e-30)), EXACT_DB))
