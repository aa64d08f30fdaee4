"""Summaries of many devices added up: neither order nor steps matter; and how far they are from the reference."""

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.drift.ranks import ranked
from edge_sdk.drift.reference import Reference
from edge_sdk.drift.summary import Summary
from edge_sdk.messages import MetricSummary, from_counts, to_buckets, to_counts
from edge_sdk.sketch import QuantileSketch
from edge_server.fleet import Baseline, FleetSummary, merge_summaries

NAMES = ("load", "level")


def reference_of(x):
    scores = np.full((len(x), 2), 0.5, np.float32)
    return Reference.build(x, scores, np.ones(len(x), bool), names=NAMES)


@pytest.fixture(scope="module")
def reference():
    rng = np.random.default_rng(0)
    # the second repeats: half of its values are 0
    level = np.where(rng.random(4000) < 0.5, 0.0, rng.exponential(1.0, 4000))
    return reference_of(np.stack([rng.normal(5, 2, 4000), level], axis=1).astype(np.float32))


def told(reference, *, rows=300, seed=0, shift=0.0, bins=64, unit=1, missing=0.0, release=1, end=3600.0, metric=None):
    """The summary of a device whose first feature is `shift` standard deviations away."""
    rng = np.random.default_rng(seed)
    level = np.where(rng.random(rows) < 0.5, 0.0, rng.exponential(1.0, rows))
    x = np.stack([rng.normal(5 + 2 * shift, 2, rows), level], axis=1).astype(np.float32)
    x[rng.random(rows) < missing, 0] = np.nan
    summary = Summary(NAMES, reference=reference.digest, start=end - 3600)
    summary.add(
        x, ranked(x, reference.edges)[1], said=["a"] * rows, confidence=rng.random(rows),
        latency_ms=rng.lognormal(0, 0.3, rows),
    )  # fmt: skip
    metrics = []
    if metric is not None:
        sketch = QuantileSketch()
        sketch.add(np.full(20, metric))
        metrics = [MetricSummary("click", 20, metric, 0.0, metric, metric, to_buckets(*sketch.to_wire()), b"")]
    message = summary.message(end=end, release=release, min_count=unit, metrics=metrics, chance=Random(seed))
    if bins < 64:
        counts = np.array(from_counts(message.counts)).reshape(2, bins, -1).sum(axis=2)
        message = msgspec.structs.replace(message, bins=bins, counts=to_counts(counts.ravel().tolist()))
    return message


def merged(reference, devices):
    baseline = Baseline(reference)
    summary = FleetSummary(2, reference=reference.digest)
    for messages in devices:
        summary.add_device(messages, baseline)
    return summary


def view(summary, reference):
    return summary.view("all", Baseline(reference))


def leaves(value):
    """Every number and text of plain data, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in (key, *leaves(value[key]))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def assert_same(first, second):
    pairs = zip(*(leaves(msgspec.to_builtins(view)) for view in (first, second)), strict=True)
    for one, other in pairs:
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-9) if isinstance(other, float) else other)


class TestMerging:
    @settings(max_examples=20, deadline=None)
    @given(
        devices=st.lists(
            st.lists(st.tuples(st.integers(0, 50), st.sampled_from([64, 32, 8])), min_size=1, max_size=2),
            min_size=1,
            max_size=5,
        ),
        order=st.randoms(use_true_random=False),
        cut=st.integers(0, 5),
    )
    def test_neither_the_order_of_the_devices_nor_the_steps_matter(self, reference, devices, order, cut):
        fleet = [[told(reference, seed=seed, bins=bins, rows=40) for seed, bins in own] for own in devices]
        whole = view(merged(reference, fleet), reference)
        shuffled = list(fleet)
        order.shuffle(shuffled)
        assert_same(whole, view(merged(reference, shuffled), reference))
        first, second = merged(reference, shuffled[:cut]), merged(reference, shuffled[cut:])
        second.merge(first)  # and of the empty one too
        assert_same(whole, view(second, reference))

    def test_a_part_that_was_merged_into_another_is_left_as_it_was(self, reference):
        first, second = (merged(reference, [[told(reference, seed=seed)]]) for seed in (1, 2))
        before = view(first, reference)
        second.merge(first)
        second.merge(merged(reference, [[told(reference, seed=3)]]))
        assert view(first, reference) == before

    def test_summaries_of_another_reference_are_not_added(self, reference):
        with pytest.raises(ValueError, match="cannot be added"):
            merged(reference, []).merge(FleetSummary(2, reference="other"))

    def test_a_summary_that_cannot_be_read_is_counted_and_does_no_harm(self, reference):
        good, bad = told(reference), msgspec.structs.replace(told(reference), moments=b"")
        found = view(merged(reference, [[good], [bad], [good, bad]]), reference)
        assert (found.devices, found.skipped, found.rows) == (2, 2, 600)

    def test_one_device_with_coarse_bins_does_not_make_the_others_coarse(self, reference):
        found = view(merged(reference, [[told(reference)], [told(reference, bins=8, seed=1)]]), reference)
        assert len(found.features[0].histogram) == 64
        assert found.features[0].rows == 600
        assert found.features[0].psi < 0.05

    def test_memory_does_not_grow_with_the_devices(self, reference):
        message = told(reference, metric=2.0)
        few, many = merged(reference, [[message]] * 3), merged(reference, [[message]] * 300)
        assert few._parts.keys() == many._parts.keys()
        assert sum(part.counts.nbytes for part in many._parts.values()) == 2 * 64 * 4
        assert len(many._metrics["click"].above.to_wire()[0]) == 1


class TestDrift:
    def test_a_fleet_like_its_reference_has_no_drift_whether_values_repeat_or_not(self, reference):
        found = view(merged(reference, [[told(reference, seed=seed)] for seed in range(20)]), reference)
        for feature in found.features:
            assert feature.psi < 0.02
            assert feature.ks < 0.05
            assert abs(feature.shift) < 0.02
            assert abs(feature.t) < 4

    def test_without_the_checkpoint_bins_are_taken_to_be_equal_and_there_are_no_quantiles(self, reference):
        summary = merged(reference, [[told(reference)]])
        found = summary.view("all", Baseline())
        assert not found.known_reference
        assert found.features[0].quantiles == {}
        assert found.features[0].ks < 0.1

    def test_a_shift_of_all_is_told_from_a_shift_of_one_by_how_far_the_devices_agree(self, reference):
        every = view(merged(reference, [[told(reference, seed=s, shift=0.5)] for s in range(10)]), reference)
        one = view(
            merged(reference, [[told(reference, seed=s, shift=5.0 if s == 0 else 0.0)] for s in range(10)]), reference
        )
        load = every.features[0]
        assert (load.up, load.down, load.devices) == (10, 0, 10)
        assert load.t > 10
        assert load.psi > 0.1
        assert load.ks > 0.1
        assert one.features[0].t < 3
        assert abs(every.features[1].t) < 4

    def test_quantiles_are_in_the_features_own_unit(self, reference):
        found = view(merged(reference, [[told(reference, seed=s, rows=2000)] for s in range(5)]), reference)
        load, level = found.features
        assert load.quantiles["50"] == pytest.approx(5, abs=0.15)
        assert load.quantiles["95"] == pytest.approx(5 + 2 * 1.645, abs=0.3)
        assert level.quantiles["25"] == pytest.approx(0, abs=1e-6)
        assert load.mean == pytest.approx(5, abs=0.1)
        assert load.std == pytest.approx(2, abs=0.1)

    def test_counts_rounded_to_tens_are_right_on_average(self, reference):
        found = view(merged(reference, [[told(reference, seed=s, unit=10)] for s in range(40)]), reference)
        assert found.features[0].psi < 0.02
        assert found.rows == pytest.approx(12_000, rel=0.01)

    def test_missing_values_are_a_share_and_in_no_bin(self, reference):
        found = view(merged(reference, [[told(reference, rows=1000, missing=0.25)]]), reference)
        assert found.features[0].missing == pytest.approx(0.25, abs=0.05)

    def test_the_apps_own_metrics_are_added_up_with_their_quantiles(self, reference):
        found = view(merged(reference, [[told(reference, metric=1.0)], [told(reference, metric=3.0)]]), reference)
        click = found.metrics["click"]
        assert (click.count, click.mean, click.low, click.high) == (40, 2.0, 1.0, 3.0)
        assert click.std == pytest.approx(1.0)
        assert click.quantiles["25"] == pytest.approx(1.0, rel=0.03)
        assert click.quantiles["95"] == pytest.approx(3.0, rel=0.03)


def test_a_stream_of_summaries_is_grouped_by_whatever_is_asked(reference):
    stream = [
        (f"d{i}", told(reference, seed=10 * i + day, end=86_400.0 * day + 3600, release=1 + i % 2))
        for i in range(4)
        for day in range(2)
    ]
    asked = []

    def baselines(digest, release):
        asked.append((digest, release))
        return Baseline(reference)

    found = merge_summaries(
        stream, lambda device, s: (f"release={s.release}", f"day={int(s.end // 86_400)}", device), baselines
    )
    assert {key[0] for key in found} == {"release=1", "release=2", "day=0", "day=1", "d0", "d1", "d2", "d3"}
    assert found["release=1", reference.digest].devices == 2
    assert found["day=0", reference.digest].devices == 4
    assert found["d0", reference.digest].devices == 1
    assert asked == [(reference.digest, 1)]
