"""`serve` as a process of its own: real broker, real MQTT, real HTTP."""

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
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
    (home / "token").write_text(json.loads(cli("init", "--home", home, "--json"))["token"])
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


def read(address, home, *, context=None):
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {(home / 'token').read_text()}"})
    with urllib.request.urlopen(request, timeout=10, context=context) as response:
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
    assert [record["name"] for record in read(address + "api/v1/devices", home)["devices"]] == ["pump-1"]

    cli("push", checkpoint(1), "--home", home)
    desired = first_message(line, TOPICS.desired("default"))
    assert decode(desired.payload, Desired).base.release == 1

    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in output + errors


def test_a_browser_that_listens_does_not_hold_up_the_end(service, home):
    process, address, _ = service
    headers = {"Authorization": f"Bearer {(home / 'token').read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(address + "live", headers=headers), timeout=10) as response:
        assert response.readline() == b"retry: 3000\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def readiness(address):
    try:
        with urllib.request.urlopen(address + "readyz", timeout=10) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


def test_it_is_ready_once_the_broker_is_there_and_logs_as_json(home, tmp_path):
    process = subprocess.Popen(
        [*CLI, "--log-format", "json", "--debug", "serve", "--home", str(home), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        told = "".join(iter(process.stdout.readline, "}\n")) + "}"
        address = json.loads(told)["dashboard"]
        deadline = time.monotonic() + 30
        while (found := readiness(address))["problems"] and time.monotonic() < deadline:
            assert found["problems"] == ["there is no connection to the broker"]
        assert found == {"status": "ok", "problems": []}
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert any(line.get("path") == "/readyz" and line["status"] == 200 for line in lines)


def test_it_speaks_tls_and_its_cookies_are_for_tls_alone(home, tmp_path):
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fleet")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (home / "http.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (home / "http.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (home / "coordinator.toml").write_text(SETTINGS + 'cert_file = "http.crt"\nkey_file = "http.key"\n')
    process = subprocess.Popen(
        [*CLI, "serve", "--home", str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().split()[1]
        assert address.startswith("https://")
        context = ssl.create_default_context(cafile=home / "http.crt")
        assert read(address + "api/v1/me", home, context=context) == {"name": "owner", "role": "releaser"}
        with urllib.request.urlopen(address + "login", timeout=10, context=context) as response:
            assert response.headers["strict-transport-security"]
            assert response.headers["set-cookie"].startswith("__Host-edge_visitor=")
            assert "; Secure" in response.headers["set-cookie"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def test_a_certificate_that_cannot_be_read_is_wrong_settings(home):
    (home / "coordinator.toml").write_text(SETTINGS + 'cert_file = "http.crt"\nkey_file = "http.key"\n')
    result = subprocess.run([*CLI, "serve", "--home", str(home)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "http.cert_file" in result.stderr


def test_a_port_that_is_taken_is_a_network_error(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (home / "coordinator.toml").write_text(f"[http]\nport = {port}\n")
        result = subprocess.run([*CLI, "serve", "--home", str(home)], capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1")
