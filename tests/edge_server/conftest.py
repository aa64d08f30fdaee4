"""A fleet of scripted devices around a coordinator in memory."""

import re
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.manifest import (
    MANIFEST_NAME,
    REQUIRED,
    HeadSpec,
    LatentSpec,
    Manifest,
    describe_folder,
    manifest_bytes,
)
from edge_sdk.messages import (
    Ack,
    Desired,
    Envelope,
    Event,
    Gap,
    MonitorState,
    Need,
    Report,
    State,
    Summary,
    Topics,
    block_count,
    cohort,
    decode,
    encode,
    from_places,
    raw,
    to_bitmap,
    to_counts,
)
from edge_sdk.schema import InputSpec
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.coordinator import Coordinator
from edge_server.settings import Settings

TOPICS = Topics()


def make_report(**changes):
    fields = {
        "start": 0.0,
        "end": 1.0,
        "release": 1,
        "head": 0,
        "mode": "adapt",
        "predictions": 100,
        "labelled": 100,
        "correct": 90,
        "unmatched": 0,
        "rejected_inputs": 0,
        "errors": 0,
        "mean_confidence": 0.9,
        "p50_ms": 1.0,
        "p95_ms": 2.0,
        "predicted": {"a": 100},
        "monitors": [],
        "replay_rows": 0,
        "fresh_rows": 0,
        "promotions": 0,
        "rejections": 0,
        "rollbacks": 0,
        "labels_lost": 0,
        "outbox_dropped": 0,
        "rss_mb": 50.0,
        "written_bytes": 0,
    }
    return Report(**{**fields, **changes})


def make_summary(**changes):
    fields = {
        "start": 0.0,
        "end": 3600.0,
        "release": 1,
        "head": 0,
        "reference": "9f86d081",
        "unit": 10,
        "rows": 600,
        "features": ["acc_x", "acc_y"],
        "bins": 4,
        "counts": to_counts([15] * 8),
        "missing": to_counts([0, 1]),
        "moments": bytes(32),
        "confidence": to_counts([0] * 63 + [60]),
        "classes": {"a": 600},
        "latency": b"",
        "metrics": [],
        "monitors": [MonitorState("input", 1.0, 1000.0, warning=False, alarm=False)],
    }
    return Summary(**{**fields, **changes})


class ScriptedDevice:
    """Speaks the protocol and does what a test tells it: an outbox that resends, and releases by number."""

    def __init__(self, name, broker, clock, *, group="default", store_id="s1"):
        self.name, self.clock, self.group, self.store_id = name, clock, group, store_id
        self.transport = MemoryTransport(broker)
        self.rows = []
        self.seq = 0
        self.release = 0
        self.previous = 0
        self.accuracy = 0.9
        self.keeps_release = True
        self.desired = None
        self.blocks = {}
        self.shadows = 0

    def connect(self):
        self.transport.connect()
        self.transport.subscribe(TOPICS.down(self.name, "ack"))
        self.transport.subscribe(TOPICS.desired(self.group))
        self.state()
        return self

    def state(self, **changes):
        fields = {
            "device": self.name,
            "store_id": self.store_id,
            "time": self.clock.now(),
            "online": True,
            "reason": "birth",
            "boot": 1,
            "release": self.release,
            "head": 0,
            "digest": "",
            "group": self.group,
            "mode": "adapt",
            "sdk": "0.1.0",
        }
        payload = encode(State(**{**fields, **changes}))
        self.transport.publish(TOPICS.up(self.name, "state"), payload, retain=True)

    def put(self, message):
        self.seq += 1
        kind = type(message).__name__.lower()
        self.rows.append((self.seq, self.seq, kind, self.clock.now(), raw(message)))

    def event(self, name, **detail):
        self.put(Event(name=name, release=self.release, head=0, detail=detail))

    def report(self, labelled=100, *, start=None, **changes):
        now = self.clock.now()
        correct = round(labelled * self.accuracy)
        fields = {"start": now if start is None else start, "end": now, "release": self.release}
        self.put(make_report(labelled=labelled, correct=correct, **{**fields, **changes}))

    def drop(self, first, last):
        """Rows `first` to `last` become a gap."""
        self.rows = [row for row in self.rows if not first <= row[0] <= last]
        self.rows.append((last, first, "gap", self.clock.now(), raw(Gap(first, last))))
        self.rows.sort()

    def payload(self, row):
        seq, _, kind, time, body = row
        oldest = min(row[1] for row in self.rows)
        return encode(Envelope(store_id=self.store_id, seq=seq, oldest=oldest, time=time, kind=kind, body=body))

    def send(self):
        for row in self.rows:
            topic = TOPICS.up(self.name, "report" if row[2] in ("report", "summary") else "event")
            self.transport.publish(topic, self.payload(row))

    def receive(self):
        for message in self.transport.receive():
            if message.topic == TOPICS.down(self.name, "ack"):
                ack = decode(message.payload, Ack)
                if ack.store_id == self.store_id:
                    self.rows = [row for row in self.rows if row[0] > ack.seq]
            elif message.topic == TOPICS.desired(self.group):
                self.desired = decode(message.payload, Desired)
            elif (block := TOPICS.parse_block(message.topic)) is not None:
                self.blocks[block] = message.payload

    def ask(self, digest, size, blocks=None):
        self.transport.subscribe(TOPICS.block(digest, "+"))
        count = block_count(size)
        wanted = set(range(count)) if blocks is None else blocks
        need = Need(digest=digest, size=size, blocks=to_bitmap(wanted, count))
        self.transport.publish(TOPICS.up(self.name, "need"), encode(need))

    def obey(self):
        """Install or leave releases as the desired state says."""
        desired = self.desired
        if desired is None:
            return
        if self.release in desired.revoked:
            gone, self.release = self.release, self.previous
            self.event("release_rolled_back", release=gone, to=self.release, reason="revoked")
        offer = desired.base
        if desired.candidate is not None and cohort(desired.salt, self.name) < desired.threshold:
            offer = desired.candidate
        self.shadows = 0
        for part in desired.parts:
            if cohort(part.salt, self.name) in from_places(part.devices):
                if part.shadow_s:
                    self.shadows = part.offer.release
                else:
                    offer = part.offer
                break
        if offer is None or offer.release <= self.release or offer.release in desired.revoked:
            return
        if not self.keeps_release:
            self.event("release_failed", release=offer.release, reason="self-test")
            return
        self.previous, self.release = self.release, offer.release
        self.event("release_activated", release=self.release, previous=self.previous, carried=True)


def desired(broker, group="default"):
    (message,) = broker.retained(f"edge/g/{group}/desired")
    return decode(message.payload, Desired)


def live(coordinator, devices, clock, settle, *, turns=1, seconds=10.0):
    """Some turns of a fleet's life: everybody obeys, works, reports."""
    for _ in range(turns):
        for device in devices:
            device.obey()
        start = clock.now()
        clock.advance(seconds)
        for device in devices:
            device.report(start=start)
        settle(devices)
        coordinator.advance()
        for device in devices:
            device.receive()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def broker():
    return MemoryBroker()


def make_checkpoint(parent, release, *, trunk=b"trunk", name="digits"):
    """A checkpoint folder of a release: valid as far as the coordinator looks."""
    folder = parent / f"checkpoint-{release}-{len(trunk)}"
    folder.mkdir()
    for file in REQUIRED:
        (folder / file).write_bytes(f"{file} of {release}".encode())
    (folder / "trunk.int8.onnx").write_bytes(trunk)
    manifest = Manifest(
        name=name,
        release=release,
        created="2026-01-01",
        labels=["a", "b"],
        input=InputSpec(shape=[4]),
        latent=LatentSpec(4, 0.1, 0),
        head=HeadSpec(),
        files=describe_folder(folder, REQUIRED),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint folder of a release."""

    def make(release, **options):
        return make_checkpoint(tmp_path, release, **options)

    return make


@pytest.fixture
def make_coordinator(tmp_path, broker, clock):
    made = []

    def make(*, home: Path | None = None, start=True, **settings):
        defaults = {"accept_unknown": True, "durable": False, "rollout_interval_s": 10.0}
        coordinator = Coordinator(
            home or tmp_path / "home",
            transport=MemoryTransport(broker),
            clock=clock,
            settings=Settings(**{**defaults, **settings}),
        )
        made.append(coordinator)
        if start:
            coordinator.start()
        return coordinator

    yield make
    for coordinator in made:
        coordinator.close()


@pytest.fixture
def coordinator(make_coordinator):
    return make_coordinator()


@pytest.fixture
def make_device(broker, clock):
    def make(name, **options):
        return ScriptedDevice(name, broker, clock, **options).connect()

    return make


@pytest.fixture
def settle(coordinator):
    """Lets devices and the coordinator talk until nobody has anything to say."""

    def run(devices):
        for _ in range(100):
            for device in devices:
                device.send()
            handled = coordinator.pump()
            for device in devices:
                device.receive()
            if not handled and not any(device.rows for device in devices):
                return
        raise AssertionError("devices and coordinator never fell silent")

    return run


@pytest.fixture
def report():
    return make_report


@pytest.fixture
def summary():
    return make_summary


@pytest.fixture
def rows(tmp_path):
    """Reads the coordinator's database as a stranger would."""
    import sqlite3
    from contextlib import closing

    def read(sql):
        with closing(sqlite3.connect(tmp_path / "home" / "coordinator.db")) as database:
            return database.execute(sql).fetchall()

    return read


@pytest.fixture
def fleet(coordinator, make_device, clock, settle, checkpoint):
    """Eight devices on release 1 with some history."""
    coordinator.push(checkpoint(1))
    devices = [make_device(f"d{i}") for i in range(8)]
    for device in devices:
        device.receive()
    live(coordinator, devices, clock, settle, turns=3)
    return devices


# ---- the web application


@pytest.fixture
def app(coordinator):
    from edge_server.app import create_app
    from edge_server.monitoring import Pulse

    return create_app(coordinator.registry, pulse=lambda: Pulse(connected=True, lag_s=1.5))


@contextmanager
def serving(registry):
    """The web application on a port of its own, in a thread with its own connection; gives the address."""
    import uvicorn

    from edge_server.app import create_app
    from edge_server.monitoring import Pulse

    records = registry.reopen()
    stop = threading.Event()
    app = create_app(records, pulse=lambda: Pulse(connected=True, lag_s=0.0), stopping=stop.is_set)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        server.should_exit = True
        thread.join()
        records.close()
        listener.close()


@pytest.fixture
def request_(app):
    """Sends one request, as a program does: without cookies but those that are given."""
    import asyncio

    import httpx

    def send(method, path, *, base="http://127.0.0.1:8080", client=("127.0.0.1", 1234), cookies=None, **options):
        async def run():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
            async with httpx.AsyncClient(transport=transport, base_url=base, cookies=cookies) as browser:
                return await browser.request(method, path, **options)

        return asyncio.run(run())

    return send


@pytest.fixture
def get(request_):
    return lambda path, **options: request_("GET", path, **options)


@pytest.fixture
def post(request_):
    return lambda path, **options: request_("POST", path, **{"json": {}, **options})


def keep_candidate(registry, *, digest="ab" * 32, verdict="lost"):
    """An evaluation of a candidate, as `build` keeps it."""
    from edge_server.records import CandidateRecord

    slices = [
        {"name": f"site={site}", "rows": 80, "champion": was, "challenger": now, "evidence": 2.0, "harmed": now < was}
        for site, was, now in (("rome", 0.9, 0.95), ("berlin", 0.9, 0.7))
    ]
    evaluation = {"verdict": verdict, "reason": "harms site=berlin", "rows": 160, "champion": 0.9, "challenger": 0.82,
                  "evidence": 0.5, "slices": slices}  # fmt: skip
    lineage = {"made_from": f"release 1, SHA-256 {'0' * 64}", "trainer": "head (hybrid)"}
    report = {"lineage": lineage, "evaluation": evaluation, "metrics": {"accuracy": 0.82}, "agreement": 0.99}
    record = CandidateRecord(
        digest=digest, name="digits", release=3, champion=1, verdict=verdict, reason="harms site=berlin", built=5.0,
        report=report,
    )  # fmt: skip
    with registry.store.transaction():
        registry.store.candidates.save(record, card="# digits\n\nMade for <b>tests</b>.")


@pytest.fixture
def small_fleet(coordinator, make_device, settle, checkpoint):
    """Three devices that reported, one of them in drift, a segment and a candidate; release 2 on its way to them."""
    coordinator.registry.segments.create("a", "site=berlin", actor="test")
    keep_candidate(coordinator.registry)
    devices = [make_device(name) for name in ("a", "b", "c")]
    for device in devices:
        device.release = 1
        device.report(monitors=[MonitorState("inputs", 30.0, 20.0, True, device.name == "a")])
        device.event("boot")
    settle(devices)
    coordinator.push(checkpoint(1))
    coordinator.push(checkpoint(2))
    return devices


@pytest.fixture
def token(coordinator):
    """Makes a user; returns the token."""

    def make(role, name=None):
        return coordinator.registry.users.add(name or f"the-{role}", role, actor="test")

    return make


class Browser:
    """Keeps cookies, and the form token of the page it saw last."""

    def __init__(self, request):
        self._request, self.cookies, self.form_token = request, {}, ""

    def _send(self, method, path, **options):
        answer = self._request(method, path, cookies=self.cookies, **options)
        for name, value in answer.cookies.items():
            self.cookies[name] = value
        for line in answer.headers.get_list("set-cookie"):
            if "Max-Age=0" in line:
                self.cookies.pop(line.partition("=")[0], None)
        if found := re.search(r'name="form_token" value="(\w+)"', answer.text):
            self.form_token = found[1]
        return answer

    def get(self, path, **options):
        return self._send("GET", path, **options)

    def send(self, path, headers=None, **fields):
        headers = headers or {"content-type": "application/x-www-form-urlencoded"}
        return self._send("POST", path, headers=headers, data={"form_token": self.form_token, **fields})

    def log_in(self, token, **fields):
        self.get("/login")
        return self.send("/login", token=token, **fields)


@pytest.fixture
def make_browser(request_):
    return lambda: Browser(request_)


@pytest.fixture
def browser(make_browser):
    """What a person uses: keeps cookies, and the form token of the page it saw last."""
    return make_browser()
