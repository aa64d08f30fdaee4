"""A checkpoint's model behind one door, whether it is split into trunk and head or served whole."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from edge_sdk.drift.features import summarize_output
from edge_sdk.errors import InputError, ShapeError
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
        """As in the protocol. Samples are stacked where the graph takes a batch, and run one by one elsewhere."""
        name = self._manifest.input.name
        if self.model.batched or len(x) == 1:
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
        first = found[self._shown[0]]
        state = {spec.input: found[spec.output] for spec in self._manifest.state}
        nothing = np.zeros((rows, 0), dtype=np.uint8)
        if self._manifest.task != "raw":
            return Ran(nothing, first.astype(np.float32, copy=False), (), state)
        outputs = [{name: self._row(found[name], i) for name in self._shown} for i in range(rows)]
        summary = np.stack([summarize_output(row[self._shown[0]]) for row in outputs])
        return Ran(nothing, summary, outputs, state)

    def _row(self, output: AnyArray, i: int) -> AnyArray:
        if self.model.batched:
            row: AnyArray = output[i]
            return row
        return output[0] if output.ndim and output.shape[0] == 1 else output  # what it found in one sample


def checked_state(specs: Sequence[StateSpec], state: Arrays | None) -> Arrays:
    """The state to start from: the one given, or zeros.

    Raises:
        InputError: It is not a state of this model.
    """
    if not specs and state:
        raise InputError("this model carries no state")
    if not state:
        return {spec.input: np.zeros(spec.shape, dtype=spec.dtype) for spec in specs}
    if set(state) != {spec.input for spec in specs}:
        raise InputError(f"a state has {', '.join(spec.input for spec in specs)}; got {', '.join(sorted(state))}")
    found = {}
    for spec in specs:
        given = np.asarray(state[spec.input])
        if given.shape != tuple(spec.shape) or not np.can_cast(given.dtype, spec.dtype, casting="same_kind"):
            wanted = f"{spec.dtype} {spec.shape}"
            raise ShapeError(f"state {spec.input!r}: expected {wanted}, got {given.dtype} {list(given.shape)}")
        found[spec.input] = given.astype(spec.dtype, copy=False)
    return found


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
    key = f"{manifest.trunk_id}:{variant}"
    if head is None:
        if key not in trunks:
            trunks[key] = WholeModel(folder / manifest.model_files[variant])
        model = trunks[key]
        assert isinstance(model, WholeModel)  # its id is that of its files
        return GraphModel(model, manifest)
    if key not in trunks:
        trunks[key] = OnnxRuntime(folder, variant=variant)
    trunk = trunks[key]
    assert not isinstance(trunk, WholeModel)
    return SplitModel(trunk, HeadSession(folder / HEAD_ONNX, head))
