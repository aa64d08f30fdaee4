"""A notice on an MQTT topic outlives the broker: it is published until the broker has given it back."""

import json
import threading
import time

import pytest

from edge_sdk.mqtt import MqttTransport
from edge_server import Coordinator, Settings
from edge_server.alert_settings import AlertSettings, SinkSettings

DEADLINE_S = 30


def until(condition, *turns):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        for turn in turns:
            turn()
        threading.Event().wait(0.01)


@pytest.mark.mosquitto
def test_a_broker_that_dies_under_a_notice_gets_it_again(mosquitto, tmp_path, clock):
    transport = MqttTransport(mosquitto.host, mosquitto.port, client_id="coordinator")
    alerts = AlertSettings(sinks={"ops": SinkSettings(kind="mqtt")}, min_disk_mb=1e12)
    coordinator = Coordinator(tmp_path / "home", transport=transport, clock=clock, settings=Settings(alerts=alerts))
    listener = MqttTransport(mosquitto.host, mosquitto.port, client_id="ops")
    listener.subscribe("edge/alerts/ops")
    coordinator.start()
    listener.connect()
    until(lambda: transport.connected and listener.connected)
    store = coordinator.registry.store
    coordinator.registry.alerts.look()
    clock.advance(60.0)
    mosquitto.kill()
    until(lambda: not transport.connected)
    coordinator.registry.alerts.look()
    coordinator._courier.turn()
    (delivery,) = store.alerts.waiting("ops", limit=9)
    assert "no connection" in delivery.error
    mosquitto.start()
    until(lambda: transport.connected and listener.connected)
    clock.advance(60.0)
    heard = []
    until(
        lambda: not store.alerts.waiting("ops", limit=9),
        coordinator._courier.turn,
        coordinator.pump,
        lambda: heard.extend(listener.receive()),
    )
    until(lambda: heard, lambda: heard.extend(listener.receive()))
    assert {json.loads(message.payload)["delivery"] for message in heard} == {delivery.id}
    listener.close()
    coordinator.close()
