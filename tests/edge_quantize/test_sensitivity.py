import xml.etree.ElementTree as ET

import msgspec
import numpy as np
import onnx
import pytest

from edge_quantize import Calibration, DataError
from edge_quantize.quantize import Quantizer, QuantRecipe
from edge_quantize.sensitivity import EXACT_DB, LayerSensitivity, Sensitivity, measure, sensitivity

PER_TENSOR = QuantRecipe(per_channel=False)


def network(*, depthwise=1.0, hidden=1.0):
    """Three convolutions; `depthwise` spreads the channels' weights, `hidden` blows one channel up and down again."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 1, 8, 8] x) => (float[batch, 8] features) {
            [first] a = Conv<pads = [1, 1, 1, 1]>(x, w1)
            [relu1] b = Relu(a)
            [middle] c = Conv<pads = [1, 1, 1, 1], group = 8>(b, w2)
            [relu2] d = Relu(c)
            [last] e = Conv<pads = [1, 1, 1, 1]>(d, w3)
            [relu3] f = Relu(e)
            [pool] g = GlobalAveragePool(f)
            [flat] features = Flatten(g)
        }"""
    )
    spread = np.logspace(0, -np.log10(depthwise), 8)
    big = np.where(np.arange(8) == 3, hidden, 1.0)
    weights = {
        "w1": rng.normal(size=(8, 1, 3, 3)),
        "w2": rng.normal(size=(8, 1, 3, 3)) * (spread * big)[:, None, None, None],
        "w3": rng.normal(size=(8, 8, 3, 3)) / (spread * big**1.3)[None, :, None, None],
    }
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    return model


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(1).normal(size=(100, 1, 8, 8)).astype(np.float32)


def test_plain_network_loses_little_in_every_layer(rows):
    result = sensitivity(network(), rows)
    assert {layer.name for layer in result.layers} >= {"first", "middle", "last"}
    assert min(layer.own_db for layer in result.layers) > 25
    assert result.output_db > 30
    assert result.rows == 64


def test_layer_of_very_different_channels_loses_per_tensor_and_its_weights_are_named(rows):
    model = network(depthwise=300.0)
    coarse, fine = (sensitivity(model, rows, recipe) for recipe in (PER_TENSOR, QuantRecipe()))
    by_name = {layer.name: layer for layer in coarse.layers}
    assert by_name["middle"].own_db < {layer.name: layer for layer in fine.layers}["middle"].own_db
    assert "last" in coarse.worst(1)  # its inputs are far smaller than the range they share
    assert coarse.output_db < fine.output_db


def test_weights_are_the_cause_where_one_scale_serves_very_different_channels(rows):
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 4] x) => (float[batch, 4] y) {
            [even] a = MatMul(x, w1)
            [uneven] b = MatMul(a, w2)
            [back] y = MatMul(b, w3)
        }"""
    )
    # what the second layer reads needs its small weights, and those are lost beside the large one
    w2 = np.diag([1.0, 1.0, 1.0, 1.0])
    w2[3, 3] = 400
    w1 = rng.normal(size=(4, 4)) * [1, 1, 1, 1 / 400]
    for name, value in {"w1": w1, "w2": w2, "w3": rng.normal(size=(4, 4))}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    x = rng.normal(size=(200, 4)).astype(np.float32)
    worst = sensitivity(model, x, PER_TENSOR).layers[0]
    assert (worst.name, worst.cause) == ("uneven", "weights")
    assert worst.float_nodes == ("uneven",)


def test_activation_outlier_is_found_with_all_that_round_it(rows):
    model = network(hidden=3000.0)
    result = sensitivity(model, rows)
    assert {"middle", "last"} <= set(result.worst(1))
    assert result.output_db < 15
    assert result.layers[0].cause in ("input", "output")
    mended = sensitivity(model, rows, QuantRecipe(float_nodes=result.worst(1)))
    assert mended.output_db > result.output_db + 20


def test_percentile_helps_where_few_values_are_outliers(rows):
    x = rows.copy()
    x[7, 0, 2, 2] = 500  # one pixel of 6400
    by_extremes = sensitivity(network(), x, QuantRecipe(), rows=7)
    clipped = QuantRecipe(calibration=Calibration(method="percentile", percentile=99.9))
    assert sensitivity(network(), x, clipped, rows=7).output_db > by_extremes.output_db + 10


def test_gain_is_measured_exactly_and_orders_the_layers(rows):
    result = sensitivity(network(hidden=3000.0), rows, exact=True)
    gains = [layer.gain_db for layer in result.layers]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 20
    assert "last" in result.layers[0].float_nodes
    assert next(layer.gain_db for layer in result.layers if layer.name == "first") < 1


def test_layer_in_float_is_no_longer_listed_once_nothing_rounds_it(rows):
    result = sensitivity(network(), rows, QuantRecipe(float_nodes=("last", "relu3", "pool", "flat")))
    assert {layer.name for layer in result.layers} == {"first", "middle"}


def test_whole_network_of_several_inputs_is_measured_call_by_call():
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 8] x, float[1, batch, 5] state) => (float[1, batch, 5] next) {
            [left] a = MatMul(x, w1)
            [right] b = MatMul(state, w2)
            [sum] next = Add(a, b)
        }"""
    )
    for name, shape in {"w1": (8, 5), "w2": (5, 5)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    x = {"x": rng.normal(size=(40, 8)), "state": rng.normal(size=(40, 1, 1, 5))}
    result = sensitivity(model, x, rows=30, exact=True)
    assert {"left", "right"} <= {layer.name for layer in result.layers}
    assert result.rows == 30
    assert result.output_db > 25
    with pytest.raises(DataError, match="no calibration rows"):
        sensitivity(model, x, rows=0)


def test_measuring_changes_nothing(rows):
    quantizer = Quantizer(network(), rows)
    before = quantizer.model.SerializeToString(deterministic=True)
    assert measure(quantizer, QuantRecipe()) == measure(quantizer, QuantRecipe()) == sensitivity(network(), rows)
    assert quantizer.model.SerializeToString(deterministic=True) == before


def test_table_json_and_plot_tell_the_same(rows):
    result = sensitivity(network(), rows, exact=True)
    lines = result.table().splitlines()
    assert lines[0].split() == ["layer", "op", "own", "dB", "output", "dB", "gain", "dB", "cause"]
    assert [line.split()[0] for line in lines[1:-1]] == [layer.name for layer in result.layers]
    assert msgspec.json.decode(result.to_json(), type=Sensitivity) == result
    bars = ET.fromstring(result.plot()).findall(".//{*}rect")
    assert len(bars) == len(result.layers)
    assert len(ET.fromstring(result.plot(count=2)).findall(".//{*}rect")) == 2


def test_plot_is_valid_whatever_the_layers_are_called():
    name = '/block<1>&"x"/]]>' + "long" * 20
    layers = [LayerSensitivity(name, "Conv", 30.0, own, "weights", (name,)) for own in (-5.0, 0.0, 25.0, EXACT_DB)]
    root = ET.fromstring(Sensitivity(QuantRecipe(), 64, 30.0, layers).plot())
    widths = [float(bar.attrib["width"]) for bar in root.findall(".//{*}rect")]
    assert widths == sorted(widths)
    assert widths[0] == 0
    assert root.find(".//{*}g/{*}title").text.startswith(name)
    assert ET.fromstring(Sensitivity(QuantRecipe(), 64, 30.0, []).plot()).tag.endswith("svg")
