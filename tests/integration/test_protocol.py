"""A device written from docs/protocol.md alone talks to the real coordinator over a real broker.

`Device` below uses the standard library, paho-mqtt and a MessagePack codec, and nothing of this repository; a test
holds it to that. It lives in memory, serves no model, and passes every self-test.
"""

import ast
import hashlib
import itertools
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

DEADLINE_S = 10.0
WINDOW_ROWS, WINDOW_BLOCKS = 50, 8


# ---- the device: sections of the document in brackets


def pack(*fields):
    """[3] A payload."""
    return b"\x01" + msgpack.encode(fields)


def unpack(payload, size):
    """[3] The first `size` fields of a payload; None if it must be dropped."""
    if not 0 < len(payload) <= 120_000 or payload[0] != 1:
        return None
    fields = msgpack.decode(payload[1:])
    return fields[:size] if isinstance(fields, list) and len(fields) >= size else None


def cohort(salt, device):
    """[6] A device's place in a rollout."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{device}".encode()).digest()[:4], "big")


def choose(device, desired, installed, refused, *, can_leave):
    """[6] What to do about a desired state: ("leave" | "keep" | "fetch" | "shadow" | "refuse", offer)."""
    _, base, candidate, salt, threshold, revoked = desired[:6]
    parts = desired[7] if len(desired) > 7 else []
    if installed in revoked and can_leave:
        return "leave", None
    included = candidate is not None and cohort(salt, device) < threshold
    offers = [(part[0], part[3]) for part in parts if cohort(part[1], device) in places(part[2])]
    offers += [(candidate if included else None, 0), (base, 0)]
    offers = [(o, s) for o, s in offers if o is not None and o[1] not in refused and o[0] not in revoked]
    if not offers or offers[0][0][0] == installed:
        return "keep", None
    offer, shadow_s = offers[0]
    if installed is None or offer[0] > installed:
        return "shadow" if shadow_s and installed is not None else "fetch", offer
    if installed in [o[0] for o in (candidate, *(part[0] for part in parts if not part[3])) if o is not None]:
        return "keep", None
    return "refuse", offer


def places(data):
    """[4] The numbers in a Part: LEB128, each the distance from the one before."""
    found, number, shift, last = [], 0, 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            last += number
            found.append(last)
            number, shift = 0, 0
    return found


class Device:
    """One device: `turn` takes in what came and does what is due; paho's thread only fills the inbox."""

    def __init__(self, port, prefix, name, clock, *, group="default", store_id="5f0c"):
        self.prefix, self.name, self.clock, self.group, self.store_id = prefix, name, clock, group, store_id
        self.up, self.down = f"{prefix}/d/{name}/up/", f"{prefix}/d/{name}/dn/"
        self.rows, self.seq, self.sent, self.acks = [], 0, 0, []
        self.hears_acks = True
        self.installed = self.previous = None  # (release, digest)
        self.refused, self.blobs, self.damaged = set(), {}, 0
        self.desired, self.wanted, self.parts, self.asked = None, None, {}, set()
        self.fetched, self.window_began = [], clock()
        self.inbox, self.changed = [], threading.Condition()
        self.ready, self.waiting = False, set()
        self.client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_connect, self.client.on_subscribe = self.on_connect, self.on_subscribe
        self.client.on_message = self.on_message
        self.client.will_set(self.up + "state", self.state(online=False, reason="lost"), qos=1, retain=True)
        self.client.connect("127.0.0.1", port, clean_start=True)
        self.client.loop_start()
        self.wait_for(lambda: self.ready)
        self.publish("state", self.state(), retain=True)

    # [1] connection

    def on_connect(self, *_):
        for topic in (f"{self.down}ack", f"{self.prefix}/g/{self.group}/desired"):
            self.waiting.add(self.client.subscribe(topic, 1)[1])

    def on_subscribe(self, _client, _userdata, number, *_):
        with self.changed:
            self.waiting.discard(number)
            self.ready = not self.waiting
            self.changed.notify_all()

    def on_message(self, _client, _userdata, message):
        with self.changed:
            self.inbox.append((message.topic, message.payload))
            self.changed.notify_all()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S), f"{self.name} waited in vain"

    def publish(self, kind, payload, *, retain=False):
        assert len(payload) <= 120_000
        return self.client.publish(self.up + kind, payload, qos=1, retain=retain)

    def subscribe(self, topic):
        with self.changed:
            self.ready = False
            self.waiting.add(self.client.subscribe(topic, 1)[1])
        self.wait_for(lambda: self.ready)

    def stop(self):
        self.publish("state", self.state(online=False, reason="stopped"), retain=True).wait_for_publish(DEADLINE_S)
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self):
        """The network is gone, without a goodbye."""
        line = self.client.socket()
        self.client.loop_stop()
        line.shutdown(socket.SHUT_RDWR)

    # [4] messages

    def state(self, *, online=True, reason="birth"):
        release, digest = self.installed or (0, "")
        place = self.group, "shadow", "minimal 1"
        return pack(self.name, self.store_id, self.clock(), online, reason, 1, release, 0, digest, *place)

    def event(self, name, **detail):
        self.put("event", [name, (self.installed or (0, ""))[0], 0, detail])

    def report(self, *, predictions=100, labelled=100, correct=90, errors=0):
        release, start, end = (self.installed or (0, ""))[0], self.window_began, self.clock()
        self.window_began = end
        counts = [predictions, labelled, correct, 0, 0, errors]
        totals = [0, 0, 0, 0, 0, 0, 0]
        timing = [0.9, 1.0, 2.0]
        self.put(
            "report", [start, end, release, 0, "shadow", *counts, *timing, {"3": predictions}, [], *totals, 50.0, 0]
        )

    # [5] outbox: rows are (first, seq, kind, time, body)

    def put(self, kind, body):
        self.seq += 1
        self.rows.append((self.seq, self.seq, kind, self.clock(), body))

    def drop(self, first, last):
        """The outbox was full: rows become one gap."""
        self.rows = [row for row in self.rows if not first <= row[1] <= last]
        self.rows.append((first, last, "gap", self.clock(), [first, last]))
        self.rows.sort()

    def resend(self):
        """30 s have passed without an acknowledgement."""
        self.sent = 0

    def send(self):
        for first, seq, kind, made, body in self.rows:
            oldest = self.rows[0][0]
            if seq > self.sent and first < oldest + WINDOW_ROWS:
                self.publish(
                    "report" if kind == "report" else "event", pack(self.store_id, seq, oldest, made, kind, body)
                )
                self.sent = seq

    # [6] releases

    def follow(self):
        """Do what the desired state asks for."""
        installed = self.installed and self.installed[0]
        action, offer = choose(self.name, self.desired, installed, self.refused, can_leave=self.previous is not None)
        if action == "leave":
            self.leave("revoked")
        elif action == "fetch":
            self.fetch(*offer)
        elif action == "shadow":
            self.refused.add(offer[1])
            self.event("release_failed", release=offer[0], reason="this device runs nothing in shadow")
        elif self.wanted is not None:
            self.client.unsubscribe(f"{self.prefix}/b/{self.wanted[0]}/+")
            self.wanted = None

    def fetch(self, release, digest, size):
        """Fetch what is missing; activate when there is nothing left."""
        assert size <= 4_000_000
        if not self.have(digest, size):
            return
        manifest = json.loads(self.blobs[digest])
        assert manifest["schema"] == 1
        assert manifest["release"] == release
        for entry in manifest["files"].values():
            if not self.have(entry["sha256"], entry["size"]):
                return
        self.activate(release, digest)

    def have(self, digest, size):
        """Whether a blob is here; if not, ask for its next blocks."""
        count = -(-size // 65_536)
        if digest in self.blobs:
            return True
        if self.wanted != (digest, size):
            self.wanted, self.parts, self.asked = (digest, size), {}, set()
            self.subscribe(f"{self.prefix}/b/{digest}/+")
        if len(self.parts) == count:
            data = b"".join(self.parts[i] for i in range(count))
            self.client.unsubscribe(f"{self.prefix}/b/{digest}/+")
            self.wanted = None
            if hashlib.sha256(data).hexdigest() == digest:
                self.blobs[digest] = data
                return True
            self.damaged += 1
            return self.have(digest, size)
        if not self.asked:
            missing = [i for i in range(count) if i not in self.parts][:WINDOW_BLOCKS]
            bitmap = bytearray(-(-count // 8))
            for i in missing:
                bitmap[i // 8] |= 1 << i % 8
            self.asked = set(missing)
            self.fetched += [(digest, i) for i in missing]
            self.publish("need", pack(digest, size, bytes(bitmap)))
        return False

    def take_block(self, digest, index, payload):
        if self.wanted is None or self.wanted[0] != digest:
            return
        size = self.wanted[1]
        if index not in self.parts and 0 < len(payload) == min(65_536, size - index * 65_536):
            self.parts[index] = payload
            self.asked.discard(index)

    def activate(self, release, digest):
        if self.installed is not None:
            self.report()  # the window belongs to the release that made it
        self.previous, self.installed = self.installed, (release, digest)
        before = self.previous[0] if self.previous else 0
        self.event(
            "release_activated", release=release, previous=before, carried=False, head="there is none", variant="int8"
        )
        self.publish("state", self.state(), retain=True)

    def leave(self, reason):
        self.report()
        gone, self.installed, self.previous = self.installed, self.previous, None
        self.refused.add(gone[1])
        self.event("release_rolled_back", release=gone[0], to=self.installed[0], reason=reason)
        self.publish("state", self.state(), retain=True)

    # one turn

    def turn(self):
        with self.changed:
            came, self.inbox = self.inbox, []
        for topic, payload in came:
            levels = topic.split("/")
            if topic == f"{self.down}ack" and (ack := unpack(payload, 2)) is not None:
                if self.hears_acks and ack[0] == self.store_id:
                    self.acks.append(ack[1])
                    self.rows = [row for row in self.rows if row[1] > ack[1]]
            elif levels[1] == "g" and (desired := unpack(payload, 8)) is not None:
                if self.desired is None or desired[0] >= self.desired[0]:
                    self.desired = desired
            elif levels[1] == "b":
                self.take_block(levels[2], int(levels[3]), payload)
        if self.desired is not None:
            self.follow()
        self.send()


# ---- the other side


class World:
    """A coordinator on the broker, devices, and one clock for all."""

    def __init__(self, home, port, prefix, clock):
        from edge_sdk.mqtt import MqttTransport
        from edge_server import Coordinator, RolloutRules
        from edge_server.settings import Settings

        self.port, self.prefix, self.clock, self.home = port, prefix, clock, home
        self.rules = RolloutRules(
            stages=(50, 100), soak_s=60.0, timeout_s=600.0, min_labelled=50, max_accuracy_drop=0.05
        )
        self.transport = MqttTransport("127.0.0.1", port, client_id=f"{prefix}-coordinator")
        self.coordinator = Coordinator(
            home,
            transport=self.transport,
            clock=clock,
            settings=Settings(prefix=prefix, durable=False, repeat_blocks_s=0.0),
        )
        self.devices = []
        self.coordinator.start()
        self.until(lambda: self.transport.connected)

    def enrol(self, name):
        bundle = self.home / f"{name}.json"
        self.coordinator.registry.enrol(name, group="default", out=bundle, actor="test")

    def device(self, name, *, enrolled=True, **options):
        if enrolled:
            self.enrol(name)
        self.devices.append(Device(self.port, self.prefix, name, self.clock.now, **options))
        return self.devices[-1]

    def until(self, condition):
        """Let everybody talk until `condition` holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            self.transport.wait(0.01)
            self.coordinator.pump()
            for device in self.devices:
                device.turn()

    def live(self, seconds, **report):
        """Time passes, every device reports, and the coordinator looks at its rollouts."""
        self.clock.advance(seconds)
        for device in self.devices:
            device.report(**report)
        self.until(lambda: not any(device.rows for device in self.devices))
        self.coordinator.advance()

    def record(self, device):
        return self.coordinator.registry.device(device.name)

    def rows(self, sql):
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(self.home / "coordinator.db")) as database:
            return database.execute(sql).fetchall()

    def hears_of_all_rows(self, device):
        """Wait until the coordinator has seen what was sent, though the device may not know."""
        self.until(lambda: self.rows("SELECT max(last_seq) FROM positions") == [(device.seq,)])

    def close(self):
        for device in self.devices:
            device.stop()
        self.coordinator.close()


prefixes = (f"protocol-{number}" for number in itertools.count())


@pytest.fixture
def world(embedded_broker, tmp_path, clock):
    world = World(tmp_path / "coordinator", embedded_broker.port, next(prefixes), clock)
    yield world
    world.close()


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Two packed checkpoints on one trunk, of more than one block."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from edge_quantize import Dataset, build_checkpoint, repack_checkpoint
    from edge_sdk.head import Head
    from edge_sdk.manifest import HEAD_NPZ
    from edge_sdk.schema import InputSpec

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))
    bunch = load_digits()
    x, y = (bunch.images / 16).astype(np.float32)[:, None], bunch.target.astype(np.int64)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.from_numpy(x[:1200])), torch.from_numpy(y[:1200])).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("releases")
    data = Dataset(x[:1200], y[:1200], x[1200:], y[1200:])
    created = "2026-01-01T00:00:00Z"
    build_checkpoint(
        net.eval(), data, labels=tuple("0123456789"), name="digits", release=1, target=folder / "1", created=created,
        input_spec=InputSpec(shape=[1, 8, 8], low=0.0, high=1.0),
    )  # fmt: skip
    shipped = Head.load(folder / "1" / HEAD_NPZ)
    head = Head({**shipped.weights, "b0": shipped.weights["b0"] + np.float32(0.01)}, shipped.labels)
    repack_checkpoint(folder / "1", folder / "2", head=head, data=data, release=2, created=created)
    return folder


def files_of(folder):
    return {hashlib.sha256(file.read_bytes()).hexdigest(): file.read_bytes() for file in Path(folder).iterdir()}


# ---- the tests


def test_the_device_is_written_without_this_repository():
    tree = ast.parse(Path(__file__).read_text())
    side = next(i for i, node in enumerate(tree.body) if getattr(node, "name", "") == "World")
    imports = [
        name
        for node in itertools.chain(tree.body, *(ast.walk(node) for node in tree.body[:side]))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    assert "paho.mqtt.client" in imports
    assert not [name for name in imports if name.startswith("edge")]


class TestState:
    def test_a_birth_and_a_goodbye_are_heard(self, world):
        device = world.device("a")
        world.until(lambda: world.record(device).online)
        assert world.record(device).reason == "birth"
        assert (world.record(device).mode, world.record(device).sdk) == ("shadow", "minimal 1")
        device.stop()
        world.devices.clear()
        world.until(lambda: world.record(device).reason == "stopped")
        assert not world.record(device).online

    def test_the_broker_speaks_for_a_device_that_vanished(self, world):
        device = world.device("a")
        world.until(lambda: world.record(device).online)
        world.devices.clear()
        device.vanish()
        world.until(lambda: world.record(device).reason == "lost")
        assert not world.record(device).online


class TestOutbox:
    def test_reports_and_events_are_stored_in_order_and_acknowledged(self, world):
        device = world.device("a")
        for _ in range(3):
            device.report()
            device.event("my_own_event", answer=42, why="because")
        world.until(lambda: not device.rows)
        assert device.acks[-1] == 6
        assert world.rows("SELECT seq FROM reports ORDER BY id") == [(1,), (3,), (5,)]
        assert [event.detail for event in world.coordinator.events(name="my_own_event")] == (
            [{"answer": 42, "why": "because"}] * 3
        )
        assert world.record(device).correct == 90

    def test_a_window_of_rows_is_enough_for_many(self, world):
        device = world.device("a")
        for _ in range(3 * WINDOW_ROWS):
            device.report()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT count(*), max(seq) FROM reports") == [(150, 150)]

    def test_rows_are_stored_once_when_acknowledgements_are_lost(self, world):
        device = world.device("a")
        device.hears_acks = False
        device.report()
        device.report()
        world.hears_of_all_rows(device)
        assert len(device.rows) == 2
        device.hears_acks = True
        device.report()
        device.resend()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT seq FROM reports ORDER BY id") == [(1,), (2,), (3,)]
        assert world.coordinator.registry.fleet().counters["duplicate"] == 2

    def test_dropped_rows_are_a_gap(self, world):
        device = world.device("a")
        for _ in range(9):
            device.report()
        device.drop(3, 7)
        world.until(lambda: not device.rows)
        assert world.rows("SELECT seq FROM reports ORDER BY id") == [(1,), (2,), (8,), (9,)]
        assert world.rows("SELECT first, last, source FROM gaps") == [(3, 7, "device")]

    def test_a_gap_over_rows_that_were_committed_unknown_to_the_device_counts_only_what_is_new(self, world):
        device = world.device("a")
        device.hears_acks = False
        device.report()
        device.report()
        world.hears_of_all_rows(device)
        device.hears_acks = True
        for _ in range(3):
            device.report()
        device.drop(1, 4)
        device.resend()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT seq FROM reports ORDER BY id") == [(1,), (2,), (5,)]
        assert world.rows("SELECT first, last, source FROM gaps") == [(3, 4, "device")]

    def test_a_row_ahead_in_an_unknown_outbox_is_sent_back_to_the_oldest(self, world):
        device = world.device("a")
        device.seq = 6
        device.report()
        device.report()
        device.sent = 7  # row 7 got lost on the way
        world.until(lambda: 6 in device.acks)
        assert [row[1] for row in device.rows] == [7, 8]
        device.resend()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT seq FROM reports ORDER BY id") == [(7,), (8,)]
        assert world.rows("SELECT * FROM gaps") == []

    def test_rows_that_never_come_are_a_gap_that_the_coordinator_concludes(self, world):
        device = world.device("a")
        device.report()
        world.until(lambda: not device.rows)
        device.seq = 5  # without a word
        device.report()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT first, last, source FROM gaps") == [(2, 5, "coordinator")]

    def test_a_new_store_begins_anew(self, world):
        device = world.device("a")
        device.report()
        world.until(lambda: not device.rows)
        device.store_id, device.seq, device.sent = "77aa", 0, 0
        device.report()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT store_id, seq FROM reports ORDER BY id") == [("5f0c", 1), ("77aa", 1)]

    def test_bodies_that_cannot_be_stored_do_not_hold_up_the_others(self, world):
        device = world.device("a")
        device.put("event", ["no release"])
        device.put("weather", ["rain"])
        device.put("event", ["nested", 1, 0, {"a": [1]}])
        device.report(labelled=10, correct=11)
        device.put("gap", [1, 1])
        device.report()
        world.until(lambda: not device.rows)
        assert world.rows("SELECT seq FROM rejected ORDER BY seq") == [(1,), (2,), (3,), (4,), (5,)]
        assert world.rows("SELECT seq FROM reports") == [(6,)]

    def test_further_fields_are_ignored(self, world):
        device = world.device("a")
        device.put("event", ["named", 0, 0, {}, "later", {"more": [1, None]}])
        world.until(lambda: not device.rows)
        assert [event.name for event in world.coordinator.events()] == ["named"]

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            pack("5f0c", 1, 1, 1.0, "event"),
            pack("5f0c", 1, 2, 1.0, "event", ["x", 0, 0, {}]),
            pack("5f0c", -1, -1, 1.0, "event", ["x", 0, 0, {}]),
            pack("5f0c", 1, 1, -1.0, "event", ["x", 0, 0, {}]),
            pack("s" * 257, 1, 1, 1.0, "event", ["x", 0, 0, {}]),
            pack("5f0c", 1, 1, 1.0, "event", ["x", 0, 0, {}]) + b"\x00",
            b"\x02" + pack("5f0c", 1, 1, 1.0, "event", ["x", 0, 0, {}])[1:],
        ],
    )
    def test_what_is_no_envelope_is_dropped_without_an_answer(self, world, payload):
        device = world.device("a")
        device.publish("event", payload)
        world.until(lambda: world.coordinator.registry.fleet().counters.get("malformed"))
        device.report()
        world.until(lambda: not device.rows)
        assert device.acks == [1]

    def test_a_stranger_is_not_answered_until_it_is_enrolled(self, world):
        device = world.device("a", enrolled=False)
        device.report()
        world.until(lambda: world.coordinator.registry.fleet().unknown_devices.get("a", 0) >= 2)  # its birth, its row
        assert (device.acks, world.coordinator.devices()) == ([], [])
        world.enrol("a")
        device.resend()
        world.until(lambda: not device.rows)
        assert world.record(device).predictions == 100


@pytest.mark.torch
class TestReleases:
    def test_the_first_release_is_fetched_block_by_block_and_reported(self, world, releases):
        device = world.device("a")
        world.coordinator.push(releases / "1", plan=world.rules)
        world.until(lambda: device.installed is not None and not device.rows)
        expected = files_of(releases / "1")
        assert device.blobs == expected
        assert max(map(len, expected.values())) > 65_536
        assert sorted(device.fetched) == sorted(
            (digest, i) for digest, data in expected.items() for i in range(-(-len(data) // 65_536))
        )
        assert device.installed[1] == hashlib.sha256((releases / "1" / "manifest.json").read_bytes()).hexdigest()
        assert world.record(device).release == 1
        (event,) = world.coordinator.events(name="release_activated")
        assert (event.release, event.detail["release"], event.detail["previous"]) == (1, 1, 0)

    def test_a_damaged_file_is_fetched_again(self, world, releases):
        device = world.device("a")
        manifest = (releases / "1" / "manifest.json").read_bytes()
        digest = hashlib.sha256(manifest).hexdigest()
        world.coordinator.push(releases / "1", plan=world.rules)
        with_forgery = iter([lambda: device.take_block(digest, 0, bytes(len(manifest)))])

        def forge_once():
            if device.wanted and device.wanted[0] == digest:
                next(with_forgery, lambda: None)()
            return device.installed is not None

        world.until(forge_once)
        assert device.damaged == 1
        assert device.blobs == files_of(releases / "1")

    def test_what_several_ask_for_is_sent_to_all(self, world, releases):
        devices = [world.device(name) for name in "ab"]
        world.coordinator.push(releases / "1", plan=world.rules)
        world.until(lambda: all(device.installed for device in devices))
        assert [device.blobs for device in devices] == [files_of(releases / "1")] * 2

    def test_a_request_for_an_unknown_file_or_a_wrong_size_is_not_answered(self, world, releases):
        device = world.device("a")
        world.coordinator.push(releases / "1", plan=world.rules)
        world.until(lambda: device.installed is not None)
        digest, data = max(device.blobs.items(), key=lambda item: len(item[1]))
        came = []
        device.take_block = lambda *block: came.append(block)
        for wanted in (digest, "0" * 64):
            device.subscribe(f"{world.prefix}/b/{wanted}/+")
        device.publish("need", pack(digest, len(data) + 1, b"\x01"))
        device.publish("need", pack("0" * 64, 10, b"\x01"))
        device.publish("need", pack(digest, len(data), b"\xfe\xff"))  # all but the first, and some beyond the end
        count = -(-len(data) // 65_536)
        world.until(lambda: len(came) == count - 1)
        assert came == [(digest, i, data[i * 65_536 : (i + 1) * 65_536]) for i in range(1, count)]

    def test_a_bad_release_reaches_its_cohort_only_and_is_left(self, world, releases):
        devices = [world.device(name) for name in "abcd"]
        world.coordinator.push(releases / "1", plan=world.rules)
        world.until(lambda: all(device.installed for device in devices))
        world.live(100)

        rollout = world.coordinator.push(releases / "2", plan=world.rules)
        first = sorted(devices, key=lambda device: cohort("default-2", device.name))[:2]
        before = {device: set(device.blobs) for device in devices}
        world.until(lambda: all(device.installed[0] == 2 and not device.rows for device in first))
        for device in devices:
            new = {digest for digest, _ in device.fetched} - before[device]
            assert new == (set(device.blobs) - before[device])
            assert bool(new) == (device in first)
            assert not new & before[device], "files that both releases share are not fetched again"
        trunks = {
            hashlib.sha256((releases / "1" / f"trunk.{kind}.onnx").read_bytes()).hexdigest()
            for kind in ("int8", "fp32")
        }
        assert trunks <= set(files_of(releases / "2")), "the second release has the first one's trunk"

        world.clock.advance(30)
        for device in devices:
            device.report(errors=80 if device in first else 0)
        world.until(lambda: not any(device.rows for device in devices))
        world.coordinator.advance()
        assert world.coordinator.registry.rollout(rollout).state.status == "rolling_back"
        world.until(lambda: all(device.installed[0] == 1 and not device.rows for device in devices))
        assert [device for device in devices if device.refused] == [d for d in devices if d in first]
        left = world.coordinator.events(name="release_rolled_back")
        assert sorted(event.device for event in left) == sorted(device.name for device in first)
        assert {(event.release, event.detail["release"], event.detail["to"]) for event in left} == {(1, 2, 1)}
        world.coordinator.advance()
        assert world.coordinator.registry.rollout(rollout).state.status == "rolled_back"
        assert all(device.desired[5] == [2] and device.desired[2] is None for device in devices)

    def test_a_good_release_reaches_everybody_in_stages(self, world, releases):
        devices = [world.device(name) for name in "ab"]
        world.coordinator.push(releases / "1", plan=world.rules)
        world.until(lambda: all(device.installed for device in devices))
        world.live(100)
        rollout = world.coordinator.push(releases / "2", plan=world.rules)
        first, second = sorted(devices, key=lambda device: cohort("default-2", device.name))
        world.until(lambda: first.installed[0] == 2)
        for _ in range(3):
            world.live(100)
        world.until(lambda: second.installed[0] == 2)
        assert second.desired[4] == 2**32
        for _ in range(3):
            world.live(100)
        assert world.coordinator.registry.rollout(rollout).state.status == "completed"
        world.until(lambda: all(device.desired[1][0] == 2 and device.desired[2] is None for device in devices))

    def test_a_release_that_failed_is_told_and_halts_the_rollout(self, world, releases):
        device = world.device("a")
        world.coordinator.push(releases / "1", plan=world.rules)
        world.until(lambda: device.installed is not None)
        world.live(100)

        def self_test_fails(release, digest):
            device.refused.add(digest)
            device.event("release_failed", release=release, reason="self-test")

        device.activate = self_test_fails
        rollout = world.coordinator.push(releases / "2", plan=world.rules)
        world.until(lambda: device.refused and not device.rows)
        world.coordinator.advance()
        world.coordinator.advance()
        assert world.coordinator.registry.rollout(rollout).state.status == "rolled_back"
        assert device.installed[0] == 1


offers = st.none() | st.integers(1, 5).map(lambda number: [number, f"{number:064x}", 100])


@given(
    base=offers,
    candidate=offers,
    threshold=st.sampled_from([0, 2**31, 2**32]),
    revoked=st.sets(st.integers(1, 5), max_size=2),
    installed=st.none() | st.integers(1, 5),
    refused=st.sets(st.integers(1, 5), max_size=2),
    name=st.sampled_from(["a", "b", "c", "d"]),
    parts=st.lists(
        st.tuples(st.integers(1, 5), st.sets(st.sampled_from(["a", "b", "c", "d"])), st.sampled_from([0.0, 60.0])),
        max_size=2,
    ),
)
def test_the_table_of_decisions_is_what_the_sdk_does(
    tmp_path_factory, base, candidate, threshold, revoked, installed, refused, name, parts
):
    from edge_sdk.config import UpdateConfig
    from edge_sdk.errors import RollbackRefusedError
    from edge_sdk.messages import Desired, Offer, Topics, decode, to_places
    from edge_sdk.transport import NoTransport
    from edge_sdk.update import UpdateClient

    named = [
        [[number, f"{number:064x}", 100], "s", to_places(cohort("s", other) for other in names), shadow_s]
        for number, names, shadow_s in parts
    ]
    desired = [1, base, candidate, "salt", threshold, sorted(revoked), 65_536, named]
    digests = {f"{number:064x}": "failed" for number in refused}
    action, offer = choose(name, desired, installed, digests, can_leave=False)

    folder = tmp_path_factory.getbasetemp() / "incoming"
    client = UpdateClient(folder, device=name, topics=Topics(), transport=NoTransport(), config=UpdateConfig())
    client.follow(decode(pack(*desired), Desired))
    if action == "refuse":
        with pytest.raises(RollbackRefusedError):
            client.offered(installed, digests)
    else:
        found = client.offered(installed, digests)
        assert (found and [found.release, found.digest, found.size]) == offer
        if offer and installed is not None:
            assert bool(client.shadow_s(Offer(*offer))) == (action == "shadow")
