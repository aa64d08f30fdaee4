"""The broker is killed in the middle of it all and comes back: serving goes on, every report arrives once."""

import sqlite3
import threading
import time
from contextlib import closing

import pytest

from edge_sdk.mqtt import MqttTransport
from edge_server import Coordinator, Settings

DEADLINE_S = 30


@pytest.fixture
def coordinator(mosquitto, tmp_path, clock):
    transport = MqttTransport(mosquitto.host, mosquitto.port, client_id="coordinator")
    coordinator = Coordinator(
        tmp_path / "coordinator",
        transport=transport,
        clock=clock,
        settings=Settings(accept_unknown=True, repeat_blocks_s=0.0),
    )
    coordinator.start()
    until(lambda: transport.connected)
    yield coordinator
    coordinator.close()


def until(condition, *turns):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        for turn in turns:
            turn()
        threading.Event().wait(0.01)


def stored_numbers(tmp_path):
    with closing(sqlite3.connect(tmp_path / "coordinator" / "coordinator.db")) as database:
        rows = database.execute("SELECT seq FROM reports UNION ALL SELECT seq FROM events ORDER BY seq").fetchall()
    return [row[0] for row in rows]


@pytest.mark.mosquitto
@pytest.mark.torch
def test_what_was_told_while_the_broker_was_dead_arrives_once_and_in_order(
    mosquitto, coordinator, make_device, tmp_path, clock, digits
):
    device = make_device(transport=MqttTransport(mosquitto.host, mosquitto.port, client_id="dev-1"))
    device.connect()
    until(lambda: device.connected)

    def live(ticks):
        for _ in range(ticks):
            for x, y in zip(digits.life.x[:5], digits.life.y[:5], strict=True):
                device.observe(device.predict(x).id, str(y))
            clock.advance(300)
            device.step()

    live(3)
    until(lambda: not device.waits_for(0), coordinator.pump, device.step)
    live(1)  # sent, and not acknowledged when the broker dies
    mosquitto.kill()
    until(lambda: not device.connected)
    live(4)
    waiting = device.status().outbox_rows
    assert waiting >= 4
    assert device.status().problem == ""

    mosquitto.start()
    until(lambda: not device.waits_for(0), lambda: clock.advance(1), coordinator.pump, device.step)
    numbers = stored_numbers(tmp_path)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 8
    assert device.status().counters.predictions == 40


@pytest.mark.mosquitto
@pytest.mark.torch
def test_a_download_goes_on_where_it_was_when_the_broker_died(mosquitto, coordinator, make_device, checkpoint, clock):
    coordinator.push(checkpoint)
    device = make_device(checkpoint=None, transport=MqttTransport(mosquitto.host, mosquitto.port, client_id="dev-1"))
    device.connect()
    until(lambda: device.connected)
    until(lambda: device.status().fetching == 1, coordinator.pump, device.step)
    mosquitto.kill()
    until(lambda: not device.connected)
    device.step()
    assert not device.ready
    mosquitto.start()
    # what is asked before the coordinator is back is asked again in time
    until(lambda: device.ready, lambda: clock.advance(1), coordinator.pump, device.step)
    settled = [lambda: clock.advance(1), coordinator.pump, device.step]
    until(lambda: not device.waits_for(coordinator.desired_revision()), *settled)
    assert device.status().release == 1
    assert [event.name for event in coordinator.events()] == ["release_activated"]
