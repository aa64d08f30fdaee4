"""Does the challenger beat the champion? Pure decisions from paired outcomes on rows neither was trained on."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.config import GateConfig
from edge_sdk.stats import MeanEProcess, paired_evidence
from edge_sdk.types import IndexArray

Outcome = Literal["promote", "reject", "need_more"]
Correct = NDArray[np.bool_]
_FEW_ERRORS = 3
_MAX_ERROR_SHARE = 0.05
_MIN_TOLD = 10
"""Scores over fewer rows are not put into words: they leave the device, and say too much about single samples."""
_HARM_EVIDENCE = 4.0
"""Harm to one label needs less proof than improvement: a challenger refused in error costs little."""


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


def judge(
    champion: IndexArray,
    challenger: IndexArray,
    labels: IndexArray,
    factory_champion: Correct,
    factory_challenger: Correct,
    *,
    waited_s: float,
    config: GateConfig,
) -> Verdict:
    """Compare the two on the same rows.

    Promotion needs evidence of improvement, all judge rows together, and no harm: not on any label (those with few
    rows pooled) and not on the factory's data. The evidence is an e-process over the rows in the order in which they
    came, so the gate may look again with every new row without raising its error rate.

    Args:
        champion: int64 [N], what the champion says of each judge row, oldest first; -1 for a label that no row has.
        challenger: int64 [N], the same for the challenger.
        labels: int64 [N], the true labels.
        factory_champion: bool [M], whether the champion is right on each of the factory's judge rows.
        factory_challenger: bool [M].
        waited_s: Since the challenger was trained, in seconds.
        config: Levels and margins.

    Returns:
        promote, reject, or need_more while it may still wait.
    """
    better = (challenger == labels).astype(np.int64) - (champion == labels).astype(np.int64)
    evidence = paired_evidence(better)
    numbers = {
        "champion": _mean(champion == labels),
        "challenger": _mean(challenger == labels),
        "champion_factory": _mean(factory_champion),
        "challenger_factory": _mean(factory_challenger),
        "evidence": round(evidence, 6),
        "rows": len(champion),
        "factory_rows": len(factory_champion),
    }

    def verdict(outcome: Outcome, reason: str) -> Verdict:
        return Verdict(outcome=outcome, reason=reason, **numbers)  # type: ignore[arg-type]

    forgotten = numbers["champion_factory"] - numbers["challenger_factory"]
    if len(factory_champion) and forgotten > config.factory_margin:
        return verdict("reject", f"forgets: {forgotten:.3f} of accuracy lost on factory data")
    if harm := _harmed(champion, challenger, labels, config):
        return verdict("reject", harm)
    if evidence >= 1 / config.alpha:
        return verdict("promote", f"better on {int((better > 0).sum())} rows, worse on {int((better < 0).sum())}")
    if paired_evidence(-better) >= 1 / config.alpha:
        return verdict("reject", "worse than the champion")
    if waited_s >= config.max_wait_s:
        return verdict("reject", f"not proven better within {config.max_wait_s:g} s")
    return verdict("need_more", f"evidence {evidence:.2f} of {1 / config.alpha:g}")


def _harmed(champion: IndexArray, challenger: IndexArray, labels: IndexArray, config: GateConfig) -> str:
    """Which label loses more than the margin, in the sample and with evidence; "" if none.

    A label's errors are its rows that are missed and the rows of others that are taken for it, so that a champion which
    calls everything by one name is not held to be good at that label.
    """
    numbers, counts = np.unique(labels, return_counts=True)
    enough = counts >= config.min_class_rows
    groups = {f"label {number}": numbers[numbers == number] for number in numbers[enough]}
    if counts[~enough].sum() >= config.min_class_rows:
        groups["rare labels together"] = numbers[~enough]
    for name, members in groups.items():
        rows = int(np.isin(labels, members).sum())
        worse = _errors_at(challenger, labels, members) - _errors_at(champion, labels, members)
        loss = worse.sum() / rows
        if loss > config.class_margin and paired_evidence(worse) >= _HARM_EVIDENCE:
            return f"harms {name}: {loss:.3f} of accuracy lost on {rows} rows"
    return ""


def _errors_at(predicted: IndexArray, labels: IndexArray, members: IndexArray) -> IndexArray:
    """1 where a row of the member labels is missed or another row is taken for one of them, else 0; int64 [N]."""
    wrong = (predicted != labels) & (np.isin(labels, members) | np.isin(predicted, members))
    errors: IndexArray = wrong.astype(np.int64)
    return errors


def is_healthy(errors: int, predictions: int) -> bool:
    """Whether a version has failed no more than a few times in use."""
    return errors < _FEW_ERRORS or errors <= _MAX_ERROR_SHARE * predictions


class ProbationVerdict(msgspec.Struct, frozen=True):
    """How a promoted version does in live use."""

    outcome: Literal["confirm", "rollback", "need_more"]
    reason: str


def watch(
    before: Correct, after: Correct, *, waited_s: float, healthy: bool, alpha: float, rows: int, seconds: float
) -> ProbationVerdict:
    """Judge a new version on live labelled rows, each also given to the version before.

    Args:
        before: bool [N], whether the version before would have been right, oldest first.
        after: bool [N], whether the new one was.
        waited_s: Since the promotion.
        healthy: No errors or non-finite outputs since.
        alpha: Error level of a rollback.
        rows: Confirm after so many.
        seconds: Or, if healthy, after so long.
    """
    if not healthy:
        return ProbationVerdict("rollback", "the new version fails in use")
    worse = before.astype(np.int64) - after.astype(np.int64)
    if paired_evidence(worse) >= 1 / alpha:
        return ProbationVerdict("rollback", f"live accuracy {_told(after)}, before it {_told(before)}")
    if len(after) >= rows:
        return ProbationVerdict("confirm", f"live accuracy {_told(after)}, before it {_told(before)}")
    if waited_s >= seconds:
        return ProbationVerdict("confirm", f"unproven: healthy, but only {len(after)} labels came")
    return ProbationVerdict("need_more", f"{len(after)} of {rows} labels")


def watch_release(
    correct: Correct,
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


def _mean(correct: Correct) -> float:
    return float(correct.mean()) if len(correct) else 0.0


def _told(correct: Correct) -> str:
    return f"{_mean(correct):.3f}" if len(correct) >= _MIN_TOLD else f"(of fewer than {_MIN_TOLD} labels)"
