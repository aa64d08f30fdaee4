"""KS, PSI and river's detectors: the contract, what they see, and how often they are wrong."""

import sys

import numpy as np
import pytest

from edge_sdk.checks import check_detector
from edge_sdk.drift.ks import KSDetector
from edge_sdk.drift.psi import PSIDetector
from edge_sdk.drift.river import ADWINDetector, HDDMWDetector
from edge_sdk.errors import MissingExtraError

WINDOWED = pytest.mark.parametrize("kind", [KSDetector, PSIDetector])


def counts(rows):
    """float64 [K, 64] of rows in [0, 1]."""
    bins = np.minimum((rows * 64).astype(int), 63)
    return np.stack([np.bincount(column, minlength=64) for column in bins.T]).astype(float)


def made(kind, rows, *, run_length=10_000.0, window=256):
    return kind(counts(rows), rows=len(rows), run_length=run_length, window=window)


@WINDOWED
@pytest.mark.parametrize("window", [20, 256])
def test_windowed_detectors_keep_the_contract(rng, kind, window):
    known = rng.uniform(0.4, 0.6, (1_000, 3))
    check_detector(lambda: made(kind, known, window=window))


@WINDOWED
def test_false_alarms_come_about_once_in_a_run_length(kind):
    run_length, runs, alarms = 5_000, 30, 0
    for seed in range(runs):
        rng = np.random.default_rng([3, seed])
        detector = made(kind, rng.random((1_000, 12)), run_length=run_length)
        for _ in range(run_length // 256):
            detector.update(rng.random((256, 12)))
            alarms += detector.drift_detected
            if detector.drift_detected:
                detector.reset()
    assert alarms / runs < 1.5


@WINDOWED
@pytest.mark.parametrize(
    "change",
    [lambda u: 0.5 * u + 0.25, lambda u: np.where(u < 0.5, u / 4, 1 - u / 4), lambda u: u**1.7],
    ids=["narrower", "wider", "shifted"],
)
def test_any_change_of_a_distribution_is_seen_and_its_channel_named(rng, kind, change):
    detector = made(kind, rng.random((1_000, 12)))
    live = rng.random((512, 12))
    detector.update(live[:256])
    assert not detector.drift_detected
    live[256:, 7] = change(live[256:, 7])
    detector.update(live[256:])
    assert detector.drift_detected
    assert detector.suspects(1)[0][0] == 7


@WINDOWED
def test_suspects_tell_the_shift_of_the_mean(rng, kind):
    detector = made(kind, rng.random((1_000, 3)))
    detector.update(np.concatenate([rng.random((256, 2)), rng.random((256, 1)) / 2], axis=1))
    channel, shift = detector.suspects(1)[0]
    assert channel == 2
    assert shift == pytest.approx(-0.25, abs=0.05)


def test_p_values_are_those_of_the_textbook():
    """Critical values: of Kolmogorov's distribution 1.358 at 0.05; of chi-squared with 9 degrees of freedom 21.67."""
    ks = KSDetector(np.ones((1, 64)), rows=10**9, run_length=100.0, window=10_000)
    seen = np.full((1, 64), 10_000 / 64)
    seen[0, :32] += 1.358 * 100 / 32
    seen[0, 32:] -= 1.358 * 100 / 32
    assert ks.p_values(seen)[0] == pytest.approx(0.05, rel=0.02)
    psi = PSIDetector(np.repeat(np.eye(10), [7] * 4 + [6] * 6, axis=1).sum(axis=0)[None], rows=10**9, run_length=100.0)
    rng = np.random.default_rng(0)
    p = [psi.p_values(rng.multinomial(256, psi.shares[0])[None].astype(float))[0] for _ in range(4_000)]
    assert np.mean(np.array(p) < 0.01) == pytest.approx(0.01, abs=0.008)
    assert np.mean(p) == pytest.approx(0.5, abs=0.05)


@WINDOWED
def test_values_that_repeat_raise_no_alarm(rng, kind):
    rows = np.round(rng.random((4_000, 4)) ** 3, 1)
    detector = made(kind, rows[:1_000], run_length=100_000.0)
    detector.update(rows[1_000:])
    assert not detector.drift_detected


@WINDOWED
@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        (np.ones((2, 63)), {}, "64 bins"),
        (np.ones(64), {}, "64 bins"),
        (np.zeros((2, 64)), {}, "counts or shares"),
        (-np.ones((2, 64)), {}, "counts or shares"),
        (np.ones((2, 64)), {"rows": 0}, "at least one row"),
        (np.ones((2, 64)), {"window": 0}, "at least one row"),
        (np.ones((2, 64)), {"run_length": 1.0}, "above 1"),
    ],
)
def test_impossible_settings_are_refused(kind, reference, options, message):
    with pytest.raises(ValueError, match=message):
        kind(reference, **{"rows": 100, "run_length": 100.0, **options})


@WINDOWED
def test_the_state_of_another_detector_is_refused(rng, kind):
    rows = rng.random((200, 3))
    long = made(kind, rows)
    long.update(rows)
    with pytest.raises(ValueError, match="window of 100"):
        made(kind, rows, window=100).restore(long.state())
    with pytest.raises(ValueError, match="state of 3 channels"):
        made(kind, rows[:, :2]).restore(long.state())


# ---- river

RIVER = pytest.mark.parametrize("kind", [ADWINDetector, HDDMWDetector])


@RIVER
def test_a_missing_extra_is_named(monkeypatch, kind):
    for module in ("river", "river.drift", "river.drift.binary"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[river\]'"):
        kind(3)


@RIVER
def test_river_detectors_keep_the_contract(kind):
    pytest.importorskip("river")
    check_detector(lambda: kind(3), history=300)


@RIVER
def test_river_detectors_name_the_channel_that_changed(rng, kind):
    pytest.importorskip("river")
    detector = kind(4)
    rows = (rng.random((1_400, 4)) < 0.1).astype(float)
    rows[1_000:, 2] = rng.random(400) < 0.6
    detector.update(rows[:1_000])
    assert not detector.drift_detected
    detector.update(rows[1_000:])
    assert detector.drift_detected
    channel, shift = detector.suspects(1)[0]
    assert channel == 2
    assert shift > 0.2


def test_hddm_w_sees_fewer_errors_only_when_asked(rng):
    pytest.importorskip("river")
    rows = (rng.random((1_000, 1)) < np.repeat([0.6, 0.05], 500)[:, None]).astype(float)
    for sides, seen in (("up", False), ("both", True)):
        detector = HDDMWDetector(1, sides=sides)
        detector.update(rows)
        assert detector.drift_detected == seen


@RIVER
def test_impossible_settings_of_river_detectors_are_refused(kind):
    pytest.importorskip("river")
    with pytest.raises(ValueError, match="at least one"):
        kind(0)


def test_unknown_sides_are_refused():
    with pytest.raises(ValueError, match="sides"):
        HDDMWDetector(1, sides="down")


@RIVER
def test_the_state_of_another_river_detector_is_refused(kind):
    pytest.importorskip("river")
    with pytest.raises(ValueError, match="state of 4 channels"):
        kind(3).restore(kind(4).state())
