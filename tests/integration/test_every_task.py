"""Every kind of model from the training data to a device: packed, verified, served, observed, watched, replaced."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import edge_quantize.cli
import edge_sdk.cli
from edge_quantize import Dataset, build_checkpoint, repack_checkpoint
from edge_sdk.config import UpdateConfig
from edge_sdk.errors import IncompatibleError, InputError, LabelError
from edge_sdk.head import Head
from edge_sdk.http import create_app
from edge_sdk.manifest import (
    HEAD_NPZ,
    MANIFEST_NAME,
    MODEL_INT8,
    StateSpec,
    digest_of,
    parse_manifest,
    verify_checkpoint,
)
from edge_sdk.messages import (
    Desired,
    Envelope,
    Need,
    Offer,
    Report,
    Topics,
    block_count,
    decode,
    encode,
    from_bitmap,
    unpack,
)
from edge_sdk.schema import Column, Impute, InputSpec, OneHot, Permute, Resize, Scale, Window
from edge_sdk.streams import rotation
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
CREATED = "2026-01-01T00:00:00Z"
TRAIN, HELD_OUT = 400, 240
BLOCK = 16 * 1024
STATE = [StateSpec("hidden", "next_hidden", [1, 1, 8]), StateSpec("cell", "next_cell", [1, 1, 8])]


@dataclass(frozen=True)
class Kind:
    """A model and what a device is asked about it.

    Attributes:
        model: A torch network or an ONNX graph.
        data: Its rows.
        settings: For `build_checkpoint`.
        drift: What happens to a row when the world changes.
        truth: The truth about a row of the task's own form, from `data.holdout_y`.
        wrong: Truths of other tasks.
        learns: Whether the device learns on it.
    """

    model: Any
    data: Dataset
    settings: dict[str, Any]
    drift: Callable[[Any], Any]
    truth: Callable[[Any], Any] | None = None
    wrong: tuple[Any, ...] = ()
    learns: bool = False

    def build(self, target, **changes):
        facts = {"name": "thing", "release": 1, "created": CREATED, "measure_memory": False, "labels": ()}
        return build_checkpoint(self.model, self.data, target=target, **{**facts, **self.settings, **changes})


# ---- the kinds


def numbers(*shape):
    return np.random.default_rng(list(shape)).normal(size=shape).astype(np.float32)


def halves(x, y):
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def fit(net, x, y, loss, *, epochs=30):
    """Train a little, the same every time."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    inputs = [torch.from_numpy(part) for part in (x if isinstance(x, list) else [x])]
    truth = torch.from_numpy(y)
    for _ in range(epochs):
        for rows in torch.randperm(len(truth)).split(64):
            optimizer.zero_grad()
            loss(net(*(part[rows] for part in inputs)), truth[rows]).backward()
            optimizer.step()
    return net.eval()


def label_of(labels):
    return lambda y: labels[int(y)]


def classification_none():
    from torch import nn
    from torch.nn.functional import cross_entropy

    x = numbers(TRAIN + HELD_OUT, 6)
    y = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)
    net = fit(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)), x[:TRAIN], y[:TRAIN], cross_entropy)
    labels = ("none", "one", "both")
    settings = {"labels": labels, "adapt": "none", "input_spec": InputSpec([6], low=-50, high=50)}
    return Kind(net, Dataset(*halves(x, y)), settings, lambda row: row + 2, label_of(labels), (3.5, ["one"]))


def multilabel():
    from torch import nn
    from torch.nn.functional import binary_cross_entropy

    x = numbers(TRAIN + HELD_OUT, 8)
    y = (x[:, :3] + 0.3 * x[:, 3:6] > 0.2).astype(np.int64)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3), nn.Sigmoid())
    fit(net, x[:TRAIN], y[:TRAIN].astype(np.float32), binary_cross_entropy)
    labels = ("hot", "loud", "wet")
    settings = {
        "labels": labels, "task": "multilabel", "thresholds": [0.4, 0.5, 0.6], "input_spec": InputSpec([8]),
    }  # fmt: skip
    return Kind(
        net, Dataset(*halves(x, y)), settings, lambda row: row - 3,
        lambda y: [label for label, there in zip(labels, y, strict=True) if there], ("hot", 1.0, ["cold"]),
        learns=True,
    )  # fmt: skip


def regression():
    """Two targets in units of their own: degrees and pascals."""
    from torch import nn
    from torch.nn.functional import mse_loss

    x = numbers(TRAIN + HELD_OUT, 5)
    y = np.stack([20 + 5 * x[:, 0], 101_300 + 900 * x[:, 1] * x[:, 2]], axis=1).astype(np.float32)
    mean, std = y[:TRAIN].mean(0), y[:TRAIN].std(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    fit(net, x[:TRAIN], (y[:TRAIN] - mean) / std, mse_loss, epochs=60)
    import torch

    with torch.no_grad():  # as a network trained on the targets' own units would be
        net[-1].weight *= torch.from_numpy(std)[:, None]
        net[-1].bias.copy_(net[-1].bias * torch.from_numpy(std) + torch.from_numpy(mean))
    settings = {"labels": ("temperature", "pressure"), "task": "regression", "input_spec": InputSpec([5])}
    return Kind(
        net, Dataset(*halves(x, y)), settings, lambda row: row + 2.5, lambda y: [float(v) for v in y],
        ("20", [20.0], {"temperature": 20.0}), learns=True,
    )  # fmt: skip


ROW = InputSpec(
    shape=[4],
    columns=[
        Column("age", low=0, high=120), Column("site", "category", values=["north", "south", "west"]),
        Column("note", "text", buckets=8), Column("pulse"),
    ],
    preprocess=[
        Impute([40.0, 0.0, 0.0, 70.0]), OneHot(["site", "note"]),
        Scale([40.0, *[0.0] * 11, 70.0], [20.0, *[1.0] * 11, 15.0]),
    ],
)  # fmt: skip


def table():
    """Rows by column name, with missing values, an unseen category and free text."""
    from torch import nn
    from torch.nn.functional import cross_entropy

    rng = np.random.default_rng(0)
    rows, y = [], []
    for _ in range(TRAIN + HELD_OUT):
        row = {
            "age": float(rng.uniform(1, 99)), "site": str(rng.choice(["north", "south", "west", "elsewhere"])),
            "note": str(rng.choice(["calm", "cough", "fall", ""])), "pulse": float(rng.normal(70, 15)),
        }  # fmt: skip
        y.append(int(row["age"] > 50) + int(row["site"] == "south"))
        match rng.integers(0, 8):
            case 0:
                row["age"] = None
            case 1:
                del row["pulse"]
            case 2:
                row["site"] = ""
        rows.append(row)
    y = np.array(y, dtype=np.int64)
    x = ROW.apply(ROW.check_batch(rows[:TRAIN]))
    net = nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    fit(net, x, y[:TRAIN], cross_entropy)
    labels = ("low", "middle", "high")
    data = Dataset(rows[:TRAIN], y[:TRAIN], rows[TRAIN:], np.array(labels)[y[TRAIN:]])
    return Kind(
        net, data, {"labels": labels, "input_spec": ROW}, lambda row: {**row, "pulse": 150.0, "site": "west"},
        str, (2.0, ["low", "high"]), learns=True,
    )  # fmt: skip


def sensor():
    """The latest 32 steps of a recording of any length, three channels."""
    from torch import nn
    from torch.nn.functional import cross_entropy

    spec = InputSpec(
        [-1, 3], low=-100, high=100,
        preprocess=[Window(32), Permute([1, 0]), Scale([0.0, 0.0, 1.0], [1.0, 1.0, 2.0], axis=0)],
    )  # fmt: skip
    y = np.arange(TRAIN + HELD_OUT) % 2
    steps = np.arange(40)[None] * np.where(y == 0, 0.3, 0.9)[:, None]
    x = (np.sin(steps + numbers(len(y), 1))[..., None] * [1.0, 0.5, 2.0] + 0.3 * numbers(len(y), 40, 3)).astype("f4")
    net = nn.Sequential(
        nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    fit(net, spec.apply(x[:TRAIN]), y[:TRAIN], cross_entropy, epochs=15)
    labels = ("idle", "running")
    return Kind(
        net, Dataset(*halves(x, y)), {"labels": labels, "input_spec": spec}, lambda row: row * 3, label_of(labels),
        (0.0, ["idle"]), learns=True,
    )  # fmt: skip


def image():
    """Bytes of any size, channels last."""
    from torch import nn
    from torch.nn.functional import cross_entropy

    spec = InputSpec(
        [-1, -1, 3], low=0, high=255,
        preprocess=[Resize(12, 12, "hwc"), Permute([2, 0, 1]), Scale([128.0] * 3, [64.0] * 3, axis=0)],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    y = np.arange(TRAIN + HELD_OUT) % 3
    x = rng.integers(0, 120, (len(y), 16, 20, 3)).astype(np.uint8)
    x[np.arange(len(y)), :, :, y] += 100
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    fit(net, spec.apply(x[:TRAIN]), y[:TRAIN], cross_entropy, epochs=10)
    labels = ("red", "green", "blue")
    return Kind(
        net, Dataset(*halves(x, y)), {"labels": labels, "input_spec": spec}, lambda row: row // 4, label_of(labels),
        (1, ["red"]), learns=True,
    )  # fmt: skip


def graph(nodes, stored, inputs, outputs):
    """An ONNX graph: nodes as (operator, inputs, outputs, attributes), float inputs and outputs by name."""
    made = [helper.make_node(op, i, o, name=o[0], **(more[0] if more else {})) for op, i, o, *more in nodes]
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in part.items()]
              for part in (inputs, outputs)]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    model = helper.make_model(
        helper.make_graph(made, "made", *values, tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.checker.check_model(model)
    return model


def raw_rows(width):
    x = numbers(TRAIN + HELD_OUT, width)
    return Dataset(x[:TRAIN], None, x[TRAIN:], None)


def raw():
    """Two outputs of different shapes, neither of which has a truth."""
    model = graph(
        [("MatMul", ["x", "w"], ["hidden"]), ("Relu", ["hidden"], ["features"]), ("MatMul", ["features", "v"], ["map"]),
         ("ReduceMax", ["map", "along"], ["score"], {"keepdims": 0})],
        {"w": numbers(6, 16), "v": numbers(16, 9), "along": np.array([1])}, {"x": ["batch", 6]},
        {"map": ["batch", 9], "score": ["batch"]},
    )  # fmt: skip
    settings = {"task": "raw", "input_spec": InputSpec([6], name="x")}
    return Kind(model, raw_rows(6), settings, lambda row: row * 4 + 3, wrong=("hot", 1.0, ["hot"]))


def detector():
    """As many boxes as it finds, which may be none."""
    model = graph(
        [("MatMul", ["x", "w"], ["found"]), ("Greater", ["found", "least"], ["there"]),
         ("NonZero", ["there"], ["places"]), ("Transpose", ["places"], ["rows"], {"perm": [1, 0]}),
         ("GatherND", ["found", "rows"], ["scores"])],
        {"w": numbers(5, 12), "least": np.float32(2.0)}, {"x": ["batch", 5]}, {"scores": ["found"]},
    )  # fmt: skip
    settings = {"task": "raw", "input_spec": InputSpec([5], name="x")}
    return Kind(model, raw_rows(5), settings, lambda row: row * 3 + 2, wrong=("box",))


def recurrent():
    """A LSTM that is asked one step at a time, and carries its state."""
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(3, 8, batch_first=True)
            self.top = nn.Linear(8, 2)

        def forward(self, x, hidden, cell):
            out, (hidden, cell) = self.cell(x[:, None], (hidden, cell))
            return self.top(out[:, 0]), hidden, cell

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Step()
    x = numbers(TRAIN + HELD_OUT, 3)
    y = (np.convolve(x[:, 0], np.ones(4), "full")[: len(x)] > 0).astype(np.int64)  # of the latest four steps
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        out, _ = net.cell(torch.from_numpy(x[:TRAIN])[None])
        nn.functional.cross_entropy(net.top(out[0]), torch.from_numpy(y[:TRAIN])).backward()
        optimizer.step()
    labels = ("falling", "rising")
    settings = {"labels": labels, "input_spec": InputSpec([3], name="sample"), "state": STATE}
    return Kind(net.eval(), Dataset(*halves(x, y)), settings, lambda row: row + 3, label_of(labels), (1.0, ["rising"]))


def several_inputs():
    """A picture and two readings, to one number."""
    import torch
    from torch import nn
    from torch.nn.functional import mse_loss

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.see, self.top = nn.Conv2d(1, 4, 3), nn.Linear(4 * 16 + 2, 1)

        def forward(self, picture, readings):
            seen = torch.relu(self.see(picture)).flatten(1)
            return self.top(torch.cat([seen, readings], dim=1))

    picture, readings = numbers(TRAIN + HELD_OUT, 1, 6, 6), numbers(TRAIN + HELD_OUT, 2)
    y = (picture.mean(axis=(1, 2, 3)) * 6 + readings[:, 0]).astype(np.float32)[:, None]
    net = fit(Both(), [picture[:TRAIN], readings[:TRAIN]], y[:TRAIN], mse_loss)
    x = [{"picture": a, "readings": b} for a, b in zip(picture, readings, strict=True)]
    settings = {
        "labels": ("load",), "task": "regression", "input_spec": InputSpec([1, 6, 6], name="picture"),
        "more_inputs": [InputSpec([2], name="readings")],
    }  # fmt: skip
    return Kind(
        net, Dataset(*halves(x, y)), settings, lambda row: {**row, "picture": row["picture"] + 2},
        lambda y: float(y[0]), ("load", [1.0, 2.0]),
    )  # fmt: skip


def fixed_input():
    """An input that never changes where it is served: a threshold."""
    model = graph(
        [("MatMul", ["x", "w"], ["hidden"]), ("Sub", ["hidden", "threshold"], ["score"])],
        {"w": numbers(4, 3)}, {"x": ["batch", 4], "threshold": [1]}, {"score": ["batch", 3]},
    )  # fmt: skip
    settings = {"task": "raw", "input_spec": InputSpec([4], name="x"), "fixed": {"threshold": [0.25]}}
    return Kind(model, raw_rows(4), settings, lambda row: row + 4, wrong=("a",))


def float_only():
    """Nothing to quantize: no layer has weights."""
    model = graph(
        [("Mul", ["x", "gain"], ["scaled"]), ("Sin", ["scaled"], ["wave"])],
        {"gain": np.float32(0.5)}, {"x": ["batch", 4]}, {"wave": ["batch", 4]},
    )  # fmt: skip
    return Kind(
        model, raw_rows(4), {"task": "raw", "input_spec": InputSpec([4], name="x")}, lambda row: row + 4, wrong=("a",)
    )


KINDS = {
    make.__name__: make
    for make in (
        classification_none, multilabel, regression, table, sensor, image, raw, detector, recurrent, several_inputs,
        fixed_input, float_only,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A kind and the checkpoint made of it."""

    name: str
    kind: Kind
    folder: Any
    result: Any


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Builds each kind once."""
    made = {}

    def one(name):
        if name not in made:
            kind, folder = KINDS[name](), tmp_path_factory.mktemp(name) / "release-1"
            made[name] = Packed(name, kind, folder, kind.build(folder))
        return made[name]

    return one


@pytest.fixture(params=KINDS)
def packed(request, pack):
    return pack(request.param)


def rows_of(packed, count=None):
    return list(packed.kind.data.holdout_x)[:count]


def ask(device, rows):
    """Predict rows one after another, carrying what a recurrent model carries."""
    state, said = None, []
    for row in rows:
        prediction = device.predict(row, state=state)
        state = prediction.state or None
        said.append(prediction)
    return said


def same(one, other):
    """Whether two predictions say the same numbers."""
    return (
        one.label == other.label
        and np.array_equal(one.probabilities, other.probabilities)
        and np.array_equal(one.values, other.values)
        and one.outputs.keys() == other.outputs.keys()
        and all(np.array_equal(one.outputs[name], other.outputs[name]) for name in one.outputs)
    )


# ---- packing


def test_checkpoint_passes_both_programs_checks(packed):
    for program, command in ((edge_quantize.cli.main, "verify"), (edge_sdk.cli.main, "verify")):
        result = CliRunner().invoke(program, [command, str(packed.folder)])
        assert result.exit_code == 0, result.output
        assert "release 1" in result.output
    facts = CliRunner().invoke(edge_quantize.cli.main, ["inspect", str(packed.folder)])
    assert facts.exit_code == 0, facts.output


def test_same_inputs_give_the_same_bytes(packed, tmp_path):
    packed.kind.build(tmp_path / "again")
    first, again = ({p.name: p.read_bytes() for p in sorted(f.iterdir())} for f in (packed.folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_int8_stays_near_float(packed):
    comparison, manifest = packed.result.comparison, packed.result.manifest
    if packed.name == "float_only":
        assert MODEL_INT8 not in manifest.files
        assert comparison.contrasts == []
        assert "float alone" in (packed.folder / "card.md").read_text()
        return
    (contrast,) = comparison.contrasts
    found = [output.sqnr_db for output in contrast.outputs.values() if output.sqnr_db is not None]
    assert found
    assert min(found) > 15, contrast.outputs
    if manifest.task != "raw":
        assert comparison.int8.accuracy.value >= comparison.fp32.accuracy.value - 0.05
        assert comparison.fp32.accuracy.value >= 0.75


# ---- on a device


def test_device_predicts_takes_truths_and_counts_what_was_right(packed, make_device):
    device = make_device(checkpoint=packed.folder, variant="auto")
    rows, kind = rows_of(packed, 120), packed.kind
    said = ask(device, rows)
    manifest = packed.result.manifest
    for prediction in said[:5]:
        assert prediction.release == 1
        assert prediction.labels == tuple(manifest.labels)
        assert bool(prediction.outputs) == (manifest.task == "raw")
        assert bool(prediction.state) == bool(manifest.state)
        assert prediction.values.shape == ((len(manifest.labels),) if manifest.task == "regression" else (0,))
    for truth in kind.wrong:
        with pytest.raises(LabelError):
            device.observe(said[0].id, truth)
    if kind.truth is None:
        device.step()
        assert device.status().accuracy is None
        assert device.status().counters.predictions == 120
        return
    for prediction, y in zip(said, kind.data.holdout_y, strict=False):
        device.observe(prediction.id, kind.truth(y))
    if manifest.task != "classification":
        with pytest.raises(LabelError, match="needs a classification"):
            device.reward(said[0].id, 1.0)
    report = device.step()
    assert (report.predictions, report.labelled, report.problem) == (120, 120, "")
    status = device.status()
    variant = packed.result.comparison.variants[status.variant]
    assert status.accuracy == pytest.approx(variant.accuracy.value, abs=0.12)
    assert status.counters.labelled == 120
    if kind.learns:
        assert status.fresh_rows + status.judge_rows == 120
    else:
        assert "served, not learned on" in status.waits
        assert (status.fresh_rows, status.replay_rows) == (0, 0)


def test_report_tells_the_coordinator_what_was_right(packed, make_device, clock):
    broker, topics = MemoryBroker(), Topics()
    listener = MemoryTransport(broker)
    listener.subscribe(topics.up("+", "report"))
    listener.connect()
    device = make_device(checkpoint=packed.folder, variant="auto", transport=MemoryTransport(broker))
    device.connect()
    device.step()
    kind = packed.kind
    for prediction, y in zip(
        ask(device, rows_of(packed)), [] if kind.truth is None else kind.data.holdout_y, strict=False
    ):
        device.observe(prediction.id, kind.truth(y))
    device.step()
    clock.advance(600)
    device.step()
    sent = [decode(message.payload, Envelope) for message in listener.receive()]
    report = unpack(sent[-1].body, Report)
    assert report.predictions == HELD_OUT
    assert [monitor.name for monitor in report.monitors] == ["input", "output", "accuracy"]
    if kind.truth is None:
        assert (report.labelled, report.correct) == (0, 0)
        return
    assert report.labelled == HELD_OUT
    variant = packed.result.comparison.variants[device.status().variant]
    assert report.correct / HELD_OUT == pytest.approx(variant.accuracy.value, abs=0.01)


def test_a_batch_says_what_single_rows_say(packed, make_device):
    device = make_device(checkpoint=packed.folder, variant="auto")
    rows, manifest = rows_of(packed, 40), packed.result.manifest
    if manifest.state or manifest.more_inputs:
        with pytest.raises(InputError, match="one sample at a time"):
            device.predict_batch(rows)
        return
    batch = device.predict_batch(rows if isinstance(rows[0], dict) else np.stack(rows))
    assert all(same(one, other) for one, other in zip(batch, ask(device, rows), strict=True))


def test_restart_keeps_serving_the_same_and_counts_on(packed, make_device):
    device = make_device(checkpoint=packed.folder, variant="auto")
    rows = rows_of(packed, 40)
    before = ask(device, rows)
    device.stop()
    device = make_device(checkpoint=None, variant="auto")
    assert all(same(one, other) for one, other in zip(before, ask(device, rows), strict=True))
    if packed.kind.truth is not None:
        device.observe(before[0].id, packed.kind.truth(packed.kind.data.holdout_y[0]))
        assert device.step().labelled == 1
    assert device.status().counters.predictions in (40, 80)
    device.step()
    assert device.status().counters.predictions == 80


def test_monitors_stay_calm_on_usual_rows_and_raise_the_alarm_on_changed_ones(packed, make_device, clock):
    device = make_device(checkpoint=packed.folder, variant="auto", mode="monitor")
    for _ in range(3):
        ask(device, rows_of(packed))
        clock.advance(60)
        assert device.step().problem == ""
    assert device.status().alarms == []
    for _ in range(3):
        ask(device, [packed.kind.drift(row) for row in rows_of(packed)])
        clock.advance(60)
        device.step()
    assert "input" in device.status().alarms
    assert [entry.detail["monitor"] for entry in device.history(limit=500) if entry.name == "drift_alarm"]


# ---- what each kind says


def test_regression_head_is_standardised_and_its_values_are_the_networks(pack):
    import torch

    packed = pack("regression")
    kind, manifest = packed.kind, packed.result.manifest
    assert manifest.adapt == "head"
    assert [target.mean for target in manifest.targets] == pytest.approx([20, 101_300], rel=0.02)
    assert all(target.tolerance > 0 for target in manifest.targets)
    assert packed.result.comparison.int8.accuracy.value >= 0.8
    with torch.no_grad():
        expected = kind.model(torch.from_numpy(kind.data.holdout_x)).numpy()
    from edge_quantize import encode
    from edge_quantize.compare import predict

    latents = encode(packed.folder, kind.data.holdout_x, spec=manifest.input, variant="fp32")
    off = np.abs(predict(packed.folder, latents) - expected) / [target.std for target in manifest.targets]
    assert off.mean() < 0.02


def test_device_says_regression_values_within_their_tolerance(pack, make_device):
    packed = pack("regression")
    device = make_device(checkpoint=packed.folder)
    said = np.stack([p.values for p in ask(device, rows_of(packed))])
    tolerance = [target.tolerance for target in packed.result.manifest.targets]
    right = (np.abs(said - packed.kind.data.holdout_y) <= tolerance).all(axis=1).mean()
    assert right == pytest.approx(packed.result.comparison.int8.accuracy.value)


def test_multilabel_thresholds_decide_what_is_present(pack, make_device):
    packed = pack("multilabel")
    device = make_device(checkpoint=packed.folder)
    for prediction in ask(device, rows_of(packed, 60)):
        thresholds = zip(prediction.labels, prediction.probabilities, [0.4, 0.5, 0.6], strict=True)
        assert prediction.present == tuple(label for label, p, at in thresholds if p >= at)
    assert packed.result.manifest.thresholds == [0.4, 0.5, 0.6]


def test_rows_of_a_table_may_lack_values_and_hold_unseen_ones(pack, make_device):
    device = make_device(checkpoint=pack("table").folder)
    assert device.predict({"age": 80, "site": "nowhere", "note": "words nobody has seen"}).label in device.labels
    assert device.predict({}).label in device.labels
    with pytest.raises(InputError, match="no column 'weight'"):
        device.predict({"age": 80, "weight": 70})
    with pytest.raises(InputError, match="'age'"):
        device.predict({"age": "old"})


def test_images_of_any_size_are_resized_as_in_training(pack, make_device):
    packed = pack("image")
    device = make_device(checkpoint=packed.folder)
    picture = np.full((50, 33, 3), 60, np.uint8)
    picture[..., 2] = 180
    assert device.predict(picture).label == "blue"
    with pytest.raises(InputError, match="any"):
        device.predict(picture[..., :2])


def test_recording_of_any_length_is_cut_to_the_latest_steps(pack, make_device):
    packed = pack("sensor")
    device = make_device(checkpoint=packed.folder)
    long, short = packed.kind.data.holdout_x[0], packed.kind.data.holdout_x[0][-32:]
    assert np.array_equal(device.predict(long).probabilities, device.predict(short).probabilities)


def test_detector_puts_out_as_many_rows_as_it_finds(pack, make_device):
    packed = pack("detector")
    device = make_device(checkpoint=packed.folder, variant="fp32")
    found = {len(p.outputs["scores"]) for p in ask(device, rows_of(packed))}
    assert {0, 1} < found
    weights = numbers(5, 12)
    row = packed.kind.data.holdout_x[0]
    scores = row @ weights
    assert device.predict(row).outputs["scores"] == pytest.approx(scores[scores > 2], abs=1e-5)


def test_recurrent_device_equals_torch_step_by_step(pack, make_device):
    import torch

    packed = pack("recurrent")
    device = make_device(checkpoint=packed.folder, variant="fp32")
    rows = rows_of(packed, 50)
    said = np.stack([p.probabilities for p in ask(device, rows)])
    hidden, cell = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    expected = []
    with torch.no_grad():
        for row in rows:
            logits, hidden, cell = packed.kind.model(torch.from_numpy(row[None]), hidden, cell)
            expected.append(logits.softmax(1).numpy()[0])
    assert np.allclose(said, expected, atol=1e-5)
    anew = device.predict(rows[-1]).probabilities
    assert not np.allclose(anew, said[-1], atol=1e-3)
    with pytest.raises(InputError, match="a state has"):
        device.predict(rows[0], state={"hidden": np.zeros((1, 1, 8), np.float32)})


def test_fixed_input_is_no_longer_asked_for(pack, make_device):
    packed = pack("fixed_input")
    device = make_device(checkpoint=packed.folder, variant="fp32")
    row = packed.kind.data.holdout_x[0]
    assert device.predict(row).outputs["score"] == pytest.approx(row @ numbers(4, 3) - 0.25, abs=1e-5)


def test_model_with_several_inputs_takes_them_by_name(pack, make_device):
    packed = pack("several_inputs")
    device = make_device(checkpoint=packed.folder)
    row = rows_of(packed, 1)[0]
    assert device.predict(row).values.shape == (1,)
    with pytest.raises(InputError, match="picture, readings, by name"):
        device.predict(row["picture"])
    with pytest.raises(InputError, match="readings"):
        device.predict({**row, "readings": np.zeros(3, np.float32)})


# ---- learning


@dataclass(frozen=True)
class Change:
    """How the world of a kind changes, and what a device needs to follow it.

    Attributes:
        kind: The model and its rows.
        folder: Its checkpoint.
        x: Rows as they look now, to live on.
        truths: Of them.
        then: Rows that nobody learns from, as they looked in training.
        now: The same as they look now.
        answers: Of both.
        settings: Of the device.
    """

    kind: Kind
    folder: Any
    x: Any
    truths: list[Any]
    then: Any
    now: Any
    answers: list[Any]
    settings: dict[str, Any]


def turned_digits(digits, folder):
    """Several labels of one handwritten digit; the camera is turned by 20 degrees."""
    from torch import nn
    from torch.nn.functional import binary_cross_entropy_with_logits

    def facts(y):
        return np.stack([y % 2 == 1, y >= 5, np.isin(y, [0, 6, 8, 9])], axis=1).astype(np.int64)

    labels, turn = ("odd", "high", "looped"), rotation(20)
    x, y = digits.factory.x, facts(digits.factory.y)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(48, 3),
    )  # fmt: skip
    fit(net, x[:660], y[:660].astype(np.float32), binary_cross_entropy_with_logits, epochs=12)
    settings = {"labels": labels, "task": "multilabel", "input_spec": InputSpec([1, 8, 8], low=0, high=1)}
    kind = Kind(net, Dataset(x[:660], y[:660], x[660:], y[660:]), settings, turn)
    kind.build(folder)
    truths, answers = (
        [[label for label, there in zip(labels, row, strict=True) if there] for row in facts(pool.y)]
        for pool in (digits.life, digits.score)
    )
    return Change(
        kind, folder, turn(digits.life.x, None), truths, digits.score.x, turn(digits.score.x, None), answers, {}
    )


def slow_machine(pack):
    """A recording of a machine at half its speed: one label now looks like another did."""
    packed = pack("sensor")
    data, slow = packed.kind.data, lambda x: np.repeat(x, 2, axis=1)[:, :40]
    return Change(
        packed.kind, packed.folder, slow(data.train_x), [packed.kind.truth(y) for y in data.train_y], data.holdout_x,
        slow(data.holdout_x), [packed.kind.truth(y) for y in data.holdout_y], {},
    )  # fmt: skip


FORGETFUL = {
    "gate": {"factory_margin": 1.0, "class_margin": 1.0}, "policy": {"accuracy_target": 0.8},
    "replay": {"factory_rows": 0},
}  # fmt: skip
"""For a device whose old world will not come back: it learns until the new one is known, whatever it forgets."""
BIAS = np.array([1, 0.5, 0, 0, 0], np.float32)


def biased_sensors(pack):
    """Two of the sensors that a regression reads are off from now on: the very same rows mean something else."""
    packed = pack("regression")
    data = packed.kind.data
    return Change(
        packed.kind, packed.folder, data.train_x + BIAS, [packed.kind.truth(y) for y in data.train_y], data.holdout_x,
        data.holdout_x + BIAS, [packed.kind.truth(y) for y in data.holdout_y], FORGETFUL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def change_of(pack, digits, tmp_path_factory):
    """Makes each change once."""
    made = {}

    def one(name):
        if name not in made:
            made[name] = {
                "multilabel": lambda: turned_digits(digits, tmp_path_factory.mktemp("turned") / "release-1"),
                "sensor": lambda: slow_machine(pack),
                "regression": lambda: biased_sensors(pack),
            }[name]()
        return made[name]

    return one


@pytest.fixture
def adapting(make_device, config):
    """Opens a device for a change: `adapting(change, learn={...})`."""

    def make(change, home="device", *, checkpoint=None, **sections):
        changed = {
            name: msgspec.structs.replace(
                getattr(config, name), **change.settings.get(name, {}), **sections.get(name, {})
            )
            for name in {*change.settings, *sections}
        }
        return make_device(home, checkpoint=checkpoint or change.folder, variant="auto", **changed)

    return make


def live(device, clock, x, truths, *, ticks, until=lambda device: False):
    """Rows and their truths, over and over, until something is so."""
    for tick in range(ticks):
        clock.advance(300)
        rows = np.arange(tick * 40, tick * 40 + 40) % len(x)
        for prediction, row in zip(device.predict_batch(x[rows]), rows, strict=True):
            device.observe(prediction.id, truths[row])
        assert device.step().problem == ""
        if until(device):
            break
    return device


def has_learned(device):
    status = device.status()
    return status.counters.promotions > 0 and status.phase == "idle" and (status.accuracy or 0) >= 0.65


@pytest.mark.parametrize(
    ("name", "fall", "rise", "forgets"),
    [("multilabel", 0.2, 0.1, 0.03), ("sensor", 0.3, 0.3, 0.05), ("regression", 0.8, 0.5, 1)],
)
def test_device_follows_its_world_and_takes_what_it_learned_to_the_next_release_on_the_same_trunk(
    change_of, adapting, clock, tmp_path, name, fall, rise, forgets
):
    change = change_of(name)
    device = adapting(change)
    before, drifted = device.evaluate(change.then, change.answers), device.evaluate(change.now, change.answers)
    assert drifted <= before - fall

    live(device, clock, change.x, change.truths, ticks=40, until=has_learned)

    learned = device.evaluate(change.now, change.answers)
    assert learned >= drifted + rise
    assert device.evaluate(change.then, change.answers) >= before - forgets
    status = device.status()
    assert status.counters.promotions >= 1
    promoted = [entry for entry in device.lineage() if entry.outcome == "promoted"]
    assert promoted[-1].head == status.head
    assert all(entry.detail["evidence"] >= 1 / entry.detail["alpha"] for entry in promoted)
    device.stop()

    again = adapting(change)  # after a restart
    assert (again.status().head, again.evaluate(change.now, change.answers)) == (status.head, learned)
    again.stop()

    following, other = tmp_path / "release-2", tmp_path / "release-3"
    repack_checkpoint(
        change.folder, following, head=Head.load(change.folder / HEAD_NPZ), release=2, created=CREATED,
        data=change.kind.data,
    )  # fmt: skip
    updated = adapting(change, checkpoint=following)
    assert updated.status().release == 2
    assert carried(updated) == (True, "kept: personal head")
    assert updated.evaluate(change.now, change.answers) == learned
    assert updated.status().judge_rows + updated.status().replay_rows > 0
    updated.stop()

    replace(change.kind, model=retrained(change.kind.model)).build(other, release=3)
    anew = adapting(change, checkpoint=other)
    assert (anew.status().release, anew.status().head) == (3, 0)
    assert carried(anew) == (False, "dropped: the new release has another trunk")
    assert anew.evaluate(change.now, change.answers) == pytest.approx(drifted, abs=0.05)


def carried(device):
    """Whether the last release took the personal head along, and the beginning of why."""
    (*_, detail) = [entry.detail for entry in device.history(limit=1_000) if entry.name == "release_activated"]
    return detail["carried"], detail["head"].partition(" 0.")[0]


def retrained(net):
    """As good a network, with another trunk."""
    import torch

    changed = copy.deepcopy(net)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.01)
    return changed


@pytest.mark.parametrize("name", ["classification_none", "raw", "recurrent"])
def test_feedback_to_a_model_that_does_not_learn_is_counted_and_can_be_forgotten(pack, make_device, name):
    packed = pack(name)
    device = make_device(checkpoint=packed.folder, holdout_share=0.5)
    said = ask(device, rows_of(packed, 20))
    labelled = 0
    if packed.kind.truth is not None:
        labelled = 10
        for prediction, y in zip(said[:8], packed.kind.data.holdout_y, strict=False):
            device.observe(prediction.id, packed.kind.truth(y))
        device.reward(said[8].id, 1.0)
        device.reward(said[9].id, 0.0)
    with pytest.raises((IncompatibleError, InputError)):
        device.learn(np.stack(rows_of(packed, 2)), ["any", "any"])
    device.learn_now()
    report = device.step()
    assert (report.labelled, report.problem) == (labelled, "")
    status = device.status()
    assert (status.fresh_rows, status.judge_rows, status.phase) == (0, 0, "idle")
    assert (device.label_requests(5), device.lineage(), device.skew().training.rows) == ([], [], 0)
    assert device.forget([prediction.id for prediction in said[10:15]]) == 5
    assert device.forget_all().head == 0
    assert device._store.read("SELECT count(*) FROM rows") == [(0,)]
    assert device.predict(packed.kind.data.holdout_x[0]).release == 1
    assert device.step().problem == ""


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_a_world_that_contradicts_the_factory_s_is_not_learned_unless_that_may_be_forgotten(
    pack, make_device, clock, name
):
    packed = pack(name)
    device = make_device(checkpoint=packed.folder, variant="auto")
    off = np.resize(BIAS, packed.kind.data.train_x.shape[1])
    truths = [packed.kind.truth(y) for y in packed.kind.data.train_y]
    live(device, clock, packed.kind.data.train_x + off, truths, ticks=10)
    rejected = [entry.detail["reason"] for entry in device.lineage() if entry.outcome == "rejected"]
    assert rejected
    assert all(reason.startswith("forgets: ") for reason in rejected)
    assert device.status().head == 0


@pytest.mark.parametrize(
    ("learning", "learned"),
    [
        ({"learner": "sgd", "ewc_lambda": 0.0, "passes": 60}, False),
        ({"learner": "sgd", "ewc_lambda": 0.0, "passes": 60, "loss": "huber", "huber_delta": 0.3}, True),
        ({"learner": "hybrid", "filter_share": 0.2}, True),
    ],
    ids=["squared", "huber", "filtered"],
)
def test_regression_learns_although_every_tenth_truth_is_far_off(change_of, adapting, clock, learning, learned):
    change = change_of("regression")
    device = adapting(change, learn=learning)
    stds = [target.std for target in device._served.manifest.targets]
    truths = [
        truth if i % 10 else [value + 10 * std for value, std in zip(truth, stds, strict=True)]
        for i, truth in enumerate(change.truths)
    ]
    live(device, clock, change.x, truths, ticks=25)
    assert (device.evaluate(change.now, change.answers) >= 0.4) == learned


def test_device_learns_a_digit_that_it_never_saw_and_takes_it_to_the_next_release(
    make_device, checkpoint, digits, clock, tmp_path
):
    known, eights = digits.score.only(set(range(8))), digits.score.only({8})
    names = [str(y) for y in known.y]
    pool = digits.life.only(set(range(9)))
    device = make_device()
    before = device.evaluate(known.x, names)
    assert "8" not in device.labels

    truths = [str(y) for y in pool.y]
    live(device, clock, pool.x, truths, ticks=10)
    assert device.status().new_labels["8"] >= 20
    device.learn_now()
    live(device, clock, pool.x, truths, ticks=20, until=has_learned)

    assert device.labels == (*(str(i) for i in range(8)), "8")
    learned = device.evaluate(eights.x, ["8"] * len(eights.y)), device.evaluate(known.x, names)
    assert learned[0] >= 0.8
    assert learned[1] >= before - 0.03
    device.stop()
    base = digits.factory.only(set(range(8)))
    repack_checkpoint(
        checkpoint, tmp_path / "release-2", head=Head.load(checkpoint / HEAD_NPZ), release=2, created=CREATED,
        data=Dataset(base.x[:480], base.y[:480], base.x[480:], base.y[480:]),
    )  # fmt: skip
    updated = make_device(checkpoint=tmp_path / "release-2")
    assert updated.status().release == 2
    assert carried(updated) == (True, "kept: personal head")
    assert updated.labels[-1] == "8"
    assert (updated.evaluate(eights.x, ["8"] * len(eights.y)), updated.evaluate(known.x, names)) == learned


# ---- releases between adapt levels


class Publisher:
    """Says what the group should run, and answers requests for blocks."""

    def __init__(self):
        self.broker, self.topics = MemoryBroker(), Topics()
        self.transport = MemoryTransport(self.broker)
        self.transport.subscribe(self.topics.up("+", "need"))
        self.transport.connect()
        self.blobs, self.revision = {}, 0

    def publish(self, folder):
        self.blobs |= {digest_of(path.read_bytes()): path.read_bytes() for path in folder.iterdir()}
        data = (folder / MANIFEST_NAME).read_bytes()
        self.revision += 1
        desired = Desired(
            revision=self.revision, base=Offer(parse_manifest(data).release, digest_of(data), len(data)),
            candidate=None, salt="", threshold=0, revoked=[], block_bytes=BLOCK,
        )  # fmt: skip
        self.transport.publish(self.topics.desired("default"), encode(desired), retain=True)

    def pump(self):
        for message in self.transport.receive():
            need = decode(message.payload, Need)
            data = self.blobs[need.digest]
            for i in sorted(from_bitmap(need.blocks, block_count(need.size, BLOCK))):
                self.transport.publish(self.topics.block(need.digest, i), data[i * BLOCK : (i + 1) * BLOCK])


def test_releases_of_other_adapt_levels_come_over_the_network_without_a_gap_in_serving(
    pack, make_device, clock, tmp_path
):
    """Head, then none, then head again, on the same rows."""
    kind = pack("classification_none").kind
    levels = ("head", "none", "head")
    folders = [tmp_path / f"release-{release}" for release in (1, 2, 3)]
    for release, (folder, level) in enumerate(zip(folders, levels, strict=True), start=1):
        kind.build(folder, release=release, adapt=level, parent=folders[release - 2] if release > 1 else None)
    publisher = Publisher()
    device = make_device(
        checkpoint=folders[0], transport=MemoryTransport(publisher.broker), update=UpdateConfig(min_free_bytes=0)
    )
    device.connect()
    rows, said = list(zip(kind.data.holdout_x, kind.data.holdout_y, strict=True)), []
    for release, folder in enumerate(folders, start=1):
        if release > 1:
            publisher.publish(folder)
        for turn in range(40):
            for row, y in rows[turn * 6 : turn * 6 + 6]:
                prediction = device.predict(row)
                device.observe(prediction.id, kind.truth(y))
                said.append(prediction.release)
            clock.advance(5)
            assert device.step().problem == ""
            publisher.pump()
        status = device.status()
        assert status.release == release
        assert ("served, not learned on" in status.waits) == (levels[release - 1] == "none"), status.waits
        assert status.accuracy >= 0.85
        assert bool(status.fresh_rows) == (levels[release - 1] == "head")
    assert said == sorted(said)
    assert len(said) == 3 * len(rows)
    activated = [entry.detail["release"] for entry in device.history(limit=1000) if entry.name == "release_activated"]
    assert activated == [1, 2, 3]


def test_released_model_of_another_task_replaces_the_one_before(pack, make_device, tmp_path):
    folder = tmp_path / "release-2"
    pack("raw").kind.build(folder, release=2, parent=pack("table").folder)
    device = make_device(checkpoint=pack("table").folder)
    assert device.predict({"age": 80}).label
    device.stop()
    device = make_device(checkpoint=folder)
    assert device.predict(pack("raw").kind.data.holdout_x[0]).outputs["map"].shape == (9,)
    assert device.step().problem == ""


def test_damaged_file_of_any_kind_is_found(packed, tmp_path):
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    name = next(iter(packed.result.manifest.model_files.values()))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert CliRunner().invoke(edge_quantize.cli.main, ["verify", str(folder)]).exit_code == 3
    assert verify_checkpoint(packed.folder) == packed.result.manifest


# ---- over HTTP


@pytest.mark.parametrize("name", ["multilabel", "regression", "raw", "recurrent", "table", "several_inputs"])
def test_app_in_another_language_predicts_and_observes_over_http(pack, make_device, name):
    packed = pack(name)
    kind, manifest = packed.kind, packed.result.manifest
    device = make_device(checkpoint=packed.folder)
    row = rows_of(packed, 1)[0]
    sample = msgspec.to_builtins(row, enc_hook=lambda value: value.tolist())

    async def talk(client):
        reply = await client.post("/predict", json={"x": sample})
        assert reply.status_code == 200, reply.text
        said, direct = reply.json(), device.predict(row)
        match manifest.task:
            case "multilabel":
                assert list(said["probabilities"].values()) == pytest.approx(direct.probabilities.tolist())
                assert said["present"] == list(direct.present)
            case "regression":
                assert list(said["values"].values()) == pytest.approx(direct.values.tolist())
            case "raw":
                assert said["outputs"]["map"] == pytest.approx(direct.outputs["map"].tolist())
            case "classification":
                assert said["label"] == direct.label
        if manifest.state:
            second = await client.post("/predict", json={"x": sample, "state": said["state"]})
            assert second.status_code == 200, second.text
            expected = device.predict(row, state=direct.state)
            found = second.json()["probabilities"]
            assert list(found.values()) == pytest.approx(expected.probabilities.tolist(), abs=1e-6)
        truth = "anything" if kind.truth is None else kind.truth(kind.data.holdout_y[0])
        observed = await client.post("/observe", json={"id": said["id"], "truth": truth})
        assert observed.status_code == (422 if kind.truth is None else 202), observed.text
        wrong = await client.post("/observe", json={"id": said["id"], "truth": kind.wrong[-1]})
        assert wrong.status_code in (400, 422)

    async def connected():
        transport = httpx.ASGITransport(create_app(device))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await talk(client)

    asyncio.run(connected())
    assert device.step().labelled == (kind.truth is not None)
