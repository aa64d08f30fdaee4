"""The `Transport` over MQTT, with paho. Its callbacks end here: users send, receive and wait.

What is known of paho 2.2 and shapes this file:

- It keeps unacknowledged publications and sends them again after a reconnect. The outbox does that already,
  so a second copy would go out. `drop_out_messages` before every attempt to connect empties that queue.
- It drops half-written packets by itself, but resubscribes nothing and, by default, asks for the old session
  from the second connection on. Here every connection starts clean and subscribes again.
- It doubles its back-off without jitter, so that a fleet returns in step. Its delay is therefore set anew, at
  random, after each failure. After the first failure of all it waits twice.
- An exception in a callback would end its network thread.
- `_packet_queue` takes a whole packet and writes it when it is its turn: the one private method that is called.
- It waits with `select`, which ends at 1024 open files: some 300 transports fit into one process.

Sessions. By default nothing of a connection outlives it: the outbox sends again what was not acknowledged, retained
messages come again, and the coordinator repeats a command until it is answered, so that a device that slept loses
nothing, whatever broker it has. `session_expiry_s` lets the broker keep what was sent meanwhile as well, which saves a
command its next repetition. The first connection of a transport still starts clean, because subscriptions of an
earlier process (the blocks of a download, say) would fill the queue with what nobody wants; later ones take the session
up. Publications of our own are never kept either way.

MQTT 3.1.1 (`version="3.1.1"`) is for brokers that know nothing newer. It has no sessions that expire, no message expiry
and no flow control by the receiver: commands then end by the time in their own body; nothing else depends on these.

Topic aliases are not used. They spare the topic (23 bytes of `edge/d/pump-1/up/report`) from the second message of a
connection on, at 3 bytes each: 2 % of a report of 1 kB, 0.1 % of a block, for state that both ends must keep and that
some brokers grant ten of.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, Client, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import ConfigError, NotConnectedError
from edge_sdk.messages import to_counts
from edge_sdk.transport import Message, Qos, check_size

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

_QOS = 1
_BACKOFF_FIRST_S = 0.5
_BACKOFF_MOST_S = 60.0
_CLOSE_S = 2.0
"""How long `close` waits for each: the broker's acknowledgements, and its own goodbye to be written."""
_MAX_UNACKNOWLEDGED = 10_000

_LONGEST_S = 2**32 - 2
"""Of a session or a message: one more would mean for ever."""
_SCHEMES = {"mqtt": 1883, "mqtts": 8883}

logger = logging.getLogger(__name__)
Version = Literal["5", "3.1.1"]


@dataclass(frozen=True, slots=True)
class Tls:
    """How a broker proves who it is, and the client if the broker asks for it. TLS 1.2 or newer; names are checked."""

    ca_file: Path | str | None = None
    """Certificates of the authorities that are trusted; None: the system's."""
    cert_file: Path | str | None = None
    """The client's own certificate; read again before each connection, so that a renewed one is used from then on."""
    key_file: Path | str | None = None
    """Its private key; None: in `cert_file`."""

    def context(self) -> ssl.SSLContext:
        """For the connections of one client.

        Raises:
            ConfigError: A file cannot be read, or key and certificate do not belong together.
        """
        try:
            context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self.renew(context)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            names = ", ".join(str(name) for name in (self.ca_file, self.cert_file, self.key_file) if name is not None)
            raise ConfigError(f"TLS cannot be set up with {names or 'the system certificates'}: {error}") from error
        return context

    def renew(self, context: ssl.SSLContext) -> None:
        """Present what is in the files now, from the next connection on."""
        if self.cert_file is not None:
            context.load_cert_chain(str(self.cert_file), None if self.key_file is None else str(self.key_file))


class Address(NamedTuple):
    """Where a broker is, and who calls."""

    host: str
    port: int
    username: str | None
    password: str | None
    tls: Tls | None
    """None: no encryption."""


def read_url(url: str, *, tls: Tls | None = None) -> Address:
    """The address in `mqtt://[user:password@]host[:port]`, or `mqtts://` for TLS.

    Args:
        url: The port is 1883 or 8883 unless it is given; special characters are %-encoded.
        tls: With `mqtts://`; None: the system's authorities.

    Raises:
        ValueError: It is no such address; the message tells no password.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"expected mqtt://host:port or mqtts://host:port, got {parts.scheme}://{parts.hostname}")
    encrypted = parts.scheme == "mqtts"
    if tls is not None and not encrypted:
        raise ValueError("certificates were given for an unencrypted connection: use mqtts://")
    username, password = (None if text is None else unquote(text) for text in (parts.username, parts.password))
    port = parts.port or _SCHEMES[parts.scheme]
    return Address(parts.hostname, port, username, password, (tls or Tls()) if encrypted else None)


class _Receipt(NamedTuple):
    """By what the broker is told that a message was taken."""

    line: int
    number: int
    """0: nothing is to be told."""


class MqttTransport:
    """A `Transport` to an MQTT broker. May be used from several threads.

    A network thread runs from `connect` to `close`. It tries again for ever, with growing random pauses,
    whether there is no broker, the credentials are refused, or the line breaks; `last_error` says what is
    wrong.

    Who reads slowly holds up the broker, and does not grow. Messages are acknowledged when `receive` hands them out,
    and a broker that keeps to `receive_maximum` sends no more before that. Mosquitto 2.0 loses count under load, and
    others never knew it: once `max_inbox` messages wait, nothing more is read from the line, for half of `keepalive_s`.
    Then the reader is taken for stuck. What arrives from then on is dropped and counted, though the broker takes it for
    delivered: publications of this protocol are repeated until their receiver answers with a message of its own, so
    nothing acknowledged is lost. Retained messages nobody repeats: once the inbox has been read, the transport
    subscribes anew and is sent them again.

    Example:
        >>> transport = MqttTransport("127.0.0.1", 1883, client_id="pump-1")
        >>> transport.connect(will=Message("edge/d/pump-1/up/state", b"lost", retain=True))  # doctest: +SKIP
        >>> while transport.wait(30):  # doctest: +SKIP
        ...     for message in transport.receive():
        ...         print(message.topic)
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        client_id: str,
        username: str | None = None,
        password: str | None = None,
        keepalive_s: int = 30,
        max_inbox: int = 10_000,
        tls: Tls | None = None,
        session_expiry_s: int = 0,
        receive_maximum: int = 100,
        version: Version = "5",
    ) -> None:
        """Describe the connection; nothing is sent before `connect`.

        Args:
            host: Name or address of the broker.
            port: 1 to 65535.
            client_id: Unique at the broker: a second client of that name throws out the first.
            username: For a broker that asks for one.
            password: With `username`.
            keepalive_s: After about this silence either side takes the line for broken.
            max_inbox: Most messages held until `receive`; more than there are retained topics.
            tls: None: no encryption.
            session_expiry_s: So long the broker keeps what is sent to us while we are away; 0: nothing is kept.
            receive_maximum: Most messages that the broker sends before it waits for `receive`.
            version: Of MQTT.

        Raises:
            ValueError: An argument is out of range, or MQTT 3.1.1 cannot do it.
        """
        if not host or not 1 <= port <= 65_535:
            raise ValueError(f"a broker has a host and a port from 1 to 65535, got {host!r}:{port}")
        if not client_id or keepalive_s < 1 or max_inbox < 1:
            raise ValueError("client_id must not be empty; keepalive_s and max_inbox are at least 1")
        if not (0 <= session_expiry_s <= _LONGEST_S and 1 <= receive_maximum <= 65_535):
            raise ValueError("session_expiry_s must lie in 0 to 2^32 - 2, receive_maximum in 1 to 65535")
        if version not in ("5", "3.1.1") or (session_expiry_s and version != "5"):
            raise ValueError(f"MQTT {version}: use 5, or 3.1.1 without session_expiry_s")
        self._tls, self._version = tls, version
        self._session_expiry_s, self._receive_maximum = session_expiry_s, receive_maximum
        self._ssl: ssl.SSLContext | None = None
        self._host, self._port = host, port
        self._broker = f"the broker at {host}:{port}"
        self._client_id = client_id
        self._username, self._password = username, password
        self._keepalive_s = keepalive_s
        self._max_inbox = max_inbox
        # Held while paho is called, so that no publication slips in between a disconnect and what follows.
        # Taken before `_changed`, never after it.
        self._calling = threading.Lock()
        self._client: Client | None = None
        self._filters: dict[str, None] = {}  # a set that keeps its order
        self._given_up: set[str] = set()  # since the line came about: a session may still have them
        self._last_sent: MQTTMessageInfo | None = None
        # Guards what the network thread tells. Never held while paho is called, which may wait for it.
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Message, _Receipt]] = deque()
        self._line = 0  # which attempt to connect this is
        self._connected = False
        self._accepted = self._refused = False
        self._unsubscribed: set[int] = set()  # subscriptions that the broker has not acknowledged
        self._connections = 0
        self._dropped = 0
        self._missed_retained = False
        self._answered = False
        self._failures = 0
        self._last_error: str | None = None
        self._state_changed = False
        self._goodbye_written = threading.Event()

    @classmethod
    def from_url(cls, url: str, *, client_id: str, tls: Tls | None = None, **options: Any) -> Self:
        """A transport to `mqtt://[user:password@]host[:port]`, or `mqtts://` for TLS.

        Args:
            url: The port is 1883 or 8883 unless it is given; special characters are %-encoded.
            client_id: As in the constructor, as are `options`.
            tls: With `mqtts://`; None: the system's authorities.

        Raises:
            ValueError: It is no such address.
        """
        host, port, username, password, tls = read_url(url, tls=tls)
        given = {"username": username, "password": password}
        options |= {name: value for name, value in given.items() if value is not None}
        return cls(host, port, client_id=client_id, tls=tls, **options)

    @property
    def connected(self) -> bool:
        """Whether a publication would be sent now, and what it calls forth would be received.

        So not before the broker has acknowledged the subscriptions made before the connection came about.
        """
        return self._connected

    @property
    def connections(self) -> int:
        """How often a connection came about: a change asks the caller for its birth and its outbox."""
        return self._connections

    @property
    def last_error(self) -> str | None:
        """Why there is no connection, or which subscription was refused; None when all is well."""
        return self._last_error

    @property
    def dropped(self) -> int:
        """How many messages arrived while the inbox was full."""
        return self._dropped

    def connect(self, will: Message | None = None) -> None:
        """Start connecting, and keep reconnecting until `close`. Returns at once, with or without a broker.

        Args:
            will: Published for us if we vanish.

        Raises:
            ConfigError: A file of `tls` cannot be used.
        """
        self.close()
        self._ssl = None if self._tls is None else self._tls.context()
        v5 = self._version == "5"
        client = Client(
            CallbackAPIVersion.VERSION2,
            self._client_id,
            clean_session=None if v5 else True,
            protocol=MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311,
            manual_ack=True,
        )
        if self._ssl is not None:
            client.tls_set_context(self._ssl)
        client.username_pw_set(self._username, self._password)
        client.max_queued_messages_set(_MAX_UNACKNOWLEDGED)
        if will is not None:
            client.will_set(will.topic, will.payload, qos=_QOS, retain=will.retain)
        client.on_pre_connect = self._on_pre_connect
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        if v5:
            client.connect_async(self._host, self._port, self._keepalive_s,
                                 clean_start=not self._session_expiry_s or MQTT_CLEAN_START_FIRST_ONLY,
                                 properties=self._connect_properties())  # fmt: skip
        else:
            client.connect_async(self._host, self._port, self._keepalive_s)
        self._client = client
        client.loop_start()

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = self._receive_maximum
        if self._session_expiry_s:
            properties.SessionExpiryInterval = self._session_expiry_s
        return properties

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expires_s: float | None = None, qos: Qos = 1
    ) -> None:
        """Send it. With `expires_s` (MQTT v5), the broker no longer delivers it after that time.

        QoS 0 is for what is said again on demand: paho looks through all publications of QoS 1 that wait for the
        broker's answer whenever one comes, which takes seconds for some thousands.

        Raises:
            NotConnectedError: There is no connection, or the broker no longer answers; nothing was queued.
            ProtocolError: The payload exceeds `MAX_MESSAGE_BYTES`.
        """
        check_size(topic, payload)
        properties = None
        if expires_s is not None and self._version == "5":
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = max(1, min(_LONGEST_S, int(expires_s)))
        with self._calling:
            if self._client is None or not self._connected:
                raise NotConnectedError(f"no connection to the broker: {topic} was not sent")
            if qos == 0 and properties is None:
                # what paho does for a publication costs as much as receiving one; the coordinator answers every report
                packet = _publication(topic, payload, retain=retain, v5=self._version == "5")
                code = self._client._packet_queue(0, packet, 0, 0)  # noqa: SLF001
            else:
                sent = self._client.publish(topic, payload, qos=qos, retain=retain, properties=properties)
                code, self._last_sent = sent.rc, sent
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                # the line just broke, or too much is unacknowledged; what paho kept goes before it reconnects
                raise NotConnectedError(f"{topic} was not sent: {code.name}")

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches, `+` and `#` as in MQTT. Remembered across reconnects; twice is once."""
        with self._calling:
            self._filters[topic_filter] = None
            self._given_up.discard(topic_filter)
            if self._client is not None and self._accepted:
                self._client.subscribe(topic_filter, _QOS)

    def unsubscribe(self, topic_filter: str) -> None:
        """Receive it no longer."""
        with self._calling:
            self._filters.pop(topic_filter, None)
            if self._client is not None and self._accepted:
                self._client.unsubscribe(topic_filter)
            if self._session_expiry_s:  # a line that is about to break may have lost it
                self._given_up.add(topic_filter)

    def receive(self) -> list[Message]:
        """All messages since the last call, oldest first."""
        with self._changed:
            entries = list(self._inbox)
            self._inbox.clear()
            missed_retained, self._missed_retained = self._missed_retained, False
            self._changed.notify_all()
        with self._calling:
            if self._client is not None and self._accepted:
                for _, receipt in entries:
                    if receipt.number and receipt.line == self._line:
                        self._client.ack(receipt.number, _QOS)
                if missed_retained and self._connected:
                    self._subscribe_all(self._client)
        return [message for message, _ in entries]

    def wait(self, timeout_s: float) -> bool:
        """Sleep until there is something to receive or the state of the connection has changed.

        Returns:
            Whether there is or it has; False if `timeout_s` passed without.
        """
        with self._changed:
            woken = self._changed.wait_for(lambda: bool(self._inbox) or self._state_changed, timeout_s)
            self._state_changed = False
        return woken

    def close(self) -> None:
        """Disconnect cleanly (the will is not published) and stop reconnecting; unread messages stay.

        Waits until the broker has acknowledged what was published, 2 s at most, and until the network thread
        has ended: at once while connected, otherwise within the 5 s that an attempt to connect may last.
        """
        with self._calling:
            client, self._client = self._client, None
            was_connected = self._connected
            self._accepted = False
            self._set_state(connected=False, error=None)
        if client is None:
            return
        if was_connected and self._last_sent is not None:
            # Closing a socket into which the broker still writes makes TCP reset the line: what we published
            # last and our goodbye could be lost, and the will published.
            self._last_sent.wait_for_publish(_CLOSE_S)
        client.disconnect()
        if was_connected and not self._goodbye_written.wait(_CLOSE_S):
            line = client.socket()
            if isinstance(line, socket.socket):
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
        client.loop_stop()
        client.disconnect()  # if a connection came about meanwhile; without the thread it is written at once

    def _set_state(self, *, connected: bool, error: str | None) -> None:
        """Note a change, and log a new error once, however often it repeats."""
        with self._changed:
            new_error, self._last_error = error != self._last_error, error
            self._connected = connected
            self._state_changed = True
            self._changed.notify_all()
        if error is not None and new_error:
            logger.warning("%s: %s", self._client_id, error)

    def _subscribe_all(self, client: Client) -> set[int]:
        """Subscribe to all filters; returns the numbers under which the broker will acknowledge them."""
        sent = [client.subscribe(topic_filter, _QOS) for topic_filter in self._filters]
        return {number for _, number in sent if number is not None}

    def _pause_before_retry(self, client: Client) -> None:
        longest = min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        pause: Any = random.uniform(longest / 2, longest)  # noqa: S311 - it spreads load
        client.reconnect_delay_set(pause, pause)  # declared int, but only added to a time

    # The callbacks, on the network thread. Those of a client that is being closed find `_client` changed.

    def _on_pre_connect(self, client: Client, _userdata: Any) -> None:
        with self._calling:
            if client is self._client:
                self._connected = self._accepted = self._answered = False
                self._last_sent = None
                self._line += 1
                self._goodbye_written.clear()
            client.drop_out_messages()
        if self._tls is not None and self._ssl is not None:
            try:
                self._tls.renew(self._ssl)
            except (OSError, ValueError) as error:  # the one presented so far may do
                logger.warning("%s: %s cannot be read again: %s", self._client_id, self._tls.cert_file, error)

    def _on_connect(self, client: Client, _userdata: Any, flags: Any, reason: ReasonCode, _properties: Any) -> None:
        with self._calling:
            if client is not self._client:
                return
            self._answered = True
            if reason.is_failure:
                self._set_state(connected=False, error=f"{self._broker} refused the connection: {reason}")
                return
            self._failures = 0
            self._accepted, self._refused = True, False
            if flags.session_present:  # what was not acknowledged comes again
                with self._changed:
                    self._inbox = deque(entry for entry in self._inbox if not entry[1].number)
            for topic_filter in self._given_up:
                client.unsubscribe(topic_filter)
            self._given_up.clear()
            self._unsubscribed = self._subscribe_all(client)
            if not self._unsubscribed:
                self._ready()

    def _ready(self) -> None:
        self._connections += 1
        self._set_state(connected=True, error=self._last_error if self._refused else None)
        logger.info("%s: connected to %s", self._client_id, self._broker)

    def _on_connect_fail(self, client: Client, _userdata: Any) -> None:
        error = sys.exc_info()[1]  # paho calls this from its except clause and passes no reason
        if client is self._client:
            self._set_state(connected=False, error=f"cannot reach {self._broker}: {error}")
            self._pause_before_retry(client)

    def _on_disconnect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        # Without `_calling`: paho may hold a lock of its own here, for which a `publish` with `_calling` waits.
        self._goodbye_written.set()
        if client is not self._client:
            return
        if self._connected or self._accepted:
            self._set_state(connected=False, error=f"the connection to {self._broker} was lost: {reason}")
        elif not self._answered:  # so do some brokers refuse credentials
            self._set_state(connected=False, error=f"{self._broker} hung up: are the credentials right?")
        self._pause_before_retry(client)

    def _on_subscribe(
        self, client: Client, _userdata: Any, number: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        with self._calling:
            if client is not self._client:
                return
            if refused := [str(reason) for reason in reasons if reason.is_failure]:
                self._refused = True
                error = f"the broker refused a subscription: {', '.join(refused)}"
                self._set_state(connected=self._connected, error=error)
            waiting = bool(self._unsubscribed)
            self._unsubscribed.discard(number)
            if waiting and not self._unsubscribed and self._accepted and not self._connected:
                self._ready()

    def _on_message(self, client: Client, _userdata: Any, message: MQTTMessage) -> None:
        number = message.mid if message.qos else 0
        with self._changed:
            if not self._missed_retained:
                self._changed.wait_for(
                    lambda: len(self._inbox) < self._max_inbox or client is not self._client, self._keepalive_s / 2
                )
            full = len(self._inbox) >= self._max_inbox
            newly_full = full and not self._missed_retained
            if full:
                self._dropped += 1
                self._missed_retained = True
            else:
                received = Message(message.topic, bytes(message.payload), message.retain)
                self._inbox.append((received, _Receipt(self._line, number)))
                self._changed.notify_all()
        if full and number:
            client.ack(number, _QOS)
        if newly_full:
            logger.warning("%s: the inbox is full at %d messages; dropping", self._client_id, self._max_inbox)


def new_transport(config: DeviceConfig, folder: Path) -> MqttTransport:
    """The connection to the broker that the settings of a device name.

    Args:
        config: Of the device.
        folder: Its own, which the names of certificates are relative to.
    """
    broker = config.broker
    names = (folder / name if name else None for name in (broker.ca_file, broker.cert_file, broker.key_file))
    return MqttTransport(
        broker.host,
        broker.port,
        client_id=config.device,
        username=broker.username or None,
        password=broker.password or None,
        keepalive_s=broker.keepalive_s,
        tls=Tls(*names) if broker.tls else None,
        session_expiry_s=broker.session_expiry_s,
        receive_maximum=broker.receive_maximum,
        version=broker.version,
    )


def _publication(topic: str, payload: bytes, *, retain: bool, v5: bool) -> bytes:
    """A PUBLISH packet at QoS 0: MQTT 5.0, section 3.3."""
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name + (b"\0" if v5 else b"") + payload
    return bytes([0x30 | retain]) + to_counts([len(body)]) + body  # lengths are coded as counts are
