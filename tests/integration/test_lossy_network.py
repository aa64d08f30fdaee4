"""Reports, events and commands while all between device and coordinator goes wrong: each counted, and counted once.

The device is its reporter, outbox and command desk on a real database; models have no part in this.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.commands import Desk
from edge_sdk.config import DeviceConfig, ReportConfig
from edge_sdk.errors import NotConnectedError
from edge_sdk.reporter import Identity, Reporter
from edge_sdk.store import Store
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.coordinator import Coordinator
from edge_server.settings import Settings

YEAR_S = 365 * 86_400
FACTS = {"monitors": [], "replay_rows": 0, "fresh_rows": 0, "rss_mb": 0.0}


class BadLine(MemoryTransport):
    """Loses, repeats, delays and reorders what comes in and goes out, as QoS 1 never would and networks do."""

    def __init__(self, broker, rng, *, loss=0.2, twice=0.2, late=0.3):
        super().__init__(broker)
        self.rng, self.loss, self.twice, self.late = rng, loss, twice, late
        self.held_in, self.held_out = [], []

    def publish(self, topic, payload, *, retain=False, expires_s=None, qos=1):
        if not self.connected:
            raise NotConnectedError("no line")
        for _ in range(2 if self.rng.random() < self.twice else 1):
            if self.rng.random() < self.late:
                self.held_out.append((topic, payload, retain))
            elif self.rng.random() >= self.loss:
                super().publish(topic, payload, retain=retain)

    def receive(self):
        messages = self.held_in
        self.held_in = []
        for message in super().receive():
            for _ in range(2 if self.rng.random() < self.twice else 1):
                if self.rng.random() < self.late:
                    self.held_in.append(message)
                elif self.rng.random() >= self.loss:
                    messages.append(message)
        self.rng.shuffle(messages)
        self.rng.shuffle(self.held_out)
        held, self.held_out = self.held_out, []
        for topic, payload, retain in held:
            if self.connected:
                super().publish(topic, payload, retain=retain)
        return messages


class NoUpdates:
    def take_block(self, *_):
        pass

    def hear(self, *_):
        pass

    def look_again(self, *_):
        pass


class World:
    def __init__(self, folder, *, line=MemoryTransport, clock=None, **report):
        self.folder, self.clock = folder, clock or ManualClock()
        self.broker = MemoryBroker()
        self.coordinator = None
        self.restart_coordinator()
        registry = self.coordinator.registry
        bundle = registry.enrol("dev-1", group="default", out=folder / "b.json", actor="test")
        self.config = DeviceConfig(
            device="dev-1", command_key=bundle.command_key, report=ReportConfig(min_count=1, resend_s=5.0, **report)
        )
        self.transport = line(self.broker)
        self.done = []
        self.boot()
        self.reporter.connect()

    def boot(self):
        self.store = Store(self.folder / "edge.db", durability="normal")
        self.reporter = Reporter(
            self.store, store_id="store", boot=1, transport=self.transport, clock=self.clock, config=self.config
        )
        self.reporter.identity = Identity(1, 0, "")
        self.desk = Desk(self.store, device="dev-1", key=self.config.command_key, emit=self.reporter.emit)

    def restart_coordinator(self):
        """As after a kill: what was not committed is gone."""
        if self.coordinator is not None:
            self.coordinator.registry.close()
        self.line = MemoryTransport(self.broker)
        settings = Settings(durable=False)
        self.coordinator = Coordinator(self.folder / "home", transport=self.line, clock=self.clock, settings=settings)
        self.coordinator.start()

    def emit(self, name):
        with self.store.transaction():
            self.reporter.emit(name, {})

    def report(self, predictions):
        self.reporter.window.predictions = predictions
        self.reporter.report(self.clock.now(), carry=True, **FACTS)

    def device_turn(self):
        self.reporter.listen(NoUpdates())
        handlers = {"roll-back": lambda _: self.done.append("roll-back")}
        self.desk.turn(self.reporter.take_orders(), self.clock.now(), handlers)
        return self.reporter.send(self.clock.now())

    def turn(self, seconds=1.0):
        self.device_turn()
        self.coordinator.pump()
        self.clock.advance(seconds)

    def until_delivered(self, most=4000):
        for _ in range(most):
            if not self.reporter.outbox.pending:
                return
            self.turn()
        pytest.fail(f"{self.reporter.outbox.pending} rows still wait")

    @property
    def events(self):
        return [event.name for event in self.coordinator.events(device="dev-1")][::-1]

    @property
    def predictions(self):
        read = self.coordinator.registry.store.read
        return [row[0] for row in read("SELECT predictions FROM reports ORDER BY seq")]

    def close(self):
        self.store.close()
        self.coordinator.close()


@pytest.fixture
def make(tmp_path):
    worlds = []

    def new(**options):
        worlds.append(World(tmp_path, **options))
        return worlds[-1]

    yield new
    for world in worlds:
        world.close()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_lost_repeated_late_and_out_of_order_is_counted_once(make, seed):
    rng = random.Random(seed)
    world = make(line=lambda broker: BadLine(broker, rng))
    world.coordinator.registry.identities.order("dev-1", "roll-back", expires_s=86_400, actor="test")
    for number in range(60):
        world.emit(f"event-{number}")
        world.report(number + 1)
        if number % 10 == 9:
            world.broker.stop()  # in the middle of it all
            world.turn()
            world.broker.start()
        if number % 17 == 16:
            world.restart_coordinator()
        world.turn(rng.uniform(0.1, 3.0))
    for _ in range(300):
        world.turn()
        if world.done and not world.reporter.outbox.pending:
            break
    world.until_delivered()
    assert [name for name in world.events if name != "command_done"] == [f"event-{number}" for number in range(60)]
    assert world.predictions == list(range(1, 61))
    assert world.done == ["roll-back"]
    assert world.events.count("command_done") == 1
    assert [record.outcome for record in world.coordinator.registry.store.commands.find()] == ["done"]


@pytest.mark.parametrize("jump", [YEAR_S, -YEAR_S])
def test_a_clock_that_jumps_by_a_year_loses_and_repeats_nothing(make, jump):
    class Jumping(ManualClock):
        def jump(self, seconds):
            self._now += seconds

    world = make(clock=Jumping(), monthly_bytes=10_000_000, max_per_s=5.0)
    for number in range(30):
        world.emit(f"event-{number}")
        world.report(number + 1)
        if number in (10, 20):
            world.clock.jump(jump if number == 10 else -jump)
        world.turn()
        assert world.reporter.report_due(world.clock.now() + 400, lambda: True)
    world.until_delivered()
    assert world.events == [f"event-{number}" for number in range(30)]
    assert world.predictions == list(range(1, 31))


@pytest.mark.parametrize(("ahead", "outcome"), [(YEAR_S, "expired"), (-YEAR_S, "done")])
def test_a_command_to_a_device_whose_clock_is_a_year_off_is_answered(make, ahead, outcome):
    world = make()
    world.coordinator.registry.identities.order("dev-1", "roll-back", expires_s=60, actor="test")
    world.coordinator.pump()
    world.reporter.listen(NoUpdates())
    world.desk.turn(world.reporter.take_orders(), world.clock.now() + ahead, {"roll-back": lambda _: {"release": 1}})
    world.until_delivered()
    assert [record.outcome for record in world.coordinator.registry.store.commands.find()] == [outcome]


def test_a_coordinator_that_dies_between_receive_and_commit_loses_nothing(make, monkeypatch):
    world = make()
    for number in range(5):
        world.emit(f"event-{number}")
    world.device_turn()

    class Killed(BaseException):
        pass

    store = world.coordinator.registry.store.ingest
    write = store.write

    def die(turn):
        write(turn)
        raise Killed

    monkeypatch.setattr(store, "write", die)
    with pytest.raises(Killed):
        world.coordinator.pump()
    world.restart_coordinator()
    assert world.events == []
    assert world.device_turn() == 0
    assert world.reporter.outbox.pending == 5  # nothing was acknowledged
    world.clock.advance(6)
    world.until_delivered()
    assert world.events == [f"event-{number}" for number in range(5)]


def test_a_coordinator_that_dies_after_its_commit_and_before_the_answer_stores_nothing_twice(make, monkeypatch):
    world = make()
    world.emit("event-0")
    world.device_turn()
    monkeypatch.setattr(world.line, "publish", lambda *_, **__: (_ for _ in ()).throw(NotConnectedError("dead")))
    world.coordinator.pump()
    world.restart_coordinator()
    assert world.events == ["event-0"]
    assert world.reporter.outbox.pending == 1
    world.clock.advance(6)
    world.until_delivered()
    assert world.events == ["event-0"]


CHILD = """
import os, sys
from pathlib import Path
from edge_sdk.files import set_crash_hook
from edge_sdk.messages import Envelope, Event, Topics, encode, raw
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.coordinator import Coordinator
from edge_server.settings import Settings

broker = MemoryBroker()
device = MemoryTransport(broker)
device.subscribe("edge/d/dev-1/dn/ack")
device.connect()
coordinator = Coordinator(Path(sys.argv[1]), transport=MemoryTransport(broker), settings=Settings(accept_unknown=True))
coordinator.start()
for seq in (1, 2, 3):
    body = raw(Event(name=f"event-{seq}", release=0, head=0, detail={}))
    envelope = Envelope(store_id="s", seq=seq, oldest=1, time=1e9, kind="event", body=body)
    device.publish(Topics().up("dev-1", "event"), encode(envelope))
if sys.argv[2]:
    set_crash_hook(lambda name: os._exit(9) if name == sys.argv[2] else None)
coordinator.pump()
print([event.name for event in coordinator.events(device="dev-1")], len(device.receive()))
"""


@pytest.mark.parametrize("instant", ["commit:before", "commit:after"])
def test_a_coordinator_killed_around_its_commit_has_all_or_nothing_and_acknowledged_neither(tmp_path, instant):
    def run(name):
        paths = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("", "server", "quantize"))
        return subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "home"), name],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False,
        )  # fmt: skip

    killed = run(instant)
    assert (killed.returncode, killed.stdout) == (9, "")
    again = run("")
    assert again.stdout == "['event-3', 'event-2', 'event-1'] 1\n", again.stderr


def test_a_months_budget_stops_reports_and_lets_events_pass(make):
    world = make(monthly_bytes=2_000)
    for number in range(40):
        if world.reporter.report_due(world.clock.now() + 400, lambda: True):
            world.report(number + 1)
        world.turn()
        if number == 30:
            world.emit("urgent")
    world.until_delivered()
    told = json.dumps(world.events)
    assert told.count("data_cap_reached") == 1
    assert world.events[-1] == "urgent"
    assert 5 < len(world.predictions) < 20
    counters = world.reporter.counters
    assert counters.month_capped
    assert 2_000 <= counters.month_bytes < 3_000
    world.clock.advance(31 * 86_400)
    assert world.reporter.report_due(world.clock.now(), lambda: True)
    world.report(99)
    world.until_delivered()
    assert world.predictions[-1] == 99
    assert not world.reporter.counters.month_capped


def test_reports_that_wait_when_the_budget_is_spent_become_a_gap_in_front_of_the_events(make):
    world = make(monthly_bytes=500)
    world.broker.stop()
    for number in range(30):
        world.report(number + 1)
    world.emit("urgent")
    world.broker.start()
    world.until_delivered()
    assert world.events == ["urgent", "data_cap_reached"]
    gaps = world.coordinator.registry.store.read("SELECT first, last FROM gaps")
    assert sum(last - first + 1 for first, last in gaps) + len(world.predictions) == 30
