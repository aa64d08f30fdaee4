"""At install: stored outputs are reproduced or the variant is refused, and the faster of those that do serves."""

import itertools
import shutil

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edge_sdk import selftest
from edge_sdk.errors import IntegrityError, RuntimeUnavailableError, SelfTestError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.manifest import (
    MODEL_FP32,
    MODEL_INT8,
    SELFTEST_NPZ,
    TRUNK_FP32,
    TRUNK_INT8,
    FileEntry,
    Manifest,
    StateSpec,
    TargetSpec,
    verify_checkpoint,
)
from edge_sdk.schema import InputSpec
from edge_sdk.selftest import (
    CHOICE_NAME,
    FASTER,
    Choice,
    choose_variant,
    prefer,
    read_choice,
    self_test,
    time_in_turns,
    write_choice,
)

VARIANTS = ("int8", "fp32")


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the digits' checkpoint that may be changed; files are not checked against the manifest here."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def manifest(checkpoint):
    return verify_checkpoint(checkpoint)


def alter(folder, **changes):
    """Rewrite stored arrays: name (a dot written as __) to a function of the array, or None to leave it out."""
    arrays = load_npz(folder / SELFTEST_NPZ)
    for name, change in changes.items():
        key = name.replace("__", ".")
        if change is None:
            del arrays[key]
        else:
            arrays[key] = change(arrays[key])
    (folder / SELFTEST_NPZ).write_bytes(npz_bytes(arrays))


# ---- a model that is split


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_healthy_checkpoint_passes_and_comes_back_loaded(checkpoint, manifest, variant):
    model = self_test(checkpoint, manifest, variant=variant)
    stored = load_npz(checkpoint / SELFTEST_NPZ)
    ran = model.run(manifest.input.apply(manifest.input.check_batch(stored["x"])))
    np.testing.assert_array_equal(ran.scores.argmax(axis=1), stored["scores"].argmax(axis=1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda latents: np.roll(latents, 1, axis=0), "latents differ by up to .* steps here; allowed are 2"),
        (lambda latents: np.where(latents > 250, latents, latents + 3).astype(np.uint8), "latents differ by up to"),
        (lambda latents: latents[:, :-1], "latents are uint8 .*, stored are"),
        (lambda latents: latents[:-1], "not as many rows as x"),
    ],
    ids=["of other rows", "3 steps off", "narrower", "fewer rows"],
)
def test_altered_outputs_are_refused_for_their_variant_alone(folder, manifest, variant, change, reason):
    other = next(name for name in VARIANTS if name != variant)
    alter(folder, **{f"out__{variant}": change})
    with pytest.raises(SelfTestError, match=reason):
        self_test(folder, manifest, variant=variant)
    if "rows" not in reason:
        self_test(folder, manifest, variant=other)


def test_latents_may_be_a_step_off_for_cpus_round_differently(folder, manifest):
    alter(folder, out__int8=lambda latents: np.where(latents > 250, latents - 1, latents + 1).astype(np.uint8))
    self_test(folder, manifest, variant="int8")


def test_other_answers_than_the_stored_ones_are_refused(folder, manifest):
    alter(folder, scores=lambda scores: np.roll(scores, 1, axis=1))
    for variant in VARIANTS:
        with pytest.raises(SelfTestError, match=r"only 0\.0% of the stored predictions are reproduced here"):
            self_test(folder, manifest, variant=variant)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": None}, "lacks x or scores"),
        ({"scores": None}, "lacks x or scores"),
        ({"x": lambda x: x[:0]}, "lacks x or scores"),
        ({"out__int8": None}, "lacks the outputs of int8"),
        ({"x": lambda x: x[1:]}, "not as many rows as x has"),
        ({"x": lambda x: x[:, :, :-1]}, "stored inputs do not fit the manifest: .*expected shape"),
        ({"x": lambda x: x * np.nan}, "stored inputs do not fit the manifest: .*nan at"),
        ({"x": lambda x: x.astype(str)}, "stored inputs do not fit the manifest: .*expected numbers"),
    ],
    ids=["no x", "no scores", "no rows", "no outputs", "fewer rows", "another shape", "nan", "text"],
)
def test_a_self_test_that_is_not_whole_is_refused_with_the_reason(folder, manifest, changes, reason):
    alter(folder, **changes)
    with pytest.raises(SelfTestError, match=reason):
        self_test(folder, manifest, variant="int8")


def test_a_self_test_that_cannot_be_read_is_damaged(folder, manifest):
    (folder / SELFTEST_NPZ).write_bytes(b"rubbish")
    with pytest.raises(IntegrityError, match=r"selftest\.npz"):
        self_test(folder, manifest, variant="int8")


def test_a_trunk_that_the_engine_refuses_is_told(folder, manifest):
    (folder / TRUNK_INT8).write_bytes(b"rubbish")
    with pytest.raises(RuntimeUnavailableError, match=r"refuses trunk\.int8\.onnx"):
        self_test(folder, manifest, variant="int8")


# ---- which variant serves


@given(st.floats(1e-4, 1e4), st.floats(1e-4, 1e4))
def test_int8_serves_only_if_it_saves_a_tenth_of_the_time(int8_ms, fp32_ms):
    choice = prefer(int8_ms, fp32_ms)
    assert (choice.variant == "int8") == (int8_ms <= 0.9 * fp32_ms)
    assert f"{int8_ms / fp32_ms:.2f} of the time of FP32" in choice.reason


def test_the_edge_of_a_tenth_belongs_to_int8():
    assert prefer(FASTER * 10, 10) == Choice(
        "int8", "INT8 takes 0.90 of the time of FP32 here (it serves at 0.9 or less)", 9.0, 10.0
    )
    assert prefer(np.nextafter(FASTER * 10, 99), 10).variant == "fp32"
    assert prefer(10, 10).variant == "fp32"


@pytest.mark.parametrize(("int8_ms", "variant"), [(0.5, "int8"), (0.95, "fp32")])
def test_auto_takes_the_faster_of_two_that_are_right(checkpoint, manifest, monkeypatch, int8_ms, variant):
    timed = []

    def time_alike(runs):
        timed.extend(runs)
        for run in runs.values():
            assert len(run().scores) == 1  # one sample, as in serving
        return {"int8": int8_ms, "fp32": 1.0}

    monkeypatch.setattr(selftest, "time_in_turns", time_alike)
    choice = choose_variant(checkpoint, manifest, "auto")
    assert (choice.variant, choice.int8_ms, choice.fp32_ms) == (variant, int8_ms, 1.0)
    assert sorted(timed) == ["fp32", "int8"]


def test_auto_times_both_here(checkpoint, manifest):
    choice = choose_variant(checkpoint, manifest, "auto")
    assert choice.variant in VARIANTS
    assert min(choice.int8_ms, choice.fp32_ms) > 0
    assert "of the time of FP32 here" in choice.reason


@pytest.mark.parametrize(("broken", "left"), [("int8", "fp32"), ("fp32", "int8")])
def test_auto_takes_the_variant_that_is_right_and_says_what_is_wrong_with_the_other(folder, manifest, broken, left):
    alter(folder, **{f"out__{broken}": lambda latents: np.roll(latents, 1, axis=0)})
    choice = choose_variant(folder, manifest, "auto")
    assert choice.variant == left
    assert choice.reason.startswith(f"{broken}: {broken} latents differ by up to")
    assert (choice.int8_ms, choice.fp32_ms) == (None, None)


def test_auto_does_without_a_variant_that_the_engine_refuses(folder, manifest):
    (folder / TRUNK_FP32).write_bytes(b"rubbish")
    choice = choose_variant(folder, manifest, "auto")
    assert choice.variant == "int8"
    assert choice.reason.startswith("fp32: ONNX Runtime refuses trunk.fp32.onnx")


@pytest.mark.parametrize("wanted", VARIANTS)
def test_the_variant_asked_for_is_tested_but_not_timed(folder, manifest, wanted, monkeypatch):
    monkeypatch.setattr(selftest, "time_in_turns", None)
    assert choose_variant(folder, manifest, wanted) == Choice(wanted, "as configured")
    alter(folder, **{f"out__{wanted}": lambda latents: np.roll(latents, 1, axis=0)})
    with pytest.raises(SelfTestError, match=f"release 1 fails its self-test here: {wanted}: {wanted} latents differ"):
        choose_variant(folder, manifest, wanted)


def test_a_release_with_no_variant_that_is_right_says_what_is_wrong_with_each(folder, manifest):
    wrong = {f"out__{variant}": lambda latents: np.roll(latents, 1, axis=0) for variant in VARIANTS}
    alter(folder, **wrong)
    with pytest.raises(SelfTestError, match=r"release 1 fails its self-test here: int8: .*; fp32: "):
        choose_variant(folder, manifest, "auto")


# ---- the choice is kept


@pytest.mark.parametrize(
    "choice", [Choice("fp32", "as configured"), Choice("int8", "INT8 takes 0.50 …", 0.5, 1.0)], ids=str
)
def test_a_choice_is_read_as_it_was_written(tmp_path, manifest, choice):
    write_choice(tmp_path, choice)
    assert read_choice(tmp_path, manifest) == choice


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"variant":"int4","reason":""}', b'{"variant":1,"reason":""}',
                b'{"variant":"int8","reason":"\xff"}', b"\x00" * 40], ids=repr)  # fmt: skip
def test_a_choice_that_is_damaged_is_none(tmp_path, manifest, content):
    (tmp_path / CHOICE_NAME).write_bytes(content)
    assert read_choice(tmp_path, manifest) is None


def test_a_choice_that_is_gone_or_of_a_variant_that_is_not_there_is_none(tmp_path, manifest):
    assert read_choice(tmp_path, manifest) is None
    (tmp_path / CHOICE_NAME).mkdir()
    assert read_choice(tmp_path, manifest) is None
    (tmp_path / CHOICE_NAME).rmdir()
    write_choice(tmp_path, Choice("int8", ""))
    float_only = {name: entry for name, entry in manifest.files.items() if name != TRUNK_INT8}
    assert read_choice(tmp_path, msgspec.structs.replace(manifest, files=float_only)) is None


# ---- timing


class FakeTime:
    """`perf_counter` that moves only as the runs say."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.calls = []
        monkeypatch.setattr(selftest.time, "perf_counter", lambda: self.now)

    def run(self, name, seconds):
        steps = itertools.cycle(seconds if isinstance(seconds, list) else [seconds])

        def once():
            self.calls.append(name)
            self.now += next(steps)

        return once


def test_runs_take_turns(monkeypatch):
    fake = FakeTime(monkeypatch)
    times = time_in_turns({"a": fake.run("a", 0.002), "b": fake.run("b", 0.001)}, repeats=4, seconds=10)
    assert fake.calls == ["a", "b"] * 5  # once more to warm up
    assert times == {"a": pytest.approx(2), "b": pytest.approx(1)}


def test_the_first_run_and_a_busy_moment_do_not_count(monkeypatch):
    fake = FakeTime(monkeypatch)
    times = time_in_turns({"a": fake.run("a", [9.0, 0.001, 0.001, 5.0, 0.001, 0.001])}, repeats=5, seconds=100)
    assert times == {"a": pytest.approx(1)}


@pytest.mark.parametrize(("each_s", "rounds"), [(1.0, 3), (0.11, 3), (0.04, 7), (0.001, 30)])
def test_timing_ends_when_its_time_is_over_but_not_before_three_rounds(monkeypatch, each_s, rounds):
    fake = FakeTime(monkeypatch)
    time_in_turns({"a": fake.run("a", each_s), "b": fake.run("b", each_s)})
    assert fake.calls == ["a", "b"] * (rounds + 1)


# ---- models that are served whole


@pytest.fixture
def whole(tmp_path):
    """Makes a checkpoint of the graph y = f(x * w): `whole(task, kind=..., variants=...)`, with what it puts out."""

    def make(task="raw", *, kind=T.FLOAT, variants=VARIANTS, two=False, recurrent=False, rows=6):
        inputs, outputs = [value("x", T.FLOAT, ["N", 3])], [value("y", kind, ["N", 3])]
        nodes, fields, stored = [helper.make_node("Mul", ["x", "w"], ["z"])], {}, {}
        last = "z"
        if two:
            inputs.append(value("gain", T.FLOAT, [1]))
            nodes.append(helper.make_node("Mul", [last, "gain"], ["gained"]))
            last, fields["more_inputs"] = "gained", [InputSpec(shape=[], name="gain")]
            stored["x.gain"] = np.arange(1, rows + 1, dtype=np.float32)
        if recurrent:
            inputs.append(value("h", T.FLOAT, [1, 3]))
            outputs.append(value("h_next", T.FLOAT, [1, 3]))
            nodes += [
                helper.make_node("Add", [last, "h"], ["raised"]),
                helper.make_node("Identity", ["raised"], ["h_next"]),
            ]
            last, fields["state"] = "raised", [StateSpec("h", "h_next", [1, 3])]
        nodes.append(helper.make_node("Cast", [last], ["y"], to=kind))
        graph = helper.make_graph(
            nodes, "graph", inputs, outputs, [numpy_helper.from_array(np.float32([1, 2, 3]), "w")]
        )
        data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        names = {"int8": MODEL_INT8, "fp32": MODEL_FP32}
        for variant in variants:
            onnx.save(data, tmp_path / names[variant])
        x = np.random.default_rng(5).integers(10, 40, (rows, 3)).astype(np.float32)
        y = x * np.float32([1, 2, 3]) * (stored["x.gain"][:, None] if two else 1)
        y = y.astype(helper.tensor_dtype_to_np_dtype(kind))
        stored |= {"x": x, "scores": y.astype(np.float32), **{f"out.{variant}": y for variant in variants}}
        (tmp_path / SELFTEST_NPZ).write_bytes(npz_bytes(stored))
        labels = [] if task == "raw" else ["a", "b", "c"]
        targets = [TargetSpec(0, 1, 1)] * 3 if task == "regression" else []
        thresholds = [0.5] * 3 if task == "multilabel" else []
        files = {names[variant]: FileEntry(1, "0" * 64) for variant in variants}
        return tmp_path, Manifest(
            name="m", release=2, created="", task=task, adapt="none", labels=labels, files=files, targets=targets,
            thresholds=thresholds, input=InputSpec(shape=[3], name="x"), **fields,
        )  # fmt: skip

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    return make


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "raw"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_model_must_come_near_its_stored_output(whole, task, variant):
    folder, manifest = whole(task)
    self_test(folder, manifest, variant=variant)
    tolerance = {"int8": 0.05, "fp32": 0.001}[variant]
    noise = np.float32([1, -1, 1]) * np.float32(tolerance)
    alter(folder, **{f"out__{variant}": lambda y: y * (1 + noise)})
    self_test(folder, manifest, variant=variant)
    alter(folder, **{f"out__{variant}": lambda y: y * (1 + 10 * noise)})
    with pytest.raises(SelfTestError, match=f"{variant} does not come within (20|50) dB of its stored output here"):
        self_test(folder, manifest, variant=variant)


@pytest.mark.parametrize("task", ["regression", "raw"])
def test_a_whole_models_output_must_have_the_stored_form(whole, task):
    folder, manifest = whole(task)
    alter(folder, out__fp32=lambda y: y[:, :2])
    with pytest.raises(SelfTestError, match=r"fp32 puts out shape \(.*3,?\), stored is \(.*2,?\)"):
        self_test(folder, manifest, variant="fp32")
    self_test(folder, manifest, variant="int8")


@pytest.mark.parametrize("task", ["regression", "raw"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_stored_output_that_is_not_finite_is_not_reproduced(whole, task, bad):
    folder, manifest = whole(task)
    alter(folder, out__fp32=lambda y: np.where(y == y.max(), np.float32(bad), y))
    with pytest.raises(SelfTestError):
        self_test(folder, manifest, variant="fp32")


@pytest.mark.parametrize("kind", [T.UINT8, T.INT64, T.BOOL, T.DOUBLE, T.FLOAT16], ids=T.DataType.Name)
def test_outputs_of_any_type_are_compared(whole, kind):
    """Unsigned numbers would wrap below zero, and truth values cannot be subtracted."""
    folder, manifest = whole(kind=kind)
    self_test(folder, manifest, variant="fp32")
    if kind != T.BOOL:  # a little off either way is near enough for INT8
        sides = np.array([1, -1, 1])
        alter(folder, out__int8=lambda y: (y + sides).astype(y.dtype))
        self_test(folder, manifest, variant="int8")
    alter(folder, out__fp32=lambda y: ~y if y.dtype == bool else y + y.dtype.type(3))
    with pytest.raises(SelfTestError, match="50 dB"):
        self_test(folder, manifest, variant="fp32")


def test_outputs_of_text_must_be_equal():
    stored = np.array(["cat", "dog"])
    selftest._compare_outputs([stored.astype(object)], [stored], "int8")
    with pytest.raises(SelfTestError, match="20 dB"):
        selftest._compare_outputs([np.array(["cat", "cow"], object)], [stored], "int8")


def test_inputs_beyond_the_first_are_replayed_too(whole):
    folder, manifest = whole(two=True)
    self_test(folder, manifest, variant="fp32")
    assert choose_variant(folder, manifest, "auto").variant in VARIANTS
    alter(folder, x__gain=lambda gain: gain * 2)
    with pytest.raises(SelfTestError, match="50 dB"):
        self_test(folder, manifest, variant="fp32")
    alter(folder, x__gain=None)
    with pytest.raises(SelfTestError, match=r"selftest\.npz lacks the input gain"):
        self_test(folder, manifest, variant="fp32")


def test_a_recurrent_model_starts_anew_with_each_stored_row(whole):
    folder, manifest = whole(recurrent=True)
    for variant in VARIANTS:
        self_test(folder, manifest, variant=variant)
    assert choose_variant(folder, manifest, "auto").variant in VARIANTS


def test_a_model_in_floats_alone_is_served_so(whole):
    folder, manifest = whole(variants=("fp32",))
    assert choose_variant(folder, manifest, "auto") == Choice("fp32", "the only variant there is")
    with pytest.raises(SelfTestError, match="release 2 fails its self-test here: it has no int8"):
        choose_variant(folder, manifest, "int8")
