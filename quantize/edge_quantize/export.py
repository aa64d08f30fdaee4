"""A torch network as ONNX. The only file of the SDK's tools that imports torch."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edge_quantize.dense import describe
from edge_quantize.errors import ExportError, ParityError
from edge_quantize.graph import BATCH, DATA_SHAPED, OPSET, Split, run
from edge_quantize.rewrite import run_rows
from edge_sdk.errors import ConfigError, MissingExtraError, RuntimeUnavailableError
from edge_sdk.head import Head
from edge_sdk.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.nn import Module as Module  # noqa: PLC0414 - for files that may not import torch

Exporter = Literal["dynamo", "classic"]
AnyArray = npt.NDArray[Any]

_BATCHES = (1, 2, 7)
_LOUD = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")
_NEEDLESS: tuple[tuple[str, type[Warning]], ...] = (
    (r".*isinstance\(treespec, LeafSpec\)", FutureWarning),
    (r"_check_is_size will be removed", FutureWarning),
    (r"You are using the legacy TorchScript", DeprecationWarning),
    (r"The feature will be removed", DeprecationWarning),
    (r"The tensor attributes self\..* were assigned during export", UserWarning),  # nn.LSTM does
    (r"# The axis name: batch will not be used", UserWarning),  # several inputs share it
    (r"Exporting a model to ONNX with a batch_size other than 1", UserWarning),  # other sizes are run below
)
"""What torch says about itself, and not about the network."""
_PARITY = 1e-3
"""Allowed difference of the logits from torch's, relative to the largest of them."""


def export_onnx(
    model: Module,
    example: FloatArray | Sequence[AnyArray],
    *,
    input_name: str = "input",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] = ("logits",),
    batch_axes: Mapping[str, int | None] | None = None,
    exporter: Exporter = "dynamo",
) -> ModelProto:
    """The network in eval mode as an ONNX graph with a free batch dimension. The module is left as it is.

    Args:
        model: Takes float32 [N, ...] and returns logits float32 [N, C]; or takes and returns several tensors.
        example: float32 [N, ...], N >= 2, as the network takes it: after preprocessing. For several inputs one
            array each, in the order of `forward`.
        input_name: What the graph's only input is called.
        input_names: For several inputs: what each is called.
        output_names: What each output is called; a network with state returns the new state last.
        batch_axes: Where the batch stands, by input name; 0 for what is not named, None for an input without
            one, such as a state kept for one stream.
        exporter: "dynamo" is torch's current one. "classic" is its predecessor, which follows one run of the
            network instead of its code: for a network that the first refuses. It keeps the branches which the
            example takes, and torch warns with the line (TracerWarning) where it does.

    Raises:
        ExportError: It is no network, or torch cannot express it in ONNX, or only for one batch size; the message
            names the module or line that torch names.
        MissingExtraError: torch is not installed.
        ValueError: Names and examples do not match.
    """
    torch = _torch()
    if not isinstance(model, torch.nn.Module):
        raise ExportError(f"a network is a torch module, an ONNX graph or the path of one, got {type(model).__name__}")
    arrays: list[AnyArray] = [example] if isinstance(example, np.ndarray) else list(example)
    names = list(input_names or ([input_name] if len(arrays) == 1 else []))
    if len(names) != len(arrays) or not set(batch_axes or {}) <= set(names):
        raise ValueError(f"there are {len(arrays)} example inputs, but names {names} and batch axes {batch_axes}")
    axes = {name: (batch_axes or {}).get(name, 0) for name in names}
    arguments = tuple(torch.from_numpy(_two_rows(x, axis)) for x, axis in zip(arrays, axes.values(), strict=True))
    frozen = copy.deepcopy(model).cpu().eval().requires_grad_(requires_grad=False)
    convert = _dynamo if exporter == "dynamo" else _classic
    try:
        with _quiet_exporter():
            proto = convert(torch, frozen, arguments, axes, list(output_names))
    except Exception as error:  # the exporter raises whatever the network's own code does
        where = _place(torch, error, frozen, arguments)
        advice = '; exporter = "classic" may, see docs/quantize.md' if exporter == "dynamo" else ""
        raise ExportError(f"torch cannot export {type(model).__name__}{where}: {_root_cause(error)}{advice}") from error
    _require_free_batch(proto, axes, type(model).__name__)
    return proto


def check_parity(model: Module, parts: Split, x: FloatArray) -> None:
    """Compare trunk and head with the torch network.

    Args:
        model: The network that was exported.
        parts: What became of it; an activation that was left out is put back for the comparison.
        x: float32 [N, ...], as the network takes it.

    Raises:
        ParityError: The outputs differ by more than rounding.
    """
    torch = _torch()
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().eval()(torch.from_numpy(x)).numpy()
    head = Head(parts.weights, tuple(str(i) for i in range(parts.outputs)))
    logits = torch.from_numpy(head.logits(run(parts.trunk, x)))
    activations = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}
    if parts.activation == "sigmoid":
        logits = torch.sigmoid(logits)
    elif parts.activation:
        logits = activations[parts.activation](logits, dim=1)
    got = logits.numpy()
    if expected.shape == (len(x),) and parts.outputs == 1:
        expected = expected[:, None]  # a regressor that drops the dimension of its one output
    if got.shape != expected.shape:
        raise ParityError(f"trunk and head put out {got.shape}, the torch network {expected.shape}")
    off = float(np.abs(got - expected).max())
    if not off <= _PARITY * max(1.0, float(np.abs(expected).max())):
        raise ParityError(f"cut at {parts.cut!r}, the logits differ from torch's by up to {off:g}")


def load_model(call: str, *, folder: Path, state: Path | None = None) -> Module:
    """The network that a recipe names.

    Args:
        call: "module:callable", a file beside the recipe or an installed module; called without arguments.
        folder: Where the recipe is.
        state: A state dict to load into it; read without unpickling code.

    Raises:
        ConfigError: It cannot be imported, is no torch network, or the state does not fit.
    """
    torch = _torch()
    module_name, _, name = call.partition(":")
    if not module_name or not name:
        raise ConfigError(f"model.call must look like 'module:callable', got {call!r}")
    try:
        model = getattr(_import_beside(folder, module_name), name)()
    except Exception as error:  # code of the user: anything may go wrong
        raise ConfigError(f"model.call {call!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model.call {call!r} gave {type(model).__name__}, expected a torch.nn.Module")
    if state is not None:
        try:
            model.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
        except Exception as error:  # torch and pickle share no base class
            raise ConfigError(f"model.state {state.name} cannot be loaded: {_first_line(error)}") from error
    network: Module = model
    return network


def _torch() -> Any:
    try:
        import torch  # noqa: PLC0415 - half a second and 190 MB, for those who export only
        import torch.onnx  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtraError("exporting a torch network", "quantize") from error
    return torch


def _dynamo(
    torch: Any, model: Any, arguments: tuple[Any, ...], axes: Mapping[str, int | None], outputs: list[str]
) -> ModelProto:
    batch = torch.export.Dim(BATCH)
    with contextlib.redirect_stderr(io.StringIO()):  # where it prints the graphs it stopped at
        program = torch.onnx.export(
            model,
            arguments,
            input_names=list(axes),
            output_names=outputs,
            dynamic_shapes=tuple(None if axis is None else {axis: batch} for axis in axes.values()),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    proto: ModelProto = program.model_proto
    return proto


def _classic(
    torch: Any, model: Any, arguments: tuple[Any, ...], axes: Mapping[str, int | None], outputs: list[str]
) -> ModelProto:
    import onnx  # noqa: PLC0415 - as torch: for those who export only

    free = {name: {axis: BATCH} for name, axis in axes.items() if axis is not None}
    file = io.BytesIO()
    with warnings.catch_warnings():
        # lines of torch itself, which checks shapes in nn.LSTM; those of the network are its author's to see
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"torch\.")
        torch.onnx.export(
            model,
            arguments,
            file,
            input_names=list(axes),
            output_names=outputs,
            dynamic_axes=free,
            opset_version=OPSET,
            dynamo=False,
        )
    proto: ModelProto = onnx.load_model_from_string(file.getvalue())
    for value in proto.graph.output:  # they keep the sizes of the example unless inference starts from the inputs
        value.type.tensor_type.ClearField("shape")
    inferred: ModelProto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return inferred


def _two_rows(x: AnyArray, axis: int | None) -> AnyArray:
    """Enough for the exporter to tell the batch from a dimension of size one."""
    return np.ascontiguousarray(x if axis is None else np.take(x, range(min(2, x.shape[axis])), axis=axis))


def _require_free_batch(proto: ModelProto, axes: Mapping[str, int | None], network: str) -> None:
    """Refuse what the exporter fixed without a word.

    Raises:
        ExportError: The batch is fixed, or the rows that come out are not those that went in.
    """
    if any(axis is None for axis in axes.values()):
        return
    for value in proto.graph.input:
        axis, shape = axes[value.name] or 0, _shape(value)
        if shape[axis : axis + 1] != [BATCH]:
            raise ExportError(f"{network} does not keep the batch dimension free: {value.name!r} has shape {shape}")
    try:
        results = run_rows(proto, _BATCHES)
    except RuntimeUnavailableError as error:
        raise ExportError(f"{network} does not run as ONNX with {_BATCHES} rows: {error}") from error
    for rows, outputs in zip(_BATCHES, results, strict=True):
        for value, output in zip(proto.graph.output, outputs, strict=True):
            if rows in (output.shape if len(axes) > 1 else output.shape[:1]):
                continue
            raise ExportError(
                f"{network} does not keep the batch dimension free: {value.name!r} has shape {list(output.shape)} for "
                f"{rows} rows{_data_shaped(proto)}"
            )


def _data_shaped(proto: ModelProto) -> str:
    """Which node lets the data decide how many rows come out, and its line of code; "" if none does."""
    node = next((node for node in proto.graph.node if node.op_type in DATA_SHAPED), None)
    if node is None:
        return ""
    said = "\n".join(entry.value for entry in node.metadata_props)
    return f"; {describe(node)} lets the data decide{_line_of(said)}"


def _shape(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence torch's deprecations inside itself, and that torchvision is absent."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in _LOUD]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for said, category in _NEEDLESS:
                warnings.filterwarnings("ignore", message=said, category=category)
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _import_beside(folder: Path, name: str) -> ModuleType:
    path = folder / (name.replace(".", "/") + ".py")
    if not path.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def _place(torch: Any, error: BaseException, model: Any, arguments: tuple[Any, ...]) -> str:
    """Where in the network torch failed, as " in 'block.act' (net.py line 12: return odd(x))"; "" if it is not said."""
    texts = [str(part) for part in _causes(error)]
    node = next((found for text in texts if (found := re.search(r"translating node %(\w+)", text))), None)
    if node is not None:
        return _module_of(torch, model, arguments, node[1])
    line = next(filter(None, map(_line_of, texts)), "")
    if line:
        return line
    operator = next((found for text in texts if (found := re.search(r"'aten::(\w+)'", text))), None)
    return "" if operator is None else _module_of(torch, model, arguments, operator[1])


def _line_of(text: str) -> str:
    """The last line of code that a trace names, as " (net.py line 12: return x)"."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', text)
    if not lines:
        return ""
    file, number, code = lines[-1]
    return f" ({Path(file).name} line {number}: {code.strip()})"


def _module_of(torch: Any, model: Any, arguments: tuple[Any, ...], name: str) -> str:
    """The module that runs a node of torch's own graph, found by the node's name or by its operator's."""
    try:
        with _quiet_exporter():
            nodes = torch.export.export(model, arguments).graph.nodes
    except Exception:  # noqa: BLE001 - the error that is being described comes first
        return ""
    wanted = re.sub(r"_\d+$", "", name)
    # the exporter may have taken the operator apart: then names agree in part
    for node in [*(node for node in nodes if node.name == name), *nodes]:
        if node.name == name or wanted in str(node.target):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path, kind = stack[-1] if stack else ("", "")
            kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
            return f" in {path or 'forward'!r} ({kind.rpartition('.')[2]})"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _root_cause(error: BaseException) -> str:
    root = list(_causes(error))[-1]
    return f"{type(root).__name__}: {_first_line(root)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
