"""The broker in memory keeps the same contract as the real ones."""

import pytest

from edge_sdk.checks import CheckFailed, check_transport
from edge_sdk.errors import NotConnectedError
from edge_sdk.messages import MAX_MESSAGE_BYTES
from edge_sdk.transport import MemoryBroker, MemoryTransport, Message, topic_matches


def test_memory_transport_keeps_the_contract():
    broker = MemoryBroker()

    def restart():
        broker.stop()
        broker.start()

    check_transport(
        lambda _name: MemoryTransport(broker),
        restart=restart,
        cut=lambda transport: transport.vanish(),
        timeout_s=0.2,
    )
    assert broker.retained("#") == []


class Echoing(MemoryTransport):
    def deliver(self, message):
        super().deliver(message)
        super().deliver(message)


class NeverRefusing(MemoryTransport):
    def publish(self, topic, payload, *, retain=False):
        if self.connected:
            super().publish(topic, payload[:MAX_MESSAGE_BYTES], retain=retain)


class Forgetful(MemoryTransport):
    def drop(self):
        super().drop()
        for wanted in list(self._filters):
            self.unsubscribe(wanted)


class LeavingAWill(MemoryTransport):
    def close(self):
        if self.connected:
            self.vanish()


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Echoing, "arrives once"),
        (NeverRefusing, "before connect"),
        (Forgetful, "receives what it sends to itself"),
        (LeavingAWill, "no will"),
    ],
)
def test_contract_suite_finds_a_broken_transport(broken, rule):
    broker = MemoryBroker()

    def restart():
        broker.stop()
        broker.start()

    with pytest.raises(CheckFailed, match=rule):
        check_transport(lambda _name: broken(broker), restart=restart, timeout_s=0.05)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a/b/c", False),
        ("+", "a", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("a/#", "b", False),
    ],
)
def test_topic_filters_match_as_in_mqtt(topic_filter, topic, expected):
    assert topic_matches(topic_filter, topic) is expected


def test_a_client_without_network_gets_its_will_published_and_reconnects_later():
    broker = MemoryBroker()
    device, watcher = MemoryTransport(broker), MemoryTransport(broker)
    watcher.connect()
    watcher.subscribe("state")
    device.connect(Message("state", b"lost", retain=True))
    device.subscribe("cmd")

    device.online = False

    assert not device.online
    assert watcher.receive() == [Message("state", b"lost")]
    with pytest.raises(NotConnectedError):
        device.publish("state", b"x")

    watcher.publish("cmd", b"missed")
    device.online = True
    watcher.publish("cmd", b"seen")

    assert device.connections == 2
    assert device.receive() == [Message("cmd", b"seen")]


def test_a_client_that_starts_while_the_broker_is_down_connects_when_it_is_up():
    broker = MemoryBroker()
    broker.stop()
    transport = MemoryTransport(broker)
    transport.connect()
    assert not transport.connected

    broker.start()

    assert transport.connected
    assert transport.connections == 1


def test_a_broker_going_down_takes_unread_messages_but_keeps_retained_ones():
    broker = MemoryBroker()
    transport = MemoryTransport(broker)
    transport.connect()
    transport.subscribe("#")
    transport.publish("plain", b"1")
    transport.publish("kept", b"2", retain=True)

    broker.stop()
    assert transport.receive() == []
    broker.start()

    assert transport.receive() == [Message("kept", b"2", retain=True)]
