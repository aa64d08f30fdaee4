"""How right outputs are, and how sure one can be of it: arithmetic alone, nothing is measured here.

Every figure has an interval that covers the truth in about 95 of 100 repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_sdk.manifest import Manifest
from edge_sdk.stats import wilson_interval
from edge_sdk.types import AnyArray, DoubleArray, Task

RESAMPLES = 1000
_PICKS = 1 << 20
"""Rows drawn at once by the bootstrap, so that memory stays bounded."""
_Z = 1.96


class Accuracy(msgspec.Struct, frozen=True):
    """Share of right predictions with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    rows: int

    @classmethod
    def of(cls, correct: AnyArray) -> Accuracy:
        """From bool [N]: whether each prediction was right."""
        hits, rows = int(correct.sum()), len(correct)
        low, high = wilson_interval(hits, rows)
        return cls(hits / rows if rows else float("nan"), low, high, rows)


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Difference(msgspec.Struct, frozen=True):
    """By how much the first variant is better right than the second, on the same rows.

    Attributes:
        value: Share of right rows of the first minus that of the second, -1 to 1.
        low: Of the 95 % confidence interval.
        high: Of the 95 % confidence interval.
        first_only: Rows that only the first has right.
        second_only: Rows that only the second has right.
        p_value: Exact McNemar test of "both are equally often right".
    """

    value: float
    low: float
    high: float
    first_only: int
    second_only: int
    p_value: float


class Score(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How right outputs are on some rows. What does not apply to the task is None.

    Attributes:
        rows: How many.
        accuracy: Share of right rows: the label; all labels of the row (multi-label); every target within its
            tolerance (regression). For one label: see `Terms.by_label`.
        precision: Of one label: share of the rows said to have it that have it.
        recall: Multi-label, of one label: share of the rows that have it of which it was said.
        hamming: Multi-label: share of wrong decisions among all labels of all rows.
        rmse: Regression with one target, or of one target, in its units.
        mae: Likewise.
        r2: Share of variance explained; the mean over the targets where there are several.
    """

    rows: int
    accuracy: Accuracy | None = None
    precision: Accuracy | None = None
    recall: Accuracy | None = None
    hamming: Estimate | None = None
    rmse: Estimate | None = None
    mae: Estimate | None = None
    r2: Estimate | None = None


@dataclass(frozen=True)
class Terms:
    """By which outputs are judged.

    Attributes:
        task: What the outputs mean.
        labels: One name for each output.
        thresholds: float [C]: probability from which on a label is said (multi-label).
        tolerances: float [T]: absolute error up to which a value is right (regression).
    """

    task: Task
    labels: tuple[str, ...]
    thresholds: tuple[float, ...] = ()
    tolerances: tuple[float, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Terms:
        """Of a checkpoint."""
        tolerances = tuple(target.tolerance for target in manifest.targets)
        thresholds = tuple(manifest.thresholds) or (0.5,) * len(manifest.labels)
        return cls(manifest.task, tuple(manifest.labels), thresholds, tolerances)

    def correct(self, outputs: AnyArray, y: AnyArray) -> AnyArray:
        """Whether each row is right, bool [N].

        Args:
            outputs: Probabilities [N, C] or values [N, T].
            y: As `Dataset.checked` returns it.

        Raises:
            ValueError: The task is raw, which nothing can be right or wrong about.
        """
        if self.task == "classification":
            return np.asarray(outputs.argmax(1) == y)
        if self.task == "multilabel":
            return np.asarray((self._said(outputs) == (y > 0)).all(axis=1))
        if self.task == "regression":
            return np.asarray(self._within(outputs, y).all(axis=1))
        raise ValueError("outputs of a raw model have no right and wrong")

    def same(self, first: AnyArray, second: AnyArray) -> AnyArray:
        """Whether two variants say the same, bool [N]: label, set of labels, or values within the tolerances."""
        if self.task == "classification":
            return np.asarray(first.argmax(1) == second.argmax(1))
        if self.task == "multilabel":
            return np.asarray((self._said(first) == self._said(second)).all(axis=1))
        return np.asarray(self._within(first, second).all(axis=1))

    def score(self, outputs: AnyArray, y: AnyArray) -> Score:
        """On all rows given. Arguments and errors as in `correct`."""
        accuracy = Accuracy.of(self.correct(outputs, y))
        if self.task == "multilabel":
            wrong = (self._said(outputs) != (y > 0)).mean(axis=1)
            return Score(rows=len(y), accuracy=accuracy, hamming=bootstrap(wrong[:, None], lambda m: m[:, 0]))
        if self.task == "regression":
            return regression_score(outputs, y, accuracy)
        return Score(rows=len(y), accuracy=accuracy)

    def by_label(self, outputs: AnyArray, y: AnyArray) -> dict[str, Score]:
        """For each label, or each target.

        Classification: the accuracy is taken over the rows that have the label, so it is the recall. Multi-label:
        over all rows, whether the label was rightly said or left out. Regression: the target alone.
        """
        if self.task == "regression":
            within = self._within(outputs, y)
            return {
                label: regression_score(outputs[:, [i]], y[:, [i]], Accuracy.of(within[:, i]))
                for i, label in enumerate(self.labels)
            }
        truth: AnyArray = y > 0
        said = self._said(outputs)
        if self.task == "classification":
            truth = y[:, None] == np.arange(len(self.labels))
            said = outputs.argmax(1)[:, None] == np.arange(len(self.labels))
        scores = {}
        for i, label in enumerate(self.labels):
            recall = Accuracy.of(said[truth[:, i], i])
            precision = Accuracy.of(truth[said[:, i], i])
            if self.task == "classification":
                scores[label] = Score(rows=recall.rows, accuracy=recall, precision=precision)
            else:
                right = Accuracy.of(said[:, i] == truth[:, i])
                scores[label] = Score(rows=right.rows, accuracy=right, precision=precision, recall=recall)
        return scores

    def by_slice(self, outputs: AnyArray, y: AnyArray, slices: Mapping[str, AnyArray]) -> dict[str, Score]:
        """For each named subset of the rows that is not empty. slices: bool [N] each."""
        return {name: self.score(outputs[rows], y[rows]) for name, rows in slices.items() if rows.any()}

    def _said(self, outputs: AnyArray) -> AnyArray:
        thresholds = self.thresholds or (0.5,) * len(self.labels)
        return np.asarray(outputs >= np.asarray(thresholds, dtype=np.float32))

    def _within(self, first: AnyArray, second: AnyArray) -> AnyArray:
        error = np.abs(first.astype(np.float64) - second)
        return np.asarray(error <= np.asarray(self.tolerances or (0.0,), dtype=np.float64))


def regression_score(outputs: AnyArray, y: AnyArray, accuracy: Accuracy) -> Score:
    """RMSE, MAE and R² of values [N, T]; the first two for one target only, since several differ in their units."""
    error = outputs.astype(np.float64) - y
    centred = y.astype(np.float64) - y.mean(axis=0, dtype=np.float64)  # large offsets would cancel digits
    moments = np.concatenate([error**2, centred**2, centred, np.abs(error)], axis=1)
    targets = y.shape[1]

    def r2(means: DoubleArray) -> DoubleArray:
        squares, total, shift, _ = np.split(means, 4, axis=1)
        variance = total - shift**2
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(variance > 0, squares / variance, np.where(squares > 0, np.inf, 0.0))
        result: DoubleArray = 1 - ratio.mean(axis=1)
        return result

    # of targets that never vary nothing can be explained
    explained = bootstrap(moments, r2) if (centred.any(axis=0)).all() else None
    if targets > 1:
        return Score(rows=len(y), accuracy=accuracy, r2=explained)
    return Score(
        rows=len(y),
        accuracy=accuracy,
        rmse=bootstrap(moments, lambda m: np.sqrt(m[:, 0])),
        mae=bootstrap(moments, lambda m: m[:, 3]),
        r2=explained,
    )


def error_ratio(first: AnyArray, second: AnyArray, y: AnyArray) -> Estimate | None:
    """RMSE of the first over RMSE of the second, on the same resampled rows.

    Of several targets, squared errors are added in units of each target's variance. None where the second makes no
    error, or a target never varies.

    Args:
        first: Values [N, T].
        second: Values [N, T].
        y: Truth [N, T].
    """
    variance = y.astype(np.float64).var(axis=0)
    if not (variance > 0).all():
        return None
    moments = np.stack([((v.astype(np.float64) - y) ** 2 / variance).mean(axis=1) for v in (first, second)], axis=1)
    if not moments[:, 1].any():
        return None

    def ratio(means: DoubleArray) -> DoubleArray:
        with np.errstate(divide="ignore", invalid="ignore"):
            result: DoubleArray = np.sqrt(means[:, 0] / means[:, 1])
        return result

    return bootstrap(moments, ratio)


def bootstrap(moments: AnyArray, figure: Callable[[DoubleArray], DoubleArray], *, seed: int = 0) -> Estimate | None:
    """A figure that depends on the means of columns, with its percentile interval over resampled rows.

    Somewhat narrow below 50 rows.

    Args:
        moments: float [N, K]: what is averaged over the rows.
        figure: From means float64 [B, K] to one number each, [B].
        seed: For the resampling.

    Returns:
        None for no rows.

    Source:
        Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13, doi:10.1201/9780429246593.
    """
    rows = len(moments)
    if not rows:
        return None
    columns = np.ascontiguousarray(moments.T, dtype=np.float64)
    rng = np.random.default_rng(seed)
    figures: list[DoubleArray] = []
    at_once = max(1, _PICKS // rows)
    for start in range(0, RESAMPLES, at_once):
        picks = rng.integers(0, rows, (min(at_once, RESAMPLES - start), rows))
        figures.append(figure(np.stack([column[picks].mean(axis=1) for column in columns], axis=1)))
    drawn = np.concatenate(figures)
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975]) if np.isfinite(drawn).any() else (0.0, 0.0)
    value = float(figure(columns.mean(axis=1)[None])[0])
    return Estimate(value, min(float(low), value), max(float(high), value))


def paired_difference(first: AnyArray, second: AnyArray) -> Difference:
    """By how much more often the first is right, from bool [N] each on the same rows.

    Score intervals of both shares, combined with their correlation; behaves at 0 and 1, where the usual interval
    has no width.

    Raises:
        ValueError: No rows, or not the same number.

    Source:
        Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
        paired data", method 10, Statistics in Medicine 17:2635-2650; McNemar 1947, doi:10.1007/BF02295996, in its
        exact form.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"paired rows are needed, got {len(first)} and {len(second)}")
    rows = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    p1, p2 = (both + b) / rows, (both + c) / rows
    low1, high1 = wilson_interval(both + b, rows)
    low2, high2 = wilson_interval(both + c, rows)
    phi = _phi(both, b, c, neither)
    below = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    above = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    value = p1 - p2
    return Difference(
        value,
        max(-1.0, value - math.sqrt(max(0.0, below))),
        min(1.0, value + math.sqrt(max(0.0, above))),
        b,
        c,
        mcnemar_p(b, c),
    )


def mcnemar_p(first_only: int, second_only: int) -> float:
    """Two-sided exact McNemar test on the rows that only one has right; 1 where there are none."""
    trials = first_only + second_only
    tail = sum(math.comb(trials, k) for k in range(min(first_only, second_only) + 1))
    return float(min(1.0, 2 * tail / (1 << trials)))


def sqnr_db(reference: AnyArray, signal: AnyArray) -> float | None:
    """Signal-to-quantization-noise ratio in decibels: 10 log10 of reference² over (reference - signal)².

    Returns:
        None where the two are equal (the ratio is infinite) or the reference is all zeros (it has none).
    """
    reference = np.asarray(reference, dtype=np.float64)
    power, noise = float((reference**2).sum()), float(((reference - signal) ** 2).sum())
    return 10 * math.log10(power / noise) if power > 0 and noise > 0 else None


def round_quantiles(rounds: Sequence[Sequence[float]], levels: Sequence[float]) -> list[float]:
    """Each quantile as the median over rounds of the quantile within the round.

    A round that another process disturbed does not move the result as it would move quantiles of all calls.

    Raises:
        ValueError: There is no round, or an empty one.
    """
    if not rounds or not all(rounds):
        raise ValueError("every round needs at least one call")
    return [float(np.median([np.quantile(calls, level) for calls in rounds])) for level in levels]


def _phi(both: int, b: int, c: int, neither: int) -> float:
    """Correlation of two rights, with Newcombe's continuity correction where it is positive."""
    product = (both + b) * (c + neither) * (both + c) * (b + neither)
    if not product:
        return 0.0
    excess: float = both * neither - b * c
    if excess > 0:
        excess = max(0.0, excess - (both + b + c + neither) / 2)
    return excess / math.sqrt(product)
