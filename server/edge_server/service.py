"""One process: a thread that takes in what devices send, the only one that does, and the web application beside it.

The two have a connection to the database each. In WAL mode neither waits for the other to read.
"""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable

import uvicorn

from edge_sdk.errors import ConfigError, StoreError, TransportError
from edge_server.app import create_app
from edge_server.coordinator import BATCH_ROWS, Coordinator
from edge_server.registry import Registry
from edge_server.settings import HttpSettings

logger = logging.getLogger(__name__)
COMMIT_S = 0.05
"""What arrives within this time is committed together."""
_RETRY_S = 1.0
_STOP_S = 3


def listen(settings: HttpSettings) -> socket.socket:
    """A socket where the web application will answer.

    Raises:
        TransportError: The address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen()  # who comes before the application runs waits
    except OSError as error:
        listener.close()
        raise TransportError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; set http.port to a free port"
        ) from error
    return listener


def run(coordinator: Coordinator, records: Registry, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then stop cleanly.

    Args:
        coordinator: Not started yet; closed at the end.
        records: The same fleet's, for the web application; closed at the end.
        listener: Of `listen`; closed at the end.
        on_ready: Called once both are about to run.
    """
    settings = records.settings.http
    app = create_app(records, pulse=lambda: coordinator.pulse, stopping=lambda: server.should_exit)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # what a proxy on this machine says of its clients is believed if there is one
        proxy_headers=settings.public_url is not None,
        ssl_certfile=None if settings.cert_file is None else records.home / settings.cert_file,
        ssl_keyfile=None if settings.key_file is None else records.home / settings.key_file,
        timeout_graceful_shutdown=_STOP_S,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"http.cert_file or http.key_file cannot be used: {error}") from error
    server = uvicorn.Server(config)
    # uvicorn catches the signals while it runs and raises them again when it is done: end quietly then
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            turn_by_turn(coordinator, stop)
        except BaseException as error:  # noqa: BLE001 - it is raised below, on the thread that waits
            failed.append(error)
        finally:
            server.should_exit = True

    thread = threading.Thread(target=work, name="edge-ingest")
    try:
        coordinator.start()
        on_ready()
        thread.start()
        server.run(sockets=[listener])
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()
        coordinator.close()
        records.close()
        listener.close()
    if failed:
        raise failed[0]


def turn_by_turn(coordinator: Coordinator, stop: threading.Event) -> None:
    """Take in what arrives, a batch at a time, until told to stop."""
    while not stop.is_set():
        began = time.monotonic()
        try:
            handled, pause = coordinator.step(), COMMIT_S
            coordinator.note_stored()
        except StoreError as error:
            logger.debug("this turn could not be stored", exc_info=True)
            coordinator.note_stored(str(error))
            handled, pause = 0, _RETRY_S
        if handled < BATCH_ROWS:
            stop.wait(max(0.0, pause - (time.monotonic() - began)))
