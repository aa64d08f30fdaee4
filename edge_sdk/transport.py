"""How messages travel: the `Transport` protocol, and a broker in memory that ships for tests and simulations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from edge_sdk.errors import NotConnectedError, ProtocolError, TransportError
from edge_sdk.messages import MAX_MESSAGE_BYTES

_OTHER_FILES = 256
Qos = Literal[0, 1]


@dataclass(frozen=True, slots=True)
class Message:
    """One publication."""

    topic: str
    payload: bytes
    retain: bool = False


class Transport(Protocol):
    """A connection to a broker. Every method returns at once; none runs the caller's code on another thread.

    After a reconnect the transport subscribes again to all it was subscribed to.
    """

    @property
    def connected(self) -> bool:
        """Whether a publication would be sent now."""
        ...

    @property
    def connections(self) -> int:
        """How often a connection came about: a change tells the caller to send its birth and resend its outbox."""
        ...

    def connect(self, will: Message | None = None) -> None:
        """Start connecting, and keep reconnecting until `close`. `will` is published for us if we vanish."""
        ...

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expires_s: float | None = None, qos: Qos = 1
    ) -> None:
        """Send it. After `expires_s` a broker that can need no longer deliver it. QoS 0: nobody checks that it came.

        Raises:
            NotConnectedError: There is no connection; nothing was queued.
            ProtocolError: The payload exceeds `MAX_MESSAGE_BYTES`.
        """
        ...

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches, `+` and `#` as in MQTT. Remembered across reconnects; twice is once."""
        ...

    def unsubscribe(self, topic_filter: str) -> None:
        """Receive it no longer."""
        ...

    def receive(self) -> list[Message]:
        """All messages since the last call, oldest first."""
        ...

    def close(self) -> None:
        """Disconnect cleanly (the will is not published) and stop reconnecting."""
        ...


class NoTransport:
    """Stands in where no broker is configured: the device works alone and nothing is queued for anybody."""

    connected = False
    connections = 0

    def connect(self, will: Message | None = None) -> None:
        """Nothing to connect to."""

    def publish(
        self,
        topic: str,
        payload: bytes,  # noqa: ARG002
        *,
        retain: bool = False,  # noqa: ARG002
        expires_s: float | None = None,  # noqa: ARG002
        qos: Qos = 1,  # noqa: ARG002
    ) -> None:
        """Always refused.

        Raises:
            NotConnectedError: There is no broker.
        """
        raise NotConnectedError(f"no broker is configured: {topic} was not sent")

    def subscribe(self, topic_filter: str) -> None:
        """Nothing will come."""

    def unsubscribe(self, topic_filter: str) -> None:
        """Nothing came."""

    def receive(self) -> list[Message]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing to close."""


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT topic filter matches a topic.

    Example:
        >>> topic_matches("edge/d/+/up/#", "edge/d/pump-1/up/report")
        True
    """
    wanted, parts = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(parts) or level not in ("+", parts[i]):
            return False
    return len(wanted) == len(parts)


def _is_pattern(topic_filter: str) -> bool:
    return "+" in topic_filter or "#" in topic_filter


def check_size(topic: str, payload: bytes) -> None:
    """Refuse what would make a broker drop the line.

    Raises:
        ProtocolError: The payload exceeds `MAX_MESSAGE_BYTES`.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{len(payload)} bytes on {topic}; at most {MAX_MESSAGE_BYTES} are sent")


def allow_connections(count: int) -> None:
    """Raise this process's soft limit of open files if it is too low for so many connections and what else is open.

    Args:
        count: Connections; 256 files are kept for the rest. Count whole devices' databases (3 files each) as well.

    Raises:
        TransportError: The hard limit is too low; the message says what to do.
    """
    import resource  # noqa: PLC0415 - only Unix has it, and only large fleets need it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise TransportError(
            f"{count} connections need {wanted} open files and this process may have {hard} at most: raise the hard"
            " limit (as root: ulimit -Hn; systemd: LimitNOFILE=; Docker: --ulimit nofile=) or use more processes"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else hard, hard))


class MemoryBroker:
    """A broker in this process: QoS 1, retained messages, last wills. It can be stopped and started.

    Like the brokers it stands for, it keeps retained messages over a restart and loses what was in flight.
    """

    def __init__(self) -> None:
        self.running = True
        self._clients: list[MemoryTransport] = []
        # by filter, so that a large fleet does not ask everyone: those without `+` and `#` are topics
        self._exact: dict[str, dict[MemoryTransport, None]] = {}
        self._patterns: dict[str, dict[MemoryTransport, None]] = {}
        self._retained: dict[str, Message] = {}

    def stop(self) -> None:
        """Go down: every client loses its connection and its unread messages."""
        self.running = False
        for client in self._clients:
            client.drop()

    def start(self) -> None:
        """Come back: clients that are not closed reconnect."""
        self.running = True
        for client in self._clients:
            client.reconnect()

    def attach(self, client: MemoryTransport) -> None:
        """Let a client connect."""
        if client not in self._clients:
            self._clients.append(client)

    def detach(self, client: MemoryTransport, *, will: Message | None) -> None:
        """A client is gone; publish its will if it did not say goodbye."""
        if client in self._clients:
            self._clients.remove(client)
        if will is not None:
            self.route(will)

    def route(self, message: Message) -> None:
        """Deliver to every subscriber, and keep it if it is retained (an empty payload clears it)."""
        if message.retain:
            if message.payload:
                self._retained[message.topic] = message
            else:
                self._retained.pop(message.topic, None)
        hearers = dict(self._exact.get(message.topic, {}))
        for wanted, clients in self._patterns.items():
            if topic_matches(wanted, message.topic):
                hearers |= clients
        for client in hearers:
            client.deliver(Message(message.topic, message.payload))

    def listen(self, client: MemoryTransport, topic_filter: str) -> None:
        """From now on a client may hear what matches."""
        self._hearers(topic_filter).setdefault(topic_filter, {})[client] = None

    def unlisten(self, client: MemoryTransport, topic_filter: str) -> None:
        """It hears what matches no longer."""
        known = self._hearers(topic_filter)
        hearers = known.get(topic_filter, {})
        hearers.pop(client, None)
        if not hearers:
            known.pop(topic_filter, None)

    def _hearers(self, topic_filter: str) -> dict[str, dict[MemoryTransport, None]]:
        return self._patterns if _is_pattern(topic_filter) else self._exact

    def retained(self, topic_filter: str) -> list[Message]:
        """The retained messages that match."""
        if not _is_pattern(topic_filter):
            return [self._retained[topic_filter]] if topic_filter in self._retained else []
        return [self._retained[topic] for topic in sorted(self._retained) if topic_matches(topic_filter, topic)]


class MemoryTransport:
    """A `Transport` to a `MemoryBroker`. Deterministic; not for use across threads.

    `online = False` cuts this client off without stopping the broker, as a lost network does.
    """

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._filters: list[str] = []
        self._inbox: deque[Message] = deque()
        self._will: Message | None = None
        self._open = False
        self._online = True
        self._connected = False
        self._connections = 0

    @property
    def connected(self) -> bool:
        """Whether a publication would be sent now."""
        return self._connected

    @property
    def connections(self) -> int:
        """How often a connection came about."""
        return self._connections

    @property
    def online(self) -> bool:
        """Whether this client has a network."""
        return self._online

    @online.setter
    def online(self, value: bool) -> None:
        self._online = value
        if not value:
            had = self._connected
            self.drop()
            if had and self._will is not None and self._broker.running:
                self._broker.route(self._will)
        else:
            self.reconnect()

    def connect(self, will: Message | None = None) -> None:
        """Connect now if the broker runs, or as soon as it does."""
        self._will = will
        self._open = True
        self._broker.attach(self)
        self.reconnect()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expires_s: float | None = None,  # noqa: ARG002 - it is delivered at once
        qos: Qos = 1,  # noqa: ARG002 - and never lost
    ) -> None:
        """Deliver to every subscriber before returning.

        Raises:
            NotConnectedError: There is no connection.
            ProtocolError: The payload is too large.
        """
        check_size(topic, payload)
        if not self._connected:
            raise NotConnectedError(f"no connection to the broker: {topic} was not sent")
        self._broker.route(Message(topic, payload, retain))

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches, retained messages at once."""
        if topic_filter not in self._filters:
            self._filters.append(topic_filter)
            self._broker.listen(self, topic_filter)
        if self._connected:
            self._inbox.extend(self._broker.retained(topic_filter))

    def unsubscribe(self, topic_filter: str) -> None:
        """Receive it no longer."""
        if topic_filter in self._filters:
            self._filters.remove(topic_filter)
            self._broker.unlisten(self, topic_filter)

    @property
    def unread(self) -> tuple[Message, ...]:
        """What `receive` would return, which stays."""
        return tuple(self._inbox)

    def receive(self) -> list[Message]:
        """All messages since the last call."""
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def close(self) -> None:
        """Disconnect cleanly."""
        self._open = self._connected = False
        self._broker.detach(self, will=None)

    def vanish(self) -> None:
        """Disconnect as a killed process does: the broker publishes the will."""
        self._open = self._connected = False
        self._broker.detach(self, will=self._will)

    def deliver(self, message: Message) -> None:
        """Called by the broker, of what matches a filter."""
        if self._connected:
            self._inbox.append(message)

    def drop(self) -> None:
        """Called by the broker when it stops: the connection and unread messages are gone."""
        self._connected = False
        self._inbox.clear()

    def reconnect(self) -> None:
        """Called by the broker when it is back."""
        if self._open and self._online and self._broker.running and not self._connected:
            self._connected = True
            self._connections += 1
            for wanted in self._filters:
                self._inbox.extend(self._broker.retained(wanted))
