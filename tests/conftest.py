"""Fixtures that every test may use."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import settings

from edge_sdk.clock import ManualClock
from edge_sdk.config import DeviceConfig, DriftConfig, GateConfig, LearnConfig, PolicyConfig, UpdateConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.resources import FixedReader
from edge_sdk.schema import InputSpec
from edge_sdk.streams import Pool


@pytest.fixture
def rng():
    return np.random.default_rng(20_260_101)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(scope="module")
def embedded_broker():
    """One `EmbeddedBroker` for the module; tests that stop it make their own."""
    from edge_server.broker import EmbeddedBroker

    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture
def mosquitto(request, tmp_path):
    """A real mosquitto on loopback that keeps its data over `kill()` and `start()`.

    Parametrize indirectly with {user: password} to make it ask for credentials.
    """
    broker = Mosquitto(tmp_path, credentials=getattr(request, "param", None))
    broker.start()
    yield broker
    broker.stop()


class Mosquitto:
    """A mosquitto child process with its files in `folder`."""

    host = "127.0.0.1"

    def __init__(self, folder, *, credentials=None):
        self.port = free_port()
        self._folder = folder
        self._process = None
        passwords = folder / "mosquitto.passwords"
        lines = [
            f"listener {self.port} {self.host}",
            f"user {getpass.getuser()}",
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_on_changes true",
            "autosave_interval 1",
            f"log_dest file {folder}/mosquitto.log",
            f"allow_anonymous {'false' if credentials else 'true'}",
        ]
        if credentials:
            passwords.touch(mode=0o600)
            for user, password in credentials.items():
                subprocess.run(["mosquitto_passwd", "-b", passwords, user, password], check=True, capture_output=True)
            lines.append(f"password_file {passwords}")
        (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    def start(self):
        self._process = subprocess.Popen(
            ["mosquitto", "-c", self._folder / "mosquitto.conf"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not accepts_connections(self.host, self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"mosquitto did not start: {(self._folder / 'mosquitto.log').read_text()}")
            threading.Event().wait(0.01)

    def stop(self):
        """End it as an administrator would."""
        self._end(signal.SIGTERM)

    def kill(self):
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def _end(self, number):
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None


def accepts_connections(host, port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- real checkpoints and real handwriting, made once a session

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
    from torch import nn

    from edge_quantize import Dataset, build_checkpoint

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
            measure_memory=False,
        )  # fmt: skip
        return target

    return build_one


@pytest.fixture(scope="session")
def checkpoint(build):
    """Release 1. Read-only: copy it before you change it."""
    return build()


@pytest.fixture(scope="session")
def other_trunk(build):
    """Release 2, with another trunk. Read-only."""
    return build(release=2, seed=1)


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
        update=UpdateConfig(trust="none"),
    )


@pytest.fixture
def make_device(tmp_path, checkpoint, config, clock):
    """Opens devices: `make_device(mode="shadow", transport=...)`. All are stopped at the end."""
    opened: list[EdgeDevice] = []

    def make(home: str = "device", *, checkpoint: Path | None = checkpoint, config=config, **parts):
        for key in ("transport", "executor", "resources", "trunks"):
            parts.setdefault(key, None)
        settings = {
            key: parts.pop(key) for key in list(parts) if key not in ("transport", "executor", "resources", "trunks")
        }
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


# ---- tools that a machine may lack

# timings say nothing here; the same examples each time, so that what passed once fails for a change only
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("fresh", deadline=None, max_examples=500)
settings.load_profile("same")
LEFT_OUT = pytest.StashKey[str]()
TOOLS = {
    "mosquitto": ("mosquitto", "mosquitto_passwd"),
    "node": ("node", "npm"),
    "curl": ("curl",),
    "browser": ("chromium",),
}
"""What a marker's tests need on PATH."""


def pytest_collection_modifyitems(config, items):
    """Leave out tests whose tools are missing, unless everything is required."""
    missing = {mark: [tool for tool in tools if shutil.which(tool) is None] for mark, tools in TOOLS.items()}
    missing = {mark: tools for mark, tools in missing.items() if tools}
    kept = [item for item in items if not any(item.get_closest_marker(mark) for mark in missing)]
    left_out = len(items) - len(kept)
    if not left_out:
        return
    tools = ", ".join(tool for tools in missing.values() for tool in tools)
    if os.environ.get("EDGE_REQUIRE_ALL"):
        raise pytest.UsageError(f"EDGE_REQUIRE_ALL is set, and {left_out} tests would be left out for want of {tools}")
    config.stash[LEFT_OUT] = (
        f"{left_out} tests left out: {tools} not installed (make test installs them as root on Debian)"
    )
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if (line := config.stash.get(LEFT_OUT, None)) is not None:
        terminalreporter.write_line(line)
