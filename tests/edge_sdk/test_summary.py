"""What the coordinator hears of the data: sums that can be added, in 8 kB, and nothing of single rows."""

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_sdk.drift.summary import BINS, Summary
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import MAX_SUMMARY_BYTES, MetricSummary, MonitorState, to_buckets
from edge_sdk.stats import round_at_random, round_outward

NAMES = ("acc_x", "acc_y", "acc_z")


def filled(rows=500, *, seed=0, names=NAMES, missing=0.0, reference="r", labels=("a", "b")):
    rng = np.random.default_rng(seed)
    summary = Summary(names, reference=reference, start=100.0)
    for part in np.array_split(np.arange(rows), max(1, rows // 32)):
        features = rng.normal(3, 2, (len(part), len(names))).astype(np.float32)
        features[rng.random(features.shape) < missing] = np.nan
        bins = rng.integers(0, BINS, features.shape).astype(np.uint8)
        summary.add(
            features,
            bins,
            said=[str(label) for label in rng.choice(list(labels), len(part))],
            confidence=rng.random(len(part)),
            latency_ms=rng.lognormal(0, 0.3, len(part)),
        )
    return summary


def same(first, second):
    assert (first.rows, first.classes, first.reference) == (second.rows, second.classes, second.reference)
    assert first.latency.to_wire() == second.latency.to_wire()
    for key in ("counts", "missing", "confidence", "known", "low", "high"):
        assert np.array_equal(getattr(first, key), getattr(second, key)), key
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(first.m2, second.m2, rtol=1e-6, atol=1e-6)


# ---- counting and adding


def test_moments_are_those_of_all_rows_however_they_came(rng):
    x = rng.normal(5, 2, (300, 3)).astype(np.float32)
    summary = Summary(NAMES)
    for part in np.array_split(x, 11):
        summary.add(part, np.zeros(part.shape, np.uint8))
    np.testing.assert_allclose(summary.mean, x.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(summary.m2 / 300, x.var(axis=0, dtype=np.float64))
    assert np.array_equal(summary.low, x.min(axis=0))
    assert np.array_equal(summary.high, x.max(axis=0))
    assert np.array_equal(summary.counts[:, 0], [300] * 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_values_are_counted_and_are_in_no_bin_and_no_moment(value):
    summary = Summary(("x", "y"))
    summary.add(np.array([[1.0, value], [3.0, value]], np.float32), np.array([[5, 0], [6, 0]], np.uint8))
    assert summary.missing.tolist() == [0, 2]
    assert summary.counts.sum(axis=1).tolist() == [2, 0]
    assert summary.mean[0] == 2
    summary.add(np.array([[2.0, 7.0]], np.float32), np.array([[5, 9]], np.uint8))
    assert (summary.mean[1], summary.low[1], summary.high[1], summary.counts[1, 9]) == (7, 7, 7, 1)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=4), st.floats(0, 1))
def test_summaries_added_are_the_summary_of_all_rows(parts, missing):
    merged, whole = Summary(NAMES, reference="r", start=100.0), Summary(NAMES, reference="r", start=100.0)
    for seed, rows in enumerate(parts):
        merged.merge(filled(rows, seed=seed, missing=missing))
        whole.merge(filled(rows, seed=seed, missing=missing))
    backwards = Summary(NAMES, reference="r", start=100.0)
    for seed, rows in reversed(list(enumerate(parts))):
        backwards.merge(filled(rows, seed=seed, missing=missing))
    same(merged, whole)
    same(merged, backwards)
    assert merged.rows == sum(parts)


def test_adding_widens_the_window():
    first, second = filled(), filled()
    first.end, second.start, second.end = 200.0, 50.0, 150.0
    first.merge(second)
    assert (first.start, first.end) == (50.0, 200.0)


@pytest.mark.parametrize("other", [Summary(NAMES, reference="s"), Summary(("x",), reference="r")])
def test_summaries_of_other_references_are_not_added(other):
    summary = filled()
    with pytest.raises(ValueError, match="cannot be added"):
        summary.merge(other)
    same(summary, filled())


@pytest.mark.parametrize(
    ("features", "bins"),
    [((4, 2), (4, 2)), ((4, 3), (3, 3)), ((3,), (3,))],
)
def test_shapes_that_do_not_fit_are_refused(features, bins):
    summary = Summary(NAMES)
    with pytest.raises(ValueError, match="for 3 names"):
        summary.add(np.zeros(features, np.float32), np.zeros(bins, np.uint8))
    with pytest.raises(ValueError, match="below 64"):
        summary.add(np.zeros((1, 3), np.float32), np.full((1, 3), 64, np.uint8))
    assert summary.rows == 0


def test_an_empty_block_changes_nothing():
    summary = filled()
    summary.add(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8))
    same(summary, filled())


# ---- what leaves the device


def test_without_a_least_count_the_wire_carries_all_but_the_exact_extremes():
    summary = filled(missing=0.1)
    read = Summary.from_wire(summary.to_wire(end=200.0, min_count=1))
    assert (read.start, read.end, read.names, read.rows) == (100.0, 200.0, NAMES, 500)
    for key in ("counts", "missing", "confidence", "known"):
        assert np.array_equal(getattr(read, key), getattr(summary, key)), key
    assert read.classes == summary.classes
    assert read.latency.to_wire() == summary.latency.to_wire()
    np.testing.assert_allclose(read.mean, summary.mean, rtol=1e-6)
    np.testing.assert_allclose(read.m2, summary.m2, rtol=1e-5)
    assert (read.low <= summary.low).all()
    assert (read.high >= summary.high).all()


@given(st.integers(1, 50), st.integers(0, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_every_count_that_leaves_the_device_is_a_multiple_of_the_least_count(least, rows, seed):
    message = filled(rows, seed=seed, missing=0.2).message(end=200.0, min_count=least, chance=Random(seed))
    read = Summary.from_message(message)
    assert message.unit == least
    for counts in (read.counts, read.missing, read.confidence, [read.rows, *read.classes.values(), read.latency.count]):
        assert not (np.array(counts) % least).any()
    assert all(count >= least for count in read.classes.values())


def test_moments_of_too_few_values_stay_on_the_device():
    summary = Summary(("x", "y"))
    features = np.array([[1.0, np.nan]] * 9 + [[1.0, 42.0]], np.float32)
    summary.add(features, np.zeros((10, 2), np.uint8))
    moments = np.frombuffer(summary.message(end=1.0, min_count=10).moments, "<f4").reshape(2, 4)
    assert moments[0].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert np.isnan(moments[1]).all()
    read = Summary.from_message(summary.message(end=1.0, min_count=10))
    assert read.known[1] == 0
    read.merge(read)
    assert np.isfinite(read.mean).all()


def test_sums_over_many_devices_are_nearly_exact():
    parts = [filled(100, seed=seed) for seed in range(60)]
    exact, told = Summary(NAMES, reference="r", start=100.0), Summary(NAMES, reference="r", start=100.0)
    for number, part in enumerate(parts):
        exact.merge(part)
        told.merge(Summary.from_wire(part.to_wire(end=200.0, min_count=10, chance=Random(number))))
    halves = [summary.counts.reshape(3, 2, 32).sum(axis=2) for summary in (exact, told)]
    np.testing.assert_allclose(halves[1], halves[0], rtol=0.1)
    np.testing.assert_allclose(told.mean, exact.mean, rtol=0.01)
    assert told.rows == pytest.approx(exact.rows, rel=0.05)
    assert told.latency.quantile(0.5) == pytest.approx(exact.latency.quantile(0.5), rel=0.05)


# ---- its size


MONITORS = [
    MonitorState(name, 1.5, 1e5, warning=False, alarm=False) for name in ("input", "quality", "output", "latent")
]


@pytest.mark.parametrize("scale", [1, 10, 1_000, 10**6])
@pytest.mark.parametrize(
    "name", ["acc_{}", "region row 1 of 4, column {}", "\u00e9" * 60 + "{}"], ids=["short", "long", "wide"]
)
@pytest.mark.parametrize("least", [1, 10])
@pytest.mark.parametrize("metrics", [0, 32])
def test_a_message_is_never_larger_than_its_bound(scale, name, least, metrics):
    summary = filled(640, names=[name.format(i) for i in range(64)], labels=["l" * 60 + str(i) for i in range(64)])
    for key in ("counts", "missing", "confidence"):
        setattr(summary, key, getattr(summary, key) * np.uint32(scale))
    summary.classes = type(summary.classes)({label: count * scale for label, count in summary.classes.items()})
    sketch = to_buckets(range(256), [10**6] * 256, 0)
    told = [MetricSummary("m" * 60 + str(i), 10**6, 0.1, 0.1, 0.1, 0.1, sketch, sketch) for i in range(metrics)]
    message = summary.message(end=200.0, min_count=least, monitors=MONITORS, metrics=told)
    assert len(msgspec.msgpack.encode(message)) <= MAX_SUMMARY_BYTES
    read = Summary.from_message(message)
    assert float(read.counts.sum()) == pytest.approx(float(summary.counts.sum()), rel=0.05)
    assert message.monitors == MONITORS


def test_an_hour_of_64_features_keeps_all_bins_names_and_metrics():
    summary = filled(10_000, names=[f"sensor {i:02}" for i in range(64)])
    metrics = [MetricSummary("click", 100, 0.1, 0.3, 0.0, 1.0, to_buckets([0], [10], 90), b"")]
    message = summary.message(end=200.0, monitors=MONITORS, metrics=metrics)
    assert message.bins == 64
    assert message.features[0] == "sensor 00"
    assert message.metrics == metrics


def test_only_the_most_common_labels_are_told_by_name():
    summary = filled(3_000, labels=[f"label {i}" for i in range(64)])
    message = summary.message(end=1.0, min_count=1)
    assert len(message.classes) == 33
    assert sum(message.classes.values()) == 3_000


def test_coarser_summaries_are_added_to_finer_ones():
    summary = filled(500)
    message = summary.message(end=1.0, min_count=1)
    coarse = Summary.from_message(
        msgspec.structs.replace(message, bins=16, counts=summary._told_counts(16, 1, Random(0)))
    )
    summary.merge(coarse)
    assert summary.counts.shape == (3, 16)
    assert np.array_equal(summary.counts, 2 * coarse.counts)


@pytest.mark.parametrize(
    "changes",
    [
        {"bins": 63},
        {"bins": 0},
        {"counts": b"\x80"},
        {"counts": b"\x01"},
        {"missing": b""},
        {"moments": bytes(15)},
        {"confidence": b"\x01\x02"},
        {"latency": b"\x01\x02"},
        {"features": []},
    ],
)
def test_a_message_whose_parts_do_not_fit_is_refused(changes):
    message = msgspec.structs.replace(filled().message(end=1.0), **changes)
    with pytest.raises(ProtocolError):
        Summary.from_message(message)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_summary_are_refused(data):
    with pytest.raises(ProtocolError):
        Summary.from_wire(data)


# ---- restarts


def test_a_restart_loses_nothing_of_the_window():
    summary, restored = filled(missing=0.1), Summary(NAMES, reference="r")
    restored.restore(summary.state())
    same(restored, summary)
    assert restored.start == 100.0
    assert restored.to_wire(end=1.0, chance=Random(1)) == summary.to_wire(end=1.0, chance=Random(1))


def test_the_state_is_small_and_flat():
    sizes = [
        sum(array.nbytes for array in filled(rows, names=[str(i) for i in range(64)]).state().values())
        for rows in (200, 20_000)
    ]
    assert max(sizes) < 24_000


@pytest.mark.parametrize("damage", [{"counts": np.zeros((2, 64))}, {"facts": np.zeros(3, np.uint8)}])
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    summary = filled()
    with pytest.raises(ValueError):
        summary.restore({**summary.state(), **damage})
    same(summary, filled())


# ---- rounding


@given(st.lists(st.integers(0, 1_000), max_size=20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_rounding_moves_a_count_by_less_than_a_unit(counts, unit, seed):
    rounded = round_at_random(np.array(counts, np.int64), unit, Random(seed)) * unit
    assert (np.abs(rounded - np.array(counts, np.int64)) < unit).all()
    assert all(told == count for told, count in zip(rounded, counts, strict=True) if count % unit == 0)


@pytest.mark.parametrize("count", [1, 7, 13])
def test_rounding_is_right_on_average(count):
    rounded = round_at_random(np.full(20_000, count), 10, Random(0)) * 10
    assert rounded.mean() == pytest.approx(count, abs=0.15)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e3))
@example(0.0, 5e-324, 2.0)
def test_a_range_is_never_told_too_narrow_and_hardly_too_wide(low, width, std):
    apart = round_outward(np.array(low), np.array(low + width), np.array(std))
    assert apart[0] <= low
    assert apart[1] >= low + width
    assert low - apart[0] <= 2 * std
    assert apart[1] - (low + width) <= 2 * std


def test_counts_of_any_size_survive_the_disk():
    summary = Summary(["a", "b"])
    for largest in (0, 65_535, 65_536, (1 << 24) - 1, 1 << 24, (1 << 32) - 1):
        summary.counts[0, 5] = largest
        again = Summary(["a", "b"])
        again.restore(summary.state())
        np.testing.assert_array_equal(again.counts, summary.counts)
