"""The contract of a `Transport`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edge_sdk.checks.common import require, require_raises
from edge_sdk.errors import NotConnectedError, ProtocolError
from edge_sdk.messages import MAX_MESSAGE_BYTES
from edge_sdk.transport import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.transport import Transport


def check_transport(
    make: Callable[[str], Transport],
    *,
    settle: Callable[[Transport], object] = lambda _transport: None,
    restart: Callable[[], object] | None = None,
    cut: Callable[[Transport], object] | None = None,
    timeout_s: float = 10.0,
    prefix: str = "check",
) -> None:
    """Check a `Transport` against a broker that runs.

    Args:
        make: Gives a new transport with the client id it is passed, not yet connected, to the same broker
        each time. settle: Lets the network deliver: returns once something may have changed for the
        transport. For an
            `MqttTransport`: `lambda transport: transport.wait(0.1)`.
        restart: Stops the broker and starts it again; None skips the rules about reconnecting.
        cut: Breaks a transport's connection as a lost network does; None skips the rule about the last will.
        timeout_s: How long each expected thing may take.
        prefix: First level of all topics used; nothing retained stays below it.

    Raises:
        CheckFailed: A rule is broken.
    """
    peers: list[_Peer] = []

    def peer(will: Message | None = None, *, connect: bool = True) -> _Peer:
        name = f"{prefix}-{len(peers)}"
        peers.append(_Peer(make(name), settle, timeout_s, marker=f"{prefix}/marker/{name}"))
        if connect:
            peers[-1].connect(will)
        return peers[-1]

    try:
        _check_not_connected(peer(connect=False), prefix)
        sender, reader = peer(), peer()
        _check_delivery(sender, reader, prefix)
        _check_unsubscribe(sender, reader, prefix)
        _check_retained(sender, reader, peer(), peer(), prefix)
        _check_size_limit(sender, reader, prefix)
        will = Message(f"{prefix}/will", b"lost", retain=True)
        _check_close(peer(will), reader, will)
        if cut is not None:
            _check_will(peer(will), reader, peer(), will, cut)
        if restart is not None:
            _check_reconnect(sender, reader, prefix, restart)
    finally:
        for made in peers:
            made.transport.close()


class _Peer:
    """A transport with what it has received, and means to wait for more."""

    def __init__(
        self, transport: Transport, settle: Callable[[Transport], object], timeout_s: float, *, marker: str
    ) -> None:
        self.transport = transport
        self._settle, self._timeout_s, self._marker = settle, timeout_s, marker
        self._markers_sent = 0
        self._received: list[Message] = []

    def connect(self, will: Message | None) -> None:
        self.transport.subscribe(self._marker)
        self.transport.connect(will)
        self.until(lambda: self.transport.connected, "connect() leads to a connection")
        require(self.transport.connections == 1, "`connections` is 1 after the first connection")

    def reconnect(self) -> None:
        self.until(lambda: self.transport.connections == 2, "a transport reconnects by itself")
        self.sync()

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe, and wait until the broker knows."""
        self.transport.subscribe(topic_filter)
        self.sync()

    def sync(self) -> None:
        """Wait until the broker has done all this peer asked for: it takes a connection's wishes in turn."""
        self._markers_sent += 1
        marker = Message(self._marker, str(self._markers_sent).encode())
        self.transport.publish(marker.topic, marker.payload)
        self.until(lambda: marker in self._received, "a transport receives what it sends to itself")
        self._received = [message for message in self._received if message.topic != self._marker]

    def expect(self, rule: str, *expected: Message) -> None:
        """Wait for these messages, in order within a topic, and see that no others come."""
        self.until(lambda: len(self._received) >= len(expected), rule)
        before = -1
        while before < len(self._received):
            before = len(self._received)
            self._turn()
        got, wanted = (sorted(messages, key=lambda message: message.topic) for messages in (self._received, expected))
        require(got == wanted, f"{rule}: expected {_brief(wanted)}, received {_brief(got)}")
        self._received = []

    def until(self, condition: Callable[[], bool], rule: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not condition():
            require(
                time.monotonic() < deadline,
                f"{rule}: not within {self._timeout_s:g} s; received {_brief(self._received)}",
            )
            self._turn()

    def _turn(self) -> None:
        self._settle(self.transport)
        self._received += self.transport.receive()


def _brief(messages: list[Message]) -> str:
    return str([(message.topic, message.payload[:20], message.retain) for message in messages])


def _check_not_connected(peer: _Peer, prefix: str) -> None:
    transport = peer.transport
    require(not transport.connected, "a transport is not connected before connect()")
    require(transport.connections == 0, "`connections` is 0 before connect()")
    require(transport.receive() == [], "nothing is received before connect()")
    require_raises(
        NotConnectedError,
        lambda: transport.publish(f"{prefix}/x", b"x"),
        "publish() before connect() is refused",
    )


def _check_delivery(sender: _Peer, reader: _Peer, prefix: str) -> None:
    filters = [f"{prefix}/exact", f"{prefix}/one/+/level", f"{prefix}/all/#"]
    for topic_filter in [*filters, filters[0]]:
        reader.transport.subscribe(topic_filter)
    reader.sync()
    wanted = [
        *(Message(f"{prefix}/exact", bytes([i])) for i in range(50)),
        Message(f"{prefix}/one/a/level", bytes(range(256))),
        Message(f"{prefix}/all", b"parent"),
        Message(f"{prefix}/all/x/y", b""),
    ]
    unwanted = [
        Message(f"{prefix}/exact/deeper", b"-"),
        Message(f"{prefix}/one/a/b/level", b"-"),
        Message(f"{prefix}/one/a", b"-"),
        Message(f"{prefix}/other", b"-"),
    ]
    for message in [*unwanted, *wanted]:
        sender.transport.publish(message.topic, message.payload)
    reader.expect("what matches a subscription arrives once, unaltered and in order, and nothing else", *wanted)
    for topic_filter in filters[1:]:
        reader.transport.unsubscribe(topic_filter)


def _check_unsubscribe(sender: _Peer, reader: _Peer, prefix: str) -> None:
    topic = f"{prefix}/unsubscribe"
    reader.subscribe(topic)
    reader.transport.unsubscribe(topic)
    reader.transport.unsubscribe(f"{prefix}/never-subscribed")
    reader.sync()
    sender.transport.publish(topic, b"-")
    sender.transport.publish(f"{prefix}/exact", b"after")
    reader.expect("nothing arrives after unsubscribe()", Message(f"{prefix}/exact", b"after"))


def _check_retained(sender: _Peer, reader: _Peer, late: _Peer, later: _Peer, prefix: str) -> None:
    topic = f"{prefix}/retained"
    reader.subscribe(topic)
    sender.transport.publish(topic, b"old", retain=True)
    sender.transport.publish(topic, b"new", retain=True)
    reader.expect(
        "a retained message reaches present subscribers without the flag",
        Message(topic, b"old"),
        Message(topic, b"new"),
    )
    late.subscribe(topic)
    late.expect("a later subscriber gets the last retained message, flagged", Message(topic, b"new", retain=True))
    sender.transport.publish(topic, b"", retain=True)
    reader.expect("an empty retained message reaches present subscribers", Message(topic, b""))
    later.subscribe(topic)
    later.expect("an empty retained message clears the topic")
    reader.transport.unsubscribe(topic)


def _check_size_limit(sender: _Peer, reader: _Peer, prefix: str) -> None:
    topic = f"{prefix}/exact"
    require_raises(
        ProtocolError,
        lambda: sender.transport.publish(topic, bytes(MAX_MESSAGE_BYTES + 1)),
        "publish() of more than MAX_MESSAGE_BYTES is refused",
    )
    largest = bytes(MAX_MESSAGE_BYTES)
    sender.transport.publish(topic, largest)
    reader.expect("MAX_MESSAGE_BYTES arrive, and a refused size breaks nothing", Message(topic, largest))
    require(sender.transport.connections == 1, "a refused size does not cost the connection")


def _check_close(leaver: _Peer, reader: _Peer, will: Message) -> None:
    reader.subscribe(will.topic)
    leaver.transport.publish(will.topic, b"goodbye")
    leaver.transport.close()
    require(not leaver.transport.connected, "a closed transport is not connected")
    require_raises(
        NotConnectedError,
        lambda: leaver.transport.publish(will.topic, b"-"),
        "publish() after close() is refused",
    )
    reader.expect("what was published before close() arrives, and no will", Message(will.topic, b"goodbye"))


def _check_will(victim: _Peer, reader: _Peer, late: _Peer, will: Message, cut: Callable[[Transport], object]) -> None:
    cut(victim.transport)
    reader.expect("the will is published when a connection breaks", Message(will.topic, will.payload))
    victim.transport.close()
    late.subscribe(will.topic)
    late.expect("a retained will is retained", will)
    late.transport.publish(will.topic, b"", retain=True)
    late.sync()
    reader.expect("a will can be cleared", Message(will.topic, b""))


def _check_reconnect(sender: _Peer, reader: _Peer, prefix: str, restart: Callable[[], object]) -> None:
    topic = f"{prefix}/exact"
    restart()
    for peer in (sender, reader):
        peer.reconnect()
    sender.transport.publish(topic, b"again")
    sender.transport.publish(f"{prefix}/unsubscribe", b"-")
    reader.expect("a reconnected transport has its subscriptions, each once", Message(topic, b"again"))
