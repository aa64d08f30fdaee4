"""What a label is worth: by its source, by how much the app was pleased, and by how many its source sent already.

A label's weight is a float. Above zero: this truth, counted so much. Below zero (classification only): a complementary
label, "it is not this one", counted by its absolute value. Zero: it says nothing.
"""

from __future__ import annotations

import math

import msgspec

from edge_sdk.config import FeedbackConfig
from edge_sdk.errors import LabelError

MAX_SOURCE_CHARS = 64
MAX_SOURCES = 1_000
"""Sources that `HourlyCap` tells apart."""
_PART_S = 360.0
_PARTS = 11
"""An hour touches no more than so many parts, wherever it begins."""


def check_source(source: str) -> str:
    """The source itself, if it can be one: at most 64 printable characters; empty: none is named.

    Raises:
        LabelError: It cannot.
    """
    if not isinstance(source, str) or len(source) > MAX_SOURCE_CHARS or not source.isprintable():
        raise LabelError(f"a source is a string of at most {MAX_SOURCE_CHARS} printable characters, got {source!r:.80}")
    return source


def source_weight(source: str, config: FeedbackConfig) -> float:
    """What one label of this source counts, 0 to 1."""
    return config.sources.get(source, config.default_weight)


def from_reward(label: str, reward: float) -> tuple[str, float]:
    """The label and weight that implicit feedback stands for: how pleased somebody was with a served prediction.

    A reward of 1 confirms the label with weight 1; one of 0 says with weight 1 that it was not this label; one of 0.5
    says nothing (weight 0). Between them the weight is linear: 2 reward - 1.

    Args:
        label: What was predicted.
        reward: 0 to 1: clicked, accepted, share of the time that was stayed.

    Returns:
        The label, and its weight in [-1, 1].

    Raises:
        LabelError: The reward is not a number in [0, 1].

    Source:
        A negative weight is a complementary label: Kim et al. 2019, "NLNL: Negative learning for noisy labels",
        arXiv:1908.07387.
    """
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:  # NaN is neither
        raise LabelError(f"a reward is a number from 0 (wrong) to 1 (right), got {reward!r:.80}")
    return label, 2 * value - 1


class HourlyCap(msgspec.Struct):
    """How many labels each source sent within the last hour; small, and persisted as it is.

    Never lets more than the cap through in any 3600 s. Time is counted in parts of six minutes, and an hour reaches
    into eleven of them: a source at its cap waits up to 66 minutes instead of 60 for a place.

    When the clock is set back, what was let through counts as of the source's next label: it waits 66 minutes from then
    at most. When the clock jumps ahead, one more hour's labels come through.
    """

    counts: dict[str, dict[int, int]] = {}
    """By source: labels let through, by part (seconds since the epoch // 360). The inner dictionaries are replaced,
    never changed."""
    swept: int = -1
    """The part at which sources without recent labels were last forgotten."""

    def admit(self, source: str, now: float, config: FeedbackConfig) -> bool:
        """Whether one more label of this source counts at this time; if so, it is remembered.

        A label without a source ("") is of one source as well, or naming none would be a way around the cap. Of more
        than 1000 sources within an hour those that came last are refused.
        """
        cap = config.max_per_source_hour
        if not cap:
            return True
        part = int(now // _PART_S)
        if source not in self.counts and len(self.counts) >= MAX_SOURCES:
            if part != self.swept:  # a flood of names is not to cost a sweep each
                recent = {name: _recent(counts, part) for name, counts in self.counts.items()}
                self.counts, self.swept = {name: counts for name, counts in recent.items() if counts}, part
            if len(self.counts) >= MAX_SOURCES:
                return False
        counts = _recent(self.counts.get(source, {}), part)
        admitted = sum(counts.values()) < cap
        if admitted:
            counts[part] = counts.get(part, 0) + 1
        self.counts[source] = counts
        return admitted

    def copy(self) -> HourlyCap:
        """One that can be given up if what it decided is not written."""
        return HourlyCap(dict(self.counts), self.swept)


def _recent(counts: dict[int, int], part: int) -> dict[int, int]:
    """What counts still at this part; parts from before the clock was set back become this one."""
    recent: dict[int, int] = {}
    for then, count in counts.items():
        if then > part - _PARTS:
            recent[min(then, part)] = recent.get(min(then, part), 0) + count
    return recent
