"""The skew report: which fall of the score is told, and that equal scores say nothing."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.skew import Score, Skew, findings
from edge_sdk.stats import wilson_interval

NAMES = ("training", "judge", "next_day", "live", "holdout")


def scored(rows=1_000, **shares):
    """Scores of 0.8 on `rows` rows each, but where told."""
    return Skew(**{name: Score(round(shares.get(name, 0.8) * rows), rows) for name in NAMES})


def test_rows_are_added_to_a_new_report():
    empty = Skew()
    skew = empty.add("training", np.array([True, True, False])).add("training", np.array([True]))
    skew = skew.add("judge", np.array([False, True])).add("holdout", np.zeros(0, dtype=bool))
    skew = skew.add_live(np.array([True, True, False]), np.array([True, False, True]))
    assert empty == Skew()
    assert (skew.training, skew.judge, skew.holdout) == (Score(3, 4), Score(1, 2), Score())
    assert (skew.live, skew.next_day, skew.changed) == (Score(2, 3), Score(2, 3), 2)
    assert msgspec.json.decode(msgspec.json.encode(skew), type=Skew) == skew


def test_what_was_answered_and_what_is_scored_anew_are_the_same_rows():
    with pytest.raises(ValueError, match="the same rows"):
        Skew().add_live(np.array([True]), np.array([True, False]))


def test_the_table_holds_scores_with_intervals_and_no_small_cell():
    skew = Skew(training=Score(95, 100), judge=Score(8, 10), live=Score(9, 9), next_day=Score(9, 9))
    assert skew.table() == [
        ("training", 0.95, 100, wilson_interval(95, 100)),
        ("judge", 0.8, 10, wilson_interval(8, 10)),
    ]
    assert [row.name for row in skew.table(min_count=1)] == ["training", "judge", "next_day", "live"]
    assert Skew().table(min_count=0) == []


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ("overfits", {"training": 0.9}),
        ("the world moves", {"training": 0.9, "judge": 0.9}),
        ("labels follow predictions", {"next_day": 0.9, "live": 0.9}),
        ("acting on predictions undoes them", {"holdout": 0.9}),
    ],
)
def test_a_fall_is_told_with_both_scores_and_its_cause(words, shares):
    (told,) = findings(scored(**shares))
    assert told.startswith(f"{words}: 0.900 right")
    assert "0.800" in told


def test_a_rise_or_a_fall_too_small_to_matter_is_not_told():
    assert findings(scored(training=0.5)) == []
    assert findings(scored(rows=1_000_000, training=0.815)) == []
    assert len(findings(scored(rows=1_000_000, training=0.825))) == 1


def test_too_few_rows_are_not_compared():
    skew = Skew(training=Score(1_000, 1_000), judge=Score(0, 9), live=Score(9, 9), next_day=Score(0, 9), changed=9)
    assert findings(skew) == []
    assert len(findings(skew, min_count=9)) == 2
    assert findings(Skew(), min_count=0) == []


def test_rows_that_are_answered_otherwise_than_they_are_scored_are_a_bug():
    same, changed = np.ones(2_000, dtype=bool), np.ones(2_000, dtype=bool)
    changed[:2] = False
    assert findings(Skew().add_live(same, changed)) == [], "two runtimes may round differently"
    changed[2] = False
    (told,) = findings(Skew().add_live(same, changed))
    assert told.startswith("serving differs from what was measured: 1.000 right as answered, 0.999 for the same rows")


def test_changes_that_cancel_out_are_a_bug_too():
    half = np.arange(100) % 2 == 0
    (told,) = findings(Skew().add_live(half, ~half))
    assert told.startswith("serving differs from what was measured: 0.500 right as answered, 0.500")


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("rows", [(1_000, 200, 200, 20), (300, 30, 60, 15), (5_000, 2_000, 5_000, 500)])
def test_equal_scores_say_anything_in_about_alpha_of_reports(rng, share, rows):
    runs = 1_000
    drawn = rng.binomial(rows, share, size=(runs, 4)).tolist()
    told = 0
    for training, judge, live, holdout in drawn:
        skew = Skew(
            training=Score(training, rows[0]),
            judge=Score(judge, rows[1]),
            next_day=Score(live, rows[2]),
            live=Score(live, rows[2]),
            holdout=Score(holdout, rows[3]),
        )
        told += bool(findings(skew))
    assert told <= 0.06 * runs + 2 * math.sqrt(0.06 * 0.94 * runs)


def test_a_fall_by_ten_points_is_usually_found_with_300_rows(rng):
    found = sum(
        bool(findings(Skew(training=Score(9_500, 10_000), judge=Score(int(right), 300))))
        for right in rng.binomial(300, 0.85, size=200)
    )
    assert found >= 195


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=4, max_size=4), st.integers(0, 60))
def test_no_report_breaks_it(pairs, changed):
    training, judge, live, holdout = (Score(min(pair), max(pair)) for pair in pairs)
    skew = Skew(training, judge, live, live, holdout, min(changed, live.rows))
    assert all("{" not in told for told in findings(skew))
    for row in skew.table():
        assert row.rows >= 10
        assert row.interval[0] - 1e-9 <= row.score <= row.interval[1] + 1e-9
