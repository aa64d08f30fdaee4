"""The test for more alarms than devices raise by themselves: it keeps its promise, whoever the devices are."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_server.surge import _TILTS, _log_means, evidence, fold, log_beta_binomial, sign_p


def mean_factor(log_pmf, devices, chance, correlation):
    """E[exp(t K)] / E0[exp(t K)] for every tilt: at most 1 for an e-value."""
    terms = log_pmf + _TILTS[:, None] * np.arange(devices + 1) - _log_means(devices, chance, correlation)[:, None]
    return np.exp(np.logaddexp.reduce(terms, axis=1))


@pytest.mark.parametrize("correlation", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("devices", [1, 2, 7, 400])
def test_the_distribution_sums_to_one_and_has_its_mean(devices, correlation):
    pmf = np.exp(log_beta_binomial(devices, 0.03, correlation))
    assert pmf.sum() == pytest.approx(1)
    assert pmf @ np.arange(devices + 1) == pytest.approx(0.03 * devices)
    variance = pmf @ (np.arange(devices + 1) - 0.03 * devices) ** 2
    assert variance == pytest.approx(devices * 0.03 * 0.97 * (1 + (devices - 1) * correlation))


@settings(max_examples=60, deadline=None)
@given(
    chances=st.lists(st.floats(0.0, 0.2), min_size=1, max_size=12),
    correlation=st.sampled_from([0.0, 0.01, 0.1]),
)
def test_factors_are_e_values_for_devices_of_different_chances(chances, correlation):
    pmf = np.ones(1)
    for chance in chances:
        pmf = np.convolve(pmf, [1 - chance, chance])
    allowed = max(1e-6, float(np.mean(chances)))
    with np.errstate(divide="ignore"):
        log_pmf = np.log(pmf)
    assert mean_factor(log_pmf, len(chances), allowed, correlation).max() <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    devices=st.integers(1, 200),
    chance=st.floats(1e-5, 0.2),
    less=st.floats(0.01, 1.0),
    correlation=st.floats(0.0, 0.2),
    fewer=st.floats(0.0, 1.0),
)
def test_factors_are_e_values_for_smaller_chances_and_correlations(devices, chance, less, correlation, fewer):
    log_pmf = log_beta_binomial(devices, chance * less, correlation * fewer)
    assert mean_factor(log_pmf, devices, chance, correlation).max() <= 1 + 1e-6


@pytest.mark.parametrize("devices", [5, 50, 1000])
@pytest.mark.parametrize("correlation", [0.0, 0.01])
def test_within_n_windows_a_threshold_of_n_is_reached_far_less_often_than_always(devices, correlation):
    rng = np.random.default_rng(devices)
    windows, runs, chance, hits = 200, 60, 0.002, 0
    for _ in range(runs):
        wealth = ()
        for _ in range(windows):
            common = chance
            if correlation:
                common = rng.beta(
                    chance * (1 - correlation) / correlation, (1 - chance) * (1 - correlation) / correlation
                )
            wealth = fold(wealth, rng.binomial(devices, common), devices, chance * devices, 0.01)
            if evidence(wealth) >= math.log(4 * windows):
                hits += 1
                break
    # allowed: a quarter; with four times that many windows as threshold
    assert hits / runs <= 0.25 + 2 * math.sqrt(0.25 * 0.75 / runs)


@pytest.mark.parametrize(("devices", "rate", "windows"), [(10, 0.2, 8), (50, 0.1, 5), (1000, 0.1, 3)])
def test_a_surge_is_seen_within_a_few_windows(devices, rate, windows):
    rng = np.random.default_rng(0)
    needed = []
    for _ in range(20):
        wealth, window = (), 0
        while evidence(wealth) < math.log(3 * 5 * 24 / 0.01):
            wealth = fold(wealth, rng.binomial(devices, rate), devices, 0.0017 * devices, 0.01)
            window += 1
        needed.append(window)
    assert np.median(needed) <= windows


def test_a_window_without_devices_changes_nothing():
    wealth = fold((), 2, 10, 0.1, 0.01)
    assert fold(wealth, 0, 0, 0.0, 0.01) == wealth
    assert evidence(()) == -math.inf


def test_the_sign_test_is_two_sided():
    assert sign_p(5, 0) == pytest.approx(2 / 32)
    assert sign_p(0, 5) == sign_p(5, 0)
    assert sign_p(3, 3) == 1.0
    assert sign_p(900, 200) < 1e-30
