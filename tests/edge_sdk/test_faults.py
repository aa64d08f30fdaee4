"""A network that is slow, loses lines and falls silent, between real clients and real brokers."""

import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.checks import check_transport
from edge_sdk.cli import main
from edge_sdk.errors import NotConnectedError, TransportError
from edge_sdk.faults import FaultProxy, Faults, Pipe
from edge_sdk.mqtt import MqttTransport
from edge_sdk.swarm import Swarm
from edge_sdk.transport import Message

DEADLINE_S = 20
GUIDE = Path(__file__).parents[2] / "docs" / "faults.md"

pushes = st.lists(st.tuples(st.floats(0, 5), st.binary(max_size=5_000)), max_size=20)
networks = st.builds(
    Faults,
    latency_s=st.floats(0, 2),
    jitter_s=st.floats(0, 2),
    loss=st.floats(0, 0.5),
    retransmit_s=st.floats(0, 1),
    bandwidth=st.one_of(st.just(0.0), st.floats(100, 1e6)),
)


@pytest.fixture(autouse=True)
def _nothing_left_behind(embedded_broker):
    before = psutil.Process().num_fds()
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name == "edge-faults"]
    assert psutil.Process().num_fds() <= before


@pytest.fixture
def swarm_through():
    """Makes transports that connect through a proxy, on swarms that are closed in the end."""
    swarms = []

    def new(proxy, name="device", **options):
        swarms.append(Swarm(proxy.host, proxy.port, retry_s=(0.05, 0.2), **options))
        return swarms[-1].transport(name)

    yield new
    for swarm in swarms:
        swarm.close()


@pytest.fixture
def echo():
    """A server that sends back what it gets, and ends when its client does; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(line,), daemon=True).start()

        def answer(line):
            with line:
                try:
                    while data := line.recv(65_536):
                        line.sendall(data)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(DEADLINE_S)


def to(broker, **options):
    return FaultProxy((broker.host, broker.port), **options)


def until(transport, condition):
    assert transport._swarm.until(condition, DEADLINE_S), f"last error: {transport.last_error}"


def connected(transport, will=None):
    before = transport.connections
    transport.connect(will)
    until(transport, lambda: transport.connections > before)
    return transport


def receive(transport, count):
    messages = []
    until(transport, lambda: messages.extend(transport.receive()) or len(messages) >= count)
    return messages


def through(proxy, data):
    """What comes back of the data, and after how long."""
    begin = time.monotonic()
    with closing(socket.create_connection((proxy.host, proxy.port), timeout=DEADLINE_S)) as line:
        sender = threading.Thread(target=lambda: (line.sendall(data), line.shutdown(socket.SHUT_WR)))
        sender.start()
        back = b"".join(iter(lambda: line.recv(65_536), b""))
        sender.join()
    return back, time.monotonic() - begin


def arrivals(pipe):
    """All that is on its way, with its times."""
    found = []
    while pipe.due < float("inf"):
        due = pipe.due
        found += [(due, piece) for piece in pipe.pop(due)]
    return found


# ---- the way of bytes, as pure functions of time and chance


@given(pushes, networks)
def test_bytes_arrive_all_in_order_and_never_early(steps, faults):
    pipe, now, sent = Pipe(random.Random(0)), 0.0, []
    for pause, data in steps:
        now += pause
        pipe.push(data, now, faults)
        sent += [(now, byte) for byte in data]
    pipe.push(None, now, faults)
    assert pipe.held_bytes == len(sent)
    found = arrivals(pipe)
    assert found[-1][1] is None
    assert pipe.held_bytes == 0
    times = [due for due, _ in found]
    assert times == sorted(times)
    got = [(due, byte) for due, piece in found for byte in piece or b""]
    assert [byte for _, byte in got] == [byte for _, byte in sent]
    assert all(due >= then + faults.latency_s for (due, _), (then, _) in zip(got, sent, strict=True))


@given(pushes, networks, st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_fate(steps, faults, seed):
    def run():
        pipe, now = Pipe(random.Random(seed)), 0.0
        for pause, data in steps:
            now += pause
            pipe.push(data, now, faults)
        return arrivals(pipe)

    assert run() == run()


@given(pushes, st.floats(100, 1e6))
def test_no_more_passes_than_the_bandwidth(steps, bandwidth):
    pipe, now, first = Pipe(random.Random(0)), 0.0, None
    for pause, data in steps:
        now += pause
        first = now if first is None else first
        pipe.push(data, now, Faults(bandwidth=bandwidth))
    total = 0
    for due, piece in arrivals(pipe):
        total += len(piece)
        assert total <= bandwidth * (due - first) * (1 + 1e-9) + 1e-6


def test_what_is_lost_comes_after_retransmissions_that_take_twice_as_long_each_time():
    faults, late = Faults(loss=0.3, retransmit_s=0.2), {}
    pipe = Pipe(random.Random(0))
    for i in range(10_000):
        pipe.push(b"x", i * 1_000.0, faults)
        due = pipe.due - i * 1_000.0
        pipe.pop(pipe.due)
        late[round(due, 6)] = late.get(round(due, 6), 0) + 1
    assert set(late) <= {0.0, 0.2, 0.6, 1.4, 3.0, 6.2, 12.6, 25.4}
    assert late[0.0] / 10_000 == pytest.approx(0.7, abs=0.02)
    assert late[0.2] / 10_000 == pytest.approx(0.21, abs=0.02)


def test_a_better_network_lets_nothing_overtake():
    pipe = Pipe(random.Random(0))
    pipe.push(b"slow", 0.0, Faults(latency_s=2.0))
    pipe.push(b"fast", 1.0, Faults())
    pipe.push(None, 1.0, Faults())
    assert arrivals(pipe) == [(2.0, b"slow"), (2.0, b"fast"), (2.0, None)]


@given(st.floats(0.1, 100), st.floats(0.01, 0.99), st.integers(0, 1_000))
def test_partitions_come_on_schedule_at_the_end_of_each_interval(every, share, number):
    faults = Faults(partition_every_s=every, partition_s=every * share)
    calm, cut_off = (number + (1 - share) / 2) * every, (number + 1 - share / 2) * every
    assert not faults.partitioned(calm)
    assert faults.partitioned(cut_off)
    assert calm + faults.next_change(calm) == pytest.approx((number + 1 - share) * every)
    assert cut_off + faults.next_change(cut_off) == pytest.approx((number + 1) * every)


def test_without_a_schedule_there_are_no_partitions():
    assert not Faults().partitioned(5.0)
    assert Faults().next_change(5.0) == float("inf")


@pytest.mark.parametrize(
    "wrong",
    [{"latency_s": -1.0}, {"jitter_s": float("nan")}, {"loss": 1.0}, {"loss": -0.1}, {"half_open": 1.1},
     {"refuse": 2.0}, {"bandwidth": float("inf")}, {"partition_s": 1.0}, {"life_s": -1.0}],
)  # fmt: skip
def test_faults_that_cannot_be_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Faults(**wrong)


# ---- a line through it


def test_a_perfect_network_changes_nothing(echo):
    data = random.Random(0).randbytes(3_000_000)
    with FaultProxy(echo) as proxy:
        assert through(proxy, data)[0] == data
        assert proxy.connections == 0  # both ends said goodbye


def test_a_bad_network_takes_its_time_and_loses_nothing(echo):
    data = random.Random(0).randbytes(10_000)
    with FaultProxy(echo, faults=Faults(latency_s=0.1, jitter_s=0.05, bandwidth=50_000, loss=0.05)) as proxy:
        back, took = through(proxy, data)
    assert back == data
    assert took >= 0.4  # twice 0.1 s on its way, twice 0.2 s through the narrow line, side by side


def test_as_many_lines_as_come_are_kept_apart(echo):
    with FaultProxy(echo, faults=Faults(jitter_s=0.05)) as proxy:
        lines = [socket.create_connection((proxy.host, proxy.port), timeout=DEADLINE_S) for _ in range(50)]
        for i, line in enumerate(lines):
            line.sendall(b"%03d" % i)
        got = [line.recv(3) for line in lines]
        assert proxy.connections == proxy.accepted == 50
        for line in lines:
            line.close()
    assert got == [b"%03d" % i for i in range(50)]


def test_a_line_that_breaks_at_one_end_breaks_at_the_other(echo):
    with FaultProxy(echo) as proxy, closing(socket.create_connection((proxy.host, proxy.port))) as line:
        line.settimeout(DEADLINE_S)
        line.sendall(b"x")
        assert line.recv(1) == b"x"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            line.recv(1)
        assert proxy.connections == 0


def test_without_a_broker_behind_it_a_line_is_reset(swarm_through):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    with FaultProxy(address) as proxy, closing(socket.create_connection((proxy.host, proxy.port))) as line:
        line.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionResetError):
            line.recv(1)


def test_an_address_that_is_taken_or_unknown_is_an_error_that_names_it(echo):
    with closing(FaultProxy(echo, listen=echo)) as proxy, pytest.raises(TransportError, match=r"cannot listen on 127"):
        proxy.start()
    with closing(FaultProxy(("a..b", 1883))) as proxy, pytest.raises(TransportError, match=r"a\.\.b:1883 is not known"):
        proxy.start()


# ---- MQTT through it


@pytest.mark.parametrize("faults", [Faults(), Faults(latency_s=0.02, jitter_s=0.02)], ids=["perfect", "slow"])
def test_a_transport_keeps_its_contract_through_it(embedded_broker, faults, monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_FIRST_S", 0.05)
    with to(embedded_broker, faults=faults) as proxy:
        check_transport(
            lambda name: MqttTransport(proxy.host, proxy.port, client_id=name),
            settle=lambda transport: transport.wait(0.1 + 4 * faults.latency_s),
            cut=lambda transport: transport._client.socket().shutdown(socket.SHUT_RDWR),
            prefix=f"faults-{faults.latency_s}",
        )


def test_latency_counts_both_ways(embedded_broker, swarm_through):
    with to(embedded_broker) as proxy:
        transport = swarm_through(proxy)
        transport.subscribe("latency")
        connected(transport)
        proxy.set(Faults(latency_s=0.2))
        begin = time.monotonic()
        transport.publish("latency", b"x")
        receive(transport, 1)
        assert time.monotonic() - begin >= 0.4


def test_a_partition_holds_everything_back_and_heals(embedded_broker, swarm_through):
    with to(embedded_broker) as proxy:
        transport, late = swarm_through(proxy), swarm_through(proxy, "late")
        transport.subscribe("partition")
        connected(transport)
        proxy.partition()
        transport.publish("partition", b"x")
        late.connect()
        assert not transport._swarm.until(lambda: transport.receive() or not transport.unacknowledged, 0.2)
        assert not late._swarm.until(lambda: late.connected, 0.1)
        assert transport.connected
        assert proxy.accepted == 1
        proxy.heal()
        assert receive(transport, 1) == [Message("partition", b"x")]
        until(late, lambda: late.connected)
        assert transport.connections == 1


def test_partitions_on_schedule_end_by_themselves(embedded_broker, swarm_through):
    with to(embedded_broker, faults=Faults(partition_every_s=0.2, partition_s=0.15)) as proxy:
        transport = swarm_through(proxy)
        transport.subscribe("schedule")
        connected(transport)
        for i in range(20):
            transport.publish("schedule", bytes([i]))
            assert receive(transport, 1) == [Message("schedule", bytes([i]))]
        assert transport.connections == 1


def test_a_device_reconnects_after_a_cut(embedded_broker, swarm_through):
    with to(embedded_broker) as proxy:
        transport = connected(swarm_through(proxy))
        proxy.cut()
        until(transport, lambda: transport.connections == 2)


def test_nothing_dies_aloud_in_a_partition(echo):
    with (
        FaultProxy(echo, faults=Faults(life_s=1.0)) as proxy,  # by this seed it would end after 0.97 s
        closing(socket.create_connection((proxy.host, proxy.port), timeout=1.5)) as line,
    ):
        line.sendall(b"x")
        assert line.recv(1) == b"x"
        proxy.partition()
        line.sendall(b"x")
        with pytest.raises(TimeoutError):
            line.recv(1)
        proxy.heal()
        line.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionResetError):
            line.recv(2)


@pytest.mark.mosquitto
def test_a_half_open_line_looks_alive_to_both_ends_until_a_keepalive_finds_out(mosquitto, swarm_through):
    with to(mosquitto) as proxy:
        watcher = swarm_through(mosquitto, "watcher")
        watcher.subscribe("state")
        connected(watcher)
        device = connected(swarm_through(proxy, keepalive_s=1), Message("state", b"lost"))
        assert proxy.half_open() == 1
        device.publish("state", b"never")  # taken, as far as the device knows
        device._swarm.close()  # and its goodbye is not heard either
        assert proxy.connections == 1
        assert receive(watcher, 1) == [Message("state", b"lost")]


def test_lives_end_by_chance_and_devices_come_back(embedded_broker, swarm_through):
    with to(embedded_broker, faults=Faults(life_s=0.05), seed=3) as proxy:
        transport = swarm_through(proxy)
        transport.connect()
        until(transport, lambda: transport.connections >= 5)
        proxy.set(Faults())
        last = transport.connections
        until(transport, lambda: transport.connections > last)  # the last mortal line has ended
        assert proxy.accepted >= 6


def test_refused_connections_are_tried_again(embedded_broker, swarm_through):
    with to(embedded_broker, faults=Faults(refuse=1.0)) as proxy:
        transport = swarm_through(proxy)
        transport.connect()
        until(transport, lambda: proxy.accepted >= 3)
        assert not transport.connected
        with pytest.raises(NotConnectedError):
            transport.publish("t", b"")
        proxy.set(Faults())
        until(transport, lambda: transport.connected)


def test_the_guide_names_every_fault_and_option():
    guide = GUIDE.read_text()
    for option in main.commands["faults"].params:
        assert option.opts[0] in guide
    for field in Faults.__struct_fields__:
        assert f"`{field}`" in guide


def test_what_the_guide_shows_runs(embedded_broker):
    block = textwrap.dedent(GUIDE.read_text().split("## In tests")[1].split("The proxy runs")[0])
    names = {}
    exec(block.replace("1883", str(embedded_broker.port)), names)
    names["transport"].close()
    assert names["proxy"].faults.refuse == 0.5


def test_which_connections_are_refused_depends_on_the_seed_alone(echo):
    def fates(seed):
        with FaultProxy(echo, faults=Faults(refuse=0.5), seed=seed) as proxy:
            return [answers(proxy) for _ in range(30)]

    def answers(proxy):
        try:
            with closing(socket.create_connection((proxy.host, proxy.port), timeout=DEADLINE_S)) as line:
                line.sendall(b"x")
                return line.recv(1) == b"x"
        except ConnectionError:
            return False

    first = fates(1)
    assert first == fates(1)
    assert first != fates(2)
    assert {True, False} == set(first)


# ---- the command


def test_the_command_runs_until_it_is_told_to_stop(echo):
    edge, broker = Path(sys.executable).with_name("edge"), f"{echo[0]}:{echo[1]}"
    process = subprocess.Popen(
        [edge, "faults", "--to", broker, "--latency", "0.1", "--seed", "1"], stderr=subprocess.PIPE, text=True
    )
    with process:
        said = re.match(rf"127\.0\.0\.1:(\d+) leads to {broker}; stop with SIGTERM", process.stderr.readline())
        back, took = through(SimpleNamespace(host="127.0.0.1", port=int(said[1])), b"x")
        assert back == b"x"
        assert took >= 0.2
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--to", "nowhere"], "HOST:PORT"), (["--to", "h:99999"], "HOST:PORT"), ([], "--to"),
     (["--to", "h:1", "--loss", "1.5"], "loss is a share below 1"), (["--to", "h:1", "--loss", "much"], "--loss")],
)  # fmt: skip
def test_the_command_says_what_is_wrong_with_its_options(arguments, says):
    result = CliRunner().invoke(main, ["faults", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_the_command_has_an_option_for_each_fault():
    assert set(Faults.__struct_fields__) <= {option.name for option in main.commands["faults"].params}
