"""Real checkpoints and real handwriting for the device's tests, made once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.config import DeviceConfig, DriftConfig, GateConfig, LearnConfig, PolicyConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.resources import FixedReader
from edge_sdk.schema import InputSpec
from edge_sdk.streams import Pool

BASE = tuple("01234567")


@dataclass(frozen=True)
class Digits:
    """Handwriting in [0, 1], float32 [N, 1, 8, 8]; the parts share no image."""

    factory: Pool
    life: Pool
    score: Pool


@pytest.fixture(scope="session")
def digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = (bunch.images / 16.0).astype(np.float32)[:, None], bunch.target.astype(np.int64)
    parts = np.split(np.random.default_rng(0).permutation(len(y)), [900, 1450])
    return Digits(*(Pool(x[part], y[part]) for part in parts))


@pytest.fixture(scope="session")
def build(digits, tmp_path_factory):
    """Makes a checkpoint of the digits 0 to 7: `build(release=2, seed=1)`; another seed is another trunk."""
    import torch
    from edge_quantize import Dataset, build_checkpoint
    from torch import nn

    torch.set_num_threads(1)

    def build_one(*, release: int = 1, seed: int = 0, epochs: int = 8) -> Path:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 8),
        )  # fmt: skip
        base = digits.factory.only(set(range(8)))
        x, y = base.x[:480], base.y[:480]
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(32):
                loss = nn.functional.cross_entropy(net(torch.from_numpy(x[rows])), torch.from_numpy(y[rows]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        target = tmp_path_factory.mktemp("checkpoint") / f"release-{release}"
        build_checkpoint(
            net.eval(), Dataset(x, y, base.x[480:], base.y[480:]), labels=BASE, name="digits", release=release,
            target=target, created="2026-01-01T00:00:00Z", input_spec=InputSpec(shape=[1, 8, 8], low=0.0, high=1.0),
        )  # fmt: skip
        return target

    return build_one


@pytest.fixture(scope="session")
def checkpoint(build):
    """Release 1. Read-only: copy it before you change it."""
    return build()


@pytest.fixture
def config():
    """A device that learns in place and soon, trusted to promote."""
    return DeviceConfig(
        device="dev-1",
        mode="adapt",
        variant="int8",
        durability="normal",
        learn=LearnConfig(executor="inline"),
        policy=PolicyConfig(min_fresh_rows=40, cooldown_s=60),
        drift=DriftConfig(rows_per_day=10_000, alarms_per_day=1),
        gate=GateConfig(max_wait_s=3_600),
    )


@pytest.fixture
def make_device(tmp_path, checkpoint, config, clock):
    """Opens devices: `make_device(mode="shadow", transport=...)`. All are stopped at the end."""
    import msgspec

    opened: list[EdgeDevice] = []

    def make(home: str = "device", *, checkpoint: Path | None = checkpoint, config=config, **parts):
        for key in ("transport", "executor", "resources", "trunks"):
            parts.setdefault(key, None)
        settings = {key: parts.pop(key) for key in list(parts) if key not in ("transport", "executor", "resources", "trunks")}
        device = EdgeDevice(
            tmp_path / home,
            checkpoint=checkpoint,
            config=msgspec.structs.replace(config, **settings),
            clock=clock,
            transport=parts["transport"],
            executor=parts["executor"],
            resources=parts["resources"] or FixedReader(),
            trunks=parts["trunks"],
            rng=np.random.default_rng(0),
        )
        opened.append(device)
        return device

    yield make
    for device in opened:
        device.stop()
