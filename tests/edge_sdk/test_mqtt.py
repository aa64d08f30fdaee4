"""The transport over MQTT, against two real brokers and against a scripted one for what brokers rarely do."""

import logging
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from edge_sdk.checks import check_transport
from edge_sdk.errors import ConfigError, NotConnectedError, ProtocolError
from edge_sdk.messages import MAX_MESSAGE_BYTES
from edge_sdk.mqtt import MqttTransport, Tls
from edge_sdk.transport import Message
from edge_server.broker import EmbeddedBroker

DEADLINE_S = 20
CONNECT, PUBLISH, SUBSCRIBE, DISCONNECT = 1, 3, 8, 14
ACCEPTED = bytes([0x20, 3, 0, 0, 0])
NOT_AUTHORIZED = bytes([0x20, 3, 0, 0x87, 0])


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_FIRST_S", 0.05)


@pytest.fixture
def make():
    """Makes transports to a broker; closes them in the end and sees that no thread is left."""
    transports = []

    def new(broker, client_id="device", **options):
        transports.append(MqttTransport(broker.host, broker.port, client_id=client_id, **options))
        return transports[-1]

    yield new
    for transport in transports:
        transport.close()
    assert network_threads() == []


def network_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("paho")]


def until(transport, condition):
    """Let the transport work until the condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s; last error: {transport.last_error}"
        transport.wait(0.05)


def connected(transport, will=None):
    before = transport.connections
    transport.connect(will)
    until(transport, lambda: transport.connections > before)
    return transport


def subscribed(transport, topic_filter):
    """Connected, and the broker knows of the subscription: it takes what one client asks in turn."""
    transport.subscribe(topic_filter)
    transport.subscribe("ready")
    connected(transport).publish("ready", b"")
    assert receive(transport, 1) == [Message("ready", b"")]
    return transport


def receive(transport, count, *, probes=True):
    """So many messages; without `probes`, those that `subscribed` sent do not count: a kept session repeats them."""
    messages = []

    def arrived():
        messages.extend(message for message in transport.receive() if message.payload or probes)
        return len(messages) >= count

    until(transport, arrived)
    return messages


def cut(transport):
    """Break the line without a word, as a lost network does."""
    transport._client.socket().shutdown(socket.SHUT_RDWR)


def settle(transport):
    transport.wait(0.1)


class ScriptedBroker:
    """Plays one script for each connection, in turn. A script gets a `Line`, which closes when it returns."""

    host = "127.0.0.1"

    def __init__(self, *scripts):
        self._listener = socket.create_server((self.host, 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.settimeout(DEADLINE_S)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._play, args=(scripts,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exc):
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _play(self, scripts):
        with self._listener:
            for script in scripts:
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(DEADLINE_S)
                    script(Line(connection))


class Line:
    def __init__(self, connection):
        self.send = connection.sendall
        self._file = connection.makefile("rb")

    def read(self):
        """(packet type, body) of the next packet; (0, b"") at the end."""
        head = self._file.read(1)
        if not head:
            return 0, b""
        length = shift = 0
        while True:
            byte = self._file.read(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return head[0] >> 4, self._file.read(length)

    def read_until(self, kind):
        """All packets up to the first of this type, or to the end."""
        packets = [self.read()]
        while packets[-1][0] not in (kind, 0):
            packets.append(self.read())
        return packets


def accept(line):
    assert line.read()[0] == CONNECT
    line.send(ACCEPTED)


def grant(line):
    kind, body = line.read()
    line.send(bytes([0x90, 4, *body[:2], 0, 0x01]))
    return kind


def refuse(line):
    assert line.read()[0] == CONNECT
    line.send(NOT_AUTHORIZED)
    line.read_until(0)


def serve(line):
    accept(line)
    line.read_until(0)


def published_topic(body):
    length = int.from_bytes(body[:2], "big")
    return body[2 : 2 + length].decode()


def test_contract_with_the_embedded_broker():
    with EmbeddedBroker() as broker:

        def restart():
            broker.stop()
            broker.start()

        check_transport(
            lambda name: MqttTransport(broker.host, broker.port, client_id=name),
            settle=settle,
            restart=restart,
            cut=cut,
        )
    assert network_threads() == []


@pytest.mark.mosquitto
def test_contract_with_mosquitto(mosquitto):
    def restart():
        mosquitto.kill()
        mosquitto.start()

    check_transport(
        lambda name: MqttTransport(mosquitto.host, mosquitto.port, client_id=name),
        settle=settle,
        restart=restart,
        cut=cut,
    )
    assert network_threads() == []


def test_connecting_without_a_broker_neither_blocks_nor_raises_and_succeeds_later(make):
    broker = EmbeddedBroker()
    transport = make(broker)
    begin = time.monotonic()
    transport.connect()
    assert time.monotonic() - begin < 1
    until(transport, lambda: transport.last_error)
    assert "cannot reach the broker" in transport.last_error
    assert "refused" in transport.last_error
    assert not transport.connected
    with pytest.raises(NotConnectedError):
        transport.publish("t", b"")
    with pytest.raises(ProtocolError):
        transport.publish("t", bytes(MAX_MESSAGE_BYTES + 1))

    with broker:
        until(transport, lambda: transport.connected)
        assert transport.last_error is None
        transport.close()


@pytest.mark.mosquitto
def test_after_a_killed_broker_birth_and_will_work_again(make, mosquitto):
    watcher = subscribed(make(mosquitto, "watcher"), "state")
    device = connected(make(mosquitto), Message("state", b"lost", retain=True))
    device.publish("state", b"birth 1", retain=True)
    assert receive(watcher, 1) == [Message("state", b"birth 1")]

    mosquitto.kill()
    until(device, lambda: not device.connected)
    assert device.last_error
    with pytest.raises(NotConnectedError):
        device.publish("state", b"never")
    mosquitto.start()
    until(device, lambda: device.connections == 2)
    until(watcher, lambda: watcher.connections == 2)
    device.publish("state", b"birth 2", retain=True)
    until(watcher, lambda: b"birth 2" in [message.payload for message in watcher.receive()])

    cut(device)
    assert receive(watcher, 1) == [Message("state", b"lost")]
    until(device, lambda: device.connections == 3)


def test_nothing_is_delivered_twice_after_a_reconnect(make):
    """Unacknowledged and queued publications of paho do not outlive the connection, nor do they block the next."""
    lost, seen = [], []
    all_handed_over = threading.Event()

    def leave_unanswered(line):
        accept(line)
        lost.extend(published_topic(line.read()[1]) for _ in range(20))
        all_handed_over.wait(DEADLINE_S)

    def count(line):
        accept(line)
        seen.extend(published_topic(line.read()[1]) for _ in range(20))

    with ScriptedBroker(leave_unanswered, count) as broker:
        transport = connected(make(broker))
        for i in range(30):  # paho sends 20 and queues the rest
            transport.publish(f"old/{i}", b"x")
        all_handed_over.set()
        until(transport, lambda: transport.connections == 2)
        for i in range(20):
            transport.publish(f"new/{i}", b"x")
    assert lost == [f"old/{i}" for i in range(20)]
    assert seen == [f"new/{i}" for i in range(20)]


def test_every_connection_starts_clean_and_subscribes_again(make):
    connects, subscribes = [], []

    def record(line):
        connects.append(line.read()[1])
        line.send(ACCEPTED)
        subscribes.append([grant(line), grant(line)])

    with ScriptedBroker(record, record) as broker:
        transport = make(broker)
        for topic_filter in ("a", "b", "gone", "a"):
            transport.subscribe(topic_filter)
        transport.unsubscribe("gone")
        transport.connect()
        until(transport, lambda: transport.connections == 2)
    clean_start = [body[7] & 0x02 for body in connects]
    assert clean_start == [0x02, 0x02]
    assert subscribes == [[SUBSCRIBE, SUBSCRIBE]] * 2


def test_a_connection_counts_only_once_its_subscriptions_are_in_force(make):
    subscribed, go = threading.Event(), threading.Event()

    def hesitate(line):
        accept(line)
        _, body = line.read()
        subscribed.set()
        go.wait(DEADLINE_S)
        line.send(bytes([0x90, 4, *body[:2], 0, 0x01]))
        line.read_until(0)

    with ScriptedBroker(hesitate) as broker:
        transport = make(broker)
        transport.subscribe("orders/#")
        transport.connect()
        assert subscribed.wait(DEADLINE_S)
        assert not transport.connected
        with pytest.raises(NotConnectedError):
            transport.publish("report", b"x")
        go.set()
        until(transport, lambda: transport.connected)
        assert transport.connections == 1
        transport.close()


def test_a_refused_connection_is_visible_logged_once_and_tried_again(make, caplog):
    with ScriptedBroker(refuse, refuse, refuse, serve) as broker, caplog.at_level(logging.INFO):
        transport = make(broker, username="u", password="hunter2")
        transport.connect()
        until(transport, lambda: transport.last_error)
        assert "refused the connection: Not authorized" in transport.last_error
        until(transport, lambda: transport.connected)
        assert transport.connections == 1
        assert transport.last_error is None
        transport.close()
    assert caplog.text.count("refused the connection") == 1
    assert "hunter2" not in caplog.text


@pytest.mark.mosquitto
@pytest.mark.parametrize("mosquitto", [{"edge": "secret"}], indirect=True)
def test_a_wrong_password_is_told_and_the_right_one_works(make, mosquitto):
    wrong = make(mosquitto, username="edge", password="guess")
    wrong.connect()
    until(wrong, lambda: wrong.last_error)
    assert "Not authorized" in wrong.last_error
    assert not wrong.connected

    right = connected(make(mosquitto, "other", username="edge", password="secret"))
    assert right.last_error is None


def test_a_broker_that_answers_wrong_credentials_by_hanging_up(make):
    with EmbeddedBroker(credentials={"edge": 'sec"ret\\'}) as broker:
        wrong = make(broker, username="edge", password="guess")
        wrong.connect()
        until(wrong, lambda: wrong.last_error)
        assert "are the credentials right" in wrong.last_error
        connected(make(broker, "other", username="edge", password='sec"ret\\'))


def test_a_refused_subscription_is_visible(make):
    done = threading.Event()

    def forbid(line):
        accept(line)
        kind, body = line.read()
        assert kind == SUBSCRIBE
        line.send(bytes([0x90, 4, *body[:2], 0, 0x87]))
        done.wait(DEADLINE_S)

    with ScriptedBroker(forbid) as broker:
        transport = connected(make(broker))
        transport.subscribe("forbidden/#")
        until(transport, lambda: transport.last_error)
        assert transport.last_error == "the broker refused a subscription: Not authorized"
        assert transport.connected
        done.set()


def test_close_is_bounded_when_the_line_is_dead(make, monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._CLOSE_S", 0.2)
    done = threading.Event()

    def stop_reading(line):
        accept(line)
        done.wait(DEADLINE_S)

    with ScriptedBroker(stop_reading) as broker:
        transport = connected(make(broker))
        for _ in range(50):
            transport.publish("t", bytes(MAX_MESSAGE_BYTES))
        begin = time.monotonic()
        transport.close()
        assert time.monotonic() - begin < 3
        done.set()
    assert network_threads() == []


@pytest.mark.parametrize("patience", ["at once", "after a failure"])
def test_close_before_a_connection_leaves_no_thread(make, patience):
    broker = SimpleNamespace(host="127.0.0.1", port=EmbeddedBroker().port)
    transport = make(broker)
    transport.connect()
    if patience == "after a failure":
        until(transport, lambda: transport.last_error)
    begin = time.monotonic()
    transport.close()
    transport.close()
    assert time.monotonic() - begin < 3
    assert network_threads() == []
    assert not transport.connected


def test_a_closed_transport_says_goodbye_and_can_connect_again(make):
    ends = []

    def record(line):
        accept(line)
        ends.append([kind for kind, _ in line.read_until(0)])

    with ScriptedBroker(record, record) as broker:
        transport = connected(make(broker))
        transport.close()
        connected(transport)
        transport.close()
    assert ends == [[DISCONNECT, 0]] * 2


def test_wait_returns_on_a_message_a_change_or_the_time_limit(make, embedded_broker):
    transport = make(embedded_broker)
    assert not transport.wait(0.01)
    transport.subscribe("wait/t")
    connected(transport)
    transport.wait(0)  # takes note of the connection
    assert not transport.wait(0.05)

    transport.publish("wait/t", b"x")
    assert transport.wait(DEADLINE_S)
    assert transport.wait(DEADLINE_S)  # still there to be received
    assert transport.receive() == [Message("wait/t", b"x")]
    assert not transport.wait(0.05)

    closer = threading.Thread(target=transport.close)
    closer.start()
    assert transport.wait(DEADLINE_S)
    closer.join()


@pytest.mark.mosquitto
def test_a_full_inbox_drops_counts_and_recovers_what_is_retained(make, mosquitto, caplog):
    sender = connected(make(mosquitto, "sender"))
    reader = subscribed(make(mosquitto, "reader", max_inbox=3, keepalive_s=1), "t/#")
    for i in range(5):
        sender.publish(f"t/{i}", b"x", retain=i == 4)
    until(reader, lambda: reader.dropped == 2)
    assert caplog.text.count("inbox is full") == 1

    assert [message.topic for message in reader.receive()] == ["t/0", "t/1", "t/2"]
    assert receive(reader, 1) == [Message("t/4", b"x", retain=True)]
    assert reader.dropped == 2


@pytest.mark.mosquitto
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_what_is_sent_at_qos_0_arrives_as_it_was(make, mosquitto, version):
    sender = connected(make(mosquitto, "sender", version=version))
    reader = subscribed(make(mosquitto, "reader"), "t/#")
    payloads = [b"1", b"x" * 127, b"x" * 128, b"x" * 20_000, b"2"]
    for i, payload in enumerate(payloads):
        sender.publish(f"t/\u00fc{i}", payload, qos=i % 2)
    sender.publish("t/kept", b"3", retain=True, qos=0)
    came = receive(reader, 6, probes=False)
    assert sorted((message.topic, message.payload) for message in came) == sorted(
        [(f"t/\u00fc{i}", payload) for i, payload in enumerate(payloads)] + [("t/kept", b"3")]
    )
    late = make(mosquitto, "late")
    late.subscribe("t/kept")
    connected(late)
    assert receive(late, 1, probes=False) == [Message("t/kept", b"3", retain=True)]


@pytest.mark.mosquitto
def test_the_broker_sends_no_more_than_was_asked_for_until_it_is_taken(make, mosquitto):
    sender = connected(make(mosquitto, "sender"))
    reader = subscribed(make(mosquitto, "reader", receive_maximum=4), "t")
    marker = subscribed(make(mosquitto, "marker"), "done")
    for i in range(20):
        sender.publish("t", bytes([i]))
    sender.publish("done", b"x")
    assert receive(marker, 1, probes=False)  # so the broker has them all
    took = []
    while len(took) < 20:
        until(reader, lambda: len(reader._inbox) > 0)
        messages = reader.receive()
        # mosquitto 2.0.11 counts right until the first acknowledgement, and then sends a few more than it may
        assert len(messages) <= (20 if took else 4)
        took += [message.payload[0] for message in messages if message.payload]
    assert took == list(range(20))
    assert reader.dropped == 0


@pytest.mark.mosquitto
def test_nothing_is_read_from_the_line_while_the_inbox_is_full(make, mosquitto):
    sender = connected(make(mosquitto, "sender"))
    reader = subscribed(make(mosquitto, "reader", max_inbox=2, receive_maximum=65_535), "t")
    for i in range(9):
        sender.publish("t", bytes([i]))
    took = []
    while len(took) < 9:
        until(reader, lambda: len(reader._inbox) > 0)
        messages = reader.receive()
        assert len(messages) <= 2
        took += [message.payload[0] for message in messages if message.payload]
    assert took == list(range(9))
    assert reader.dropped == 0


@pytest.mark.mosquitto
def test_a_full_inbox_does_not_hold_up_close(make, mosquitto):
    sender = connected(make(mosquitto, "sender"))
    reader = subscribed(make(mosquitto, "reader", max_inbox=1, keepalive_s=600), "t")
    for _ in range(3):
        sender.publish("t", b"x")
    until(reader, lambda: len(reader._inbox) == 1)
    reader.close()  # ends long before the five minutes


@pytest.mark.mosquitto
def test_what_was_not_taken_when_the_line_broke_comes_once(make, mosquitto):
    sender = connected(make(mosquitto, "sender"))
    reader = subscribed(make(mosquitto, "reader", session_expiry_s=60), "t")
    sender.publish("t", b"1")
    until(reader, lambda: len(reader._inbox) == 1)
    cut(reader)
    until(reader, lambda: reader.connections == 2)
    sender.publish("t", b"2")
    assert [message.payload for message in receive(reader, 2, probes=False)] == [b"1", b"2"]


def test_threads_that_publish_while_the_broker_restarts_do_not_hang(make):
    stop = threading.Event()
    with EmbeddedBroker() as broker:
        transport = connected(make(broker))

        def publish():
            while not stop.is_set():
                try:
                    transport.publish("t", bytes(1000))
                except NotConnectedError:
                    transport.wait(0.01)

        threads = [threading.Thread(target=publish) for _ in range(3)]
        for thread in threads:
            thread.start()
        for connections in (2, 3):
            broker.stop()
            broker.start()
            until(transport, lambda connections=connections: transport.connections >= connections)
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        transport.close()


def test_pauses_grow_at_random_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_FIRST_S", 0.5)
    transport = MqttTransport("127.0.0.1", 1883, client_id="device")
    pauses = []
    client = SimpleNamespace(reconnect_delay_set=lambda low, high: pauses.append((low, high)))
    for _ in range(2000):
        transport._pause_before_retry(client)
    assert all(low == high for low, high in pauses)
    assert all(0.25 * 2**i <= pauses[i][0] <= 0.5 * 2**i for i in range(6))
    assert all(30 <= low <= 60 for low, _ in pauses[7:])
    assert len(set(pauses)) > 1900


@pytest.mark.parametrize(
    "wrong",
    [{"host": ""}, {"port": 0}, {"port": 70_000}, {"client_id": ""}, {"keepalive_s": 0}, {"max_inbox": 0}],
)
def test_arguments_out_of_range_are_refused(wrong):
    arguments = {"host": "127.0.0.1", "port": 1883, "client_id": "device", **wrong}
    with pytest.raises(ValueError, match=r"at least 1|from 1 to 65535"):
        MqttTransport(arguments.pop("host"), arguments.pop("port"), **arguments)


# ---- sessions, versions, addresses


@pytest.mark.mosquitto
@pytest.mark.parametrize(("session_expiry_s", "arrive"), [(60, [b"while away"]), (0, [])])
def test_a_session_keeps_what_was_sent_while_the_line_was_lost(make, mosquitto, session_expiry_s, arrive, monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_FIRST_S", 1.0)
    sleeper = make(mosquitto, session_expiry_s=session_expiry_s)
    sender = connected(make(mosquitto, "sender"))
    sleeper.subscribe("unwanted")
    subscribed(sleeper, "cmd")
    cut(sleeper)
    until(sleeper, lambda: not sleeper.connected)
    sleeper.unsubscribe("unwanted")
    sender.publish("cmd", b"while away")
    until(sleeper, lambda: sleeper.connections == 2)
    sender.publish("unwanted", b"no longer")
    sender.publish("cmd", b"end")
    assert [message.payload for message in receive(sleeper, len(arrive) + 1, probes=False)] == [*arrive, b"end"]


@pytest.mark.mosquitto
def test_a_message_that_has_expired_is_not_delivered(make, mosquitto, monkeypatch):
    monkeypatch.setattr("edge_sdk.mqtt._BACKOFF_FIRST_S", 3.2)
    sleeper, sender = make(mosquitto, session_expiry_s=60), connected(make(mosquitto, "sender"))
    subscribed(sleeper, "cmd")
    cut(sleeper)
    until(sleeper, lambda: not sleeper.connected)
    sender.publish("cmd", b"too late", expires_s=0.5)
    sender.publish("cmd", b"in time", expires_s=30)
    assert [message.payload for message in receive(sleeper, 1, probes=False)] == [b"in time"]


@pytest.mark.mosquitto
def test_mqtt_3_1_1_does_all_but_sessions_and_expiry(mosquitto):
    check_transport(
        lambda name: MqttTransport(mosquitto.host, mosquitto.port, client_id=name, version="3.1.1"),
        settle=settle, cut=cut, timeout_s=DEADLINE_S, prefix="old",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"3\.1\.1 without session_expiry_s"):
        MqttTransport("h", 1, client_id="d", version="3.1.1", session_expiry_s=5)


def test_the_connection_asks_for_flow_control(make):
    def look(line):
        kind, body = line.read()
        assert kind == CONNECT
        assert bytes([0x21, 0, 7]) in body  # receive maximum
        assert bytes([0x11, 0, 0, 0, 9]) in body  # session expiry
        line.send(ACCEPTED)
        line.read()

    with ScriptedBroker(look) as broker:
        transport = connected(make(broker, receive_maximum=7, session_expiry_s=9))
        transport.close()


@pytest.mark.parametrize(
    ("url", "host", "port", "encrypted", "user"),
    [
        ("mqtt://broker", "broker", 1883, False, None),
        ("mqtts://broker", "broker", 8883, True, None),
        ("mqtts://pump%401:p%2Fw@10.0.0.7:9999", "10.0.0.7", 9999, True, "pump@1"),
    ],
)
def test_addresses_are_read(url, host, port, encrypted, user):
    transport = MqttTransport.from_url(url, client_id="d")
    assert (transport._host, transport._port, transport._tls is not None) == (host, port, encrypted)
    assert (transport._username, transport._password) == ((user, "p/w") if user else (None, None))


@pytest.mark.parametrize("url", ["http://broker", "mqtt://", "broker:1883", "mqtt://broker/topic"])
def test_other_addresses_are_refused_without_telling_a_password(url):
    with pytest.raises(ValueError, match="expected mqtt://host:port"):
        MqttTransport.from_url(url, client_id="d")


def test_a_missing_certificate_is_told_with_its_file(tmp_path):
    transport = MqttTransport("localhost", 8883, client_id="d", tls=Tls(ca_file=tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"none\.pem"):
        transport.connect()
