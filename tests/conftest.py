"""Fixtures that every test may use."""

import getpass
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest

from edge_sdk.clock import ManualClock


@pytest.fixture
def rng():
    return np.random.default_rng(20_260_101)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(scope="module")
def embedded_broker():
    """One `EmbeddedBroker` for the module; tests that stop it make their own."""
    from edge_server.broker import EmbeddedBroker

    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture
def mosquitto(request, tmp_path):
    """A real mosquitto on loopback that keeps its data over `kill()` and `start()`.

    Parametrize indirectly with {user: password} to make it ask for credentials.
    """
    broker = Mosquitto(tmp_path, credentials=getattr(request, "param", None))
    broker.start()
    yield broker
    broker.stop()


class Mosquitto:
    """A mosquitto child process with its files in `folder`."""

    host = "127.0.0.1"

    def __init__(self, folder, *, credentials=None):
        self.port = free_port()
        self._folder = folder
        self._process = None
        passwords = folder / "mosquitto.passwords"
        lines = [
            f"listener {self.port} {self.host}",
            f"user {getpass.getuser()}",
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_on_changes true",
            "autosave_interval 1",
            f"log_dest file {folder}/mosquitto.log",
            f"allow_anonymous {'false' if credentials else 'true'}",
        ]
        if credentials:
            passwords.touch(mode=0o600)
            for user, password in credentials.items():
                subprocess.run(["mosquitto_passwd", "-b", passwords, user, password], check=True, capture_output=True)
            lines.append(f"password_file {passwords}")
        (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    def start(self):
        self._process = subprocess.Popen(
            ["mosquitto", "-c", self._folder / "mosquitto.conf"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not accepts_connections(self.host, self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"mosquitto did not start: {(self._folder / 'mosquitto.log').read_text()}")
            threading.Event().wait(0.01)

    def stop(self):
        """End it as an administrator would."""
        self._end(signal.SIGTERM)

    def kill(self):
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def _end(self, number):
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None


def accepts_connections(host, port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
