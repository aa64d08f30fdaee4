"""A fleet behind mosquitto as docs/brokers.md configures it: TLS, certificates of both sides, access by device."""

import getpass
import re
import signal
import ssl
import subprocess
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from socket import create_connection, create_server

import msgspec
import pytest
from click.testing import CliRunner

from edge_sdk import cli
from edge_sdk.clock import ManualClock
from edge_sdk.commands import Desk
from edge_sdk.config import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.identity import renew
from edge_sdk.messages import Ack, Envelope, Event, State, Topics, decode, encode, raw
from edge_sdk.mqtt import MqttTransport, Tls, new_transport
from edge_sdk.plan import prepare
from edge_sdk.simulate import Fleet as SimulatedFleet
from edge_sdk.simulate import FleetTimeoutError
from edge_sdk.store import Store
from edge_sdk.swarm import Swarm
from edge_server.coordinator import Coordinator
from edge_server.registry import Registry
from edge_server.settings import BrokerSettings, Settings

DOCUMENT = (Path(__file__).parents[2] / "docs" / "brokers.md").read_text()
DEADLINE_S = 20
TOPICS = Topics()
pytestmark = [
    pytest.mark.mosquitto,
    # paho leaves a socket whose handshake failed to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_FIRST_S", 0.05)
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_MOST_S", 0.2)


def free_port():
    with closing(create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]


def started(folder, port):
    """A mosquitto by the configuration in a folder, which listens."""
    process = subprocess.Popen(
        ["mosquitto", "-c", folder / "mosquitto.conf"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(1000):
        try:
            create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            threading.Event().wait(0.01)
        else:
            return process
    return pytest.fail("mosquitto did not start")


class Fleet:
    """A coordinator and the broker of its documentation."""

    def __init__(self, folder, port, side):
        self.folder, self.port, self.side = folder, port, side
        self.files = folder / "broker"
        self.settings = Settings(broker=BrokerSettings(host="127.0.0.1", port=port, tls=True))
        registry = Registry(folder / "home", settings=self.settings)
        registry.identities.broker_files(self.files, hosts=["127.0.0.1", "localhost"])
        self.tls = registry.identities.tls()
        registry.close()
        text = re.search(r"```text file=mosquitto.conf\n(.*?)```", DOCUMENT, re.DOTALL)[1]
        for before, after in (
            ("listener 8883", f"listener {port} 127.0.0.1\nuser {getpass.getuser()}\nlog_dest file {folder}/log"),
            ("/etc/mosquitto/edge/", f"{self.files}/"),
            ("/var/lib/mosquitto/", f"{folder}/"),
        ):
            assert before in text
            text = text.replace(before, after)
        # a second door, where one name may come several times: to listen with the coordinator's certificate
        first = text.partition("allow_anonymous")[0].replace("use_username_as_clientid true", "")
        text += re.sub(r"listener .*\n(.*\n){2}", f"listener {side} 127.0.0.1\n", first)
        (folder / "mosquitto.conf").write_text(re.sub(r"^ +", "", text, flags=re.MULTILINE))
        self.process = None
        self.transport = MqttTransport("127.0.0.1", port, client_id="coordinator", tls=self.tls)
        self.coordinator = Coordinator(folder / "home", transport=self.transport, settings=self.settings)
        self.identities = self.coordinator.registry.identities
        self.start()
        self.coordinator.start()
        self.until(lambda: self.transport.connected)

    def start(self):
        self.process = started(self.folder, self.port)

    def reload(self):
        self.identities.broker_files(self.files)
        before = (self.folder / "log").read_text().count("Reloading config")
        self.process.send_signal(signal.SIGHUP)
        self.until(lambda: (self.folder / "log").read_text().count("Reloading config") > before)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def close(self):
        self.coordinator.close()
        self.kill()

    def until(self, condition, *, what=""):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, what or self.transport.last_error
            if self.coordinator.step() == 0:
                self.transport.wait(0.02)

    def add(self, name, *, replace=False):
        bundle = self.folder / f"{name}-{time.monotonic_ns()}.json"
        if replace:
            self.coordinator.registry.replace(name, out=bundle, actor="test")
        else:
            self.coordinator.registry.enrol(name, group="default", out=bundle, actor="test")
        self.reload()
        return Device(self, name, bundle)

    def events(self, device):
        return [event.name for event in self.coordinator.events(device=device)][::-1]


class Device:
    """What `edge enroll` makes of a bundle, and the transport that `edge run` makes of that."""

    def __init__(self, fleet, name, bundle):
        self.fleet, self.name = fleet, name
        self.home = fleet.folder / f"device-{bundle.stem}"
        done = CliRunner().invoke(cli.main, ["enroll", str(bundle), "--home", str(self.home)])
        assert done.exit_code == 0, done.output
        self.config = load_config(self.home / "device.toml")
        self.transport = new_transport(self.config, self.home)
        self.transport.subscribe(TOPICS.down(name, "#"))
        self.inbox, self.seq = [], 0

    def connect(self):
        before = self.transport.connections
        self.transport.connect()
        self.fleet.until(lambda: self.transport.connections > before, what=self.transport.last_error)
        state = State(
            device=self.name, store_id="s", time=time.time(), online=True, reason="birth", boot=1, release=0, head=0,
            digest="", group="default", mode="shadow", sdk="0",
        )  # fmt: skip
        self.transport.publish(TOPICS.up(self.name, "state"), encode(state), retain=True)
        return self

    def tell(self, name, *, device=None, **detail):
        self.seq += 1
        event = Event(name=name, release=0, head=0, detail=detail)
        row = Envelope(store_id="s", seq=self.seq, oldest=self.seq, time=time.time(), kind="event", body=raw(event))
        self.transport.publish(TOPICS.up(device or self.name, "event"), encode(row))

    def receive(self, kind):
        """Payloads on its own topic of that kind so far."""
        self.inbox += self.transport.receive()
        return [message.payload for message in self.inbox if message.topic == TOPICS.down(self.name, kind)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), free_port(), free_port())
    yield fleet
    fleet.close()


@pytest.fixture
def add(fleet):
    """Adds devices; their transports are closed in the end."""
    devices = []

    def add_one(name, **options):
        devices.append(fleet.add(name, **options))
        return devices[-1]

    yield add_one
    for device in devices:
        device.transport.close()


def test_an_enrolled_device_speaks_for_itself_and_for_nobody_else(fleet, add):
    thief, victim = add("thief").connect(), add("victim").connect()
    thief.tell("mine")
    thief.tell("stolen", device="victim")
    victim.tell("also mine")
    fleet.until(lambda: victim.receive("ack") and thief.receive("ack"))
    assert fleet.events("thief") == ["mine"]
    assert fleet.events("victim") == ["also mine"]
    thief.transport.subscribe(TOPICS.down("victim", "#"))
    thief.transport.subscribe("#")
    victim.tell("once more")
    fleet.until(lambda: len(victim.receive("ack")) > 1)
    thief.tell("the end")
    fleet.until(lambda: len(thief.receive("ack")) > 1)
    assert {message.topic for message in thief.inbox} == {TOPICS.down("thief", "ack")}
    thief.transport.publish(TOPICS.desired("default"), b"forged", retain=True)  # taken and dropped by the broker
    thief.transport.publish("edge/d/thief/up/anything", b"stored for ever", retain=True)
    ear = MqttTransport("127.0.0.1", fleet.side, client_id="ear", tls=fleet.tls)
    for topic in (TOPICS.desired("default"), "edge/d/thief/up/anything", TOPICS.desired("other")):
        ear.subscribe(topic)
    ear.connect()
    fleet.until(lambda: ear.connected)
    ear.publish(TOPICS.desired("other"), b"the end")
    heard = []
    fleet.until(lambda: heard.extend(ear.receive()) or heard)
    assert [message.payload for message in heard] == [b"the end"]
    ear.close()


def test_nobody_throws_out_another_by_calling_itself_by_its_name(fleet, add):
    victim, thief = add("sleepless").connect(), add("pusher")
    before = victim.transport.connections, fleet.transport.connections
    for name in ("sleepless", "coordinator"):
        pushing = new_transport(msgspec.structs.replace(thief.config, device=name), thief.home)
        pushing.connect()
        fleet.until(lambda pushing=pushing: pushing.connected)
        pushing.close()
    victim.tell("still here")
    fleet.until(lambda: victim.receive("ack"))
    assert (victim.transport.connections, fleet.transport.connections) == before
    assert victim.transport.connected


def test_what_enrolment_writes_is_for_its_owner_only(fleet, add):
    device = add("private")
    for file in (device.home / "device.toml", *(device.home / "tls").iterdir()):
        assert file.stat().st_mode & 0o077 == 0, file
    assert {file.name for file in (device.home / "tls").iterdir()} == {"ca.pem", "device.pem", "device.key"}
    for file in ("ca.key", "coordinator.key"):
        assert (fleet.folder / "home" / "ca" / file).stat().st_mode & 0o077 == 0
    assert (fleet.folder / "home" / "commands.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("what", ["no certificate", "another authority", "another broker", "no encryption"])
def test_strangers_stay_outside(fleet, add, tmp_path, what):
    ca, other = fleet.files / "ca.pem", Registry(tmp_path / "other", settings=fleet.settings)
    other.identities.broker_files(tmp_path / "files")
    foreign = other.identities.tls()
    other.close()
    tls = {
        "no certificate": Tls(ca),
        "another authority": Tls(ca, foreign.cert_file, foreign.key_file),
        "another broker": foreign,
        "no encryption": None,
    }[what]
    stranger = MqttTransport("127.0.0.1", fleet.port, client_id="stranger", tls=tls)
    stranger.connect()
    fleet.until(lambda: stranger.last_error is not None)
    assert not stranger.connections
    if what == "another broker":
        assert "certificate verify failed" in stranger.last_error
    stranger.close()


def test_a_name_that_is_not_the_brokers_is_noticed(fleet):
    context = fleet.tls.context()
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_coordinators_own_name_is_no_devices(fleet, tmp_path):
    with pytest.raises(ConfigError, match="coordinator itself"):
        fleet.coordinator.registry.enrol("coordinator", group="g", out=tmp_path / "b.json", actor="test")


def test_a_revoked_device_is_cut_off_and_a_replaced_one_comes_back(fleet, add):
    device = add("stolen").connect()
    device.tell("before")
    fleet.until(lambda: fleet.events("stolen") == ["before"])
    fleet.identities.revoke("stolen", actor="test")
    device.tell("at once")  # the broker knows nothing yet
    fleet.until(lambda: fleet.coordinator.registry.fleet().counters.get("revoked_device"))
    fleet.reload()
    device.transport.close()
    device.transport = new_transport(device.config, device.home)
    device.transport.connect()
    fleet.until(lambda: device.transport.last_error is not None)
    assert not device.transport.connections, "a reload is enough"
    old = device.config.command_key
    device.transport.close()
    again = add("stolen", replace=True).connect()
    again.seq = 5
    again.tell("after")
    fleet.until(lambda: fleet.events("stolen") == ["before", "after"])
    assert again.config.command_key != old
    device.transport.connect()
    fleet.until(lambda: device.transport.last_error is not None)
    assert not device.transport.connections
    assert again.transport.connected


def test_on_a_connection_that_is_open_a_revoked_device_can_say_and_read_nothing(fleet, add):
    device = add("lost").connect()
    fleet.identities.revoke("lost", actor="test")
    fleet.reload()
    ear = MqttTransport("127.0.0.1", fleet.side, client_id="ear", tls=fleet.tls)
    ear.subscribe(TOPICS.up("lost", "event"))
    ear.connect()
    fleet.until(lambda: ear.connected)
    assert device.transport.connected, "mosquitto leaves it open"
    device.tell("anything")
    ear.publish(TOPICS.down("lost", "ack"), encode(Ack("s", 1)))
    ear.publish(TOPICS.up("lost", "event"), b"the end")
    heard = []
    fleet.until(lambda: heard.extend(ear.receive()) or heard)
    assert [message.payload for message in heard] == [b"the end"]
    assert device.receive("ack") == []
    ear.close()


def test_commands_wait_for_a_device_that_is_away_and_certificates_are_renewed_by_them(fleet, add, tmp_path):
    device = add("sleeper")
    first = (device.home / "tls" / "device.pem").read_text()
    fleet.identities.order("sleeper", "mode", {"mode": "monitor"}, expires_s=600, actor="test")
    fleet.coordinator.step()
    late = Registry(
        fleet.folder / "home",
        settings=msgspec.structs.replace(
            fleet.settings, broker=msgspec.structs.replace(fleet.settings.broker, renew_days=364.9)
        ),
        clock=ManualClock(time.time() + 43_200),
    )
    assert late.identities.renew() >= 1  # the other tests' devices too
    assert late.identities.renew() == 0  # it is on its way
    late.close()
    device.connect()
    fleet.until(lambda: len(device.receive("cmd")) == 2)
    store = Store(tmp_path / "edge.db", durability="normal")
    desk = Desk(
        store, device="sleeper", key=device.config.command_key, emit=lambda name, detail: device.tell(name, **detail)
    )
    orders = {
        "mode": lambda args: {"mode": args.mode},
        "renew-certificate": lambda args: renew(device.home, device.config.broker, args.certificate),
    }
    assert desk.turn(device.receive("cmd"), time.time(), orders) == 0
    fleet.until(lambda: "sleeper" not in [device for _, device in fleet.identities.waiting()])
    answers = {record.name: record for record in fleet.coordinator.registry.store.commands.find(device="sleeper")}
    assert {name: answer.outcome for name, answer in answers.items()} == {"mode": "done", "renew-certificate": "done"}
    assert answers["mode"].result == '{"mode":"monitor"}'
    assert (device.home / "tls" / "device.pem").read_text() != first
    device.transport._client.socket().shutdown(2)
    fleet.until(lambda: device.transport.connections == 2)  # with the new one
    device.tell("renewed")
    fleet.until(lambda: "renewed" in fleet.events("sleeper"))
    store.close()


def test_a_certificate_for_another_key_changes_nothing(fleet, add):
    device, other = add("keeper"), add("other")
    before = (device.home / "tls" / "device.pem").read_text()
    with pytest.raises(ConfigError, match="another key"):
        renew(device.home, device.config.broker, (other.home / "tls" / "device.pem").read_text())
    assert (device.home / "tls" / "device.pem").read_text() == before
    assert decode(encode(Ack("s", 1)), Ack).seq == 1


def test_a_swarm_talks_encrypted(fleet):
    with Swarm("127.0.0.1", fleet.side, tls=fleet.tls.context()) as swarm:
        transports = [swarm.transport(f"one-{number}") for number in range(5)]
        for transport in transports:
            transport.subscribe(TOPICS.desired("all"))
            transport.connect()
        assert swarm.until(lambda: swarm.connected == 5, DEADLINE_S)
        payload = bytes(range(256)) * 400  # several records of TLS
        for _ in range(20):
            transports[0].publish(TOPICS.desired("all"), payload)
        heard = {transport: [] for transport in transports}
        for transport in transports:
            fleet.until(lambda own=heard[transport], ear=transport: own.extend(ear.receive()) or len(own) == 20)
        assert all(message.payload == payload for own in heard.values() for message in own)


def test_a_swarm_does_not_talk_to_a_broker_that_it_does_not_trust(fleet):
    with Swarm("127.0.0.1", fleet.port, tls=ssl.create_default_context()) as swarm:
        transport = swarm.transport("one")
        transport.connect()
        assert swarm.until(lambda: transport.last_error is not None, DEADLINE_S)
        assert not transport.connected
        assert "CERTIFICATE_VERIFY_FAILED" in transport.last_error


SIMULATED = """
fleet = {{ checkpoint = "{checkpoint}", devices = 3, duration_h = 1, tick_s = 1200 }}
data = {{ source = "digits", labels = ["0", "1", "2", "3"] }}
"""


@pytest.mark.torch
def test_a_simulated_fleet_shows_its_certificate_to_a_broker_that_asks_for_one(tmp_path, checkpoint):
    """The broker of the documentation, but everybody with a certificate may speak of everything."""
    registry = Registry(tmp_path / "home", settings=Settings(broker=BrokerSettings(host="127.0.0.1", tls=True)))
    registry.identities.broker_files(tmp_path / "files", hosts=["127.0.0.1"])
    tls, files, port = registry.identities.tls(), tmp_path / "files", free_port()
    registry.close()
    (tmp_path / "mosquitto.conf").write_text(
        f"log_dest file {tmp_path}/log\nlistener {port} 127.0.0.1\nuser {getpass.getuser()}\n"
        "allow_anonymous true\nrequire_certificate true\n"
        f"cafile {files}/ca.pem\ncertfile {files}/broker.pem\nkeyfile {files}/broker.key\n"
    )
    (tmp_path / "small.toml").write_text(SIMULATED.format(checkpoint=checkpoint))
    url = f"mqtts://127.0.0.1:{port}"
    simulate = partial(CliRunner().invoke, cli.main)
    command = ["simulate", str(tmp_path / "small.toml"), "--quiet", "--events"]
    shown = [f"--ca={tls.ca_file}", f"--cert={tls.cert_file}", f"--key={tls.key_file}"]
    process = started(tmp_path, port)
    try:
        over = simulate([*command, str(tmp_path / "over.jsonl"), "--broker", url, *shown])
        assert over.exit_code == 0, over.output
        nameless = SimulatedFleet(
            prepare(tmp_path / "small.toml"), broker=url, tls=Tls(tls.ca_file), settle_timeout_s=1
        )
        with nameless, pytest.raises(FleetTimeoutError, match="devices still wait for a connection"):
            nameless.run()
    finally:
        process.kill()
        process.wait(10)
    inside = simulate([*command, str(tmp_path / "inside.jsonl"), "--workers", "1"])
    assert inside.exit_code == 0, inside.output
    assert (tmp_path / "over.jsonl").read_bytes() == (tmp_path / "inside.jsonl").read_bytes() != b""
