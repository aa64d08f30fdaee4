"""Orders, revocations and the broker's files, as a person gives them on the command line."""

import json
import shutil
import subprocess

import pytest
from click.testing import CliRunner
from cryptography import x509

from edge_sdk.cli import main as edge
from edge_sdk.commands import verify
from edge_sdk.config import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.identity import renew
from edge_sdk.messages import Envelope as Row
from edge_sdk.messages import Event, Topics, encode, raw
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.authority import Authority
from edge_server.cli import main
from edge_server.coordinator import Coordinator
from edge_server.errors import SigningError
from edge_server.registry import Registry
from edge_server.settings import BrokerSettings, Settings


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go(*arguments, code=0):
        result = CliRunner().invoke(main, [*arguments, "--home", "home"])
        assert result.exit_code == code, result.output
        return result.output

    go("init")
    settings = tmp_path / "home" / "coordinator.toml"
    settings.write_text(settings.read_text().replace("embedded = true", "embedded = false\ntls = true"))
    return go


def test_orders_are_given_listed_and_refused_by_name(run):
    run("devices", "add", "pump-1")
    assert "waits for pump-1" in run("command", "pump-1", "pause-learning", "seconds=60")
    (record,) = json.loads(run("commands", "pump-1", "--json"))
    assert (record["name"], record["args"], record["outcome"]) == ("pause-learning", {"seconds": 60.0}, "waiting")
    assert "pause-learning" in run("commands")
    assert "no command 'fly'" in run("command", "pump-1", "fly", code=2)
    assert "KEY=VALUE" in run("command", "pump-1", "mode", "shadow", code=2)
    assert "no device 'pump-2'" in run("command", "pump-2", "status", code=1)


def test_an_order_to_a_group_is_one_to_each_of_its_devices_that_can_take_it(run):
    for name, group in (("pump-1", "pumps"), ("pump-2", "pumps"), ("pump-3", "pumps"), ("fan-1", "fans")):
        run("devices", "add", name, "--group", group)
    run("devices", "revoke", "pump-3")
    assert "2 devices of pumps are told" in run("command", "--group", "pumps", "mode", "mode=shadow")
    records = json.loads(run("commands", "--json"))
    assert {(r["device"], r["name"]) for r in records} == {("pump-1", "mode"), ("pump-2", "mode")}
    assert len({r["id"] for r in records}) == 2
    assert "no device of group 'valves'" in run("command", "--group", "valves", "status", code=1)
    assert "no command 'fly'" in run("command", "--group", "pumps", "fly", code=2)
    assert "say what to do" in run("command", "pump-1", code=2)
    assert len(json.loads(run("commands", "--json"))) == 2


def test_a_revoked_device_gets_no_orders_and_stands_in_no_file(run, tmp_path):
    for name in ("pump-1", "pump-2"):
        run("devices", "add", name)
    run("command", "pump-1", "status")
    run("devices", "revoke", "pump-1")
    assert "acl, passwords, ca.pem, crl.pem, broker.pem, broker.key" in run(
        "broker-files", "--out", "files", "--host", "localhost"
    )
    rules = (tmp_path / "files" / "acl").read_text()
    written = [line for line in rules.splitlines() if "write edge/d" in line]
    assert written == [f"topic write edge/d/pump-2/up/{kind}" for kind in ("state", "report", "event", "need")]
    assert "pump-1" not in rules + (tmp_path / "files" / "passwords").read_text()
    assert rules.startswith("user coordinator\ntopic readwrite edge/#\n")
    listed = subprocess.run(
        ["openssl", "crl", "-in", tmp_path / "files" / "crl.pem", "-noout", "-text"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert listed.count("Serial Number") == 1
    run("command", "pump-1", "status", code=1)
    assert [record["is_revoked"] for record in json.loads(run("devices", "list", "--json"))] == [True, False]
    run("devices", "revoke", "pump-9", code=1)
    run("devices", "replace", "pump-9", code=1)


def test_of_two_lists_of_revoked_certificates_the_later_has_the_later_date(tmp_path):
    def written(now, *serials):
        path = authority.write_crl([(serial, now) for serial in serials], now)
        return x509.load_pem_x509_crl(path.read_bytes()).last_update_utc.timestamp()

    authority, now, day = Authority(tmp_path / "ca"), 1_767_225_600.0, 86_400.0
    authority.make(now)
    dates = [written(now, "a1"), written(now, "a1", "b2"), written(now - 60, "a1", "b2", "c3")]
    assert dates == [now - day + 1, now - day + 2, now - day + 3], "also when the clock stands, or was set back"
    written(now + 400 * day, "a1")
    assert written(now, "a1") == now - day, "a list from the future would keep everybody out"


def test_a_replaced_device_has_another_password_key_and_certificate(run, tmp_path):
    run("devices", "add", "pump-1")
    run("devices", "replace", "pump-1", "--out", "new.json")
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("pump-1.bundle.json", "new.json"))
    assert before["command_key"] != after["command_key"]
    for key in ("password", "certificate", "key"):
        assert before["broker"][key] != after["broker"][key]
    assert before["broker"]["ca"] == after["broker"]["ca"]
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o600


def test_a_bundle_is_installed_whole_or_not_at_all(run, tmp_path):
    for name in ("pump-1", "pump-2"):
        run("devices", "add", name)
    bundle, other = (json.loads((tmp_path / f"{name}.bundle.json").read_text()) for name in ("pump-1", "pump-2"))

    def enroll(**changes):
        file = tmp_path / "changed.json"
        file.write_text(json.dumps({**bundle, "broker": {**bundle["broker"], **changes}}))
        return CliRunner().invoke(edge, ["enroll", str(file), "--home", str(tmp_path / "device")])

    for wrong in ({"key": other["broker"]["key"]}, {"certificate": "none"}, {"ca": "none"}):
        result = enroll(**wrong)
        assert isinstance(result.exception, ConfigError | SystemExit), result.output
        assert [file for file in (tmp_path / "device").rglob("*") if file.is_file()] == []
    assert enroll().exit_code == 0
    config = load_config(tmp_path / "device" / "device.toml")
    assert config.command_key == bundle["command_key"]
    assert (config.broker.tls, config.broker.cert_file, config.broker.port) == (True, "tls/device.pem", 1883)
    renew(tmp_path / "device", config.broker, bundle["broker"]["certificate"])
    with pytest.raises(ConfigError, match="another key"):
        renew(tmp_path / "device", config.broker, other["broker"]["certificate"])


def test_the_database_alone_gives_no_power_to_command(run, tmp_path):
    run("devices", "add", "pump-1")
    bundle = json.loads((tmp_path / "pump-1.bundle.json").read_text())
    for file in (tmp_path / "home").glob("coordinator.db*"):
        assert bundle["command_key"].encode() not in file.read_bytes()
        assert bytes.fromhex(bundle["command_key"]) not in file.read_bytes()
        assert bundle["broker"]["key"].encode() not in file.read_bytes()


@pytest.mark.parametrize(
    "wrong", [{"embedded": True, "tls": True}, {"tls": True, "renew_days": 400}, {"tls": True, "certificate_days": 0}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"TLS|certificate_days"):
        BrokerSettings(**wrong)


def test_a_command_is_sent_at_once_at_every_birth_and_until_it_is_answered(tmp_path, clock):
    broker = MemoryBroker()
    coordinator = Coordinator(
        tmp_path / "home", transport=MemoryTransport(broker), clock=clock, settings=Settings(durable=False)
    )
    bundle = coordinator.registry.enrol("dev-1", group="g", out=tmp_path / "b.json", actor="test")
    coordinator.start()
    device = MemoryTransport(broker)
    device.subscribe(Topics().down("dev-1", "cmd"))
    device.connect()
    given = coordinator.registry.identities.order("dev-1", "status", expires_s=600, actor="test")

    def commands():
        coordinator.pump()
        key = bytes.fromhex(bundle.command_key)
        return [verify(message.payload, key, device="dev-1").id for message in device.receive()]

    assert commands() == [given.id]
    assert commands() == []
    clock.advance(60)
    assert commands() == [given.id]
    late = Registry(tmp_path / "home", settings=Settings(), clock=clock)  # the command line, meanwhile
    second = late.identities.order("dev-1", "diagnostics", expires_s=60, actor="cli")
    late.close()
    assert commands() == [second.id]
    birth(device, clock)
    assert sorted(commands()) == sorted([given.id, second.id])
    clock.advance(61)
    assert commands() == [given.id]  # the other has expired
    event = Event(name="command_done", release=0, head=0, detail={"id": given.id, "outcome": "done", "result": "{}"})
    row = Row(store_id="s", seq=1, oldest=1, time=clock.now(), kind="event", body=raw(event))
    device.publish(Topics().up("dev-1", "event"), encode(row))
    clock.advance(61)
    commands()
    clock.advance(61)
    assert commands() == []
    outcomes = {record.id: record.outcome for record in coordinator.registry.store.commands.find()}
    assert outcomes == {given.id: "done", second.id: "unanswered"}
    coordinator.close()


def birth(device, clock):
    from edge_sdk.messages import State

    state = State(
        device="dev-1", store_id="s", time=clock.now(), online=True, reason="birth", boot=1, release=0, head=0,
        digest="", group="g", mode="shadow", sdk="0",
    )  # fmt: skip
    device.publish(Topics().up("dev-1", "state"), encode(state), retain=True)


@pytest.mark.parametrize(("what", "file"), [("authority", "ca"), ("commands", "commands.key")])
def test_what_devices_trust_is_never_made_a_second_time_by_itself(run, tmp_path, what, file):
    run("devices", "add", "pump-1")
    lost = tmp_path / "home" / file
    lost.rename(tmp_path / "elsewhere")
    orders = [("devices", "add", "pump-2"), ("devices", "replace", "pump-1", "--out", "new.json")]
    orders += [("serve",), ("broker-files", "--out", "files")] if what == "authority" else []
    for order in orders:
        said = run(*order, code=1)
        assert f"keys start-over {what}" in said
        assert "--keys" in said
    assert not lost.exists()
    assert not (tmp_path / "files").exists()
    (tmp_path / "elsewhere").rename(lost)
    run("devices", "add", "pump-2")
    assert "replace every device" in run("keys", "start-over", what)
    run("devices", "replace", "pump-1", "--out", "new.json")
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("pump-1.bundle.json", "new.json"))
    assert (before["broker"]["ca"] == after["broker"]["ca"]) is (what == "commands")
    assert (lost.with_name(f"{file}.replaced")).exists()


def test_another_authority_than_the_databases_is_refused(run, tmp_path):
    run("devices", "add", "pump-1")
    shutil.rmtree(tmp_path / "home" / "ca")
    Authority(tmp_path / "home" / "ca").make(0.0)
    assert "not what this coordinator's devices trust" in run("broker-files", "--out", "files", code=1)


def test_without_its_secret_of_commands_a_coordinator_takes_in_reports_and_says_so_once(tmp_path, clock, caplog):
    broker = MemoryBroker()
    options = {"clock": clock, "settings": Settings(durable=False)}
    coordinator = Coordinator(tmp_path / "home", transport=MemoryTransport(broker), **options)
    coordinator.registry.enrol("dev-1", group="g", out=tmp_path / "b.json", actor="test")
    coordinator.registry.identities.order("dev-1", "status", expires_s=600, actor="test")
    coordinator.close()
    (tmp_path / "home" / "commands.key").unlink()
    coordinator = Coordinator(tmp_path / "home", transport=MemoryTransport(broker), **options)
    coordinator.start()
    device = MemoryTransport(broker)
    device.connect()
    for _ in range(3):
        birth(device, clock)
        coordinator.pump()
    assert coordinator.registry.device("dev-1").online
    assert [r.message for r in caplog.records if "no command can be given" in r.message][1:] == []
    assert "commands.key is missing" in caplog.text
    with pytest.raises(SigningError):
        coordinator.registry.identities.order("dev-1", "status", expires_s=600, actor="test")
    coordinator.close()
