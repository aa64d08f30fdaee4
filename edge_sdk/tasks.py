"""What differs between the tasks: how an output reads, what a truth looks like, and when the two agree.

Both are compared in a stored form, a string that says the same for equal answers: the label; the present labels as a
JSON list in the model's order; the values as a JSON list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from edge_sdk.errors import LabelError, UnknownLabelError
from edge_sdk.head import sigmoid, softmax
from edge_sdk.manifest import Manifest
from edge_sdk.types import AnyArray, BoolArray, DoubleArray, FloatArray, Task, Truth


def present_labels(probabilities: FloatArray, labels: Sequence[str], thresholds: Sequence[float]) -> tuple[str, ...]:
    """The labels of a multi-label model whose probability reached their threshold, in the model's order."""
    return tuple(label for label, p, at in zip(labels, probabilities, thresholds, strict=True) if p >= at)


def stored_labels(labels: Sequence[str]) -> str:
    """The stored form of a set of labels, in the given order."""
    return json.dumps(list(labels), ensure_ascii=False)


def stored_values(values: FloatArray | Sequence[float]) -> str:
    """The stored form of a regression's values."""
    return json.dumps([float(value) for value in values])


def stored_answer(scores: FloatArray, label: str, present: Sequence[str], task: Task) -> str:
    """The stored form of what a model said about one sample; of a raw model there is none."""
    match task:
        case "classification":
            return label
        case "multilabel":
            return stored_labels(present)
        case "regression":
            return stored_values(scores)
        case "raw":
            return ""


def store_truth(truth: Truth, manifest: Manifest) -> str:
    """The stored form of what really was.

    Args:
        truth: A label (classification), the labels that applied (multi-label; none may), or a number for each target.
        manifest: Of the model that predicted.

    Raises:
        UnknownLabelError: A label of a multi-label model is not one of its labels; a label is not a non-empty string.
        LabelError: It is of another task, or not finite.
    """
    match manifest.task:
        case "classification":
            return _label(truth)
        case "multilabel":
            return stored_labels(_labels(truth, manifest.labels))
        case "regression":
            return stored_values(_values(truth, manifest.labels))
        case "raw":
            raise LabelError(f"{manifest.name} has task=raw: there is no truth that its outputs could be compared with")


def is_right(predicted: str, truth: str, manifest: Manifest) -> bool:
    """Whether a prediction counts as right, both in stored form.

    Classification: the label is the true one. Multi-label: exactly the true labels are present. Regression: every
    value lies within its target's tolerance.
    """
    if manifest.task != "regression":
        return predicted == truth
    pairs = zip(json.loads(predicted), json.loads(truth), manifest.targets, strict=True)
    return all(abs(value - true) <= target.tolerance for value, true, target in pairs)


def as_targets(truths: Sequence[str], labels: Sequence[str], manifest: Manifest) -> AnyArray:
    """Truths in stored form as a learner reads them.

    Args:
        truths: N of them.
        labels: Of the head; a classification's may be more than the manifest's.
        manifest: Task and targets.

    Returns:
        int64 [N], numbers of labels, -1 for one that is not among them (classification); float32 0/1 [N, C]
        (multi-label); float32 [N, T], standardised (regression).
    """
    if manifest.task == "classification":
        number = {label: i for i, label in enumerate(labels)}
        return np.array([number.get(truth, -1) for truth in truths], dtype=np.int64)
    parsed = [json.loads(truth) for truth in truths]
    if manifest.task == "multilabel":
        return np.array([[label in present for label in labels] for present in parsed], np.float32).reshape(
            len(truths), len(labels)
        )
    return standardise(np.array(parsed, dtype=np.float64).reshape(len(truths), len(labels)), manifest)


def standardise(values: AnyArray, manifest: Manifest) -> FloatArray:
    """Values of a regression [N, T] in the targets' units, as its head puts them out; float32."""
    means, stds = (np.array([getattr(target, name) for target in manifest.targets]) for name in ("mean", "std"))
    result: FloatArray = ((values - means) / stds).astype(np.float32)
    return result


def as_scores(logits: FloatArray, manifest: Manifest) -> FloatArray:
    """A head's outputs [N, C] as the model tells them: probabilities, or values in the targets' units; float32."""
    match manifest.task:
        case "multilabel":
            return sigmoid(logits)
        case "regression":
            means, stds = (np.array([getattr(target, name) for target in manifest.targets]) for name in ("mean", "std"))
            result: FloatArray = (logits * stds + means).astype(np.float32)
            return result
        case _:
            return softmax(logits)


def rows_right(scores: FloatArray, truths: Any, manifest: Manifest) -> BoolArray:
    """`is_right` for many rows at once; bool [N].

    Args:
        scores: float32 [N, C]: probabilities or values.
        truths: int64 [N] positions (classification), 0/1 [N, C] (multi-label), or values [N, T] (regression; [N] if
            there is one target).
        manifest: Labels, thresholds and targets.
    """
    truths = np.asarray(truths)
    match manifest.task:
        case "multilabel":
            present = scores >= np.array(manifest.thresholds, dtype=np.float32)
            right = (present == truths.reshape(scores.shape).astype(bool)).all(axis=1)
        case "regression":
            tolerance = np.array([target.tolerance for target in manifest.targets])
            # [N] truths of one target would otherwise be compared with every row
            right = (np.abs(scores.astype(np.float64) - truths.reshape(scores.shape)) <= tolerance).all(axis=1)
        case _:
            right = scores.argmax(axis=1) == truths
    result: BoolArray = right
    return result


def loss_of(predicted: str, truth: str, manifest: Manifest) -> float:
    """How far a regression's prediction is off, both in stored form: mean absolute error in the targets' spreads."""
    values, truths = np.array(json.loads(predicted)), np.array(json.loads(truth))
    return float(rows_loss(values[None], truths[None], manifest)[0])


def rows_loss(scores: AnyArray, truths: AnyArray, manifest: Manifest) -> DoubleArray:
    """`loss_of` for many rows at once: values [N, T] and truths [N, T] (or [N]) to float64 [N]."""
    spread = np.array([target.std for target in manifest.targets])
    values = np.asarray(scores, dtype=np.float64)
    result: DoubleArray = (np.abs(values - np.asarray(truths).reshape(values.shape)) / spread).mean(axis=1)
    return result


def _label(truth: Truth) -> str:
    if not isinstance(truth, str) or not truth:
        raise UnknownLabelError(f"a label is a non-empty string, got {truth!r}")
    try:
        truth.encode()
    except UnicodeEncodeError as error:  # the store could not keep it
        raise UnknownLabelError(f"a label is UTF-8, got {truth!r}") from error
    return str(truth)


def _labels(truth: Truth, labels: Sequence[str]) -> list[str]:
    given = set()
    for label in _listed(truth):
        if not isinstance(label, str):
            raise LabelError(f"a multi-label truth is the list of labels that applied, got {truth!r}")
        given.add(str(label))
    if unknown := sorted(given - set(labels)):
        raise UnknownLabelError(f"unknown label {unknown[0]!r}; known: {', '.join(labels)}")
    return [label for label in labels if label in given]


def _listed(truth: Any) -> Iterable[Any]:
    """The members of a list, a set or an array; of anything else it is the only one, and no label."""
    if isinstance(truth, Sequence | AbstractSet) and not isinstance(truth, str):
        return truth
    return truth if isinstance(truth, np.ndarray) and truth.ndim else (None,)


def _values(truth: Truth, names: Sequence[str]) -> list[float]:
    try:
        given = np.atleast_1d(np.asarray(truth))
        numeric = given.dtype.kind in "fiuO" and given.ndim == 1
        values = [float(value) for value in given] if numeric else []
    except (TypeError, ValueError, OverflowError) as error:
        raise LabelError(f"a truth is one number for each of {', '.join(names)}, got {truth!r}") from error
    if len(values) != len(names) or not all(map(math.isfinite, values)):
        raise LabelError(f"a truth is one finite number for each of {', '.join(names)}, got {truth!r}")
    return values
