"""A checkpoint's model behind one door: graphs with and without a batch, several inputs, a state, varying outputs."""

from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edge_sdk.errors import DtypeError, InputError, ModelError, RangeError, RuntimeUnavailableError, ShapeError
from edge_sdk.head import Head
from edge_sdk.manifest import FileEntry, Manifest, StateSpec, TargetSpec, verify_checkpoint
from edge_sdk.model import GraphModel, SplitModel, checked_state, load_model
from edge_sdk.runtime import WholeModel
from edge_sdk.schema import Column, Impute, InputSpec, OneHot, Scale
from edge_sdk.serving import Served
from edge_sdk.types import NOTHING

VERSION = SimpleNamespace(release=4, head=0)
WEIGHTS = np.array([[1.0, -1.0, 0.5], [0.0, 2.0, -0.5]], np.float32)


@pytest.fixture
def save(tmp_path):
    """Writes a graph: `save(nodes, inputs, outputs, constants)`; values are (name, shape) or (name, shape, type)."""

    def write(nodes, inputs, outputs, constants=(), name="model.fp32.onnx"):
        graph = helper.make_graph(
            [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
            "graph",
            [described(*value) for value in inputs],
            [described(*value) for value in outputs],
            [numpy_helper.from_array(array, key) for key, array in dict(constants).items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / name)
        return tmp_path

    def described(name, shape, kind=T.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    return write


def manifest_of(task="raw", labels=(), **fields):
    files = {"model.fp32.onnx": FileEntry(1, "0" * 64)}
    defaults = {"input": InputSpec(shape=[2], name="x")}
    return Manifest(
        name="m",
        release=4,
        created="",
        task=task,
        adapt="none",
        labels=list(labels),
        files=files,
        **{**defaults, **fields},
    )


def load(folder, manifest):
    return load_model(folder, manifest, "fp32", None, {})


def served_of(folder, manifest):
    return Served(VERSION, manifest, "fp32", load(folder, manifest), tuple(manifest.labels))


LINEAR = [("MatMul", ["x", "w"], ["y"]), ("ReduceSum", ["y", "last"], ["total"])]
LINEAR_CONSTANTS = {"w": WEIGHTS, "last": np.array([1])}


# ---- stateless graphs


@pytest.mark.parametrize("batch", ["N", 1, None])
def test_a_batch_gives_what_its_samples_give(save, rng, batch):
    """Stacked if the graph has a named batch dimension, else one by one."""
    folder = save(LINEAR, [("x", [batch, 2])], [("y", [batch, 3]), ("total", [batch, 1])], LINEAR_CONSTANTS)
    model = load(folder, manifest_of())
    assert model.model.batched == (batch == "N")
    x = rng.normal(size=(5, 2)).astype(np.float32)
    ran = model.run(x)
    assert ran.latents.shape == (5, 0)
    assert ran.scores.shape == (5, 5)
    assert [set(row) for row in ran.outputs] == [{"y", "total"}] * 5
    np.testing.assert_allclose([row["y"] for row in ran.outputs], x @ WEIGHTS, rtol=1e-5)
    np.testing.assert_allclose([row["total"] for row in ran.outputs], (x @ WEIGHTS).sum(1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(ran.scores[:, 0], (x @ WEIGHTS).mean(axis=1), rtol=1e-4)
    for i in range(5):
        alone = model.run(x[i : i + 1])
        np.testing.assert_allclose(alone.scores[0], ran.scores[i], rtol=1e-5)
        np.testing.assert_allclose(alone.outputs[0]["y"], ran.outputs[i]["y"], rtol=1e-5)


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("classification", {}),
        ("multilabel", {"thresholds": [0.5, 0.5, 0.5]}),
        ("regression", {"targets": [TargetSpec(0, 1, 1)] * 3}),
    ],
)
def test_the_first_output_is_the_scores_of_a_model_with_a_task(save, rng, batch, task, fields):
    nodes = [*LINEAR, ("Softmax", ["y"], ["p"])]
    folder = save(nodes, [("x", [batch, 2])], [("p", [batch, 3]), ("y", [batch, 3])], LINEAR_CONSTANTS)
    x = rng.normal(size=(4, 2)).astype(np.float32)
    ran = load(folder, manifest_of(task, "abc", **fields)).run(x)
    logits = np.exp(x @ WEIGHTS)
    np.testing.assert_allclose(ran.scores, logits / logits.sum(axis=1, keepdims=True), rtol=1e-5)
    assert ran.scores.dtype == np.float32
    assert list(ran.outputs) == []
    assert ran.state == {}


def test_an_output_may_be_longer_for_one_sample_than_for_another(save):
    """As of a detector: a row for each thing found."""
    nodes = [("Greater", ["x", "zero"], ["above"]), ("NonZero", ["above"], ["found"])]
    folder = save(nodes, [("x", [1, 2])], [("found", [2, "K"], T.INT64)], {"zero": np.float32(0)})
    model = load(folder, manifest_of())
    ran = model.run(np.float32([[1, 1], [-1, 1], [-1, -1]]))
    assert [row["found"].tolist() for row in ran.outputs] == [[[0, 0], [0, 1]], [[0], [1]], [[], []]]
    np.testing.assert_array_equal(ran.scores[:, 4], [4, 2, 0])  # how many values there are
    np.testing.assert_array_equal(ran.scores[2], [0] * 5)


@pytest.mark.parametrize("batch", ["N", 1])
def test_one_thing_found_is_a_list_of_one(save, batch):
    """The first dimension counts what was found, and is no batch to be taken away where it happens to be 1."""
    nodes = [
        ("Greater", ["x", "zero"], ["above"]),
        ("NonZero", ["above"], ["found"]),
        ("Transpose", ["found"], ["places"]),
        ("Identity", ["x"], ["same"]),
    ]
    outputs = [("places", ["K", 2], T.INT64), ("same", [batch, 2])]
    folder = save(nodes, [("x", [batch, 2])], outputs, {"zero": np.float32(0)})
    ran = load(folder, manifest_of()).run(np.float32([[1, 1], [-1, 1], [-1, -1]]))
    assert [row["places"].tolist() for row in ran.outputs] == [[[0, 0], [0, 1]], [[0, 1]], []]
    assert [row["same"].tolist() for row in ran.outputs] == [[1, 1], [-1, 1], [-1, -1]]


def test_outputs_cannot_be_written_to(save):
    """They are views of one array for the whole batch."""
    folder = save(LINEAR, [("x", ["N", 2])], [("y", ["N", 3])], LINEAR_CONSTANTS)
    ran = load(folder, manifest_of()).run(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        ran.outputs[0]["y"][0] = 1


def test_an_output_of_text_is_watched_by_its_length(save):
    nodes = [("Identity", ["names"], ["text"]), LINEAR[0]]
    constants = {"names": np.array(["cat", "dog"], object), "w": WEIGHTS}
    folder = save(nodes, [("x", [1, 2])], [("text", [2], T.STRING), ("y", [1, 3])], constants)
    ran = load(folder, manifest_of()).run(np.ones((1, 2), np.float32))
    assert ran.outputs[0]["text"].tolist() == ["cat", "dog"]
    np.testing.assert_array_equal(ran.scores, [[0, 0, 0, 0, 2]])


def test_an_output_that_is_no_array_is_refused_by_name(tmp_path):
    nodes = [helper.make_node("SequenceConstruct", ["x", "x"], ["both"])]
    both = helper.make_tensor_sequence_value_info("both", T.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", T.FLOAT, [1, 2])], [both])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.fp32.onnx")
    with pytest.raises(ModelError, match="output 'both' is a list, no array"):
        load(tmp_path, manifest_of()).run(np.ones((1, 2), np.float32))


def test_a_graph_that_fails_says_so(save):
    folder = save(LINEAR, [("x", ["N", 2])], [("y", ["N", 3])], LINEAR_CONSTANTS)
    with pytest.raises(RuntimeUnavailableError, match="the model failed"):
        load(folder, manifest_of()).run(np.ones((2, 5), np.float32))
    with pytest.raises(RuntimeUnavailableError, match="the model failed"):
        load(folder, manifest_of()).run(np.ones((2, 2), np.float64))


def test_nothing_that_is_not_finite_is_served(save):
    folder = save([("Log", ["x"], ["y"])], [("x", ["N", 2])], [("y", ["N", 2])])
    served = served_of(folder, manifest_of())
    assert served.run(np.ones((1, 2), np.float32)).scores[0, 0] == 0
    for bad in (-1, 0):
        with pytest.raises(ModelError, match="release 4, head 0 put out NaN or infinity"):
            served.run(np.full((1, 2), bad, np.float32))


# ---- several inputs


@pytest.fixture(params=["N", 1])
def with_two(request, save):
    """y = x @ w * gain; the second input has no row for each sample."""
    nodes = [LINEAR[0], ("Mul", ["y", "gain"], ["scaled"])]
    batch = request.param
    folder = save(nodes, [("x", [batch, 2]), ("gain", [1])], [("scaled", [batch, 3])], {"w": WEIGHTS})
    gain = InputSpec(shape=[], name="gain", high=10.0, preprocess=[Scale([0.0], [2.0])])
    return served_of(folder, manifest_of(more_inputs=[gain]))


def test_several_inputs_are_taken_by_name_and_each_as_its_contract_says(with_two):
    main, more = with_two.take({"gain": 6, "x": [1, 2]})
    assert main == [1, 2]
    np.testing.assert_array_equal(more["gain"], [3])
    ran = with_two.run(with_two.manifest.input.check(main)[None], more)
    np.testing.assert_allclose(ran.outputs[0]["scaled"], np.float32([1, 2]) @ WEIGHTS * 3)


def test_samples_with_several_inputs_are_run_one_by_one(with_two):
    x = np.float32([[1, 2], [3, 4]])
    ran = with_two.model.run(x, {"gain": np.float32([1, 10])})
    np.testing.assert_allclose([row["scaled"] for row in ran.outputs], x @ WEIGHTS * [[1], [10]])


@pytest.mark.parametrize("x", [[1, 2], {"x": [1, 2]}, {"x": [1, 2], "gain": 1, "bias": 0}, None, {}], ids=repr)
def test_an_input_that_is_missing_or_unknown_is_refused_with_the_names(with_two, x):
    with pytest.raises(ShapeError, match="this model takes the inputs x, gain, by name"):
        with_two.take(x)


def test_an_error_in_a_further_input_names_it(with_two):
    with pytest.raises(RangeError, match="'gain': values from 11 to 11, allowed None to 10"):
        with_two.take({"x": [1, 2], "gain": 11})
    with pytest.raises(DtypeError, match="'gain': expected numbers"):
        with_two.take({"x": [1, 2], "gain": "high"})


def test_a_model_with_several_inputs_or_a_state_takes_no_batch(with_two):
    with pytest.raises(InputError, match="m has several inputs or a state: predict one sample at a time"):
        with_two.check_batch([[1, 2]])
    manifest = manifest_of(state=[StateSpec("h", "h_next", [1, 3])])
    with pytest.raises(InputError, match="several inputs or a state"):
        Served(VERSION, manifest, "fp32", with_two.model, ()).check_batch([[1, 2]])


def test_a_model_with_one_input_is_given_it_as_it_is(save):
    folder = save(LINEAR, [("x", ["N", 2])], [("y", ["N", 3])], LINEAR_CONSTANTS)
    served = served_of(folder, manifest_of())
    row = {"any": "thing"}
    assert served.take(row) == (row, NOTHING)
    np.testing.assert_array_equal(served.check_batch([[1, 2], [3, 4]]), np.float32([[1, 2], [3, 4]]))


# ---- a state


@pytest.fixture
def recurrent(save):
    """h' = tanh(h + x @ w); y is its sum. A step at a time, as a device runs it."""
    nodes = [
        ("MatMul", ["x", "w"], ["seen"]),
        ("Add", ["h", "seen"], ["raised"]),
        ("Tanh", ["raised"], ["h_next"]),
        ("ReduceSum", ["h_next", "last"], ["y"]),
        ("Add", ["count", "one"], ["count_next"]),
    ]
    constants = {"w": WEIGHTS, "last": np.array([1]), "one": np.array([1])}
    folder = save(
        nodes,
        [("x", [1, 2]), ("h", [1, 3]), ("count", [1], T.INT64)],
        [("h_next", [1, 3]), ("y", [1, 1]), ("count_next", [1], T.INT64)],
        constants,
    )
    states = [StateSpec("h", "h_next", [1, 3]), StateSpec("count", "count_next", [1], "int64")]
    return served_of(folder, manifest_of(state=states))


def test_a_state_that_is_carried_gives_what_the_whole_sequence_gives(recurrent, rng):
    sequence = rng.normal(size=(20, 2)).astype(np.float32)
    state, said = None, []
    for x in sequence:
        ran = recurrent.run(x[None], recurrent.carry(state))
        assert set(ran.outputs[0]) == {"y"}  # the state is no output
        said.append(float(ran.outputs[0]["y"][0]))
        state = ran.state
    hidden, expected = np.zeros(3), []
    for x in sequence:
        hidden = np.tanh(hidden + x @ WEIGHTS)
        expected.append(hidden.sum())
    np.testing.assert_allclose(said, expected, atol=1e-5)
    np.testing.assert_allclose(state["h"][0], hidden, atol=1e-5)
    assert state["count"].tolist() == [20]
    afresh = recurrent.run(sequence[:1], recurrent.carry(None))
    assert float(afresh.outputs[0]["y"][0]) == said[0]


def test_a_state_that_was_sent_as_json_is_taken_again(recurrent):
    ran = recurrent.run(np.ones((1, 2), np.float32), recurrent.carry({}))
    sent = msgspec.json.decode(msgspec.json.encode({key: value.tolist() for key, value in ran.state.items()}))
    for key, value in recurrent.carry(sent).items():
        assert value.dtype == ran.state[key].dtype
        np.testing.assert_array_equal(value, ran.state[key])


def test_a_state_cannot_be_written_to_and_is_not_copied(recurrent):
    state = recurrent.run(np.ones((1, 2), np.float32), recurrent.carry(None)).state
    with pytest.raises(ValueError, match="read-only"):
        state["h"][0] = 1
    assert recurrent.carry(state)["h"] is state["h"]
    recurrent.run(np.ones((1, 2), np.float32), recurrent.carry(state))


SPECS = [StateSpec("h", "h_next", [1, 3]), StateSpec("mask", "mask_next", [2], "uint8")]


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_state_starts_at_zero(nothing):
    start = checked_state(SPECS, nothing)
    np.testing.assert_array_equal(start["h"], np.zeros((1, 3), np.float32))
    np.testing.assert_array_equal(start["mask"], np.zeros(2, np.uint8))
    assert (start["h"].dtype, start["mask"].dtype) == (np.float32, np.uint8)
    assert checked_state([], nothing) == {}


def test_numbers_of_a_state_are_cast_where_nothing_is_lost():
    state = checked_state(SPECS, {"h": [[1, 2, 3]], "mask": np.array([0, 255])})
    np.testing.assert_array_equal(state["h"], np.float32([[1, 2, 3]]))
    np.testing.assert_array_equal(state["mask"], np.uint8([0, 255]))
    assert (state["h"].dtype, state["mask"].dtype) == (np.float32, np.uint8)


H, MASK = np.zeros((1, 3), np.float32), np.zeros(2, np.uint8)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"h": H}, InputError, "a state has h, mask; got h"),
        ({"h": H, "mask": MASK, "c": H}, InputError, "a state has h, mask; got c, h, mask"),
        ({"h_next": H, "mask_next": MASK}, InputError, "got h_next, mask_next"),
        ({1: H, None: MASK}, InputError, "got 1, None"),
        ({"h": H[0], "mask": MASK}, ShapeError, r"state 'h': expected float32 \[1, 3\], got float32 \[3\]"),
        ({"h": [[1, 2], [3]], "mask": MASK}, InputError, "state 'h' is not an array"),
        ({"h": [["a", "b", "c"]], "mask": MASK}, DtypeError, "state 'h': expected float32, got <U1"),
        ({"h": [[None] * 3], "mask": MASK}, DtypeError, "state 'h': expected float32, got object"),
        ({"h": H, "mask": [0.5, 1]}, DtypeError, "state 'mask': expected uint8, got float64"),
        ({"h": H, "mask": [0, 256]}, RangeError, "state 'mask': values from 0 to 256 do not fit uint8"),
        ({"h": H, "mask": [-1, 0]}, RangeError, "do not fit uint8"),
        ([H, MASK], InputError, "a state is a mapping, as in a prediction's `state`; got list"),
        (H, InputError, "a state is a mapping.*got ndarray"),
        ("h", InputError, "got str"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_state_of_the_model_is_refused(state, error, message):
    with pytest.raises(error, match=message):
        checked_state(SPECS, state)


def test_a_model_without_a_state_takes_none():
    with pytest.raises(InputError, match="this model carries no state"):
        checked_state([], {"h": H})


# ---- loading


def test_a_model_is_loaded_once_for_all_that_share_it(save):
    folder = save(LINEAR, [("x", ["N", 2])], [("y", ["N", 3])], LINEAR_CONSTANTS)
    shared = {}
    first, second = (load_model(folder, manifest_of(), "fp32", None, shared) for _ in range(2))
    assert isinstance(first, GraphModel)
    assert first.model is second.model
    assert [type(model) for model in shared.values()] == [WholeModel]


def test_a_split_model_shares_its_trunk_and_has_a_head_of_its_own(checkpoint, digits):
    manifest = verify_checkpoint(checkpoint)
    head = Head.load(checkpoint / "head.npz")
    other = Head({key: -value for key, value in head.weights.items()}, head.labels)
    shared = {}
    first, second = (load_model(checkpoint, manifest, "int8", one, shared) for one in (head, other))
    assert isinstance(first, SplitModel)
    assert first.trunk is second.trunk
    load_model(checkpoint, manifest, "fp32", head, shared)
    assert len(shared) == 2  # one for each variant
    x = manifest.input.apply(manifest.input.check_batch(digits.score.x[:20]))
    ran, turned = first.run(x), second.run(x)
    np.testing.assert_array_equal(ran.latents, turned.latents)
    assert ran.latents.shape == (20, manifest.latent.dim)
    np.testing.assert_allclose(ran.scores.sum(axis=1), 1, rtol=1e-5)
    assert (ran.scores.argmax(axis=1) != turned.scores.argmax(axis=1)).all()


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.fp32.onnx").write_bytes(b"rubbish")
    with pytest.raises(RuntimeUnavailableError, match=r"ONNX Runtime refuses model\.fp32\.onnx"):
        load(tmp_path, manifest_of())


# ---- what the scores say


def reader(task, labels, **fields):
    return Served(VERSION, manifest_of(task, labels, **fields), "fp32", None, tuple(labels))


def test_scores_are_read_as_the_task_says():
    scores = np.float32([[0.2, 0.7, 0.1], [0.5, 0.5, 0.0]])
    assert reader("classification", ["a", "ß", "c"]).read(scores) == [("ß", ("ß",)), ("a", ("a",))]
    tags = reader("multilabel", ["a", "ß", "c"], thresholds=[0.5, 0.3, 0.05])
    assert tags.read(scores) == [("ß", ("ß", "c")), ("a", ("a", "ß"))]
    assert tags.read(np.zeros((1, 3), np.float32)) == [("a", ())]
    assert reader("regression", ["t"], targets=[TargetSpec(0, 1, 1)]).read(scores[:, :1]) == [("", ())] * 2
    assert reader("raw", []).read(scores) == [("", ())] * 2


def test_what_serves_preprocesses_and_keeps_thumbnails_of_what_came(save):
    columns = [Column("size"), Column("colour", "category", ["red", "blue"])]
    spec = InputSpec(
        shape=[2], name="x", columns=columns, preprocess=[Impute([4.0, None]), OneHot(["colour"])]
    )  # fmt: skip
    folder = save([("Identity", ["x"], ["y"])], [("x", ["N", 3])], [("y", ["N", 3])])
    served = served_of(folder, manifest_of(input=spec))
    checked = served.check_batch([{"size": None, "colour": "blue"}, {"size": 2, "colour": "grey"}])
    ran = served.run(checked)
    np.testing.assert_array_equal([row["y"] for row in ran.outputs], [[4, 0, 1], [2, 0, 0]])
    np.testing.assert_array_equal(served.thumbnail(checked), [[np.nan, 1], [2, -1]])
