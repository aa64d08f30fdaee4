"""`serve` as a process of its own: real broker, real MQTT, real HTTP."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from edge_sdk.messages import Ack, Desired, Envelope, Event, Topics, decode, encode, raw
from edge_sdk.mqtt import MqttTransport
from edge_sdk.transport import Message

TOPICS = Topics()
CLI = [sys.executable, "-c", "from edge_server.cli import main; main()"]
SETTINGS = """
accept_unknown = true
rollout_interval_s = 0.1
[broker]
embedded = true
port = 0
[http]
port = 0
"""


def cli(*arguments):
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "home"
    cli("init", "--home", home)
    (home / "coordinator.toml").write_text(SETTINGS)
    return home


@pytest.fixture
def service(home):
    """(process, address of the API, port of the broker)."""
    process = subprocess.Popen(
        [*CLI, "serve", "--home", str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    found = re.fullmatch(r"dashboard (http://\S+/)  broker 127\.0\.0\.1:(\d+)\n", line)
    assert found, line + (process.stderr.read() if process.poll() is not None else "")
    yield process, found[1], int(found[2])
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture
def line(service):
    transport = MqttTransport("127.0.0.1", service[2], client_id="pump-1")
    transport.connect()
    yield transport
    transport.close()


def first_message(transport, topic, *, resend=None):
    """The first message on `topic`.

    The coordinator may not have subscribed yet, so that what was sent to it is lost: a device sends again until it
    hears of it, and so does this with `resend`. Nothing else that comes, or wakes the line up, ends that.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if resend is not None:
            transport.publish(resend.topic, resend.payload)
        transport.wait(0.2)
        for message in transport.receive():
            if message.topic == topic:
                return message
    raise AssertionError(f"nothing came on {topic}")


def read(address):
    with urllib.request.urlopen(address, timeout=10) as response:
        return json.loads(response.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_takes_in_rows_carries_out_orders_and_stops_cleanly(service, line, home, checkpoint, number):
    process, address, _ = service
    line.subscribe(TOPICS.down("pump-1", "ack"))
    line.subscribe(TOPICS.desired("default"))
    while not line.connected:
        assert line.wait(30)
    event = raw(Event(name="boot", release=0, head=0, detail={}))
    envelope = Envelope(store_id="s", seq=1, oldest=1, time=1.0, kind="event", body=event)
    ack = first_message(
        line, TOPICS.down("pump-1", "ack"), resend=Message(TOPICS.up("pump-1", "event"), encode(envelope))
    )
    assert decode(ack.payload, Ack) == Ack("s", 1)
    assert [record["name"] for record in read(address + "api/v1/devices")["devices"]] == ["pump-1"]

    cli("push", checkpoint(1), "--home", home)
    desired = first_message(line, TOPICS.desired("default"))
    assert decode(desired.payload, Desired).base.release == 1

    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in output + errors


def test_a_port_that_is_taken_is_a_network_error(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (home / "coordinator.toml").write_text(f"[http]\nport = {port}\n")
        result = subprocess.run([*CLI, "serve", "--home", str(home)], capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1")
