import base64
import hashlib
import json
import socket
import subprocess

import msgspec
import pytest

from edge_sdk.errors import ConfigError, StoreError
from edge_server.enrol import Bundle, hash_password
from edge_server.errors import DeviceExistsError
from edge_server.registry import Registry
from edge_server.settings import BrokerSettings, Settings


@pytest.fixture
def registry(tmp_path):
    settings = Settings(prefix="plant", broker=BrokerSettings(host="10.0.0.5", port=8883))
    registry = Registry(tmp_path / "home", settings=settings)
    yield registry
    registry.close()


def add(registry, out, name="pump-1", group="lab"):
    return registry.enrol(name, group=group, out=out, actor="test")


def test_the_bundle_has_all_a_device_needs_and_only_its_owner_reads_it(registry, tmp_path):
    out = tmp_path / "bundle.json"
    bundle = add(registry, out)
    content = json.loads(out.read_text())
    assert content == {
        "schema": 1,
        "device": "pump-1",
        "group": "lab",
        "prefix": "plant",
        "command_key": bundle.command_key,
        "broker": {
            "host": "10.0.0.5",
            "port": 8883,
            "username": "pump-1",
            "password": bundle.broker.password,
        },
        "root": "",
    }
    assert out.stat().st_mode & 0o777 == 0o600
    assert msgspec.json.decode(out.read_bytes(), type=Bundle) == bundle
    assert len(bundle.broker.password) >= 40
    assert len(bytes.fromhex(bundle.command_key)) == 32


def test_the_public_address_is_told_where_it_differs(tmp_path):
    settings = Settings(broker=BrokerSettings(public_host="broker.example.org"))
    registry = Registry(tmp_path / "home", settings=settings)
    assert add(registry, tmp_path / "b.json").broker.host == "broker.example.org"
    registry.close()


def test_the_database_holds_a_salted_hash_and_never_the_password(registry, tmp_path):
    bundle = add(registry, tmp_path / "b.json")
    for file in (tmp_path / "home").iterdir():
        assert bundle.broker.password.encode() not in file.read_bytes()
    name, _, credential = registry.password_file().strip().partition(":")
    assert name == "pump-1"
    _, kind, iterations, salt, digest = credential.split("$")
    expected = hashlib.pbkdf2_hmac("sha512", bundle.broker.password.encode(), base64.b64decode(salt), int(iterations))
    assert kind == "7"
    assert base64.b64decode(digest) == expected


def test_equal_passwords_have_different_hashes():
    assert hash_password("x") != hash_password("x")


def test_a_name_is_given_once(registry, tmp_path):
    add(registry, tmp_path / "a.json")
    with pytest.raises(DeviceExistsError, match="pump-1"):
        add(registry, tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(("name", "group"), [("a/b", "lab"), ("", "lab"), ("a:b", "lab"), ("a", "x#"), ("a\n", "lab")])
def test_names_that_cannot_stand_in_a_topic_are_refused(registry, tmp_path, name, group):
    with pytest.raises(ConfigError):
        add(registry, tmp_path / "a.json", name, group)


def test_an_existing_file_is_not_overwritten_and_no_device_added(registry, tmp_path):
    out = tmp_path / "a.json"
    out.write_text("precious")
    with pytest.raises(StoreError, match="exists already"):
        add(registry, out)
    assert out.read_text() == "precious"
    assert registry.devices() == []


def test_a_bundle_that_cannot_be_written_adds_no_device(registry, tmp_path):
    with pytest.raises(StoreError):
        add(registry, tmp_path / "missing" / "a.json")
    assert registry.devices() == []


def test_without_a_fixed_port_no_device_can_be_told_where_to_connect(tmp_path):
    registry = Registry(tmp_path / "home", settings=Settings(broker=BrokerSettings(embedded=True, port=0)))
    with pytest.raises(ConfigError, match=r"broker\.port"):
        add(registry, tmp_path / "a.json")
    registry.close()


def connect_reason(port, username, password):
    """The reason code with which an MQTT v5 broker answers a CONNECT; 0 is welcome."""
    payload = b"".join(len(text).to_bytes(2, "big") + text.encode() for text in ("", username, password))
    body = b"\x00\x04MQTT\x05\xc2\x00\x3c\x00" + payload
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(bytes([0x10, len(body)]) + body)
        answer = line.recv(100)
    assert answer[0] == 0x20
    return answer[3]


@pytest.mark.mosquitto
def test_mosquitto_reads_the_password_file_and_checks_the_passwords(registry, tmp_path):
    bundle = add(registry, tmp_path / "b.json")
    (tmp_path / "passwd").write_text(registry.password_file())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path / 'passwd'}\nuser root\n"
    )
    with subprocess.Popen(["mosquitto", "-c", str(config)], stderr=subprocess.PIPE, text=True) as mosquitto:
        try:
            log = iter(mosquitto.stderr.readline, "")
            assert any(line.rstrip().endswith("running") for line in log)
            assert connect_reason(port, "pump-1", bundle.broker.password) == 0
            assert connect_reason(port, "pump-1", "guess") != 0
        finally:
            mosquitto.terminate()
