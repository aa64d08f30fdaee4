"""A checkpoint's model behind one door, whether it is split into trunk and head or served whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from edge_sdk.drift.features import summarize_output
from edge_sdk.errors import DtypeError, InputError, ModelError, RangeError, ShapeError
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_ONNX, Manifest, StateSpec
from edge_sdk.runtime import HeadSession, ModelRuntime, OnnxRuntime, WholeModel
from edge_sdk.types import NOTHING, AnyArray, FloatArray, LatentArray, Variant

Trunks = MutableMapping[str, ModelRuntime | WholeModel]
"""Loaded trunks and whole models by content: several devices in one process can share them."""
Arrays = Mapping[str, AnyArray]


class Ran(NamedTuple):
    """What a model said about N samples."""

    latents: LatentArray
    """uint8 [N, D]; D is 0 where nothing is learned."""
    scores: FloatArray
    """float32 [N, C]: probabilities, values of a regression, or the summary of a raw model's outputs."""
    outputs: Sequence[Arrays] = ()
    """Of a raw model: every output for each sample."""
    state: Arrays = NOTHING
    """Of a recurrent model: what the next call takes."""


class ServedModel(Protocol):
    """A model behind one door, whether it is split or whole. Thread-safe."""

    def run(self, x: AnyArray, more: Arrays = NOTHING) -> Ran:
        """Preprocessed samples [N, ...], and what else the graph takes, to what the model says."""
        ...


class SplitModel:
    """A frozen trunk and a head."""

    def __init__(self, trunk: ModelRuntime, head: HeadSession) -> None:
        self.trunk, self.head = trunk, head

    def run(self, x: AnyArray, more: Arrays = NOTHING) -> Ran:  # noqa: ARG002 - has one input
        """As in the protocol."""
        latents = self.trunk.latents(x)
        return Ran(latents, self.head.run(latents))


class GraphModel:
    """A whole graph, with the state it carries."""

    def __init__(self, model: WholeModel, manifest: Manifest) -> None:
        self.model, self._manifest = model, manifest
        carried = {state.output for state in manifest.state}
        self._shown = [name for name in model.outputs if name not in carried]

    def run(self, x: AnyArray, more: Arrays = NOTHING) -> Ran:
        """As in the protocol. Samples are stacked where the graph takes a batch, and run one by one elsewhere.

        Raises:
            RuntimeUnavailableError: The engine failed.
            ModelError: An output is no array.
        """
        name = self._manifest.input.name
        # of further inputs nothing says that they have a row for each sample
        if (self.model.batched and not more) or len(x) == 1:
            return self._read(self.model.run({name: x, **more}), len(x))
        rows = [
            self._read(self.model.run({name: x[i : i + 1], **{k: v[i : i + 1] for k, v in more.items()}}), 1)
            for i in range(len(x))
        ]
        return Ran(
            np.zeros((len(x), 0), dtype=np.uint8),
            np.concatenate([row.scores for row in rows]),
            [outputs for row in rows for outputs in row.outputs],
        )

    def _read(self, found: Arrays, rows: int) -> Ran:
        for name, output in found.items():
            if not isinstance(output, np.ndarray):  # ONNX also knows sequences and maps
                raise ModelError(f"output {name!r} is a {type(output).__name__}, no array; export the graph without it")
            output.setflags(write=False)
        first = found[self._shown[0]]
        state = {spec.input: found[spec.output] for spec in self._manifest.state}
        nothing = np.zeros((rows, 0), dtype=np.uint8)
        if self._manifest.task != "raw":
            return Ran(nothing, first.astype(np.float32, copy=False), (), state)
        outputs = [{name: self._row(name, found[name], i) for name in self._shown} for i in range(rows)]
        summary = np.stack([summarize_output(row[self._shown[0]]) for row in outputs])
        return Ran(nothing, summary, outputs, state)

    def _row(self, name: str, output: AnyArray, i: int) -> AnyArray:
        if self.model.batched or (name in self.model.with_rows and len(output) == 1):
            row: AnyArray = output[i]
            return row
        return output  # what it found in one sample: also of one thing it is a list


def checked_state(specs: Sequence[StateSpec], state: Arrays | None) -> Arrays:
    """The state to start from: the one given, or zeros.

    Raises:
        InputError: It is not a state of this model.
    """
    if state is not None and not isinstance(state, Mapping):
        raise InputError(f"a state is a mapping, as in a prediction's `state`; got {type(state).__name__}")
    if not specs and state:
        raise InputError("this model carries no state")
    if not state:
        return {spec.input: np.zeros(spec.shape, dtype=spec.dtype) for spec in specs}
    if set(state) != {spec.input for spec in specs}:
        got = ", ".join(sorted(map(str, state)))
        raise InputError(f"a state has {', '.join(spec.input for spec in specs)}; got {got}")
    return {spec.input: _checked_state(spec, state[spec.input]) for spec in specs}


def _checked_state(spec: StateSpec, state: AnyArray) -> AnyArray:
    """One array of a state; lists, as a message in JSON has them, are taken too.

    Raises:
        InputError: It is not of this form.
    """
    what, wanted = f"state {spec.input!r}", np.dtype(spec.dtype)
    try:
        given = np.asarray(state)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} is not an array: {error}") from error
    if given.shape != tuple(spec.shape):
        raise ShapeError(f"{what}: expected {spec.dtype} {spec.shape}, got {given.dtype} {list(given.shape)}")
    if given.dtype == wanted:
        return given
    if given.dtype.kind not in ("fiu" if wanted.kind == "f" else "iu"):
        raise DtypeError(f"{what}: expected {spec.dtype}, got {given.dtype}")
    with np.errstate(over="ignore"):
        found = given.astype(wanted)
    if wanted.kind != "f" and not np.array_equal(found, given):
        raise RangeError(f"{what}: values from {given.min()} to {given.max()} do not fit {spec.dtype}")
    return found


_Sessions = WeakValueDictionary[tuple[str, bytes], HeadSession]
_sessions: WeakKeyDictionary[Any, _Sessions] = WeakKeyDictionary()
"""By a loaded trunk: sessions of heads that serve, by content. Devices that share their trunks share those as well."""


def trunk_key(manifest: Manifest, variant: Variant) -> str:
    """Where a loaded trunk, or whole model, is found in `Trunks`."""
    return f"{manifest.trunk_id}:{variant}"


def load_model(folder: Path, manifest: Manifest, variant: Variant, head: Head | None, trunks: Trunks) -> ServedModel:
    """The model of a checkpoint folder, sharing what is loaded already.

    Args:
        folder: A checkpoint.
        manifest: Its manifest.
        variant: Which of its trunks, or whole models.
        head: The head to serve; None for a model that is not split.
        trunks: What is loaded.

    Raises:
        RuntimeUnavailableError: The engine refuses the model.
    """
    key = trunk_key(manifest, variant)
    if head is None:
        model = trunks.get(key) or WholeModel(folder / manifest.model_files[variant])
        assert isinstance(model, WholeModel)  # its key is that of its files
        trunks[key] = model
        return GraphModel(model, manifest)
    trunk = trunks.get(key) or OnnxRuntime(folder, variant=variant)
    assert not isinstance(trunk, WholeModel)
    trunks[key] = trunk
    return SplitModel(trunk, _head_session(folder, manifest, head, _sessions.setdefault(trunk, WeakValueDictionary())))


def _head_session(folder: Path, manifest: Manifest, head: Head, sessions: _Sessions) -> HeadSession:
    parts = [f"{name}{array.shape}".encode() + array.tobytes() for name, array in sorted(head.weights.items())]
    content = manifest.files[HEAD_ONNX].sha256, hashlib.sha256(b"".join(parts)).digest()
    if (session := sessions.get(content)) is None:
        session = sessions[content] = HeadSession(folder / HEAD_ONNX, head)
    return session
