"""The app's own metrics: recorded from any thread, bounded, reported in windows, and what they decide."""

import json
import math
import subprocess
import sys
import threading
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.config import DeviceConfig, MetricConfig, load_config
from edge_sdk.errors import ConfigError, InputError, IntegrityError, NonFiniteError, RangeError
from edge_sdk.messages import from_buckets
from edge_sdk.metrics import (
    MAX_METRICS,
    MAX_PENDING,
    Metrics,
    MetricState,
    Tally,
    metric_trigger,
    metric_verdict,
)
from edge_sdk.sketch import QuantileSketch

CLICK = MetricConfig(floor=0.05, margin=0.02, low=0, high=1)


def recorded(values, config=CLICK, name="click"):
    metrics = Metrics({name: config} if config else {})
    for value in values:
        metrics.record(name, value)
    metrics.fold()
    return metrics


def state(values):
    state = MetricState.new()
    state.add(np.asarray(values, np.float64))
    return state


def compared(before, after):
    """On probation: values before the promotion, and after it."""
    result = state(before)
    result.before = Tally()
    result.before.add(np.asarray(before, np.float64))
    result.after.add(np.asarray(after, np.float64))
    return result


# ---- recording


def test_values_of_many_threads_are_all_counted():
    metrics = Metrics()

    def work():
        for _ in range(500):
            metrics.record("click", 1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    folded = sum(metrics.fold() for _ in range(50))
    for thread in threads:
        thread.join()
    assert folded + metrics.fold() == 4_000
    (told,) = metrics.take_window(min_count=1, chance=Random(0))
    assert (told.name, told.count, told.mean) == ("click", 4_000, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_not_finite_is_refused(value):
    metrics = Metrics()
    with pytest.raises(NonFiniteError, match="click"):
        metrics.record("click", value)
    assert metrics.fold() == 0


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_values_outside_the_configured_range_are_refused(value):
    metrics = Metrics({"click": CLICK})
    with pytest.raises(RangeError, match="outside 0 to 1"):
        metrics.record("click", value)
    metrics.record("click", 0)
    metrics.record("click", 1)
    assert metrics.fold() == 2


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(InputError, match="1 to 64"):
        Metrics().record(name, 1.0)
    with pytest.raises(ConfigError, match="1 to 64"):
        Metrics({name: MetricConfig()})


def test_the_number_of_metrics_is_bounded_and_those_with_settings_come_first():
    metrics = Metrics({f"set {i}": MetricConfig() for i in range(MAX_METRICS - 1)})
    metrics.record("free", 1.0)
    with pytest.raises(InputError, match="at most 32"):
        metrics.record("one too many", 1.0)
    metrics.record("set 5", 1.0)
    assert metrics.fold() == 2
    with pytest.raises(ConfigError, match="at most 32"):
        Metrics({str(i): MetricConfig() for i in range(MAX_METRICS + 1)})


def test_values_that_nobody_folds_are_bounded_and_counted():
    metrics = Metrics()
    for value in range(MAX_PENDING + 10):
        metrics.record("load", value)
    assert metrics.dropped == 10
    assert metrics.fold() == MAX_PENDING
    (told,) = metrics.take_window(min_count=1, chance=Random(0))
    assert told.mean == pytest.approx(10 + (MAX_PENDING - 1) / 2)


# ---- windows


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100), st.integers(1, 30))
def test_a_window_tells_the_moments_and_quantiles_of_its_values(values, step):
    metrics = Metrics()
    for start in range(0, len(values), step):
        for value in values[start : start + step]:
            metrics.record("x", value)
        metrics.fold()
    (told,) = metrics.take_window(min_count=1, chance=Random(0))
    spread = max(abs(value) for value in values)
    assert told.count == len(values)
    assert told.mean == pytest.approx(np.mean(values), abs=1e-9 * spread + 1e-12)
    assert told.std == pytest.approx(np.std(values), abs=1e-6 * spread + 1e-9)
    assert told.low <= min(values) + 1e-9 * spread
    assert told.high >= max(values) - 1e-9 * spread
    for data, side in ((told.above, [v for v in values if v >= 0]), (told.below, [-v for v in values if v < 0])):
        sketch = QuantileSketch.from_wire(*from_buckets(data))
        assert sketch.count == len(side)
        if side:
            assert sketch.quantile(0.5) == pytest.approx(np.quantile(side, 0.5, method="lower"), rel=0.021, abs=1e-9)


def test_a_window_with_few_values_goes_on_and_says_nothing():
    metrics = recorded([1] * 9)
    assert metrics.take_window(min_count=10, chance=Random(0)) == []
    metrics.record("click", 0)
    metrics.fold()
    (told,) = metrics.take_window(min_count=10, chance=Random(0))
    assert (told.count, told.mean) == (10, 0.9)
    assert metrics.take_window(min_count=1, chance=Random(0)) == []


def test_counts_leave_the_device_as_multiples_of_the_least_count():
    values = np.random.default_rng(0).normal(3, 1, 987)
    (told,) = recorded(values, None, "x").take_window(min_count=10, chance=Random(0))
    assert told.count % 10 == 0
    assert abs(told.count - 987) < 10
    low, high = min(values), max(values)
    assert low - 2 * told.std <= told.low <= low
    assert high <= told.high <= high + 2 * told.std
    assert told.low not in values


def test_the_recent_mean_follows_the_present():
    metrics = recorded([0.0] * 5_000 + [1.0] * 3_000)
    assert metrics.means()["click"] > 0.99


# ---- restarts


def test_a_restart_loses_nothing_that_was_folded():
    metrics = recorded([0, 1, 1] * 50)
    metrics.begin_probation()
    metrics.record("click", 0)
    metrics.record("other", -5.0)
    metrics.fold()
    restored = Metrics({"click": CLICK})
    restored.restore(metrics.to_bytes())
    assert restored.to_bytes() == metrics.to_bytes()
    assert restored.means() == metrics.means()
    assert restored.take_window(min_count=1, chance=Random(1)) == metrics.take_window(min_count=1, chance=Random(1))


def test_names_that_are_set_by_now_come_before_those_of_the_last_run():
    before = Metrics()
    for number in range(MAX_METRICS):
        before.record(f"old {number}", 1.0)
    before.fold()
    after = Metrics({"new": CLICK})
    after.restore(before.to_bytes())
    after.record("new", 1.0)
    after.fold()
    assert len(after.means()) == MAX_METRICS
    assert "old 31" not in after.means()


def test_a_damaged_state_is_refused_and_changes_nothing():
    metrics = recorded([1] * 40)
    data = metrics.to_bytes()
    for damaged in (b"", b"state", data[:-3]):
        with pytest.raises(IntegrityError):
            metrics.restore(damaged)
    assert metrics.to_bytes() == data


def test_the_state_stays_small():
    rng = np.random.default_rng(0)
    metrics = recorded(10 ** rng.uniform(-8, 90, 5_000) * rng.choice([-1, 1], 5_000), None)
    assert len(metrics.to_bytes()) < 4_000


# ---- triggers


@pytest.mark.parametrize(
    ("config", "values", "calls"),
    [
        (MetricConfig(floor=5), [4.0] * 40, "below 5"),
        (MetricConfig(floor=5), [6.0] * 40, None),
        (MetricConfig(ceiling=5), [6.0] * 40, "above 5"),
        (MetricConfig(ceiling=5), [4.0] * 40, None),
        (MetricConfig(floor=1, ceiling=5), [6.0] * 40, "above 5"),
        (MetricConfig(floor=5), [4.0] * 29, None),
        (MetricConfig(floor=5), [], None),
        (MetricConfig(), [4.0] * 40, None),
        (MetricConfig(floor=5), [0.0, 9.8] * 20, None),
        (MetricConfig(floor=0.02, low=0, high=1), [0.0] * 60, None),
        (MetricConfig(floor=0.02, low=0, high=1), [0.0] * 400, "below 0.02"),
    ],
)
def test_a_metric_calls_for_learning_when_its_recent_mean_is_beyond_a_limit(config, values, calls):
    why = metric_trigger(config, state(values) if values else MetricState.new())
    assert (why is None) if calls is None else (calls in why)


def test_only_metrics_beyond_their_limits_call():
    metrics = Metrics({"click": CLICK, "fine": MetricConfig(floor=0), "silent": CLICK})
    for _ in range(400):
        metrics.record("click", 0)
        metrics.record("fine", 1)
        metrics.record("free", -1)
    metrics.fold()
    (why,) = metrics.triggers()
    assert why.startswith("click: mean 0 of about")


# ---- probation


def test_a_version_that_makes_a_metric_worse_is_left():
    rng = np.random.default_rng(0)
    before, after = rng.normal(10, 1, 500), rng.normal(9, 1, 100)
    worse = compared(before, after)
    why = metric_verdict(MetricConfig(margin=0.2), worse, alpha=0.05)
    assert "worse by more than 0.2" in why
    assert metric_verdict(MetricConfig(margin=0.2, better="lower"), worse, alpha=0.05) is None
    assert metric_verdict(MetricConfig(margin=2.0), worse, alpha=0.05) is None
    assert metric_verdict(MetricConfig(), worse, alpha=0.05) is None
    higher = compared(before, rng.normal(11, 1, 100))
    assert metric_verdict(MetricConfig(margin=0.2, better="lower"), higher, alpha=0.05)


@pytest.mark.parametrize(("before", "after"), [(29, 100), (100, 29), (1, 1)])
def test_few_values_prove_nothing(before, after):
    few = compared([1.0] * before, [0.0] * after)
    assert metric_verdict(MetricConfig(margin=0), few, alpha=0.05) is None


def test_zeros_after_a_rare_event_prove_nothing_yet():
    rare = ([0.0] * 49 + [1.0]) * 10
    assert metric_verdict(MetricConfig(margin=0), compared(rare, [0.0] * 40), alpha=0.05) is None
    assert metric_verdict(MetricConfig(margin=0), compared(rare, [0.0] * 5_000), alpha=0.05)


DRAWS = {
    "normal": lambda rng, n: rng.normal(5, 2, n),
    "clicks": lambda rng, n: (rng.random(n) < 0.05).astype(float),
    "heavy": lambda rng, n: rng.lognormal(0, 1, n),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_version_that_is_no_worse_is_hardly_ever_left_however_often_one_looks(draw):
    config = MetricConfig(margin=0)
    left = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        probation = compared(draw(rng, 200), [])
        for _ in range(60):
            probation.after.add(draw(rng, 10))
            if metric_verdict(config, probation, alpha=0.05):
                left += 1
                break
    assert left <= 4


def test_a_probation_compares_what_came_with_what_was():
    metrics = recorded([1, 1, 1, 0] * 100)
    assert metrics.verdict(alpha=0.05) == ""
    metrics.begin_probation()
    for _ in range(200):
        metrics.record("click", 0)
    metrics.fold()
    assert metrics.verdict(alpha=0.05).startswith("click: mean 0 of 200 values, before it 0.7")
    metrics.end_probation()
    assert metrics.verdict(alpha=0.05) == ""


# ---- settings


def test_metrics_are_set_by_name_and_a_typo_is_an_error(tmp_path):
    file = tmp_path / "device.toml"
    file.write_text('[metrics.click]\nfloor = 0.05\nmargin = 0.02\n[metrics."mean dose"]\nbetter = "lower"\n')
    config = load_config(file)
    assert config.metrics["click"] == MetricConfig(floor=0.05, margin=0.02)
    assert config.metrics["mean dose"].better == "lower"
    assert DeviceConfig().metrics == {}
    for wrong in ("florr = 1", "low = 1\nhigh = 1", "floor = 2\nceiling = 1", "margin = -1"):
        file.write_text(f"[metrics.click]\n{wrong}\n")
        with pytest.raises(ConfigError, match=r"device\.toml"):
            load_config(file)


def test_metrics_and_summaries_load_no_random_numbers_of_numpy():
    code = "import sys, json, edge_sdk.metrics, edge_sdk.drift.summary; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy.random" not in json.loads(found.stdout)
