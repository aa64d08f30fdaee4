"""Fetching a signed release: over MQTT and HTTP, by patches, with damaged blocks and servers that misbehave."""

import hashlib
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from edge_sdk import ranges, update
from edge_sdk.config import UpdateConfig
from edge_sdk.errors import ConfigError, UntrustedError
from edge_sdk.index import make_patch
from edge_sdk.manifest import MANIFEST_NAME, REQUIRED, HeadSpec, LatentSpec, Manifest, describe_folder, manifest_bytes
from edge_sdk.messages import BLOCK_BYTES, THRESHOLD_ALL, Need, Topics, decode
from edge_sdk.ranges import HttpSource
from edge_sdk.schema import InputSpec
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_sdk.trust import Listening, Trust
from edge_sdk.update import UpdateClient
from edge_server.coordinator import Coordinator
from edge_server.settings import Settings
from edge_server.verify import export

TOPICS = Topics()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of small files are written here, and no power is cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def content_of(size, salt):
    return b"".join(hashlib.sha256(f"{salt}/{i}".encode()).digest() for i in range(size // 32 + 1))[:size]


TRUNK = content_of(5 * BLOCK_BYTES + 7, "trunk")


@pytest.fixture
def checkpoint(tmp_path):
    def make(release, *, trunk=TRUNK):
        folder = tmp_path / f"checkpoint-{release}"
        folder.mkdir()
        for file in REQUIRED:
            (folder / file).write_bytes(f"{file} of {release}".encode())
        (folder / "trunk.int8.onnx").write_bytes(trunk)
        manifest = Manifest(
            name="digits",
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

    return make


class Fleet:
    """A coordinator with keys, and one device that fetches what it offers."""

    def __init__(self, folder, clock, checkpoint):
        self.folder, self.clock = folder, clock
        self.broker = MemoryBroker()
        settings = Settings(accept_unknown=True, durable=False)
        self.coordinator = Coordinator(
            folder / "home", transport=MemoryTransport(self.broker), clock=clock, settings=settings
        )
        self.registry = self.coordinator.registry
        self.registry.repository.init(folder / "away", count=2, threshold=2, passphrase=None)
        self.registry.sign_all()
        self.coordinator.start()
        self.coordinator.push(checkpoint(1))
        self.held = {}
        self.needs = MemoryTransport(self.broker)
        self.needs.connect()
        self.needs.subscribe(TOPICS.up("+", "need"))

    def start(self, **config):
        self.trust = Trust(self.folder / "device" / "tuf", self.registry.repository.root())
        self.transport = Listening(MemoryTransport(self.broker), TOPICS, self.trust)
        self.transport.connect()
        self.transport.subscribe(TOPICS.desired("default"))
        config = UpdateConfig(**{"min_free_bytes": 0, "retry_s": 5.0} | config)
        self.client = UpdateClient(
            self.folder / "device" / "incoming",
            device="dev-1",
            topics=TOPICS,
            transport=self.transport,
            config=config,
            trust=self.trust,
        )
        return self

    def fetch(self, turns=400, *, installed=None, spoil=None):
        """The release, if it comes within so many turns."""
        for _ in range(turns):
            for message in self.transport.receive():
                if message.topic == TOPICS.desired("default"):
                    self.client.hear(message.payload, self.clock.now())
                elif (block := TOPICS.parse_block(message.topic)) is not None:
                    payload = message.payload if spoil is None else spoil(*block, message.payload)
                    self.client.take_block(*block, payload)
            offer = self.client.offered(installed, {})
            if offer is not None and self.client.authorise(offer, self.clock.now()):
                self.client.begin(offer)
                if (fetched := self.client.turn(self.clock.now(), self.held)) is not None:
                    return fetched
            if not self.coordinator.pump():
                for thread in threading.enumerate():
                    if thread.name == "edge-http":  # over as soon as its request is, unless the server is silent
                        thread.join(0.02)
                self.clock.advance(0.1)
        return None

    def install(self, fetched):
        for digest, path in fetched.files.items():
            kept = self.folder / "device" / digest
            kept.write_bytes(path.read_bytes())
            self.held[digest] = kept
        self.client.clean()

    def asked(self):
        """Bytes asked for over MQTT, by file."""
        found = {}
        for message in self.needs.receive():
            need = decode(message.payload, Need)
            found[need.digest] = need.size
        return found


@pytest.fixture
def fleet(tmp_path, clock, checkpoint):
    made = Fleet(tmp_path, clock, checkpoint)
    yield made
    made.coordinator.close()


def files_of(fetched):
    return sorted(path.read_bytes() for path in fetched.files.values())


def expected(folder):
    return sorted({(folder / name).read_bytes() for name in REQUIRED})


# ---- over MQTT


def test_a_signed_release_is_fetched(fleet, tmp_path):
    fetched = fleet.start().fetch()
    assert files_of(fetched) == expected(tmp_path / "checkpoint-1")
    assert fleet.trust.state(fleet.clock.now()) == "trusted"


def test_an_offer_that_is_not_signed_is_not_fetched(fleet, checkpoint, monkeypatch):
    monkeypatch.setattr(fleet.registry.repository, "sign", lambda targets: None)
    fleet.coordinator.push(checkpoint(2))
    fleet.coordinator.abort(2)  # group keeps release 1: offer 2 to everyone by hand
    fleet.start()
    fleet.fetch(turns=3)
    offer = fleet.registry.shipping._offer(2)
    with pytest.raises(UntrustedError, match="release 2 is not signed"):
        fleet.client.authorise(offer, fleet.clock.now())
    assert fleet.client.fetching is None or fleet.client.fetching.release == 1


def test_a_damaged_block_is_noticed_when_it_comes_and_only_it_is_fetched_again(fleet, tmp_path, caplog):
    trunk = hashlib.sha256(TRUNK).hexdigest()
    spoilt = []

    def spoil(digest, index, payload):
        if digest == trunk and index == 2 and len(spoilt) < 5:
            spoilt.append(index)
            return bytes(len(payload))
        return payload

    fetched = fleet.start(retry_s=0.5).fetch(spoil=spoil)
    assert files_of(fetched) == expected(tmp_path / "checkpoint-1")
    assert len(spoilt) == 5, "more often than a damaged file is forgiven"
    assert "block 2 of" in caplog.text
    assert "came damaged" not in caplog.text


def test_false_blocks_of_what_has_one_block_do_not_spoil_a_signed_release(fleet, tmp_path, caplog):
    small, spoilt = {fleet.registry.releases()[0].digest}, []

    def spoil(digest, index, payload):
        if digest in small and len(spoilt) < 5:
            spoilt.append(index)
            return bytes(len(payload))
        return payload

    fetched = fleet.start(retry_s=0.5).fetch(spoil=spoil)
    assert files_of(fetched) == expected(tmp_path / "checkpoint-1")
    assert len(spoilt) == 5, "more often than a damaged file is forgiven"
    assert "came damaged" not in caplog.text


# ---- patches


def changed(trunk):
    return trunk[:100_000] + b"a tail that was trained anew" + trunk[100_028:]


@pytest.fixture
def patched(fleet, checkpoint):
    """A device on release 1, and release 2 that differs a little."""
    fleet.install(fleet.start().fetch())
    fleet.registry.advance()
    fleet.coordinator.push(checkpoint(2, trunk=changed(TRUNK)))
    fleet.clock.advance(1)
    record = fleet.registry.store.groups.get("default")
    desired = decode(record.desired, update.Desired)
    everyone = {"candidate": desired.parts[0].offer, "parts": [], "threshold": THRESHOLD_ALL}
    fleet.transport.receive()  # what the group was told is another thing
    fleet.client.follow(msgspec.structs.replace(desired, **everyone, revision=desired.revision + 1))
    fleet.asked()
    return fleet


def test_of_a_file_that_changed_a_little_only_a_patch_travels(patched, tmp_path):
    fetched = patched.fetch(installed=1)
    assert files_of(fetched) == expected(tmp_path / "checkpoint-2")
    asked = patched.asked()
    assert hashlib.sha256(changed(TRUNK)).hexdigest() not in asked
    assert sum(asked.values()) < len(TRUNK) / 10


def test_without_bsdiff4_the_whole_file_travels(patched, tmp_path, monkeypatch):
    monkeypatch.setattr(update, "can_patch", lambda: False)
    assert files_of(patched.fetch(installed=1)) == expected(tmp_path / "checkpoint-2")
    assert patched.asked()[hashlib.sha256(changed(TRUNK)).hexdigest()] == len(TRUNK)


def test_a_patch_that_makes_something_else_costs_only_the_whole_file(patched, tmp_path, monkeypatch, caplog):
    def lies(source, patch, *, digest, size):
        raise update.IntegrityError("it makes something else")

    monkeypatch.setattr(update, "apply_patch", lies)
    assert files_of(patched.fetch(installed=1)) == expected(tmp_path / "checkpoint-2")
    assert "is fetched whole: it makes something else" in caplog.text


def test_a_source_that_was_damaged_on_the_disk_is_not_patched(patched, tmp_path):
    trunk = patched.held[hashlib.sha256(TRUNK).hexdigest()]
    trunk.write_bytes(TRUNK[::-1])
    assert files_of(patched.fetch(installed=1)) == expected(tmp_path / "checkpoint-2")


def test_a_patch_of_a_real_change_is_small():
    assert len(make_patch(TRUNK, changed(TRUNK))) < len(TRUNK) / 50


# ---- over HTTP


class Server(ThreadingHTTPServer):
    """A static server with ranges, which can lose them, break off, or fail."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.fails, self.breaks = Path(folder), True, 0, 0
        self.sent, self.silent = {}, None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        path = server.folder / self.path.lstrip("/")
        if server.silent is not None:
            server.silent.wait(10)
        if server.fails:
            server.fails -= 1
            self.send_error(500)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and server.ranges:
            first, last = int(wanted[1]), int(wanted[2])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if server.breaks and len(data) > 100_000:
            server.breaks -= 1
            data = data[:70_000]
        server.sent[path.name] = server.sent.get(path.name, 0) + len(data)
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(fleet, tmp_path):
    export(fleet.registry, tmp_path / "www")
    made = Server(tmp_path / "www")
    yield made
    made.shutdown()
    made.server_close()
    made.thread.join()


def test_files_come_over_http_and_not_over_mqtt(fleet, server, tmp_path):
    assert files_of(fleet.start(url=server.url).fetch()) == expected(tmp_path / "checkpoint-1")
    assert fleet.asked() == {}
    assert server.sent[hashlib.sha256(TRUNK).hexdigest()] == len(TRUNK)


def test_metadata_comes_over_http_when_the_broker_has_none(fleet, server, tmp_path):
    for name in ("set", "timestamp", "snapshot", "targets", "1.root"):
        fleet.needs.publish(TOPICS.metadata(name), b"", retain=True)
    assert files_of(fleet.start(url=server.url).fetch()) == expected(tmp_path / "checkpoint-1")
    assert server.sent["timestamp.json"] > 0


def test_a_server_without_ranges_is_good_enough(fleet, server, tmp_path):
    server.ranges = False
    assert files_of(fleet.start(url=server.url).fetch()) == expected(tmp_path / "checkpoint-1")


def test_a_transfer_that_breaks_off_goes_on_without_a_block_twice(fleet, server, tmp_path):
    server.breaks = 1
    fetched = fleet.start(url=server.url, retry_s=0.01).fetch()
    assert files_of(fetched) == expected(tmp_path / "checkpoint-1")
    assert server.sent.get(hashlib.sha256(TRUNK).hexdigest(), 0) < len(TRUNK) + BLOCK_BYTES


def test_when_the_server_fails_the_broker_goes_on(fleet, server, tmp_path, caplog):
    server.fails = 10**6
    assert files_of(fleet.start(url=server.url).fetch()) == expected(tmp_path / "checkpoint-1")
    assert "MQTT goes on meanwhile" in caplog.text
    assert hashlib.sha256(TRUNK).hexdigest() in fleet.asked()


def test_a_server_that_falls_silent_does_not_hold_the_release_up(fleet, server, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "_STALL_S", 0.05)
    server.silent = threading.Event()
    fetched = fleet.start(url=server.url).fetch()
    server.silent.set()
    assert files_of(fetched) == expected(tmp_path / "checkpoint-1")
    assert hashlib.sha256(TRUNK).hexdigest() in fleet.asked()


def test_a_server_with_other_files_only_costs_time(fleet, server, tmp_path):
    path = tmp_path / "www" / "blobs" / hashlib.sha256(TRUNK).hexdigest()
    path.write_bytes(TRUNK[::-1] + b"and more")
    fetched = fleet.start(url=server.url, retry_s=0.5).fetch(turns=60)
    assert fetched is None
    path.write_bytes(TRUNK)
    assert files_of(fleet.fetch()) == expected(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("url", ["ftp://example.org", "file:///etc", "example.org"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ConfigError, match="must begin with http"):
        HttpSource(url, retry_s=1.0)


def test_what_is_exported_is_exported_once(fleet, tmp_path):
    assert export(fleet.registry, tmp_path / "again") > len(REQUIRED)
    assert export(fleet.registry, tmp_path / "again") == 0
