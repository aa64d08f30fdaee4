import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_quantize import Calibration, CalibrationWarning, DataError
from edge_quantize.calibrate import ArrayReader, calibration_rows, latent_range


@given(st.floats(-100, 100), st.floats(0.01, 100))
def test_every_calibrated_value_is_within_a_step_and_zero_is_exact(low, width):
    features = np.linspace(low, low + width, 32, dtype=np.float32).reshape(8, 4)
    spec = latent_range(features, Calibration())
    codes = np.clip(np.rint(features / np.float32(spec.scale)) + spec.zero_point, 0, 255)
    assert np.abs((codes - spec.zero_point) * spec.scale - features).max() <= spec.scale * 1.01
    assert 0 <= spec.zero_point <= 255
    assert spec.dim == 4


def test_percentile_ignores_an_outlier_that_min_max_follows():
    features = np.random.default_rng(0).random((1000, 4)).astype(np.float32)
    features[0, 0] = 100
    by_extremes = latent_range(features, Calibration())
    by_percentile = latent_range(features, Calibration(method="percentile", percentile=99.9))
    assert by_percentile.scale * 50 < by_extremes.scale


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_dead_or_broken_latent_is_refused(value):
    with pytest.raises(DataError, match="the network is dead on these rows"):
        latent_range(np.full((20, 3), value, np.float32), Calibration())


def test_too_few_calibration_rows_are_refused_and_few_are_warned_of():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="at least 16 rows are needed, got 3"):
        calibration_rows(np.zeros((3, 2), np.float32), max_rows=512, rng=rng)
    with pytest.warns(CalibrationWarning, match="calibration on 20 rows"):
        assert len(calibration_rows(np.zeros((20, 2), np.float32), max_rows=512, rng=rng)) == 20


def test_more_rows_than_needed_are_sampled_without_repetition():
    x = np.arange(1000, dtype=np.float32)[:, None]
    rows = calibration_rows(x, max_rows=200, rng=np.random.default_rng(0))
    assert len(np.unique(rows)) == 200
    again = calibration_rows(x, max_rows=200, rng=np.random.default_rng(0))
    assert np.array_equal(rows, again)


def test_reader_gives_every_row_once_under_the_input_name():
    x = np.arange(600, dtype=np.float32)[:, None]
    reader = ArrayReader(x, input_name="input")
    batches = list(iter(reader.get_next, None))
    assert np.array_equal(np.concatenate([batch["input"] for batch in batches]), x)


@pytest.mark.parametrize("setting", [{"percentile": 30.0}, {"percentile": 100.5}, {"max_rows": 4}])
def test_calibration_out_of_range_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Calibration(**setting)
