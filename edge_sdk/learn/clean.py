"""Labels that contradict what the other rows say: found before they are learned from, and not mistaken for drift.

Each row is judged by a model that was fitted without it, mostly to rows as fresh as itself. A change that all fresh
rows share is in that model too, and contradicts nothing; a wrong label stands alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_sdk.learn.ridge import Sums, one_hot, predict, standardise
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, IndexArray, Task

_FOLDS = 4
_MIN_ROWS = 10
_REPLAY_SHARE = 0.25
"""Most that a label's replayed rows weigh, by the weight of its fresh rows or an average label's: new outvotes old."""
_SCORE_MARGIN = 0.2
"""By which another label must score above the given one, where a label's own rows aim at 1 and others at 0."""
_CHANCE_MARGIN = 0.3
"""By which it must be likelier once scores are calibrated: the noisier all labels are, the more that asks for."""
_SHARPNESS = 2.0 ** np.arange(0, 6.5, 0.5)
_MADS = 4.0


def suspects(
    features: FloatArray,
    targets: AnyArray,
    weights: FloatArray,
    *,
    task: Task,
    max_share: float,
    replay_features: FloatArray,
    replay_targets: AnyArray,
) -> NDArray[np.bool_]:
    """Which fresh rows have a label that is probably wrong; bool [N].

    Ridge models are cross-fitted: each row is scored by one that saw three quarters of the other fresh rows, and
    replayed rows at little weight. Suspect is

    - classification: a row for which another label scores at least 0.2 above the given one (of two labels, 0.4: one's
      score mirrors the other's), and is likelier by 0.3 once scores are calibrated on the given labels;
    - multi-label: the same for one of its labels, present against absent;
    - regression: a row whose residual on one target lies more than 4 median absolute deviations (2.7 standard
      deviations of a normal) from the median residual.

    Where classes overlap, a true label in another's midst looks like a wrong one. Where labels cannot be told apart at
    all, calibration leaves no suspects.

    Never suspect: rows of a label with fewer than 10 rows, or half of whose rows or more would score better under
    another (it is new, and the models have not learned it); rows without a positive weight; and what `max_share` leaves
    no room for, where the strongest contradictions go first.

    Args:
        features: float32 [N, D], the fresh rows.
        targets: int64 [N] (classification), 0/1 [N, C] (multi-label), or float [N, T] (regression).
        weights: float32 [N]; rows with a weight of 0 or less neither vote nor are judged.
        task: Of the model.
        max_share: Most of the rows that are suspect, 0 to 1.
        replay_features: float32 [M, D]; M may be 0.
        replay_targets: As `targets`, for [M].

    Source:
        After Northcutt, Jiang & Chuang 2021, "Confident learning: Estimating uncertainty in dataset labels",
        doi:10.1613/jair.1.12125: out-of-sample scores against the given label, with thresholds that follow the data.
        Residuals: Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013.
    """
    voting = np.flatnonzero(weights > 0)
    suspect = np.zeros(len(features), dtype=np.bool_)
    if len(voting) < _MIN_ROWS or max_share <= 0:
        return suspect
    given, weight, doubts = targets[voting], weights[voting], np.zeros(len(voting))
    if task == "classification":
        width = int(max(given.max(), replay_targets.max(initial=0))) + 1
        folds = _spread(given)
        votes, replayed = np.bincount(given, weight, width), np.bincount(replay_targets, minlength=width)
        share = (_REPLAY_SHARE * np.minimum(votes, votes.mean()) / np.maximum(replayed, 1))[replay_targets]
        columns, replay_columns = one_hot(given, width), one_hot(replay_targets, width)
    else:
        folds = np.arange(len(given)) % _FOLDS
        share = np.full(len(replay_targets), _REPLAY_SHARE * weight.sum() / max(len(replay_targets), 1))
        columns, replay_columns = given.astype(np.float32), replay_targets.astype(np.float32)
    z = standardise(np.concatenate([features[voting], replay_features]))
    fresh, old = z[: len(voting)], z[len(voting) :]
    replayed_sums = Sums.of(old, replay_columns, np.minimum(1, share).astype(np.float32))
    scores = _out_of_fold(fresh, columns, weight, folds, replayed_sums)
    if task == "classification":
        doubts = _contradictions(scores, given)
    elif task == "multilabel":
        for score, present in zip(scores.T, given.T, strict=True):
            doubts = np.maximum(doubts, _contradictions(np.stack([1 - score, score], axis=1), present.astype(np.int64)))
    else:
        residuals = given - scores
        distance = np.abs(residuals - np.median(residuals, axis=0))
        rounding = 1e-5 * np.abs(given).max(axis=0) + 1e-12  # of float32, where the fit is exact
        allowed = np.maximum(_MADS * np.median(distance, axis=0), rounding)
        doubts = (distance / allowed).max(axis=1)
        doubts[doubts <= 1] = 0
    worst = np.argsort(-doubts, kind="stable")[: int(max_share * len(voting))]
    suspect[voting[worst[doubts[worst] > 0]]] = True
    return suspect


def _spread(labels: IndexArray) -> IndexArray:
    """A fold for each row, int64 [N], so that every label's rows are spread evenly over the folds."""
    folds = np.empty(len(labels), dtype=np.int64)
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % _FOLDS
    return folds


def _out_of_fold(x: FloatArray, y: FloatArray, weights: FloatArray, folds: IndexArray, replayed: Sums) -> FloatArray:
    """Scores float32 [N, T], each from the other folds and what is replayed."""
    sums = [Sums.of(x[folds == fold], y[folds == fold], weights[folds == fold]) for fold in range(_FOLDS)]
    total = sum(sums, start=replayed)
    scores = np.empty(y.shape, dtype=np.float32)
    for fold, own in enumerate(sums):
        scores[folds == fold] = predict((total - own).solve(), x[folds == fold])
    return scores


def _contradictions(scores: FloatArray, given: IndexArray) -> DoubleArray:
    """How far another label's score lies above the given one's, float64 [N]; 0 for rows that are not suspect."""
    margin = _margin(scores, given)
    least = _SCORE_MARGIN * (2 if scores.shape[1] == 2 else 1)
    clear = (margin > least) & (_margin(_calibrated(scores, given), given) > _CHANCE_MARGIN)
    doubts = np.where(clear, margin, 0.0)
    for label in np.unique(given):
        rows = np.flatnonzero(given == label)
        if len(rows) < _MIN_ROWS or 2 * np.count_nonzero(margin[rows] > 0) >= len(rows):
            doubts[rows] = 0
    return doubts


def _margin(scores: AnyArray, given: IndexArray) -> DoubleArray:
    """The best other label's score less the given one's; float64 [N]."""
    rows = np.arange(len(given))
    others = scores.astype(np.float64)
    own = others[rows, given]
    others[rows, given] = -np.inf
    result: DoubleArray = others.max(axis=1) - own
    return result


def _calibrated(scores: FloatArray, given: IndexArray) -> DoubleArray:
    """Probabilities float64 [N, C]: softmax of the scores at the sharpness under which the given labels are likeliest.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks" (temperature scaling), arXiv:1706.04599.
    """
    rows = np.arange(len(given))
    shifted: DoubleArray = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    best, result = -np.inf, shifted
    for sharpness in (0.0, *_SHARPNESS):
        logs = sharpness * shifted
        logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
        if (likelihood := float(logs[rows, given].mean())) > best:
            best, result = likelihood, np.exp(logs)
    return result
