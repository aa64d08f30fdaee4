"""What freshness is worth: intervals that hold the truth, and no number where too little is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_server.freshness import Cell, CostSettings, Estimate, _t, by_age, difference, freshness, share, slope

DAY = 86_400.0
NOW = 200 * DAY


def cells(*, devices=12, days=60, loss_per_day=0.0, seed=0, labels=30, releases=((140, 1),), heads=(), spread=0.05):
    """Devices that differ in level; accuracy falls with the age of what they run."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(devices):
        level = rng.normal(0.85, spread)
        for day in range(200 - days, 200):
            release = max((r for at, r in releases if at <= day), default=0)
            since = max((at for at, r in releases if at <= day), default=day)
            head = sum(1 for at in heads if since <= at <= day)
            since = max([since, *[at for at in heads if at <= day]])
            if not release:
                continue
            p = min(0.99, max(0.01, level - loss_per_day * (day - since)))
            found.append(Cell(f"d{i}", release, head, day, 100, labels, int(rng.binomial(labels, p)), day * DAY))
    return found


def report(found, *, built=None, **changes):
    facts = {"release_bytes": 2_000_000, "devices": 12, "costs": CostSettings(), "now": NOW}
    return freshness(found, built=built or {1: 140 * DAY, 2: 170 * DAY}, **{**facts, **changes})


def test_accuracy_falls_with_the_age_of_the_base_and_the_slope_says_how_fast():
    told = report(cells(loss_per_day=0.004))
    values = [entry.accuracy.value for entry in told.by_base_age]
    assert values == sorted(values, reverse=True)
    assert [entry.from_days for entry in told.by_base_age] == [0, 1, 2, 4, 7, 14, 30]
    assert told.slope_per_day.low < -0.004 < told.slope_per_day.high < 0


def test_what_was_lost_since_the_base_was_fresh_is_what_a_new_one_may_bring_and_what_it_costs():
    told = report(cells(loss_per_day=0.004))
    lost = told.lost_since_release
    assert lost.low < 0.004 * 53 < lost.high
    assert lost.low > 0
    assert told.predictions_per_day == pytest.approx(12 * 100)
    assert told.right_per_day.value == pytest.approx(lost.value * 1200)
    assert (told.ship_bytes, told.ship_joules) == (24_000_000, pytest.approx(24 * 5 + 12 * 10))
    assert told.right_per_mb == pytest.approx(told.right_per_day.value * 30 / 24)
    assert "may bring back" in told.advice


def test_nothing_is_promised_where_nothing_was_lost():
    told = report(cells(loss_per_day=0.0))
    assert told.lost_since_release.low < 0 < told.lost_since_release.high
    assert "Not decided" in told.advice or "Nothing was lost" in told.advice


def test_what_earlier_releases_and_learned_heads_brought_is_told_apart():
    shipped = report(cells(loss_per_day=0.004, releases=((140, 1), (170, 2))))
    assert shipped.gained_by_releases.low > 0.03
    assert shipped.gained_by_adaptations.value is None
    learned = report(cells(loss_per_day=0.004, heads=(170,)))
    assert learned.gained_by_adaptations.low > 0.03
    assert learned.gained_by_releases.value is None
    assert learned.lost_since_adaptation.value < learned.lost_since_release.value + 0.15


@pytest.mark.parametrize(("devices", "labels", "why"), [(4, 30, "4 devices"), (12, 0, "0 devices"), (5, 1, "labelled")])
def test_too_little_data_gives_no_number_but_a_reason(devices, labels, why):
    told = report(cells(devices=devices, labels=labels, days=60))
    assert told.lost_since_release.value is None
    assert why in told.lost_since_release.problem
    assert told.right_per_mb is None
    assert "Cannot tell" in told.advice


def test_without_any_report_there_is_a_report_that_says_so():
    told = report([])
    assert told.by_base_age == []
    assert told.slope_per_day.value is None


def test_intervals_take_devices_not_predictions_for_what_was_drawn():
    # 10 devices of very different levels: 100,000 labels say little of the next device
    counts = [(round(10_000 * p), 10_000) for p in np.linspace(0.6, 0.95, 10)]
    estimate = share(counts)
    assert estimate.high - estimate.low > 0.1


def test_the_interval_of_a_share_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        levels = rng.beta(16, 4, 12)
        estimate = share([(int(rng.binomial(40, p)), 40) for p in levels])
        held += estimate.low <= 0.8 <= estimate.high
    assert held / 400 >= 0.92


def test_the_interval_of_a_difference_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        pairs = []
        for p in rng.beta(16, 4, 8):
            n0, n1 = rng.integers(20, 200, 2)
            pairs.append(((int(rng.binomial(n0, p)), int(n0)), (int(rng.binomial(n1, p)), int(n1))))
        estimate = difference(pairs)
        held += estimate.low <= 0 <= estimate.high
    assert held / 400 >= 0.92


def test_a_slope_is_of_each_devices_own_change_not_of_how_devices_differ():
    # the good devices are those with old models
    found = [
        Cell(f"d{i}", 1, 0, day, 100, 100, 50 + 4 * i, day * DAY)
        for i in range(10)
        for day in range(10 * i, 10 * i + 5)
    ]
    estimate = slope(found, lambda cell: cell.day)
    assert estimate.value == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30))
def test_a_share_lies_in_its_interval_and_both_in_0_to_1(pairs):
    estimate = share([(min(k, n), n) for k, n in pairs])
    if estimate.value is None:
        assert estimate.problem
    else:
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_cells_of_the_future_count_as_fresh():
    (entry,) = by_age([Cell("d", 1, 0, 0, 1, 1, 1, 0.0)], lambda cell: -5.0)
    assert entry.from_days == 0
    assert entry.accuracy == Estimate(devices=1, labelled=1, problem=entry.accuracy.problem)


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (9, 2.262), (30, 2.042)])
def test_the_quantile_of_students_t_is_that_of_the_tables(freedom, value):
    assert _t(freedom) == pytest.approx(value, rel=0.005)
