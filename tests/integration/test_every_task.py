"""Every kind of model from the training data to a device: packed, verified, served, observed, watched, replaced."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
from edge_quantize import Dataset, build_checkpoint
from edge_sdk.config import UpdateConfig
from edge_sdk.errors import InputError, LabelError
from edge_sdk.http import create_app
from edge_sdk.manifest import MANIFEST_NAME, MODEL_INT8, StateSpec, digest_of, parse_manifest, verify_checkpoint
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
        ("20", [20.0], {"temperature": 20.0}),
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
    report = device.step()
    assert (report.predictions, report.labelled, report.problem) == (120, 120, "")
    status = device.status()
    variant = packed.result.comparison.variants[status.variant]
    assert status.accuracy == pytest.approx(variant.accuracy.value, abs=0.12)
    assert status.counters.labelled == 120
    if not kind.learns:
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
