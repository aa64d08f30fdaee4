"""The record of the learning transaction: what it takes note of."""

import numpy as np

from edge_sdk.join import Judged
from edge_sdk.outcomes import Outcomes
from edge_sdk.progress import AdaptState
from edge_sdk.skew import Score

LATENT = np.zeros(4, np.uint8)


def scored(*right):
    right = np.array(right)
    return Outcomes((~right).astype(float), right, ~right[:, None], np.full(len(right), 0.5))


def test_rows_that_nobody_acted_on_are_scored_apart_from_the_others():
    state = AdaptState(promoted_at=100.0)
    rows = [Judged(LATENT, "a", correct=True, holdout=i < 2) for i in range(5)]
    state.note_live(rows, 101.0, scored(False, True, True, False, True), None)
    assert state.skew.holdout == Score(2, 2)
    assert (state.skew.live, state.skew.next_day, state.skew.changed) == (Score(3, 3), Score(2, 3), 1)
    state.note_live(rows[:2], 102.0, scored(True, True), None)
    assert (state.skew.holdout, state.skew.live.rows) == (Score(4, 4), 3)
    assert len(state.recent) == 7
