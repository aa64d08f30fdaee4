"""From a network and its rows to a checkpoint: what is built for which task, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edge_quantize.build
from edge_quantize import Budget, CalibrationWarning, DataError, Dataset, ExportError, LeakageWarning, Search
from edge_quantize.build import build_checkpoint, standardised, stretches
from edge_quantize.edges import activated, fix_inputs, in_units
from edge_quantize.graph import load_onnx
from edge_quantize.rewrite import session_of
from edge_sdk.errors import ConfigError
from edge_sdk.files import load_npz
from edge_sdk.head import Head
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import CARD, HEAD_NPZ, MODEL_FP32, MODEL_INT8, MOMENTS_NPZ, SELFTEST_NPZ, StateSpec, TargetSpec
from edge_sdk.runtime import WholeModel
from edge_sdk.schema import InputSpec
from edge_sdk.selftest import choose_variant

pytestmark = pytest.mark.torch
CREATED = "2026-01-01T00:00:00Z"
TRAIN, HELD_OUT = 300, 220
X = np.random.default_rng(5).normal(size=(TRAIN + HELD_OUT, 6)).astype(np.float32)
W = np.random.default_rng(6).normal(size=(6, 3)).astype(np.float32)
LABEL = (X @ W).argmax(axis=1)
FLAGS = (X @ W > 0.5).astype(np.int64)
SPEC = InputSpec([6], name="x")
ABC = ("a", "b", "c")


def rows(y, *, train=True):
    if y is None:
        return Dataset(X[:TRAIN] if train else None, None, X[TRAIN:], None)
    return Dataset(X[:TRAIN] if train else None, y[:TRAIN] if train else None, X[TRAIN:], y[TRAIN:])


def graph(nodes, *, inputs=None, outputs=None, stored=None):
    """Nodes (operator, inputs, outputs) from `x` [N, 6]; weights `w` are those that the truth was made with."""
    shapes = [inputs or {"x": ["N", 6]}, outputs or {"y": ["N", 3]}]
    made = [helper.make_node(op, i, o, name=o[0]) for op, i, o in nodes]
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in part.items()] for part in shapes]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in {"w": W, **(stored or {})}.items()]
    model = helper.make_model(
        helper.make_graph(made, "made", *values, tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.checker.check_model(model)
    return model


LOGITS = graph([("MatMul", ["x", "w"], ["y"])])
SOFTMAX = graph([("MatMul", ["x", "w"], ["z"]), ("Softmax", ["z"], ["y"])])
STATEFUL = graph(
    [("MatMul", ["x", "w"], ["z"]), ("Mul", ["h", "fading"], ["faded"]), ("Add", ["z", "faded"], ["next"]),
     ("Tanh", ["next"], ["y"])],
    inputs={"x": [1, 6], "h": [1, 3]}, outputs={"next": [1, 3], "y": [1, 3]}, stored={"fading": np.float32(0.5)},
)  # fmt: skip
CARRIED = [StateSpec("h", "next", [1, 3])]


def build(target, model=LOGITS, y=LABEL, **changes):
    facts = {
        "labels": ABC, "name": "thing", "release": 1, "created": CREATED, "input_spec": SPEC, "measure_memory": False,
        "data": rows(y),
    }  # fmt: skip
    return build_checkpoint(model, target=target, **{**facts, **changes})


def mlp(*widths, last=()):
    """A torch network whose first layers keep the truth's weights out of it."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = []
    for before, after in zip((6, *widths), (*widths, 3), strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *last)


def fp32(folder):
    return WholeModel(folder / MODEL_FP32)


# ---- adapt levels


def test_network_that_can_learn_gets_a_head_and_one_asked_to_be_served_whole_does_not(tmp_path):
    net = mlp(16, 8)
    assert build(tmp_path / "head", net).manifest.adapt == "head"
    result = build(tmp_path / "none", net, adapt="none")
    assert (result.manifest.adapt, result.assessment.level) == ("none", "head")
    assert "as asked" in (tmp_path / "none" / CARD).read_text()
    assert set(result.manifest.model_files.values()) == {MODEL_FP32, MODEL_INT8}


def test_onnx_file_is_split_like_the_network_it_came_from(tmp_path):
    net = mlp(16, 8)
    from edge_quantize import export_onnx

    onnx.save(export_onnx(net, X[:2], input_name="x"), tmp_path / "net.onnx")
    one = build(tmp_path / "torch", net).manifest
    other = build(tmp_path / "onnx", tmp_path / "net.onnx").manifest
    assert one.trunk_id == other.trunk_id
    assert one.latent.dim == 8


def test_another_cut_leaves_more_for_the_head_to_learn(tmp_path):
    net = mlp(16, 8)
    found = build(tmp_path / "auto", net).assessment
    (wide,) = [cut.tensor for cut in found.cuts if cut.latent == 16]
    manifest = build(tmp_path / "wide", net, cut=wide).manifest
    assert (manifest.latent.dim, manifest.head.hidden) == (16, [8])


def test_network_of_the_classic_exporter_is_served_alike(tmp_path):
    net = mlp(16, 8)
    result = build(tmp_path / "classic", net, exporter="classic")
    assert result.comparison.fp32.accuracy == build(tmp_path / "dynamo", net).comparison.fp32.accuracy


def test_memory_is_measured_if_asked_for(tmp_path):
    result = build(tmp_path / "one", measure_memory=True)
    assert result.comparison.fp32.footprint.loaded_mb > 0
    assert build(tmp_path / "two").comparison.fp32.footprint is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "raw", "labels": (), "data": rows(None)}, "adapt=head takes one input and no state"),
        ({"state": CARRIED, "model": STATEFUL}, "adapt=head takes one input and no state"),
        ({"model": SOFTMAX, "task": "multilabel", "data": rows(FLAGS)}, "adapt=head is not possible"),
    ],
)
def test_head_that_is_asked_for_in_vain_is_refused(tmp_path, changes, message):
    with pytest.raises((ConfigError, ExportError), match=message):
        build(tmp_path / "none", adapt="head", **changes)
    assert not list(tmp_path.iterdir())


def test_network_that_ends_for_another_task_is_refused(tmp_path):
    from torch import nn

    with pytest.raises(ConfigError, match="ends in softmax, which is for classification, not for multilabel"):
        build(tmp_path / "none", mlp(16, 8, last=[nn.Softmax(dim=1)]), FLAGS, task="multilabel")


# ---- rows


def test_model_served_whole_needs_no_training_rows_but_rows_to_calibrate_on(tmp_path):
    with pytest.raises(DataError, match="needs calibration rows or training rows"):
        build(tmp_path / "none", data=rows(LABEL, train=False))
    calibrated = Dataset(None, None, X[TRAIN:], LABEL[TRAIN:], X[:TRAIN])
    assert MODEL_INT8 in build(tmp_path / "one", data=calibrated).manifest.files


def test_head_needs_training_rows_of_every_label(tmp_path):
    with pytest.raises(DataError, match=r"a checkpoint with a head needs the rows .* or ask for adapt=none"):
        build(tmp_path / "none", mlp(16, 8), data=rows(LABEL, train=False))
    with pytest.raises(DataError, match="no rows with label 'c'"):
        build(tmp_path / "none", mlp(16, 8), np.minimum(LABEL, 1))
    assert build(tmp_path / "whole", y=np.minimum(LABEL, 1)).manifest.adapt == "none"


@pytest.mark.parametrize("adapt", ["head", "none"])
def test_leaked_rows_are_told_of_once_and_stand_in_the_card(tmp_path, adapt):
    leaky = Dataset(X[:TRAIN], LABEL[:TRAIN], np.concatenate([X[:7], X[TRAIN:]]), np.r_[LABEL[:7], LABEL[TRAIN:]])
    with pytest.warns(LeakageWarning, match="7 of 227 held-out rows") as told:
        build(tmp_path / adapt, mlp(16, 8), data=leaky, adapt=adapt)
    assert len([w for w in told if w.category is LeakageWarning]) == 1
    assert "7 held-out rows are among the rows it was made from" in (tmp_path / adapt / CARD).read_text()


def test_held_out_rows_of_another_kind_than_those_calibrated_on_are_warned_of(tmp_path):
    data = Dataset(X[:TRAIN], LABEL[:TRAIN], X[TRAIN:] * 3, LABEL[TRAIN:])
    with pytest.warns(CalibrationWarning, match="of input 'x' lies outside"):
        build(tmp_path / "one", data=data)


# ---- what the first output means


def test_logits_of_a_classifier_get_a_softmax_and_probabilities_are_left_alone(tmp_path):
    build(tmp_path / "logits")
    build(tmp_path / "softmax", SOFTMAX)
    one, other = fp32(tmp_path / "logits"), fp32(tmp_path / "softmax")
    assert (one.outputs, other.outputs) == (["probabilities"], ["y"])
    assert np.allclose(one.run({"x": X[:9]})["probabilities"], other.run({"x": X[:9]})["y"], atol=1e-6)


def test_logits_of_a_multilabel_network_get_a_sigmoid_and_probabilities_are_left_alone(tmp_path):
    sigmoid = graph([("MatMul", ["x", "w"], ["z"]), ("Sigmoid", ["z"], ["y"])])
    settings = {"task": "multilabel", "y": FLAGS, "thresholds": [0.5, 0.6, 0.7]}
    result = build(tmp_path / "logits", **settings)
    build(tmp_path / "sigmoid", sigmoid, **settings)
    one, other = fp32(tmp_path / "logits"), fp32(tmp_path / "sigmoid")
    assert (one.outputs, other.outputs) == (["probabilities"], ["y"])
    assert np.allclose(one.run({"x": X[:9]})["probabilities"], other.run({"x": X[:9]})["y"], atol=1e-6)
    assert result.manifest.thresholds == [0.5, 0.6, 0.7]
    assert build(tmp_path / "plain", y=FLAGS, task="multilabel").manifest.thresholds == [0.5] * 3


def test_standardised_regression_that_is_served_whole_comes_back_to_its_units(tmp_path):
    y = (X @ W * [2, 20, 200] + [5, 50, 500]).astype(np.float32)
    targets = [TargetSpec(5, 2, 0.1), TargetSpec(50, 20, 1.0), TargetSpec(500, 200, 10.0)]
    result = build(tmp_path / "one", y=y, task="regression", targets=targets)
    model = fp32(tmp_path / "one")
    assert model.outputs == ["values"]
    assert np.allclose(model.run({"x": X[:9]})["values"], y[:9], rtol=1e-4)
    assert result.comparison.fp32.accuracy.value == 1.0
    assert result.manifest.targets == targets


def test_regression_in_its_own_units_gets_the_tolerance_that_nine_tenths_stay_within(tmp_path):
    y = X @ W + np.random.default_rng(1).normal(size=(len(X), 3)).astype(np.float32)
    manifest = build(tmp_path / "one", y=y, task="regression").manifest
    assert fp32(tmp_path / "one").outputs == ["y"]
    errors = np.abs(y[TRAIN:] - X[TRAIN:] @ W)
    assert [t.tolerance for t in manifest.targets] == pytest.approx(np.quantile(errors, 0.9, axis=0), rel=0.1)


def test_head_of_a_regression_with_one_target_is_standardised(tmp_path):
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[-1].weight *= 40
        net[-1].bias += 300
        y = net(torch.from_numpy(X)).numpy()[:, 0]
    result = build(tmp_path / "one", net, y, task="regression", labels=("power",))
    (target,) = result.manifest.targets
    assert (target.mean, target.std) == pytest.approx((y[:TRAIN].mean(), y[:TRAIN].std()), rel=1e-4)
    assert np.abs(Head.load(tmp_path / "one" / HEAD_NPZ).weights["b0"]).max() < 50
    assert target.tolerance < 0.2 * target.std


def test_standardised_head_says_the_same_values():
    head = Head({"W0": W, "b0": np.array([10, 20, 30], np.float32)}, ABC)
    y = head.logits(X)
    scaled, targets = standardised(head, y)
    assert scaled.logits(X).mean(axis=0) == pytest.approx([0, 0, 0], abs=1e-4)
    assert scaled.logits(X).std(axis=0) == pytest.approx([1, 1, 1], rel=1e-4)
    std, mean = (np.array([getattr(target, name) for target in targets]) for name in ("std", "mean"))
    assert np.allclose(scaled.logits(X) * std + mean, y, atol=1e-3)


def test_constant_target_does_not_divide_by_zero():
    scaled, (target,) = standardised(
        Head({"W0": np.zeros((6, 1), np.float32), "b0": np.array([4], np.float32)}, ("a",)),
        np.full((50, 1), 4, np.float32),
    )
    assert (target.mean, target.std) == (4.0, 1.0)
    assert not scaled.logits(X).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a", "b"), "y": LABEL % 2}, r"first output has shape \(1, 3\) .* for 2 labels .* use task=raw"),
        ({"thresholds": [0.5] * 3}, "task=classification with 3 outputs does not go with 3 thresholds"),
        ({"targets": [TargetSpec(0, 1, 1)]}, "does not go with 1 targets"),
        ({"y": FLAGS, "task": "multilabel", "thresholds": [0.5, 1.0, 0.5]}, r"between 0 and 1, got 1\.0"),
        ({"y": None, "task": "raw"}, "raw outputs have no labels"),
        ({"input_spec": InputSpec([6], name="x", dtype="int64")}, "'x' of the graph takes float32.* makes int64"),
        ({"input_spec": InputSpec([1, 6], name="x")}, r"the graph takes x float32 \[N, 6\], .* makes \[any, 1, 6\]"),
        ({"more_inputs": [InputSpec([2], name="z")]}, "the graph takes x; declared are x, z"),
        ({"state": [StateSpec("h", "y", [1, 3])]}, "the graph takes x; declared are x, h"),
        ({"fixed": {"gain": 2.0}}, "cannot fix 'gain': the graph's inputs are x"),
        ({"y": None, "task": "raw", "labels": (), "quantization": Search()}, "task=raw has none: state a recipe"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, changes, message):
    changes = dict(changes)
    y = changes.pop("y", LABEL)
    x = X[:, None] if changes.get("input_spec", SPEC).shape == [1, 6] else X
    if changes.get("input_spec", SPEC).dtype == "int64":
        x = (X * 10).astype(np.int64)
    data = Dataset(x[:TRAIN], None if y is None else y[:TRAIN], x[TRAIN:], None if y is None else y[TRAIN:])
    if "more_inputs" in changes:
        both = [{"x": row, "z": np.zeros(2, np.float32)} for row in X]
        data = Dataset(both[:TRAIN], y[:TRAIN], both[TRAIN:], y[TRAIN:])
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "none", data=data, **changes)
    assert not list(tmp_path.iterdir())


def test_graph_with_a_fixed_batch_is_refused(tmp_path):
    four = graph([("MatMul", ["x", "w"], ["y"])], inputs={"x": [4, 6]}, outputs={"y": [4, 3]})
    with pytest.raises(ConfigError, match=r"x float32 \[4, 6\]: 4 rows at a time, a device serves one"):
        build(tmp_path / "none", four)


def test_only_input_takes_the_name_that_the_graph_gives_it(tmp_path):
    manifest = build(tmp_path / "one", input_spec=InputSpec([6], name="sample")).manifest
    assert manifest.input.name == "x"


def test_added_nodes_step_aside_for_names_that_are_taken():
    model = graph([("MatMul", ["x", "w"], ["probabilities"])], outputs={"probabilities": ["N", 3]})
    ended = activated(model, "Softmax")
    assert [value.name for value in ended.graph.output] == ["probabilities_"]
    found = session_of(ended).run(None, {"x": X[:4]})[0]
    assert found.sum(axis=1) == pytest.approx([1] * 4)


def test_added_nodes_follow_the_answer_where_a_state_is_put_out_before_it():
    ended = in_units(STATEFUL, [TargetSpec(10, 2, 1)] * 3, carried=CARRIED)
    assert [value.name for value in ended.graph.output] == ["next", "values"]
    feeds = {"x": X[:1], "h": np.zeros((1, 3), np.float32)}
    state, values = session_of(ended).run(None, feeds)
    assert values == pytest.approx(np.tanh(state) * 2 + 10, abs=1e-5)


def test_fixed_input_becomes_a_constant_of_the_graphs_type():
    model = graph(
        [("MatMul", ["x", "w"], ["z"]), ("Mul", ["z", "gain"], ["y"])], inputs={"x": ["N", 6], "gain": [1]}
    )  # fmt: skip
    fixed = fix_inputs(model, {"gain": [2]})
    assert [value.name for value in fixed.graph.input] == ["x"]
    assert [value.name for value in model.graph.input] == ["x", "gain"]
    assert np.allclose(session_of(fixed).run(None, {"x": X[:3]})[0], X[:3] @ W * 2, atol=1e-5)


# ---- served in float alone


def test_network_that_cannot_be_quantized_ships_in_float_and_the_card_says_why(tmp_path):
    model = graph([("Sin", ["x"], ["y"])], outputs={"y": ["N", 6]})
    result = build(tmp_path / "one", model, None, task="raw", labels=())
    assert list(result.comparison.variants) == ["fp32"]
    assert MODEL_INT8 not in result.manifest.files
    assert "in float alone: it has no Conv" in (tmp_path / "one" / CARD).read_text()


# ---- recurrent


def test_stretches_keep_the_order_within_and_reach_from_end_to_end():
    chosen = stretches(1000, 80)
    assert len(chosen) == 80
    assert (chosen[0], chosen[-1]) == (0, 999)
    assert (np.diff(chosen) == 1).sum() == 72
    assert stretches(50, 80).tolist() == list(range(50))


def test_recurrent_network_is_calibrated_and_measured_with_the_state_it_will_carry(tmp_path):
    """Of a state that is always zero, all 256 steps would stand for zero."""
    result = build(tmp_path / "one", STATEFUL, None, task="raw", labels=(), state=CARRIED)
    (contrast,) = result.comparison.contrasts
    assert contrast.outputs["next"].sqnr_db > 25
    assert contrast.outputs["y"].sqnr_db > 20
    stored, model = load_npz(tmp_path / "one" / SELFTEST_NPZ), fp32(tmp_path / "one")
    anew = [model.run({"x": row[None], "h": np.zeros((1, 3), np.float32)})["y"][0] for row in stored["x"]]
    assert np.allclose(stored["out.fp32"], anew, atol=1e-5)


# ---- search


SOON = Search(budget=Budget(max_seconds=20, max_trials=3, repeats=5))


@pytest.fixture
def spied(monkeypatch):
    """What the search is given."""
    seen = {}
    search = edge_quantize.build.search

    def spy(model, calibration, validation, **settings):
        seen.update(calibration=calibration, validation=validation, **settings)
        return search(model, calibration, validation, **settings)

    monkeypatch.setattr(edge_quantize.build, "search", spy)
    return seen


def keys(x):
    return {row.tobytes() for row in np.asarray(x["x"] if isinstance(x, dict) else x)}


@pytest.mark.filterwarnings("ignore::edge_quantize.errors.CalibrationWarning")
@pytest.mark.parametrize("adapt", ["head", "none"])
def test_search_without_validation_rows_holds_training_rows_back_and_never_sees_held_out_ones(tmp_path, spied, adapt):
    result = build(tmp_path / "one", mlp(16, 8), adapt=adapt, quantization=SOON)
    train, held_out = keys(X[:TRAIN]), keys(X[TRAIN:])
    calibration, validation = keys(spied["calibration"]), keys(spied["validation"])
    assert calibration | validation == train
    assert not calibration & validation
    assert not (calibration | validation) & held_out
    assert len(validation) == TRAIN // 3
    assert 1 <= len(result.search.trials) - 1 <= 3
    assert result.search.rows == TRAIN // 3
    assert result.search.recipe.name in (tmp_path / "one" / CARD).read_text()


@pytest.mark.filterwarnings("ignore::edge_quantize.errors.CalibrationWarning")
def test_search_chooses_by_validation_rows_where_there_are_any(tmp_path, spied):
    other = np.random.default_rng(9).normal(size=(60, 6)).astype(np.float32)
    data = Dataset(
        X[:TRAIN], LABEL[:TRAIN], X[TRAIN:], LABEL[TRAIN:], validation_x=other, validation_y=(other @ W).argmax(1)
    )  # fmt: skip
    result = build(tmp_path / "one", mlp(16, 8), data=data, quantization=SOON)
    assert keys(spied["validation"]) == keys(other)
    assert keys(spied["calibration"]) == keys(X[:TRAIN])
    assert result.search.rows == 60


@pytest.mark.filterwarnings("ignore::edge_quantize.errors.CalibrationWarning")
@pytest.mark.parametrize(("task", "y"), [("multilabel", FLAGS), ("regression", (X @ W).astype(np.float32))])
def test_search_judges_every_task(tmp_path, task, y):
    result = build(tmp_path / "one", task=task, y=y, quantization=SOON)
    base = result.search.trials[0]
    assert base.score == pytest.approx(1.0 if task == "multilabel" else 0.0, abs=0.35 if task == "multilabel" else 1e-5)
    assert all(np.isfinite(trial.loss) for trial in result.search.trials)


@pytest.mark.filterwarnings("ignore::edge_quantize.errors.CalibrationWarning")
def test_search_for_a_recurrent_network_holds_back_the_end_of_the_recording(tmp_path, spied):
    y = np.zeros(len(X), np.int64)
    model = activated(STATEFUL, "Softmax", carried=CARRIED)
    build(tmp_path / "one", model, y, state=CARRIED, quantization=SOON)
    assert [call["x"].tobytes() for call in spied["calibration"]] == [row.tobytes() for row in X[:200]]
    assert [call["x"].tobytes() for call in spied["validation"]] == [row.tobytes() for row in X[200:TRAIN]]
    assert np.abs([call["h"] for call in spied["calibration"]]).max() > 1


@pytest.mark.filterwarnings("ignore::edge_quantize.errors.CalibrationWarning")
def test_devices_serve_float_where_no_recipe_was_right_enough(tmp_path):
    wanted = Search(max_loss=-1.0, budget=SOON.budget)  # nothing can be that much better than float
    manifest = build(tmp_path / "one", mlp(16, 8), quantization=wanted).manifest
    assert manifest.serve == "fp32"
    choice = choose_variant(tmp_path / "one", manifest, "auto")
    assert (choice.variant, choice.reason) == ("fp32", "INT8 was found to lose too much")
    assert choose_variant(tmp_path / "one", manifest, "int8").variant == "int8"
    assert build(tmp_path / "other", mlp(16, 8)).manifest.serve == "auto"


def test_search_without_any_rows_to_choose_by_is_refused(tmp_path):
    data = Dataset(None, None, X[TRAIN:], LABEL[TRAIN:], X[:TRAIN])
    with pytest.raises(DataError, match="a search needs validation rows or training rows to choose by"):
        build(tmp_path / "none", data=data, quantization=SOON)


def test_graph_in_memory_and_file_give_the_same_checkpoint(tmp_path):
    onnx.save(LOGITS, tmp_path / "net.onnx")
    build(tmp_path / "one", load_onnx(tmp_path / "net.onnx"))
    build(tmp_path / "other", tmp_path / "net.onnx")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_random_features_are_packed_served_and_have_moments(tmp_path):
    built = build(tmp_path / "one", mlp(16, 8), random_features=24)
    assert built.manifest.head.hidden == [24]
    assert Head.load(tmp_path / "one" / HEAD_NPZ).weights["W1"].shape == (24, 3)
    assert Moments.load(tmp_path / "one" / MOMENTS_NPZ).xx.shape == (24, 24)
    assert built.comparison.fp32.accuracy.value > 0.5  # of three labels, from a network that was never trained


def test_random_features_need_a_head_that_learns(tmp_path):
    with pytest.raises(ConfigError, match="random features go before a head that learns"):
        build(tmp_path / "one", adapt="none", random_features=24)
