"""Coordinator and device as a person runs them: two processes, one bundle, one push."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60


def command(*arguments):
    """Run one of the command lines to its end."""
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Child:
    """A process that is told to stop by its id, and whose output is kept."""

    def __init__(self, *arguments, log):
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(a) for a in arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def output(self):
        return self._log.read_text()

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(DEADLINE_S)

    def kill(self):
        self._process.kill()
        self._process.wait()


def until(condition, children):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "\n".join(child.output() for child in children)
        threading.Event().wait(0.1)
    return found


def api(url, token, path):
    request = urllib.request.Request(f"{url}/api/v1/{path}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


@pytest.mark.torch
def test_an_enrolled_device_gets_its_release_and_survives_a_killed_coordinator(tmp_path, checkpoint):
    bin_folder = Path(sys.executable).parent
    coordinator, edge = bin_folder / "edge-coordinator", bin_folder / "edge"
    home, device_home = tmp_path / "coordinator", tmp_path / "device"
    token = json.loads(command(coordinator, "init", "--home", home, "--json"))["token"]
    settings = home / "coordinator.toml"
    port, http_port = free_port(), free_port()
    text = settings.read_text()
    settings.write_text(text.replace("port = 1883", f"port = {port}").replace("port = 8080", f"port = {http_port}"))
    url = f"http://127.0.0.1:{http_port}"
    bundle = tmp_path / "pump-1.json"
    command(coordinator, "devices", "add", "pump-1", "--group", "pumps", "--out", bundle, "--home", home)
    assert bundle.stat().st_mode & 0o077 == 0
    command(edge, "enroll", bundle, "--home", device_home)

    serve = Child(coordinator, "serve", "--home", home, log=tmp_path / "serve.log")
    run = Child(edge, "run", "--home", device_home, log=tmp_path / "run.log")
    children = [serve, run]
    try:
        until(lambda: device(url, token)["online"] is True, children)
        command(coordinator, "push", checkpoint, "--group", "pumps", "--home", home)
        until(lambda: device(url, token)["release"] == 1, children)
        assert device(url, token)["online"] is True

        serve.kill()
        serve = children[0] = Child(coordinator, "serve", "--home", home, log=tmp_path / "serve-2.log")
        until(lambda: device(url, token)["online"] is True, children)
        # the state says so before the rows have come again, and what is stopped sends none
        until(lambda: activated(url, token), children)

        assert run.stop() == 0, run.output()
        until(lambda: device(url, token)["online"] is False, children)
        assert serve.stop() == 0, serve.output()
    finally:
        for child in children:
            child.kill()
    assert "release_activated" in command(edge, "history", "--home", device_home)
    status = json.loads(command(edge, "status", "--json", "--home", device_home))
    assert (status["release"], status["outbox_rows"]) == (1, 0)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def activated(url, token):
    try:
        return [event for event in api(url, token, "events")["events"] if event["name"] == "release_activated"]
    except OSError:
        return []


def device(url, token):
    try:
        return api(url, token, "devices/pump-1")
    except OSError:
        return {"release": 0, "online": None}
