"""Variants of real checkpoints of every task side by side, on networks whose answers are known."""

import functools
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_quantize.compare import Comparison, compare_variants, contrast_outputs
from edge_quantize.errors import DataError
from edge_quantize.quantize import head_graph, quantize_trunk, quantize_whole
from edge_sdk.errors import IncompatibleError
from edge_sdk.head import Head
from edge_sdk.manifest import (
    HEAD_NPZ,
    HEAD_ONNX,
    MANIFEST_NAME,
    MODEL_FP32,
    MODEL_INT8,
    TRUNK_FP32,
    TRUNK_INT8,
    FileEntry,
    HeadSpec,
    LatentSpec,
    Manifest,
    StateSpec,
    TargetSpec,
    manifest_bytes,
)
from edge_sdk.schema import InputSpec

pytestmark = pytest.mark.torch

INPUTS, WIDTH, ROWS = 6, 16, 240
EVIL = "<script>alert('x')</script> & \"co\""
LABELS = {
    "classification": ("a", EVIL, "c"),
    "multilabel": ("red", EVIL, "wet"),
    "regression": ("load", EVIL),
}
TARGETS = [TargetSpec(mean=5, std=2, tolerance=0.5), TargetSpec(mean=-100, std=30, tolerance=10)]


def graph(nodes, initializers, inputs, outputs):
    """An ONNX network of named float arrays, [batch, width] unless a whole shape is given."""

    def info(name, shape):
        shape = shape if isinstance(shape, list) else ["batch", shape]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    made = helper.make_graph(
        [helper.make_node(op, sources, sinks, name=sinks[0]) for op, sources, sinks in nodes],
        "test",
        [info(*item) for item in inputs.items()],
        [info(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in initializers.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@dataclass(frozen=True)
class Made:
    folder: Path
    x: np.ndarray
    y: np.ndarray | None
    reference: Path


def write(folder, manifest, files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    named = {name: FileEntry(0, "0" * 64) for name in {*manifest.required, *files}}
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(msgspec.structs.replace(manifest, files=named)))
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A checkpoint with a head, and rows whose truth the float network itself has said, with some noise."""

    def run(task):
        rng = np.random.default_rng(7)
        labels = LABELS[task]
        w0, b0 = rng.normal(size=(INPUTS, WIDTH)), rng.normal(size=WIDTH)
        w1, b1 = rng.normal(size=(WIDTH, len(labels))) / 4, rng.normal(size=len(labels)) / 4
        dense = [("Gemm", ["x", "w0", "b0"], ["dense"]), ("Relu", ["dense"], ["features"])]
        weights = {"w0": w0, "b0": b0}
        trunk = graph(dense, weights, {"x": INPUTS}, {"features": WIDTH})
        whole = graph([*dense, ("Gemm", ["features", "w1", "b1"], ["y"])], {**weights, "w1": w1, "b1": b1},
                      {"x": INPUTS}, {"y": len(labels)})  # fmt: skip
        x = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
        trunks = quantize_trunk(trunk, x[:100])
        head = Head({"W0": w1.astype(np.float32), "b0": b1.astype(np.float32)}, labels)
        targets = TARGETS if task == "regression" else []
        manifest = Manifest(
            name="demo", release=3, created="", task=task, labels=list(labels), latent=trunks.latent, head=HeadSpec(),
            input=InputSpec([INPUTS], name="x"), targets=targets, files={},
            thresholds=[0.5, 0.4, 0.6] if task == "multilabel" else [],
        )  # fmt: skip
        logits = np.maximum(x @ w0 + b0, 0) @ w1 + b1 + rng.normal(size=(ROWS, len(labels))) / 10
        y = {
            "classification": lambda: logits.argmax(1),
            "multilabel": lambda: (1 / (1 + np.exp(-logits)) >= [0.5, 0.4, 0.6]).astype(np.int64),
            "regression": lambda: logits * [2, 30] + [5, -100],
        }[task]()
        home = tmp_path_factory.mktemp(task)
        folder = write(home / "demo-3", manifest, {
            TRUNK_INT8: trunks.int8, TRUNK_FP32: trunks.fp32, HEAD_NPZ: head.to_bytes(),
            HEAD_ONNX: head_graph(head, trunks.latent, task=task, targets=targets),
        })  # fmt: skip
        onnx.save(whole, home / "whole.onnx")
        return Made(folder, x, y, home / "whole.onnx")

    return functools.cache(run)


@pytest.fixture(scope="module")
def compared(make):
    """One comparison for each task, with a reference and slices; memory only once."""
    found = {}

    def run(task):
        if task not in found:
            made = make(task)
            slices = {"night": np.arange(ROWS) % 2 == 0, EVIL: np.arange(ROWS) < 20}
            found[task] = compare_variants(made.folder, made.x, made.y, slices=slices, reference=made.reference,
                                           repeats=10, memory=task == "classification")  # fmt: skip
        return found[task]

    return run


@pytest.mark.parametrize("task", LABELS)
def test_every_task_is_scored_overall_by_label_and_by_slice(compared, task):
    result = compared(task)
    assert list(result.variants) == ["int8", "fp32", "reference"]
    for variant in result.variants.values():
        assert 0.5 < variant.accuracy.value <= 1  # the truth is the network's own, but for the noise
        assert variant.accuracy.low <= variant.accuracy.value <= variant.accuracy.high
        assert list(variant.by_label) == list(LABELS[task])
        assert variant.by_slice["night"].rows == ROWS / 2
        assert variant.by_slice[EVIL].rows == 20
        assert [timing.batch for timing in variant.timings] == [1, 32]
        assert all(0 < timing.p50_ms <= timing.p95_ms <= timing.p99_ms for timing in variant.timings)
    pairs = [(contrast.first, contrast.second) for contrast in result.contrasts]
    assert pairs == [("int8", "fp32"), ("int8", "reference"), ("fp32", "reference")]
    against_float, _, against_whole = result.contrasts
    assert result.agreement == against_float.agreement.value > 0.9
    assert 20 < against_float.outputs["latent"].sqnr_db < 60
    assert against_whole.outputs.keys() == {"logits"} | ({"values"} if task == "regression" else {"probabilities"})
    assert against_whole.outputs["logits"].sqnr_db > 20  # the float trunk, too, ends in eight bits
    assert abs(against_float.difference.value) < 0.1
    assert (against_float.error_ratio is not None) == (task == "regression")


def test_reference_that_ends_in_its_own_sigmoid_is_read_as_it_is(make, compared, tmp_path):
    made = make("multilabel")
    model = onnx.load(made.reference)
    model.graph.node.append(helper.make_node("Sigmoid", ["y"], ["p"], name="p"))
    model.graph.output[0].name = "p"
    onnx.save(model, tmp_path / "ends.onnx")
    result = compare_variants(made.folder, made.x, made.y, reference=tmp_path / "ends.onnx", reference_ends="sigmoid",
                              repeats=5, memory=False)  # fmt: skip
    assert result.variants["reference"].score == compared("multilabel").variants["reference"].score
    assert result.contrasts[-1].outputs.keys() == {"probabilities"}


def test_float_variant_scores_as_the_arithmetic_says(make, compared):
    made, result = make("regression"), compared("regression")
    whole = result.variants["reference"].by_label["load"]
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.reference).graph.initializer}
    logits = np.maximum(made.x @ weights["w0"] + weights["b0"], 0) @ weights["w1"] + weights["b1"]
    error = logits[:, 0] * 2 + 5 - made.y[:, 0]
    assert whole.rmse.value == pytest.approx(float(np.sqrt((error**2).mean())), rel=1e-4)
    assert whole.accuracy.value == pytest.approx(float((np.abs(error) <= 0.5).mean()))


def test_memory_is_that_of_a_process_that_only_serves(compared):
    for variant in compared("classification").variants.values():
        memory = variant.footprint
        assert 10 < memory.imports_mb < memory.loaded_mb <= memory.peak_mb < 500
    assert all(variant.footprint is None for variant in compared("multilabel").variants.values())


@pytest.mark.parametrize("task", LABELS)
def test_json_comes_back_as_the_same_comparison(compared, task):
    result = compared(task)
    assert msgspec.json.decode(result.to_json(), type=Comparison) == result
    assert json.loads(result.to_json())["variants"]["int8"]["score"]["rows"] == ROWS


@pytest.mark.parametrize("task", LABELS)
def test_table_has_a_line_for_each_variant_label_and_slice(compared, task):
    text = compared(task).table()
    starts = [line.split()[0] for line in text.splitlines()]
    assert starts[:4] == ["accuracy", "INT8", "FP32", "unsplit"]
    assert "240 rows" in text
    assert "INT8 against FP32: agreement" in text
    assert "night" in text
    assert LABELS[task][0] in starts
    assert ("RSS MB" in text) == (task == "classification")
    assert ("RMSE" in text) == (task == "regression")
    assert ("Hamming" in text) == (task == "multilabel")


def test_names_cannot_command_a_terminal(compared):
    result = compared("classification")
    shown = msgspec.structs.replace(
        result.int8, by_slice={"\x1b[2Jgone\n": result.int8.by_slice["night"]}, by_label=result.int8.by_label
    )
    text = msgspec.structs.replace(result, variants={"int8": shown}, contrasts=[]).table()
    assert "\x1b" not in text
    assert any(line.startswith(" [2Jgone") for line in text.splitlines())


# ---- the page


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what they hold."""

    VOID = ("meta", "br", "hr", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "style")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("task", LABELS)
def test_page_is_well_formed_and_needs_nothing_else(compared, task):
    text = compared(task).to_html()
    page = Page(text)
    assert "script" not in page.tags
    assert page.addresses == []
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert any(EVIL in part for part in page.texts)  # as text, after unescaping
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert page.tags.count("svg") > 10


def test_strips_are_valid_svg_inside_their_scale(compared):
    text = compared("classification").to_html()
    strips = [part.partition("</svg>")[0] for part in text.split("<svg")[1:]]
    for strip in strips:
        root = ET.fromstring(f"<svg{strip}</svg>")
        assert root.get("aria-label")
        for shape in root:
            left, width = float(shape.get("x")), float(shape.get("width"))
            assert 0 <= left <= 100
            assert width >= 0
            assert left + width <= 100.5, strip


def test_page_takes_in_the_sensitivity_of_the_layers(compared):
    class Measured:
        def plot(self):
            return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><text>dB</text></svg>'

        def table(self):
            return "layer  <Gemm>"

    text = compared("classification").to_html(sensitivity=Measured())
    page = Page(text)
    assert "://" not in text
    assert "Sensitivity of the layers" in page.texts
    assert "layer  <Gemm>" in page.texts


# ---- models that are served whole


def whole_model(tmp_path, *, task="raw", labels=(), int8=True, **changes):
    """A dense model with two outputs, packed with adapt=none."""
    rng = np.random.default_rng(3)
    width = len(labels) or 4
    weights = {"w0": rng.normal(size=(INPUTS, WIDTH)), "w1": rng.normal(size=(WIDTH, width))}
    end = [("Softmax", ["dense"], ["p"])] if labels else [("Identity", ["dense"], ["p"])]
    nodes = [("MatMul", ["x", "w0"], ["m"]), ("Relu", ["m"], ["h"]), ("MatMul", ["h", "w1"], ["dense"]), *end]
    model = graph(nodes, weights, {"x": INPUTS}, {"p": width, "h": WIDTH})
    x = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    files = {MODEL_FP32: model.SerializeToString()}
    if int8:
        files[MODEL_INT8] = quantize_whole(model, x[:100])
    manifest = Manifest(name="whole", release=1, created="", adapt="none", task=task, labels=list(labels),
                        latent=LatentSpec(), input=InputSpec([INPUTS], name="x"), files={}, **changes)  # fmt: skip
    logits = np.maximum(x @ weights["w0"], 0) @ weights["w1"]
    return write(tmp_path / "whole", manifest, files), x, logits.argmax(1)


def test_raw_model_is_compared_output_by_output(tmp_path):
    folder, x, _ = whole_model(tmp_path)
    result = compare_variants(folder, x, repeats=5, memory=False)
    assert result.int8.score is None
    assert np.isnan(result.agreement)
    (contrast,) = result.contrasts
    assert contrast.outputs.keys() == {"p", "h"}
    assert 20 < contrast.outputs["p"].sqnr_db < 60
    assert contrast.outputs["p"].largest > 0
    assert msgspec.json.decode(result.to_json(), type=Comparison) == result
    assert "SQNR, INT8 against FP32: p " in result.table()
    assert "How right" in Page(result.to_html()).texts
    with pytest.raises(ValueError, match="raw model has no accuracy"):
        _ = result.int8.accuracy
    with pytest.raises(DataError, match="knows no truth"):
        compare_variants(folder, x, np.zeros(ROWS), memory=False)


def test_whole_model_with_a_task_is_scored_and_its_memory_measured(tmp_path):
    folder, x, y = whole_model(tmp_path, task="classification", labels=("a", "b", "c"))
    result = compare_variants(folder, x, y, repeats=5)
    assert result.fp32.accuracy.value == 1.0
    assert result.int8.accuracy.value > 0.9
    assert result.int8.footprint.loaded_mb > result.int8.footprint.imports_mb
    with pytest.raises(IncompatibleError, match="its own reference"):
        compare_variants(folder, x, y, reference=folder / MODEL_FP32)


def test_model_that_ships_in_float_alone_is_measured_alone(tmp_path):
    folder, x, _ = whole_model(tmp_path, int8=False)
    result = compare_variants(folder, x, repeats=5, memory=False)
    assert list(result.variants) == ["fp32"]
    assert result.contrasts == []
    assert "FP32" in result.table()
    Page(result.to_html())


def test_recurrent_model_with_two_inputs_takes_the_rows_as_one_recording(tmp_path):
    nodes = [("Add", ["x", "bias"], ["sum"]), ("Add", ["sum", "state"], ["p"]), ("Identity", ["p"], ["next"])]
    two = [1, 2]
    model = graph(nodes, {}, {"x": two, "bias": two, "state": two}, {"next": two, "p": two})
    manifest = Manifest(
        name="whole", release=1, created="", adapt="none", task="classification", labels=["a", "b"],
        input=InputSpec([2], name="x"), more_inputs=[InputSpec([2], name="bias")],
        state=[StateSpec(input="state", output="next", shape=two)], files={},
    )  # fmt: skip
    folder = write(tmp_path / "lstm", manifest, {MODEL_FP32: model.SerializeToString()})
    x = [{"x": np.array([i == 0, 0.3], np.float32), "bias": np.zeros(2, np.float32)} for i in range(10)]
    truth = (np.arange(10) >= 3).astype(np.int64)  # 0.3 of each row adds up until it exceeds the 1 of the first
    result = compare_variants(folder, x, truth, repeats=5, memory=False)
    assert result.fp32.accuracy.value == 1.0
    assert [timing.batch for timing in result.fp32.timings] == [1]


def test_outputs_of_another_shape_are_counted_and_left_out():
    boxes = [{"boxes": np.ones((2, 4)), "count": np.array([2])}, {"boxes": np.ones((1, 4)), "count": np.array([1])}]
    more = [{"boxes": np.ones((2, 4)), "count": np.array([2])}, {"boxes": np.ones((3, 4)), "count": np.array([3])}]
    found, differ = contrast_outputs(boxes, more)
    assert differ == 1
    assert (found["boxes"].equal, found["boxes"].largest, found["boxes"].sqnr_db) == (1.0, 0.0, None)
    assert contrast_outputs(boxes[1:], more[1:]) == ({}, 1)


def test_rows_that_do_not_fit_are_refused(make):
    made = make("classification")
    with pytest.raises(DataError, match="holdout: y must be one integer for each of 240 rows"):
        compare_variants(made.folder, made.x, made.y[:-1])
    with pytest.raises(DataError, match="holdout: input 'x': expected shape"):
        compare_variants(made.folder, made.x[:, :2], made.y)
    with pytest.raises(IncompatibleError, match=r"whole\.onnx puts out .* the checkpoint has 3 labels"):
        compare_variants(made.folder, made.x, made.y, reference=make("regression").reference, memory=False)
