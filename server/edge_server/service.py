"""One process that runs the coordinator's loop and the web application side by side, on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn

from edge_sdk.errors import StoreError, TransportError
from edge_server.app import create_app
from edge_server.coordinator import Coordinator
from edge_server.settings import HttpSettings

logger = logging.getLogger(__name__)
_IDLE_S = 0.02
_RETRY_S = 1.0


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
    except OSError as error:
        listener.close()
        raise TransportError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; set http.port to a free port"
        ) from error
    return listener


def run(coordinator: Coordinator, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then stop cleanly.

    Args:
        coordinator: Not started yet; closed at the end.
        listener: Of `listen`; closed at the end.
        on_ready: Called once both loops are about to run.
    """
    config = uvicorn.Config(
        create_app(coordinator.registry), log_config=None, access_log=False, lifespan="off", server_header=False
    )
    server = uvicorn.Server(config)
    # uvicorn catches the signals while it runs and raises them again when it is done: end quietly then
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    try:
        coordinator.start()
        on_ready()
        asyncio.run(_both(coordinator, server, listener))
    finally:
        coordinator.close()
        listener.close()


async def _both(coordinator: Coordinator, server: uvicorn.Server, listener: socket.socket) -> None:
    turns = asyncio.create_task(_turns(coordinator, server))
    try:
        await server.serve(sockets=[listener])
    finally:
        turns.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turns


async def _turns(coordinator: Coordinator, server: uvicorn.Server) -> None:
    try:
        while True:
            pause = 0.0
            try:
                if coordinator.step() == 0:
                    pause = _IDLE_S
            except StoreError:
                # nothing was acknowledged: the devices keep it and send it again
                logger.exception("this turn could not be stored")
                pause = _RETRY_S
            await asyncio.sleep(pause)
    finally:
        server.should_exit = True
