"""A torch network as ONNX. The only file of the SDK's tools that imports torch."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_quantize.errors import ExportError, ParityError
from edge_quantize.graph import BATCH, OPSET, Split, run
from edge_sdk.errors import ConfigError, MissingExtraError
from edge_sdk.head import Head
from edge_sdk.types import FloatArray

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.nn import Module as Module  # noqa: PLC0414 - for files that may not import torch

_PARITY = 1e-3
"""Allowed difference of the logits from torch's, relative to the largest of them."""


def export_onnx(model: Module, example: FloatArray, *, input_name: str = "input") -> ModelProto:
    """The network in eval mode as an ONNX graph with a free batch dimension. The module is left as it is.

    Args:
        model: Takes float32 [N, ...] and returns logits float32 [N, C].
        example: float32 [N, ...], N >= 2, as the network takes it: after preprocessing.
        input_name: What the graph's input is called.

    Raises:
        ExportError: torch cannot express the network in ONNX, or only for one batch size.
        MissingExtraError: torch is not installed.
    """
    torch = _torch()
    frozen = copy.deepcopy(model).cpu().eval()
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                frozen,
                (torch.from_numpy(np.ascontiguousarray(example[:2])),),
                input_names=[input_name],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the network's own code does
        raise ExportError(f"torch cannot export {type(model).__name__}: {_root_cause(error)}") from error
    proto: ModelProto = program.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if shape[:1] != [BATCH]:  # the exporter says nothing when it has to fix a dimension
            raise ExportError(
                f"{type(model).__name__} does not keep the batch dimension free: {value.name!r} has shape {shape}"
            )
    return proto


def check_parity(model: Module, parts: Split, x: FloatArray) -> None:
    """Compare trunk and head with the torch network.

    Args:
        model: The network that was exported.
        parts: What became of it.
        x: float32 [N, ...], as the network takes it.

    Raises:
        ParityError: The logits differ by more than rounding.
    """
    torch = _torch()
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().eval()(torch.from_numpy(x)).numpy()
    head = Head(parts.weights, tuple(str(i) for i in range(parts.outputs)))
    got = head.logits(run(parts.trunk, x))
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


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch says about itself: torchvision is absent, and a deprecation inside torch.export."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
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


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
