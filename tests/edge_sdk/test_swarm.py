"""Many connections behind one selector, against two real brokers and through a faulty network."""

import random
import resource
import socket
import threading
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.checks import check_transport
from edge_sdk.errors import NotConnectedError, TransportError
from edge_sdk.faults import FaultProxy
from edge_sdk.line import Line
from edge_sdk.messages import MAX_MESSAGE_BYTES
from edge_sdk.swarm import Swarm
from edge_sdk.transport import Message, allow_connections
from edge_server.broker import EmbeddedBroker

DEADLINE_S = 20
ACCEPTED = bytes([0x20, 3, 0, 0, 0])


@pytest.fixture
def make():
    """Makes swarms; closes them in the end and sees that neither thread nor open file is left."""
    swarms = []
    before = psutil.Process().num_fds()

    def new(broker, **options):
        options.setdefault("retry_s", (0.05, 1.0))
        swarms.append(Swarm(broker.host, broker.port, **options))
        return swarms[-1]

    yield new
    for swarm in swarms:
        swarm.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "edge-swarm"]
    assert psutil.Process().num_fds() <= before


class SilentBroker:
    """Takes connections and says nothing, or says yes and reads nothing more."""

    host = "127.0.0.1"

    def __init__(self, answer=b""):
        self._answer = answer
        self._listener = socket.create_server((self.host, 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self.lines = []

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        for line in [*self.lines, self._listener]:
            line.close()

    def accept(self):
        try:
            while True:
                line, _ = self._listener.accept()
                self.lines.append(line)
                line.sendall(self._answer)
        except BlockingIOError:
            return len(self.lines)


def until(swarm, condition):
    assert swarm.until(condition, DEADLINE_S), f"not within {DEADLINE_S} s; last error: {swarm.last_error}"


def connected(transport, will=None):
    before = transport.connections
    transport.connect(will)
    until(transport._swarm, lambda: transport.connections > before)
    return transport


def receive(transport, count):
    messages = []
    until(transport._swarm, lambda: messages.extend(transport.receive()) or len(messages) >= count)
    return messages


def cut(transport):
    """Break the line without a word, as a lost network does."""
    transport.line._socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("thread", [False, True], ids=["turned by its user", "on a thread"])
def test_contract_with_the_embedded_broker(make, thread):
    with EmbeddedBroker() as broker:

        def restart():
            broker.stop()
            broker.start()

        swarm = make(broker)
        if thread:
            swarm.start()
        check_transport(swarm.transport, settle=lambda transport: transport.wait(0.1), restart=restart, cut=cut)


@pytest.mark.mosquitto
@pytest.mark.parametrize("thread", [False, True], ids=["turned by its user", "on a thread"])
def test_contract_with_mosquitto(make, mosquitto, thread):
    def restart():
        mosquitto.kill()
        mosquitto.start()

    swarm = make(mosquitto)
    if thread:
        swarm.start()
    check_transport(swarm.transport, settle=lambda transport: transport.wait(0.1), restart=restart, cut=cut)


def test_more_devices_than_threads_could_serve_each_get_what_is_theirs(make, embedded_broker):
    swarm = make(embedded_broker)
    devices = {f"device-{i}": swarm.transport(f"device-{i}") for i in range(400)}
    for name, device in devices.items():
        device.subscribe(f"dn/{name}")
        device.connect()
    coordinator = swarm.transport("coordinator")
    coordinator.subscribe("up/+")
    coordinator.connect()
    until(swarm, lambda: swarm.connected == 401)

    for name, device in devices.items():
        device.publish(f"up/{name}", name.encode())
    asked = receive(coordinator, 400)
    assert sorted(message.payload.decode() for message in asked) == sorted(devices)
    for message in asked:
        coordinator.publish(f"dn/{message.payload.decode()}", message.payload)
    for name, device in devices.items():
        assert receive(device, 1) == [Message(f"dn/{name}", name.encode())]
    until(swarm, lambda: swarm.unacknowledged == 0)
    assert all(device.connections == 1 and device.last_error is None for device in devices.values())


def test_connecting_without_a_broker_neither_blocks_nor_raises_and_succeeds_later(make):
    broker = EmbeddedBroker()
    swarm = make(broker)
    transport = swarm.transport("device")
    transport.connect()
    until(swarm, lambda: transport.last_error)
    assert "cannot reach the broker" in transport.last_error
    assert "refused" in transport.last_error
    assert swarm.last_error == transport.last_error
    with pytest.raises(NotConnectedError):
        transport.publish("t", b"")
    with broker:
        until(swarm, lambda: transport.connected)
        assert transport.last_error is None
        assert swarm.last_error is None


@pytest.mark.mosquitto
@pytest.mark.parametrize("mosquitto", [{"edge": "secret"}], indirect=True)
def test_a_wrong_password_is_told_and_the_right_one_works(make, mosquitto):
    swarm = make(mosquitto)
    wrong = swarm.transport("device", username="edge", password="guess")
    wrong.connect()
    until(swarm, lambda: wrong.last_error)
    assert "Not authorized" in wrong.last_error
    right = connected(swarm.transport("other", username="edge", password="secret"))
    assert right.last_error is None


def test_a_name_that_nobody_knows_is_told(make, monkeypatch):
    def unknown(*_args, **_options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    swarm = make(EmbeddedBroker())
    transport = swarm.transport("device")
    transport.connect()
    until(swarm, lambda: transport.last_error)
    assert "not known" in transport.last_error


def test_no_more_connections_come_about_at_a_time_than_asked(make, monkeypatch):
    with SilentBroker() as broker:
        swarm = make(broker, max_connecting=3)
        transports = [swarm.transport(f"device-{i}") for i in range(10)]
        for transport in transports:
            transport.connect()
        until(swarm, lambda: broker.accept() == 3)
        for _ in range(10):
            swarm.turn(0.01)
        assert broker.accept() == 3
        monkeypatch.setattr("edge_sdk.swarm._HANDSHAKE_S", 0.01)
        until(swarm, lambda: broker.accept() >= 10)
        assert "does not answer" in transports[0].last_error


def test_a_line_through_which_nothing_passes_any_more_is_found_out_and_replaced(make, embedded_broker):
    with FaultProxy((embedded_broker.host, embedded_broker.port)) as proxy:
        swarm = make(proxy, keepalive_s=1)
        transport = connected(swarm.transport("silenced"))
        assert proxy.half_open() == 1
        until(swarm, lambda: transport.connections == 2)


def test_what_was_under_way_when_the_line_broke_is_not_sent_again(make, embedded_broker):
    reader = make(embedded_broker).transport("reader")
    reader.subscribe("under-way")
    connected(reader)
    with FaultProxy((embedded_broker.host, embedded_broker.port)) as proxy:
        swarm = make(proxy)
        transport = connected(swarm.transport("sender"))
        proxy.partition()
        for i in range(30):  # more than paho has under way at a time
            transport.publish("under-way", bytes([i]))
        assert transport.unacknowledged == 30
        proxy.cut()
        proxy.heal()
        until(swarm, lambda: transport.connections == 2)
        assert transport.unacknowledged == 0
        transport.publish("under-way", b"after")
        assert receive(reader, 1) == [Message("under-way", b"after")]
        until(swarm, lambda: transport.unacknowledged == 0)


def test_a_broker_that_stops_reading_blocks_neither_publish_nor_close(make, monkeypatch):
    monkeypatch.setattr("edge_sdk.swarm._CLOSE_S", 0.2)
    with SilentBroker(ACCEPTED) as broker:
        swarm = make(broker)
        transport = swarm.transport("device")
        transport.connect()
        until(swarm, lambda: broker.accept() and transport.connected)
        for _ in range(50):
            transport.publish("t", bytes(MAX_MESSAGE_BYTES))
        swarm.turn()
        assert transport.unacknowledged == 50
        transport.close()
        assert not transport.connected
        with pytest.raises(NotConnectedError):
            transport.publish("t", b"")


def test_what_does_not_fit_into_the_socket_at_once_arrives_whole(make, embedded_broker):
    swarm = make(embedded_broker)
    transport = swarm.transport("device")
    transport.subscribe("large")
    connected(transport)
    payloads = [bytes([i]) * MAX_MESSAGE_BYTES for i in range(60)]
    for payload in payloads:
        transport.publish("large", payload)
    assert [message.payload for message in receive(transport, 60)] == payloads


@pytest.mark.parametrize(
    "bytes_",
    [b"HTTP/1.1 400 Bad Request", bytes([0x20, 3, 0, 0, 255]), bytes([0x20, 2, 0, 0]), bytes([0x20, 0]),
     bytes([0xFF] * 9), bytes([*ACCEPTED, 0x30, 4, 0, 200, 65, 66]), bytes([*ACCEPTED, 0x90, 0]),
     bytes([*ACCEPTED, 0x40, 1, 0])],
)  # fmt: skip
def test_a_broker_that_speaks_nonsense_costs_a_line_and_not_the_swarm(make, embedded_broker, monkeypatch, bytes_):
    monkeypatch.setattr("edge_sdk.swarm._HANDSHAKE_S", 1.0)  # some of it is the beginning of a packet
    with SilentBroker(bytes_) as nonsense:
        swarm = make(nonsense)
        transport = swarm.transport("device")
        transport.connect()
        until(swarm, lambda: nonsense.accept() and transport.last_error)
        assert not transport.connected
        swarm.host, swarm.port, swarm._resolved_at = embedded_broker.host, embedded_broker.port, -1e9
        until(swarm, lambda: transport.connected)


@pytest.mark.mosquitto
def test_closing_a_swarm_says_goodbye_for_all_after_what_they_sent(make, mosquitto):
    reader = make(mosquitto).transport("reader")
    reader.subscribe("last/#")
    connected(reader)
    swarm = make(mosquitto)
    for i in range(50):
        swarm.transport(f"device-{i}").connect(Message(f"last/{i}", b"will"))
    until(swarm, lambda: swarm.connected == 50)
    for i, transport in enumerate(sorted(swarm._members, key=lambda member: member.client_id)):
        transport.publish(f"last/{i}", b"words")
    swarm.close()
    assert swarm.connected == 0
    reader.publish("last/marker", b"words")
    assert {message.payload for message in receive(reader, 51)} == {b"words"}


def test_a_closed_swarm_takes_nobody(make, embedded_broker):
    swarm = make(embedded_broker)
    early = swarm.transport("early")
    swarm.close()
    swarm.close()
    for join in (lambda: swarm.transport("late"), early.connect):
        with pytest.raises(TransportError, match="closed"):
            join()
    assert swarm.turn() == 0


def test_a_closed_transport_can_connect_again(make, embedded_broker):
    transport = make(embedded_broker).transport("device")
    for _ in range(3):
        connected(transport)
        transport.close()
        transport.close()
    assert transport.connections == 3


@pytest.mark.mosquitto
def test_a_full_inbox_drops_counts_and_recovers_what_is_retained(make, mosquitto, caplog):
    swarm = make(mosquitto, max_inbox=3)
    sender, reader = connected(swarm.transport("sender")), swarm.transport("reader")
    reader.subscribe("t/#")
    connected(reader)
    for i in range(5):
        sender.publish(f"t/{i}", b"x", retain=i == 4)
    until(swarm, lambda: reader.dropped == 2)
    assert caplog.text.count("inbox is full") == 1
    assert [message.topic for message in reader.receive()] == ["t/0", "t/1", "t/2"]
    assert receive(reader, 1) == [Message("t/4", b"x", retain=True)]


def test_threads_may_publish_while_the_swarm_runs_on_another(make, embedded_broker):
    with make(embedded_broker) as swarm:
        reader = swarm.transport("reader")
        reader.subscribe("threads")
        connected(reader)
        senders = [connected(swarm.transport(f"sender-{i}")) for i in range(4)]

        def publish(sender):
            for _ in range(100):
                sender.publish("threads", b"x")

        threads = [threading.Thread(target=publish, args=(sender,)) for sender in senders]
        for thread in threads:
            thread.start()
        assert len(receive(reader, 400)) == 400
        for thread in threads:
            thread.join(DEADLINE_S)
        until(swarm, lambda: swarm.unacknowledged == 0)


def test_a_swarm_on_a_thread_tells_when_all_is_acknowledged(make, embedded_broker):
    with make(embedded_broker) as swarm:
        transport = connected(swarm.transport("acknowledged"))
        begin = time.monotonic()
        for i in range(100):
            transport.publish("acknowledged", bytes([i]))
        until(swarm, lambda: swarm.unacknowledged == 0)
        assert time.monotonic() - begin < DEADLINE_S / 2  # the last look of all, at the time limit, would see it too


def test_wait_returns_on_a_message_a_change_or_the_time_limit(make, embedded_broker):
    transport = make(embedded_broker).transport("waiter")
    assert not transport.wait(0.01)
    transport.subscribe("wait/swarm")
    connected(transport)
    transport.wait(0)  # takes note of the connection
    assert not transport.wait(0.05)
    transport.publish("wait/swarm", b"x")
    assert transport.wait(DEADLINE_S)
    assert transport.receive() == [Message("wait/swarm", b"x")]
    assert not transport.wait(0.05)
    transport.close()
    assert transport.wait(DEADLINE_S)


def test_bytes_are_counted_over_all_connections(make, embedded_broker):
    transport = make(embedded_broker).transport("counted")
    connected(transport)
    once = transport.bytes_sent
    assert once > 0
    assert transport.bytes_received > 0
    transport.close()
    connected(transport)
    assert transport.bytes_sent > 2 * once  # a goodbye as well


def test_pauses_grow_at_random_up_to_a_limit(make):
    swarm = make(EmbeddedBroker(), retry_s=(0.5, 60.0), rng=random.Random(1))
    transport = swarm.transport("device")
    transport.is_open = True
    pauses = []
    for _ in range(200):
        before = time.monotonic()
        swarm._fail(transport, "no")
        pauses.append(max(swarm._retries)[0] - before)
        swarm._retries.clear()
    assert all(0.25 * 2**i <= pauses[i] <= 0.5 * 2**i + 1 for i in range(6))
    assert all(30 <= pause <= 61 for pause in pauses[7:])
    assert len(set(pauses)) == 200


@pytest.mark.parametrize(
    "wrong",
    [{"host": ""}, {"port": 0}, {"port": 70_000}, {"keepalive_s": 0}, {"max_inbox": 0}, {"max_connecting": 0},
     {"retry_s": (0.0, 1.0)}, {"retry_s": (2.0, 1.0)}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong):
    arguments = {"host": "127.0.0.1", "port": 1883, **wrong}
    with pytest.raises(ValueError, match=r"at least 1|from 1 to 65535|0 < first"):
        Swarm(arguments.pop("host"), arguments.pop("port"), **arguments)


def test_a_client_without_a_name_is_refused(make):
    with pytest.raises(ValueError, match="client_id"):
        make(EmbeddedBroker()).transport("")


@pytest.mark.parametrize(("limits", "becomes"), [((1024, 20_000), (20_000, 20_000)), ((20_000, 20_000), None)])
def test_the_soft_limit_of_open_files_is_raised_when_it_must_be(monkeypatch, limits, becomes):
    limited = []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _what, values: limited.append(values))
    allow_connections(10_000)
    assert limited == ([becomes] if becomes else [])


def test_more_connections_than_the_hard_limit_allows_are_refused_with_what_to_do(make, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 4096))
    with pytest.raises(TransportError, match=r"10000 connections need 10256 .* 4096 at most: raise .*LimitNOFILE"):
        allow_connections(10_000)


@given(st.binary(min_size=1, max_size=2_000), st.lists(st.integers(1, 700)))
def test_a_line_gives_out_exactly_what_came_in_whatever_sizes_are_asked_for(data, sizes):
    class NoSelector:
        def register(self, *_args): ...
        def unregister(self, *_args): ...

    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        far.sendall(data)
        far.close()
        line, taken, sizes = Line(near, NoSelector(), None), [], [*sizes, *[50] * 60]
        assert not line.is_open or line.bytes_received == 0
        with pytest.raises(BlockingIOError):
            line.recv(1)  # the selector has not spoken yet
        for size in sizes:
            line.may_read = True
            taken.append(line.recv(size))
            assert len(taken[-1]) <= size
        assert b"".join(taken) == data[: sum(sizes)]
        line.close()
