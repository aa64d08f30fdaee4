"""Every kind of model, from its training data to a checkpoint; and how the world of some changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_quantize import Dataset, build_checkpoint
from edge_sdk.manifest import (
    StateSpec,
)
from edge_sdk.schema import Column, Impute, InputSpec, OneHot, Permute, Resize, Scale, Window
from edge_sdk.streams import rotation

CREATED = "2026-01-01T00:00:00Z"
TRAIN, HELD_OUT = 400, 240
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

    def rows(self, count=None):
        """That it was not trained on."""
        return list(self.kind.data.holdout_x)[:count]


@pytest.fixture(scope="session")
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


@pytest.fixture
def ask():
    """Predicts rows one after another, carrying what a recurrent model carries."""

    def one_after_another(device, rows):
        state, said = None, []
        for row in rows:
            prediction = device.predict(row, state=state)
            state = prediction.state or None
            said.append(prediction)
        return said

    return one_after_another


# ---- how worlds change


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


@pytest.fixture(scope="session")
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
