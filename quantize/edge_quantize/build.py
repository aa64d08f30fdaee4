"""From a network and its data to a checkpoint, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edge_quantize.calibrate import calibration_rows
from edge_quantize.card import CardText
from edge_quantize.compare import Comparison, compare_variants
from edge_quantize.data import Dataset
from edge_quantize.errors import ExportError
from edge_quantize.export import Exporter, check_parity, export_onnx
from edge_quantize.graph import OPSET, Split, canonical_bytes, load_onnx, split
from edge_quantize.levels import Assessment, assess
from edge_quantize.pack import Making, Memory, pack_checkpoint, pack_whole, refuse_existing
from edge_quantize.quantize import QuantRecipe, Trunks, quantize_trunk, quantize_whole
from edge_quantize.search import Budget, Progress, SearchResult, hold_back, search
from edge_sdk.errors import ConfigError
from edge_sdk.head import Head, sigmoid
from edge_sdk.manifest import Manifest, StateSpec, TargetSpec
from edge_sdk.schema import InputSpec
from edge_sdk.tasks import rows_right
from edge_sdk.types import AnyArray, FloatArray, Task

if TYPE_CHECKING:
    from edge_quantize.export import Module

_PARITY_ROWS = 64
_SEARCH_ROWS = 2000
_HELD_OUT_ROWS = 512
_SUMS_TO_ONE = 1e-3
_ACTIVATION = {"classification": "Softmax", "multilabel": "Sigmoid"}


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Let recipes be tried instead of stating one."""

    max_loss: float = 0.01
    """How much accuracy may be lost against FP32."""
    min_speedup: float = 1.1
    """How much faster than FP32 INT8 must be to be called worth it."""
    budget: Budget = Budget()


@dataclass(frozen=True)
class BuildResult:
    """What was built.

    Attributes:
        manifest: The checkpoint's.
        comparison: INT8 against FP32 on this machine.
        assessment: Which adapt level applies, and why.
        search: The recipes that were tried, if one was searched for.
    """

    manifest: Manifest
    comparison: Comparison
    assessment: Assessment
    search: SearchResult | None = None


def build_checkpoint(
    model: Module | ModelProto | Path,
    data: Dataset,
    *,
    labels: Sequence[str],
    name: str,
    release: int,
    target: Path,
    created: str,
    input_spec: InputSpec,
    task: Task = "classification",
    adapt: Literal["auto", "head", "none"] = "auto",
    targets: Sequence[TargetSpec] = (),
    thresholds: Sequence[float] = (),
    more_inputs: Sequence[InputSpec] = (),
    state: Sequence[StateSpec] = (),
    fixed: Mapping[str, Any] | None = None,
    parent: Path | None = None,
    cut: str | None = None,
    exporter: Exporter = "dynamo",
    seed: int = 0,
    quantization: QuantRecipe | Search | None = None,
    memory: Memory | None = None,
    card: CardText | None = None,
    progress: Progress | None = None,
    measure_memory: bool = True,
) -> BuildResult:
    """Export, split, calibrate, quantize, pack and compare.

    Args:
        model: A trained network, from preprocessed float32 [N, ...] to logits [N, C] or values [N, T]; or the same as
            an ONNX graph or file. With adapt=none, any ONNX graph.
        data: Rows in the app's units; without calibration rows, some training rows serve.
        labels: One for each output, in order: labels, or names of a regression's targets; none for task=raw.
        name: What the model is called.
        release: Number of the release, above the parent's.
        target: The folder to make; must not exist.
        created: When, as ISO 8601 text.
        input_spec: The input contract with its preprocessing.
        task: What the outputs mean.
        adapt: "head": the device learns on a head behind the cut; "none": the graph is served as it is; "auto": head
            where it is possible, as `levels.assess` says.
        targets: Of a regression whose network puts out standardised numbers. Without them the network puts out the
            targets' own units, and the head is rescaled, so that what it learns is standardised.
        thresholds: Of a multi-label network; 0.5 if none are given.
        more_inputs: Further inputs (adapt=none).
        state: What a recurrent network carries from call to call (adapt=none).
        fixed: Inputs that never change, by name, with their value: they become constants of the graph (adapt=none).
        parent: Folder of the checkpoint this one replaces.
        cut: Where to split, by tensor name; None chooses.
        exporter: Of a torch network: torch's current exporter, or the classic one.
        seed: For the samples drawn.
        quantization: A recipe, or a search for one; None takes the default recipe.
        memory: How much factory memory ships.
        card: What only a person can say about the model.
        progress: Told the steps of a search.
        measure_memory: Whether the comparison starts a process for each variant to see what it takes.

    Raises:
        ConfigError: A setting does not fit.
        DataError: The rows cannot be used.
        ExportError: The network cannot be exported, split as asked, or quantized.
        ParityError: A step changed what it computes.
        SelfTestError: The packed model does not reproduce its own outputs.

    Warns:
        CalibrationWarning: Few calibration rows, or rows unlike those held out.
        LeakageWarning: Held-out rows are among the training rows.
    """
    refuse_existing(target)  # before minutes of work, and again while packing
    whole = bool(more_inputs or state or fixed) or task == "raw"
    if whole and adapt == "head":
        raise ConfigError("adapt=head takes one input and no state, and a task other than raw")
    specs: InputSpec | list[InputSpec] = [input_spec, *more_inputs] if more_inputs else input_spec
    maker = _Maker(
        data=data.checked(specs, labels, task=task, learns=not whole and adapt != "none" and data.train_x is not None),
        spec=input_spec, more_inputs=more_inputs, state=state, labels=labels, task=task, seed=seed,
        quantization=quantization or QuantRecipe(), progress=progress, thresholds=thresholds,
    )  # fmt: skip
    graph = maker.graph(model, exporter)
    if fixed:
        graph = fix_inputs(graph, fixed)
    assessment = assess(graph)
    if adapt == "head" and assessment.level == "none":
        raise ExportError(f"adapt=head is not possible: {assessment.reason}; adapt=none serves the network as it is")
    facts: dict[str, Any] = {
        "name": name, "release": release, "created": created, "task": task, "thresholds": thresholds,
        "parent": parent, "seed": seed, "card": card,
    }  # fmt: skip
    if whole or adapt == "none" or assessment.level == "none":
        reason = "as asked" if assessment.level == "head" else assessment.reason
        fp32, int8, making = maker.whole(graph, Making(adapt_reason=reason), assessment.not_quantizable)
        manifest = pack_whole(
            target, fp32=fp32, int8=int8, data=maker.data, input_spec=maker.named(graph), labels=labels,
            targets=targets, more_inputs=more_inputs, state=state, making=making, **facts,
        )  # fmt: skip
    else:
        parts = split(graph, cut=cut)
        if parts.outputs != len(labels):
            raise ConfigError(f"the network has {parts.outputs} outputs, there are {len(labels)} labels")
        if parts.task and parts.task != task:
            raise ConfigError(f"the network ends in {parts.activation}, which is for {parts.task}, not for {task}")
        if not isinstance(model, ModelProto | Path):
            check_parity(model, parts, input_spec.apply(maker.data.holdout_x[:_PARITY_ROWS]))
        head = Head(parts.weights, tuple(labels))
        if task == "regression" and not targets:
            head, targets = standardised(head, maker.data.train_y)
        trunks, making = maker.trunks(parts, head, targets, Making(adapt_reason=assessment.reason))
        manifest = pack_checkpoint(
            target, trunks=trunks, head=head, data=maker.data, input_spec=input_spec, targets=targets,
            memory=memory, making=making, **facts,
        )  # fmt: skip
    held_out = maker.data
    comparison = compare_variants(
        target, held_out.holdout_x, held_out.holdout_y, slices=held_out.slices, memory=measure_memory
    )
    return BuildResult(manifest, comparison, assessment, maker.found)


@dataclass
class _Maker:
    """What every step of one build needs."""

    data: Dataset
    spec: InputSpec
    more_inputs: Sequence[InputSpec]
    state: Sequence[StateSpec]
    labels: Sequence[str]
    task: Task
    seed: int
    quantization: QuantRecipe | Search
    progress: Progress | None
    thresholds: Sequence[float] = ()
    held_back: AnyArray | None = None
    found: SearchResult | None = None

    def graph(self, model: Module | ModelProto | Path, exporter: Exporter) -> ModelProto:
        if isinstance(model, ModelProto):
            return model
        if isinstance(model, Path):
            return load_onnx(model)
        if not (self.more_inputs or self.state):
            example = self.spec.apply(self.data.holdout_x[:_PARITY_ROWS])
            return export_onnx(model, example, input_name=self.spec.name, exporter=exporter)
        row = self._feeds(self.data.holdout_x[:1])
        return export_onnx(
            model, list(row.values()), input_names=list(row), output_names=["output", *(s.output for s in self.state)],
            batch_axes=dict.fromkeys(row), exporter=exporter,
        )  # fmt: skip

    def named(self, graph: ModelProto) -> InputSpec:
        """The main input's contract under the name that the graph gives it."""
        others = {*(s.name for s in self.more_inputs), *(s.input for s in self.state)}
        main = [value.name for value in graph.graph.input if value.name not in others]
        return msgspec.structs.replace(self.spec, name=main[0]) if len(main) == 1 else self.spec

    # ---- split

    def trunks(self, parts: Split, head: Head, targets: Sequence[TargetSpec], making: Making) -> tuple[Trunks, Making]:
        calibration, validation = self._split_rows
        truth = self._truth(validation)
        std, mean = (np.array([getattr(target, name) for target in targets] or [0.0]) for name in ("std", "mean"))

        def score(features: FloatArray) -> AnyArray:
            logits = head.logits(features)
            if self.task == "regression":
                return self._judged(logits * std + mean, truth)
            return self._judged(sigmoid(logits) if self.task == "multilabel" else logits, truth)

        x = self.spec.apply(calibration)
        chosen_by = None if validation is None else self.spec.apply(validation)
        recipe = self._recipe(parts.trunk, x, chosen_by, score, whole=False)
        held_out = self.spec.apply(self.data.holdout_x[:_HELD_OUT_ROWS])
        return quantize_trunk(parts.trunk, x, recipe, held_out=held_out), self._making(making, recipe, len(calibration))

    # ---- whole

    def whole(self, graph: ModelProto, making: Making, impossible: str) -> tuple[bytes, bytes | None, Making]:
        """The float file, the INT8 file or None, and why."""
        self.spec = self.named(graph)
        calibration, validation = self._split_rows
        graph = self._answering(graph)
        feeds = self._calls(calibration)
        fp32 = canonical_bytes(graph)
        if impossible:
            return fp32, None, _float_only(making, impossible)
        truth = self._truth(validation)
        first = next(v.name for v in graph.graph.output if v.name not in {s.output for s in self.state})

        def score(outputs: Mapping[str, AnyArray]) -> AnyArray:
            return self._judged(np.asarray(outputs[first]).reshape(len(truth), -1), truth)

        try:
            chosen_by = None if validation is None else self._calls(validation)
            recipe = self._recipe(graph, feeds, chosen_by, score, whole=True)
            int8 = quantize_whole(graph, feeds, recipe)
        except ExportError as error:
            return fp32, None, _float_only(making, str(error))
        return fp32, int8, self._making(making, recipe, len(calibration))

    def _answering(self, graph: ModelProto) -> ModelProto:
        """The graph, ended by Softmax or Sigmoid where its first output holds logits."""
        if self.task not in _ACTIVATION:
            return graph
        from edge_quantize.rewrite import session_of  # noqa: PLC0415

        session = session_of(graph)
        rows = self._calls(self.data.holdout_x[:8])
        first = np.concatenate([session.run([graph.graph.output[0].name], row)[0] for row in rows])
        if first.ndim != 2 or first.shape[1] != len(self.labels):
            raise ConfigError(f"the first output has shape {first.shape}; for {len(self.labels)} labels it must be "
                              f"(N, {len(self.labels)}), or use task=raw")  # fmt: skip
        within = float(first.min()) >= 0 and float(first.max()) <= 1
        if within and (self.task == "multilabel" or np.abs(first.sum(axis=1) - 1).max() <= _SUMS_TO_ONE):
            return graph
        return activated(graph, _ACTIVATION[self.task])

    # ---- rows

    @cached_property
    def _split_rows(self) -> tuple[Any, Any]:
        """Rows to calibrate on, and rows to choose a recipe by, if one is searched for."""
        rng = np.random.default_rng(self.seed)
        data = self.data
        source, y = (data.train_x, data.train_y) if data.calibration_x is None else (data.calibration_x, None)
        if source is None:
            raise ConfigError("quantization needs calibration rows or training rows")
        validation = data.validation_x if isinstance(self.quantization, Search) else None
        if isinstance(self.quantization, Search) and validation is None:
            if data.train_x is None:
                raise ConfigError("a search needs validation rows or training rows to choose by")
            stratify = data.train_y if self.task != "regression" else None
            rest, self.held_back = hold_back(len(data.train_x), max_rows=_SEARCH_ROWS, rng=rng, y=stratify)
            validation = _rows(data.train_x, self.held_back)
            if data.calibration_x is None:
                source, y = _rows(source, rest), None if y is None else y[rest]
        if isinstance(source, list):
            return [source[i] for i in np.sort(rng.permutation(len(source))[: self._max_rows])], validation
        stratify = y if self.task != "regression" else None
        rows = calibration_rows(
            source, max_rows=self._max_rows, rng=rng, y=stratify, spec=self.spec, held_out=data.holdout_x
        )
        return rows, validation

    @property
    def _max_rows(self) -> int:
        recipe = self.quantization if isinstance(self.quantization, QuantRecipe) else QuantRecipe()
        return recipe.calibration.max_rows

    def _truth(self, validation: Any) -> AnyArray:
        """Of the rows to choose a recipe by; nothing without a search."""
        if validation is None:
            return np.zeros(0)
        if self.task == "raw":
            raise ConfigError("a search needs answers that can be right or wrong; task=raw has none: state a recipe")
        return np.asarray(self.data.validation_y if self.held_back is None else self.data.train_y[self.held_back])

    def _judged(self, scores: AnyArray, truth: AnyArray) -> AnyArray:
        """Whether each answer is right, or how wrong it is."""
        if self.task == "regression":
            return np.asarray(np.abs(scores - truth).mean(axis=1))
        return rows_right(scores, truth, self._draft)

    def _feeds(self, x: Any) -> dict[str, AnyArray]:
        """The first row of x as the network takes it, with a state of zeros."""
        row = x[0]
        main = row[self.spec.name] if self.more_inputs else row
        feeds = {self.spec.name: self.spec.apply(main[None])}
        feeds |= {s.name: s.apply(row[s.name][None]) for s in self.more_inputs}
        return feeds | {s.input: np.zeros(s.shape, dtype=s.dtype) for s in self.state}

    def _calls(self, x: Any) -> list[dict[str, AnyArray]]:
        return [self._feeds(x[i : i + 1]) for i in range(len(x))]

    # ---- recipe

    def _recipe(
        self, model: ModelProto, x: Any, validation: Any, score: Callable[[Any], AnyArray], *, whole: bool
    ) -> QuantRecipe:
        if isinstance(self.quantization, QuantRecipe):
            return self.quantization
        wanted = self.quantization
        self.found = search(
            model, x, validation, score=score, whole=whole, max_loss=wanted.max_loss,
            min_speedup=wanted.min_speedup, budget=wanted.budget, progress=self.progress,
        )  # fmt: skip
        return self.found.recipe

    def _making(self, making: Making, recipe: QuantRecipe, rows: int) -> Making:
        return Making(recipe.name, making.adapt_reason, recipe.calibration, rows)

    @cached_property
    def _draft(self) -> Manifest:
        """Enough of a manifest to judge answers by."""
        return Manifest(
            name="", release=1, created="", task=self.task, labels=list(self.labels), input=self.spec, files={},
            thresholds=list(self.thresholds) or [0.5] * len(self.labels),
        )  # fmt: skip


def _float_only(making: Making, reason: str) -> Making:
    return Making(adapt_reason=making.adapt_reason, float_only=f"in float alone: {reason}")


def _rows(x: Any, chosen: AnyArray) -> Any:
    return x[chosen] if isinstance(x, np.ndarray) else [x[i] for i in chosen]


def standardised(head: Head, y: FloatArray) -> tuple[Head, list[TargetSpec]]:
    """A regression head in units of its targets' spread, and what takes them back; the values stay the same.

    Args:
        head: Puts out the targets' own units.
        y: float32 [N, T], targets of the training rows.
    """
    mean = y.mean(axis=0, dtype=np.float64)
    std = y.std(axis=0, dtype=np.float64)
    std[std == 0] = 1.0
    last = head.depth - 1
    weights = dict(head.weights)
    weights[f"W{last}"] = (weights[f"W{last}"] / std).astype(np.float32)
    weights[f"b{last}"] = ((weights[f"b{last}"] - mean) / std).astype(np.float32)
    return Head(weights, head.labels), [
        TargetSpec(float(m), float(s), float("nan")) for m, s in zip(mean, std, strict=True)
    ]


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


def activated(model: ModelProto, kind: str) -> ModelProto:
    """The graph with Softmax or Sigmoid behind its first output, which is called "probabilities" then."""
    ended = ModelProto()
    ended.CopyFrom(model)
    first = ended.graph.output[0]
    rest = list(ended.graph.output)[1:]
    shape = [dim.dim_param or dim.dim_value or None for dim in first.type.tensor_type.shape.dim]
    node = helper.make_node(kind, [first.name], ["probabilities"], name="probabilities")
    if kind == "Softmax":
        node.attribute.append(helper.make_attribute("axis", -1))
    ended.graph.node.append(node)
    del ended.graph.output[:]
    ended.graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, shape))
    ended.graph.output.extend(rest)
    if not any(opset.domain == "" for opset in ended.opset_import):
        ended.opset_import.append(helper.make_opsetid("", OPSET))
    return ended
