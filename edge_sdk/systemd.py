"""What systemd is told by a service that watches over itself: ready, alive, stopping. No library is needed for it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

logger = logging.getLogger(__name__)


def notify(text: str, environ: Mapping[str, str]) -> bool:
    """Tell the service manager; False if there is none, or it does not listen.

    Args:
        text: Such as `READY=1`.
        environ: The process's environment, where NOTIFY_SOCKET says whom to tell.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(text.encode(), address)
    except OSError as error:
        logger.debug("the service manager was not told %s: %s", text, error)
        return False
    return True


def watchdog_s(environ: Mapping[str, str]) -> float | None:
    """After how many seconds of silence the service manager ends this process; None: never."""
    try:
        if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return None
        seconds = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return seconds if seconds > 0 else None


@contextlib.contextmanager
def supervised(alive: Callable[[], object], environ: Mapping[str, str]) -> Iterator[None]:
    """Tell the service manager that the service is ready, and that it lives for as long as `alive` returns.

    Args:
        alive: Asked three times in each interval of the watchdog. One that hangs or raises is what the watchdog is for.
        environ: The process's environment.
    """
    interval, stop = watchdog_s(environ), threading.Event()

    def watch(pause_s: float) -> None:
        while not stop.wait(pause_s):
            try:
                alive()
            except Exception:  # silence says it all
                logger.exception("the service does not answer")
                continue
            notify("WATCHDOG=1", environ)

    notify("READY=1", environ)
    thread = None
    if interval is not None:
        thread = threading.Thread(target=watch, args=(interval / 3,), name="watchdog", daemon=True)
        thread.start()
    try:
        yield
    finally:
        notify("STOPPING=1", environ)
        stop.set()
        if thread is not None:
            thread.join(interval)
