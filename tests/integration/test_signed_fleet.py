"""Signed releases from the first command to a device that serves them, over a real broker and the real file formats."""

import threading
import time

import msgspec
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main as edge
from edge_sdk.config import load_config
from edge_sdk.device import EdgeDevice
from edge_sdk.manifest import MANIFEST_NAME, manifest_bytes, parse_manifest
from edge_sdk.messages import Desired, Topics, decode, encode
from edge_sdk.mqtt import MqttTransport
from edge_sdk.resources import FixedReader
from edge_server.cli import main as edge_coordinator
from edge_server.coordinator import Coordinator
from edge_server.settings import load_settings

pytestmark = [pytest.mark.mosquitto, pytest.mark.torch]
DEADLINE_S = 30


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(part) for part in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.fixture
def release(checkpoint, tmp_path):
    """A release with the first one's files and another number."""
    import shutil

    def make(number):
        folder = shutil.copytree(checkpoint, tmp_path / f"release-{number}")
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
        (folder / MANIFEST_NAME).write_bytes(manifest_bytes(msgspec.structs.replace(manifest, release=number)))
        return folder

    return make


def test_a_fleet_is_signed_from_its_first_release_and_survives_new_keys(mosquitto, tmp_path, release):
    home, away = tmp_path / "coordinator", tmp_path / "away"
    home.mkdir()
    (home / "coordinator.toml").write_text(
        f'durable = false\n[broker]\nhost = "{mosquitto.host}"\nport = {mosquitto.port}\n'
    )
    run(edge_coordinator, "init", "--home", home)
    run(edge_coordinator, "keys", "init", "--home", home, "--root-keys", away, "--passphrase", "secret")
    run(edge_coordinator, "push", release(1), "--home", home)
    run(edge_coordinator, "devices", "add", "pump-1", "--home", home, "--out", tmp_path / "bundle.json")
    run(edge, "enroll", tmp_path / "bundle.json", "--home", tmp_path / "device")

    transport = MqttTransport(mosquitto.host, mosquitto.port, client_id="coordinator")
    coordinator = Coordinator(home, transport=transport, settings=load_settings(home / "coordinator.toml"))
    config = load_config(tmp_path / "device" / "device.toml")
    update = msgspec.structs.replace(config.update, min_free_bytes=0, retry_s=1.0)
    device = EdgeDevice(
        tmp_path / "device",
        config=msgspec.structs.replace(config, update=update, variant="int8"),
        transport=MqttTransport(mosquitto.host, mosquitto.port, client_id=config.device),
        resources=FixedReader(),
    )

    def until(coordinator, release, condition=lambda: True):
        end = time.monotonic() + DEADLINE_S
        while (status := device.status()).release != release or status.updates != "trusted" or not condition():
            assert time.monotonic() < end, status
            coordinator.step()
            assert device.step().problem == ""
            threading.Event().wait(0.01)

    try:
        coordinator.start()
        device.connect()
        until(coordinator, 1)
        run(
            edge_coordinator,
            "keys",
            "rotate",
            "timestamp",
            "--home",
            home,
            "--root-keys",
            away,
            "--passphrase",
            "secret",
        )
        run(
            edge_coordinator, "keys", "rotate", "targets", "--home", home, "--root-keys", away, "--passphrase", "secret"
        )
        mosquitto.kill()
        mosquitto.start()
        plan = ("--stages", "100", "--soak", "0", "--min-labelled", "0")
        run(edge_coordinator, "push", release(2), "--home", home, *plan)
        until(coordinator, 2)
        assert (tmp_path / "device" / "tuf" / "trusted" / "root_history" / "3.root.json").exists()
        run(edge_coordinator, "releases", "verify", "--home", home)

        coordinator = refuse_a_stranger(mosquitto, coordinator, device, until)
    finally:
        device.stop()
        coordinator.close()


def refuse_a_stranger(mosquitto, coordinator, device, until):
    """Somebody may publish anything, and has no key: what was said before does not count, nor anything new.

    Returns:
        The coordinator that was started meanwhile.
    """
    topic = Topics().desired("default")
    stranger = MqttTransport(mosquitto.host, mosquitto.port, client_id="stranger")
    stranger.subscribe(topic)
    stranger.connect()
    heard = []
    until(coordinator, 2, lambda: heard.extend(stranger.receive()) or heard)
    home = coordinator.registry.home
    coordinator.close()
    transport = MqttTransport(mosquitto.host, mosquitto.port, client_id="coordinator")
    coordinator = Coordinator(home, transport=transport, settings=load_settings(home / "coordinator.toml"))
    coordinator.start()
    until(coordinator, 2, lambda: not device.waits_for(coordinator.desired_revision()))
    said = decode(heard[-1].payload, Desired)
    for payload in (heard[-1].payload, encode(msgspec.structs.replace(said, revision=2**40, revoked=[2]))):
        stranger.publish(topic, payload, retain=True)
    until(coordinator, 2, lambda: device.status().counters.bad_messages == 2)
    until(coordinator, 2, lambda: coordinator.events(name="desired_refused"))
    stranger.close()
    return coordinator
