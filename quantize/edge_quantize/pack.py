"""The checkpoint folder: everything a device needs to serve, watch and learn, in plain files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import numpy as np

from edge_quantize.calibrate import Calibration
from edge_quantize.card import CardFacts, CardText, render_card
from edge_quantize.compare import VARIANTS, contrast_outputs, encode, judge, predict
from edge_quantize.data import Dataset
from edge_quantize.errors import ParityError
from edge_quantize.learning import Memory, Start, check_learning, learning_start
from edge_quantize.metrics import Score, Terms
from edge_quantize.quantize import Trunks, head_graph
from edge_quantize.widen import widened
from edge_sdk import __version__
from edge_sdk.drift.features import MAX_FEATURES, Thumbnail, feature_names
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import ConfigError, IncompatibleError
from edge_sdk.files import fsync_folder, npz_bytes, replace_file, storage_error
from edge_sdk.head import Head, dequantize
from edge_sdk.manifest import (
    CARD,
    HEAD_NPZ,
    HEAD_ONNX,
    MANIFEST_NAME,
    MODEL_FP32,
    MODEL_INT8,
    REFERENCE_NPZ,
    SELFTEST_NPZ,
    TRUNK_FP32,
    TRUNK_INT8,
    HeadSpec,
    Manifest,
    StateSpec,
    TargetSpec,
    describe_folder,
    digest_of,
    manifest_bytes,
    verify_checkpoint,
)
from edge_sdk.model import GraphModel, checked_state
from edge_sdk.runtime import WholeModel
from edge_sdk.schema import InputSpec
from edge_sdk.selftest import self_test
from edge_sdk.tasks import rows_loss, rows_right, standardise
from edge_sdk.types import AnyArray, FloatArray, IndexArray, LatentArray, Task, Variant

SELFTEST_ROWS = 32
SELFTEST_BYTES = 2_000_000
"""Of stored inputs: large images must not outweigh the model. Two rows are kept in any case."""
_TOLERANCE = 0.9
"""Without a stated tolerance, the error that so many held-out rows stay below."""
_TOOLS = ("numpy", "onnx", "onnxruntime", "torch")


@dataclass(frozen=True)
class Making:
    """How the model came to be what it is: facts for the card.

    Attributes:
        recipe: Of the quantization, in a few words.
        adapt_reason: Why it has its adapt level.
        calibration: How ranges were found.
        calibration_rows: From so many rows.
        float_only: Why there is no INT8 variant; "" if there is one.
    """

    recipe: str = ""
    adapt_reason: str = ""
    calibration: Calibration | None = None
    calibration_rows: int = 0
    float_only: str = ""


def pack_checkpoint(
    target: Path,
    *,
    trunks: Trunks,
    head: Head,
    data: Dataset,
    input_spec: InputSpec,
    name: str,
    release: int,
    created: str,
    task: Task = "classification",
    targets: Sequence[TargetSpec] = (),
    thresholds: Sequence[float] = (),
    serve: Literal["auto", "fp32"] = "auto",
    parent: Path | None = None,
    seed: int = 0,
    memory: Memory | None = None,
    random_features: int = 0,
    card: CardText | None = None,
    making: Making | None = None,
) -> Manifest:
    """Write the folder of a model that is split, and check it as a device would.

    The same arguments give the same bytes. The folder appears under its name only when it is complete and has
    passed its own self-test.

    Args:
        target: The folder to make; must not exist.
        trunks: From `quantize_trunk`, or of another checkpoint.
        head: The head to ship. Its labels are the checkpoint's: labels, or names of a regression's targets.
        data: Rows in the app's units.
        input_spec: The input contract with its preprocessing.
        name: What the model is called.
        release: Number of the release, >= 1 and above the parent's.
        created: When, as ISO 8601 text; given, so that nothing depends on the clock.
        task: What the outputs mean.
        targets: Of a regression, one for each output; a tolerance of NaN is found from the held-out rows.
        thresholds: Of a multi-label model, one for each label; 0.5 if none are given.
        serve: "fp32" if INT8 was found to lose too much; devices then serve float unless their settings insist.
        parent: Folder of the checkpoint this one replaces.
        seed: For the samples drawn.
        memory: How much ships of what the head was trained on.
        random_features: If not 0, the head gets a first layer of so many random features, and its last layer is fitted
            anew, see `widen.widened`.
        card: What only a person can say about the model.
        making: How the model came to be, for the card.

    Raises:
        ConfigError: The target exists, a label repeats, the release number is not above the parent's, memory does
            not fit its bound, targets or thresholds do not fit the task, or random features the head.
        DataError: The rows cannot be used.
        IncompatibleError: The head does not fit the trunk's latent.
        ParityError: INT8 and FP32 agree on no held-out row.
        SelfTestError: The packed model does not reproduce its own outputs.
    """
    refuse_existing(target)
    if head.latent_dim != trunks.latent.dim:
        raise IncompatibleError(f"the head takes {head.latent_dim} values, the trunk puts out {trunks.latent.dim}")
    draft = _draft(
        name, release, parent, created, task, head.labels, input_spec, targets, thresholds,
        serve=serve, latent=trunks.latent, head=HeadSpec([]),
    )  # fmt: skip
    rows = data.checked(input_spec, head.labels, task=task)
    packer = _Packer(rows, np.random.default_rng(seed), card or CardText(), making or Making())

    def widen(latents: LatentArray) -> Head:
        targets_of_rows = standardise(rows.train_y, draft) if task == "regression" else rows.train_y
        return widened(
            head, latents, targets_of_rows, latent=trunks.latent, task=task, features=random_features, seed=seed
        )

    change = widen if random_features else lambda _: head
    return _publish(target, lambda folder: packer.split(folder, draft, trunks, change, memory or Memory()))


def pack_whole(
    target: Path,
    *,
    fp32: bytes,
    int8: bytes | None,
    data: Dataset,
    input_spec: InputSpec,
    name: str,
    release: int,
    created: str,
    task: Task = "raw",
    labels: Sequence[str] = (),
    targets: Sequence[TargetSpec] = (),
    thresholds: Sequence[float] = (),
    more_inputs: Sequence[InputSpec] = (),
    state: Sequence[StateSpec] = (),
    serve: Literal["auto", "fp32"] = "auto",
    parent: Path | None = None,
    seed: int = 0,
    card: CardText | None = None,
    making: Making | None = None,
) -> Manifest:
    """Write the folder of a model that is served whole (adapt=none), and check it as a device would.

    Args:
        target: The folder to make; must not exist.
        fp32: The model as ONNX; with a task other than raw, its first output holds probabilities or values.
        int8: The same quantized; None ships float alone.
        data: Rows in the app's units; training rows are not needed.
        input_spec: Contract of the main input, which the monitors watch. Its name is that of the graph's input.
        name: What the model is called.
        release: Number of the release, >= 1 and above the parent's.
        created: When, as ISO 8601 text.
        task: What the first output means; raw: nothing that a truth could be compared with.
        labels: Names of labels or targets; none for raw.
        targets: Of a regression, in its units (mean 0, std 1); a tolerance of NaN is found from the held-out rows.
        thresholds: Of a multi-label model; 0.5 if none are given.
        more_inputs: Contracts of further inputs.
        state: What a recurrent model carries from call to call.
        serve: As in `pack_checkpoint`.
        parent: Folder of the checkpoint this one replaces.
        seed: For the samples drawn.
        card: What only a person can say about the model.
        making: How the model came to be, for the card.

    Raises:
        ConfigError, DataError, SelfTestError: As in `pack_checkpoint`.
        IncompatibleError: The graph's inputs and outputs are not those of the contracts.
    """
    refuse_existing(target)
    if task == "regression" and not targets:
        targets = [TargetSpec(0.0, 1.0, float("nan")) for _ in labels]
    draft = _draft(
        name, release, parent, created, task, labels, input_spec, targets, thresholds,
        adapt="none", more_inputs=list(more_inputs), state=list(state), serve=serve,
    )  # fmt: skip
    specs: InputSpec | list[InputSpec] = [input_spec, *more_inputs] if more_inputs else input_spec
    rows = data.checked(specs, labels, task=task, learns=False)
    packer = _Packer(rows, np.random.default_rng(seed), card or CardText(), making or Making())
    files = {MODEL_FP32: fp32, **({MODEL_INT8: int8} if int8 is not None else {})}
    return _publish(target, lambda folder: packer.whole(folder, draft, files))


def refuse_existing(target: Path) -> None:
    """Checkpoints are never overwritten.

    Raises:
        ConfigError: `target` exists.
    """
    if target.exists():
        raise ConfigError(f"{target} already exists; checkpoints are never overwritten, choose another")


def repack_checkpoint(
    parent: Path,
    target: Path,
    *,
    head: Head,
    data: Dataset,
    release: int,
    created: str,
    seed: int = 0,
    memory: Memory | None = None,
    card: CardText | None = None,
) -> Manifest:
    """A new release on the same trunk: its files are byte-identical, so devices keep what they learned.

    Fisher information, factory memory, moments, self-test and reference are taken anew from `data`.

    Args:
        parent: The checkpoint whose trunk, input contract, task and name are kept.
        target: The folder to make; must not exist.
        head: The new head, trained on this trunk's latents (`encode`). It may have more labels.
        data: Rows in the app's units.
        release: Above the parent's.
        created: When, as ISO 8601 text.
        seed: For the samples drawn.
        memory: How much ships of what the head was trained on.
        card: What only a person can say about the model.

    Raises:
        IntegrityError: The parent is damaged.
        IncompatibleError: The parent is not split.
        EdgeError: As in `pack_checkpoint`.
    """
    base = verify_checkpoint(parent)
    if base.adapt == "none":
        raise IncompatibleError(f"{base.name} is served whole (adapt=none): it has no head to replace")
    more = len(head.labels) - len(base.labels)
    return pack_checkpoint(
        target,
        trunks=Trunks.of_checkpoint(parent, base),
        head=head,
        data=data,
        input_spec=base.input,
        name=base.name,
        release=release,
        created=created,
        task=base.task,
        targets=base.targets,
        serve=base.serve,
        thresholds=[*base.thresholds, *([0.5] * more if base.task == "multilabel" else [])],
        parent=parent,
        seed=seed,
        memory=memory,
        card=card,
        making=Making(adapt_reason=f"the trunk is that of release {base.release}"),
    )


def _draft(
    name: str,
    release: int,
    parent: Path | None,
    created: str,
    task: Task,
    labels: Sequence[str],
    input_spec: InputSpec,
    targets: Sequence[TargetSpec],
    thresholds: Sequence[float],
    **more: Any,
) -> Manifest:
    """The manifest without files and metrics."""
    if repeated := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise ConfigError(f"labels must differ: {repeated[0]!r} appears more than once")
    if (task == "raw") != (not labels):
        raise ConfigError(f"task={task} with {len(labels)} labels: raw outputs have no labels, all others need them")
    if task == "multilabel" and not thresholds:
        thresholds = [0.5] * len(labels)
    for what, given, wanted in (("targets", targets, "regression"), ("thresholds", thresholds, "multilabel")):
        if len(given) != (len(labels) if task == wanted else 0):
            raise ConfigError(f"task={task} with {len(labels)} outputs does not go with {len(given)} {what}")
    if bad := [at for at in thresholds if not 0 < at < 1]:
        raise ConfigError(f"a threshold must lie between 0 and 1, got {bad[0]}")
    return Manifest(
        name=name,
        release=release,
        parent=_parent_digest(parent, release),
        created=created,
        task=task,
        labels=list(labels),
        input=input_spec,
        targets=list(targets),
        thresholds=list(thresholds),
        files={},
        toolchain=_toolchain(),
        **more,
    )


def _publish(target: Path, fill: Callable[[Path], Manifest]) -> Manifest:
    """Fill a folder beside the target, check it as a device would, and give it its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise storage_error(error, f"cannot create {target}") from error
    try:
        manifest = fill(staging)
        verify_checkpoint(staging)
        if manifest.learns:
            check_learning(staging, manifest)
        for variant in manifest.model_files:
            self_test(staging, manifest, variant=variant)
        staging.chmod(0o755)
        try:
            staging.rename(target)
            fsync_folder(target.parent)
        except OSError as error:
            raise storage_error(error, f"cannot create {target}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Packer:
    """Fills a folder from checked rows, the manifest last."""

    data: Dataset
    rng: np.random.Generator
    card: CardText
    making: Making

    def split(
        self, folder: Path, draft: Manifest, trunks: Trunks, head_for: Callable[[LatentArray], Head], memory: Memory
    ) -> Manifest:
        data, rng = self.data, self.rng
        replace_file(folder / TRUNK_INT8, trunks.int8)
        replace_file(folder / TRUNK_FP32, trunks.fp32)
        train_latents = encode(folder, data.train_x, spec=draft.input)
        head = head_for(train_latents)
        hidden = HeadSpec([head.weights[f"b{i}"].shape[0] for i in range(head.depth - 1)])
        draft = msgspec.structs.replace(draft, head=hidden)
        replace_file(folder / HEAD_ONNX, head_graph(head, trunks.latent, task=draft.task, targets=draft.targets))
        replace_file(folder / HEAD_NPZ, head.to_bytes())
        start = learning_start(head, train_latents, data.train_y, manifest=draft, memory=memory, rng=rng)
        for name, content in start.files.items():
            replace_file(folder / name, content)

        latents = {v: encode(folder, data.holdout_x, spec=draft.input, variant=v) for v in VARIANTS}
        scores = {variant: predict(folder, latents[variant]) for variant in VARIANTS}
        draft = _with_tolerances(draft, scores["int8"], data.holdout_y)
        rows = selftest_rows(data.holdout_x, scores, draft.task, rng)
        stored = {f"out.{variant}": latents[variant][rows] for variant in VARIANTS}
        replace_file(
            folder / SELFTEST_NPZ, npz_bytes({"x": data.holdout_x[rows], "scores": scores["int8"][rows], **stored})
        )
        features = {variant: dequantize(latents[variant], trunks.latent) for variant in VARIANTS}
        apart = [[{"latent": features[v], "logits": head.logits(features[v])}] for v in VARIANTS]
        return self._finish(folder, draft, scores, apart, start=start, selftest=len(rows), latents=latents)

    def whole(self, folder: Path, draft: Manifest, files: Mapping[str, bytes]) -> Manifest:
        for name, content in files.items():
            replace_file(folder / name, content)
        x = self.data.holdout_x
        variants: list[Variant] = ["int8", "fp32"] if MODEL_INT8 in files else ["fp32"]
        scores: dict[Variant, FloatArray] = {}
        firsts: dict[Variant, list[AnyArray]] = {}
        alone: dict[Variant, tuple[FloatArray, list[AnyArray]]] = {}
        for variant in variants:
            model = WholeModel(folder / (MODEL_INT8 if variant == "int8" else MODEL_FP32))
            check_graph(model, draft)
            served = GraphModel(model, draft)
            scores[variant], firsts[variant] = run_whole(served, draft, x)
            # the self-test replays each row from a state of zeros
            anew = draft.state and run_whole(served, draft, x, carry=False)
            alone[variant] = anew or (scores[variant], firsts[variant])
        if draft.task != "raw" and scores[variants[0]].shape[1:] != (len(draft.labels),):
            raise IncompatibleError(
                f"the first output has shape {scores[variants[0]].shape}, there are {len(draft.labels)} labels"
            )
        draft = _with_tolerances(draft, scores[variants[0]], self.data.holdout_y)
        rows = selftest_rows(x, {v: found[0] for v, found in alone.items()}, draft.task, self.rng)
        # a detector finds more in one image than in another: only outputs of one shape can be stacked
        shapes = [tuple(found[1][i].shape for found in alone.values()) for i in rows]
        usual = max(shapes, key=shapes.count)
        alike = [i for i, shape in zip(rows, shapes, strict=True) if shape == usual]
        stored = {f"out.{variant}": np.stack([found[1][i] for i in alike]) for variant, found in alone.items()}
        if draft.more_inputs:
            stored |= {f"x.{s.name}": np.stack([x[i][s.name] for i in alike]) for s in draft.more_inputs}
        main = main_input(x, draft)
        stored |= {"x": main[alike], "scores": alone[variants[0]][0][alike]}
        replace_file(folder / SELFTEST_NPZ, npz_bytes(stored))
        apart = [[{"output": found} for found in firsts[v]] for v in variants]
        return self._finish(folder, draft, scores, apart, start=Start(), selftest=len(alike))

    def _finish(
        self,
        folder: Path,
        draft: Manifest,
        scores: Mapping[Variant, FloatArray],
        apart: list[list[dict[str, AnyArray]]],
        *,
        start: Start,
        selftest: int,
        latents: Mapping[Variant, LatentArray] = MappingProxyType({}),
    ) -> Manifest:
        """Reference, card and manifest."""
        data, task = self.data, draft.task
        served: Variant = "int8" if "int8" in scores and draft.serve == "auto" else "fp32"
        judged = {v: judge(Terms.of(draft), values, data.holdout_y, data.slices) for v, values in scores.items()} \
            if task != "raw" else {}  # fmt: skip
        correct = rows_right(scores[served], data.holdout_y, draft) if judged else np.zeros(0, dtype=bool)
        reference = Reference.build(
            Thumbnail(draft.input.shape)(main_input(data.holdout_x, draft)),
            scores[served],
            correct,
            task=task,
            names=feature_names(draft.input),
            latents=latents.get(served),
            losses=rows_loss(scores[served], data.holdout_y, draft) if task == "regression" else None,
            categories=_categories(draft.input),
            ordered=bool(draft.state),  # a recurrent model's rows are a recording
        )
        replace_file(folder / REFERENCE_NPZ, reference.to_bytes())
        both = len(scores) > 1
        agreement = float(Terms.of(draft).same(scores["int8"], scores["fp32"]).mean()) if both and judged else None
        contrasts = contrast_outputs(*apart)[0] if both else {}
        facts = CardFacts(
            train_rows=0 if data.train_x is None else len(data.train_x),
            memory_rows=start.memory_rows,
            moments_rows=start.moments_rows,
            no_moments=start.no_moments,
            learning_bytes={name: len(content) for name, content in start.files.items()},
            int8=judged["int8"][0] if both and judged else None,
            fp32=judged["fp32"][0] if judged else None,
            agreement=agreement,
            by_label=judged[served][1] if judged else {},
            by_slice=judged[served][2] if judged else {},
            label_rows=_label_rows(data.train_y, draft) if data.train_x is not None else {},
            holdout_rows=len(data.holdout_x),
            sqnr_db={name: contrast.sqnr_db for name, contrast in contrasts.items()},
            calibration=self.making.calibration,
            calibration_rows=self.making.calibration_rows,
            recipe=self.making.recipe or self.making.float_only,
            adapt_reason=self.making.adapt_reason,
            selftest_rows=selftest,
            leaked_rows=max(data.leaks().values(), default=0),
        )
        replace_file(folder / CARD, render_card(draft, facts, self.card).encode())
        metrics = {"holdout_rows": float(len(data.holdout_x)), **_metrics({v: j[0] for v, j in judged.items()})}
        if agreement is not None:
            metrics["agreement"] = agreement
        files = describe_folder(folder, sorted(path.name for path in folder.iterdir()))
        manifest = msgspec.structs.replace(draft, files=files, metrics=metrics)
        replace_file(folder / MANIFEST_NAME, manifest_bytes(manifest))
        return manifest


def _categories(spec: InputSpec) -> dict[str, Sequence[float]]:
    """Codes that stand for known categories; those of a row too wide to be watched value by value are not told."""
    if len(spec.columns) > MAX_FEATURES:
        return {}
    return {column.name: range(column.size) for column in spec.columns if column.kind == "category"}


def _metrics(scores: Mapping[Variant, Score]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for variant, score in scores.items():
        if (accuracy := score.accuracy) is not None:
            metrics[f"{variant}_accuracy"] = accuracy.value
            metrics[f"{variant}_accuracy_low"] = accuracy.low
            metrics[f"{variant}_accuracy_high"] = accuracy.high
    return metrics


def _with_tolerances(draft: Manifest, scores: FloatArray, truth: AnyArray) -> Manifest:
    """Tolerances that nobody stated: what nine tenths of the held-out rows stay within."""
    if not any(np.isnan(target.tolerance) for target in draft.targets):
        return draft
    errors = np.abs(scores.astype(np.float64) - truth)
    found = [
        msgspec.structs.replace(target, tolerance=float(np.quantile(errors[:, i], _TOLERANCE)))
        if np.isnan(target.tolerance)
        else target
        for i, target in enumerate(draft.targets)
    ]
    return msgspec.structs.replace(draft, targets=found)


def _label_rows(y: AnyArray, draft: Manifest) -> dict[str, int]:
    if draft.task == "regression" or y is None:
        return {}
    counts = np.bincount(y, minlength=len(draft.labels)) if draft.task == "classification" else y.sum(axis=0)
    return {label: int(count) for label, count in zip(draft.labels, counts, strict=True)}


def selftest_rows(x: Any, scores: Mapping[Variant, FloatArray], task: Task, rng: np.random.Generator) -> IndexArray:
    """Rows on which a healthy device must reproduce the answer with either variant; sorted.

    Of a classifier, rows where the variants disagree, or where two labels are nearly tied, would fail on a healthy
    device.

    Raises:
        ParityError: The variants agree on no row.
    """
    size = sum(part.nbytes for part in (x[0].values() if isinstance(x[0], Mapping) else [x[0]]))
    count = max(2, min(SELFTEST_ROWS, SELFTEST_BYTES // max(1, size)))
    rows = np.arange(len(x))
    if task == "classification":
        first = next(iter(scores.values()))
        same = np.all([values.argmax(1) == first.argmax(1) for values in scores.values()], axis=0)
        agreeing = np.flatnonzero(same)
        if not len(agreeing):
            raise ParityError("INT8 and FP32 agree on no held-out row; calibrate on rows like those the model will see")
        top = np.sort(first[agreeing], axis=1)
        margin = top[:, -1] - (top[:, -2] if top.shape[1] > 1 else 0)
        rows = agreeing[np.argsort(-margin, kind="stable")][: max(count, len(agreeing) // 2)]
    return np.sort(rng.permutation(rows)[:count])


def check_graph(model: WholeModel, manifest: Manifest) -> None:
    """Whether a graph takes and gives what the contracts say.

    Raises:
        IncompatibleError: It does not; the message lists both.
    """
    wanted = [manifest.input.name, *(s.name for s in manifest.more_inputs), *(s.input for s in manifest.state)]
    if sorted(wanted) != sorted(model.inputs):
        raise IncompatibleError(
            f"the graph takes {', '.join(model.inputs)}; declared are {', '.join(wanted)}: name each as an input, as a "
            "further input or as a state, or fix it while packing"
        )
    if missing := [s.output for s in manifest.state if s.output not in model.outputs]:
        raise IncompatibleError(f"the graph puts out {', '.join(model.outputs)}, but no state {', '.join(missing)}")
    if not set(model.outputs) - {s.output for s in manifest.state}:
        raise IncompatibleError("the graph puts out nothing but its state")


def main_input(x: Any, manifest: Manifest) -> AnyArray:
    """The rows of the main input, stacked."""
    return np.stack([row[manifest.input.name] for row in x]) if manifest.more_inputs else x


def run_whole(
    model: GraphModel, manifest: Manifest, x: Any, *, carry: bool = True
) -> tuple[FloatArray, list[AnyArray]]:
    """Scores [N, K], and the first output of each row.

    Args:
        model: Of the manifest.
        manifest: Inputs and state.
        x: Checked rows.
        carry: The rows of a recurrent model are a recording in its order; otherwise each begins with a state of zeros.
    """
    start = checked_state(manifest.state, None)
    scores, firsts = [], []
    state = start
    for row in x:
        main = row[manifest.input.name] if manifest.more_inputs else row
        more = {s.name: s.apply(row[s.name][None]) for s in manifest.more_inputs}
        ran = model.run(manifest.input.apply(main[None]), {**more, **state})
        scores.append(ran.scores)
        firsts.append(next(iter(ran.outputs[0].values())) if ran.outputs else ran.scores[0])
        state = ran.state if carry else start
    return np.concatenate(scores), firsts


def _toolchain() -> dict[str, str]:
    versions = {"edge-sdk": __version__}
    for tool in _TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):  # packing alone does without torch
            versions[tool] = metadata.version(tool)
    return versions


def _parent_digest(parent: Path | None, release: int) -> str | None:
    if release < 1:
        raise ConfigError(f"release must be 1 or more, got {release}")
    if parent is None:
        return None
    base = verify_checkpoint(parent)
    if release <= base.release:
        raise ConfigError(f"release {release} does not follow the parent's release {base.release}; choose a higher one")
    return digest_of((parent / MANIFEST_NAME).read_bytes())
