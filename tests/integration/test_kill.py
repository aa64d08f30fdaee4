"""Killed at any instant, the device comes back with every acknowledged label and a version that works."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.config import DeviceConfig, LearnConfig, ReplayConfig, ReportConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.manifest import verify_checkpoint
from edge_sdk.resources import FixedReader
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
ROUNDS = 10
TURNS = 30
DEADLINE_S = 60
EXIT_KILLED = 77

CHILD = """
import os, sys, zlib
import numpy as np
from edge_sdk.clock import ManualClock
from edge_sdk.config import DeviceConfig, GateConfig, LearnConfig, PolicyConfig, ReplayConfig, ReportConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.files import set_crash_hook
from edge_sdk.messages import Ack, Envelope, Topics, decode, encode
from edge_sdk.resources import FixedReader
from edge_sdk.transport import MemoryBroker, MemoryTransport

home, checkpoint, data, told, passed, deadly, spared, turns, start = sys.argv[1:]
told, passed, spared = open(told, "a"), open(passed, "a"), int(spared)
met = 0


def crash(name):
    global met
    print(name, file=passed, flush=True)
    met += name == deadly
    if met > spared:
        os._exit(77)


set_crash_hook(crash)
config = DeviceConfig(
    mode="adapt",
    learn=LearnConfig(executor="inline", passes=8),
    policy=PolicyConfig(min_fresh_rows=20, cooldown_s=0),
    replay=ReplayConfig(max_bytes=5_000_000),
    gate=GateConfig(probation_rows=20),
    report=ReportConfig(interval_s=20),
)
broker, topics, clock = MemoryBroker(), Topics(), ManualClock(float(start))
coordinator = MemoryTransport(broker)
coordinator.subscribe(topics.up("+", "report"))
coordinator.subscribe(topics.up("+", "event"))
coordinator.connect()
device = EdgeDevice(
    home, checkpoint=checkpoint, config=config, clock=clock, transport=MemoryTransport(broker),
    resources=FixedReader(), rng=np.random.default_rng(0),
)
device.connect()
arrays = np.load(data)
x, y = arrays["x"], arrays["y"]
row = device.boot * 97
for turn in range(int(turns)):
    times = []
    for last in (False, False, False, False, True):
        clock.advance(1)
        times.append(clock.now())
        row = (row + 1) % len(y)
        device.observe(device.predict(x[row]).id, str(y[row]), durable=last)
    for time in times:  # the flush that holds the last label holds those before it
        print("label", time, file=told, flush=True)
    device.learn_now()
    device.step()
    for message in coordinator.receive():
        envelope = decode(message.payload, Envelope)
        print("seq", envelope.seq, zlib.crc32(bytes(envelope.body)), file=told, flush=True)
        if turn % 3 == 0:
            ack = encode(Ack(envelope.store_id, envelope.seq))
            coordinator.publish(topics.down("device", "ack"), ack)
device.stop()
"""


class Life:
    """One device's folder, and what its processes told before they died."""

    def __init__(self, folder, checkpoint, data):
        folder.mkdir()
        self.home, self._checkpoint, self._data = folder / "device", checkpoint, data
        self._script, self.told, self.passed = folder / "child.py", folder / "told", folder / "passed"
        self._script.write_text(CHILD)
        for file in (self.told, self.passed):
            file.touch()
        self._start = 1_767_225_600.0
        self._highest = 0

    def launch(self, *, deadly="", spared=0, turns=TURNS):
        self._start += 10_000
        arguments = (
            self.home, self._checkpoint, self._data, self.told, self.passed, deadly, spared, turns, self._start,
        )  # fmt: skip
        return subprocess.Popen(
            [sys.executable, str(self._script), *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def lines(self, kind):
        """What was told whole: a last line without its end is none."""
        whole = self.told.read_text().rpartition("\n")[0]
        return [line.split()[1:] for line in whole.splitlines() if line.startswith(kind)]

    def assert_alive(self, image):
        """Every acknowledged label is there once, the version works, and no sequence number is given twice."""
        if not (self.home / "edge.db").exists():
            assert not self.lines("label")
            return
        self._start += 10_000
        clock = ManualClock(self._start)
        device = EdgeDevice(
            self.home, checkpoint=self._checkpoint, config=DeviceConfig(
                mode="monitor", learn=LearnConfig(executor="inline"), report=ReportConfig(interval_s=20),
                replay=ReplayConfig(max_bytes=5_000_000),
            ), clock=clock, transport=MemoryTransport(MemoryBroker()), resources=FixedReader(),
        )  # fmt: skip
        try:
            current = device._slots.pointer.current
            assert verify_checkpoint(device._slots.folder(current)).release == 1
            prediction = device.predict(image)
            assert (prediction.release, prediction.head) == (current.release, current.head)
            before = self._last_seq()
            clock.advance(1_000)
            assert device.step().problem == ""
            assert self._last_seq() > before >= self._highest
            self._highest = self._last_seq()
            kept = Counter(row[0] for row in device._store.conn.execute("SELECT time FROM samples"))
        finally:
            device.stop()
        acknowledged = [float(time) for (time,) in self.lines("label")]
        assert {time: kept[time] for time in acknowledged} == dict.fromkeys(acknowledged, 1)
        assert set(kept.values()) <= {1}
        bodies = {}
        for seq, body in self.lines("seq"):
            assert bodies.setdefault(seq, body) == body

    def _last_seq(self):
        conn = sqlite3.connect(self.home / "edge.db")
        try:
            row = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
        finally:
            conn.close()
        return row[0] if row else 0


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    known, new = digits.life.only(set(range(8))), digits.life.only({8, 9})  # every other digit has yet to be learned
    rows = len(new.y)
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    x = np.stack([known.x[:rows], new.x], axis=1).reshape(-1, *known.x.shape[1:])
    np.savez(path, x=x, y=np.stack([known.y[:rows], new.y], axis=1).ravel())
    return path


@pytest.fixture
def life(tmp_path, checkpoint, data):
    """Makes lives: `life("name")`."""
    return lambda name: Life(tmp_path / name, checkpoint, data)


def test_a_device_killed_at_random_instants_loses_nothing_acknowledged(life, digits):
    device, chance = life("random"), np.random.default_rng(7)
    for _ in range(ROUNDS):
        child = device.launch(turns=100_000)
        try:
            goal = len(device.lines("label")) + int(chance.integers(0, 200))
            deadline = time.monotonic() + DEADLINE_S
            while len(device.lines("label")) < goal:
                assert child.poll() is None
                assert time.monotonic() < deadline
                threading.Event().wait(0.005)
            threading.Event().wait(float(chance.uniform(0, 0.02)))  # any instant of a turn
        finally:
            child.kill()
            child.wait()
        device.assert_alive(digits.life.x[0])
    assert len(device.lines("label")) > 100
    assert any(name.startswith("renamed:00") for name in device.passed.read_text().split())


def test_a_device_killed_at_every_crash_point_comes_back(life, digits):
    whole = life("whole")
    assert whole.launch().wait(DEADLINE_S) == 0
    whole.assert_alive(digits.life.x[0])
    points = Counter(whole.passed.read_text().split())
    assert {"stage:built", "stage:renamed", "commit:before", "commit:after", "renamed:pointer.json"} <= set(points)
    assert any(name.startswith("renamed:00") for name in points), "no head was ever learned"
    for number, (name, times) in enumerate(sorted(points.items())):
        device = life(f"point-{number}")
        child = device.launch(deadly=name, spared=times // 2)
        assert child.wait(DEADLINE_S) == EXIT_KILLED, name
        device.assert_alive(digits.life.x[0])
        child = device.launch(turns=2)
        assert child.wait(DEADLINE_S) == 0, name
        device.assert_alive(digits.life.x[0])
