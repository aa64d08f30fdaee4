"""Where a model's score falls between training and use, and what each fall says.

Five scores of one head, from the rows it was trained on to those that nobody acted on. Whichever neighbours differ name
the cause: overfitting, a world that moves, serving that is not what was measured, or predictions that make their own
labels.

Source:
    Zinkevich, "Rules of Machine Learning", rule 37: measure training/serving skew;
    https://developers.google.com/machine-learning/guides/rules-of-ml
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk.stats import difference_interval, wilson_interval

_MATTERS = 0.02
"""A smaller fall is not worth a person's time, however certain it is."""
_CHANGED_BY_ROUNDING = 0.001
"""Share of rows that two runtimes may tell apart, where two labels come out all but equal."""
_COMPARISONS = {
    (
        "training",
        "judge",
    ): "overfits: {} right on rows it was trained on, {} on judge rows. Collect more samples, lower "
    "learn.passes, or raise learn.anchor_rows (hybrid) or learn.ewc_lambda (sgd)",
    (
        "judge",
        "next_day",
    ): "the world moves: {} right on judge rows, {} on rows that came after. Learn more often; look "
    "for inputs and labels that change within a day",
    ("live", "holdout"): "labels follow predictions: {} right where the app acts on them, {} where it does not. Trust "
    "the holdout; keep labels that a prediction led to out of learning",
    ("holdout", "live"): "acting on predictions undoes them: {} right where the app does not act, {} where it does. "
    "Trust the holdout; keep labels that an action prevented out of learning",
}
"""What it means that the first score is higher than the second."""


class Score(msgspec.Struct, frozen=True):
    """How many rows were right."""

    right: int = 0
    rows: int = 0

    @property
    def share(self) -> float:
        """Right by rows; 0 for none."""
        return self.right / self.rows if self.rows else 0.0


class SkewRow(NamedTuple):
    """One line of the report. interval: of 95 %."""

    name: str
    score: float
    rows: int
    interval: tuple[float, float]


class Skew(msgspec.Struct, frozen=True):
    """Scores of the head in use; begin a new one with each head. Adding returns a new one."""

    training: Score = Score()
    """Rows that it was trained on."""
    judge: Score = Score()
    """Rows that were kept apart to judge it."""
    next_day: Score = Score()
    """Rows that came after it was put into use, scored anew from what was stored of them."""
    live: Score = Score()
    """The same rows, as they were answered when they came."""
    holdout: Score = Score()
    """Rows whose prediction the app did not act on."""
    changed: int = 0
    """Of the live rows: right then and wrong when scored anew, or the reverse."""

    def add(self, part: Literal["training", "judge", "holdout"], right: NDArray[np.bool_]) -> Skew:
        """With further rows: bool [N], whether each was right."""
        return msgspec.structs.replace(self, **{part: _plus(getattr(self, part), right)})

    def add_live(self, answered: NDArray[np.bool_], again: NDArray[np.bool_]) -> Skew:
        """With further rows of the app's use.

        Args:
            answered: bool [N], whether what was answered was right.
            again: bool [N], whether the same head is right about the same rows, scored anew from the store.

        Raises:
            ValueError: They are not the same rows.
        """
        if answered.shape != again.shape:
            raise ValueError(f"both scores are of the same rows, got {answered.shape} and {again.shape}")
        return msgspec.structs.replace(
            self,
            live=_plus(self.live, answered),
            next_day=_plus(self.next_day, again),
            changed=self.changed + int((answered != again).sum()),
        )

    def table(self, *, min_count: int = 10) -> list[SkewRow]:
        """The scores in order, without those of fewer than `min_count` rows."""
        scores = {name: getattr(self, name) for name in ("training", "judge", "next_day", "live", "holdout")}
        return [
            SkewRow(name, score.share, score.rows, wilson_interval(score.right, score.rows))
            for name, score in scores.items()
            if score.rows >= max(1, min_count)
        ]


def findings(skew: Skew, *, alpha: float = 0.05, min_count: int = 10) -> list[str]:
    """What is wrong, in words that say what to do; nothing if all is well.

    Args:
        skew: The scores.
        alpha: Chance, to within a hundredth, that anything is said of equal scores, in all comparisons of one reading.
        min_count: Scores over fewer rows are not compared.

    Source:
        One-sided intervals of Newcombe, see `stats.difference_interval`, at alpha over the number of comparisons.
    """
    z = NormalDist().inv_cdf(1 - alpha / len(_COMPARISONS))
    found = []
    for (higher, lower), words in _COMPARISONS.items():
        first, second = getattr(skew, higher), getattr(skew, lower)
        if min(first.rows, second.rows) < max(1, min_count) or first.share - second.share < _MATTERS:
            continue
        if difference_interval((first.right, first.rows), (second.right, second.rows), z=z)[0] > 0:
            found.append(words.format(f"{first.share:.3f}", f"{second.share:.3f}"))
    if skew.live.rows >= max(1, min_count) and skew.changed > _CHANGED_BY_ROUNDING * skew.live.rows:
        found.append(
            f"serving differs from what was measured: {skew.live.share:.3f} right as answered, "
            f"{skew.next_day.share:.3f} for the same rows scored anew. A bug: look for preprocessing, files or "
            "versions that differ"
        )
    return found


def _plus(score: Score, right: NDArray[np.bool_]) -> Score:
    return Score(score.right + int(np.count_nonzero(right)), score.rows + len(right))
