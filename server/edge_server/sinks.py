"""Where notices go: a log, an MQTT topic, a webhook. Each is delivered at least once.

A notice is stored with the alert that it tells of, and marked as done once its sink has confirmed it. Killed between
the two, the coordinator sends it again: receivers know it by its number. The webhook's answer confirms it; on the topic
the notice itself does, as the broker gives it back.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import logging
import socket
import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from edge_sdk import __version__
from edge_sdk.clock import Clock
from edge_sdk.errors import ConfigError, NotConnectedError
from edge_sdk.messages import Topics
from edge_sdk.transport import Transport
from edge_server.alert_settings import SinkSettings
from edge_server.store import Store
from edge_server.store_alerts import Delivery

logger = logging.getLogger(__name__)
_AT_ONCE = 20
_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 3600.0
_ECHO_WAIT_S = 30.0
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


class SinkError(Exception):
    """A notice was not taken; it will be sent again."""


class Sink(Protocol):
    """Takes notices."""

    def send(self, delivery: Delivery) -> Future[None] | None:
        """Begin to deliver.

        Returns:
            None: it was delivered. Else what ends when it was, or fails with a `SinkError`.

        Raises:
            SinkError: It was not.
        """
        ...


class LogSink:
    """Writes a line into the coordinator's log."""

    def send(self, delivery: Delivery) -> None:
        """At once."""
        told = msgspec.json.decode(delivery.body)
        alert = told["alert"]
        level = _LEVELS[alert["severity"]] if told["reason"] != "resolved" else logging.INFO
        logger.log(level, "alert %s %s: %s: %s", alert["id"], told["reason"], told["title"], alert["words"])


class TopicSink:
    """Publishes to an MQTT topic, and waits for the broker to give it back.

    Args:
        transport: The coordinator's own.
        topic: Where to.
    """

    def __init__(self, transport: Transport, topic: str) -> None:
        self._transport, self.topic = transport, topic
        self._waiting: dict[int, Future[None]] = {}
        transport.subscribe(topic)

    def send(self, delivery: Delivery) -> Future[None]:
        """Publish."""
        try:
            self._transport.publish(self.topic, payload_of(delivery))
        except NotConnectedError as error:
            raise SinkError("no connection to the broker") from error
        return self._waiting.setdefault(delivery.id, Future())

    def hear(self, payload: bytes) -> None:
        """What came on the topic."""
        with suppress(msgspec.MsgspecError, TypeError, AttributeError):
            number = msgspec.json.decode(payload).get("delivery")
            if (future := self._waiting.pop(number, None)) is not None:
                future.set_result(None)


class WebhookSink:
    """Posts notices, signed, from a thread of its own.

    The body is JSON. `Edge-Signature` is "sha256=" and the HMAC-SHA256, in hex, of `Edge-Timestamp`, a dot and the body
    under the secret; a receiver refuses old timestamps, and knows repetitions by `Edge-Delivery`. Any answer but 2xx is
    a failure, redirections too: a secret's holder is where the settings say, and nowhere else.

    Args:
        url: http or https.
        secret: What to sign with.
        timeout_s: For all of one delivery.
        clock: For the timestamp.
    """

    def __init__(self, url: str, *, secret: bytes, timeout_s: float, clock: Clock) -> None:
        self._parts, self._secret, self._timeout_s, self._clock = urlsplit(url), secret, timeout_s, clock
        self._worker = ThreadPoolExecutor(1, "webhook")

    def send(self, delivery: Delivery) -> Future[None]:
        """Begin to post."""
        return self._worker.submit(self._post, delivery)

    def close(self) -> None:
        """Do not wait for what is under way: it will be sent again."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(host, port, timeout=self._timeout_s)

    def _post(self, delivery: Delivery) -> None:
        body, now = payload_of(delivery), f"{self._clock.now():.0f}"
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"edge-coordinator/{__version__}",
            "Edge-Delivery": str(delivery.id),
            "Edge-Timestamp": now,
            "Edge-Signature": sign(self._secret, now, body),
        }
        connection, late = self._connection(), threading.Event()
        # each read has the time limit by itself: a server that drips must not hold this thread for hours
        watchdog = threading.Timer(self._timeout_s, _cut, (connection, late))
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.connect()
            if late.is_set():
                raise SinkError("took too long to connect")
            parts = self._parts
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise SinkError("took too long" if late.is_set() else f"{type(error).__name__}: {error}") from error
        finally:
            watchdog.cancel()
            connection.close()
        if not 200 <= status < 300:
            note = ", redirections are not followed" if 300 <= status < 400 else ""
            raise SinkError(f"answered {status}{note}")


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    with suppress(OSError, AttributeError):  # the latter: not connected yet
        connection.sock.shutdown(socket.SHUT_RDWR)


def payload_of(delivery: Delivery) -> bytes:
    """The notice, with the number by which a receiver knows it again."""
    return msgspec.json.encode({"delivery": delivery.id, **msgspec.json.decode(delivery.body)})


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """What `Edge-Signature` says."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Courier:
    """Delivers what waits, in order for each sink, again and again until it is confirmed.

    Args:
        store: Where deliveries are.
        sinks: By name.
        clock: Where the time comes from.
        give_up_s: What could not be delivered for so long is given up.
    """

    def __init__(self, store: Store, sinks: Mapping[str, Sink], *, clock: Clock, give_up_s: float) -> None:
        self._store, self._sinks, self._clock, self._give_up_s = store, sinks, clock, give_up_s
        self._flying: dict[str, dict[int, Future[None]]] = {name: {} for name in sinks}

    def turn(self) -> int:
        """Take in what sinks have confirmed, and send what is due; returns how many were delivered or tried.

        Raises:
            StoreError: What was confirmed is not noted, and will be sent again.
        """
        return sum(self._serve(name, sink) for name, sink in self._sinks.items())

    def hear(self, topic: str, payload: bytes) -> bool:
        """Take in what came on a topic; False: it is of no sink."""
        for sink in self._sinks.values():
            if isinstance(sink, TopicSink) and sink.topic == topic:
                sink.hear(payload)
                return True
        return False

    def close(self) -> None:
        """Stop; what is under way will be sent again."""
        for sink in self._sinks.values():
            if isinstance(sink, WebhookSink):
                sink.close()

    def _serve(self, name: str, sink: Sink) -> int:
        flying, handled = self._flying[name], 0
        for delivery in self._store.alerts.waiting(name, limit=_AT_ONCE):
            future = flying.get(delivery.id)
            if future is not None and future.done():
                del flying[delivery.id]
                handled += 1
                if not self._note(delivery, name, future.exception()):
                    break  # in order: what failed holds up what comes after it
                continue
            under_way = future is not None and not isinstance(sink, TopicSink)
            if delivery.next_at > self._clock.now() or under_way:
                break
            handled += 1
            if not self._send(delivery, name, sink):
                break
        return handled

    def _send(self, delivery: Delivery, name: str, sink: Sink) -> bool:
        """Whether the next one may be sent as well."""
        try:
            future = sink.send(delivery)
        except SinkError as error:
            return self._note(delivery, name, error)
        if future is None:
            return self._note(delivery, name, None)
        self._flying[name][delivery.id] = future
        if isinstance(sink, TopicSink):  # lost on its way, it is published again
            with self._store.transaction():
                self._store.alerts.attempted(
                    delivery.id, next_at=self._clock.now() + _ECHO_WAIT_S, error="not confirmed"
                )
            return True
        return False

    def _note(self, delivery: Delivery, name: str, error: BaseException | None) -> bool:
        """Whether it is done with, delivered or given up."""
        now = self._clock.now()
        with self._store.transaction():
            if error is None:
                self._store.alerts.done(delivery.id, now=now)
            elif now - delivery.created >= self._give_up_s:
                self._store.alerts.done(delivery.id, now=now, error=f"given up: {error}")
                logger.error("alert %s could not be delivered to %s: %s", delivery.alert, name, error)
            else:
                self._store.alerts.attempted(
                    delivery.id, next_at=now + wait_s(delivery.attempts), error=str(error)[:500]
                )
                logger.warning("alert %s was not delivered to %s yet: %s", delivery.alert, name, error)
                return False
        return True


def wait_s(attempts: int) -> float:
    """Seconds until the next attempt: 5, doubled with each, an hour at most."""
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(attempts, 20))


def open_sinks(
    settings: Mapping[str, SinkSettings], *, home: Path, transport: Transport, topics: Topics, clock: Clock
) -> dict[str, Sink]:
    """The sinks of the settings.

    Raises:
        ConfigError: A secret cannot be read.
    """

    def opened(name: str, sink: SinkSettings) -> Sink:
        if sink.kind == "log":
            return LogSink()
        if sink.kind == "mqtt":
            return TopicSink(transport, topics.alerts(name))
        try:
            secret = (home / sink.secret_file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"alerts.sinks.{name}.secret_file cannot be read: {error}") from error
        if len(secret) < 16:
            raise ConfigError(f"alerts.sinks.{name}.secret_file holds {len(secret)} bytes: at least 16 are needed")
        return WebhookSink(sink.url, secret=secret, timeout_s=sink.timeout_s, clock=clock)

    return {name: opened(name, sink) for name, sink in settings.items()}
