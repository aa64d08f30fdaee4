"""Small networks trained on real handwriting, once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge_quantize import Dataset, build_checkpoint
from edge_sdk.manifest import Manifest
from edge_sdk.schema import InputSpec, Scale

LABELS = tuple("01234567")
CREATED = "2026-01-01T00:00:00+00:00"
SPEC = InputSpec(shape=[1, 8, 8], low=0, high=16, preprocess=[Scale(mean=[0.0], std=[16.0])])


@dataclass(frozen=True)
class Base:
    """A packed checkpoint and what it was made from."""

    folder: Path
    manifest: Manifest
    data: Dataset
    net: object


@pytest.fixture(scope="session")
def spec():
    return SPEC


@pytest.fixture(scope="session")
def digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    known = np.flatnonzero(bunch.target < len(LABELS))
    rows = np.random.default_rng(0).permutation(known)
    x, y = bunch.images[rows, None].astype(np.float32), bunch.target[rows].astype(np.int64)
    return Dataset(x[:1000], y[:1000], x[1000:], y[1000:])


@pytest.fixture(scope="session")
def make_net():
    """Untrained networks: every kind puts out 8 logits."""
    import torch
    from torch import nn

    torch.set_num_threads(1)

    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    def make(kind):
        torch.manual_seed(0)
        if kind == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
        if kind == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        end = {
            "pooled": [*pooled, nn.Linear(64, 8)],
            "flattened": [nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 8)],
            "averaged": [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 8)],
            "deep_head": [*pooled, nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 8)],
            "softmax": [*pooled, nn.Linear(64, 8), nn.Softmax(dim=1)],
            "no_head": [nn.Conv2d(64, 8, 1), *pooled],
        }[kind]
        return nn.Sequential(*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64), *end)

    return make


@pytest.fixture(scope="session")
def trained(make_net, digits):
    """A network of the given kind after a few passes over the digits; one training for each kind."""
    import torch

    nets = {}

    def train(kind):
        if kind not in nets:
            net = make_net(kind)
            optimizer = torch.optim.Adam(net.parameters(), 1e-2)
            x, y = torch.from_numpy(SPEC.apply(digits.train_x)), torch.from_numpy(digits.train_y)
            for _ in range(6):
                for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(64):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                    optimizer.step()
            nets[kind] = net
        return nets[kind]

    return train


@pytest.fixture(scope="session")
def build(trained, digits):
    """Pack a trained network; arguments replace the defaults."""

    def run(target, kind="pooled", **changes):
        arguments = {
            "data": digits,
            "labels": LABELS,
            "name": "digits",
            "release": 1,
            "created": CREATED,
            "input_spec": SPEC,
            "measure_memory": False,
            **changes,
        }
        return build_checkpoint(trained(kind), target=target, **arguments)

    return run


@pytest.fixture(scope="session")
def base(build, trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "digits-1"
    result = build(folder)
    return Base(folder, result.manifest, digits, trained("pooled"))
