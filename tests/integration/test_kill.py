"""Killed at any instant, the device comes back with every acknowledged label and a version that works."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from edge_quantize import Dataset, repack_checkpoint
from edge_sdk.clock import ManualClock
from edge_sdk.config import DeviceConfig, LearnConfig, ReplayConfig, ReportConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.head import Head
from edge_sdk.manifest import HEAD_NPZ, verify_checkpoint
from edge_sdk.messages import Report, unpack
from edge_sdk.resources import FixedReader
from edge_sdk.store import Store
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
ROUNDS = 15
KILLS, LIVES = 200, 4
LONGEST_LIFE_S = 0.6
TURNS = 30
DEADLINE_S = 60
EXIT_KILLED = 77

CHILD = """
import os, sys, zlib
from pathlib import Path
import numpy as np
from edge_sdk.clock import ManualClock
from edge_sdk.config import (
    DeviceConfig, GateConfig, LearnConfig, PolicyConfig, ReplayConfig, ReportConfig, UpdateConfig,
)
from edge_sdk.device import EdgeDevice
from edge_sdk.files import set_crash_hook
from edge_sdk.manifest import MANIFEST_NAME, digest_of
from edge_sdk.messages import Ack, Desired, Envelope, Need, Offer, Topics, block_count, decode, encode, from_bitmap
from edge_sdk.messages import Report, unpack
from edge_sdk.resources import FixedReader
from edge_sdk.transport import MemoryBroker, MemoryTransport

BLOCK = 16 * 1024
home, checkpoint, data, told, passed, deadly, spared, turns, start, offered = sys.argv[1:]
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
    learn=LearnConfig(executor="inline", passes=8, consolidation="online"),
    policy=PolicyConfig(min_fresh_rows=20, cooldown_s=0),
    replay=ReplayConfig(max_bytes=5_000_000),
    gate=GateConfig(probation_rows=20),
    report=ReportConfig(interval_s=20, min_count=1),
    update=UpdateConfig(trust="none", min_free_bytes=0, probation_rows=20, max_accuracy_drop=1.0, retry_s=1.0),
)
broker, topics, clock = MemoryBroker(), Topics(), ManualClock(float(start))
coordinator = MemoryTransport(broker)
coordinator.subscribe(topics.up("+", "report"))
coordinator.subscribe(topics.up("+", "event"))
coordinator.subscribe(topics.up("+", "need"))
coordinator.connect()
device = EdgeDevice(
    home, checkpoint=checkpoint, config=config, clock=clock, transport=MemoryTransport(broker),
    resources=FixedReader(), rng=np.random.default_rng(0),
)
device.connect()
blobs = {digest_of(file.read_bytes()): file.read_bytes() for file in Path(offered).iterdir()} if offered else {}
if offered:
    manifest = (Path(offered) / MANIFEST_NAME).read_bytes()
    desired = Desired(
        revision=1, base=Offer(2, digest_of(manifest), len(manifest)), candidate=None, salt="", threshold=0, revoked=[],
        block_bytes=BLOCK,
    )
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
    if offered and device.status().head:  # there is something learned to carry over
        coordinator.publish(topics.desired("default"), encode(desired), retain=True)
    for message in coordinator.receive():
        if message.topic.endswith("/need"):
            need = decode(message.payload, Need)
            for i in sorted(from_bitmap(need.blocks, block_count(need.size, BLOCK))):
                coordinator.publish(topics.block(need.digest, i), blobs[need.digest][i * BLOCK : (i + 1) * BLOCK])
            continue
        envelope = decode(message.payload, Envelope)
        print("seq", envelope.seq, zlib.crc32(bytes(envelope.body)), file=told, flush=True)
        if envelope.kind == "report":
            print("report", envelope.seq, unpack(envelope.body, Report).labelled, file=told, flush=True)
        if turn % 3 == 0:
            ack = encode(Ack(envelope.store_id, envelope.seq))
            coordinator.publish(topics.down("device", "ack"), ack)
device.stop()
"""


NURSERY = """
import json, os, sys, traceback
import edge_sdk.device, edge_sdk.rebase, edge_sdk.transport, onnxruntime

code = compile(open(sys.argv[1]).read(), sys.argv[1], "exec")
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        sys.argv = json.loads(line)
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Life:
    """One device's folder, and what its processes told before they died."""

    def __init__(self, folder, checkpoint, data, offered=""):
        folder.mkdir()
        self.home, self._checkpoint, self._data, self._offered = folder / "device", checkpoint, data, offered
        self._script, self.told, self.passed = folder / "child.py", folder / "told", folder / "passed"
        self._script.write_text(CHILD)
        for file in (self.told, self.passed):
            file.touch()
        self._start = 1_767_225_600.0
        self._highest = 0

    def command(self, *, deadly="", spared=0, turns=TURNS):
        """The script of the next process, and its arguments."""
        self._start += 10_000
        return [str(part) for part in (
            self._script, self.home, self._checkpoint, self._data, self.told, self.passed, deadly, spared, turns,
            self._start, self._offered,
        )]  # fmt: skip

    def launch(self, **what):
        return subprocess.Popen(
            [sys.executable, *self.command(**what)],
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
                mode="monitor", learn=LearnConfig(executor="inline"), report=ReportConfig(interval_s=20, min_count=1),
                replay=ReplayConfig(max_bytes=5_000_000),
            ), clock=clock, transport=MemoryTransport(MemoryBroker()), resources=FixedReader(),
        )  # fmt: skip
        try:
            current = device._slots.pointer.current
            assert verify_checkpoint(device._slots.folder(current)).release == current.release
            assert current.release in ((1, 2) if self._offered else (1,))
            prediction = device.predict(image)
            assert (prediction.release, prediction.head) == (current.release, current.head)
            before = self._last_seq()
            clock.advance(1_000)
            assert device.step().problem == ""
            assert self._last_seq() > before >= self._highest
            self._highest = self._last_seq()
            kept = Counter(row[0] for row in device._store.conn.execute("SELECT time FROM samples"))
            experience = device._adaptation.experience
            replayed = device._store.samples("replay", experience.trunk)
            summed_up = experience._device_moments().mass
        finally:
            device.stop()
        acknowledged = [float(time) for (time,) in self.lines("label")]
        assert {time: kept[time] for time in acknowledged} == dict.fromkeys(acknowledged, 1)
        assert set(kept.values()) <= {1}
        assert [sample.slot for sample in replayed] == list(range(len(experience.buffer)))
        # what was summed up is what the rows added: no row was dropped, and nothing was added twice
        assert summed_up == pytest.approx(sum(s.mass for s in replayed), rel=1e-4)
        bodies = {}
        for seq, body in self.lines("seq"):
            assert bodies.setdefault(seq, body) == body

    def assert_told_once(self):
        """Every row came out or waits, under a number of its own, and each label is counted in one report."""
        labelled = {int(seq): int(count) for seq, count in self.lines("report")}
        numbers = {int(seq) for seq, _ in self.lines("seq")}
        for seq, kind, body in self._rows("SELECT seq, kind, body FROM outbox"):
            numbers.add(seq)
            if kind == "report":
                labelled[seq] = unpack(body, Report).labelled
        assert sorted(numbers) == list(range(1, self._last_seq() + 1))
        assert sum(labelled.values()) == self._rows("SELECT count(*) FROM samples")[0][0]

    def _rows(self, sql):
        conn = sqlite3.connect(self.home / "edge.db")
        try:
            return conn.execute(sql).fetchall()
        finally:
            conn.close()

    def releases(self):
        """What was recorded of releases, in order."""
        store = Store(self.home / "edge.db")
        try:
            entries = store.history(limit=2_000)
        finally:
            store.close()
        return [(entry.name, entry.detail["release"]) for entry in entries if entry.name.startswith("release_")]

    def lineage(self):
        """How each head came to be, or why it did not."""
        store = Store(self.home / "edge.db")
        try:
            return store.lineage(limit=500)
        finally:
            store.close()

    def _last_seq(self):
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'")
        return rows[0][0] if rows else 0


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
    return lambda name, offered="": Life(tmp_path / name, checkpoint, data, offered)


@pytest.fixture(scope="module")
def next_release(checkpoint, digits, tmp_path_factory):
    """Release 2, on the same trunk."""
    base = digits.factory.only(set(range(8)))
    target = tmp_path_factory.mktemp("next") / "release-2"
    repack_checkpoint(
        checkpoint, target, head=Head.load(checkpoint / HEAD_NPZ), release=2, created="2026-02-01T00:00:00Z",
        data=Dataset(base.x[:480], base.y[:480], base.x[480:], base.y[480:]),
    )  # fmt: skip
    return target


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


@pytest.fixture
def nursery(tmp_path):
    """Starts a process of a life without its imports: `nursery(life)`; ends it by SIGKILL after so many seconds."""
    (tmp_path / "nursery.py").write_text(NURSERY)
    with (tmp_path / "errors").open("wb") as errors:
        processes = {}

        def kill_after(device, seconds):
            if device not in processes:
                processes[device] = subprocess.Popen(
                    [sys.executable, tmp_path / "nursery.py", device.command()[0]], text=True, stderr=errors,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            process = processes[device]
            print(json.dumps(device.command(turns=100_000)), file=process.stdin, flush=True)
            pid = int(process.stdout.readline())
            threading.Event().wait(seconds)
            os.kill(pid, signal.SIGKILL)
            status = int(process.stdout.readline())
            assert os.WIFSIGNALED(status), (tmp_path / "errors").read_text()

        yield kill_after
        for process in processes.values():
            process.stdin.close()
            process.wait(DEADLINE_S)
            process.stdout.close()


@pytest.mark.parametrize("seed", range(LIVES))
def test_a_device_killed_over_and_over_while_it_learns_and_updates_loses_and_repeats_nothing(
    life, nursery, digits, next_release, seed
):
    device, chance = life(f"life-{seed}", next_release), np.random.default_rng(seed)
    for number in range(KILLS // LIVES):
        nursery(device, float(chance.uniform(0, LONGEST_LIFE_S)))
        if number % 10 == 9:
            device.assert_alive(digits.life.x[0])
    assert device.passed.read_text(), "every process was killed before it had done anything"
    assert device.launch().wait(DEADLINE_S) == 0
    device.assert_alive(digits.life.x[0])
    assert device.releases()[:2] == [("release_activated", 1), ("release_activated", 2)]
    assert any(head.outcome == "promoted" for head in device.lineage())
    device.assert_told_once()


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


def test_a_device_killed_around_any_record_of_the_learning_transaction_goes_on_with_it(life, digits):
    whole = life("whole")
    assert whole.launch().wait(DEADLINE_S) == 0
    passed = whole.passed.read_text().split()
    begun, ended = passed.index("written:job.npz"), passed.index("removed:job")
    trained, flips = passed.index("renamed:result.json"), range(passed.index("renamed:0001.npz") + 1, ended - 2)
    assert [passed[at] for at in flips] == ["written:pointer.json", "renamed:pointer.json"] * 2
    records = [at + step for at in (begun - 2, trained + 1, ended - 2) for step in (0, 1)]
    assert [passed[at] for at in records] == ["commit:before", "commit:after"] * 3
    for at in [*records, *flips]:
        device = life(f"moment-{at}")
        assert device.launch(deadly=passed[at], spared=passed[:at].count(passed[at])).wait(DEADLINE_S) == EXIT_KILLED
        device.assert_alive(digits.life.x[0])
        assert device.launch().wait(DEADLINE_S) == 0, passed[at]
        device.assert_alive(digits.life.x[0])
        heads = [line.head for line in device.lineage() if line.outcome == "promoted"]
        assert heads, passed[at]
        assert len(set(heads)) == len(heads)


def test_a_device_killed_at_every_crash_point_of_an_update_comes_back_and_updates(life, digits, next_release):
    whole = life("whole", next_release)
    assert whole.launch().wait(DEADLINE_S) == 0
    whole.assert_alive(digits.life.x[0])
    assert whole.releases() == [("release_activated", 1), ("release_activated", 2), ("release_confirmed", 2)]
    passed = whole.passed.read_text().split()
    built = len(passed) - 1 - passed[::-1].index("stage:built")  # of release 2
    fetching = {re.sub("[0-9a-f]{64}", "*", name): at for at, name in reversed(list(enumerate(passed[:built])))}
    moments = [at for name, at in fetching.items() if name.startswith("blocks:") or "*" in name]
    moments += range(built - 1, built + 14)  # staged, head carried over, activated, recorded, taken up
    assert any(name.startswith("renamed:00") for name in passed[built : built + 14]), "no head was carried over"
    for at in moments:
        name = passed[at]
        device = life(f"moment-{at}", next_release)
        assert device.launch(deadly=name, spared=passed[:at].count(name)).wait(DEADLINE_S) == EXIT_KILLED, name
        device.assert_alive(digits.life.x[0])
        assert device.launch().wait(DEADLINE_S) == 0, name
        device.assert_alive(digits.life.x[0])
        assert device.releases() == whole.releases(), name
