"""Thousands of MQTT connections in one process: many paho clients behind one selector.

`MqttTransport` gives each connection a thread that waits with `select`, which ends at some 300 connections a
process. A `Swarm` waits for all of them at once. Every transport is still a client of its own at the broker, with
its own session, last will and subscriptions: the broker cannot tell a swarm from as many devices.

What is known of paho 2.2 and shapes this file:

- It connects with a blocking call. Here connections come about beside each other, and paho is handed the socket
  (`_create_socket`, its one private method that is overridden).
- It reads a packet byte by byte. A `Line` reads the socket once and serves those bytes from memory.
- It writes at once, on the caller's thread, as long as it has no thread and no write callback of its own. What does
  not fit into the socket is written when the selector says so.
- It keeps unacknowledged publications over a reconnect; so each connection gets a new client.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import random
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from edge_sdk.errors import NotConnectedError, TransportError
from edge_sdk.line import Line
from edge_sdk.transport import Message, Qos, allow_connections, check_size

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

_QOS = 1
_HANDSHAKE_S = 10.0
"""How long a connection may take to come about, from the first packet to the last acknowledged subscription."""
_RESOLVE_S = 10.0
"""How long the broker's addresses are taken for right."""
_CLOSE_S = 2.0
"""How long `close` waits for acknowledgements and for the goodbyes to be written."""
_MAX_UNACKNOWLEDGED = 10_000
_SWEEPS = 4
"""How often within a keepalive interval a connection is looked after."""
_NEVER = float("inf")

logger = logging.getLogger(__name__)


class Swarm:
    """Connections to one MQTT v5 broker. May be used from several threads.

    `with swarm:` runs a thread that only calls `turn`; or call `turn` yourself, often enough for the broker's
    patience (one and a half times `keepalive_s`).

    A swarm opens many files. The `select` that `MqttTransport` waits with ends at 1024 of them: beside a large swarm,
    let the coordinator's connection come from the swarm as well.

    Example:
        >>> with Swarm("127.0.0.1", 1883) as swarm:  # doctest: +SKIP
        ...     transports = [swarm.transport(f"pump-{i}") for i in range(1_000)]
        ...     for transport in transports:
        ...         transport.connect()
        ...     swarm.until(lambda: swarm.connected == 1_000, timeout_s=30)
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        keepalive_s: int = 60,
        max_inbox: int = 10_000,
        max_connecting: int = 64,
        retry_s: tuple[float, float] = (0.5, 60.0),
        rng: random.Random | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Describe the connections; nothing is sent before a transport's `connect`.

        Args:
            host: Name or address of the broker.
            port: 1 to 65535.
            keepalive_s: After about this silence either side takes a line for broken.
            max_inbox: Most messages a transport holds until `receive`.
            max_connecting: Most connections that come about at a time: a broker's queue of new ones is short.
            retry_s: Longest pause after the first failure, which doubles with each further one, and the longest of all.
            rng: Where the pauses' chance comes from.
            tls: Encrypts every connection, and says whom to trust; None: no encryption.

        Raises:
            ValueError: An argument is out of range.
        """
        if not host or not 1 <= port <= 65_535:
            raise ValueError(f"a broker has a host and a port from 1 to 65535, got {host!r}:{port}")
        if min(keepalive_s, max_inbox, max_connecting) < 1:
            raise ValueError("keepalive_s, max_inbox and max_connecting are at least 1")
        if not 0 < retry_s[0] <= retry_s[1]:
            raise ValueError(f"retry_s is (first, longest) with 0 < first <= longest, got {retry_s}")
        self.broker = f"the broker at {host}:{port}"
        self.host, self.port = host, port
        self.keepalive_s, self.max_inbox = keepalive_s, max_inbox
        self._max_connecting, self._retry_s = max_connecting, retry_s
        self._tls = tls
        self._rng = rng or random.Random()  # noqa: S311 - it spreads load
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        # Held while paho is called and while a transport's state changes, never while the selector waits.
        self.changed = threading.Condition()
        self._turning = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending = self._closed = self._woken = self._news = False
        self._members: set[SwarmTransport] = set()
        self._waiting: deque[SwarmTransport] = deque()
        self._connecting: dict[SwarmTransport, float] = {}  # since when; the oldest first
        self._retries: list[tuple[float, int, SwarmTransport]] = []  # a heap
        self._care: deque[tuple[float, SwarmTransport, Line]] = deque()  # all in the same rhythm, so in order
        self._sequence = 0
        self._addresses: list[tuple[socket.AddressFamily, Any]] = []
        self._resolved_at = -_NEVER
        self._resolve_error: OSError | None = None
        self._last_error: str | None = None
        self.connected = 0
        """How many transports are connected."""
        self.unacknowledged = 0
        """How many publications the broker has not acknowledged yet."""

    @property
    def last_error(self) -> str | None:
        """What went wrong last, for whichever transport; None once all are connected."""
        return self._last_error

    def transport(self, client_id: str, *, username: str | None = None, password: str | None = None) -> SwarmTransport:
        """A transport of its own, not yet connected. Raises the soft limit of open files if it must.

        Args:
            client_id: Unique at the broker: a second client of that name throws out the first.
            username: For a broker that asks for one.
            password: With `username`.

        Raises:
            TransportError: The process may not open that many connections, or the swarm is closed.
            ValueError: `client_id` is empty.
        """
        if not client_id:
            raise ValueError("client_id must not be empty")
        with self.changed:
            if self._closed:
                raise TransportError("the swarm is closed")
            allow_connections(len(self._members) + 1)
            member = SwarmTransport(self, client_id, username, password)
            self._members.add(member)
        return member

    def turn(self, timeout_s: float = 0.0) -> int:
        """Let the network do what it can now. Waits for the first thing to happen, `timeout_s` at most.

        Returns:
            How many connections there was something to do for.
        """
        with self._turning:
            if self._closed:
                return 0
            with self.changed:
                due = self._do_what_is_due(time.monotonic())
                self.tell()
            ready = self._selector.select(max(0.0, min(timeout_s, due - time.monotonic())))
            for key, events in ready:
                with self.changed:
                    if key.data is None:
                        self._wake_reader.recv(4096)
                        self._woken = False
                    elif key.data.is_line(key.fd):  # it may have gone within this turn
                        self._work(key.data, events)
            with self.changed:
                self.tell()
        return len(ready)

    def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Let the network work until the condition holds; False if `timeout_s` pass without.

        The condition is asked again after each change, so it had better be quick.
        """
        deadline = time.monotonic() + timeout_s
        if self._thread is not None:
            with self.changed:
                return self.changed.wait_for(condition, timeout_s)
        self.turn()
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.turn(left)
        return True

    def start(self) -> None:
        """Run a thread that only calls `turn`, until `close`. Does nothing while it runs."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="edge-swarm", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Disconnect all transports cleanly, all at once, and end the thread. A closed swarm stays closed."""
        if self._closed:
            return
        with self.changed:
            for member in list(self._members):
                self.leave(member)
        self.until(lambda: len(self._selector.get_map()) == 1, _CLOSE_S)
        with self.changed:
            self._ending = True
            for member in list(self._members):
                self.drop(member)
            self.wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._turning:
            self._closed = True
            self._selector.close()
            self._wake_reader.close()
            self._wake_writer.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ending:
            self.turn(1.0)

    # What transports call, holding `changed`.

    def join(self, member: SwarmTransport) -> None:
        """Connect this one, when it is its turn."""
        if self._closed or self._ending:
            raise TransportError("the swarm is closed")
        self._members.add(member)
        self._waiting.append(member)

    def leave(self, member: SwarmTransport) -> None:
        """Say goodbye once all is acknowledged; at once without a connection."""
        member.is_open = False
        if member.accepted:
            self._set_connected(member, value=False)
            member.leaving = True
            self.after(member)
        else:
            self.drop(member)

    def drop(self, member: SwarmTransport) -> None:
        """Let go of a transport and its line, if it has one."""
        member.is_open = False
        self._members.discard(member)
        if member.line is not None:
            member.line.close()
            self._lost(member)

    def after(self, member: SwarmTransport) -> None:
        """What is left to do after each call of paho: packets that callbacks left, goodbyes, a line that broke."""
        client, line = member.client, member.line
        if client is None or line is None:
            return
        if line.is_open and client.want_write():
            client.loop_write()
        if line.is_open and member.leaving and not member.unacknowledged:
            member.leaving = False
            client.disconnect()
        if not line.is_open:
            self._lost(member)
        else:
            line.watch(write=client.want_write())

    def wake(self) -> None:
        """Let a thread that waits in `turn` look again."""
        if not self._woken and not self._closed:
            self._woken = True
            self._wake_writer.send(b"\0")

    def note(self, member: SwarmTransport, error: str | None) -> None:
        """A transport's state has changed. Logs an error once, however many transports have it."""
        member.error = error
        member.state_changed = self._news = True
        if error is not None:
            if error != self._last_error:
                logger.warning("%s and perhaps others: %s", member.client_id, error)
            self._last_error = error

    def news(self) -> None:
        """Something arrived."""
        self._news = True

    def tell(self) -> None:
        """Wake whoever waits, if anything changed: once a turn, not once a message."""
        if self._news:
            self._news = False
            self.changed.notify_all()

    def ready(self, member: SwarmTransport) -> None:
        """The broker has acknowledged the connection and its subscriptions."""
        self._connecting.pop(member, None)
        member.connections += 1
        member.failures = 0
        self._set_connected(member, value=True)
        self.note(member, member.error if member.refused else None)
        if self.connected == len(self._members) and not member.refused:
            self._last_error = None

    # On whichever thread turns, holding `changed`.

    def _set_connected(self, member: SwarmTransport, *, value: bool) -> None:
        self.connected += value - member.connected
        member.connected = value

    def _do_what_is_due(self, now: float) -> float:
        """Retries, new connections, time limits, keepalive. Returns when there is more to do."""
        while self._retries and self._retries[0][0] <= now:
            self._waiting.append(heapq.heappop(self._retries)[2])
        while self._connecting and next(iter(self._connecting.values())) + _HANDSHAKE_S <= now:
            self._fail(next(iter(self._connecting)), f"{self.broker} does not answer")
        while self._waiting and len(self._connecting) < self._max_connecting:
            member = self._waiting.popleft()
            if member.is_open and member.line is None:
                self._dial(member, now)
        while self._care and self._care[0][0] <= now:
            _, member, line = self._care.popleft()
            if member.line is line and member.client is not None:
                member.client.loop_misc()
                self._care.append((now + self.keepalive_s / _SWEEPS, member, line))
                self.after(member)
        return min(
            self._retries[0][0] if self._retries else _NEVER,
            next(iter(self._connecting.values())) + _HANDSHAKE_S if self._connecting else _NEVER,
            self._care[0][0] if self._care else _NEVER,
        )

    def _dial(self, member: SwarmTransport, now: float) -> None:
        try:
            addresses = self._resolve(now)
            family, address = addresses[member.failures % len(addresses)]
            line = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._fail(member, f"cannot reach {self.broker}: {error}")
            return
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (code := line.connect_ex(address)) not in (0, errno.EINPROGRESS):  # else the socket tells, once writable
            line.close()
            self._fail(member, f"cannot reach {self.broker}: {OSError(code, os.strerror(code))}")
            return
        member.line = Line(line, self._selector, member)
        self._connecting[member] = now

    def _resolve(self, now: float) -> list[tuple[socket.AddressFamily, Any]]:
        """The broker's addresses. One question serves all, also when it finds no answer."""
        if now - self._resolved_at >= _RESOLVE_S:
            self._resolved_at, self._resolve_error = now, None
            try:
                found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                self._addresses = [(family, address) for family, _, _, _, address in found]
            except (OSError, UnicodeError) as error:  # what cannot be a name at all is the latter
                self._resolve_error = OSError(str(error))
        if self._resolve_error is not None:
            raise self._resolve_error
        return self._addresses

    def _work(self, member: SwarmTransport, events: int) -> None:
        client, line = member.client, member.line
        assert line is not None
        if client is None:
            self._dialled(member, line)
            return
        if events & selectors.EVENT_READ:
            line.may_read = True
            try:
                client.loop_read()
                while line.is_open and line.holds_more:
                    client.loop_read()
            except Exception as error:  # noqa: BLE001 - what wrong bytes do to paho costs this line, not the swarm
                member.reason = f"paho cannot read what came: {error!r}"
                line.close()
        self.after(member)

    def _dialled(self, member: SwarmTransport, line: Line) -> None:
        if error := line.error():
            self._fail(member, f"cannot reach {self.broker}: {error}")
            return
        try:
            if self._tls is not None and not line.shake_hands(self._tls, self.host):
                return  # there is more to be read or written first
        except (OSError, ValueError) as failure:  # ssl's errors are OSErrors
            self._fail(member, f"no encrypted connection to {self.broker}: {failure}")
            return
        line.watch(write=False)
        member.client = client = member.new_client(line)
        client.connect_async(self.host, self.port, self.keepalive_s, clean_start=True)
        client.reconnect()
        self._care.append((time.monotonic() + self.keepalive_s / _SWEEPS, member, line))
        self.after(member)

    def _fail(self, member: SwarmTransport, error: str) -> None:
        """This attempt came to nothing."""
        if member.line is not None:
            member.line.close()
        self.note(member, error)
        member.answered = True
        self._lost(member)

    def _lost(self, member: SwarmTransport) -> None:
        """A connection, or an attempt at one, is over; try again later unless it was meant."""
        self._connecting.pop(member, None)
        if member.accepted:
            self.note(member, f"the connection to {self.broker} was lost: {member.reason}" if member.is_open else None)
        elif not member.answered and member.is_open:  # so do some brokers refuse credentials
            self.note(member, f"{self.broker} hung up: are the credentials right?")
        self._set_connected(member, value=False)
        member.forget_connection()
        self._news = True
        if not member.is_open:
            self._members.discard(member)
            return
        longest = min(self._retry_s[1], self._retry_s[0] * 2**member.failures)
        member.failures = min(member.failures + 1, 16)
        self._sequence += 1
        due = time.monotonic() + self._rng.uniform(longest / 2, longest)
        heapq.heappush(self._retries, (due, self._sequence, member))


class SwarmTransport:
    """A `Transport` with a connection of its own, which a `Swarm` looks after. May be used from several threads.

    It behaves as `MqttTransport` does, also when its inbox is full. Messages come in while the swarm turns.
    """

    __slots__ = (
        "_closed_bytes", "_filters", "_inbox", "_missed_retained", "_password", "_swarm", "_unsubscribed", "_username",
        "_will", "accepted", "answered", "client", "client_id", "connected", "connections", "dropped", "error",
        "failures", "is_open", "leaving", "line", "reason", "refused", "state_changed", "unacknowledged",
    )  # fmt: skip

    def __init__(self, swarm: Swarm, client_id: str, username: str | None, password: str | None) -> None:
        self._swarm, self.client_id = swarm, client_id
        self._username, self._password = username, password
        self._filters: dict[str, None] = {}  # a set that keeps its order
        self._will: Message | None = None
        self._inbox: list[Message] = []
        self._unsubscribed: set[int] | None = None  # subscriptions the broker has not acknowledged, while connecting
        self._missed_retained = False
        self._closed_bytes = (0, 0)
        self.connected = False
        """Whether a publication would be sent now, and what it calls forth would be received."""
        self.connections = 0
        """How often a connection came about."""
        self.dropped = 0
        """How many messages arrived while the inbox was full."""
        self.unacknowledged = 0
        """How many publications the broker has not acknowledged yet."""
        # the swarm's business
        self.line: Line | None = None
        self.client: _Client | None = None
        self.is_open = self.accepted = self.answered = self.refused = self.leaving = self.state_changed = False
        self.failures = 0
        self.error: str | None = None
        self.reason = ""

    @property
    def last_error(self) -> str | None:
        """Why there is no connection, or which subscription was refused; None when all is well."""
        return self.error

    @property
    def bytes_sent(self) -> int:
        """Bytes given to TCP over all connections."""
        return self._closed_bytes[0] + (self.line.bytes_sent if self.line is not None else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes taken from TCP over all connections."""
        return self._closed_bytes[1] + (self.line.bytes_received if self.line is not None else 0)

    def connect(self, will: Message | None = None) -> None:
        """Start connecting, and keep reconnecting until `close`. Returns at once, with or without a broker.

        Args:
            will: Published for us if we vanish.

        Raises:
            TransportError: The swarm is closed.
        """
        self.close()
        with self._swarm.changed:
            self._will, self.is_open = will, True
            self._swarm.join(self)
            self._swarm.wake()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expires_s: float | None = None,  # noqa: ARG002 - a swarm plays devices, which send nothing that expires
        qos: Qos = 1,  # noqa: ARG002 - nor at another QoS
    ) -> None:
        """Send at QoS 1.

        Raises:
            NotConnectedError: There is no connection, or the broker no longer answers; nothing was queued.
            ProtocolError: The payload exceeds `MAX_MESSAGE_BYTES`.
        """
        check_size(topic, payload)
        with self._swarm.changed:
            if self.client is None or not self.connected:
                raise NotConnectedError(f"no connection to the broker: {topic} was not sent")
            sent = self.client.publish(topic, payload, qos=_QOS, retain=retain)
            if sent.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                self.count_unacknowledged(1)
            self._swarm.after(self)
        if sent.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise NotConnectedError(f"{topic} was not sent: {sent.rc.name}")

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches, `+` and `#` as in MQTT. Remembered across reconnects; twice is once."""
        with self._swarm.changed:
            self._filters[topic_filter] = None
            if self.client is not None and self.accepted:
                self.client.subscribe(topic_filter, _QOS)
                self._swarm.after(self)

    def unsubscribe(self, topic_filter: str) -> None:
        """Receive it no longer."""
        with self._swarm.changed:
            self._filters.pop(topic_filter, None)
            if self.client is not None and self.accepted:
                self.client.unsubscribe(topic_filter)
                self._swarm.after(self)

    def receive(self) -> list[Message]:
        """All messages since the last call, oldest first."""
        if not self._inbox:
            return []
        with self._swarm.changed:
            messages, self._inbox = self._inbox, []
            if self._missed_retained:
                self._missed_retained = False
                if self.client is not None and self.connected:
                    self._subscribe_all(self.client)
                    self._swarm.after(self)
        return messages

    def wait(self, timeout_s: float) -> bool:
        """Let the swarm work until there is something to receive or the state of the connection has changed.

        Returns:
            Whether there is or it has; False if `timeout_s` passed without.
        """
        woken = self._swarm.until(lambda: bool(self._inbox) or self.state_changed, timeout_s)
        self.state_changed = False
        return woken

    def close(self) -> None:
        """Disconnect cleanly (the will is not published) and stop reconnecting; unread messages stay.

        Waits, 2 s at most, until the broker has acknowledged what was published. `Swarm.close` does it for all at
        once.
        """
        with self._swarm.changed:
            was_open = self.is_open
            self._swarm.leave(self)
            self.state_changed = self.state_changed or was_open
            self._swarm.news()
            self._swarm.tell()
            gone = self.line is None
        if not gone:
            self._swarm.until(lambda: self.line is None, _CLOSE_S)
            with self._swarm.changed:
                self._swarm.drop(self)

    # What the swarm calls, holding its lock.

    def is_line(self, number: int) -> bool:
        """Whether this is the file number of the present line."""
        return self.line is not None and self.line.is_open and self.line.fileno() == number

    def new_client(self, line: Line) -> _Client:
        """A client for this line, with nothing kept from earlier ones."""
        client = _Client(line, self)
        client.username_pw_set(self._username, self._password)
        client.max_queued_messages_set(_MAX_UNACKNOWLEDGED)
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=_QOS, retain=self._will.retain)
        client.on_connect = _on_connect
        client.on_disconnect = _on_disconnect
        client.on_subscribe = _on_subscribe
        client.on_publish = _on_publish
        client.on_message = _on_message
        return client

    def forget_connection(self) -> None:
        """The line is gone, and with it all that was under way."""
        if self.line is not None:
            self._closed_bytes = (self.bytes_sent, self.bytes_received)
        self.line = self.client = None
        self.accepted = self.answered = self.leaving = False
        self.count_unacknowledged(-self.unacknowledged)
        self.reason = ""

    def count_unacknowledged(self, more: int) -> None:
        """Publications began or ended to be under way."""
        self.unacknowledged += more
        self._swarm.unacknowledged += more
        if not self.unacknowledged:
            self._swarm.news()

    def came(self, reason: Any) -> None:
        """The broker has answered the first packet."""
        self.answered = True
        if reason.is_failure:
            self._swarm.note(self, f"{self._swarm.broker} refused the connection: {reason}")
            return
        self.accepted, self.refused = True, False
        assert self.client is not None
        self._unsubscribed = self._subscribe_all(self.client)
        self._ready_if_subscribed()

    def subscribed(self, number: int, reasons: Any) -> None:
        """The broker has answered a subscription."""
        if refused := [str(reason) for reason in reasons if reason.is_failure]:
            self.refused = True
            self._swarm.note(self, f"the broker refused a subscription: {', '.join(refused)}")
        if self._unsubscribed is not None:
            self._unsubscribed.discard(number)
            self._ready_if_subscribed()

    def take(self, message: MQTTMessage) -> None:
        """A message came."""
        if len(self._inbox) >= self._swarm.max_inbox:
            if not self._missed_retained:
                logger.warning("%s: the inbox is full at %d messages; dropping", self.client_id, self._swarm.max_inbox)
            self.dropped += 1
            self._missed_retained = True
        else:
            self._inbox.append(Message(message.topic, bytes(message.payload), message.retain))
            self._swarm.news()

    def _ready_if_subscribed(self) -> None:
        if not self._unsubscribed and self.is_open:
            self._unsubscribed = None
            self._swarm.ready(self)

    def _subscribe_all(self, client: Client) -> set[int]:
        sent = [client.subscribe(topic_filter, _QOS) for topic_filter in self._filters]
        return {number for _, number in sent if number is not None}


class _Client(Client):
    """A paho client on a line that is there already."""

    def __init__(self, line: Line, owner: SwarmTransport) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2, owner.client_id, userdata=owner, protocol=MQTTProtocolVersion.MQTTv5
        )
        self._line = line

    def _create_socket(self) -> SocketLike:
        return self._line


# paho's callbacks: inside a call that holds the swarm's lock, they only note what happened.


def _on_connect(_client: Client, owner: SwarmTransport, _flags: Any, reason: Any, _properties: Any) -> None:
    owner.came(reason)


def _on_disconnect(_client: Client, owner: SwarmTransport, _flags: Any, reason: Any, _properties: Any) -> None:
    owner.reason = str(reason)


def _on_subscribe(_client: Client, owner: SwarmTransport, number: int, reasons: Any, _properties: Any) -> None:
    owner.subscribed(number, reasons)


def _on_publish(_client: Client, owner: SwarmTransport, _number: int, _reason: Any, _properties: Any) -> None:
    owner.count_unacknowledged(-1)


def _on_message(_client: Client, owner: SwarmTransport, message: MQTTMessage) -> None:
    owner.take(message)
