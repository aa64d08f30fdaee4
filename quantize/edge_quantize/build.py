"""From a network and its data to a checkpoint, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from onnx import ModelProto

from edge_quantize.calibrate import Feeds, calibration_rows
from edge_quantize.card import CardText
from edge_quantize.compare import Comparison, compare_variants
from edge_quantize.data import Dataset
from edge_quantize.edges import activated, answer_of, fix_inputs, in_units
from edge_quantize.errors import DataError, ExportError, LeakageWarning
from edge_quantize.export import Exporter, check_parity, export_onnx
from edge_quantize.graph import Split, canonical_bytes, load_onnx, split
from edge_quantize.learning import Memory
from edge_quantize.levels import Assessment, TensorFacts, assess
from edge_quantize.metrics import sqnr_db
from edge_quantize.pack import Making, pack_checkpoint, pack_whole, refuse_existing
from edge_quantize.quantize import QuantRecipe, Trunks, quantize_trunk, quantize_whole
from edge_quantize.rewrite import session_of
from edge_quantize.search import Budget, Progress, SearchResult, hold_back, search
from edge_sdk.errors import ConfigError, RuntimeUnavailableError
from edge_sdk.head import Head, sigmoid
from edge_sdk.manifest import Manifest, StateSpec, TargetSpec
from edge_sdk.schema import ANY, InputSpec
from edge_sdk.tasks import rows_right
from edge_sdk.types import AnyArray, FloatArray, Task

if TYPE_CHECKING:
    from edge_quantize.export import Module

_PARITY_ROWS = 64
_SEARCH_ROWS = 2000
_HELD_OUT_ROWS = 512
_DEPARTURE_ROWS = 200
_LEAST_SAME = 0.9
_LEAST_SQNR_DB = 15.0
"""Of whole models: with less agreement, or signal above noise, INT8 does not ship."""
_SUMS_TO_ONE = 1e-3
_STRETCHES = 8
"""Rows of a recurrent network are taken in so many stretches, for their order tells."""
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
    model: Module | ModelProto | Path | str,
    data: Dataset,
    *,
    labels: Sequence[str],
    name: str,
    release: int,
    target: Path | str,
    created: str,
    input_spec: InputSpec,
    task: Task = "classification",
    adapt: Literal["auto", "head", "none"] = "auto",
    targets: Sequence[TargetSpec] = (),
    thresholds: Sequence[float] = (),
    more_inputs: Sequence[InputSpec] = (),
    state: Sequence[StateSpec] = (),
    fixed: Mapping[str, Any] | None = None,
    parent: Path | str | None = None,
    cut: str | None = None,
    exporter: Exporter = "dynamo",
    seed: int = 0,
    quantization: QuantRecipe | Search | None = None,
    memory: Memory | None = None,
    random_features: int = 0,
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
        targets: Of a regression whose network puts out standardised numbers, which are taken back to the targets'
            units. Without them the network puts out those itself, and a head is rescaled, so that what it learns is
            standardised.
        thresholds: Of a multi-label network; 0.5 if none are given.
        more_inputs: Further inputs (adapt=none).
        state: What a recurrent network carries from call to call (adapt=none). All rows are then recordings in their
            order, through which the state is carried.
        fixed: Inputs that never change, by name, with their value: they become constants of the graph (adapt=none).
        parent: Folder of the checkpoint this one replaces.
        cut: Where to split, by tensor name; None chooses.
        exporter: Of a torch network: torch's current exporter, or the classic one.
        seed: For the samples drawn.
        quantization: A recipe, or a search for one; None takes the default recipe.
        memory: How much ships of what the head was trained on.
        random_features: Width of a layer of random features to put before the head (adapt=head), which makes learning
            in closed form more accurate and takes 4 bytes a weight; 0: none. See `widen.widened`.
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
    model = Path(model) if isinstance(model, str) else model
    target, parent = Path(target), None if parent is None else Path(parent)
    refuse_existing(target)  # before minutes of work, and again while packing
    whole = bool(more_inputs or state or fixed) or task == "raw"
    if task == "raw" and isinstance(quantization, Search):
        raise ConfigError("a search needs answers that can be right or wrong; task=raw has none: state a recipe")
    specs: InputSpec | list[InputSpec] = [input_spec, *more_inputs] if more_inputs else input_spec
    maker = _Maker(
        data=data.checked(specs, labels, task=task, learns=False), spec=input_spec, more_inputs=more_inputs,
        state=state, labels=labels, task=task, seed=seed, quantization=quantization or QuantRecipe(),
        progress=progress, thresholds=thresholds,
    )  # fmt: skip
    graph = maker.graph(model, exporter)
    if fixed:
        graph = fix_inputs(graph, fixed)
    assessment = assess(graph)
    _check_level(assessment, adapt, whole=whole, random_features=random_features)
    maker.check_inputs(assessment.inputs)
    facts: dict[str, Any] = {
        "name": name, "release": release, "created": created, "task": task, "thresholds": thresholds,
        "parent": parent, "seed": seed, "card": card,
    }  # fmt: skip
    if whole or adapt == "none" or assessment.level == "none":
        making = Making(adapt_reason=_why_none(assessment, task=task))
        fp32, int8, making = maker.whole(graph, targets, making, assessment.not_quantizable)
        with _told_already():
            manifest = pack_whole(
                target, fp32=fp32, int8=int8, data=maker.data, input_spec=maker.spec, labels=labels, targets=targets,
                more_inputs=more_inputs, state=state, making=making, serve=maker.serve, **facts,
            )  # fmt: skip
    else:
        maker.check_learns()
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
        with _told_already():
            manifest = pack_checkpoint(
                target, trunks=trunks, head=head, data=maker.data, input_spec=input_spec, targets=targets,
                memory=memory, random_features=random_features, making=making, serve=maker.serve, **facts,
            )  # fmt: skip
    rows = maker.data
    comparison = compare_variants(target, rows.holdout_x, rows.holdout_y, slices=rows.slices, memory=measure_memory)
    return BuildResult(manifest, comparison, assessment, maker.found)


def _check_level(assessment: Assessment, adapt: str, *, whole: bool, random_features: int) -> None:
    """Whether the network can be adapted as was asked for.

    Raises:
        ConfigError: The contract rules it out.
        ExportError: The network has no head.
    """
    if whole and adapt == "head":
        raise ConfigError("adapt=head takes one input and no state, and a task other than raw")
    if adapt == "head" and assessment.level == "none":
        raise ExportError(f"adapt=head is not possible: {assessment.reason}; adapt=none serves the network as it is")
    if random_features and (whole or "none" in (adapt, assessment.level)):
        raise ConfigError("random features go before a head that learns; this model is served whole")


@contextmanager
def _told_already() -> Iterator[None]:
    """The same rows are checked again, and need not be complained of again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeakageWarning)
        yield


def _why_none(assessment: Assessment, *, task: Task) -> str:
    if assessment.level == "none":
        return assessment.reason
    return "raw outputs have no truth to learn from" if task == "raw" else "as asked"


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
        row = self._example(self.data.holdout_x[:1])
        return export_onnx(
            model, list(row.values()), input_names=list(row), output_names=["output", *(s.output for s in self.state)],
            batch_axes=dict.fromkeys(row), exporter=exporter,
        )  # fmt: skip

    def check_inputs(self, inputs: Sequence[TensorFacts]) -> None:
        """Whether the graph takes what the contracts make; the only input gets the name that the graph gives it.

        Raises:
            ConfigError: It does not.
        """
        others = {*(s.name for s in self.more_inputs), *(s.input for s in self.state)}
        main = [value.name for value in inputs if value.name not in others]
        if len(main) == 1 and not self.more_inputs:  # with several, the rows name them
            self.spec = msgspec.structs.replace(self.spec, name=main[0])
        declared = {s.name: (s.dtype, [ANY, *s.model_shape]) for s in (self.spec, *self.more_inputs)}
        declared |= {s.input: (s.dtype, s.shape) for s in self.state}
        if {value.name for value in inputs} != set(declared):
            raise ConfigError(
                f"the graph takes {', '.join(value.name for value in inputs)}; declared are {', '.join(declared)}: "
                "name each as the input, a further input or a state, or fix it"
            )
        for value in inputs:
            dtype, shape = declared[value.name]
            if value.dtype != dtype:
                raise ConfigError(f"input {value.name!r} of the graph takes {value.dtype}, the contract makes {dtype}")
            if value.shape is not None and not _fits(value.shape, shape):
                made = ", ".join("any" if size == ANY else str(size) for size in shape)
                raise ConfigError(f"the graph takes {value}, the contract makes [{made}], batch first")
            if shape[:1] == [ANY] and value.shape and isinstance(value.shape[0], int) and value.shape[0] > 1:
                raise ConfigError(f"the graph takes {value}: {value.shape[0]} rows at a time, a device serves one; "
                                  "export it with a dynamic batch")  # fmt: skip

    def check_learns(self) -> None:
        """Whether there are the rows that a head needs.

        Raises:
            DataError: There are not.
        """
        if self.data.train_x is None:
            raise DataError(
                "train: a checkpoint with a head needs the rows the head was trained on, for factory memory and Fisher "
                "information; give them, or ask for adapt=none"
            )
        with _told_already():
            self.data.checked(self.spec, self.labels, task=self.task)

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

    def whole(
        self, graph: ModelProto, targets: Sequence[TargetSpec], making: Making, impossible: str
    ) -> tuple[bytes, bytes | None, Making]:
        """The float file, the INT8 file or None, and why."""
        graph = self._answering(graph, targets)
        fp32 = canonical_bytes(graph)
        if impossible:
            return fp32, None, _float_only(making, impossible)
        calibration, validation = self._split_rows
        truth = self._truth(validation)
        first = answer_of(graph, self.state).name

        def score(outputs: Mapping[str, AnyArray]) -> AnyArray:
            return self._judged(np.asarray(outputs[first]).reshape(len(truth), -1), truth)

        feeds, held_out = self._feeds(graph, calibration), self._feeds(graph, self.data.holdout_x[:_HELD_OUT_ROWS])
        chosen_by = None if validation is None else self._feeds(graph, validation)
        reason = ""
        for recipe in [self._recipe(graph, feeds, chosen_by, score, whole=True), *self._fallbacks]:
            try:
                int8 = quantize_whole(graph, feeds, recipe, held_out=held_out)
            except ExportError as error:
                reason = reason or str(error)
                continue
            if not (wrong := self._departure(graph, int8, calibration)):
                return fp32, int8, self._making(making, recipe, len(calibration))
            reason = f"{recipe.name}: {wrong}"
        return fp32, None, _float_only(making, reason)

    @property
    def _fallbacks(self) -> list[QuantRecipe]:
        """What else is tried if nobody said how to quantize."""
        return [QuantRecipe(layers="heavy")] if self.quantization == QuantRecipe() else []

    def _departure(self, graph: ModelProto, int8: bytes, calibration: Any) -> str:
        """How INT8 says something else than float on calibration rows, or nothing: a device cannot tell by itself."""
        calls = self._calls(graph, calibration[:_DEPARTURE_ROWS])
        name = answer_of(graph, self.state).name
        answers = [
            [session.run([name], call)[0] for call in calls]
            for session in (session_of(graph), session_of(ModelProto.FromString(int8)))
        ]
        if self.task in _ACTIVATION:
            said, wanted = (np.concatenate(rows) for rows in (answers[1], answers[0]))
            truth = wanted.argmax(axis=1) if self.task == "classification" else wanted >= self._thresholds
            same = float(rows_right(said, truth, self._draft).mean())
            return "" if same >= _LEAST_SAME else f"it agrees with float on {same:.1%} of the calibration rows alone"
        pairs = [(a, b) for a, b in zip(*answers, strict=True) if a.shape == b.shape]
        if len(pairs) < _LEAST_SAME * len(calls):
            return f"it puts out another shape than float on {len(calls) - len(pairs)} of {len(calls)} rows"
        ratio = sqnr_db(*(np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (0, 1)))
        if ratio is None or ratio >= _LEAST_SQNR_DB:
            return ""
        return f"its output is {ratio:.1f} dB above its error against float, {_LEAST_SQNR_DB:g} are asked for"

    @property
    def _thresholds(self) -> AnyArray:
        return np.array(self._draft.thresholds, dtype=np.float32)

    def _answering(self, graph: ModelProto, targets: Sequence[TargetSpec]) -> ModelProto:
        """The graph, with what the task makes of its first output behind it where it does not do so itself."""
        if self.task == "raw":
            return graph
        answer = answer_of(graph, self.state).name
        session = session_of(graph)
        try:
            calls = self._calls(graph, self.data.holdout_x[:_PARITY_ROWS])
            first = [session.run([answer], call)[0] for call in calls]
        except Exception as error:  # the engine's exceptions share no base class of their own
            raise RuntimeUnavailableError(f"the graph does not run on held-out rows: {error}") from error
        count = len(self.labels)
        if any(found.shape != (1, count) for found in first):
            raise ConfigError(f"the first output has shape {first[0].shape} for one row; for {count} labels it must be "
                              f"(1, {count}), or use task=raw")  # fmt: skip
        found = np.concatenate(first)
        if self.task == "regression":
            return in_units(graph, targets, carried=self.state) if targets else graph
        within = float(found.min()) >= 0 and float(found.max()) <= 1
        if within and (self.task == "multilabel" or np.abs(found.sum(axis=1) - 1).max() <= _SUMS_TO_ONE):
            return graph
        return activated(graph, _ACTIVATION[self.task], carried=self.state)

    # ---- rows

    @cached_property
    def _split_rows(self) -> tuple[Any, Any]:
        """Rows to calibrate on, and rows to choose a recipe by, if one is searched for. Never held-out rows."""
        rng = np.random.default_rng(self.seed)
        data = self.data
        source, y = (data.train_x, data.train_y) if data.calibration_x is None else (data.calibration_x, None)
        if source is None:
            raise DataError("quantization needs calibration rows or training rows")
        validation = data.validation_x if isinstance(self.quantization, Search) else None
        if isinstance(self.quantization, Search) and validation is None:
            if data.train_x is None:
                raise DataError("a search needs validation rows or training rows to choose by")
            rest, self.held_back = self._held_back(len(data.train_x), rng)
            validation = _rows(data.train_x, self.held_back)
            if data.calibration_x is None:
                source, y = _rows(source, rest), None if y is None else y[rest]
        limit, some = self._max_rows, source
        if self.state:
            some = _rows(source, stretches(len(source), limit))
        elif isinstance(source, list):
            some = _rows(source, np.sort(rng.permutation(len(source))[:limit]))
        main = self._main(some)
        rows = calibration_rows(
            main, max_rows=len(main) if some is not source else limit, rng=rng,
            y=y if self.task != "regression" and some is source else None, spec=self.spec,
            held_out=self._main(data.holdout_x),
        )  # fmt: skip
        return (rows if some is source else some), validation

    def _held_back(self, count: int, rng: np.random.Generator) -> tuple[AnyArray, AnyArray]:
        """Positions of the training rows that are calibrated on, and of those that recipes are chosen by."""
        if self.state:  # a recording keeps its order
            cut = count - min(_SEARCH_ROWS, count // 3)
            return np.arange(cut), np.arange(cut, count)
        stratify = self.data.train_y if self.task != "regression" else None
        return hold_back(count, max_rows=_SEARCH_ROWS, rng=rng, y=stratify)

    def _main(self, x: Any) -> AnyArray:
        return np.stack([row[self.spec.name] for row in x]) if self.more_inputs else x

    @property
    def _max_rows(self) -> int:
        recipe = self.quantization if isinstance(self.quantization, QuantRecipe) else QuantRecipe()
        return recipe.calibration.max_rows

    def _truth(self, validation: Any) -> AnyArray:
        """Of the rows to choose a recipe by; nothing without a search."""
        if validation is None:
            return np.zeros(0)
        return np.asarray(self.data.validation_y if self.held_back is None else self.data.train_y[self.held_back])

    def _judged(self, scores: AnyArray, truth: AnyArray) -> AnyArray:
        """Whether each answer is right, or how wrong it is."""
        if self.task == "regression":
            return np.asarray(np.abs(scores - truth).mean(axis=1))
        return rows_right(scores, truth, self._draft)

    def _example(self, x: Any) -> dict[str, AnyArray]:
        """The first row of x as the network takes it, with a state of zeros."""
        row = x[0]
        main = row[self.spec.name] if self.more_inputs else row
        feeds = {self.spec.name: self.spec.apply(main[None])}
        feeds |= {s.name: s.apply(row[s.name][None]) for s in self.more_inputs}
        return feeds | {s.input: np.zeros(s.shape, dtype=s.dtype) for s in self.state}

    def _calls(self, graph: ModelProto, x: Any) -> list[dict[str, AnyArray]]:
        """One call for each row; the state of the float network is carried through them."""
        calls = [self._example(x[i : i + 1]) for i in range(len(x))]
        if not self.state:
            return calls
        session = session_of(graph)
        for call, following in pairwise(calls):
            found = session.run([s.output for s in self.state], call)
            following.update({s.input: value for s, value in zip(self.state, found, strict=True)})
        return calls

    def _feeds(self, graph: ModelProto, x: Any) -> Feeds:
        """Rows to calibrate on or to choose by: together where the graph takes a batch, else one by one."""
        batches = {_batch(value) for value in (*graph.graph.input, *graph.graph.output)}
        if self.state or len(batches) != 1 or None in batches:
            return self._calls(graph, x)
        feeds = {self.spec.name: self.spec.apply(self._main(x))}
        return feeds | {s.name: s.apply(np.stack([row[s.name] for row in x])) for s in self.more_inputs}

    # ---- recipe

    @property
    def serve(self) -> Literal["auto", "fp32"]:
        """Float, if a search found that even the recipe which loses least loses too much."""
        if self.found is None or self.found.choice.trial.recipe is not None:
            return "auto"
        packed = next(trial for trial in self.found.trials if trial.recipe == self.found.recipe)
        return "auto" if packed.loss <= self.found.max_loss else "fp32"

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


def stretches(count: int, most: int) -> AnyArray:
    """Positions of at most `most` of `count` rows, in stretches of rows that follow each other; int64, sorted."""
    if count <= most:
        return np.arange(count)
    length = most // _STRETCHES
    starts = np.linspace(0, count - length, _STRETCHES).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(length)).ravel())


def _fits(shape: Sequence[int | str], declared: Sequence[int]) -> bool:
    """Whether a graph's input of this shape takes arrays of the declared one."""
    return len(shape) == len(declared) and all(
        isinstance(size, str) or ANY in (size, wanted) or size == wanted
        for size, wanted in zip(shape[1:], declared[1:], strict=True)
    )


def _batch(value: Any) -> str | None:
    """The name of the first dimension; None if it is fixed or missing."""
    dims = value.type.tensor_type.shape.dim
    return (dims[0].dim_param or None) if dims else None


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
