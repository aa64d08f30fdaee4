"""Does the challenger beat the champion? Pure decisions from paired outcomes on rows neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from edge_sdk.config import GateConfig
from edge_sdk.outcomes import Outcomes
from edge_sdk.stats import MeanEProcess, calibration_error, paired_evidence
from edge_sdk.types import AnyArray, BoolArray, DoubleArray

Outcome = Literal["promote", "reject", "need_more"]
_FEW_ERRORS = 3
_MAX_ERROR_SHARE = 0.05
_MIN_TOLD = 10
"""Scores over fewer rows are not put into words: they leave the device, and say too much about single samples."""
_HARM_EVIDENCE = 5.0
"""Harm needs less proof than improvement: a challenger refused in error costs little. Four rows lost and none won."""
_MIN_CALIBRATION_ROWS = 100
"""With these, the errors of two models that are equally well calibrated differ by 0.1 in about one of 100 runs."""
_LATENCY_SLACK_MS = 0.1


class Verdict(msgspec.Struct, frozen=True):
    """The gate's decision with the numbers it rests on."""

    outcome: Outcome
    reason: str
    champion: float = 0.0
    """Accuracy on the device's judge rows."""
    challenger: float = 0.0
    champion_factory: float = 0.0
    """Accuracy on the factory's judge rows: what must not be forgotten."""
    challenger_factory: float = 0.0
    evidence: float = 1.0
    """E-value against "no better than the champion"; 1/alpha promotes."""
    rows: int = 0
    factory_rows: int = 0
    alpha: float = 0.0
    """Share of the error level that this challenger may spend."""
    worst_group: float = 0.0
    """Largest loss of a label or target, as a share of its rows; negative if all of them gain."""
    worst_slice: float = 0.0
    """Largest loss of accuracy of a slice."""
    champion_calibration: float = 0.0
    """Expected calibration error on the judge rows; 0 while there are too few."""
    challenger_calibration: float = 0.0
    champion_ms: float = 0.0
    """Time that the head takes for one row; 0 if it was not measured."""
    challenger_ms: float = 0.0


def judge(
    champion: Outcomes,
    challenger: Outcomes,
    *,
    groups: Sequence[str],
    members: BoolArray,
    factory_champion: BoolArray,
    factory_challenger: BoolArray,
    waited_s: float,
    config: GateConfig,
    slices: Sequence[str] = (),
    weights: DoubleArray | None = None,
    challengers_before: int = 0,
    latency_ms: tuple[float, float] | None = None,
) -> Verdict:
    """Compare the two on the same rows.

    Promotion needs evidence of improvement, all judge rows together, and no harm: not to a label or target, not to a
    slice (those with few rows pooled), not on the factory's data, not to calibration, not to latency. The evidence is
    an e-process over the rows in the order in which they came, so the gate may look again with every new row without
    raising its error rate. This holds while rows are only added: one that is dropped between two looks at the same
    challenger begins the bets anew.

    Challengers that follow each other share the error level: the one after k others is given 6 alpha / (pi (k + 1))²,
    which together, however many come, is alpha.

    Args:
        champion: What the champion makes of the judge rows, oldest first.
        challenger: The same for the challenger.
        groups: Names of the groups in `Outcomes.errors`.
        members: bool [N, G], which rows count as one of each group, see `outcomes.members`.
        factory_champion: bool [M], whether the champion is right on each of the factory's judge rows.
        factory_challenger: bool [M].
        waited_s: Since the challenger was trained, in seconds.
        config: Levels and margins.
        slices: The app's own name for the part of the world each row comes from, "" for none; or nothing at all.
        weights: float64 [N] in (0, 1]: how many rows each stands for, relative to the most that one may stand for (not
            the most seen so far: that is not known before the row comes). None: all count alike.
        challengers_before: How many were judged before this one in the same learning transaction.
        latency_ms: Time that the champion's and the challenger's head take for one row; None: not measured.

    Returns:
        promote, reject, or need_more while it may still wait.

    Raises:
        ValueError: Arrays differ in length, or a weight is out of bounds.

    Source:
        See `stats.MeanEProcess`. Sharing the level: Bonferroni with weights 6 / (pi k)², whose sum is 1.
    """
    rows = len(champion.losses)
    weights = np.ones(rows) if weights is None else weights
    _check(champion, challenger, (rows, len(groups)), members, slices, weights)
    gain = weights * (champion.losses - challenger.losses)
    evidence = paired_evidence(gain)
    alpha = 6 * config.alpha / (math.pi * (challengers_before + 1)) ** 2
    enough = config.min_class_rows
    by_group = _worst(_group_parts(champion, challenger, groups, members, enough), weights, enough, config.class_margin)
    by_slice = _worst(_slice_parts(champion, challenger, slices, enough), weights, enough, config.slice_margin)
    calibration = _calibration(champion, challenger, config.calibration_margin)
    latency = latency_ms or (0.0, 0.0)
    verdict = Verdict(
        "need_more",
        f"evidence {evidence:.2f} of {1 / alpha:.1f}",
        champion=_mean(champion.right, weights),
        challenger=_mean(challenger.right, weights),
        champion_factory=_mean(factory_champion),
        challenger_factory=_mean(factory_challenger),
        evidence=round(evidence, 6),
        rows=rows,
        factory_rows=len(factory_champion),
        alpha=alpha,
        worst_group=by_group.share,
        worst_slice=by_slice.share,
        champion_calibration=calibration[0],
        challenger_calibration=calibration[1],
        champion_ms=latency[0],
        challenger_ms=latency[1],
    )
    if harm := by_group.harm or by_slice.harm or _harm_overall(verdict, config):
        return msgspec.structs.replace(verdict, outcome="reject", reason=harm)
    if evidence >= 1 / alpha:
        reason = f"better on {int((gain > 0).sum())} rows, worse on {int((gain < 0).sum())}"
        return msgspec.structs.replace(verdict, outcome="promote", reason=reason)
    if paired_evidence(-gain) >= 1 / config.alpha:
        return msgspec.structs.replace(verdict, outcome="reject", reason="worse than the champion")
    if waited_s >= config.max_wait_s:
        reason = f"not proven better within {config.max_wait_s:g} s"
        return msgspec.structs.replace(verdict, outcome="reject", reason=reason)
    return verdict


def _check(
    champion: Outcomes,
    challenger: Outcomes,
    shape: tuple[int, int],
    members: BoolArray,
    slices: Sequence[str],
    weights: DoubleArray,
) -> None:
    for name, array in ("champion", champion.errors), ("challenger", challenger.errors), ("members", members):
        if array.shape != shape:
            raise ValueError(f"{name}: expected rows by groups {shape}, got {array.shape}")
    if len(weights) != shape[0] or (slices and len(slices) != shape[0]):
        raise ValueError(f"{len(weights)} weights and {len(slices)} slices for {shape[0]} rows")
    if len(weights) and not (weights.min() > 0 and weights.max() <= 1):
        raise ValueError(f"weights are relative to the largest a row may have, in (0, 1]; got up to {weights.max():g}")


def _harm_overall(verdict: Verdict, config: GateConfig) -> str:
    """What the challenger harms on all rows together; "" for nothing."""
    forgotten = verdict.champion_factory - verdict.challenger_factory
    if forgotten > config.factory_margin:
        return f"forgets: {forgotten:.3f} of accuracy lost on factory data"
    if verdict.challenger_calibration - verdict.champion_calibration > config.calibration_margin:
        return f"calibration error {verdict.challenger_calibration:.3f}, before {verdict.champion_calibration:.3f}"
    allowed_ms = max(config.max_latency_ratio * verdict.champion_ms, verdict.champion_ms + _LATENCY_SLACK_MS)
    if verdict.challenger_ms > allowed_ms:
        return f"slower: {verdict.challenger_ms:.3g} ms, before {verdict.champion_ms:.3g} ms"
    return ""


class _Part(NamedTuple):
    """Rows that are judged by themselves.

    members: bool [N], the rows that count as its own. worse: float64 [N], how much worse the challenger does.
    """

    name: str
    members: BoolArray
    worse: DoubleArray


class _Worst(NamedTuple):
    share: float
    harm: str


def _group_parts(
    champion: Outcomes, challenger: Outcomes, groups: Sequence[str], members: BoolArray, enough: int
) -> Iterator[_Part]:
    """By label or target.

    A label's errors are its rows that are missed and the rows of others that are taken for it, so that a champion which
    calls everything by one name is not held to be good at that label.
    """
    for columns, name in _pooled(
        members.sum(axis=0), [repr(group) for group in groups], enough, "rare labels together"
    ):
        before, after = (model.errors[:, columns].max(axis=1) for model in (champion, challenger))
        yield _Part(name, members[:, columns].max(axis=1), after.astype(np.float64) - before)


def _slice_parts(champion: Outcomes, challenger: Outcomes, slices: Sequence[str], enough: int) -> Iterator[_Part]:
    """By slice. Their names are the app's own and do not leave the device."""
    names, numbers, counts = np.unique(np.array(slices, dtype=np.str_), return_inverse=True, return_counts=True)
    counts = np.where(names == "", 0, counts)
    lost = champion.right.astype(np.float64) - challenger.right
    for which, name in _pooled(counts, ["a slice"] * len(names), enough, "small slices together"):
        own = np.isin(numbers, which)
        yield _Part(name, own, np.where(own, lost, 0.0))


def _pooled(counts: AnyArray, names: Sequence[str], enough: int, rest: str) -> Iterator[tuple[AnyArray, str]]:
    """Which parts stand alone, and which, with fewer rows than enough, are judged as one; by position, with a name."""
    for i in np.flatnonzero(counts >= enough):
        yield np.array([i]), names[i]
    if len(few := np.flatnonzero((counts > 0) & (counts < enough))):
        yield few, rest


def _worst(parts: Iterable[_Part], weights: DoubleArray, enough: int, margin: float) -> _Worst:
    """The largest loss by part, and the first loss beyond the margin, in the sample and with evidence; "" if none."""
    worst, harm = -math.inf, ""
    for part in parts:
        if (rows := int(part.members.sum())) < enough:
            continue
        worse = weights * part.worse
        share = float(worse.sum() / weights[part.members].sum())
        worst = max(worst, share)
        if not harm and share > margin and paired_evidence(worse) >= _HARM_EVIDENCE:
            harm = f"harms {part.name}: {share:.3f} of accuracy lost on {rows} rows"
    return _Worst(worst if math.isfinite(worst) else 0.0, harm)


def _calibration(champion: Outcomes, challenger: Outcomes, margin: float) -> tuple[float, float]:
    """The calibration errors of both; zeros while a rise by `margin` could be noise."""
    rows = int(np.isfinite(champion.confidence).sum())
    if rows < _MIN_CALIBRATION_ROWS or rows * margin * margin < 1:
        return 0.0, 0.0
    before, after = (calibration_error(model.confidence, 1 - model.losses) for model in (champion, challenger))
    return before, after


def is_healthy(errors: int, predictions: int) -> bool:
    """Whether a version has failed no more than a few times in use."""
    return errors < _FEW_ERRORS or errors <= _MAX_ERROR_SHARE * predictions


class ProbationVerdict(msgspec.Struct, frozen=True):
    """How a promoted version does in live use."""

    outcome: Literal["confirm", "rollback", "need_more"]
    reason: str


def watch(
    before: AnyArray, after: AnyArray, *, waited_s: float, healthy: bool, alpha: float, rows: int, seconds: float
) -> ProbationVerdict:
    """Judge a new version on live labelled rows, each also given to the version before.

    Args:
        before: [N], oldest first: whether the version before would have been right (bool), or its loss (float in
            [0, 1], 0 is perfect).
        after: The same of the new version.
        waited_s: Since the promotion.
        healthy: No errors or non-finite outputs since.
        alpha: Error level of a rollback.
        rows: Confirm after so many.
        seconds: Or, if healthy, after so long.
    """
    if not healthy:
        return ProbationVerdict("rollback", "the new version fails in use")
    told = f"live {'accuracy' if after.dtype.kind == 'b' else 'loss'} {_told(after)}, before it {_told(before)}"
    if paired_evidence(_losses(after) - _losses(before)) >= 1 / alpha:
        return ProbationVerdict("rollback", told)
    if len(after) >= rows:
        return ProbationVerdict("confirm", told)
    if waited_s >= seconds:
        return ProbationVerdict("confirm", f"unproven: healthy, but only {len(after)} labels came")
    return ProbationVerdict("need_more", f"{len(after)} of {rows} labels")


def watch_release(
    correct: BoolArray,
    *,
    accuracy_before: float,
    waited_s: float,
    healthy: bool,
    alpha: float,
    max_drop: float,
    rows: int,
    seconds: float,
) -> ProbationVerdict:
    """Judge a new base release on live labelled rows, against the accuracy recorded before it.

    The version before has another trunk and does not see these rows, so the comparison is with its mean: evidence that
    the live accuracy lies more than `max_drop` below it rolls the release back.

    Args:
        correct: bool [N], live rows since activation, oldest first.
        accuracy_before: Recent live accuracy of the release before; NaN if none is known.
        waited_s: Since the activation.
        healthy: No errors or non-finite outputs since.
        alpha: Error level of a rollback.
        max_drop: Loss of accuracy that is tolerated.
        rows: Confirm after so many.
        seconds: Or, if healthy, after so long.
    """
    if not healthy:
        return ProbationVerdict("rollback", "the new release fails in use")
    floor = accuracy_before - max_drop
    against = f"before it {accuracy_before:.3f}" if np.isfinite(accuracy_before) else "before it unknown"
    if np.isfinite(accuracy_before) and 0 < floor < 1:
        process = MeanEProcess(1 - floor)
        process.update(1.0 - correct)
        if process.evidence >= 1 / alpha:
            return ProbationVerdict("rollback", f"live accuracy {_told(correct)}, {against}")
    if len(correct) >= rows:
        return ProbationVerdict("confirm", f"live accuracy {_told(correct)}, {against}")
    if waited_s >= seconds:
        return ProbationVerdict("confirm", f"unproven: healthy, but only {len(correct)} labels came")
    return ProbationVerdict("need_more", f"{len(correct)} of {rows} labels")


def _losses(live: AnyArray) -> DoubleArray:
    """Losses, of booleans 1 where wrong; float64 [N]."""
    values = live.astype(np.float64)
    return 1 - values if live.dtype.kind == "b" else values


def _mean(values: AnyArray, weights: DoubleArray | None = None) -> float:
    return float(np.average(values, weights=weights)) if len(values) else 0.0


def _told(values: AnyArray) -> str:
    return f"{_mean(values):.3f}" if len(values) >= _MIN_TOLD else f"(of fewer than {_MIN_TOLD} labels)"
