"""What a model makes of rows whose truth is known, alike for every task: losses, right or wrong, errors by group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from edge_sdk.errors import LabelError
from edge_sdk.manifest import Manifest
from edge_sdk.types import BoolArray, DoubleArray, FloatArray

_USUAL_THRESHOLD = 0.5
"""Of a label that the manifest does not know."""


@dataclass(frozen=True)
class Outcomes:
    """How one model does on N rows, in G groups.

    Attributes:
        losses: float64 [N] in [0, 1]; 0 is perfect. Classification: 0 or 1. Multi-label: share of labels that are wrong
            (Hamming). Regression: mean over targets of e² / (e² + tolerance²).
        right: bool [N], as `tasks.is_right`.
        errors: bool [N, G], whether the row is an error of the group. Classification: it is wrong, and the truth or
            what was said is that label. Multi-label: that label is wrong. Regression: off by more than the tolerance.
        confidence: float64 [N], probability of what was said; its counterpart is 1 - losses. Multi-label: mean over
            the labels, present or not. NaN for a regression.
    """

    losses: DoubleArray
    right: BoolArray
    errors: BoolArray
    confidence: DoubleArray


def group_names(truths: Sequence[str], labels: Sequence[str], manifest: Manifest) -> tuple[str, ...]:
    """The groups in which rows are judged, the same for all models that are compared.

    Args:
        truths: In stored form.
        labels: All that one of the models knows.
        manifest: Of the checkpoint.

    Returns:
        Classification: the labels that are true of a row. Multi-label: those of a model or a truth. Regression: the
        targets.
    """
    match manifest.task:
        case "classification":
            return tuple(sorted(set(truths)))
        case "multilabel":
            return tuple(dict.fromkeys([*labels, *sorted(set(chain.from_iterable(map(json.loads, truths))))]))
        case _:
            return tuple(manifest.labels)


def members(truths: Sequence[str], groups: Sequence[str], manifest: Manifest) -> BoolArray:
    """Whether each row counts as one of each group; bool [N, G].

    Classification: it is the true label. Multi-label: it is one of them. Regression: always.
    """
    match manifest.task:
        case "classification":
            return _present([[truth] for truth in truths], groups)
        case "multilabel":
            return _present([json.loads(truth) for truth in truths], groups)
        case _:
            return np.ones((len(truths), len(groups)), dtype=np.bool_)


def outcomes(
    scores: FloatArray, labels: Sequence[str], truths: Sequence[str], groups: Sequence[str], manifest: Manifest
) -> Outcomes:
    """What a model made of rows whose truth is known.

    The loss of a regression is 1/2 at the tolerance, so that it agrees with right and wrong there; it is finer than
    these, so that fewer rows tell two models apart; and it is never flat, so that of two that are far off the nearer
    one still wins.

    Args:
        scores: float32 [N, C], probabilities (softmax or sigmoid) or values in the targets' units.
        labels: Names of the C outputs. A truth that is none of them is wrong.
        truths: N truths in stored form.
        groups: See `group_names`; of a multi-label model they must name every label.
        manifest: Task, thresholds and targets.

    Raises:
        ValueError: The shapes do not fit.
        LabelError: The task is raw: there are no truths.

    Source:
        The loss of a regression: Geman & McClure 1987, "Statistical methods for tomographic image reconstruction".
    """
    if scores.shape != (len(truths), len(labels)):
        raise ValueError(f"scores have shape {scores.shape}, expected ({len(truths)}, {len(labels)}): truths by labels")
    match manifest.task:
        case "classification":
            return _of_classes(scores, labels, truths, groups)
        case "multilabel":
            return _of_labels(scores, labels, truths, groups, manifest)
        case "regression":
            return _of_values(scores, truths, manifest)
        case "raw":
            raise LabelError(f"{manifest.name} has task=raw: there is no truth that its outputs could be compared with")


def _of_classes(scores: FloatArray, labels: Sequence[str], truths: Sequence[str], groups: Sequence[str]) -> Outcomes:
    said = [labels[i] for i in scores.argmax(axis=1)]
    right = np.array([a == b for a, b in zip(said, truths, strict=True)], dtype=np.bool_)
    concerned = _present(list(zip(said, truths, strict=True)), groups)
    return Outcomes(
        (~right).astype(np.float64), right, concerned & ~right[:, None], scores.max(axis=1).astype(np.float64)
    )


def _of_labels(
    scores: FloatArray, labels: Sequence[str], truths: Sequence[str], groups: Sequence[str], manifest: Manifest
) -> Outcomes:
    known = dict(zip(manifest.labels, manifest.thresholds, strict=True))
    present = scores >= np.array([known.get(label, _USUAL_THRESHOLD) for label in labels], dtype=np.float32)
    said = np.zeros((len(truths), len(groups)), dtype=np.bool_)
    said[:, [groups.index(label) for label in labels]] = present
    errors = said != members(truths, groups, manifest)
    confidence = np.where(present, scores, 1 - scores).mean(axis=1, dtype=np.float64)
    return Outcomes(errors.mean(axis=1), ~errors.max(axis=1), errors, confidence)


def _of_values(scores: FloatArray, truths: Sequence[str], manifest: Manifest) -> Outcomes:
    true = np.array([json.loads(truth) for truth in truths], dtype=np.float64).reshape(scores.shape)
    tolerance = np.array([target.tolerance for target in manifest.targets])
    off = np.abs(scores - true)
    square = off * off
    scale = square + tolerance * tolerance + np.finfo(np.float64).tiny  # a tolerance of 0 is allowed
    losses = np.divide(square, scale, out=np.ones_like(square), where=np.isfinite(square))
    errors = ~(off <= tolerance)  # NaN is an error
    return Outcomes(losses.mean(axis=1), ~errors.max(axis=1), errors, np.full(len(truths), np.nan))


def _present(names: Sequence[Sequence[str]], groups: Sequence[str]) -> BoolArray:
    """Which groups are named in each row; bool [N, G]. Names that are no group are left out."""
    number = {group: i for i, group in enumerate(groups)}
    found = np.zeros((len(names), len(groups)), dtype=np.bool_)
    pairs = [(row, number[name]) for row, listed in enumerate(names) for name in listed if name in number]
    if pairs:
        found[tuple(np.array(pairs).T)] = True
    return found
