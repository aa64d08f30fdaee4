"""Champion against challenger on rows that neither was trained on: overall, by label and by slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from edge_sdk.config import GateConfig
from edge_sdk.errors import InputError
from edge_sdk.gate import Verdict, judge
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, MANIFEST_NAME, Manifest, parse_manifest
from edge_sdk.model import load_model
from edge_sdk.outcomes import Outcomes, group_names, members, outcomes
from edge_sdk.stats import paired_evidence
from edge_sdk.tasks import store_truth
from edge_sdk.types import AnyArray, BoolArray, FloatArray, Variant

_AT_ONCE = 256
_HARM_EVIDENCE = 5.0
"""As in the devices' gate: a candidate refused in error costs little."""

Choice = Literal["better", "equal", "lost", "alone"]


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """How both do on a part of the rows.

    Attributes:
        name: Of the slice, as "site=north".
        rows: In it.
        champion: Accuracy, 0 to 1.
        challenger: The same.
        evidence: E-value against "the challenger is worse by no more than the margin".
        harmed: Whether it is, with enough rows and evidence.
    """

    name: str
    rows: int
    champion: float
    challenger: float
    evidence: float
    harmed: bool


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What the comparison says.

    Attributes:
        verdict: better: with evidence, and no label or slice is harmed; lost: worse with evidence, or one is harmed;
            equal: neither; alone: there was nothing to compare with.
        reason: In words.
        rows: Held-out rows.
        champion: Accuracy, 0 to 1; None if alone.
        challenger: The same; None if it cannot be judged by rows and their truth.
        evidence: E-value against "the challenger is no better".
        slices: Of the held-out rows.
    """

    verdict: Choice
    reason: str
    rows: int
    champion: float | None
    challenger: float | None
    evidence: float = 1.0
    slices: tuple[Slice, ...] = ()


class _Model(NamedTuple):
    manifest: Manifest
    labels: tuple[str, ...]
    scores: FloatArray


def evaluate(
    champion: Path | None,
    challenger: Path,
    x: Any,
    y: AnyArray | None,
    labels: Sequence[str],
    slices: Mapping[str, BoolArray],
) -> Evaluation:
    """Compare two checkpoints, each as a device serves it, on the same rows.

    Args:
        champion: Folder of the checkpoint in use; None: there is none.
        challenger: Folder of the candidate.
        x: Held-out rows in the app's units.
        y: Their truth, as `edge_quantize.data.checked_y` gives it, positions meaning `labels`; None: raw outputs.
        labels: Of the truth.
        slices: bool [N] by name.

    Raises:
        InputError: The challenger does not take the rows.
        ModelError: A model fails.

    Source:
        `edge_sdk.gate.judge` and `edge_sdk.stats.paired_evidence`, as on the devices.
    """
    manifest = parse_manifest((challenger / MANIFEST_NAME).read_bytes())
    if y is None or manifest.more_inputs or manifest.state:
        why = "its outputs have no truth" if y is None else "it has several inputs or a state: compare it by hand"
        return Evaluation(verdict="alone", reason=why, rows=len(x), champion=None, challenger=None)
    new = _run(challenger, x)
    truths = _truths(y, labels, new.manifest)
    right = _outcomes(new, truths).right
    alone = Evaluation(verdict="alone", reason="", rows=len(truths), champion=None, challenger=float(right.mean()))
    if champion is None:
        return msgspec.structs.replace(alone, reason="there is no release to compare with")
    try:
        old = _run(champion, x)
    except InputError as error:
        return msgspec.structs.replace(alone, reason=f"the release in use takes other inputs: {error}")
    if old.manifest.task != new.manifest.task:
        return msgspec.structs.replace(alone, reason=f"the release in use has task={old.manifest.task}")
    config = GateConfig()
    groups = group_names(truths, tuple(dict.fromkeys([*old.labels, *new.labels])), new.manifest)
    before, after = (_outcomes(model, truths, groups) for model in (old, new))
    verdict = judge(
        before, after, groups=groups, members=members(truths, groups, new.manifest),
        factory_champion=np.zeros(0, np.bool_), factory_challenger=np.zeros(0, np.bool_), waited_s=0.0, config=config,
    )  # fmt: skip
    parts = tuple(_slice(name, rows, before, after, config) for name, rows in slices.items() if rows.any())
    choice, reason = _choose(verdict, parts)
    return Evaluation(
        verdict=choice, reason=reason, rows=len(truths), champion=verdict.champion, challenger=verdict.challenger,
        evidence=verdict.evidence, slices=parts,
    )  # fmt: skip


def _choose(verdict: Verdict, slices: Sequence[Slice]) -> tuple[Choice, str]:
    told = f"accuracy {verdict.challenger:.1%} against {verdict.champion:.1%} on {verdict.rows} held-out rows"
    if harmed := [part for part in slices if part.harmed]:
        worst = min(harmed, key=lambda part: part.challenger - part.champion)
        return "lost", (
            f"harms {worst.name}: {worst.challenger:.1%} against {worst.champion:.1%} on {worst.rows} rows; {told}"
        )
    if verdict.outcome == "reject":
        return "lost", f"{verdict.reason}; {told}"
    if verdict.outcome == "promote":
        return "better", f"{verdict.reason}; {told}"
    return "equal", f"no evidence either way; {told}"


def _slice(name: str, rows: BoolArray, before: Outcomes, after: Outcomes, config: GateConfig) -> Slice:
    lost = before.right[rows].astype(np.float64) - after.right[rows]
    evidence, count = paired_evidence(lost, margin=config.slice_margin), int(rows.sum())
    return Slice(
        name=name, rows=count, champion=float(before.right[rows].mean()), challenger=float(after.right[rows].mean()),
        evidence=round(evidence, 6), harmed=count >= config.min_class_rows and evidence >= _HARM_EVIDENCE,
    )  # fmt: skip


def _run(folder: Path, x: Any) -> _Model:
    """What a checkpoint says of rows."""
    manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
    variant: Variant = "int8" if "int8" in manifest.model_files and manifest.serve == "auto" else "fp32"
    head = None if manifest.adapt == "none" else Head.load(folder / HEAD_NPZ)
    model = load_model(folder, manifest, variant, head, {})
    ready = manifest.input.apply(manifest.input.check_batch(x))
    scores = np.concatenate([model.run(ready[i : i + _AT_ONCE]).scores for i in range(0, len(ready), _AT_ONCE)])
    return _Model(manifest, head.labels if head else tuple(manifest.labels), scores)


def _outcomes(model: _Model, truths: Sequence[str], groups: Sequence[str] | None = None) -> Outcomes:
    names = groups if groups is not None else group_names(truths, model.labels, model.manifest)
    return outcomes(model.scores, model.labels, truths, names, model.manifest)


def _truths(y: AnyArray, labels: Sequence[str], manifest: Manifest) -> list[str]:
    """Truths in stored form."""
    if manifest.task == "classification":
        return [labels[int(place)] for place in y]
    if manifest.task == "multilabel":
        return [store_truth([labels[i] for i in np.flatnonzero(row)], manifest) for row in y]
    return [store_truth([float(value) for value in np.atleast_1d(row)], manifest) for row in y]
