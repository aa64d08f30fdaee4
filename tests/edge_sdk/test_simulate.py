"""Simulated fleets: real devices in ticks of one clock, whose results depend on the seed alone."""

import json
from dataclasses import asdict

import msgspec
import numpy as np
import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.device import EdgeDevice
from edge_sdk.messages import Ack, Envelope, Topics, decode, encode
from edge_sdk.resources import FixedReader
from edge_sdk.simulate import Fleet, FleetTimeoutError, SimulatedDevice
from edge_sdk.streams import DriftingStream, darkening, rotation, unchanged
from edge_sdk.transport import MemoryBroker, MemoryTransport

NAMES = [str(i) for i in range(10)]
LIVES = {
    "turned": {"transform": rotation(30)},
    "dark": {"transform": darkening(0.3)},
    "grown": {"new_labels": frozenset({8})},
    "clean": {"transform": unchanged},
}


@pytest.fixture
def make_fleet(tmp_path, checkpoint, config, digits):
    fleets = []

    def make(seed=0, *, lives=LIVES, broker=None, checkpoint=checkpoint, label_delay=2, label_share=0.5, **options):
        home = tmp_path / f"fleet-{len(fleets)}"
        clock, trunks, devices = ManualClock(), {}, []
        for number, (name, life) in enumerate(lives.items()):
            rng = np.random.default_rng([seed, number])
            device = EdgeDevice(
                home / name,
                checkpoint=checkpoint,
                config=msgspec.structs.replace(config, device=name, seed=seed),
                transport=MemoryTransport(broker) if broker else None,
                clock=clock,
                resources=FixedReader(),
                trunks=trunks,
                rng=rng,
            )
            stream = DriftingStream(digits.life, rng=rng, base_labels=set(range(8)), drift_at=4, **life)
            devices.append(
                SimulatedDevice(
                    device, stream, label_names=NAMES, rng=rng, label_delay=label_delay, label_share=label_share
                )
            )
        fleets.append(Fleet(devices, clock=clock, **options))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


def story(fleet):
    """All that happened, as bytes."""
    return json.dumps([fleet.events, fleet.timeline(), [asdict(result) for result in fleet.results]]).encode()


def counters(fleet):
    return [msgspec.structs.asdict(simulated.device.status().counters) for simulated in fleet.devices]


def run(make_fleet, seed):
    fleet = make_fleet(seed, broker=MemoryBroker())
    fleet.connect()
    fleet.run(24)
    return fleet


def test_the_same_seed_gives_the_same_story_byte_for_byte_and_another_seed_another(make_fleet):
    first, second, other = run(make_fleet, 1), run(make_fleet, 1), run(make_fleet, 2)
    assert story(first) == story(second)
    assert counters(first) == counters(second)
    assert story(first) != story(other)
    names = {name for _, _, name, _ in first.events}
    assert {"release_activated", "drift_alarm", "learn_started"} <= names
    assert {result.head for result in first.results} > {0}


def test_a_story_tells_of_the_device_whose_data_drifted(make_fleet):
    fleet = run(make_fleet, 1)
    alarmed = {device for _, device, name, _ in fleet.events if name == "drift_alarm"}
    assert "clean" not in alarmed
    assert {"turned", "dark", "grown"} <= alarmed
    assert all(tick >= 4 for tick, _, name, _ in fleet.events if name == "drift_alarm")
    ticks = [tick for tick, *_ in fleet.events]
    assert ticks == sorted(ticks)


def test_every_tick_has_a_result_for_each_device_in_order(make_fleet):
    fleet = make_fleet()
    seen = []
    fleet.run(3, on_tick=seen.append)
    assert [[result.device for result in results] for results in seen] == [list(LIVES)] * 3
    assert [result.tick for results in seen for result in results] == [1] * 4 + [2] * 4 + [3] * 4
    assert fleet.tick_number == 3
    assert fleet.clock.now() == fleet.started + 900
    assert all(result.predictions == 40 for results in seen for result in results)
    assert all(0 <= result.right <= 40 for results in seen for result in results)
    for lines in fleet.timeline().values():
        assert [line[0] for line in lines] == [1, 2, 3]
        assert all(0.8 <= share <= 1 for _, share, _, _ in lines)
        assert all((release, head) == (1, 0) for _, _, release, head in lines)


def test_events_are_collected_once(make_fleet):
    fleet = make_fleet()
    fleet.run(8)
    for simulated in fleet.devices:
        told = [(name, detail) for _, device, name, detail in fleet.events if device == simulated.device.name]
        assert told == [(entry.name, entry.detail) for entry in simulated.device.history(limit=1_000)]


@pytest.mark.parametrize("delay", [1, 4])
def test_labels_come_after_their_delay_for_their_share(make_fleet, delay):
    fleet = make_fleet(lives={"clean": LIVES["clean"]}, label_delay=delay)
    labelled = []
    for _ in range(8):
        fleet.tick()
        labelled.append(fleet.devices[0].device.status().counters.labelled)
    assert labelled[delay - 1] == 0
    assert labelled[delay] > 0
    assert labelled[-1] == pytest.approx(0.5 * 40 * (8 - delay), rel=0.3)
    assert fleet.devices[0].device.status().counters.unmatched == 0


def test_a_device_without_a_model_waits_for_one(make_fleet):
    fleet = make_fleet(lives={"clean": LIVES["clean"]}, checkpoint=None)
    (result,) = fleet.tick()
    assert (result.predictions, result.right, result.release) == (0, 0, 0)
    assert fleet.timeline() == {"clean": []}


def test_scores_leave_out_new_labels_unless_drifted(make_fleet, digits):
    fleet = make_fleet(lives={"grown": LIVES["grown"], "turned": LIVES["turned"]})
    grown, turned = fleet.devices
    base, eights = digits.score.only(set(range(8))), digits.score.only({8})
    pool = digits.score.only(set(range(9)))
    original = grown.accuracy(pool, drifted=False)
    assert original == pytest.approx(grown.device.evaluate(base.x, [NAMES[i] for i in base.y]))
    share = len(base.y) / (len(base.y) + len(eights.y))
    assert grown.accuracy(pool, drifted=True) == pytest.approx(original * share)
    assert turned.accuracy(base, drifted=True) < turned.accuracy(base, drifted=False) - 0.1
    assert turned.accuracy(base, drifted=True) == turned.accuracy(base, drifted=True)


def test_a_summary_tells_what_the_device_counted(make_fleet, digits):
    fleet = make_fleet(lives={"dark": LIVES["dark"]}, label_share=1.0)
    (simulated,) = fleet.devices
    score = digits.score.only(set(range(8)))
    before, under = (simulated.accuracy(score, drifted=drifted) for drifted in (False, True))
    fleet.run(24)
    summary = fleet.summary(simulated, score, before=before, under=under)
    status = simulated.device.status()
    assert (summary.device, summary.drifts, summary.before, summary.under) == ("dark", True, before, under)
    assert summary.after == simulated.accuracy(score, drifted=True)
    assert summary.original == simulated.accuracy(score, drifted=False)
    assert summary.alarms == status.counters.alarms > 0
    assert (summary.promotions, summary.rejections) == (status.counters.promotions, status.counters.rejections)
    assert (summary.release, summary.head) == (1, status.head)


# ---- settling


class Silent:
    """Takes everything and never answers."""

    def pump(self):
        return 0

    def advance(self):
        raise AssertionError("a tick that does not settle goes no further")

    def desired_revision(self, group):
        return 0


class Acknowledging(Silent):
    """Acknowledges what comes, and wants a state of which it tells nobody."""

    def __init__(self, broker, revision):
        self._topics, self._revision = Topics(), revision
        self._transport = MemoryTransport(broker)
        self._transport.connect()
        self._transport.subscribe("#")
        self.turns = 0

    def pump(self):
        messages = [m for m in self._transport.receive() if m.topic.endswith(("/event", "/report"))]
        for message in messages:
            envelope = decode(message.payload, Envelope)
            device = message.topic.split("/")[2]
            self._transport.publish(self._topics.down(device, "ack"), encode(Ack(envelope.store_id, envelope.seq)))
        return len(messages)

    def advance(self):
        self.turns += 1

    def desired_revision(self, group):
        return self._revision


def test_a_fleet_whose_coordinator_never_answers_fails_and_names_who_waits_for_what(make_fleet):
    fleet = make_fleet(broker=MemoryBroker(), coordinator=Silent(), settle_timeout_s=0.05)
    with pytest.raises(FleetTimeoutError, match="tick 0 did not settle: turned 1 acknowledgements"):
        fleet.connect()


def test_a_fleet_that_never_hears_of_the_desired_state_fails_and_says_so(make_fleet):
    broker = MemoryBroker()
    fleet = make_fleet(broker=broker, coordinator=Acknowledging(broker, 3), settle_timeout_s=0.05)
    with pytest.raises(FleetTimeoutError, match="turned desired state 3, has 0"):
        fleet.connect()


def test_a_fleet_without_a_broker_fails_and_names_who_has_no_connection(make_fleet):
    broker = MemoryBroker()
    broker.stop()
    fleet = make_fleet(broker=broker, settle_timeout_s=0.05)
    with pytest.raises(FleetTimeoutError, match="no connection to the broker: turned, dark, grown, clean"):
        fleet.connect()


def test_a_tick_settles_before_and_after_the_rollouts_turn(make_fleet):
    broker = MemoryBroker()
    coordinator = Acknowledging(broker, 0)
    fleet = make_fleet(broker=broker, coordinator=coordinator)
    fleet.connect()
    fleet.run(3)
    assert coordinator.turns == 3
    assert all(simulated.device.status().outbox_rows == 0 for simulated in fleet.devices)
    assert all(simulated.device.status().counters.bytes_sent > 0 for simulated in fleet.devices)


def test_a_device_that_lost_its_network_holds_nobody_up_once_its_outbox_is_empty(make_fleet):
    broker = MemoryBroker()
    fleet = make_fleet(
        lives={"clean": LIVES["clean"]}, broker=broker, coordinator=Acknowledging(broker, 0), settle_timeout_s=5
    )
    fleet.connect()
    broker.stop()
    fleet.settle()
    assert fleet.devices[0].device.connected is False
