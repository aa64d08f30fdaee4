"""What systemd hears, on a socket that stands in for it."""

import os
import socket
import threading
from pathlib import Path

import pytest

from edge_sdk.systemd import notify, supervised, watchdog_s


@pytest.fixture
def manager(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        yield listener


def environ(manager, **more):
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def heard(manager):
    return manager.recv(100).decode()


def test_ready_alive_and_stopping_are_told(manager):
    asked = threading.Event()
    with supervised(asked.set, environ(manager, WATCHDOG_USEC="60000", WATCHDOG_PID=str(os.getpid()))):
        assert [heard(manager) for _ in range(3)] == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        assert asked.is_set()
    told = heard(manager)
    while told == "WATCHDOG=1":
        told = heard(manager)
    assert told == "STOPPING=1"
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("kind", ["hangs", "fails"])
def test_a_service_that_does_not_answer_is_not_called_alive(manager, kind):
    asked, release = threading.Event(), threading.Event()

    def alive():
        asked.set()
        if kind == "fails":
            raise RuntimeError("broken")
        release.wait(10)

    with supervised(alive, environ(manager, WATCHDOG_USEC="30000")):
        assert heard(manager) == "READY=1"
        assert asked.wait(10)
        manager.settimeout(0.1)
        with pytest.raises(TimeoutError):
            heard(manager)
        release.set()


def test_an_abstract_socket_is_reached():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0edge-test-{os.getpid()}")
        assert notify("READY=1", {"NOTIFY_SOCKET": f"@edge-test-{os.getpid()}"})
        assert listener.recv(100) == b"READY=1"


def test_without_a_manager_nothing_happens(tmp_path):
    assert not notify("READY=1", {})
    assert not notify("READY=1", {"NOTIFY_SOCKET": "relative"})
    assert not notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    with supervised(lambda: None, {}):
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({"WATCHDOG_USEC": "5000000"}, 5.0),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_interval_comes_from_the_environment(values, seconds):
    assert watchdog_s(values) == seconds


def test_the_unit_watches_what_the_command_tells():
    unit = (Path(__file__).parents[2] / "docs" / "edge.service").read_text()
    for line in ("Type=notify", "WatchdogSec=300", "Restart=always"):
        assert f"\n{line}\n" in unit
    assert "edge run --home /var/lib/edge" in unit
