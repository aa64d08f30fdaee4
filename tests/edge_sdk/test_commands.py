"""Commands: from whom, what, and once."""

import json

import msgspec
import pytest

from edge_sdk.commands import COMMANDS, Desk, check_order, sign, verify
from edge_sdk.config import DeviceConfig, ReportConfig
from edge_sdk.errors import DiskFullError, ModelError, ProtocolError, StoreError
from edge_sdk.messages import Command, Envelope, Event, Order, Topics, decode, encode, unpack
from edge_sdk.store import Store
from edge_sdk.transport import MemoryBroker, MemoryTransport

KEY = bytes(range(32))
NOW = 1_000_000.0


def order(name="adapt-now", *, number=1, device="dev-1", issued=NOW, expires=NOW + 60, **args):
    return Order(id=f"order-{number}", device=device, name=name, issued=issued, expires=expires, args=args)


def payload(key=KEY, **parts):
    return encode(sign(order(**parts), key))


class World:
    def __init__(self, path):
        self.path = path
        self.acts, self.events = [], []
        self.open()

    def open(self):
        self.store = Store(self.path / "edge.db", durability="normal")
        self.desk = Desk(
            self.store, device="dev-1", key=KEY.hex(), emit=lambda name, detail: self.events.append(detail)
        )

    def restart(self):
        self.store.close()
        self.open()

    def turn(self, *payloads, now=NOW, **handlers):
        every = {name: lambda args, name=name: self.acts.append((name, args)) for name in COMMANDS}
        return self.desk.turn(payloads, now, {**every, **{key.replace("_", "-"): do for key, do in handlers.items()}})

    @property
    def outcomes(self):
        return [event["outcome"] for event in self.events]


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.store.close()


# ---- who may order


def test_a_signed_order_is_read():
    assert verify(payload(seconds=5.0, name="pause-learning"), KEY, device="dev-1").args == {"seconds": 5.0}


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (payload(key=bytes(32)), "not signed"),
        (payload(device="dev-2"), "another device"),
        (encode(Command(msgspec.msgpack.encode(order()), b"")), "not signed"),
        (encode(Command(msgspec.msgpack.encode(order()) + b"\0", sign(order(), KEY).mac)), "not signed"),
        (b"\1junk", "not a Command"),
    ],
)
def test_what_the_coordinator_did_not_sign_for_this_device_is_refused_without_a_trace(world, forged, reason):
    with pytest.raises(ProtocolError, match=reason):
        verify(forged, KEY, device="dev-1")
    assert world.turn(forged) == 1
    assert (world.acts, world.events, world.store.get("commands")) == ([], [], None)


def test_a_device_without_a_key_takes_no_command(world):
    desk = Desk(world.store, device="dev-1", key="", emit=lambda *_: pytest.fail("told"))
    assert desk.turn([payload(), encode(sign(order(), b""))], NOW, {}) == 2


# ---- what can be ordered


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fly", {}),
        ("adapt-now", {"extra": 1}),
        ("pause-learning", {"seconds": -1.0}),
        ("report-interval", {}),
        ("report-interval", {"seconds": float(32 * 86_400)}),
        ("mode", {"mode": "wild"}),
        ("renew-certificate", {"certificate": "x" * 20_000}),
    ],
)
def test_wrong_orders_are_refused_by_name(name, args):
    with pytest.raises(ProtocolError, match=name):
        check_order(name, args)


def test_texts_stand_for_numbers_on_a_command_line_only():
    assert check_order("pause-learning", {"seconds": "60"}, strict=False).seconds == 60.0
    with pytest.raises(ProtocolError):
        check_order("pause-learning", {"seconds": "60"})


# ---- once


def test_an_order_is_carried_out_once_however_often_it_comes(world):
    world.turn(payload(), payload())
    world.turn(payload())
    world.restart()
    world.turn(payload())
    assert [name for name, _ in world.acts] == ["adapt-now"]
    assert world.events == [{"id": "order-1", "command": "adapt-now", "outcome": "done", "reason": "", "result": ""}]


def test_a_result_is_told(world):
    world.turn(payload(name="status"), status=lambda _: {"release": 3})
    assert json.loads(world.events[0]["result"]) == {"release": 3}


@pytest.mark.parametrize("error", [ModelError("no release"), RuntimeError("a bug")])
def test_a_failure_is_told_and_not_repeated(world, error):
    def fail(_):
        raise error

    world.turn(payload(), payload(number=2, name="roll-back"), adapt_now=fail)
    world.turn(payload())
    assert world.outcomes == ["failed", "done"]
    assert world.events[0]["reason"] in ("no release", "RuntimeError")


def test_an_order_of_a_later_coordinator_fails_by_name(world):
    world.turn(payload(name="dance"))
    assert world.outcomes == ["failed"]
    assert "no command 'dance'" in world.events[0]["reason"]


def test_an_expired_order_is_told_and_not_carried_out(world):
    world.turn(payload(), now=NOW + 60)
    assert (world.outcomes, world.acts) == (["expired"], [])
    world.turn(payload(), now=NOW)  # the clock is set back
    assert world.acts == []


def test_an_order_during_which_the_device_died_is_not_begun_again(world):
    def die(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.turn(payload(name="roll-back"), roll_back=die)
    world.restart()
    assert world.desk.unfinished
    world.turn()
    world.turn(payload(name="roll-back"))
    assert (world.outcomes, world.acts) == (["interrupted"], [])


def test_an_order_that_cannot_be_remembered_is_carried_out_when_it_comes_again(world, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(world.store, "put", lambda *_: (_ for _ in ()).throw(DiskFullError("full")))
        with pytest.raises(StoreError):
            world.turn(payload())
    assert world.acts == []
    world.turn(payload())
    assert world.outcomes == ["done"]


def test_forgotten_orders_cannot_be_replayed_even_by_a_clock_that_jumps(world):
    for number in range(300):
        world.turn(payload(number=number, issued=NOW + number, expires=NOW + 1e6), now=NOW + number)
    assert len(world.store.get("commands")) < 40_000
    done = len(world.acts)
    for now in (NOW, NOW + 301, NOW - 365 * 86_400):
        world.turn(payload(number=0, issued=NOW, expires=NOW + 1e6), now=now)
    assert (done, len(world.acts)) == (300, 300)


# ---- on a device


@pytest.fixture
def line(make_device, config):
    """A device and what its coordinator hears and says."""
    broker = MemoryBroker()
    ear = MemoryTransport(broker)
    ear.subscribe("edge/d/dev-1/up/event")
    ear.connect()

    def make(**settings):
        device = make_device(
            transport=MemoryTransport(broker),
            config=msgspec.structs.replace(config, command_key=KEY.hex(), report=ReportConfig(min_count=1)),
            **settings,
        )
        device.connect()

        def say(name, number, **args):
            now = device._clock.now()
            what = order(name, number=number, issued=now, expires=now + 60, **args)
            ear.publish(Topics().down("dev-1", "cmd"), encode(sign(what, KEY)))
            device.step()
            device.step()
            envelopes = [decode(message.payload, Envelope) for message in ear.receive()]
            events = [unpack(envelope.body, Event) for envelope in envelopes if envelope.kind == "event"]
            return {event.detail["id"]: event.detail for event in events if event.name == "command_done"}[
                f"order-{number}"
            ]

        return device, say

    return make


@pytest.mark.torch
def test_a_device_does_as_it_is_told(line, digits, clock):
    device, say = line()
    status = json.loads(say("status", 1)["result"])
    assert (status["release"], status["problem"], status["mode"]) == (1, False, "adapt")
    assert json.loads(say("diagnostics", 2)["result"])["boot"] == 1
    assert say("roll-back", 3)["outcome"] == "failed"  # there is nothing to go back to
    say("pause-learning", 4, seconds=3600.0)
    device.learn(digits.life.x[:300], [str(label) for label in digits.life.y[:300]])
    device.learn_now()
    device.step()
    assert device.status().phase == "idle"
    clock.advance(3600)  # the pause is over
    for _ in range(4):
        device.step()
    assert device.status().head == 1
    assert json.loads(say("reset-to-base", 5)["result"]) == {"release": 1, "head": 0}
    assert say("renew-certificate", 6, certificate="none")["outcome"] == "failed"


@pytest.mark.torch
def test_what_was_ordered_until_further_notice_survives_a_restart(line, make_device, config):
    device, say = line()
    say("mode", 1, mode="monitor")
    say("report-interval", 2, seconds=7.0)
    say("pause-learning", 3)
    device.stop()
    same = msgspec.structs.replace(config, command_key=KEY.hex())
    again = make_device(config=same)
    assert (again.mode, again._reporter.standing.interval_s) == ("monitor", 7.0)
    assert again._reporter.learning_paused(again._clock.now())
    again.stop()
    other = make_device(config=msgspec.structs.replace(same, mode="shadow"))
    assert other.mode == "shadow"  # somebody changed the setting


def test_a_key_that_is_none_is_refused_without_being_repeated():
    with pytest.raises(ValueError, match="64 hexadecimal digits") as caught:
        DeviceConfig(command_key="secret")
    assert "secret" not in str(caught.value)
