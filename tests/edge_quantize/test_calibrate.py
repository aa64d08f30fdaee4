import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_quantize import Calibration, CalibrationWarning, DataError
from edge_quantize.calibrate import (
    Activations,
    Probe,
    calibration_rows,
    calls,
    check_inputs,
    check_saturation,
    entropy_limit,
    latent_range,
    percentile_limit,
    saturated_share,
)
from edge_sdk.errors import RuntimeUnavailableError
from edge_sdk.manifest import LatentSpec
from edge_sdk.schema import Column, InputSpec

METHODS = ["minmax", "percentile", "entropy"]


def parse(text, **constants):
    """A graph in ONNX's text form; the constants become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return onnx.shape_inference.infer_shapes(model)


def relu_net():
    return parse("g (float[N, 3] x) => (float[N, 3] y) { d = Add(x, b)\n y = Relu(d) }", b=np.full(3, 0.5, np.float32))


@given(st.floats(-100, 100), st.floats(0.01, 100))
def test_every_calibrated_value_is_within_a_step_and_zero_is_exact(low, width):
    features = np.linspace(low, low + width, 32, dtype=np.float32).reshape(8, 4)
    spec = latent_range(features, Calibration())
    codes = np.clip(np.rint(features / np.float32(spec.scale)) + spec.zero_point, 0, 255)
    assert np.abs((codes - spec.zero_point) * spec.scale - features).max() <= spec.scale * 1.01
    assert 0 <= spec.zero_point <= 255
    assert spec.dim == 4


@pytest.mark.parametrize("config", [Calibration(method="percentile", percentile=99.9), Calibration(method="entropy")])
def test_percentile_and_entropy_ignore_an_outlier_that_min_max_follows(config):
    features = np.random.default_rng(0).random((1000, 4)).astype(np.float32)
    features[0, 0] = 10
    assert latent_range(features, config).scale * 4 < latent_range(features, Calibration()).scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_dead_or_broken_latent_is_refused(value, method):
    with pytest.raises(DataError, match="the network is dead on these rows"), np.errstate(invalid="ignore"):
        latent_range(np.full((20, 3), value, np.float32), Calibration(method=method))


def test_too_few_calibration_rows_are_refused_and_few_are_warned_of():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="at least 16 rows are needed, got 3"):
        calibration_rows(np.zeros((3, 2), np.float32), max_rows=512, rng=rng)
    with pytest.warns(CalibrationWarning, match="calibration on 20 rows"):
        assert len(calibration_rows(rng.random((20, 2)), max_rows=512, rng=rng)) == 20


def test_more_rows_than_needed_are_sampled_without_repetition():
    x = np.arange(1000, dtype=np.float32)[:, None]
    rows = calibration_rows(x, max_rows=200, rng=np.random.default_rng(0))
    assert len(np.unique(rows)) == 200
    again = calibration_rows(x, max_rows=200, rng=np.random.default_rng(0))
    assert np.array_equal(rows, again)


@given(st.lists(st.integers(1, 80), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_sample_has_every_label_and_keeps_their_shares(sizes, seed):
    y = np.repeat(np.arange(len(sizes)), [100 + size for size in sizes]) * 3
    rare = np.flatnonzero(y == 0)[3:]
    y = np.delete(y, rare)  # three rows of label 0
    x = np.stack([np.arange(len(y)), y], axis=1).astype(np.float32)
    rows = calibration_rows(x, max_rows=100, rng=np.random.default_rng(seed), y=y)
    assert np.array_equal(rows, calibration_rows(x, max_rows=100, rng=np.random.default_rng(seed), y=y))
    assert len(np.unique(rows[:, 0])) == 100
    labels, counts = np.unique(rows[:, 1], return_counts=True)
    assert np.array_equal(labels, np.unique(y))
    expected = np.array([(y == label).mean() * 100 for label in labels])
    assert np.abs(counts - expected).max() <= 2


def test_sample_of_rows_with_several_labels_shows_each_label():
    rng = np.random.default_rng(0)
    y = rng.random((2000, 6)) < [0.5, 0.2, 0.1, 0.01, 0.002, 0.3]
    y[7, 4] = True
    positions = np.arange(2000)[:, None].astype(np.float32)
    rows = calibration_rows(positions, max_rows=64, rng=rng, y=y)
    assert len(np.unique(rows)) == 64
    assert y[rows[:, 0].astype(int)].any(axis=0).all()


def test_more_labels_than_calibration_rows_are_warned_of():
    y = np.repeat(np.arange(40), 5)
    with pytest.warns(CalibrationWarning, match="20 rows cannot show all 40 labels; raise max_rows"):
        rows = calibration_rows(np.arange(200.0)[:, None], max_rows=20, rng=np.random.default_rng(0), y=y)
    assert len(np.unique(y[rows[:, 0].astype(int)])) == 20


def test_missing_values_constant_channels_and_wrong_units_are_warned_of():
    rng = np.random.default_rng(0)
    x = rng.random((200, 3)).astype(np.float32)
    draw = {"max_rows": 512, "rng": rng}
    broken = x.copy()
    broken[::10, 1] = np.nan
    with pytest.warns(CalibrationWarning, match=r"3\.3% of the values are missing"):
        calibration_rows(broken, **draw)
    dead = x.copy()
    dead[:, 2] = 4
    names = InputSpec(shape=[3], columns=[Column(name=name) for name in ("a", "b", "c")])
    with pytest.warns(CalibrationWarning, match="channel c never changes"):
        calibration_rows(dead, spec=names, **draw)
    with pytest.warns(CalibrationWarning, match="channel 2 never changes"):
        calibration_rows(dead, held_out=x, **draw)
    with pytest.warns(CalibrationWarning, match=r"100\.0% of the values lie outside what the input contract allows"):
        calibration_rows(x, spec=InputSpec(shape=[3], low=10, high=255), **draw)
    columns = [Column(name="a", high=-1.0), Column(name="b", low=0.0), Column(name="c")]
    with pytest.warns(CalibrationWarning, match=r"33\.3% of the values lie outside"):
        calibration_rows(x, spec=InputSpec(shape=[3], columns=columns), **draw)


def test_channel_that_is_constant_everywhere_is_no_fault():
    x = np.random.default_rng(0).random((200, 3)).astype(np.float32)
    x[:, 1] = 0
    rows = calibration_rows(x[:150], max_rows=512, rng=np.random.default_rng(0), held_out=x[150:])
    assert np.array_equal(rows, x[:150])


@pytest.mark.parametrize(("shape", "dead"), [((3, 8, 8), (slice(None), 1)), ((50, 3), (Ellipsis, 1))])
def test_constant_channels_are_found_in_images_and_windows(shape, dead):
    x = np.random.default_rng(0).random((120, *shape)).astype(np.float32)
    x[dead] = 0
    with pytest.warns(CalibrationWarning, match="channel 1 never changes"):
        calibration_rows(x, max_rows=512, rng=np.random.default_rng(0))


def test_saturation_on_other_rows_is_warned_of_and_on_like_rows_is_not():
    rng = np.random.default_rng(0)
    seen, like = (np.maximum(rng.normal(size=(300, 16)), 0).astype(np.float32) for _ in range(2))
    for method in METHODS:
        latent = latent_range(seen, Calibration(method=method))
        check_saturation(latent, seen, like)
        with pytest.warns(CalibrationWarning, match="on rows that were not calibrated on, .* on those that were"):
            check_saturation(latent, seen, like * 3)


def test_saturated_share_does_not_count_zeros():
    latent = LatentSpec(dim=4, scale=0.01, zero_point=0)
    features = np.array([[0, 0, 1, 3]], np.float32)
    assert saturated_share(features, latent) == 0.5
    assert saturated_share(features * 0, latent) == 0


def test_inputs_beyond_the_calibrated_ones_are_warned_of():
    x = {"x": np.linspace(0, 1, 200, dtype=np.float32), "n": np.arange(3)}
    check_inputs(x, {"x": x["x"] * 0.9, "n": np.arange(9)})
    with pytest.warns(CalibrationWarning, match=r"50\.0% of input 'x' lies outside 0 to 1"):
        check_inputs(x, {"x": x["x"] * 2})


@pytest.mark.parametrize("setting", [{"percentile": 30.0}, {"percentile": 100.5}, {"max_rows": 4}])
def test_calibration_out_of_range_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Calibration(**setting)


def test_ranges_are_those_of_every_tensor_of_the_graph():
    x = np.random.default_rng(0).normal(size=(700, 3)).astype(np.float32)
    ranges = Activations(relu_net(), x).ranges(Calibration())
    assert ranges["x"] == (x.min(), x.max())
    assert ranges["d"] == pytest.approx((x.min() + 0.5, x.max() + 0.5), rel=1e-6)
    assert ranges["y"] == pytest.approx((0, x.max() + 0.5), rel=1e-6)


def test_ranges_of_histograms_lie_within_the_extremes_and_leave_an_outlier_out():
    x = np.random.default_rng(0).normal(size=(3000, 3)).astype(np.float32)
    x[0, 0] = 60
    activations = Activations(relu_net(), x)
    for config in (Calibration(method="percentile", percentile=99.9), Calibration(method="entropy")):
        for name, (low, high) in activations.ranges(config).items():
            least, most = activations.extremes[name]
            assert least <= low <= high <= most, name
            assert high < 20, name


def test_histograms_take_no_more_room_for_more_rows_or_wider_ones():
    x = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    x[300:] *= 1e6  # the bins of a histogram that grows with what it meets would number millions
    counts = [len(bins) for bins, _ in Activations(relu_net(), x).histograms.values()]
    assert set(counts) == {2048}


def test_tensor_that_is_not_finite_is_named():
    model = parse("g (float[N, 3] x) => (float[N, 3] y) { d = Log(x)\n y = Relu(d) }")
    with pytest.raises(DataError, match="tensor 'd' runs from nan to nan"):
        Activations(model, np.full((20, 3), -1, np.float32)).ranges(Calibration())


@given(st.integers(0, 2**32 - 1), st.floats(90, 100))
def test_percentile_limit_covers_the_share_asked_for_within_a_bin(seed, percentile):
    values = np.random.default_rng(seed).exponential(size=5000)
    counts, edges = np.histogram(values, bins=2048, range=(0, values.max()))
    limit = percentile_limit(counts.astype(float), 0, values.max(), percentile)
    assert (values <= limit + 1e-9).mean() * 100 >= percentile - 1e-9
    next_one = np.percentile(values, min(percentile + 0.02, 100), method="higher")  # a value of 5000
    assert limit <= next_one + 2 * edges[1]


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_entropy_limit_never_exceeds_the_largest_value_nor_clips_what_fits_exactly(seed, one_sided):
    values = np.random.default_rng(seed).exponential(size=2000)
    counts = np.histogram(values, bins=2048, range=(0, values.max()))[0].astype(float)
    assert 0 < entropy_limit(counts, values.max(), one_sided=one_sided) <= values.max()
    flat = np.ones(2048)
    assert entropy_limit(flat, 7.0, one_sided=one_sided) == 7.0


def test_rows_are_fed_in_batches_of_the_size_that_the_graph_fixes():
    x = np.arange(10, dtype=np.float64)[:, None]
    free = parse("g (float[N, 1] x) => (float[N, 1] y) { y = Relu(x) }")
    assert [len(feed["x"]) for feed in calls(free, x, rows=4)] == [4, 4, 2]
    assert next(calls(free, x, rows=4))["x"].dtype == np.float32
    fixed = parse("g (float[3, 1] x) => (float[3, 1] y) { y = Relu(x) }")
    assert [feed["x"][:, 0].tolist() for feed in calls(fixed, x, rows=4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_states_and_scalars_are_fed_call_by_call():
    model = parse(
        "g (float[N, 4] x, float[2, N, 3] state, int64 rate) => (float[N, 4] y) { y = Relu(x) }",
    )
    x = {"x": np.zeros((5, 4)), "state": np.arange(30.0).reshape(5, 2, 1, 3), "rate": np.array(16000)}
    feeds = list(calls(model, x, rows=256))
    assert [feed["x"].shape for feed in feeds] == [(1, 4)] * 5
    assert np.array_equal(feeds[3]["state"], x["state"][3])
    assert feeds[0]["rate"].dtype == np.int64
    assert [feed["rate"].item() for feed in feeds] == [16000] * 5
    again = list(calls(model, feeds, rows=256))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(feeds, again, strict=True) for name in a)


def test_missing_inputs_and_uneven_rows_are_refused():
    model = parse("g (float[N, 4] x, float[N, 3] z) => (float[N, 4] y) { y = Relu(x) }")
    with pytest.raises(DataError, match="lack input z; given are x"):
        next(calls(model, {"x": np.zeros((5, 4))}, rows=1))
    with pytest.raises(DataError, match=r"\[5, 6\] rows"):
        next(calls(model, {"x": np.zeros((5, 4)), "z": np.zeros((6, 3))}, rows=1))
    with pytest.raises(DataError, match="inputs x, z; give one array for each"):
        next(calls(model, np.zeros((5, 4)), rows=1))


def test_graph_that_the_engine_refuses_or_fails_on_is_a_clear_error():
    nobody = '<ir_version: 10, opset_import: ["" : 20, "nobody" : 1]> g (float[N] x) => (float[N] y) {y = nobody.Op(x)}'
    with pytest.raises(RuntimeUnavailableError, match="nobody:Op"):
        Probe(onnx.parser.parse_model(nobody), ["y"])
    with pytest.raises(RuntimeUnavailableError, match="fails on 'g'"):
        list(Probe(relu_net(), ["y"]).run(np.zeros((20, 5), np.float32)))
