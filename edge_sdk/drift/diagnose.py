"""What kind of change the monitors saw, in words that a person can act on. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk.drift.quality import Finding, unit_change
from edge_sdk.drift.reference import Reference, output_names
from edge_sdk.types import AnyArray, DoubleArray, FloatArray

Kind = Literal["quality", "covariate", "prior", "concept"]
"""Broken data; a change of p(x); of the shares of classes alone; of p(y given x)."""

_EXPLAINED = 0.7
_FEW = 3
_UNIT_ROWS = 100
_LEVELS = np.arange(1, 16) / 16
_SHIFTED = 0.2
_SPREAD = 1.5
_MISSED = 0.05
_LEAST_STD = 1e-3


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What happened.

    Attributes:
        kind: Of change.
        words: What to look at, in one sentence or a few parts of one.
        suspects: Names of the features, outputs or labels that carry it, strongest first.
    """

    kind: Kind
    words: str
    suspects: tuple[str, ...]


@dataclass(frozen=True)
class Live:
    """What raw features were like lately, in their own units; all [F].

    Attributes:
        mean: Of the values known; NaN where there are none.
        std: Likewise.
        missing: Share of values that were missing.
        quantiles: float64 [F, 15], at 1/16 ... 15/16; None or NaN where there are too few values.
    """

    mean: DoubleArray
    std: DoubleArray
    missing: DoubleArray
    quantiles: DoubleArray | None = None

    @classmethod
    def of(cls, features: FloatArray) -> Live:
        """Of recent rows, float32 [N, F]; NaN: missing."""
        width = features.shape[1]
        mean, std, quantiles = np.full(width, np.nan), np.full(width, np.nan), np.full((width, len(_LEVELS)), np.nan)
        columns = np.ascontiguousarray(features.T, dtype=np.float64)
        gaps = np.isnan(columns)
        partly = gaps.any(axis=1)
        # those without gaps all at once, which takes a tenth of the time, and each of the others by itself
        for places in (np.flatnonzero(~partly), *np.flatnonzero(partly)[:, None]):
            known = columns[places] if len(places) != 1 else columns[places][:, ~gaps[places[0]]]
            if known.size:
                mean[places], std[places] = known.mean(axis=1), known.std(axis=1)
            if known.size and known.shape[1] >= _UNIT_ROWS:
                quantiles[places] = np.quantile(known, _LEVELS, axis=1).T
        return cls(mean, std, np.isnan(features).mean(axis=0), quantiles)


@dataclass(frozen=True)
class Evidence:
    """What the monitors know at an alarm. Whatever is None or empty is left out of account.

    Attributes:
        alarms: Names of the monitors whose alarm is up: "input", "quality", "output", "latent", "accuracy".
        rows: How many rows the means below are over; of an exponential mean, its effective number.
        inputs: float64 [F], recent mean of the input channels.
        outputs: float64 [K].
        latents: float64 [R].
        live: Recent raw features.
        findings: What the quality monitor says.
        accuracy: Recent share of right answers; NaN: not known.
    """

    alarms: Collection[str]
    rows: int
    inputs: DoubleArray | None = None
    outputs: DoubleArray | None = None
    latents: DoubleArray | None = None
    live: Live | None = None
    findings: Sequence[Finding] = ()
    accuracy: float = math.nan


def diagnose(reference: Reference, evidence: Evidence, *, labels: Sequence[str] = ()) -> Diagnosis | None:
    """Tell the kinds of change apart.

    Broken data explains whatever else is up. Then, if other shares of the classes explain the shift of the channels,
    it is a prior shift. If only accuracy and outputs changed, and inputs and latent look as they did, it is the
    concept. All else is a covariate shift.

    Args:
        reference: What was normal.
        evidence: What the monitors know.
        labels: Of the served model.

    Returns:
        None if no alarm is up.
    """
    alarms = set(evidence.alarms)
    if not alarms:
        return None
    if (broken := _broken(reference, evidence)) is not None:
        return broken
    if alarms & {"input", "output", "latent"} and (shares := class_shift(reference, evidence)) is not None:
        return _prior(reference, shares, labels)
    if "accuracy" in alarms and not alarms & {"input", "latent"}:
        return _concept(reference.accuracy, evidence.accuracy)
    told = [*_inputs_in_words(reference, evidence)] if "input" in alarms else []
    told = told or [*_outputs_in_words(reference, evidence, labels)]
    words = _joined(told) or "what the network makes of the inputs has changed"
    return Diagnosis("covariate", words, tuple(name for name, _ in told))


def _broken(reference: Reference, evidence: Evidence) -> Diagnosis | None:
    """Whether the data is at fault.

    Values out of range alone, while inputs have moved as well, are what any large shift brings with it.
    """
    live, alarms = evidence.live, set(evidence.alarms)
    if alarms & {"input", "quality"} and live is not None and live.quantiles is not None:
        unit = unit_change(reference, live.quantiles)
        if unit is not None:
            return Diagnosis("quality", unit, (unit.rpartition(": ")[0],))
    found = evidence.findings
    if "quality" not in alarms or ("input" in alarms and all(finding.fault == "range" for finding in found)):
        return None
    words = _joined([(finding.feature, finding.words) for finding in found])
    features = tuple(dict.fromkeys(finding.feature for finding in found))
    return Diagnosis("quality", words or "values are missing, out of range or frozen more often than usual", features)


def _concept(usual: float, now: float) -> Diagnosis:
    what = "are right more or less often than before"
    if math.isfinite(usual) and math.isfinite(now):
        what = f"are right {'less' if now < usual else 'more'} often than before: {usual:.2f} -> {now:.2f}"
    return Diagnosis("concept", f"inputs look as they did, but answers {what}", ("accuracy",))


def _joined(told: Sequence[tuple[str, str]]) -> str:
    """Words about several things: "acc_x: this; acc_y: that"."""
    return "; ".join(f"{name}: {what}" for name, what in told)


def class_shift(reference: Reference, evidence: Evidence) -> DoubleArray | None:
    """The shares of predicted classes that explain the shift of the channels, float64 [C]; None if none do.

    They must explain 0.7 of the squared shift, in standard deviations of each channel, of all channels together and
    of inputs and latent alone: outputs follow the predicted class whatever changed. The shift must be more than
    chance gives, which takes means over some hundred rows.

    Source:
        The idea of Lipton, Wang & Smola 2018, "Detecting and correcting for label shift with black box predictors",
        arXiv:1802.03916, with means of channels in the place of the confusion matrix.
    """
    r = reference
    families = (
        (r.input_mean, r.input_std, evidence.inputs),
        (r.output_mean, r.output_std, evidence.outputs),
        (r.latent_mean, r.latent_std, evidence.latents),
    )
    means, stds = (np.concatenate([family[i] for family in families]) for i in (0, 1))
    live = np.concatenate([np.full(len(mean), np.nan) if seen is None else seen for mean, _, seen in families])
    count = len(r.class_share)
    if not count or live.shape != means.shape or r.class_means.shape != (count, len(means)):
        return None  # of other channels: the model has learned a label since
    used = np.isfinite(live) & (stds > _LEAST_STD)
    shift = (live - means)[used] / stds[used]
    share, class_means = r.class_share.astype(np.float64), r.class_means.astype(np.float64)
    by_class = (class_means - share @ class_means)[:, used] / stds[used]
    change: DoubleArray = np.linalg.lstsq(by_class.T, shift, rcond=1e-6)[0]
    change -= share * change.sum()  # fits the same, as the classes' mean is the mean of all
    shares: DoubleArray = np.clip(share + change, 0, None)
    shares /= shares.sum()
    left = shift - (shares - share) @ by_class
    noise = 1 / max(1, evidence.rows) + 1 / r.rows
    outputs = slice(len(r.input_mean), len(r.input_mean) + len(r.output_mean))
    inner = np.ones(len(means), dtype=bool)
    inner[outputs] = False
    for part in (slice(None), inner[used]):
        if _explained(shift[part], left[part], noise, int((share > 0).sum())) < _EXPLAINED:
            return None
    return shares


def _explained(shift: DoubleArray, left: DoubleArray, noise: float, classes: int) -> float:
    """Adjusted share of the squared shift that is explained; 0 if half of the shift may be chance.

    Chance is not taken from what is left: much of it goes along with the classes, and is explained with them.
    """
    n, total = len(shift), float(shift @ shift)
    if n <= classes or total < 2 * n * noise:
        return 0.0
    return 1 - float(left @ left) / total * (n - 1) / (n - classes)


def _prior(reference: Reference, shares: DoubleArray, labels: Sequence[str]) -> Diagnosis:
    change = shares - reference.class_share
    names = list(labels) if len(labels) == len(shares) else [f"class {i}" for i in range(len(shares))]
    order = np.argsort(-np.abs(change), kind="stable")[:_FEW]
    told = ", ".join(f"{names[i]!r} {100 * reference.class_share[i]:.0f} % -> {100 * shares[i]:.0f} %" for i in order)
    words = f"classes come in other shares than before: {told}; within each, inputs look as they did"
    return Diagnosis("prior", words, tuple(names[i] for i in order))


def _inputs_in_words(reference: Reference, evidence: Evidence) -> Iterator[tuple[str, str]]:
    """The features that moved most and how, strongest first."""
    r, live = reference, evidence.live
    if evidence.inputs is not None:
        moved = np.abs(evidence.inputs - r.input_mean) / np.maximum(r.input_std, _LEAST_STD)
    elif live is not None:
        moved = np.abs(_effects(r, live))
    else:
        return
    for i in np.argsort(-np.nan_to_num(moved), kind="stable")[:_FEW]:
        parts = []
        if live is not None:
            parts = [*_feature_in_words(r, live, int(i))]
        elif evidence.inputs is not None:
            parts = [f"usual rank {r.input_mean[i]:.2f} -> {evidence.inputs[i]:.2f}"]
        if parts:
            yield r.names[i], "; ".join(parts)


def _effects(reference: Reference, live: Live) -> DoubleArray:
    """Shift of each mean in usual standard deviations; of what never moved, in a thousandth of its size."""
    usual = np.maximum(reference.feature_std, _LEAST_STD * np.abs(reference.feature_mean) + 1e-30)
    effects: DoubleArray = (live.mean - reference.feature_mean) / usual
    return effects


def _feature_in_words(reference: Reference, live: Live, i: int) -> Iterator[str]:
    usual, spread = float(reference.feature_mean[i]), float(reference.feature_std[i])
    if math.isfinite(live.mean[i]):
        effect = float(_effects(reference, live)[i])
        if spread == 0:
            if live.mean[i] != usual:
                yield f"mean {live.mean[i]:.3g}, was always {usual:.3g}"
        else:
            ratio = live.std[i] / spread
            widened = not 1 / _SPREAD < ratio < _SPREAD
            if abs(effect) >= _SHIFTED or not widened:
                yield f"mean {usual:.3g} -> {live.mean[i]:.3g} ({effect:+.1f} of its usual spread)"
            if widened:
                yield f"spread {spread:.3g} -> {live.std[i]:.3g} ({ratio:.1f} times the usual)"
    if abs(live.missing[i] - reference.missing[i]) >= _MISSED:
        yield f"{100 * live.missing[i]:.0f} % of the values missing (usually {100 * reference.missing[i]:.0f} %)"


def _outputs_in_words(reference: Reference, evidence: Evidence, labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen: AnyArray | None = evidence.outputs
    names = output_names(tuple(labels), reference.task)
    if seen is None or not len(seen) == len(names) == len(reference.output_mean):
        return
    moved = np.abs(seen - reference.output_mean) / np.maximum(reference.output_std, _LEAST_STD)
    what = "mean" if reference.task in ("classification", "multilabel") else "usual rank"
    for i in np.argsort(-moved, kind="stable")[:_FEW]:
        yield names[i], f"{what} {reference.output_mean[i]:.2f} -> {seen[i]:.2f}"
