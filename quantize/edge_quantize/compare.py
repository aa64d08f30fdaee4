"""INT8 against float: is it as right, is it faster, is it smaller?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_quantize.data import checked_slices, checked_x, checked_y
from edge_quantize.graph import CHUNK, chunks
from edge_quantize.measure import Footprint, Timing, footprint, time_interleaved
from edge_quantize.metrics import (
    Accuracy,
    Difference,
    Estimate,
    Score,
    Terms,
    error_ratio,
    paired_difference,
    sqnr_db,
)
from edge_quantize.report import render_html, render_text
from edge_sdk.errors import IncompatibleError
from edge_sdk.head import Head, dequantize, sigmoid, softmax
from edge_sdk.manifest import HEAD_NPZ, HEAD_ONNX, MANIFEST_NAME, Manifest, parse_manifest
from edge_sdk.runtime import HeadSession, OnnxRuntime, WholeModel
from edge_sdk.schema import InputSpec
from edge_sdk.types import AnyArray, FloatArray, LatentArray, Task, Variant

__all__ = [
    "BATCHES",
    "VARIANTS",
    "Accuracy",
    "Comparison",
    "Contrast",
    "OutputContrast",
    "VariantResult",
    "compare_variants",
    "contrast_outputs",
    "encode",
    "judge",
    "predict",
]

VARIANTS: tuple[Variant, Variant] = ("int8", "fp32")
REFERENCE = "reference"
BATCHES = (1, 32)

Ending = Literal["", "softmax", "log_softmax", "sigmoid"]
"""What a network has after its logits."""
Feeds = dict[str, AnyArray]
"""By input name, as the network takes it, N rows each."""
Parts = list[dict[str, AnyArray]]
"""Every output of each call, in the order of the rows."""


class VariantResult(msgspec.Struct, frozen=True, kw_only=True):
    """One variant, with the shipped head where there is one.

    Attributes:
        score: On all held-out rows; None for a raw model.
        by_label: For each label or target that has rows.
        by_slice: For each slice that has rows.
        timings: One for each batch size.
        size_bytes: Of the model files that serve it.
        footprint: Memory of a process that serves it, if that was measured.
    """

    score: Score | None
    by_label: dict[str, Score]
    by_slice: dict[str, Score]
    timings: list[Timing]
    size_bytes: int
    footprint: Footprint | None = None

    @property
    def accuracy(self) -> Accuracy:
        """Share of right rows.

        Raises:
            ValueError: A raw model has none.
        """
        if self.score is None or self.score.accuracy is None:
            raise ValueError("a raw model has no accuracy; compare outputs by their SQNR")
        return self.score.accuracy

    @property
    def p50_ms(self) -> float:
        """Median time of the smallest batch."""
        return self.timings[0].p50_ms

    @property
    def p95_ms(self) -> float:
        """Of the smallest batch."""
        return self.timings[0].p95_ms


class OutputContrast(msgspec.Struct, frozen=True):
    """How far two variants of one output are apart, over all rows.

    Attributes:
        sqnr_db: Signal-to-quantization-noise ratio in decibels; None where the two are equal or the output is zero.
        equal: Share of elements that are the same number.
        largest: The largest absolute difference.
    """

    sqnr_db: float | None
    equal: float
    largest: float


class Contrast(msgspec.Struct, frozen=True, kw_only=True):
    """One variant against another on the same rows.

    Attributes:
        first: Name of the variant that is judged.
        second: Name of the one it is held against.
        agreement: Share of rows on which both say the same: label, labels, or values within the tolerance.
        difference: By how much the first is more often right.
        error_ratio: Regression: RMSE of the first over that of the second; of several targets, each in units of its
            spread.
        outputs: "latent" and "logits" of a split model, all outputs of another.
        shapes_differ: Calls whose outputs had another shape; they are left out of `outputs`.
    """

    first: str
    second: str
    agreement: Accuracy | None
    difference: Difference | None
    error_ratio: Estimate | None
    outputs: dict[str, OutputContrast]
    shapes_differ: int = 0


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All variants of a checkpoint on the same rows and the same machine, one thread.

    Attributes:
        rows: Held-out rows.
        variants: "int8" and "fp32" as far as there are both, and "reference": the network before it was split.
        contrasts: Each variant against each that comes after it.
    """

    name: str
    release: int
    task: Task
    labels: list[str]
    rows: int
    variants: dict[str, VariantResult]
    contrasts: list[Contrast]

    @property
    def int8(self) -> VariantResult:
        """The INT8 variant.

        Raises:
            KeyError: The model ships in float alone.
        """
        return self.variants["int8"]

    @property
    def fp32(self) -> VariantResult:
        """The float variant."""
        return self.variants["fp32"]

    @property
    def agreement(self) -> float:
        """Share of rows on which INT8 and FP32 say the same; NaN for a raw model."""
        for contrast in self.contrasts:
            if (contrast.first, contrast.second) == VARIANTS and contrast.agreement is not None:
                return contrast.agreement.value
        return float("nan")

    def table(self, *, parts: bool = True) -> str:
        """Plain text for a terminal; with labels and slices one by one, or without."""
        return render_text(self, parts=parts)

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def to_html(self, *, sensitivity: Any = None) -> str:
        """One HTML page that needs nothing else.

        Args:
            sensitivity: The sensitivity of the layers, if it was measured: `.plot()` gives SVG, `.table()` text.
        """
        return render_html(self, sensitivity=sensitivity)


def encode(folder: Path, x: AnyArray, *, spec: InputSpec, variant: Variant = "int8") -> LatentArray:
    """What a device would log for these inputs: uint8 latents [N, D].

    Args:
        folder: A checkpoint folder.
        x: Inputs [N, ...] in the app's units.
        spec: The checkpoint's input contract.
        variant: Which trunk.
    """
    runtime = OnnxRuntime(folder, variant=variant)
    ready = spec.apply(spec.check_batch(x))
    return np.concatenate([runtime.latents(part) for part in chunks(ready)])


def predict(folder: Path, latents: LatentArray) -> FloatArray:
    """Probabilities [N, C] of the shipped head for latents [N, D], or the values [N, T] of a regression."""
    return HeadSession(folder / HEAD_ONNX, Head.load(folder / HEAD_NPZ)).run(latents)


def compare_variants(
    folder: Path,
    x: Any,
    y: Any = None,
    *,
    slices: Mapping[str, Any] | None = None,
    reference: Path | None = None,
    reference_ends: Ending = "",
    repeats: int = 200,
    batches: Sequence[int] = BATCHES,
    memory: bool = True,
) -> Comparison:
    """Measure all variants of a checkpoint on rows nobody trained on.

    Args:
        folder: A checkpoint folder that has been verified.
        x: Inputs [N, ...] in the app's units, or a list of dict rows: by column, or by input where there are several.
        y: Truth as in `Dataset`; None for a raw model.
        slices: Parts of the rows to report apart: bool [N], or a value for each row.
        reference: ONNX file of the float network before it was split, from preprocessed inputs to logits. Only for a
            checkpoint with a head.
        reference_ends: What it has after the logits, as `levels.Assessment.activation` tells.
        repeats: How many calls are timed for each variant and batch size.
        batches: Sizes of the batches that are timed; a model that takes single rows is timed on these.
        memory: Whether to measure memory, in a process of its own for each variant (about a second each).

    Raises:
        DataError: The rows cannot be used.
        IncompatibleError: A reference was given that cannot be compared.
        RuntimeUnavailableError: The engine failed.
    """
    manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
    feeds, rows = _feeds(manifest, x)
    truth = checked_y("holdout", y, rows, manifest.labels, task=manifest.task)
    parts_of = checked_slices(slices or {}, rows)
    runners = _runners(folder, manifest, reference, reference_ends)

    batched = all(runner.batched for runner in runners.values())
    states = _states(manifest)
    carried = {state.input: state.output for state in manifest.state}
    outputs = {name: _run(runner, feeds, states, CHUNK if batched else 1, carried) for name, runner in runners.items()}
    results = {}
    timings: dict[str, list[Timing]] = {name: [] for name in runners}
    for batch in batches if batched else (1,):
        some = _take(feeds, np.arange(batch) % rows) | states
        calls = {name: partial(runner.serve, some) for name, runner in runners.items()}
        for name, timing in time_interleaved(calls, batch=batch, repeats=repeats).items():
            timings[name].append(timing)
    one = _take(feeds, np.arange(1)) | states
    scores = {} if truth is None else {name: _joined(parts, runners[name].answer) for name, parts in outputs.items()}
    for name, runner in runners.items():
        judged = judge(Terms.of(manifest), scores[name], truth, parts_of) if name in scores else (None, {}, {})
        results[name] = VariantResult(
            score=judged[0],
            by_label={label: score for label, score in judged[1].items() if score.rows},
            by_slice=judged[2],
            timings=timings[name],
            size_bytes=sum(path.stat().st_size for path in runner.files),
            footprint=footprint(runner.place, name, one) if memory else None,
        )
    return Comparison(
        name=manifest.name,
        release=manifest.release,
        task=manifest.task,
        labels=list(manifest.labels),
        rows=rows,
        variants=results,
        contrasts=[
            _contrast(Terms.of(manifest), (first, second), outputs, scores, truth)
            for first, second in combinations(runners, 2)
        ],
    )


def judge(
    terms: Terms, scores: FloatArray, truth: AnyArray, slices: Mapping[str, AnyArray] | None = None
) -> tuple[Score, dict[str, Score], dict[str, Score]]:
    """How right outputs are: on all rows, for each label, for each slice that has rows.

    Args:
        terms: By which they are judged.
        scores: Probabilities [N, C] or values [N, T].
        truth: As `Dataset.checked` returns it.
        slices: bool [N] each.
    """
    return terms.score(scores, truth), terms.by_label(scores, truth), terms.by_slice(scores, truth, slices or {})


def contrast_outputs(first: Parts, second: Parts) -> tuple[dict[str, OutputContrast], int]:
    """How far the outputs that both have are apart, and in how many calls their shapes differ.

    Args:
        first: Outputs of each call.
        second: Of the same calls; what `first` is held against.
    """
    shared = [name for name in first[0] if name in second[0]]
    alike = [
        (a, b) for a, b in zip(first, second, strict=True) if all(a[name].shape == b[name].shape for name in shared)
    ]
    contrasts = {}
    for name in shared if alike else []:
        signal, reference = (np.concatenate([np.ravel(pair[i][name]) for pair in alike]) for i in (0, 1))
        if signal.size and signal.dtype.kind in "fiub":
            apart = np.abs(signal.astype(np.float64) - reference)
            contrasts[name] = OutputContrast(
                sqnr_db(reference, signal), float((signal == reference).mean()), float(apart.max())
            )
    return contrasts, len(first) - len(alike)


# ---- one variant that can be run


@dataclass(frozen=True)
class _Runner:
    """How a variant is run.

    Attributes:
        place: What a process that serves it is given.
        files: What ships for it.
        run: Every output of interest for feeds.
        serve: What a device does for feeds.
        answer: The output that is compared with the truth.
        batched: Whether it takes many rows in a call.
    """

    place: Path
    files: list[Path]
    run: Callable[[Feeds], dict[str, AnyArray]]
    serve: Callable[[Feeds], object]
    answer: str
    batched: bool = True


def _runners(folder: Path, manifest: Manifest, reference: Path | None, ends: Ending) -> dict[str, _Runner]:
    if manifest.adapt == "none":
        if reference is not None:
            raise IncompatibleError("a model that is served whole is its own reference; leave the reference out")
        return {variant: _whole(folder, folder / name, manifest) for variant, name in manifest.model_files.items()}
    runners: dict[str, _Runner] = {variant: _split(folder, manifest, variant) for variant in VARIANTS}
    if reference is not None:
        runners[REFERENCE] = _unsplit(reference, manifest, ends)
    return runners


def _split(folder: Path, manifest: Manifest, variant: Variant) -> _Runner:
    trunk, head = OnnxRuntime(folder, variant=variant), Head.load(folder / HEAD_NPZ)
    session = HeadSession(folder / HEAD_ONNX, head)
    answer = "values" if manifest.task == "regression" else "probabilities"

    def run(feeds: Feeds) -> dict[str, AnyArray]:
        latents = trunk.latents(feeds[manifest.input.name])
        features = dequantize(latents, manifest.latent)
        return {"latent": features, "logits": head.logits(features), answer: session.run(latents)}

    def serve(feeds: Feeds) -> object:
        return session.run(trunk.latents(feeds[manifest.input.name]))

    return _Runner(folder, [folder / manifest.model_files[variant], folder / HEAD_ONNX], run, serve, answer)


def _whole(folder: Path, path: Path, manifest: Manifest) -> _Runner:
    model = WholeModel(path)
    carried = {state.output for state in manifest.state}
    answer = next((name for name in model.outputs if name not in carried), model.outputs[0])
    return _Runner(folder, [path], model.run, model.run, answer, model.batched and not manifest.state)


def _unsplit(path: Path, manifest: Manifest, ends: Ending) -> _Runner:
    """The exported network: its first output holds the logits, or what it makes of them itself."""
    model = WholeModel(path)
    (name,) = model.inputs[:1]
    answer = "values" if manifest.task == "regression" else "probabilities"

    def serve(feeds: Feeds) -> AnyArray:
        return model.run({name: feeds[manifest.input.name]})[model.outputs[0]]

    def run(feeds: Feeds) -> dict[str, AnyArray]:
        found = serve(feeds)
        if found.ndim != 2 or found.shape[1] != len(manifest.labels):
            raise IncompatibleError(
                f"{path.name} puts out {found.shape}, the checkpoint has {len(manifest.labels)} labels"
            )
        if ends:
            return {answer: np.exp(found) if ends == "log_softmax" else found}
        return {"logits": found, answer: _activated(found, manifest)}

    return _Runner(path, [path], run, serve, answer)


def _activated(logits: FloatArray, manifest: Manifest) -> FloatArray:
    """What `head.onnx` makes of logits."""
    if manifest.task == "multilabel":
        return sigmoid(logits)
    if manifest.task == "regression":
        std, mean = (np.array([getattr(t, name) for t in manifest.targets], np.float32) for name in ("std", "mean"))
        return logits * std + mean
    return softmax(logits)


# ---- rows


def _feeds(manifest: Manifest, x: Any) -> tuple[Feeds, int]:
    """Preprocessed inputs by name, and how many rows there are."""
    specs = [manifest.input, *manifest.more_inputs]
    checked = checked_x("holdout", x, specs if manifest.more_inputs else manifest.input)
    if not manifest.more_inputs:
        return {manifest.input.name: manifest.input.apply(checked)}, len(checked)
    return {spec.name: spec.apply(np.stack([row[spec.name] for row in checked])) for spec in specs}, len(checked)


def _take(feeds: Feeds, rows: AnyArray) -> Feeds:
    return {name: np.ascontiguousarray(values[rows]) for name, values in feeds.items()}


def _states(manifest: Manifest) -> Feeds:
    """What a recurrent model starts with."""
    return {state.input: np.zeros(state.shape, dtype=state.dtype) for state in manifest.state}


def _run(runner: _Runner, feeds: Feeds, states: Feeds, size: int, carried: Mapping[str, str]) -> Parts:
    """Every output for all rows, `size` in a call; the rows of a recurrent model are a recording in its order.

    Args:
        runner: The variant.
        feeds: By input name, N rows each.
        states: What the first call starts with.
        size: Rows a call.
        carried: Which output is the next call's state, by the name of its input.
    """
    parts: Parts = []
    for start in range(0, len(next(iter(feeds.values()))), size):
        found = runner.run({name: values[start : start + size] for name, values in feeds.items()} | states)
        states = {name: found[output] for name, output in carried.items()}
        parts.append(found)
    return parts


def _joined(parts: Parts, output: str) -> FloatArray:
    return np.concatenate([part[output] for part in parts])


def _contrast(
    terms: Terms, names: tuple[str, str], outputs: Mapping[str, Parts], scores: Mapping[str, FloatArray], truth: Any
) -> Contrast:
    first, second = names
    found, shapes_differ = contrast_outputs(outputs[first], outputs[second])
    if truth is None:
        return Contrast(first=first, second=second, agreement=None, difference=None, error_ratio=None,
                        outputs=found, shapes_differ=shapes_differ)  # fmt: skip
    one, other = scores[first], scores[second]
    return Contrast(
        first=first,
        second=second,
        agreement=Accuracy.of(terms.same(one, other)),
        difference=paired_difference(terms.correct(one, truth), terms.correct(other, truth)),
        error_ratio=error_ratio(one, other, truth) if terms.task == "regression" else None,
        outputs=found,
        shapes_differ=shapes_differ,
    )
