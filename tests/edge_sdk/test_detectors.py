"""The e-detector: the contract of every detector, its false-alarm budget, its delay, and whom it blames."""

import math

import numpy as np
import pytest

from edge_sdk.checks import CheckFailed, check_detector
from edge_sdk.drift.edetector import EDetector


def make(channels=3, *, mean=0.5, slack=0.02, run_length=1_000.0, **options):
    return EDetector(np.full(channels, mean), np.full(channels, slack), run_length=run_length, **options)


def first_alarm(detector, stream):
    """Index of the row that raises the alarm, or None."""
    for index, row in enumerate(stream):
        detector.update(row[None])
        if detector.drift_detected:
            return index
    return None


@pytest.mark.parametrize("mean", [0.002, 0.3, 0.5])
@pytest.mark.parametrize("sides", ["both", "up"])
@pytest.mark.parametrize(("channels", "stride"), [(1, 1), (12, 1), (12, 8)])
def test_edetector_keeps_the_contract(channels, stride, sides, mean):
    check_detector(lambda: make(channels, sides=sides, mean=mean, stride=stride), channels=channels)


class Forgetting(EDetector):
    """Its alarm goes away by itself."""

    @property
    def drift_detected(self):
        return self.evidence >= self.threshold


class Growing(EDetector):
    """Remembers every block."""

    blocks = 0

    def update(self, block):
        super().update(block)
        self.blocks += 1

    def state(self):
        return {**super().state(), "log": np.zeros(self.blocks)}


class PerBlock(EDetector):
    """Takes each block for one row."""

    def update(self, block):
        super().update(block)
        super().update(block[:1])


class Lenient(EDetector):
    def update(self, block):
        if block.ndim == 2 and block.shape[1] == 3:
            super().update(np.clip(np.nan_to_num(block), 0, 1))


class Telling(EDetector):
    def update(self, block):
        super().update(block)
        return self.drift_detected


class Partial(EDetector):
    def restore(self, state):
        super().restore({**state, "recent": self._mean})


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Forgetting, "latched"),
        (Growing, "does not grow"),
        (PerBlock, "same state as one block"),
        (Lenient, "is refused"),
        (Telling, "returns None"),
        (Partial, "continues exactly"),
    ],
)
def test_contract_suite_finds_a_broken_detector(broken, rule):
    with pytest.raises(CheckFailed, match=rule):
        check_detector(lambda: broken(np.full(3, 0.5), np.full(3, 0.02), run_length=1_000.0))


@pytest.mark.parametrize("stride", [1, 3, 8, 32])
def test_evidence_is_the_average_of_the_statistics_computed_row_by_row(rng, stride):
    """At the end of the last whole step: with a stride, all bets of a step begin at its first row."""
    stream = rng.random((300, 2)) ** 0.8
    detector = EDetector(np.array([0.5, 0.4]), np.array([0.02, 0.05]), run_length=1e9, stride=stride)
    detector.update(stream)
    total = 0.0
    for channel, (up, down) in enumerate([(0.52, 0.48), (0.45, 0.35)]):
        for bet in (0.05, 0.15, 0.4, 0.9):
            above = below = 0.0
            for index, x in enumerate(stream[: 300 - 300 % stride, channel]):
                begun = stride if index % stride == 0 else 0
                above = (begun + above) * (1 + bet * (x - up) / up)
                below = (begun + below) * (1 + bet * (down - x) / (1 - down))
            total += above + below
    assert detector.evidence == pytest.approx(total / 16, rel=1e-4)


def test_quiet_rows_are_those_since_the_last_warning_level(rng):
    detector = make(2, run_length=10_000.0, slack=0.1, stride=4)
    calm = rng.uniform(0.4, 0.6, (600, 2))
    detector.update(calm[:42])
    assert detector.quiet_rows == 40
    detector.update(np.ones((42, 2)))
    assert detector.warning
    assert detector.quiet_rows == 0
    detector.update(calm)
    assert 0 < detector.quiet_rows < 600
    assert detector.warning
    detector.reset()
    assert detector.quiet_rows == 0


def test_another_band_keeps_the_evidence_and_counts_from_then_on(rng):
    stream = rng.uniform(0.5, 0.7, (200, 2))
    narrow, wide = make(2, run_length=1e9), make(2, run_length=1e9)
    for detector in (narrow, wide):
        detector.update(stream)
    before = wide.evidence
    wide.refit(np.full(2, 0.6), np.full(2, 0.05))
    assert wide.evidence == before > 0
    assert all(np.array_equal(wide.state()[key], narrow.state()[key]) for key in ("m", "recent", "scalars"))
    for detector in (narrow, wide):
        detector.update(stream)
    assert wide.evidence < before < narrow.evidence


def test_a_band_of_another_width_is_refused():
    with pytest.raises(ValueError, match="3 channels as before"):
        make(3).refit(np.full(2, 0.5), np.full(2, 0.1))


def test_alarm_index_on_a_seeded_stream_is_the_known_one():
    rng = np.random.default_rng(7)
    stream = rng.beta(2, 2, (600, 4))
    stream[400:, 2] = rng.beta(4, 2, 200)
    assert first_alarm(make(4), stream) == 456


def test_false_alarms_keep_their_budget_for_an_estimated_reference():
    """Twelve channels that depend on each other; every run estimates its own reference from 1000 rows."""
    run_length, runs = 400, 120
    lengths = []
    for seed in range(runs):
        rng = np.random.default_rng([11, seed])
        mixing = rng.dirichlet(np.ones(4), 12).T

        def draw(count, rng=rng, mixing=mixing):
            return rng.beta(0.4, 0.9, (count, 4)) @ mixing

        known = draw(1_000)
        detector = EDetector(known.mean(0), 3 * known.std(0) / math.sqrt(1_000), run_length=run_length)
        rows = 0
        while rows < 4 * run_length and not detector.drift_detected:
            detector.update(draw(40))
            rows += 40
        lengths.append(rows)
    assert np.mean(lengths) >= run_length  # runs are cut off at four run lengths, which only lowers the mean
    assert sum(length < run_length for length in lengths) <= (1 - math.exp(-1)) * runs


@pytest.mark.parametrize("mean", [0.01, 0.5, 0.97])
def test_false_alarms_keep_their_budget_for_rare_and_common_events_without_slack(mean):
    run_length, runs = 200, 150
    lengths = []
    for seed in range(runs):
        stream = (np.random.default_rng([13, seed]).random((1_600, 1)) < mean).astype(float)
        detector = make(1, mean=mean, slack=0.0, run_length=run_length)
        rows = 0
        while rows < len(stream) and not detector.drift_detected:
            detector.update(stream[rows : rows + 8])
            rows += 8
        lengths.append(rows)
    assert np.mean(lengths) >= run_length


def test_no_alarm_while_the_mean_stays_anywhere_within_its_band(rng):
    detector = make(1, slack=0.1, run_length=20_000.0)
    for mean in (0.41, 0.59, 0.5):
        detector.update((rng.random((3_000, 1)) < mean).astype(float))
    assert not detector.drift_detected


@pytest.mark.parametrize(("shift", "most"), [(0.1, 600), (0.2, 150), (0.4, 60)])
def test_a_shift_is_detected_soon_and_a_larger_one_sooner(shift, most):
    delays = []
    for seed in range(10):
        rng = np.random.default_rng([17, seed])
        stream = rng.uniform(0.25, 0.75, (1_500, 12))
        stream[500:, 4] += rng.choice([-1, 1]) * shift
        alarm = first_alarm(make(12, run_length=30_000.0), np.clip(stream, 0, 1))
        assert alarm is not None
        assert alarm >= 500
        delays.append(alarm - 500)
    assert max(delays) <= most


def test_sides_up_ignores_improvement_and_sees_decline(rng):
    calm, better, worse = ((rng.random((800, 1)) < p).astype(float) for p in (0.3, 0.02, 0.6))
    both, up = make(1, mean=0.3), make(1, mean=0.3, sides="up")
    for detector in (both, up):
        detector.update(calm)
        detector.update(better)
    assert both.drift_detected
    assert not up.drift_detected
    up.update(worse[:200])
    assert up.drift_detected


@pytest.mark.parametrize("shift", [-0.3, 0.3])
def test_suspects_name_the_shifted_channel_first_with_its_shift(rng, shift):
    stream = rng.uniform(0.3, 0.7, (400, 6))
    stream[200:, 3] += shift
    detector = make(6)
    detector.update(stream)
    suspects = detector.suspects()
    assert len(suspects) == 3
    assert suspects[0][0] == 3
    assert suspects[0][1] == pytest.approx(shift, abs=0.08)


def test_warning_comes_before_the_alarm(rng):
    detector = make(1, run_length=100_000.0)
    warned = None
    for index in range(2_000):
        detector.update(rng.uniform(0.4, 0.9, (1, 1)))
        if detector.warning and warned is None:
            warned = index
        if detector.drift_detected:
            break
    assert warned is not None
    assert warned < index < 1_999


@pytest.mark.parametrize("mean", [0.0, 1e-4, 1 - 1e-4, 1.0])
def test_a_mean_close_to_the_end_of_its_range_keeps_the_budget(mean):
    """A label that hardly ever comes: betting on even less of it must not win."""
    detector = make(2, mean=mean, slack=0.0, run_length=30_000.0)
    detector.update(np.full((29_000, 2), mean))
    assert not detector.drift_detected


@pytest.mark.parametrize(
    ("mean", "value"), [(0.0, 1.0), (1.0, 0.0), (2e-4, 0.0), (1 - 2e-4, 1.0), (0.5, 1.0), (0.5, 0.0)]
)
@pytest.mark.parametrize(("rows", "stride"), [(1, 1), (1, 32), (32, 8), (1_000, 1), (1_000, 32)])
def test_extreme_streams_stay_finite_and_raise_no_numpy_warning(mean, value, rows, stride):
    detector = make(2, mean=mean, slack=0.0, run_length=1e4, stride=stride)
    for _ in range(4_000 // rows):
        detector.update(np.full((rows, 2), value))
    assert math.isfinite(detector.evidence)
    assert all(np.isfinite(array).all() for array in detector.state().values())
    assert detector.drift_detected == (abs(mean - value) > 0.1)


@pytest.mark.parametrize(
    ("mean", "slack", "options", "message"),
    [
        (np.zeros(0), np.zeros(0), {}, "one value a channel"),
        (np.zeros(3), np.zeros(2), {}, "one value a channel"),
        (np.zeros((2, 2)), np.zeros((2, 2)), {}, "one value a channel"),
        (np.zeros(2), np.zeros(2), {"run_length": 1.0}, "above 1"),
        (np.zeros(2), np.zeros(2), {"run_length": math.inf}, "above 1"),
        (np.zeros(2), np.zeros(2), {"sides": "down"}, "sides"),
        (np.zeros(2), np.zeros(2), {"stride": 0}, "stride"),
        (np.zeros(2), np.zeros(2), {"stride": 33}, "stride"),
    ],
)
def test_impossible_settings_are_refused(mean, slack, options, message):
    with pytest.raises(ValueError, match=message):
        EDetector(mean, slack, **{"run_length": 100.0, **options})


@pytest.mark.parametrize("other", [make(4), make(3, sides="up")], ids=["channels", "sides"])
def test_the_state_of_another_detector_is_refused(other):
    with pytest.raises(ValueError, match="state of"):
        make(3).restore(other.state())


def test_a_state_deeper_within_a_step_than_the_stride_is_refused():
    long = make(3, stride=8)
    long.update(np.full((5, 3), 0.5))
    with pytest.raises(ValueError, match="stride of 4"):
        make(3, stride=4).restore(long.state())


@pytest.mark.parametrize("stride", [1, 8])
def test_rows_of_zeros_are_folded_the_short_way_with_the_same_result(rng, stride):
    """In whole steps they are; split within a step they are not."""
    mean, slack = rng.random(5) * 0.1, np.full(5, 0.01)
    short, split = (EDetector(mean, slack, run_length=1000.0, sides="up", stride=stride) for _ in range(2))
    rows = np.concatenate([np.zeros((32, 5)), (rng.random((32, 5)) < 0.2).astype(float), np.zeros((64, 5))])
    for start in range(0, 128, 32):
        short.update(rows[start : start + 32])
    for start in range(0, 128, 4):
        split.update(rows[start : start + 4])
    np.testing.assert_allclose(short.state()["m"], split.state()["m"], rtol=1e-4)
    assert short.evidence == pytest.approx(split.evidence, rel=1e-4)
