"""One ONNX file of trunk and learned head, for runtimes in other languages. The only module that imports onnx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.errors import IntegrityError, MissingExtraError
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_ONNX, Manifest
from edge_sdk.types import Variant

_TRUNK, _HEAD = "trunk/", "head/"
"""Before the names inside, some of which both have."""


def fuse(
    folder: Path, manifest: Manifest, head: Head | None, variant: Variant, *, number: int = 0, latent: bool = False
) -> bytes:
    """Trunk and head as one ONNX model that gives exactly what the device gives. The same inputs give the same bytes.

    It takes what the trunk takes: preprocessed inputs, as `InputSpec.apply` gives them. Its outputs are `probabilities`
    float32 [N, C], or `values` [N, T] for regression. Its metadata (`metadata_props`, all text) say what an app needs:
    `name`, `task`, `release`, `head`, `variant`, and as JSON `labels` and `input` (the input contract with its
    preprocessing). A checkpoint with adapt=none is one model already, and given as it is.

    Args:
        folder: A checkpoint folder.
        manifest: Its manifest.
        head: The weights to serve, with all their labels; None for adapt=none.
        variant: Which of the two trunks.
        number: Of the head, for the metadata.
        latent: Put the uint8 latent [N, D] out as well.

    Raises:
        MissingExtraError: The onnx package is not installed.
        IntegrityError: A file is missing, or they do not fit each other.
    """
    if variant not in manifest.model_files:
        raise IntegrityError(f"{manifest.name} release {manifest.release} comes in {list(manifest.model_files)} alone")
    file = folder / manifest.model_files[variant]
    if manifest.adapt == "none":
        return _whole(file)
    if head is None:
        raise IntegrityError(f"{manifest.name} has adapt={manifest.adapt}: it is not served without a head")
    onnx = _need_onnx()
    trunk = _load(onnx, file)
    top = _with_weights(onnx, _load(onnx, folder / HEAD_ONNX), head)
    if [output.name for output in trunk.graph.output] != ["latent"]:
        raise IntegrityError(f"the trunk puts out {[output.name for output in trunk.graph.output]}, not the latent")
    said = "values" if manifest.task == "regression" else "probabilities"
    trunk = onnx.compose.add_prefix(trunk, _TRUNK, rename_inputs=False, rename_outputs=False)
    top = onnx.compose.add_prefix(top, _HEAD)
    # the head's contract allows a newer format than the trunk's; the merger wants them equal
    trunk.ir_version = top.ir_version = max(trunk.ir_version, top.ir_version)
    try:
        fused = onnx.compose.merge_models(
            trunk,
            top,
            io_map=[("latent", f"{_HEAD}latent")],
            outputs=[f"{_HEAD}{said}", *(["latent"] if latent else [])],
            producer_name="edge_sdk",
        )
    except ValueError as error:
        raise IntegrityError(f"trunk and head do not fit each other: {error}") from error
    _rename(fused.graph, f"{_HEAD}{said}", said)
    outputs = sorted(fused.graph.output, key=lambda output: bool(output.name != said))  # the latent comes last
    del fused.graph.output[:]
    fused.graph.output.extend(outputs)
    facts = {
        "name": manifest.name,
        "task": manifest.task,
        "release": str(manifest.release),
        "head": str(number),
        "variant": variant,
        "labels": json.dumps(list(head.labels), ensure_ascii=False),
        "input": msgspec.json.encode(manifest.input, order="sorted").decode(),
    }
    onnx.helper.set_model_props(fused, facts)
    onnx.checker.check_model(fused, full_check=True)
    data: bytes = fused.SerializeToString(deterministic=True)
    return data


def _whole(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{file.name} cannot be read: {error.strerror}") from error


def _need_onnx() -> Any:
    try:
        import onnx  # noqa: PLC0415 - behind an extra
        import onnx.compose  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("exporting one ONNX file", "export") from error
    return onnx


def _load(onnx: Any, path: Path) -> Any:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's errors share no base class with onnx's
        raise IntegrityError(f"{path.name} is not a readable ONNX model: {error}") from error


def _with_weights(onnx: Any, model: Any, head: Head) -> Any:
    """The head's graph with the given weights in place of its own; the class count may have grown."""
    places = {tensor.name: tensor for tensor in model.graph.initializer}
    if missing := sorted(head.weights.keys() - places.keys()):
        raise IntegrityError(f"{HEAD_ONNX} has no initializers {', '.join(missing)}")
    for name, weights in head.weights.items():
        places[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(weights, dtype=np.float32), name))
    del model.graph.value_info[:]  # shapes of the weights it came with
    return model


def _rename(graph: Any, old: str, new: str) -> None:
    """Give an output of the graph another name."""
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    for output in graph.output:
        if output.name == old:
            output.name = new
