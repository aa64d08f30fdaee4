"""A broker for demos, tests and small trials: `iotcore.Broker` in a child process, on loopback by default.

Not for production: it keeps no sessions, knows no access rules per topic, and forgets acknowledged messages
of a subscriber that falls behind by more than its log holds. Use mosquitto there.
"""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from edge_sdk.errors import MissingExtraError, TransportError

if TYPE_CHECKING:
    from iotcore import Broker

_MAX_PAYLOAD_BYTES = 256 * 1024
# The log that subscribers read from: what falls out of it is lost to the slow ones. Ample for a demo.
_SEGMENT_BYTES = 10 * 1024 * 1024
_SEGMENTS = 4

_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = {segment_bytes}
max_segment_count = {segments}

[v5.1]
name = "edge"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_payload}
max_inflight_count = 100
dynamic_filters = true
"""


class EmbeddedBroker:
    """An MQTT v5 broker that lives in a child process and dies with this one.

    It can be started again after `stop`, on the same port; retained messages are then gone.

    Attributes:
        host: Where it listens. The default is this machine only.
        port: The port, chosen once when 0 was asked for, so that clients find it again after a restart.

    Example:
        >>> with EmbeddedBroker() as broker:  # doctest: +SKIP
        ...     transport = MqttTransport(broker.host, broker.port, client_id="me")
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, credentials: dict[str, str] | None = None) -> None:
        """Prepare a broker; nothing runs before `start`.

        Args:
            host: IPv4 address to listen on.
            port: 0 for any free one.
            credentials: Password of each user; None lets everybody in.
        """
        self.host = host
        self.port = port or _free_port(host)
        self._credentials = credentials
        self._broker: Broker | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start and wait until connections are accepted. Does nothing while it runs.

        Raises:
            MissingExtraError: iotcore is not installed.
            TransportError: The port is taken, or the broker did not come up.
        """
        if self._broker is not None:
            return
        try:
            from iotcore import Broker  # noqa: PLC0415 - an extra, and only this class needs it
        except ImportError as error:
            raise MissingExtraError("the embedded broker", "server") from error
        # the configuration holds passwords: only this user may read the folder
        self._folder = tempfile.TemporaryDirectory(prefix="edge-broker-")
        config = Path(self._folder.name) / "broker.toml"
        config.write_text(self._config())
        broker = Broker(config_path=str(config))
        try:
            broker.start()
        except (OSError, RuntimeError) as error:
            self._folder.cleanup()
            self._folder = None
            raise TransportError(f"the embedded broker cannot run on {self.host}:{self.port}: {error}") from error
        self._broker = broker

    def stop(self) -> None:
        """Stop, free the port and remove the configuration. Does nothing while it does not run."""
        if self._broker is not None:
            self._broker.stop()
            self._broker = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _config(self) -> str:
        config = _CONFIG.format(
            host=self.host,
            port=self.port,
            max_payload=_MAX_PAYLOAD_BYTES,
            segment_bytes=_SEGMENT_BYTES,
            segments=_SEGMENTS,
        )
        if self._credentials:
            # a JSON string is also a TOML string
            users = "".join(f"{json.dumps(user)} = {json.dumps(word)}\n" for user, word in self._credentials.items())
            config += f"\n[v5.1.connections.auth]\n{users}"
        return config


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
