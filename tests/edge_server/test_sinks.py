"""Notices reach their sinks at least once: over failures, redirections, slow servers, lost echoes and kill -9."""

import hashlib
import hmac
import json
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.messages import Topics
from edge_sdk.transport import MemoryTransport
from edge_server.alert_settings import AlertSettings, SinkSettings
from edge_server.sinks import Courier, LogSink, TopicSink, WebhookSink, open_sinks, sign, wait_s
from edge_server.store import Store

SECRET = b"sixteen bytes or more"
DEADLINE_S = 20


class Receiver(ThreadingHTTPServer):
    """Answers as it is told, and remembers what came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.heard, self.answers, self.drip = [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook?a=b"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.drip.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if answer == "drip":
            self.wfile.write(b"HTTP/1.1 ")
            self.wfile.flush()
            self.server.drip.wait(DEADLINE_S)
            return
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    made = []

    def make():
        made.append(Receiver())
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "coordinator.db", durable=False)
    yield store
    store.close()


@pytest.fixture
def put(store, clock):
    def enqueue(count=1, sink="a", severity="warning"):
        with store.transaction():
            for number in range(count):
                alert = {"id": number, "severity": severity, "words": f"words {number}"}
                body = json.dumps({"reason": "raised", "title": "devices offline", "alert": alert})
                store.alerts.enqueue(alert=number, sink=sink, body=body, now=clock.now())

    return enqueue


@pytest.fixture
def courier(store, clock):
    made = []

    def make(sink, **options):
        made.append(Courier(store, {"a": sink}, clock=clock, **{"give_up_s": 86_400.0, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def webhook(clock, url, **options):
    return WebhookSink(url, secret=SECRET, clock=clock, **{"timeout_s": 10.0, **options})


def work(courier, store):
    """Turns until nothing is under way."""
    for _ in range(10_000):
        courier.turn()
        flying = [future for futures in courier._flying.values() for future in futures.values()]
        if not flying:
            return
        for future in flying:
            future.exception(timeout=DEADLINE_S)
    raise AssertionError("it never ends")


class TestWebhook:
    def test_it_is_posted_once_signed_and_marked_as_done(self, receiver, courier, store, clock, put):
        server = receiver()
        put()
        work(courier(webhook(clock, server.url)), store)
        ((path, headers, body),) = server.heard
        assert path == "/hook?a=b"
        told = json.loads(body)
        assert (told["delivery"], told["title"]) == (int(headers["Edge-Delivery"]), "devices offline")
        expected = hmac.new(SECRET, headers["Edge-Timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
        assert headers["Edge-Signature"] == f"sha256={expected}"
        assert float(headers["Edge-Timestamp"]) == pytest.approx(clock.now(), abs=1)
        assert store.alerts.waiting("a", limit=9) == []

    def test_what_fails_is_sent_again_later_and_later_in_the_same_order(self, receiver, courier, store, clock, put):
        server = receiver()
        server.answers = [500, 503, 200, 200]
        put(2)
        one = courier(webhook(clock, server.url))
        work(one, store)
        work(one, store)
        assert len(server.heard) == 1, "not again at once, and nothing overtakes it"
        clock.advance(5.0)
        work(one, store)
        clock.advance(9.0)
        work(one, store)
        assert len(server.heard) == 2
        clock.advance(1.0)
        work(one, store)
        numbers = [json.loads(body)["alert"]["id"] for _, _, body in server.heard]
        assert numbers == [0, 0, 0, 1]
        assert [d.attempts for d in store.alerts.deliveries(0)] == [2]
        assert store.alerts.waiting("a", limit=9) == []

    def test_redirections_are_not_followed(self, receiver, courier, store, clock, put):
        server, elsewhere = receiver(), receiver()
        server.answers = [(302, {"Location": elsewhere.url}), (307, {"Location": elsewhere.url})]
        put()
        one = courier(webhook(clock, server.url))
        for _ in range(2):
            work(one, store)
            (delivery,) = store.alerts.waiting("a", limit=9)
            assert "not followed" in delivery.error
            clock.advance(3600)
        assert elsewhere.heard == []

    def test_a_server_that_drips_is_left_after_the_time_limit(self, receiver, courier, store, clock, put):
        server = receiver()
        server.answers = ["drip"]
        put()
        work(courier(webhook(clock, server.url, timeout_s=0.2)), store)
        (delivery,) = store.alerts.waiting("a", limit=9)
        assert delivery.error

    def test_nobody_there_is_a_failure_like_any_other(self, receiver, courier, store, clock, put):
        server = receiver()
        server.close()
        put()
        work(courier(webhook(clock, server.url)), store)
        (delivery,) = store.alerts.waiting("a", limit=9)
        assert "refused" in delivery.error.lower()

    def test_what_cannot_be_delivered_for_long_is_given_up(self, courier, store, clock, put, caplog):
        put()
        one = courier(webhook(clock, "http://127.0.0.1:9/"), give_up_s=60.0)
        work(one, store)
        clock.advance(61.0)
        work(one, store)
        assert store.alerts.waiting("a", limit=9) == []
        (delivery,) = store.alerts.deliveries(0)
        assert delivery.error.startswith("given up")
        assert "could not be delivered" in caplog.text

    def test_waits_double_up_to_an_hour(self):
        assert [wait_s(n) for n in (0, 1, 2, 9, 10, 10_000)] == [5, 10, 20, 2560, 3600, 3600]

    def test_signatures_depend_on_time_and_body(self):
        assert len({sign(SECRET, *pair) for pair in (("1", b"a"), ("2", b"a"), ("1", b"b"))}) == 3


class TestTopic:
    @pytest.fixture
    def sink(self, broker):
        transport = MemoryTransport(broker)
        transport.connect()
        return TopicSink(transport, "edge/alerts/a"), transport

    def test_it_is_done_when_the_broker_has_given_it_back(self, sink, courier, store, put):
        topic, transport = sink
        put()
        one = courier(topic)
        one.turn()
        assert len(store.alerts.waiting("a", limit=9)) == 1
        for message in transport.receive():
            assert one.hear(message.topic, message.payload)
        one.turn()
        assert store.alerts.waiting("a", limit=9) == []

    def test_what_was_lost_on_its_way_is_published_again(self, sink, courier, store, clock, put):
        topic, transport = sink
        put()
        one = courier(topic)
        one.turn()
        assert len(transport.receive()) == 1
        one.turn()
        assert transport.receive() == []
        clock.advance(30.0)
        one.turn()
        (message,) = transport.receive()
        one.hear(message.topic, message.payload)
        one.turn()
        assert store.alerts.waiting("a", limit=9) == []

    def test_without_a_connection_it_waits(self, broker, courier, store, clock, put):
        transport = MemoryTransport(broker)
        put()
        one = courier(TopicSink(transport, "edge/alerts/a"))
        one.turn()
        assert store.alerts.waiting("a", limit=9)[0].error == "no connection to the broker"
        transport.connect()
        clock.advance(5.0)
        one.turn()
        assert len(transport.receive()) == 1

    @pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b"{}", b'{"delivery": []}', b'{"delivery": 99}'])
    def test_what_others_publish_there_does_no_harm(self, sink, courier, store, put, payload):
        put()
        one = courier(sink[0])
        one.turn()
        assert one.hear("edge/alerts/a", payload)
        one.turn()
        assert len(store.alerts.waiting("a", limit=9)) == 1
        assert not one.hear("edge/d/x/up/report", payload)


def test_the_log_has_a_line_for_each_notice(courier, store, put, caplog):
    caplog.set_level(logging.INFO)
    put(2, severity="critical")
    courier(LogSink()).turn()
    assert caplog.text.count("devices offline: words") == 2
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_the_coordinator_tells_a_topic_and_does_not_take_it_for_a_devices_message(
    make_coordinator, make_device, broker, clock
):
    settings = AlertSettings(sinks={"ops": SinkSettings(kind="mqtt")}, min_disk_mb=1e12)
    coordinator = make_coordinator(alerts=settings)
    listener = MemoryTransport(broker)
    listener.subscribe("edge/alerts/#")
    listener.connect()
    for _ in range(3):
        coordinator.watch()
        coordinator.pump()
        clock.advance(60.0)
    (message,) = listener.receive()
    assert (message.topic, json.loads(message.payload)["alert"]["kind"]) == ("edge/alerts/ops", "disk_full")
    coordinator.watch()
    assert coordinator.registry.store.alerts.waiting("ops", limit=9) == []
    assert "malformed" not in coordinator.registry.fleet().counters


@pytest.mark.parametrize("secret", [None, b"short"])
def test_a_webhook_without_a_secret_is_refused_at_the_start(tmp_path, broker, clock, secret):
    if secret:
        (tmp_path / "s").write_bytes(secret)
    sinks = {"a": SinkSettings(kind="webhook", url="https://example.org/", secret_file="s")}
    with pytest.raises(ConfigError, match="secret_file"):
        open_sinks(sinks, home=tmp_path, transport=MemoryTransport(broker), topics=Topics(), clock=clock)


CHILD = """
import os, sys
from pathlib import Path
from edge_sdk.clock import ManualClock
from edge_sdk.files import set_crash_hook
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.alert_settings import AlertSettings, SinkSettings
from edge_server.coordinator import Coordinator
from edge_server.settings import Settings

home, url, spared = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
met = 0

def crash(name):
    global met
    met += 1
    if met > spared:
        os._exit(77)

clock = ManualClock()
sinks = {"hook": SinkSettings(kind="webhook", url=url, secret_file="secret", min_severity="info")}
settings = Settings(alerts=AlertSettings(sinks=sinks, min_disk_mb=1e12, interval_s=1.0))
coordinator = Coordinator(home, transport=MemoryTransport(MemoryBroker()), clock=clock, settings=settings)
set_crash_hook(crash)
coordinator.start()
store = coordinator.registry.store
for _ in range(3):
    coordinator.watch()
    clock.advance(1.0)
while store.alerts.waiting("hook", limit=1):
    for future in coordinator._courier._flying["hook"].values():
        future.exception(timeout=20)
    coordinator.watch()
"""


def test_killed_at_any_commit_every_alert_is_delivered_and_raised_once(receiver, tmp_path):
    server, home = receiver(), tmp_path / "home"
    home.mkdir()
    (home / "secret").write_bytes(SECRET)
    ended = []
    for spared in range(4, 30):
        run = subprocess.run([sys.executable, "-c", CHILD, str(home), server.url, str(spared)], check=False, timeout=60)
        ended.append(run.returncode)
        if run.returncode == 0:
            break
    assert ended[-1] == 0
    assert set(ended[:-1]) == {77}
    assert len(ended) > 5, "it was killed at several places"
    store = Store(home / "coordinator.db")
    (alert,) = store.alerts.find()
    (delivery,) = store.alerts.deliveries(alert.id)
    store.close()
    assert delivery.done is not None
    assert {json.loads(body)["delivery"] for _, _, body in server.heard} == {delivery.id}
